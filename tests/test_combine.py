"""Merged checkpoints are the models that the arithmetic says, as adapters and full weights; so are those of a path."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from q3vl_mini import backbone, combine, evaluate, merge
from q3vl_mini.compression import Quantizers
from q3vl_mini.embedder import Embedder
from q3vl_mini.records import Quadruple, Relevance
from q3vl_mini.report import plot_path

ITEMS = ["a red cat", "12 green apples", "Retrieve a picture."]
CARD = {"role": "embedder", "template": "report"}
RANK = 4


@pytest.fixture(scope="module")
def saved(small_checkpoint, tmp_path_factory):
    """The folders of two embedders with random adapters and learned steps of 0.1 and 0.3."""
    folders = []
    for seed, (name, step) in enumerate({"one": 0.1, "other": 0.3}.items()):
        loaded = backbone.load(small_checkpoint)
        model = backbone.add_lora(loaded.model, RANK, 2 * RANK)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_" in key:
                    p.copy_(0.2 * torch.randn(p.shape, generator=g))
        quantizers = Quantizers([64])
        for precision in ("int8", "binary"):
            quantizers.of(64, precision).step.data.fill_(step)
            quantizers.of(64, precision).initialised.fill_(True)
        folders.append(tmp_path_factory.mktemp("adapters") / name)
        backbone.save(folders[-1], model, loaded.processor, CARD, quantizers)
    return folders


def vectors_at(checkpoint, delta):
    raw = Embedder(checkpoint, template="report")
    with merge.apply_delta(raw.model, delta):
        return raw.encode(ITEMS)


@pytest.fixture(scope="module")
def deltas(saved):
    return [combine.vector_of(backbone.load(folder).model) for folder in saved]


def test_the_vector_of_a_checkpoint_moves_the_base_to_its_model(saved, deltas, small_checkpoint):
    for folder, delta in zip(saved, deltas, strict=True):
        np.testing.assert_allclose(vectors_at(small_checkpoint, delta), Embedder(folder).encode(ITEMS), atol=1e-5)


def test_adapters_side_by_side_are_the_sum_of_their_vectors(saved, deltas, small_checkpoint):
    factors = [combine.factors_of(backbone.load(folder).model) for folder in saved]
    raw = Embedder(small_checkpoint, template="report")
    raw.model = combine.side_by_side(raw.model, factors)
    assert raw.model.peft_config["default"].r == 2 * RANK
    expected = vectors_at(small_checkpoint, merge.linear(deltas, [1.0, 1.0]))
    np.testing.assert_allclose(raw.encode(ITEMS), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("linear", {}, lambda v: merge.linear(v)),
        ("linear", {"weights": [1.0, -0.5]}, lambda v: merge.linear(v, [1.0, -0.5])),
        ("slerp", {"weights": [1.0, 3.0], "scale": 0.5}, lambda v: merge.linear([merge.slerp(*v, 0.75)], [0.5])),
        ("ties", {"density": 0.3}, lambda v: merge.ties(v, 0.3)),
    ],
)
def test_a_merged_checkpoint_is_the_merge_of_the_deltas(
    saved, deltas, small_checkpoint, tmp_path, method, options, expected
):
    expected = vectors_at(small_checkpoint, expected(deltas))
    assert np.abs(expected - Embedder(saved[0]).encode(ITEMS)).max() > 0.01
    facts = combine.merge_checkpoints(saved, tmp_path / "merged", method, **options)
    merged = Embedder(tmp_path / "merged")
    np.testing.assert_allclose(merged.encode(ITEMS), expected, atol=1e-4)
    assert merged.quantizers.of(64, "int8").step.item() == pytest.approx(0.2)
    assert merged.template == "report" and merged.card["merge"] == facts
    if method != "ties":
        config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == facts["rank"] == 2 * RANK and facts["error"] < 1e-5


def test_full_weights_are_the_same_model_and_a_low_rank_states_its_error(saved, deltas, small_checkpoint, tmp_path):
    expected = vectors_at(small_checkpoint, merge.slerp(*deltas, 0.5))
    combine.merge_checkpoints(saved, tmp_path / "full", full=True)
    full = Embedder(tmp_path / "full")
    assert {file.name for file in (tmp_path / "full").glob("*model.safetensors")} == {"model.safetensors"}
    np.testing.assert_allclose(full.encode(ITEMS), expected, atol=1e-4)
    facts = combine.merge_checkpoints(saved, tmp_path / "low", rank=RANK)
    assert facts["rank"] == RANK and facts["error"] > 0.1
    assert np.abs(Embedder(tmp_path / "low").encode(ITEMS) - expected).max() > 1e-3


def test_models_of_another_kind_are_refused(saved, small_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="no method 'mean'"):
        combine.merge_checkpoints(saved, tmp_path / "merged", "mean")
    with pytest.raises(ValueError, match="has full weights; expected a LoRA adapter"):
        combine.merge_checkpoints([small_checkpoint], tmp_path / "merged")
    loaded = backbone.load(saved[0])
    backbone.save(tmp_path / "reranker", loaded.model, loaded.processor, CARD | {"role": "reranker"})
    with pytest.raises(ValueError, match="merge models of one kind"):
        combine.merge_checkpoints([saved[0], tmp_path / "reranker"], tmp_path / "merged")
    loaded.model.peft_config["default"].alpha_pattern = {"q_proj": 8}
    with pytest.raises(ValueError, match="ranks or alphas by module"):
        combine.vector_of(loaded.model)


def test_steps_are_averaged_only_where_all_have_them():
    one, other = Quantizers([8]), Quantizers([8])
    other.of(8, "int8").step.data.fill_(3.0)
    assert combine.mean_quantizers([one, other]).of(8, "int8").step == 2
    assert combine.mean_quantizers([one, None]) is None


@pytest.fixture(scope="module")
def path(saved, deltas, small_checkpoint):
    """Scores of two small tasks on the path, the tasks, and the base."""
    words = "red cat green apple blue dog white horse".split()
    items = [{"text": f"{word} {i}"} for i, word in enumerate(words)]
    found = Quadruple("find", "image_ret", "Find it.", items, items[::-1], [Relevance((7 - i,)) for i in range(8)])
    quadruples = [found, replace(found, name="group", task="image_cls", relevance=[Relevance((i,)) for i in range(8)])]
    raw = Embedder(small_checkpoint, template="report")
    return combine.path_scores(raw, *deltas, quadruples, [0, 0.5, 1]), quadruples, raw


def test_a_path_goes_from_the_one_model_to_the_other(path, saved, deltas):
    points, quadruples, raw = path
    before = raw.encode(ITEMS)
    assert [point["t"] for point in points] == [0, 0.5, 1]
    for point, folder in ((points[0], saved[0]), (points[2], saved[1])):
        columns = evaluate.evaluate_embedder(Embedder(folder), quadruples)
        expected = {name: column.score for name, column in columns.items()}
        assert point == {"t": point["t"], **expected, "mean": np.mean(list(expected.values()))}
    halfway = combine.scores_at(raw, merge.slerp(*deltas, 0.5), quadruples)
    assert points[1] == {"t": 0.5, **halfway}
    np.testing.assert_array_equal(raw.encode(ITEMS), before)  # the base was not touched


def test_the_path_is_drawn_by_column_with_a_star_for_the_merge(path, tmp_path):
    points, _, _ = path
    mark = {"t": 0.3, "image_ret": 0.25, "image_cls": 0.75, "mean": 0.5}
    [axis] = plot_path(points, {"s3": mark}, tmp_path / "path.png").axes
    lines = {line.get_label(): line for line in axis.lines}
    for column in ("image_ret", "image_cls", "mean"):
        np.testing.assert_allclose(lines[column].get_xydata(), [(p["t"], 100 * p[column]) for p in points])
    stars = [tuple(line.get_xydata()[0]) for line in axis.lines if line.get_marker() == "*"]
    assert sorted(stars) == [(0.3, 25), (0.3, 50), (0.3, 75)]
    assert (tmp_path / "path.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="a path of 1 points"):
        plot_path(points[:1])
