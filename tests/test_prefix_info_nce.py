"""prefix_info_nce.py against the plain way: `info_nce` at one prefix after the other, with autograd's gradients."""

import math
from functools import partial

import pytest
import torch

from q3vl_mini import prefix_info_nce as module
from q3vl_mini.compression import matryoshka
from q3vl_mini.losses import info_nce
from q3vl_mini.prefix_info_nce import prefix_info_nce

B, K, D = 11, 3, 16
DIMS, WEIGHTS = [16, 4, 9], [1.0, 0.3, 0.5]  # in no order, and none twice another


@pytest.fixture
def batch(monkeypatch):
    """A random batch in float64 with ragged negatives, one document twice; rows go in parts of 4, 4 and 3."""
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 4)
    topic = torch.randn(B, D, dtype=torch.float64)
    queries, documents = (topic + torch.randn_like(topic) for _ in range(2))
    documents[4] = documents[1]
    ids, negative_ids = torch.arange(B), torch.arange(100, 100 + B * K).view(B, K)
    ids[4], negative_ids[0, 1], negative_ids[2, 0] = 1, 0, 3
    return {
        "queries": queries,
        "documents": documents,
        "negatives": torch.randn(B, K, D, dtype=torch.float64) + topic[:, None],
        "negatives_mask": torch.rand(B, K) < 0.7,
        "document_ids": ids,
        "negative_ids": negative_ids,
    }


def plain(dims=DIMS, dim_weights=WEIGHTS, **options):
    names = ("queries", "documents", "negatives", "all_queries", "all_documents", "all_negatives")
    embeddings = {name: options.pop(name) for name in names if name in options}
    return matryoshka(partial(info_nce, **options), embeddings, dims, dim_weights)


def with_gradients(loss, options):
    """The loss, and its gradient for every tensor of floats among the options, by name."""
    leaves = {
        name: x.clone().requires_grad_()
        for name, x in options.items()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    value = loss(**{**options, **leaves})
    value.backward()
    return value.detach(), {name: x.grad for name, x in leaves.items() if x.grad is not None}


SETTINGS = {
    "stage 1": {},
    "stage 2": {"query_query": False, "document_document": False},
    "no query-document": {"query_document": False},
    "hard negatives alone": {"query_document": False, "query_query": False, "document_document": False},
    "others' negatives": {"others_negatives": True},
    "no margin": {"margin": math.inf},
    "narrow margin": {"margin": -0.2},
    "no ids": {"document_ids": None, "negative_ids": None},
    "no negatives": {"negatives": None, "negatives_mask": None, "negative_ids": None},
}


@pytest.mark.parametrize("temperature", [0.02, 0.5])
@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_and_gradients_are_those_of_the_plain_way(batch, setting, temperature):
    options = {**batch, **SETTINGS[setting], "temperature": temperature}
    expected, expected_gradients = with_gradients(plain, options)
    loss, gradients = with_gradients(partial(prefix_info_nce, dims=DIMS, dim_weights=WEIGHTS), options)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("margin", [0.1, math.inf])
def test_gradcheck(batch, margin):
    def loss(queries, documents, negatives):
        tensors = {"queries": queries, "documents": documents, "negatives": negatives}
        options = {"dims": DIMS, "temperature": 0.3, "margin": margin, "others_negatives": True}
        return prefix_info_nce(**{**batch, **tensors}, **options)

    leaves = [batch[name].requires_grad_() for name in ("queries", "documents", "negatives")]
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize(("margin", "terms"), [(1.0, 1 + math.e**2), (0.999, 1.0)])
def test_a_tie_with_the_threshold_stays(margin, terms):
    """By hand, as in test_losses.py: positives at cosine 0, the other document at exactly 0 + 1; tau is 0.5."""
    x = torch.eye(2)
    loss = prefix_info_nce(x, x.flip(0), temperature=0.5, margin=margin, query_query=False, document_document=False)
    assert loss.item() == pytest.approx(math.log(terms), abs=1e-6)


def test_rows_of_one_process_among_those_of_all(batch):
    """What a process with rows 4 to 7 of a joint batch computes, with what it gathered."""
    rows, own = slice(4, 8), ("queries", "documents", "negatives", "document_ids", "negatives_mask", "negative_ids")
    options = {name: batch[name][rows] for name in own} | {f"all_{name}": batch[name] for name in own}
    options |= {"offset": 4, "temperature": 0.1, "others_negatives": True}
    expected, expected_gradients = with_gradients(plain, options)
    loss, gradients = with_gradients(partial(prefix_info_nce, dims=DIMS, dim_weights=WEIGHTS), options)
    torch.testing.assert_close(loss, expected)
    assert gradients.keys() == expected_gradients.keys() and len(gradients) == 6
    torch.testing.assert_close(gradients, expected_gradients)


def test_without_dims_it_is_info_nce(batch):
    options = {**batch, "temperature": 0.1}
    torch.testing.assert_close(prefix_info_nce(**options), info_nce(**options))


def test_half_precision_is_computed_in_float32_and_the_gradient_comes_back_in_it(batch):
    q, d = (batch[name].bfloat16().requires_grad_() for name in ("queries", "documents"))
    with torch.autocast("cpu", torch.bfloat16):
        loss = prefix_info_nce(q, d, temperature=0.02, dims=[8, 16])
    loss.backward()
    assert loss.dtype == torch.float32 and q.grad.dtype == torch.bfloat16
    expected = plain([8, 16], None, queries=q.detach().float(), documents=d.detach().float(), temperature=0.02)
    torch.testing.assert_close(loss.detach(), expected)


def test_what_is_computed_after_it_scales_its_gradient(batch):
    q = batch["queries"].requires_grad_()
    [once] = torch.autograd.grad(prefix_info_nce(q, batch["documents"], temperature=0.1), q)
    [thrice] = torch.autograd.grad(3 * prefix_info_nce(q, batch["documents"], temperature=0.1), q)
    torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.parametrize(("q", "d"), [(torch.zeros(2, 4), torch.eye(2, 4)), (torch.eye(2, 4), torch.eye(2, 4).flip(1))])
def test_all_zero_prefixes_give_finite_gradients(q, d):
    loss, gradients = with_gradients(
        partial(prefix_info_nce, temperature=0.02, dims=[1, 4]), {"queries": q, "documents": d}
    )
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients.values())


def test_a_batch_of_one_without_negatives_costs_nothing(batch):
    one = {"queries": batch["queries"][:1], "documents": batch["documents"][:1]}
    loss, gradients = with_gradients(partial(prefix_info_nce, temperature=0.02, dims=DIMS), one)
    assert loss.abs() < 1e-12 and all(g.abs().max() < 1e-12 for g in gradients.values())


def test_nothing_as_large_as_the_matrix_of_scores_is_kept():
    sizes = []
    x = torch.randn(300, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        prefix_info_nce(x, x.flip(0), temperature=0.1, dims=[2, 4, 8])
        ours = max(sizes)
        plain([2, 4, 8], None, queries=x, documents=x.flip(0), temperature=0.1)
    assert ours <= 300 * 8 and max(sizes) >= 300 * 300  # the hook does see them


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"dims": [32]}, "of 1 to 16"),
        ({"dims": []}, "at least one"),
        ({"dims": [8], "dim_weights": [1, 2]}, "a weight each"),
        ({"offset": 1}, "offset 1 with 11 rows"),
        ({"all_documents": torch.ones(2 * B, D)}, "the batch has 22 documents"),
    ],
)
def test_errors_name_what_was_given_and_expected(batch, change, message):
    with pytest.raises(ValueError, match=message):
        prefix_info_nce(**{**batch, "temperature": 0.1, **change})
