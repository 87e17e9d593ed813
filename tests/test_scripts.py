"""scripts/ship_models.py copies a finished run's adapters, and they load without a processor of their own."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

from q3vl_mini import backbone
from q3vl_mini.backbone import add_lora, load, save
from q3vl_mini.embedder import Embedder

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "ship_models.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("ship_models", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shipped_adapters_give_the_vectors_of_the_run(script, small_checkpoint, tmp_path, monkeypatch):
    data, run = tmp_path / "data_samples", tmp_path / "run"
    shutil.copytree(small_checkpoint, data / "q3vl-small")
    monkeypatch.setattr(backbone, "data_dir", lambda: data)
    for stage in script.SHIPPED:
        loaded = load("q3vl-small")
        role = "reranker" if stage == "reranker" else "embedder"
        card = {"role": role, "template": "released", "stage": stage}
        save(run / stage / "model", add_lora(loaded.model), loaded.processor, card)
        (run / stage / "metrics.json").write_text("{}")
    script.ship(run, data / "adapters")
    assert {folder.name for folder in (data / "adapters").iterdir()} == set(script.SHIPPED)
    assert not list((data / "adapters").rglob("tokenizer*"))
    ours = Embedder(run / "s0" / "model").encode(["a red cat"])
    assert np.allclose(Embedder("adapters/s0").encode(["a red cat"]), ours, atol=1e-2)


def test_an_unfinished_run_is_not_shipped(script, tmp_path):
    with pytest.raises(SystemExit, match="has not finished s0, s1"):
        script.ship(tmp_path, tmp_path / "adapters")
