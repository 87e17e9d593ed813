"""Frozen weights split among two processes: the same training, less memory, and whole again afterwards."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from test_train import JOINT, embedder, fit_on_two_tasks
from two_processes import run_in_two_processes

from q3vl_mini import train
from q3vl_mini.backbone import inner
from q3vl_mini.config import load_preset
from q3vl_mini.sharding import ASKED, asked_by_launch, shard_frozen
from q3vl_mini.stages import Run


def held(model):
    """Bytes of frozen weights in the language model's layers that this process holds."""
    layers = inner(model.model).model.language_model.layers
    weights = [p for p in layers.parameters() if not p.requires_grad]
    return sum(getattr(p, "_local_tensor", p).untyped_storage().nbytes() for p in weights)


def train_and_look(rank, checkpoint, folder):
    accelerator, seen = Accelerator(cpu=True), {"held": []}
    split_rows = train.split_rows

    def counted(inputs, max_tokens, share=True):
        parts = split_rows(inputs, max_tokens, share)
        seen.setdefault("parts", []).append(len(parts))
        return parts

    train.split_rows = counted
    for name, shard in (("whole", False), ("split", True)):
        for tokens in (0, 40):
            log, weights = fit_on_two_tasks(
                checkpoint, f"{folder}/{name}{tokens}", accelerator, replace(JOINT, chunk_tokens=tokens), shard=shard
            )
            torch.save((log, weights), f"{folder}/{name}{tokens}-{rank}.pt")
    model = embedder(checkpoint)
    items = ["red cat", "a long text about green apples and a tall ship"]
    before, all_of_it = model.encode(items), held(model)
    make_whole = shard_frozen(model)
    model.one_call = True
    model(model.collate(items))
    seen["held"] = [all_of_it, held(model)]
    make_whole()
    if rank == 0:  # alone, as who evaluates a sub-dataset is
        seen["difference"] = float(abs(model.encode(items) - before).max())
    with open(f"{folder}/seen{rank}.json", "w") as file:
        json.dump(seen, file)


@pytest.fixture(scope="module")
def trained(small_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    run_in_two_processes(train_and_look, str(small_checkpoint), str(folder))
    return folder


@pytest.fixture
def seen(trained):
    """What each process saw."""
    return [json.loads((trained / f"seen{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [0, 40])
def test_split_weights_train_like_whole_ones(trained, tokens):
    for rank in (0, 1):
        whole, split = (torch.load(trained / f"{name}{tokens}-{rank}.pt") for name in ("whole", "split"))
        for key in ("loss", "grad_norm"):
            assert [row[key] for row in split[0]] == pytest.approx([row[key] for row in whole[0]], rel=1e-3)
        assert all(torch.allclose(split[1][name], whole[1][name], atol=1e-4) for name in whole[1])


def test_processes_whose_rows_make_unequal_numbers_of_parts_keep_in_step(seen):
    assert seen[0]["parts"] != seen[1]["parts"]  # else the test before would not have shown it


def test_each_of_two_processes_holds_half_of_the_layers_between_two_forwards(seen):
    for rank in (0, 1):
        whole, split = seen[rank]["held"]
        assert split == whole / 2


def test_after_training_a_process_embeds_without_the_others(seen):
    assert seen[0]["difference"] < 1e-6


def test_a_launch_with_fsdp_splits_the_weights_here_and_not_in_accelerate(tmp_path, monkeypatch):
    monkeypatch.setenv(ASKED, "false")
    assert not Run(load_preset("tiny"), tmp_path / "plain", tracker="none").shard
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    run = Run(load_preset("tiny"), tmp_path / "fsdp", tracker="none")
    assert run.shard and os.environ["ACCELERATE_USE_FSDP"] == "false"  # what accelerate reads
    assert Run(load_preset("tiny"), tmp_path / "second", tracker="none").shard


def test_the_file_for_fsdp_asks_for_it():
    """As `accelerate launch` reads it, whose environment the processes get."""
    file = Path(__file__).resolve().parents[1] / "configs" / "accelerate" / "fsdp.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert asked_by_launch(prepare_multi_gpu_env(arguments))


def test_there_has_to_be_a_frozen_weight(small_checkpoint):
    model = embedder(small_checkpoint)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="shard=false"):
        shard_frozen(model)
