"""compression.py against slow loops written from the formulas, sentence-transformers, and hand-worked numbers."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from q3vl_mini import compression
from q3vl_mini.compression import (
    BinaryQuantizer,
    LearnedStepQuantizer,
    Quantizers,
    asymmetric_scores,
    compressed_objective,
    fake_quantise,
    hamming_scores,
    int8_scores,
    integer_range,
    matryoshka,
    pack_binary,
    quantise_int8,
    truncate,
    unpack_binary,
)
from q3vl_mini.losses import cosent_loss, info_nce

LOSS = partial(info_nce, temperature=0.1)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def slow_lsq(v, step, bits):
    """Esser et al. 2020, equations 1 to 3 and 5, one number at a time: (value, d/dv, d/ds)."""
    q_n, q_p = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    rows = []
    for x in np.ravel(v):
        ratio = x / step
        if ratio <= -q_n:
            rows.append((-q_n * step, 0.0, -q_n))
        elif ratio >= q_p:
            rows.append((q_p * step, 0.0, q_p))
        else:
            rows.append((np.rint(ratio) * step, 1.0, -ratio + np.rint(ratio)))
    return (np.reshape(column, np.shape(v)) for column in zip(*rows, strict=True))


# MRL


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_prefix_is_a_unit_vector_again(kind):
    x = random(5, 8) if kind == "torch" else random(5, 8).numpy()
    prefix = truncate(x, 3)
    for row, whole in zip(np.asarray(prefix), np.asarray(x), strict=True):
        np.testing.assert_allclose(row, whole[:3] / math.sqrt(sum(w * w for w in whole[:3])), rtol=1e-6)
    assert type(prefix) is type(x)


def test_truncate_in_half_precision_with_zeros_and_with_too_many_dimensions():
    assert truncate(random(2, 8, dtype=torch.bfloat16), 4).dtype == torch.float32
    assert truncate(np.ones((2, 8), np.float16), 4).dtype == np.float32
    assert truncate(np.ones((2, 8), np.float64), 4).dtype == np.float64
    assert (truncate(np.zeros((2, 8)), 4) == 0).all() and (truncate(torch.zeros(2, 8), 4) == 0).all()
    for dim in (0, 9):
        with pytest.raises(ValueError, match=f"8 dimensions to {dim}; ask for 1 to 8"):
            truncate(torch.zeros(2, 8), dim)


@pytest.mark.parametrize("dims", [(16,), (16, 8, 4), (16, 15, 13, 11, 8, 7, 5, 3, 2, 1)])
@pytest.mark.parametrize("weighted", [False, True])
def test_matryoshka_is_the_weighted_sum_of_the_loss_at_each_prefix(dims, weighted):
    q, d, n = random(6, 16), random(6, 16, seed=1), random(6, 2, 16, seed=2)
    weights = [1 / (i + 2) for i in range(len(dims))] if weighted else None
    expected = 0.0
    for i, dim in enumerate(dims):
        expected += (weights[i] if weighted else 1.0) * LOSS(*(x[..., :dim] for x in (q, d, n)))
    torch.testing.assert_close(matryoshka(LOSS, (q, d, n), dims, weights), expected)
    named = {"queries": q, "documents": d, "negatives": n}
    torch.testing.assert_close(matryoshka(LOSS, named, dims, weights), expected)


def test_matryoshka_equals_sentence_transformers_on_plain_tensors():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    q, d = random(6, 16), random(6, 16, seed=1)
    scores = torch.linspace(0, 1, 6)

    class Given(torch.nn.Module):  # a model whose embeddings are its input
        def get_embedding_dimension(self):
            return 16

        def forward(self, features):
            return {"sentence_embedding": features["x"]}

    model = Given()
    reference = losses.MatryoshkaLoss(model, losses.CoSENTLoss(model, scale=10.0), [16, 8, 4], [1.0, 0.5, 0.25])
    expected = reference([{"x": q}, {"x": d}], scores)
    ours = matryoshka(partial(cosent_loss, scores=scores, temperature=0.1), (q, d), [16, 8, 4], [1.0, 0.5, 0.25])
    torch.testing.assert_close(ours, expected)


def test_matryoshka_trains_the_leading_dimensions_for_every_prefix():
    q = random(6, 16).requires_grad_()
    matryoshka(LOSS, (q, random(6, 16, seed=1), None), [8, 4]).backward()
    assert (q.grad[:, 8:] == 0).all() and q.grad[:, :8].abs().min() > 0


def test_the_prefix_is_normalised_for_losses_that_do_not_do_it_themselves():
    def by_dot_product(q, d):
        return ((q * d).sum(-1) - 1).square().mean()

    q = random(6, 16)
    assert matryoshka(by_dot_product, (q, q), [16, 4]) < 1e-12
    assert by_dot_product(q[:, :4], q[:, :4]) > 0.1  # the wrong variant: prefixes as they are


def test_matryoshka_gradcheck():
    q, d = (random(4, 6, seed=s, dtype=torch.float64).requires_grad_() for s in (0, 1))
    assert torch.autograd.gradcheck(lambda q, d: matryoshka(LOSS, (q, d, None), [6, 3], [1.0, 0.5]), (q, d))


@pytest.mark.parametrize(("dims", "weights"), [([], None), ([8, 4], [1.0])])
def test_dims_without_weights_are_refused(dims, weights):
    with pytest.raises(ValueError, match="give at least one, and a weight each"):
        matryoshka(LOSS, (random(4, 8), random(4, 8)), dims, weights)


# LSQ


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("step", [0.003, 0.05, 1.0])
def test_lsq_equals_the_formula(bits, step):
    v, upstream = random(7, 5, dtype=torch.float64), random(7, 5, seed=1, dtype=torch.float64)
    q_n, q_p = integer_range(bits)
    v[0, :4] = torch.tensor([-q_n * step, q_p * step, -1e6, 1e6])  # on the limits and far beyond
    v, s = v.requires_grad_(), torch.tensor(step, dtype=torch.float64, requires_grad=True)
    out = fake_quantise(v, s, bits)
    out.backward(upstream)
    value, d_v, d_s = slow_lsq(v.detach().numpy(), step, bits)
    np.testing.assert_allclose(out.detach(), value, rtol=1e-12)
    np.testing.assert_allclose(v.grad, upstream.numpy() * d_v, rtol=1e-12)
    np.testing.assert_allclose(s.grad, (upstream.numpy() * d_s).sum(), rtol=1e-9)


def test_lsq_step_gradient_by_hand():
    """b = 3, so -4 to 3, s = 0.5: 0.6 -> code 1 with -1.2 + 1; 2.0 is beyond 1.5 -> 3; -9 is beyond -2 -> -4."""
    v = torch.tensor([0.6, 2.0, -9.0], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    out = fake_quantise(v, step, bits=3)
    out.sum().backward()
    assert out.tolist() == [0.5, 1.5, -2.0]
    assert v.grad.tolist() == [1.0, 0.0, 0.0]
    assert step.grad.item() == pytest.approx(-0.2 + 3 - 4)
    codes = out / step  # the wrong variant: the codes alone, without the -v/s that straight-through adds
    assert codes.sum().item() != pytest.approx(step.grad.item())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_equals_torchs_learnable_quantiser(bits):
    """But between Q_P s and (Q_P + 1/2) s, where torch's clips after it has rounded, and so calls inside."""
    v, (q_n, q_p) = 4 * random(200), integer_range(bits)
    step = torch.tensor(3.0 / 2**bits)
    ratio = v / step
    v = v[(ratio + q_n).abs().gt(0.5) & (ratio - q_p).abs().gt(0.5)]
    upstream = random(len(v), seed=1)
    results = []
    for quantise in (
        partial(fake_quantise, bits=bits, gradient_scale=0.3),
        lambda x, s: torch._fake_quantize_learnable_per_tensor_affine(x, s.view(1), torch.zeros(1), -q_n, q_p, 0.3),
    ):
        x, s = v.clone().requires_grad_(), step.clone().requires_grad_()
        out = quantise(x, s)
        out.backward(upstream)
        results.append((out.detach(), x.grad, s.grad))
    torch.testing.assert_close(*results)
    assert 0 < (results[0][1] == 0).sum() < len(v)  # some are clipped and some are not


def test_halves_round_to_even_like_the_codes():
    v = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert fake_quantise(v, torch.tensor(1.0)).tolist() == [0, 2, 2, 0, -2]
    assert quantise_int8(v, 1.0).tolist() == quantise_int8(v.numpy(), 1.0).tolist() == [0, 2, 2, 0, -2]


def test_lsq_gradcheck_where_its_gradients_are_the_true_ones():
    """Beyond the limits the output is -Q_N s or Q_P s. Inside, straight-through is no derivative of the staircase."""
    v = torch.tensor([200.0, -300.0, 128.5], dtype=torch.float64, requires_grad=True)
    step = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fake_quantise, (v, step))


def test_the_step_starts_at_the_papers_value_and_is_kept():
    q = LearnedStepQuantizer(16)
    first = truncate(random(32, 16), 16)
    assert not q.initialised
    q(first)
    expected = 2 * float(first.abs().mean()) / math.sqrt(127)
    assert q.initialised and q.step.item() == pytest.approx(expected, rel=1e-6)
    q(first * 10)  # a later batch does not set it again
    assert q.step.item() == pytest.approx(expected, rel=1e-6)
    restored = LearnedStepQuantizer(16)
    restored.load_state_dict(q.state_dict())
    torch.testing.assert_close(restored.eval()(first), q(first), rtol=0, atol=0)


def test_the_steps_gradient_is_scaled_by_dimensions_not_by_the_batch():
    x, upstream = random(32, 16, dtype=torch.float64), random(32, 16, seed=1, dtype=torch.float64)
    q = LearnedStepQuantizer(16).double()
    q(x).backward(upstream)
    _, _, d_s = slow_lsq(x.numpy(), q.learned_step.item(), 8)
    by_dimension = (upstream.numpy() * d_s).sum() / math.sqrt(16 * 127)
    assert q.step.grad.item() == pytest.approx(by_dimension, rel=1e-5)
    assert q.step.grad.item() != pytest.approx(by_dimension / math.sqrt(32), rel=0.1)  # numel with the batch in it


def test_one_embedding_twice_in_a_mean_has_the_gradient_of_one():
    """What numel = dimensions buys: under a loss averaged over the batch, the batch size does not matter."""
    x = random(1, 16)
    gradients = []
    for batch in (x, x.repeat(8, 1)):
        q = LearnedStepQuantizer(16)
        q.initialise(x)
        q(batch).square().sum(-1).mean().backward()
        gradients.append(q.step.grad)
    assert gradients[0].abs() > 0
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("pushed", [-0.01, 0.0])
def test_a_step_pushed_through_zero_stays_usable(pushed):
    q = LearnedStepQuantizer(8)
    x = random(4, 8).requires_grad_()
    q.initialise(x)
    with torch.no_grad():
        q.step.fill_(pushed)
    out = q(x)
    out.sum().backward()
    assert q.learned_step > 0 and out.isfinite().all() and q.step.grad.isfinite() and x.grad.isfinite().all()
    if pushed:
        torch.testing.assert_close(out, fake_quantise(x, torch.tensor(-pushed)))


def test_quantizers_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="at least 2 bits, got 1"):
        LearnedStepQuantizer(8, bits=1)
    with pytest.raises(ValueError, match="quantizer of 8 dimensions got 4"):
        LearnedStepQuantizer(8)(random(2, 4))
    with pytest.raises(RuntimeError, match="no step yet"):
        LearnedStepQuantizer(8).eval()(random(2, 8))
    with pytest.raises(RuntimeError, match="not learned yet"):
        Quantizers([8]).codes(random(2, 8), 8, "int8")
    with pytest.raises(ValueError, match="no quantizer for int4 at 8 dimensions"):
        Quantizers([8])(random(2, 8), 8, "int4")
    with pytest.raises(ValueError, match=r"int8 at 4 dimensions; this model has .*'8'"):
        Quantizers([8])(random(2, 8), 4, "int8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [LearnedStepQuantizer, BinaryQuantizer])
def test_half_precision_is_quantised_in_float32(kind, dtype):
    x = random(4, 8, dtype=dtype).requires_grad_()
    q = kind(8)
    out = q(x)
    out.square().sum().backward()
    assert out.dtype == torch.float32 and x.grad.dtype == dtype and x.grad.isfinite().all()
    torch.testing.assert_close(out, q(x.float()))


def test_in_several_processes_the_first_step_comes_from_all_of_them(monkeypatch):
    def all_reduce(tensor):  # another process whose mean magnitude is 3
        tensor += 3.0

    monkeypatch.setattr(compression.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(compression.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(compression.dist, "all_reduce", all_reduce)
    q = LearnedStepQuantizer(4)
    q(torch.ones(2, 4))
    assert q.step.item() == pytest.approx(2 * (1 + 3) / 2 / math.sqrt(127))


# Binary


def test_binary_by_hand():
    """Mean magnitude 0.5: +-0.5 by sign, zero counts as minus; straight-through up to 0.5; d/ds = sum of the signs."""
    x = torch.tensor([[0.9, -0.5, 0.1, 0.0, -1.0, 0.5]], requires_grad=True)
    q = BinaryQuantizer(6)
    out = q(x)
    assert q.step.item() == pytest.approx(0.5)
    assert out.tolist() == [[0.5, -0.5, 0.5, -0.5, -0.5, 0.5]]
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    out.backward(upstream)
    assert x.grad.tolist() == [[0.0, 2.0, 3.0, 4.0, 0.0, 6.0]]
    assert q.step.grad.item() == pytest.approx((1 - 2 + 3 - 4 - 5 + 6) / math.sqrt(6))


def test_the_binary_scale_is_the_one_nearest_to_the_embedding():
    x, q = random(32, 16), BinaryQuantizer(16)
    q(x)
    error = [float((x - s * x.sign()).square().sum()) for s in q.step.item() * torch.tensor([0.95, 1.0, 1.05])]
    assert error[1] < min(error[0], error[2])


def test_a_cosine_gives_the_embedding_a_gradient_but_not_the_binary_scale():
    x, q = random(6, 16).requires_grad_(), BinaryQuantizer(16)
    LOSS(q(x), random(6, 16, seed=1)).backward()
    assert q.step.grad.abs() < 1e-6 < 1e-3 < x.grad.abs().max()
    by_dot_product = BinaryQuantizer(16)
    by_dot_product(x).square().sum().backward()
    assert by_dot_product.step.grad > 1


def test_binary_scale_gradcheck():
    """d/ds of s * sign(x) is true everywhere; 1/sqrt(dim) times it is what the parameter gets."""
    x, q = random(3, 4, dtype=torch.float64), BinaryQuantizer(4).double()
    scaled = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    q._quantise(x, scaled).sum().backward()
    h = 1e-6
    numeric = (q._quantise(x, scaled + h).sum() - q._quantise(x, scaled - h).sum()) / (2 * h)
    assert scaled.grad.item() == pytest.approx(numeric.item() / math.sqrt(4), rel=1e-6)


# Every dimension its own step, and the objective


def test_each_dimension_has_its_own_step_of_about_its_entries_size():
    dims = (1024, 64, 16)
    x, quantizers = random(64, 1024), Quantizers(dims)
    for dim in dims:
        quantizers(x, dim, "int8")
    steps = [quantizers.of(dim, "int8").step.item() for dim in dims]
    assert steps[1] / steps[0] == pytest.approx(4, rel=0.1) and steps[2] / steps[0] == pytest.approx(8, rel=0.1)
    prefix = truncate(x, 16)
    own = quantizers(x, 16, "int8")
    assert (own - prefix).abs().max() <= steps[2] / 2 + 1e-6
    borrowed = fake_quantise(prefix, torch.tensor(steps[0]))  # the wrong variant: the full embedding's step
    assert (borrowed - prefix).abs().max() > 3 * steps[2]  # it clips


def test_the_state_holds_every_step_and_travels():
    quantizers = Quantizers([16, 8])
    x = random(8, 16)
    for dim in (16, 8):
        for precision in ("int8", "binary"):
            quantizers(x, dim, precision)
    state = quantizers.state_dict()
    assert len(state) == 2 * 2 * 2 and "int8.8.step" in state and "binary.16.initialised" in state
    assert len(list(quantizers.parameters())) == 4
    other = Quantizers([16, 8]).eval()
    other.load_state_dict(state)
    np.testing.assert_array_equal(other.codes(x, 8, "int8"), quantizers.codes(x, 8, "int8"))


@pytest.mark.parametrize("precisions", [{}, {"int8": 0.5}, {"int8": 0.5, "binary": 0.25}])
def test_the_objective_is_the_sum_that_its_docstring_states(precisions):
    tensors = random(6, 16), random(6, 16, seed=1), random(6, 2, 16, seed=2)
    quantizers = Quantizers([16, 8])
    total = compressed_objective(LOSS, tensors, [16, 8], [1.0, 0.3], quantizers, precisions)
    expected = 0.0
    for dim, weight in ((16, 1.0), (8, 0.3)):
        prefixes = [x[..., :dim] / x[..., :dim].norm(dim=-1, keepdim=True) for x in tensors]
        expected += weight * LOSS(*prefixes)
        if "int8" in precisions:
            step = 2 * prefixes[0].abs().mean() / math.sqrt(127)  # the first tensor seen is the queries
            expected += weight * 0.5 * LOSS(*((x / step).round().clamp(-128, 127) * step for x in prefixes))
        if "binary" in precisions:
            expected += weight * 0.25 * LOSS(*(x.sign() for x in prefixes))
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)


def test_the_objective_trains_embeddings_and_steps():
    q, quantizers = random(6, 16).requires_grad_(), Quantizers([16, 8])
    weights = {"int8": 1.0, "binary": 1.0}
    compressed_objective(LOSS, (q, random(6, 16, seed=1), None), [16, 8], None, quantizers, weights).backward()
    assert q.grad.isfinite().all() and q.grad.abs().max() > 0
    assert all(quantizers.of(dim, "int8").step.grad.abs() > 0 for dim in (16, 8))


def test_quantizer_weights_without_quantizers_are_refused():
    with pytest.raises(ValueError, match="no quantizers"):
        compressed_objective(LOSS, (random(2, 8), random(2, 8)), [8], quantizer_weights={"int8": 1.0})


# Codes and their scores


def test_int8_codes_times_the_step_are_what_training_saw():
    x, quantizers = random(50, 32), Quantizers([32, 16])
    with torch.no_grad():
        for dim in (32, 16):
            seen = quantizers(x, dim, "int8").numpy()
            step = quantizers.of(dim, "int8").learned_step
            for kind in (x, x.numpy()):
                codes = quantizers.codes(kind, dim, "int8")
                assert codes.dtype == np.int8 and codes.shape == (50, dim)
                np.testing.assert_array_equal(codes * step.numpy(), seen)


def test_int8_codes_clip_instead_of_wrapping():
    x = np.array([1e6, -1e6, 127.4, 127.6, -128.4], np.float32)
    assert quantise_int8(x, 1.0).tolist() == [127, -128, 127, 127, -128]
    assert quantise_int8(torch.from_numpy(x), 1.0).tolist() == [127, -128, 127, 127, -128]
    assert quantise_int8(torch.from_numpy(x), 1.0).dtype == torch.int8


def test_int8_scores_equal_the_cosines_of_the_decoded_embeddings():
    codes = np.random.default_rng(0).integers(-128, 128, (7, 64)).astype(np.int8)
    step = 0.01
    scores = int8_scores(codes[:3], codes)
    for i in range(3):
        for j in range(7):
            a, b = (codes[r].astype(float) * step for r in (i, j))
            assert scores[i, j] == pytest.approx(a @ b / math.sqrt((a @ a) * (b @ b)), abs=1e-6)
    assert np.abs(codes[:3] @ codes.T).max() <= 128  # the wrong variant: an int8 product overflows
    assert np.isfinite(int8_scores(np.zeros((1, 64), np.int8), codes)).all()


def test_pack_and_unpack_are_inverse():
    x = random(9, 24)
    packed = pack_binary(x)
    assert packed.dtype == np.uint8 and packed.shape == (9, 3)
    np.testing.assert_array_equal(unpack_binary(packed), np.where(x.numpy() > 0, 1, -1))
    np.testing.assert_array_equal(pack_binary(x.numpy()), packed)
    np.testing.assert_array_equal(pack_binary(unpack_binary(packed)), packed)
    assert pack_binary(np.array([[1.0, -1, -1, -1, -1, -1, 0, 2]])).tolist() == [[0b10000001]]
    with pytest.raises(ValueError, match="12 dimensions do not fill bytes"):
        pack_binary(random(2, 12))


def test_packed_bits_equal_sentence_transformers_and_the_quantizers_signs():
    quantization = pytest.importorskip("sentence_transformers.util.quantization")
    x = random(9, 24)
    x[0, :3] = 0  # where sign conventions differ
    np.testing.assert_array_equal(pack_binary(x), quantization.quantize_embeddings(x.numpy(), "ubinary"))
    signs = BinaryQuantizer(24)(x)
    np.testing.assert_array_equal(unpack_binary(pack_binary(x)), np.sign(signs.detach().numpy()))
    np.testing.assert_array_equal(Quantizers([24, 8]).codes(x, 8, "binary"), pack_binary(x[:, :8]))


def test_scores_of_packed_codes_equal_those_of_floats():
    queries, documents = random(5, 32).numpy(), random(11, 32, seed=1).numpy()
    packed = pack_binary(documents)
    symmetric, asymmetric = hamming_scores(pack_binary(queries), packed), asymmetric_scores(queries, packed)
    assert symmetric.shape == asymmetric.shape == (5, 11)
    for i, query in enumerate(queries):
        for j, document in enumerate(documents):
            agreeing = sum(1 if (a > 0) == (b > 0) else -1 for a, b in zip(query, document, strict=True))
            assert symmetric[i, j] == pytest.approx(agreeing / 32)
            dot = sum(a if b > 0 else -a for a, b in zip(query, document, strict=True))
            assert asymmetric[i, j] == pytest.approx(dot / math.sqrt(sum(a * a for a in query) * 32), abs=1e-6)


def test_a_float_query_breaks_ties_of_the_hamming_distance():
    query = np.array([[0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]])
    documents = pack_binary(np.array([[-1.0, 1, 1, 1, 1, 1, 1, 1], [1.0, -1, 1, 1, 1, 1, 1, 1]]))
    hamming = hamming_scores(pack_binary(query), documents)[0]
    assert hamming[0] == hamming[1] == pytest.approx(1 - 2 * 1 / 8)
    rescored = asymmetric_scores(query, documents)[0]
    assert rescored[1] > rescored[0] + 0.3  # the document that agrees on the large entry


def test_docstrings_name_their_notebook():
    public = [f for f in vars(compression).values() if getattr(f, "__module__", "") == compression.__name__]
    named = [f for f in public if not f.__name__.startswith("_")]
    for f in named:
        assert f.__doc__.rstrip().splitlines()[-1].strip() == "Taught in notebooks/06", f
    assert len(named) >= 12
