"""Adam's moments split among two processes by DeepSpeed: the same training, and half of the moments in each."""

import importlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from safetensors.torch import load_file
from test_train import JOINT, fit_on_two_tasks
from two_processes import run_in_two_processes

from q3vl_mini.config import load_preset
from q3vl_mini.stages import Run
from q3vl_mini.zero import ASKED, ZeroOptimizer, asked_by_launch

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STAGE = {stage: {"zero_optimization": {"stage": stage}} for stage in (1, 2)}


def without_a_compiler():
    """DeepSpeed compiles messages between processes of one CPU; gloo sends them too."""
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def train_and_look(rank, checkpoint, folder):
    accelerator, seen = Accelerator(cpu=True), {}
    without_a_compiler()
    made, init = [], ZeroOptimizer.__init__

    def noted(self, *args):
        init(self, *args)
        made.append(self)

    ZeroOptimizer.__init__ = noted

    def run(name, stage=JOINT, **more):
        log, weights = fit_on_two_tasks(checkpoint, f"{folder}/{name}", accelerator, stage, **more)
        torch.save((log, weights), f"{folder}/{name}-{rank}.pt")

    in_parts = replace(JOINT, chunk_tokens=40)
    run("plain")
    for stage, settings in STAGE.items():
        run(f"zero{stage}", zero=settings)
    moments = made[-1].optimizer.optimizer.state.values()
    seen["moments"] = sum(state["exp_avg"].numel() for state in moments)
    seen["weights"] = sum(p.numel() for p in made[-1].parameters)
    run("in parts", in_parts, zero=STAGE[2])
    run("accumulated plainly", replace(JOINT, accumulate=2))
    run("accumulated", replace(JOINT, accumulate=2), zero=STAGE[2])
    run("with split weights", in_parts, zero=STAGE[2], shard=True)
    for begins, ends in ((STAGE[2], STAGE[2]), (STAGE[2], None), (None, STAGE[2])):
        name = f"{'zero' if begins else 'plain'} then {'zero' if ends else 'plain'}"
        fit_on_two_tasks(checkpoint, f"{folder}/{name}", accelerator, zero=begins, stop_after=2)
        run(name, zero=ends)
    text = Path(folder, f"seen{rank}.json")
    text.write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def trained(small_checkpoint, tmp_path_factory):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not for Windows; else: pip install 'q3vl-mini[deepspeed]'")
    folder = tmp_path_factory.mktemp("zero")
    run_in_two_processes(train_and_look, str(small_checkpoint), str(folder))
    return folder


SAME = [("zero1", "plain"), ("zero2", "plain"), ("in parts", "plain"), ("accumulated", "accumulated plainly")]
SAME += [("with split weights", "plain")]
SAME += [(f"{name} then {other}", "plain") for name, other in [("zero", "zero"), ("zero", "plain"), ("plain", "zero")]]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "other"), SAME)
def test_split_moments_train_like_whole_ones_also_from_a_checkpoint_of_either(trained, name, other):
    for rank in (0, 1):
        split, whole = (torch.load(trained / f"{which}-{rank}.pt") for which in (name, other))
        for key in ("loss", "grad_norm"):
            assert [row[key] for row in split[0]] == pytest.approx([row[key] for row in whole[0]], rel=1e-3)
        assert all(torch.allclose(split[1][key], whole[1][key], atol=1e-4) for key in whole[1])


@pytest.mark.slow
def test_each_of_two_processes_holds_half_of_the_moments(trained):
    for rank in (0, 1):
        seen = json.loads((trained / f"seen{rank}.json").read_text())
        assert seen["weights"] / 2 <= seen["moments"] <= seen["weights"] / 2 + 8  # padded to equal parts


@pytest.mark.slow
def test_the_checkpoint_has_the_moments_whole(trained):
    split, whole = (load_file(trained / name / "state" / "state.safetensors") for name in ("zero2", "plain"))
    assert split.keys() == whole.keys() and any("exp_avg_sq" in name for name in whole)
    assert all(torch.allclose(split[name], whole[name], rtol=1e-3, atol=1e-6) for name in whole)


@pytest.fixture
def launched(monkeypatch):
    """What `accelerate launch` sets, and this process's memory of it, which is forgotten again."""

    def launch(**values):
        monkeypatch.setenv(ASKED, "null")
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        for name, value in values.items():
            monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name.upper()}", str(value))

    return launch


def test_a_launch_with_deepspeed_splits_the_moments_here_and_not_in_accelerate(tmp_path, launched):
    launched(zero_stage=1)
    assert Run(load_preset("tiny"), tmp_path / "one", tracker="none").zero == STAGE[1]
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "false"  # what accelerate reads
    assert Run(load_preset("tiny"), tmp_path / "two", tracker="none").zero == STAGE[1]


def test_the_file_for_deepspeed_asks_for_it(monkeypatch):
    """As `accelerate launch` reads it, whose environment the processes get."""
    monkeypatch.chdir(CONFIGS.parent)
    arguments = ["--config_file", str(CONFIGS / "accelerate" / "deepspeed.yaml"), "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    arguments.deepspeed_fields_from_accelerate_config = "deepspeed_config_file"  # as launch_command() does
    _, environment = prepare_deepspeed_cmd_env(arguments)
    assert asked_by_launch(environment)["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"zero_optimization": {"stage": 3}}, "stage 3.*fsdp.yaml"),
        ({}, "stage None"),
        ({**STAGE[2], "optimizer": {"type": "Adam"}, "bf16": {"enabled": True}}, "optimizer, bf16, which the preset"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
    ],
)
def test_settings_that_are_not_taken_are_named_with_the_remedy(tmp_path, launched, settings, named):
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(settings))
    launched(config_file=file)
    with pytest.raises(ValueError, match=named):
        Run(load_preset("tiny"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_left_to_the_trainer_may_stay_in_the_file(tmp_path, launched):
    file = tmp_path / "deepspeed.json"
    zero = {**STAGE[1]["zero_optimization"], "reduce_bucket_size": "auto"}
    file.write_text(json.dumps({"zero_optimization": zero, "train_batch_size": "auto", "gradient_clipping": "auto"}))
    launched(config_file=file)
    assert asked_by_launch() == STAGE[1]


def test_one_process_has_nothing_to_split(small_checkpoint, tmp_path):
    plain, _ = fit_on_two_tasks(small_checkpoint, tmp_path / "plain")
    alone, _ = fit_on_two_tasks(small_checkpoint, tmp_path / "zero", zero=STAGE[2])
    assert [row["loss"] for row in alone] == [row["loss"] for row in plain]
