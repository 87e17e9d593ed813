"""What a run will need: counted on shapes alone, and held against real tensors and hand-made formulas."""

import json
from dataclasses import replace

import pytest
import torch

from q3vl_mini import plan as planning
from q3vl_mini.backbone import add_lora, load
from q3vl_mini.choices import GPUS
from q3vl_mini.cli import main
from q3vl_mini.config import load_preset
from q3vl_mini.plan import (
    MARGIN,
    count_parameters,
    measure_costs,
    meta_model,
    model_config,
    plan,
    plan_table,
    stage_tokens,
)


@pytest.fixture(scope="module")
def tiny():
    return meta_model(model_config("q3vl-tiny"))


def test_parameters_are_counted_by_part(tiny):
    real = load("q3vl-tiny", device="cpu").model
    counts = count_parameters(tiny)
    assert counts["vision"] == sum(p.numel() for p in real.model.visual.parameters())
    assert counts["vision"] + counts["language"] == sum(p.numel() for p in real.parameters())
    two_billion = count_parameters(meta_model(model_config("Qwen/Qwen3-VL-2B-Instruct")))
    assert 2.1e9 < two_billion["vision"] + two_billion["language"] < 2.2e9


def test_operations_are_those_of_the_matrices(tiny):
    """Forward 2 a weight, backward 2 for the input; LoRA's own weights get 2 more for their gradients."""
    linear = [(n, m) for n, m in tiny.named_modules() if isinstance(m, torch.nn.Linear) and "language_model" in n]
    frozen = sum(m.weight.numel() for n, m in linear if "lora_" not in n)
    lora = sum(m.weight.numel() for n, m in linear if "lora_" in n)
    costs = measure_costs(tiny)
    assert costs.linear == pytest.approx(4 * frozen + 6 * lora, rel=0.02)
    heads = tiny.get_base_model().config.text_config
    products = 2 * heads.num_attention_heads * heads.head_dim * heads.num_hidden_layers  # q k^T, weights v
    assert costs.square == pytest.approx(3 * 2 * products, rel=0.25)  # forward, and two of backward each


def test_bytes_on_the_meta_device_are_those_of_real_tensors(tiny):
    real = add_lora(load("q3vl-tiny", device="cpu").model)
    real.get_base_model().model.language_model.set_attn_implementation("sdpa")
    shapes, numbers = (measure_costs(model, torch.float32, length=64) for model in (tiny, real))
    assert numbers.bytes_per_token == pytest.approx(shapes.bytes_per_token, rel=0.1)


@pytest.mark.slow
def test_split_layers_leave_a_part_and_two_layers_a_gpu():
    preset = replace(load_preset("full"), backbone="Qwen/Qwen3-VL-8B-Instruct")
    whole, split = (plan(replace(preset, shard=shard), GPUS["H100"], 8)[0] for shard in (False, True))
    config = model_config("Qwen/Qwen3-VL-8B-Instruct").text_config
    attention = 2 * config.hidden_size * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size  # its norms are a thousandth of a part of it
    saved = layer * (config.num_hidden_layers * 7 / 8 - 2) * 2 / 1e9
    assert whole.memory_gb["weights"] - split.memory_gb["weights"] == pytest.approx(saved, rel=1e-3)
    assert plan(replace(preset, shard=True), GPUS["H100"], 1)[0] == plan(preset, GPUS["H100"], 1)[0]


def test_checkpointing_keeps_less_and_a_longer_sequence_costs_more(tiny):
    costs = measure_costs(tiny)
    assert costs.checkpointed < costs.bytes_per_token / 3
    assert costs.flops(1000, 200) == pytest.approx(1000 * costs.linear + 1000 * 200 * costs.square)


def test_tokens_are_scaled_to_the_batch_of_the_stage():
    preset = load_preset("tiny")
    one = stage_tokens(preset, "s0", n_batches=3, batch_size=8, rows=16)
    stages = {**preset.stages, "s0": replace(preset.stages["s0"], batch_size=2 * preset.stages["s0"].batch_size)}
    two = stage_tokens(replace(preset, stages=stages), "s0", n_batches=3, batch_size=8, rows=16)
    assert two.step == pytest.approx(2 * one.step) and two.row == one.row and one.longest >= one.row
    assert 0 < one.visual < one.step


@pytest.fixture(scope="module")
def small_preset():
    preset = load_preset("full")
    return replace(preset, backbone="q3vl-tiny", stages={name: preset.stages[name] for name in ("s0", "reranker")})


def test_more_gpus_take_less_time_and_the_cache_bounds_memory(small_preset, monkeypatch):
    tokens = planning.Tokens(step=200_000, visual=50_000, row=100, longest=1_000)
    monkeypatch.setattr(planning, "stage_tokens", lambda *_: tokens)
    one, eight = plan(small_preset, GPUS["A100"]), plan(small_preset, GPUS["A100"], n_gpus=8)
    assert [p.stage for p in one] == ["s0", "reranker"]
    for a, b in zip(one, eight, strict=True):
        assert b.memory_gb["weights"] == a.memory_gb["weights"]
        assert b.memory_gb["activations"] <= a.memory_gb["activations"] and 8 * b.hours <= a.hours * 1.001
    without = replace(small_preset, stages={"s0": replace(small_preset.stages["s0"], chunk_tokens=0)})
    [whole] = plan(without, GPUS["A100"])
    assert whole.memory_gb["activations"] > 5 * one[0].memory_gb["activations"]
    assert whole.hours < 0.75 * one[0].hours  # no second forward
    [checkpointed] = plan(without, GPUS["A100"], checkpointing=True)
    assert checkpointed.memory_gb["activations"] < whole.memory_gb["activations"] / 3
    assert checkpointed.hours > whole.hours
    assert whole.fits and not plan(without, replace(GPUS["A100"], memory_gb=whole.total_gb - 0.1))[0].fits
    assert plan_table(one).count("\n") == 3


@pytest.mark.slow
def test_the_command_prints_a_table_of_the_stages(capsys):
    main(["plan", "--preset", "colab", "--gpu", "T4", "--backbone", "q3vl-tiny"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("| stage | steps | tokens a step |")
    assert len(lines) == 2 + len(load_preset("colab").stages)


def test_fine_tuning_is_planned_in_four_ways_on_the_pairs_at_hand(tmp_path, capsys):
    rows = [{"query": f"word {i}", "positive": " ".join([f"a longer text {i}"] * 5)} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["plan", "--pairs", str(tmp_path / "pairs.jsonl"), "--backbone", "q3vl-tiny", "--gpu", "T4", "--json"]
    command += ["--quiet", "--set", "stages.embedder.chunk_tokens=500"]
    assert main(command) == 0
    whole, cached, checkpointed, both = json.loads(capsys.readouterr().out)
    assert [p["stage"] for p in (whole, cached, checkpointed, both)][1:3] == ["gradient cache", "checkpointing"]

    def kept(plan):
        return plan["memory_gb"]["activations"]

    tokens = whole["tokens"]["step"]
    assert kept(cached) == pytest.approx(kept(whole) * 500 / tokens) and kept(both) < kept(checkpointed) < kept(whole)
    assert whole["hours"] < checkpointed["hours"] == cached["hours"] < both["hours"]
    # as many tokens at once as it says fill the GPU, margin included
    fixed = sum(whole["memory_gb"][part] for part in ("weights", "adapter and optimiser"))
    filled = MARGIN * (fixed + whole["at_once"] * kept(whole) / tokens)
    assert filled == pytest.approx(GPUS["T4"].memory_gb, rel=1e-4)
    # twice the epochs, twice the hours
    assert main([*command, "--epochs", "16"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["hours"] == pytest.approx(2 * whole["hours"], rel=0.3)


def test_public_sets_are_counted_by_blanks_of_their_size():
    preset = load_preset("full")
    only = replace(preset.stages["s0"], tasks={"mmeb/MSCOCO_t2i": 60_000})
    preset = replace(preset, stages={"s0": only})
    tokens = stage_tokens(preset, "s0", n_batches=1, batch_size=4, rows=8)
    pictures = tokens.visual / (only.batch_size / 4) / (640 * 480 / 32**2)  # a token covers 32 x 32 pixels
    assert pictures == round(pictures) and 4 <= pictures <= 4 + 2 * 4  # a positive and up to two others a query
    assert 300 < tokens.longest < 400
