"""Merging against the equations in slow loops, peft, and sentence-transformers' merge."""

import math

import numpy as np
import peft
import pytest
import torch
from peft.utils.merge_utils import ties as peft_ties
from scipy.spatial import geometric_slerp
from torch import nn
from transformers import Qwen3Config, Qwen3Model

from q3vl_mini import merge

R, ALPHA = 4, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def random_vectors(n, shapes=((3, 4), (2, 5)), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        {f"m{j}": torch.randn(*shape, generator=generator, dtype=dtype) for j, shape in enumerate(shapes)}
        for _ in range(n)
    ]


def flat(vector):
    return torch.cat([x.flatten() for x in vector.values()])


def assert_same(vector, expected, **tolerance):
    expected = flat(expected) if isinstance(expected, dict) else expected
    torch.testing.assert_close(flat(vector), expected, **tolerance)


def slerp_loop(v1, v2, t):
    """The equation on lists of floats."""
    x, y = flat(v1).tolist(), flat(v2).tolist()
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    lengths = math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y))
    w = math.acos(dot / lengths)
    merged = [(math.sin((1 - t) * w) * a + math.sin(t * w) * b) / math.sin(w) for a, b in zip(x, y, strict=True)]
    return torch.tensor(merged, dtype=torch.float64)


def ties_loop(vectors, density, weights):
    """Trim, elect, disjoint mean, one number at a time."""
    rows = []
    for v in vectors:
        x = flat(v).tolist()
        kept = sorted(range(len(x)), key=lambda i, x=x: -abs(x[i]))[: round(density * len(x))]
        rows.append([x[i] if i in kept else 0.0 for i in range(len(x))])
    merged = []
    for column in zip(*rows, strict=True):
        elected = sum(w * x for w, x in zip(weights, column, strict=True))
        agreeing = [(w, x) for w, x in zip(weights, column, strict=True) if x * elected > 0]
        mass = sum(w for w, _ in agreeing)
        merged.append(sum(w * x for w, x in agreeing) / mass if mass else 0.0)
    return torch.tensor(merged, dtype=torch.float64)


# Task vectors


@pytest.fixture(scope="module")
def adapters():
    """A function that makes a base, and two peft models over it whose adapters do something."""

    def make(seed=0, dtype=torch.float32):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, use_cache=False,
        )  # fmt: skip
        base = Qwen3Model(config).to(dtype).eval()
        weights = {k: v.clone() for k, v in base.state_dict().items()}
        lora = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False)
        models = []
        for _ in range(2):
            fresh = Qwen3Model(config).to(dtype)
            fresh.load_state_dict(weights)
            models.append(peft.get_peft_model(fresh, lora).eval())
        states = [peft.get_peft_model_state_dict(m) for m in models]
        assert all(float(v.abs().max()) > 0 for s in states for v in s.values())  # peft's B starts at zero
        return base, models, states

    return make


def hidden(model, seed=0):
    ids = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids).last_hidden_state


def test_task_vector_is_what_peft_adds_to_the_base_weights(adapters):
    base, (model, _), (state, _) = adapters()
    vector = merge.task_vector(state, ALPHA / R)
    before = base.state_dict()
    after = model.merge_and_unload().state_dict()
    changed = {k.removesuffix(".weight") for k in before if not torch.equal(before[k], after[k])}
    assert set(vector) == changed and len(vector) == 2 * len(TARGETS)
    for name, delta in vector.items():
        torch.testing.assert_close(delta, after[f"{name}.weight"] - before[f"{name}.weight"], atol=1e-6, rtol=0)


def test_task_vector_of_a_half_precision_adapter_is_multiplied_in_float32():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(s, generator=generator).bfloat16() for s in ((4, 64), (64, 4)))
    delta = merge.task_vector({"m.lora_A.weight": a, "m.lora_B.weight": b}, 0.5)["m"]
    torch.testing.assert_close(delta.double(), 0.5 * b.double() @ a.double(), atol=1e-5, rtol=0)
    assert (b @ a).float().sub(delta / 0.5).abs().max() > 1e-3  # the product in bfloat16 would be off


@pytest.mark.parametrize(
    "keys, named",
    [
        (["m.lora_A.weight"], "lora_A only"),
        (["m.lora_A.weight", "m.lora_B.weight", "m.lora_magnitude_vector"], "lora_magnitude_vector"),
        (["m.lora_A.default.weight", "m.lora_B.default.weight"], "get_peft_model_state_dict"),
        ([], "an empty dict"),
    ],
)
def test_task_vector_refuses_what_is_not_a_lora_pair(keys, named):
    with pytest.raises(ValueError, match=named):
        merge.task_vector({k: torch.ones(2, 2) for k in keys}, 1.0)


def test_vectors_of_different_models_are_refused_by_name():
    (v1,), (v2,) = random_vectors(1), random_vectors(1, shapes=((3, 4), (2, 6)))
    with pytest.raises(ValueError, match=r"'m1' has shape \(2, 5\) in vector 0 and \(2, 6\) in vector 1"):
        merge.linear([v1, v2])
    with pytest.raises(ValueError, match="None"):
        merge.slerp(v1, {"m0": v1["m0"]}, 0.5)
    with pytest.raises(ValueError, match="at least one"):
        merge.linear([])


# Linear


def test_linear_merges_deltas_and_not_factors(adapters):
    _, _, states = adapters()
    vectors = [merge.task_vector(s, ALPHA / R) for s in states]
    merged = merge.linear(vectors)
    for name in merged:
        torch.testing.assert_close(merged[name], (vectors[0][name] + vectors[1][name]) / 2)
    of_factors = merge.task_vector({k: (states[0][k] + states[1][k]) / 2 for k in states[0]}, ALPHA / R)
    error = (flat(of_factors) - flat(merged)).norm() / flat(merged).norm()
    assert error > 0.3, "averaging A and B separately is a different model"


@pytest.mark.parametrize(("combination", "exact"), [("svd", True), ("cat", True), ("linear", False)])
def test_linear_equals_pefts_merges_of_deltas_and_not_of_factors(adapters, combination, exact):
    """peft's "linear" adds A to A and B to B, each times a root of its weight: the wrong variant."""
    _, (model, _), states = adapters()
    model.add_adapter("other", model.peft_config["default"])
    peft.set_peft_model_state_dict(model, states[1], adapter_name="other")
    options = {"svd_rank": 2 * R} if combination == "svd" else {}
    model.add_weighted_adapter(["default", "other"], [0.3, 0.7], "merged", combination_type=combination, **options)
    config, state = model.peft_config["merged"], peft.get_peft_model_state_dict(model, adapter_name="merged")
    theirs = merge.task_vector(state, config.lora_alpha / config.r)
    ours = merge.linear([merge.task_vector(s, ALPHA / R) for s in states], [0.3, 0.7])
    error = (flat(theirs) - flat(ours)).norm() / flat(ours).norm()
    assert error < 1e-5 if exact else error > 0.3


def test_linear_does_not_normalise_its_weights_and_passes_gradients_to_them():
    v1, v2 = random_vectors(2)
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    merged = merge.linear([v1, v2], weights)
    assert_same(merged, 0.5 * flat(v1) + 2 * flat(v2))
    (flat(merged) * flat(v1)).sum().backward()
    torch.testing.assert_close(weights.grad, torch.stack([flat(v1) @ flat(v1), flat(v1) @ flat(v2)]))
    with pytest.raises(ValueError, match="3 numbers for 2 vectors"):
        merge.linear([v1, v2], [1, 1, 1])


# SLERP


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_slerp_equals_the_equation_on_the_flattened_vector(t):
    v1, v2 = random_vectors(2)
    v2 = {k: 3 * x for k, x in v2.items()}  # of different length
    assert_same(merge.slerp(v1, v2, t), slerp_loop(v1, v2, t))
    if 0 < t < 1:
        per_tensor = torch.cat([slerp_loop({k: v1[k]}, {k: v2[k]}, t) for k in v1])
        assert (per_tensor - slerp_loop(v1, v2, t)).norm() > 0.05, "one angle per tensor is another merge"


def test_slerp_ends_at_the_vectors_with_their_lengths():
    v1, v2 = random_vectors(2)
    v2 = {k: 3 * x for k, x in v2.items()}
    assert_same(merge.slerp(v1, v2, 0.0), v1)
    assert_same(merge.slerp(v1, v2, 1.0), v2)


def test_slerp_of_equal_lengths_keeps_the_length_and_turns_evenly_where_the_line_does_not():
    v1, v2 = ({k: x / flat(v).norm() for k, x in v.items()} for v in random_vectors(2))
    whole, ts = merge.angle(v1, v2), np.linspace(0, 1, 5)
    theirs = geometric_slerp(flat(v1).numpy(), flat(v2).numpy(), ts)
    for (t, v), other in zip(merge.path(v1, v2, ts), theirs, strict=True):
        np.testing.assert_allclose(flat(v), other, atol=1e-12)
        assert flat(v).norm() == pytest.approx(1, abs=1e-12)
        assert math.acos(min(1, float(flat(v) @ flat(v1)))) == pytest.approx(t * whole, abs=1e-6)
    assert flat(merge.linear([v1, v2])).norm() < 0.9


@pytest.mark.parametrize("factor", [2.0, -2.0, 0.0])
def test_parallel_opposite_and_zero_vectors_take_the_straight_line(factor):
    (v1,) = random_vectors(1)
    v2 = {k: factor * x for k, x in v1.items()}
    merged = flat(merge.slerp(v1, v2, 0.3))
    torch.testing.assert_close(merged, (0.7 + 0.3 * factor) * flat(v1))


def test_the_switch_to_the_straight_line_makes_no_step():
    def at(angle):
        v1 = {"m": torch.tensor([[1.0, 0.0]], dtype=torch.float64)}
        v2 = {"m": torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)}
        return merge.slerp(v1, v2, 0.3)["m"] - merge.linear([v1, v2], [0.7, 0.3])["m"]

    assert at(0.99e-3).abs().max() == 0
    assert 0 < at(1.01e-3).abs().max() < 1e-6


def test_angle_of_known_vectors():
    east, north = {"m": torch.tensor([[2.0, 0.0]])}, {"m": torch.tensor([[0.0, 5.0]])}
    assert merge.angle(east, north) == pytest.approx(math.pi / 2)
    assert merge.angle(east, {"m": -east["m"]}) == pytest.approx(math.pi)
    assert math.isnan(merge.angle(east, {"m": 0 * east["m"]}))


def test_path_gives_each_t_with_its_vector_and_takes_other_ways():
    v1, v2 = random_vectors(2)
    points = list(merge.path(v1, v2, [0, 0.25, 1]))
    assert [t for t, _ in points] == [0, 0.25, 1]
    assert_same(points[1][1], slerp_loop(v1, v2, 0.25))
    straight = dict(merge.path(v1, v2, [0.25], combine=lambda x, y, t: merge.linear([x, y], [1 - t, t])))
    assert_same(straight[0.25], 0.75 * flat(v1) + 0.25 * flat(v2))


def test_iterated_slerp_joins_the_vectors_in_turn():
    vectors, a = random_vectors(4), [1.0, 3.0, 0.5, 2.0]
    expected = vectors[0]
    for n, t in ((1, 3 / 4), (2, 0.5 / (2 + 0.5)), (3, 2 / (1.5 + 2))):  # a_n / (mean of the earlier a + a_n)
        expected = {"m": slerp_loop(expected, vectors[n], t)}
    assert_same(merge.iterated_slerp(vectors, a), expected)
    with_sum = {"m": slerp_loop({"m": slerp_loop(vectors[0], vectors[1], 3 / 4)}, vectors[2], 0.5 / (4 + 0.5))}
    wrong = (flat(with_sum) - flat(merge.iterated_slerp(vectors[:3], a[:3]))).norm()
    assert wrong > 0.05, "the mean of the earlier a, not their sum"


def test_iterated_slerp_depends_on_the_ratios_of_a_only():
    vectors = random_vectors(3)
    assert_same(merge.iterated_slerp(vectors, [1, 2, 3]), merge.iterated_slerp(vectors, [10, 20, 30]))
    assert_same(merge.iterated_slerp(vectors[:2], [1, 1]), merge.slerp(*vectors[:2], 0.5))


@pytest.mark.parametrize("a, message", [([1.0, 0.0], "must be positive"), ([1.0], "1 numbers for 2 vectors")])
def test_iterated_slerp_refuses_bad_weights(a, message):
    with pytest.raises(ValueError, match=message):
        merge.iterated_slerp(random_vectors(2), a)


# TIES


def test_ties_worked_by_hand():
    v1 = {"m": torch.tensor([[4.0, -3.0, 0.1, 2.0]])}
    v2 = {"m": torch.tensor([[2.0, 5.0, -0.2, -2.0]])}
    # trimmed to 3 of 4: (4 -3 0 2), (2 5 0 -2); signs + + none none; means 3, 5, 0, 0
    assert merge.ties([v1, v2], 0.75)["m"].tolist() == [[3.0, 5.0, 0.0, 0.0]]


@pytest.mark.parametrize("density", [0.1, 0.5, 0.58, 1.0])  # 0.58 * 50 is 28.999...
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.2, 3.0, 1.0], [0.0, 1.0, 2.0]])
def test_ties_equals_a_loop_over_the_numbers(density, weights):
    vectors = random_vectors(3, shapes=((4, 5), (3, 10)))
    vectors[0]["m1"] *= 10  # so that trimming over all parameters differs from trimming each tensor
    assert_same(merge.ties(vectors, density, weights), ties_loop(vectors, density, weights), rtol=1e-12, atol=0)
    if density == 0.5:
        per_tensor = [ties_loop([{k: v[k]} for v in vectors], density, weights) for k in vectors[0]]
        assert not torch.allclose(torch.cat(per_tensor), flat(merge.ties(vectors, density, weights)))


def test_ties_of_one_tensor_equals_peft():
    vectors = random_vectors(3, shapes=((8, 10),))
    expected = peft_ties([v["m0"] for v in vectors], torch.ones(3, dtype=torch.float64), density=0.3)
    torch.testing.assert_close(merge.ties(vectors, 0.3)["m0"], expected)
    assert 0 < (expected == 0).sum() < expected.numel()


def test_ties_of_negated_vectors_is_negated_even_in_a_draw():
    v1, v2 = random_vectors(2)
    v2["m0"] = -v1["m0"]
    merged, negated = (merge.ties([{k: s * x for k, x in v.items()} for v in (v1, v2)], 1.0) for s in (1, -1))
    assert_same(negated, -flat(merged))
    assert merged["m0"].abs().max() == 0 and merged["m1"].abs().min() > 0


@pytest.mark.parametrize("density, weights", [(0.0, None), (1.1, None), (0.5, [1.0, -1.0])])
def test_ties_refuses_bad_settings(density, weights):
    with pytest.raises(ValueError, match="density in"):
        merge.ties(random_vectors(2), density, weights)


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_merges_equal_sentence_transformers(method):
    pytest.importorskip("mergekit", reason="SentenceTransformer.merge needs sentence-transformers[merge]")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

    # One tensor, because there each tensor has its own angle and its own trim. The weights are the task vectors:
    # SLERP there knows no base, and TIES gets a base of zeros.
    def model(weight):
        dense = Dense(10, 8, bias=False)
        dense.linear.weight.data.copy_(weight)
        return SentenceTransformer(modules=[dense], device="cpu")

    v1, v2 = random_vectors(2, shapes=((8, 10),), dtype=torch.float32)
    settings = {
        "linear": {"parameters": {"weight": [0.25, 0.75]}},
        "slerp": {"parameters": {"t": 0.3}},
        "ties": {"parameters": {"weight": [0.4, 1.0], "density": 0.5}, "base_model": model(torch.zeros(8, 10))},
    }
    ours = {
        "linear": lambda: merge.linear([v1, v2], [0.25, 0.75]),
        "slerp": lambda: merge.slerp(v1, v2, 0.3),
        "ties": lambda: merge.ties([v1, v2], 0.5, [0.4, 1.0]),
    }
    theirs = SentenceTransformer.merge([model(v1["m0"]), model(v2["m0"])], method, **settings[method])
    torch.testing.assert_close(ours[method]()["m0"], theirs[0].linear.weight.data)


# Self Positioning


@pytest.mark.parametrize("n", [1, 2, 3])
def test_gradients_of_the_position_wrt_a_and_lambda(n):
    vectors = random_vectors(n)
    a = torch.tensor([0.7, 1.9, 1.1][:n], dtype=torch.float64, requires_grad=True)
    lam = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, lam: flat(merge.position(vectors, a, lam)), (a, lam))
    length = flat(merge.position(vectors, a, lam)).square().sum()
    grad_a, grad_lam = torch.autograd.grad(length, (a, lam), materialize_grads=True)
    assert grad_lam != 0 and (grad_a.abs().min() > 1e-3 if n > 1 else grad_a == 0)


def test_gradients_are_finite_for_parallel_vectors():
    (v,) = random_vectors(1)
    a = torch.ones(3, dtype=torch.float64, requires_grad=True)
    vectors = [v, {k: 2 * x for k, x in v.items()}, {k: -3 * x for k, x in v.items()}]
    flat(merge.position(vectors, a, 1.0)).square().sum().backward()
    assert a.grad.isfinite().all() and a.grad.abs().max() > 0


def quadrant(target):
    """Two unit vectors at a right angle: lam * V is the point at length lam and angle t * 90 degrees."""
    vectors = [{"m": torch.tensor([row], dtype=torch.float64)} for row in ([1.0, 0.0], [0.0, 1.0])]
    return vectors, lambda delta: (delta["m"] - torch.tensor([target])).square().sum()


@pytest.mark.parametrize("mu", [0.0, 0.1])
def test_self_position_finds_the_best_point_of_a_quadratic(mu):
    vectors, loss_at = quadrant([0.6, 1.2])
    found = merge.self_position(loss_at, vectors, mu=mu, steps=400, lr=0.05)
    t = found.a[1] / (found.a[0] + found.a[1])
    assert t == pytest.approx(math.atan2(1.2, 0.6) / (math.pi / 2), abs=1e-3)
    assert found.lam == pytest.approx(math.hypot(0.6, 1.2) - mu / 2, abs=1e-3)  # d/dlam (lam - r)^2 + mu lam = 0
    assert min(found.a) > 0 and len(found.history) == 400
    start = loss_at(merge.slerp(*vectors, 0.5)).item()
    assert found.history[0] == {"loss": pytest.approx(start), "a": (1, 1), "lam": 1}


def test_self_position_of_one_vector_learns_how_far_to_go():
    vectors, loss_at = quadrant([0.6, 1.2])
    found = merge.self_position(loss_at, vectors[:1], mu=0.0, steps=200, lr=0.05)
    assert found.lam == pytest.approx(0.6, abs=1e-3) and found.a == (1,)


def test_self_position_starts_where_it_is_told_and_takes_adams_first_step():
    vectors, loss_at = quadrant([0.6, 1.2])
    found = merge.self_position(loss_at, vectors, steps=1, lr=0.1, a_init=[2.0, 3.0], lambda_init=0.5)
    assert found.history[0]["a"] == pytest.approx((2, 3)) and found.history[0]["lam"] == 0.5
    # Adam's first step is lr long in each coordinate: more V_2, less V_1, further out
    assert found.a == pytest.approx((2 * math.exp(-0.1), 3 * math.exp(0.1)), rel=1e-5)
    assert found.lam == pytest.approx(0.6, rel=1e-5)


def test_self_position_improves_a_contrastive_loss_and_leaves_the_model_alone(adapters):
    base, _, states = adapters()
    vectors = [merge.task_vector(s, ALPHA / R) for s in states]
    before = {k: v.clone() for k, v in base.state_dict().items()}
    with torch.no_grad(), merge.apply_delta(base, merge.position(vectors, [1.0, 5.0], 0.6)):
        documents = nn.functional.normalize(hidden(base).flatten(0, 1), dim=-1)  # what the best position would give

    def loss_at(delta):
        with merge.apply_delta(base, delta):
            queries = nn.functional.normalize(hidden(base).flatten(0, 1), dim=-1)
        return nn.functional.cross_entropy(queries @ documents.T / 0.05, torch.arange(len(queries)))

    found = merge.self_position(loss_at, vectors, mu=0.0, steps=25, lr=0.1)
    assert found.history[-1]["loss"] < found.history[0]["loss"]
    assert found.a[1] > found.a[0], "it moved towards the vector that the documents were made with"
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in base.parameters())


def test_self_position_says_so_when_the_loss_ignores_delta_or_is_not_finite():
    vectors, loss_at = quadrant([0.6, 1.2])
    with pytest.raises(ValueError, match="gradient through delta"):
        merge.self_position(lambda delta: loss_at(delta).detach(), vectors, steps=1)
    with pytest.raises(ValueError, match="finite loss.* at step 0"):
        merge.self_position(lambda delta: loss_at(delta) / 0, vectors, steps=1)
    with pytest.raises(ValueError, match="a_init has 3 numbers"):
        merge.self_position(loss_at, vectors, a_init=[1, 1, 1])


# Moving a model


@pytest.fixture
def small_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()
    (delta,) = random_vectors(1, shapes=((5, 6), (3, 5)))
    return model, {"0": delta["m0"], "2": delta["m1"]}, torch.randn(4, 6, dtype=torch.float64)


def test_apply_delta_equals_the_merged_weights_in_output_and_gradient(small_model):
    model, delta, x = small_model
    delta = {k: d.requires_grad_() for k, d in delta.items()}
    with merge.apply_delta(model, delta) as moved:
        out = moved(x)
    merged = torch.func.functional_call(model, merge.to_full(dict(model.named_parameters()), delta), x)
    torch.testing.assert_close(out, merged)
    assert (out - model(x)).abs().max() > 0.1
    pairs = [torch.autograd.grad(y.square().sum(), list(delta.values()), retain_graph=True) for y in (out, merged)]
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().max() > 0


def test_apply_delta_leaves_the_model_as_it_was_even_after_an_error(small_model):
    model, delta, x = small_model
    before = model(x)
    with pytest.raises(RuntimeError, match="inside"), merge.apply_delta(model, delta):
        raise RuntimeError("inside")
    with merge.apply_delta(model, delta), merge.apply_delta(model, {"0": -delta["0"], "2": -delta["2"]}):
        torch.testing.assert_close(model(x), before)  # contexts nest: + delta - delta
    with pytest.raises(ValueError, match="'1', here a Tanh"), merge.apply_delta(model, {**delta, "1": delta["0"]}):
        pass
    assert torch.equal(model(x), before)
    assert not any(m._forward_hooks for m in model.modules())


def test_apply_delta_names_the_wrong_layer_and_shape(small_model):
    model, delta, _ = small_model
    with pytest.raises(ValueError, match=r"'0' has shape \(6, 5\); expected \(out, in\) = \(5, 6\)"):
        merge.apply_delta(model, {"0": delta["0"].T}).__enter__()
    with pytest.raises(ValueError, match="'absent', here a NoneType"):
        merge.apply_delta(model, {"absent": delta["0"]}).__enter__()


def test_apply_delta_on_the_base_equals_the_peft_model_and_its_merged_weights(adapters):
    base, (model, _), (state, _) = adapters()
    vector = merge.task_vector(state, ALPHA / R)
    with torch.no_grad():
        with_adapter = hidden(model)
        with merge.apply_delta(base, vector):
            torch.testing.assert_close(hidden(base), with_adapter, atol=1e-5, rtol=1e-5)
        with model.disable_adapter(), merge.apply_delta(model, vector):  # the same on a peft model without its adapter
            torch.testing.assert_close(hidden(model), with_adapter, atol=1e-5, rtol=1e-5)
        with merge.apply_delta(model, {k: -d for k, d in vector.items()}):  # and on top of it
            torch.testing.assert_close(hidden(model), hidden(base), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hidden(model), with_adapter, atol=0, rtol=0)
        torch.testing.assert_close(hidden(model.merge_and_unload()), with_adapter, atol=1e-5, rtol=1e-5)
        assert (with_adapter - hidden(base)).abs().max() > 0.1


def test_apply_delta_runs_in_the_models_dtype(adapters):
    base, _, (state, _) = adapters(dtype=torch.bfloat16)
    vector = {k: d.requires_grad_() for k, d in merge.task_vector(state, ALPHA / R).items()}
    with merge.apply_delta(base, vector):
        out = hidden(base)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(d.grad.dtype == torch.float32 and d.grad.abs().max() > 0 for d in vector.values())


def test_apply_delta_refuses_gradient_checkpointing_which_would_lose_it(adapters):
    base, _, (state, _) = adapters()
    vector = merge.task_vector(state, ALPHA / R)
    base.activation_checkpointing_enable()
    base.train()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        merge.apply_delta(base, vector).__enter__()
    with torch.no_grad(), merge.apply_delta(base, vector):  # no backward, nothing to lose
        with_delta = hidden(base)
    assert not torch.equal(hidden(base), with_delta)


# What a merge is saved as


def merged_kinds(vectors):
    return {
        "linear": merge.linear(vectors),
        "slerp": merge.slerp(*vectors, 0.3),
        "self": merge.position(vectors, [1.0, 2.0], 0.7),
    }


@pytest.mark.parametrize("kind", ["linear", "slerp", "self"])
def test_a_merge_of_two_adapters_is_an_adapter_of_twice_the_rank_in_peft(adapters, kind):
    base, _, states = adapters()
    delta = merged_kinds([merge.task_vector(s, ALPHA / R) for s in states])[kind]
    adapter = merge.to_adapter(delta)
    assert adapter.rank == 2 * R and adapter.error < 1e-6
    with torch.no_grad():
        with merge.apply_delta(base, delta):
            expected = hidden(base)
        config = peft.LoraConfig(r=adapter.rank, lora_alpha=adapter.rank, target_modules=TARGETS)
        loaded = peft.get_peft_model(base, config).eval()
        result = peft.set_peft_model_state_dict(loaded, adapter.state)
        assert not result.unexpected_keys
        torch.testing.assert_close(hidden(loaded), expected, atol=1e-5, rtol=1e-5)
        assert set(adapter.state) == set(peft.get_peft_model_state_dict(loaded))
    assert_same(merge.task_vector(adapter.state, 1.0), delta, atol=1e-6, rtol=0)


def test_a_lower_rank_is_the_closest_and_its_error_is_the_singular_values_left_out():
    (delta,) = random_vectors(1, shapes=((6, 8), (7, 5)))
    adapter = merge.to_adapter(delta, rank=2)
    spectra = [np.linalg.svd(d.numpy(), compute_uv=False) for d in delta.values()]
    left_out = sum((s[2:] ** 2).sum() for s in spectra) / sum((s**2).sum() for s in spectra)
    assert adapter.error == pytest.approx(math.sqrt(left_out), rel=1e-9)
    assert adapter.error > 0.3
    back = flat(merge.task_vector(adapter.state, 1.0))
    assert ((back - flat(delta)).norm() / flat(delta).norm()).item() == pytest.approx(adapter.error)


def test_the_exact_rank_is_that_of_the_richest_module_and_the_others_are_padded():
    a, b = random_vectors(2, shapes=((6, 6),))
    low = a["m0"][:, :1] @ b["m0"][:1]
    delta = {"low": low, "high": a["m0"][:, :3] @ b["m0"][:3], "none": torch.zeros(2, 9, dtype=torch.float64)}
    adapter = merge.to_adapter(delta)
    assert adapter.rank == 3 and adapter.error < 1e-14
    shapes = {k: tuple(v.shape) for k, v in adapter.state.items()}
    assert shapes["base_model.model.low.lora_A.weight"] == (3, 6)
    assert shapes["base_model.model.none.lora_A.weight"] == (3, 9)  # more than the module's own width
    assert shapes["base_model.model.none.lora_B.weight"] == (2, 3)
    assert_same(merge.task_vector(adapter.state, 1.0), delta)
    assert merge.to_adapter({"none": delta["none"]}).error == 0


def test_ties_is_not_of_low_rank(adapters):
    _, _, states = adapters()
    delta = merge.ties([merge.task_vector(s, ALPHA / R) for s in states], 0.3)
    assert merge.to_adapter(delta, rank=2 * R).error > 0.1
    assert merge.to_adapter(delta).rank > 2 * R


def test_to_adapter_refuses_nothing_and_rank_zero():
    with pytest.raises(ValueError, match="0 modules"):
        merge.to_adapter({})
    with pytest.raises(ValueError, match="rank 0"):
        merge.to_adapter(random_vectors(1)[0], rank=0)


def test_full_weights_go_out_and_back_and_keep_dtypes_and_buffers():
    torch.manual_seed(0)
    base = {"l.weight": torch.randn(4, 3), "norm.weight": torch.randn(3).bfloat16(), "steps": torch.tensor(7)}
    tuned = {"l.weight": torch.randn(4, 3), "norm.weight": torch.randn(3).bfloat16(), "steps": torch.tensor(7)}
    vector = merge.full_task_vector(tuned, base)
    assert set(vector) == {"l.weight", "norm.weight"} and vector["norm.weight"].dtype == torch.float32
    back = merge.to_full(base, vector)
    assert {k: v.dtype for k, v in back.items()} == {k: v.dtype for k, v in base.items()}
    torch.testing.assert_close(back, tuned)
    halfway = merge.to_full(base, merge.linear([vector, {k: 0 * d for k, d in vector.items()}]))
    torch.testing.assert_close(halfway["l.weight"], (base["l.weight"] + tuned["l.weight"]) / 2)
    assert torch.equal(merge.to_full(base, {"norm.weight": 0 * vector["norm.weight"]})["l.weight"], base["l.weight"])


def test_to_full_of_an_adapters_vector_equals_pefts_merged_weights(adapters):
    base, (model, _), (state, _) = adapters()
    full = merge.to_full(base.state_dict(), merge.task_vector(state, ALPHA / R))
    torch.testing.assert_close(full, dict(model.merge_and_unload().state_dict()), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="no 'vision' or 'vision.weight'"):
        merge.to_full(base.state_dict(), {"vision": torch.ones(1, 1)})


def test_sum_is_rounded_once_in_bfloat16():
    base, delta = {"w": torch.tensor([1.0]).bfloat16()}, {"w": torch.tensor([2.0**-8 * (1 + 2.0**-10)])}
    assert merge.to_full(base, delta)["w"].item() == 1 + 2.0**-7  # the nearest; with delta rounded too, a draw
    assert (base["w"] + delta["w"].bfloat16()).item() == 1
