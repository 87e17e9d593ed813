"""losses.py against slow loops written from the equations, sentence-transformers, and hand-worked numbers."""

import math
import warnings
from decimal import Decimal, localcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from two_processes import run_in_two_processes

from q3vl_mini import losses
from q3vl_mini.losses import (
    classification_loss,
    cosent_loss,
    cosine,
    distillation_loss,
    info_nce,
    info_nce_masks,
    info_nce_scores,
    next_token_loss,
    relevance_score,
    yes_no_loss,
)
from q3vl_mini.prefix_info_nce import prefix_info_nce

B, K, D = 6, 3, 4


@pytest.fixture
def batch():
    """A random batch in float64 whose documents 1 and 4 are one document, with ragged negatives.

    Query 2 lies near its document, the others anywhere: so in every block some terms are masked and some are not.
    """
    g = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(B, D, generator=g, dtype=torch.float64) for _ in range(2))
    documents[4] = documents[1]
    documents[2] = queries[2] + 0.1 * documents[2]
    negatives = torch.randn(B, K, D, generator=g, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 0], [0, 1, 1]]).bool()
    ids = torch.tensor([10, 11, 12, 13, 11, 15])
    negative_ids = torch.arange(100, 100 + B * K).view(B, K)
    negative_ids[0, 1] = 10  # the positive of query 0 was labelled a negative of it too
    negative_ids[2, 0] = 13  # a negative of query 2 is the positive of query 3
    return {
        "queries": queries,
        "documents": documents,
        "negatives": negatives,
        "negatives_mask": mask,
        "document_ids": ids,
        "negative_ids": negative_ids,
    }


def cos(a, b):
    return (a @ b) / (a.norm() * b.norm())


def kept_terms(
    queries,
    documents,
    negatives=None,
    negatives_mask=None,
    document_ids=None,
    negative_ids=None,
    margin=0.1,
    query_document=True,
    query_query=True,
    document_document=True,
    others_negatives=False,
):
    """Equation 1 word by word: for each query its positive score and the list of scores whose mask is 1."""
    n = len(queries)
    rows = []
    for i in range(n):
        positive = cos(queries[i], documents[i])
        terms = []

        def add(score, same_document, positive=positive, terms=terms):
            if score <= positive + margin and not same_document:
                terms.append(score)

        def same(a, b, i=i):
            return document_ids is not None and a is not None and int(document_ids[i]) == int(a[b])

        for j in range(n):
            for k in range(0 if negatives is None else negatives.shape[1]):
                if (j == i or others_negatives) and (negatives_mask is None or negatives_mask[j, k]):
                    add(cos(queries[i], negatives[j, k]), same(negative_ids, (j, k)))
            if j != i and query_document:
                add(cos(queries[i], documents[j]), same(document_ids, j))
            if j != i and query_query:
                add(cos(queries[i], queries[j]), same(document_ids, j))
            if j != i and document_document:
                add(cos(documents[i], documents[j]), same(document_ids, j))
        rows.append((positive, terms))
    return rows


def slow_info_nce(*args, temperature, **kwargs):
    total = 0.0
    rows = kept_terms(*args, **kwargs)
    for positive, terms in rows:
        z = (positive / temperature).exp() + sum((term / temperature).exp() for term in terms)
        total = total - torch.log((positive / temperature).exp() / z)
    return total / len(rows)


def exact_cross_entropy(right, others, temperature):
    """-log(e^{right/tau} / (e^{right/tau} + sum e^{other/tau})) in decimals, where e^1000 is a number as any other."""
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 50, 10**9, -(10**9)
        e_right, *e_others = [(Decimal(float(s)) / Decimal(temperature)).exp() for s in [right, *others]]
        return float(((e_right + sum(e_others)) / e_right).ln())


def with_gradients(loss, *tensors):
    """The loss, and its gradients for copies of `tensors`."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = loss(*leaves)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves]


STAGE_2 = {"query_query": False, "document_document": False}
SETTINGS = {
    "stage 1": {},
    "stage 2": STAGE_2,
    "no query-query": {"query_query": False},
    "no document-document": {"document_document": False},
    "no query-document": {"query_document": False},
    "others' negatives": {"others_negatives": True},
    "no margin": {"margin": math.inf},
    "no ids": {"document_ids": None, "negative_ids": None},
    "no negatives": {"negatives": None, "negatives_mask": None, "negative_ids": None},
    "full negatives": {"negatives_mask": None},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_info_nce_equals_the_equation_and_its_gradients(batch, setting, temperature):
    options = {**batch, **SETTINGS[setting]}
    tensors = [options.pop(name) for name in ("queries", "documents", "negatives")]
    tensors = [t for t in tensors if t is not None]
    loss, gradients = with_gradients(partial(info_nce, temperature=temperature, **options), *tensors)
    expected, expected_gradients = with_gradients(partial(slow_info_nce, temperature=temperature, **options), *tensors)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-12)
        assert gradient.abs().max() > 1e-3


def test_every_switch_changes_the_loss(batch):
    """No two settings agree, so a switch that did nothing, or the wrong mask, would fail the test above."""
    values = [float(info_nce(**{**batch, **options}, temperature=0.5)) for options in SETTINGS.values()]
    assert len({round(v, 9) for v in values}) == len(SETTINGS)


def test_info_nce_gradcheck(batch):
    def loss(queries, documents, negatives, temperature):
        tensors = {"queries": queries, "documents": documents, "negatives": negatives}
        return info_nce(**{**batch, **tensors}, temperature=temperature, others_negatives=True)

    tensors = [batch[name].requires_grad_() for name in ("queries", "documents", "negatives")]
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)  # it may be learned
    assert torch.autograd.gradcheck(loss, (*tensors, temperature))


def test_every_mask_fires_and_spares(batch):
    blocks = {k: batch[k] for k in ("queries", "documents", "negatives")}
    ids = {k: batch[k] for k in ("negatives_mask", "document_ids", "negative_ids")}
    scores = info_nce_scores(**blocks, others_negatives=True)
    masks = info_nce_masks(scores, **ids)
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {
        "positive": (B, 1),
        "hard_negative": (B, K),
        "query_document": (B, B),
        "query_query": (B, B),
        "document_document": (B, B),
        "others_negative": (B, B, K),
    }
    assert masks["positive"].all()
    for name in masks.keys() - {"positive"}:
        too_high = scores[name] > scores["positive"].view(-1, *[1] * (scores[name].ndim - 1)) + 0.1
        assert too_high.any() and not masks[name][too_high].any()
        assert masks[name].any() and not masks[name].all()
    generous = info_nce_masks(scores, margin=math.inf, **ids)  # now only identity and padding mask
    off_diagonal = ~torch.eye(B, dtype=torch.bool)
    off_diagonal[1, 4] = off_diagonal[4, 1] = False
    for name in ("query_document", "query_query", "document_document"):
        assert torch.equal(generous[name], off_diagonal)
    assert not generous["hard_negative"][0, 1] and not generous["others_negative"][3, 2, 0]
    assert generous["others_negative"][0, 2, 0] and not generous["others_negative"].diagonal().any()


def test_a_masked_term_gets_no_gradient_and_a_kept_one_does():
    query, positive = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.8, 0.6]])
    negatives = torch.tensor([[[0.99, 0.1], [0.6, -0.8]]], requires_grad=True)  # cosine about 0.995 > 0.9, and 0.6
    info_nce(query, positive, negatives, temperature=0.1).backward()
    assert negatives.grad[0, 0].abs().max() == 0
    assert negatives.grad[0, 1].abs().max() > 0.01


@pytest.mark.parametrize(("margin", "kept"), [(1.0, True), (0.999, False)])
def test_a_tie_with_the_threshold_stays(margin, kept):
    query, orthogonal = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    scores = info_nce_scores(query, orthogonal, query[:, None])  # positive 0, hard negative 1: exactly 0 + margin
    assert info_nce_masks(scores, margin=margin)["hard_negative"].item() is kept


def test_a_duplicate_of_the_positive_is_no_negative():
    """By hand: two queries with one document. With ids nothing is left to contrast; without, the loss is log 4."""
    q, d, ids = torch.ones(2, 3), torch.ones(2, 3), torch.tensor([7, 7])
    assert info_nce(q, d, temperature=0.1, document_ids=ids).item() == 0
    assert info_nce(q, d, temperature=0.1).item() == pytest.approx(math.log(4), rel=1e-6)


def test_stage_2_ignores_how_alike_queries_or_documents_are(batch):
    stage_2 = partial(info_nce, **STAGE_2, temperature=0.1)
    q, d = batch["queries"], batch["documents"]
    z = (cosine(q, d) / 0.1).masked_fill(cosine(q, d) > cosine(q, d).diagonal()[:, None] + 0.1, -math.inf)
    expected = (z.logsumexp(1) - z.diagonal()).mean()
    torch.testing.assert_close(stage_2(q, d), expected)
    assert not torch.isclose(info_nce(q, d, temperature=0.1), expected)


def test_no_hard_negatives_as_none_or_as_zero_of_them(batch):
    q, d = batch["queries"], batch["documents"]
    for others in (False, True):
        none = info_nce(q, d, temperature=0.1, others_negatives=others)
        zero = info_nce(q, d, torch.empty(B, 0, D).double(), temperature=0.1, others_negatives=others)
        torch.testing.assert_close(zero, none, rtol=0, atol=0)


@pytest.mark.parametrize("junk", [0.0, 1e30, math.nan, math.inf])
def test_the_content_of_padding_reaches_neither_loss_nor_gradient(batch, junk):
    padded = {**batch, "negatives": batch["negatives"].masked_fill(~batch["negatives_mask"][..., None], junk)}
    kwargs = {"temperature": 0.1, "others_negatives": True}
    for loss, options in ((info_nce, kwargs), (prefix_info_nce, kwargs), (classification_loss, {"temperature": 0.1})):
        own = ("queries", "documents", "negatives", "negatives_mask")
        names = own if loss is classification_loss else padded.keys()
        value, (gradient,) = with_gradients(
            lambda q, loss=loss, names=names, options=options: loss(
                **{**{n: padded[n] for n in names}, "queries": q}, **options
            ),
            batch["queries"],
        )
        torch.testing.assert_close(value, loss(**{n: batch[n] for n in names}, **options))
        assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_cosines_of_half_precision_inputs_are_computed_in_float32(batch):
    q, d = batch["queries"].bfloat16(), batch["documents"].bfloat16()
    exact = cosine(q.double(), d.double())
    naive = F.normalize(q, dim=-1) @ F.normalize(d, dim=-1).mT  # the wrong variant
    assert (cosine(q, d) - exact).abs().max() < 1e-6 < 1e-4 < (naive - exact).abs().max()


def test_autocast_does_not_lower_the_precision(batch):
    q, d = batch["queries"].float(), batch["documents"].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(q, d, temperature=0.02)
        assert (q @ d.mT).dtype == torch.bfloat16  # autocast is really on
    torch.testing.assert_close(inside, info_nce(q, d, temperature=0.02), rtol=0, atol=0)


def test_an_all_zero_embedding_gives_finite_gradients():
    loss, gradients = with_gradients(partial(info_nce, temperature=0.02), torch.zeros(2, 4), torch.eye(2, 4))
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"documents": torch.ones(B - 1, D)}, r"documents has shape \(5, 4\); expected \(6, 4\)"),
        ({"negatives": torch.ones(B, D)}, r"negatives have shape \(6, 4\)"),
        ({"negatives_mask": torch.ones(B, K + 1).bool()}, "mask of negatives has shape"),
        ({"queries": torch.ones(0, D), "documents": torch.ones(0, D)}, "B >= 1"),
        ({"offset": 1}, "offset 1 with 6 rows is outside the batch of 6 rows"),
        ({"all_documents": torch.ones(2 * B, D)}, "the batch has 12 documents"),
    ],
)
def test_errors_name_what_was_given_and_expected(batch, change, message):
    with pytest.raises(ValueError, match=message):
        info_nce(**{**batch, "temperature": 0.1, **change})


# What holds for every loss

TEACHER = 3 * torch.randn(B, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
GRADES = torch.tensor([0.1, 0.9, 0.9, 0.4, 0.1, 0.5])


def candidates_mask(batch):
    """The hard negatives as candidates of a distillation: the first is the positive, and always there."""
    return batch["negatives_mask"] | (torch.arange(K) == 0)


def exact_info_nce(b, temperature, **options):
    return [exact_cross_entropy(right, terms, temperature) for right, terms in kept_terms(**b, **options)]


def exact_classification(b, temperature):
    rows = []
    for q, d, own, mask in zip(b["queries"], b["documents"], b["negatives"], b["negatives_mask"], strict=True):
        rows.append(exact_cross_entropy(cos(q, d), [cos(q, n) for n in own[mask]], temperature))
    return rows


def exact_cosent(b, temperature):
    c = [cos(q, d) for q, d in zip(b["queries"], b["documents"], strict=True)]
    differences = [c[m] - c[i] for i in range(B) for m in range(B) if GRADES[i] > GRADES[m]]
    return [exact_cross_entropy(0.0, differences, temperature)]


def exact_distillation(b, temperature):
    rows = []
    for i in range(B):
        kept = [k for k in range(K) if candidates_mask(b)[i, k]]
        c = {k: cos(b["queries"][i], b["negatives"][i, k]) for k in kept}
        loss = 0.0
        for k in kept:
            p = math.exp(-exact_cross_entropy(TEACHER[i, k], [TEACHER[i, j] for j in kept if j != k], 2.0))
            loss += p * exact_cross_entropy(c[k], [c[j] for j in kept if j != k], temperature)
        rows.append(loss)
    return rows


LOSSES = {  # the loss of a batch at a temperature, and the terms whose mean it is, in decimals
    "info_nce, stage 1": (lambda b, tau: info_nce(**b, temperature=tau), exact_info_nce),
    "info_nce, stage 2": (
        lambda b, tau: info_nce(**b, temperature=tau, **STAGE_2),
        partial(exact_info_nce, **STAGE_2),
    ),
    "info_nce, as training has it": (lambda b, tau: prefix_info_nce(**b, temperature=tau), exact_info_nce),
    "classification": (
        lambda b, tau: classification_loss(
            b["queries"], b["documents"], b["negatives"], b["negatives_mask"], temperature=tau
        ),
        exact_classification,
    ),
    "cosent": (lambda b, tau: cosent_loss(b["queries"], b["documents"], GRADES, temperature=tau), exact_cosent),
    "distillation": (
        lambda b, tau: distillation_loss(
            b["queries"], b["negatives"], TEACHER, temperature=tau, teacher_temperature=2.0, mask=candidates_mask(b)
        ),
        exact_distillation,
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [1e-3, 1e3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_loss_is_right_and_its_gradient_finite_at_extreme_temperatures_in_any_precision(
    batch, name, temperature, dtype
):
    loss, exact = LOSSES[name]
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    leaves = [given[k].requires_grad_() for k in ("queries", "documents", "negatives")]
    value = loss(given, temperature)
    value.backward()
    exactly = exact({k: v.detach().double() if v.is_floating_point() else v for k, v in given.items()}, temperature)
    tolerance = {"rel": 1e-9} if dtype == torch.float64 else {"rel": 1e-4}
    assert value.item() == pytest.approx(sum(exactly) / len(exactly), **tolerance)
    assert value.dtype == (dtype if dtype == torch.float64 else torch.float32)
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert all(g.dtype == dtype and g.isfinite().all() for g in gradients)
    if temperature > 1:  # at 0.001 a row may be so surely right that its gradient is 0 in float16
        assert gradients[0].abs().max() > 0


ALIKE = torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 2, 2)  # queries, documents, negatives of one direction
SUMS = {  # a loss where all scores are equal, and of how many terms it is the logarithm
    "info_nce, stage 1": (lambda: info_nce(*ALIKE, temperature=0.02), 1 + 2 + 3 * 2),
    "info_nce, stage 2": (lambda: info_nce(*ALIKE, temperature=0.02, **STAGE_2), 1 + 2 + 2),
    "info_nce, as training has it": (lambda: prefix_info_nce(*ALIKE, temperature=0.02), 1 + 2 + 3 * 2),
    "classification": (lambda: classification_loss(*ALIKE, temperature=0.02), 1 + 2),
    "cosent": (lambda: cosent_loss(*ALIKE[:2], torch.tensor([0, 1, 1]), temperature=0.02), 1 + 2),
    "distillation": (lambda: distillation_loss(ALIKE[0], ALIKE[2], torch.zeros(3, 2), temperature=0.02), 2),
    "yes or no": (lambda: yes_no_loss(torch.zeros(3), torch.tensor([0, 1, 1])), 2),
    "next token": (lambda: next_token_loss(torch.zeros(3, 5), 1, 4, torch.tensor([0, 1, 1])), 5),
}


@pytest.mark.parametrize("name", SUMS)
def test_equal_scores_share_the_probability(name):
    loss, terms = SUMS[name]
    assert loss().item() == pytest.approx(math.log(terms), rel=1e-5)


NOTHING = {  # losses of (queries, documents, negatives) with nothing to tell apart
    "one query": lambda q, d, n: info_nce(q[:1], d[:1], temperature=0.02),
    "one query, as in training": lambda q, d, n: prefix_info_nce(q[:1], d[:1], temperature=0.02),
    "no wrong labels": lambda q, d, n: classification_loss(q, d, n[:, :0], temperature=0.02),
    "all wrong labels padding": lambda q, d, n: classification_loss(
        q, d, n, torch.zeros(n.shape[:2], dtype=torch.bool), temperature=0.02
    ),
    "one pair": lambda q, d, n: cosent_loss(q[:1], d[:1], torch.ones(1), temperature=1e-3),
    "equal grades": lambda q, d, n: cosent_loss(q, d, torch.ones(len(q)), temperature=1e-3),
    "one candidate": lambda q, d, n: distillation_loss(q, n[:, :1], torch.ones(len(q), 1), temperature=0.02),
    "all candidates padding": lambda q, d, n: distillation_loss(
        q, n, torch.ones(n.shape[:2]), temperature=0.02, mask=torch.zeros(n.shape[:2], dtype=torch.bool)
    ),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_cannot_be_told_apart_costs_nothing(batch, name):
    leaves = [batch[k].requires_grad_() for k in ("queries", "documents", "negatives")]
    loss = NOTHING[name](*leaves)
    loss.backward()
    assert loss == 0 and all(leaf.grad is None or (leaf.grad == 0).all() for leaf in leaves)


ROWS = {  # losses whose rows do not meet
    "info_nce": partial(info_nce, temperature=0.2, margin=math.inf, query_document=False, **STAGE_2),
    "info_nce, as training has it": partial(
        prefix_info_nce, temperature=0.2, margin=math.inf, query_document=False, **STAGE_2
    ),
    "classification": partial(classification_loss, temperature=0.2),
    "distillation": lambda q, d, n: distillation_loss(q, n, n[:, :, 0].detach(), temperature=0.2),
    "yes or no": lambda q, d, n: yes_no_loss(q[:, 0], d[:, 0] > 0),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_batch_is_the_mean_of_its_batches_of_one(batch, name):
    tensors = [batch[k] for k in ("queries", "documents", "negatives")]
    alone = [ROWS[name](*(x[i : i + 1] for x in tensors)) for i in range(B)]
    torch.testing.assert_close(ROWS[name](*tensors), torch.stack(alone).mean())
    assert len({round(x.item(), 9) for x in alone}) == B


# Against sentence-transformers, on plain tensors


@pytest.fixture(scope="module")
def reference_losses():
    return pytest.importorskip("sentence_transformers.sentence_transformer.losses")


@pytest.mark.parametrize("n_negatives", [0, K])
def test_info_nce_equals_multiple_negatives_ranking(batch, reference_losses, n_negatives):
    reference = reference_losses.MultipleNegativesRankingLoss(None, scale=1 / 0.05)
    q, d, n = batch["queries"], batch["documents"], batch["negatives"][:, :n_negatives]
    expected = reference.compute_loss_from_embeddings([q, d, *n.unbind(1)], None)
    plain = {**STAGE_2, "margin": math.inf, "others_negatives": True}
    torch.testing.assert_close(info_nce(q, d, n, temperature=0.05, **plain), expected)


def test_stage_1_equals_their_joint_softmax_over_three_directions(batch, reference_losses):
    directions = ("query_to_doc", "query_to_query", "doc_to_doc")
    reference = reference_losses.MultipleNegativesRankingLoss(None, scale=1 / 0.05, directions=directions)
    q, d = batch["queries"], batch["documents"]
    expected = reference.compute_loss_from_embeddings([q, d], None)
    torch.testing.assert_close(info_nce(q, d, temperature=0.05, margin=math.inf), expected)


@pytest.mark.parametrize("temperature", [1e-3, 0.05, 1e2])
def test_cosent_equals_theirs(batch, reference_losses, temperature):
    scores = torch.tensor([0.1, 0.9, 0.9, 0.4, 0.1, 0.5])
    reference = reference_losses.CoSENTLoss(None, scale=1 / temperature)
    q, d = batch["queries"], batch["documents"]
    expected = reference.compute_loss_from_embeddings([q, d], scores)
    torch.testing.assert_close(cosent_loss(q, d, scores, temperature=temperature), expected)


def test_distillation_equals_their_divergence_plus_the_teachers_entropy(batch, reference_losses):
    q, candidates = batch["queries"], batch["negatives"]
    teacher = torch.randn(B, K, generator=torch.Generator().manual_seed(1)).double()
    by_cosine = {"similarity_fct": lambda a, b: F.cosine_similarity(a, b, dim=-1)}  # theirs defaults to dot products
    reference = reference_losses.DistillKLDivLoss(None, **by_cosine, student_temperature=0.1, teacher_temperature=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        divergence = reference.compute_loss_from_embeddings([q, *candidates.unbind(1)], teacher) / 0.1**2
    p = (teacher / 2.0).softmax(1)
    loss = distillation_loss(q, candidates, teacher, temperature=0.1, teacher_temperature=2.0)
    torch.testing.assert_close(loss, divergence - (p * p.log()).sum(1).mean())


def test_yes_no_loss_equals_their_binary_cross_entropy():
    losses = pytest.importorskip("sentence_transformers.cross_encoder.losses")
    from sentence_transformers import CrossEncoder

    margins, labels = torch.linspace(-3, 2, 6), torch.tensor([0, 1, 1, 0, 0, 1])

    class Given(CrossEncoder):  # a model whose margins are given
        num_labels, device = 1, torch.device("cpu")

        def __init__(self):
            torch.nn.Module.__init__(self)

        def preprocess(self, pairs, **_):
            return {}

        def forward(self, inputs):
            return {"scores": margins[:, None]}

    pairs = [["query"] * 6, ["document"] * 6]
    expected = losses.BinaryCrossEntropyLoss(Given())(pairs, labels)
    torch.testing.assert_close(yes_no_loss(margins, labels), expected)


# Classification


def test_classification_equals_a_loop_over_the_querys_own_labels(batch):
    def slow(q, d, n):
        total = 0.0
        for i in range(B):
            right = (cos(q[i], d[i]) / 0.2).exp()
            wrong = sum((cos(q[i], n[i, k]) / 0.2).exp() for k in range(K) if batch["negatives_mask"][i, k])
            total = total - torch.log(right / (right + wrong))
        return total / B

    tensors = [batch[name] for name in ("queries", "documents", "negatives")]
    fast = partial(classification_loss, negatives_mask=batch["negatives_mask"], temperature=0.2)
    loss, gradients = with_gradients(fast, *tensors)
    expected, expected_gradients = with_gradients(slow, *tensors)
    torch.testing.assert_close(loss, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)
    assert torch.autograd.gradcheck(fast, [t.requires_grad_() for t in tensors])


def test_classification_ignores_the_labels_of_others(batch):
    q, d, n = batch["queries"], batch["documents"], batch["negatives"]
    with_others = info_nce(q, d, n, temperature=0.2, margin=math.inf, **STAGE_2)  # the wrong variant
    without = info_nce(q, d, n, temperature=0.2, margin=math.inf, **STAGE_2, query_document=False)
    torch.testing.assert_close(classification_loss(q, d, n, temperature=0.2), without)
    assert not torch.isclose(without, with_others)


def test_a_row_without_wrong_labels_adds_nothing(batch):
    loss, (gradient,) = with_gradients(
        lambda q: classification_loss(
            q, batch["documents"], batch["negatives"], batch["negatives_mask"], temperature=0.2
        ),
        batch["queries"],
    )
    assert not batch["negatives_mask"][3].any() and (gradient[3] == 0).all() and loss > 0
    assert gradient[[0, 1, 2, 4, 5]].abs().amax(1).min() > 0


# CoSENT


@pytest.mark.parametrize("scores", [[0.1, 0.9, 0.9, 0.4, 0.1, 0.5], [6, 5, 4, 3, 2, 1], [0, 0, 1, 1, 1, 1]])
def test_cosent_equals_a_loop_over_pairs_of_pairs(batch, scores):
    scores = torch.tensor(scores, dtype=torch.float64)

    def slow(q, d):
        total = 1.0
        for i in range(B):
            for m in range(B):
                if scores[i] > scores[m]:
                    total = total + ((cos(q[m], d[m]) - cos(q[i], d[i])) / 0.3).exp()
        return torch.log(total)

    fast = partial(cosent_loss, scores=scores, temperature=0.3)
    loss, gradients = with_gradients(fast, batch["queries"], batch["documents"])
    expected, expected_gradients = with_gradients(slow, batch["queries"], batch["documents"])
    torch.testing.assert_close(loss, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)
    assert torch.autograd.gradcheck(fast, (batch["queries"].requires_grad_(), batch["documents"].requires_grad_()))
    assert not torch.isclose(loss, cosent_loss(batch["queries"], batch["documents"], -scores, temperature=0.3))


def test_cosent_by_hand():
    """Two pairs at cosines 1 and 0 in the wrong order: log(1 + e^{(1 - 0)/0.5})."""
    q, d = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert cosent_loss(q, d, torch.tensor([0, 1]), temperature=0.5).item() == pytest.approx(math.log(1 + math.e**2))


# Distillation


@pytest.mark.parametrize("temperature", [1e-3, 0.05, 1e2])
def test_distillation_equals_a_loop_with_ragged_candidates(batch, temperature):
    mask = batch["negatives_mask"].clone()
    mask[:, 0] = True
    teacher = TEACHER

    def slow(q, candidates):
        total = 0.0
        for i in range(B):
            kept = [k for k in range(K) if mask[i, k]]
            student = [cos(q[i], candidates[i, k]) / temperature for k in kept]
            top = max(float(s.detach()) for s in student)
            log_z = top + torch.log(sum((s - top).exp() for s in student))
            z = sum(math.exp(teacher[i, k] / 2.0) for k in kept)
            for s, k in zip(student, kept, strict=True):
                total = total - math.exp(teacher[i, k] / 2.0) / z * (s - log_z)
        return total / B

    ragged = {"teacher_logits": teacher.masked_fill(~mask, math.nan), "mask": mask}
    candidates = batch["negatives"].masked_fill(~mask[..., None], math.nan)
    fast = partial(distillation_loss, temperature=temperature, teacher_temperature=2.0, **ragged)
    loss, gradients = with_gradients(fast, batch["queries"], candidates)
    expected, expected_gradients = with_gradients(slow, batch["queries"], batch["negatives"])
    torch.testing.assert_close(loss, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("teacher_temperature", [1e-3, 1e3])
def test_a_cold_teacher_points_and_a_hot_one_weighs_all_alike(batch, teacher_temperature):
    """By hand: at temperature 0 only the teacher's best candidate counts, at infinity all do alike."""
    log_p = (cosine(batch["queries"][:, None], batch["negatives"])[:, 0] / 0.1).log_softmax(1)
    best = log_p[torch.arange(B), TEACHER.argmax(1)]
    expected = -best.mean() if teacher_temperature < 1 else -log_p.mean()
    options = {"temperature": 0.1, "teacher_temperature": teacher_temperature}
    loss = distillation_loss(batch["queries"], batch["negatives"], TEACHER, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    assert abs(best.mean() - log_p.mean()) > 0.5


def test_distillation_gradcheck_and_no_gradient_for_the_teacher(batch):
    teacher = torch.randn(B, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    q, candidates = batch["queries"].requires_grad_(), batch["negatives"].requires_grad_()
    loss = partial(distillation_loss, teacher_logits=teacher, temperature=0.2)
    assert torch.autograd.gradcheck(loss, (q, candidates))
    loss(q, candidates).backward()
    assert teacher.grad is None


def test_distillation_is_at_rest_where_student_and_teacher_agree(batch):
    agreeing = cosine(batch["queries"][:, None], batch["negatives"])[:, 0] / 0.1 + 5  # a constant is no difference
    at_rest = partial(distillation_loss, teacher_logits=agreeing, temperature=0.1)
    loss, gradients = with_gradients(at_rest, batch["queries"], batch["negatives"])
    assert max(g.abs().max() for g in gradients) < 1e-12
    p = agreeing.softmax(1)
    torch.testing.assert_close(loss, -(p * p.log()).sum(1).mean())
    swapped = partial(distillation_loss, teacher_logits=agreeing.flip(1), temperature=0.1)
    assert swapped(batch["queries"], batch["negatives"]) > loss + 0.1


# Reranker


def test_yes_no_loss_by_hand():
    """logit(yes) - logit(no) = log 3, so p(yes) = 3/4: relevant costs log(4/3), irrelevant log 4."""
    logits = torch.tensor([[1.0, 1.0 + math.log(3)]] * 2)
    expected = (math.log(4 / 3) + math.log(4)) / 2
    assert yes_no_loss(logits, torch.tensor([1, 0])).item() == pytest.approx(expected)
    assert yes_no_loss(logits[:, 1] - logits[:, 0], torch.tensor([True, False])).item() == pytest.approx(expected)
    assert yes_no_loss(logits[:1], torch.tensor([1])).item() == pytest.approx(math.log(4 / 3))  # not log 4
    assert relevance_score(torch.tensor(math.log(3))).item() == pytest.approx(3 / 4)


def test_full_vocabulary_loss_is_yes_no_loss_plus_the_cost_of_neither():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 11, generator=g, dtype=torch.float64)
    labels = torch.tensor([1, 0, 0, 1, 1])
    expected = 0.0
    for row, label in zip(logits, labels, strict=True):
        p = row.exp() / row.exp().sum()
        expected = expected - torch.log(p[7] if label else p[2]) / 5
    full = next_token_loss(logits, yes_id=7, no_id=2, labels=labels)
    torch.testing.assert_close(full, expected)
    neither = -logits.softmax(1)[:, [2, 7]].sum(1).log().mean()
    torch.testing.assert_close(full, yes_no_loss(logits[:, [2, 7]], labels) + neither)
    assert not torch.isclose(full, next_token_loss(logits, yes_id=2, no_id=7, labels=labels))


def test_reranker_losses_gradcheck_and_extremes():
    labels = torch.tensor([1, 0, 1])
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: yes_no_loss(x[:, :2], labels), logits)
    assert torch.autograd.gradcheck(lambda x: yes_no_loss(x[:, 0], labels), logits)
    assert torch.autograd.gradcheck(lambda x: next_token_loss(x, 3, 5, labels), logits)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        margins = torch.tensor([-1e4, 1e4, 0.0], dtype=dtype, requires_grad=True)
        loss = yes_no_loss(margins, labels)
        loss.backward()
        expected = (2 * float(margins[1].detach()) + math.log(2)) / 3
        assert loss.item() == pytest.approx(expected, rel=1e-6) and loss.dtype == torch.float32
        torch.testing.assert_close(margins.grad.float(), torch.tensor([-1 / 3, 1 / 3, -1 / 6]), atol=2e-3, rtol=0)
    assert relevance_score(torch.tensor([-1e4, 1e4])).tolist() == [0.0, 1.0]


def test_yes_no_loss_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"logits have shape \(2, 3\)"):
        yes_no_loss(torch.ones(2, 3), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"labels has shape \(3,\)"):
        yes_no_loss(torch.ones(2), torch.tensor([1, 0, 1]))


# Two processes


def joint_batch():
    g = torch.Generator().manual_seed(3)
    inputs = {"queries": torch.randn(8, 5, generator=g), "documents": torch.randn(8, 5, generator=g)}
    inputs["documents"][6] = inputs["documents"][1]  # a duplicate on the other process
    inputs["negatives"] = torch.randn(8, 2, 5, generator=g)
    negatives_mask = torch.rand(8, 2, generator=g) < 0.7
    document_ids = torch.arange(8)
    document_ids[6] = 1
    inputs = {name: x.double() for name, x in inputs.items()}
    return inputs, negatives_mask, document_ids, torch.rand(8, generator=g)


def encoder():
    torch.manual_seed(0)
    return torch.nn.Linear(5, 4).double()


def gather(x, differentiable=True):
    """Every process's rows, in rank order."""
    if differentiable:
        import torch.distributed.nn.functional as differentiable_ops

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return torch.cat(differentiable_ops.all_gather(x))
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach())
    return torch.cat(parts)


def gathered_info_nce(embed, inputs, negatives_mask, document_ids, rank, rows, differentiable=True):
    local = {name: embed(x[rows]) for name, x in inputs.items()}
    return info_nce(
        **local,
        **{f"all_{name}": gather(x, differentiable) for name, x in local.items()},
        temperature=0.2,
        others_negatives=True,
        negatives_mask=negatives_mask[rows],
        all_negatives_mask=gather(negatives_mask[rows].int(), differentiable=False),
        document_ids=document_ids[rows],
        all_document_ids=gather(document_ids[rows], differentiable=False),
        offset=rank * 4,
    )


def two_process_worker(rank, folder):
    dist.init_process_group("gloo")
    inputs, negatives_mask, document_ids, scores = joint_batch()
    rows = slice(rank * 4, rank * 4 + 4)

    def run(loss):
        model = encoder()
        value = loss(model)
        value.backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()  # the average over the processes, as DDP takes it
        return gather(value.detach()[None], differentiable=False), [p.grad for p in model.parameters()]

    shared = (inputs, negatives_mask, document_ids, rank, rows)
    results = {
        "info_nce": run(lambda embed: gathered_info_nce(embed, *shared)),
        "cut": run(lambda embed: gathered_info_nce(embed, *shared, differentiable=False)),
        "cosent": run(
            lambda embed: cosent_loss(
                gather(embed(inputs["queries"][rows])),
                gather(embed(inputs["documents"][rows])),
                scores,
                temperature=0.2,
            )
        ),
    }
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("gloo")
    run_in_two_processes(two_process_worker, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def joint_result(loss):
    model = encoder()
    value = loss(model)
    value.backward()
    return value.detach(), [p.grad for p in model.parameters()]


def test_two_processes_give_the_loss_and_gradients_of_the_joint_batch(two_processes):
    inputs, negatives_mask, document_ids, _ = joint_batch()
    expected, expected_gradients = joint_result(
        lambda embed: info_nce(
            **{name: embed(x) for name, x in inputs.items()},
            temperature=0.2,
            others_negatives=True,
            negatives_mask=negatives_mask,
            document_ids=document_ids,
        )
    )
    for results in two_processes:
        values, gradients = results["info_nce"]
        torch.testing.assert_close(values.mean(), expected)
        assert not torch.isclose(values[0], values[1])  # each process has its own rows
        torch.testing.assert_close(gradients, expected_gradients)
        _, cut = results["cut"]  # the wrong variant: a gather without gradients
        assert (cut[0] - expected_gradients[0]).abs().max() > 1e-3


def test_cosent_over_the_gathered_batch_has_the_joint_gradients(two_processes):
    inputs, _, _, scores = joint_batch()
    expected, expected_gradients = joint_result(
        lambda embed: cosent_loss(embed(inputs["queries"]), embed(inputs["documents"]), scores, temperature=0.2)
    )
    for results in two_processes:
        values, gradients = results["cosent"]
        torch.testing.assert_close(values, expected.expand(2))
        torch.testing.assert_close(gradients, expected_gradients)


def test_one_process_with_an_offset_sees_its_rows_of_the_joint_batch(batch):
    """The mean over both halves is the whole, without any process: offset and all_* alone."""
    whole = info_nce(batch["queries"], batch["documents"], temperature=0.2, document_ids=batch["document_ids"])
    everything = {f"all_{n}": batch[n] for n in ("queries", "documents", "document_ids")}
    halves = [
        info_nce(
            batch["queries"][s : s + 3],
            batch["documents"][s : s + 3],
            temperature=0.2,
            document_ids=batch["document_ids"][s : s + 3],
            **everything,
            offset=s,
        )
        for s in (0, 3)
    ]
    torch.testing.assert_close(torch.stack(halves).mean(), whole)


def test_docstrings_name_their_notebook_and_their_example_runs():
    import doctest

    public = [f for name, f in vars(losses).items() if callable(f) and getattr(f, "__module__", "") == losses.__name__]
    shared = (losses.check_info_nce, losses.without_padding)  # with prefix_info_nce.py; no lesson of their own
    for function in public:
        if not function.__name__.startswith("_") and function not in shared:
            assert function.__doc__.rstrip().splitlines()[-1].strip().startswith("Taught in notebooks/"), function
    assert len(public) >= 10
    result = doctest.testmod(losses)
    assert result.attempted > 0 and result.failed == 0
