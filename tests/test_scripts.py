"""The scripts that ship: a finished run's adapters load without a processor of their own; a backbone is replaced."""

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from q3vl_mini import backbone
from q3vl_mini.backbone import add_lora, load, save
from q3vl_mini.demo.gallery import make_gallery
from q3vl_mini.demo.models import Models
from q3vl_mini.demo.shelf import Shelf
from q3vl_mini.embedder import Embedder

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("ship_models")


def test_shipped_adapters_give_the_vectors_of_the_run(script, small_checkpoint, tmp_path, monkeypatch):
    data, run = tmp_path / "data_samples", tmp_path / "run"
    shutil.copytree(small_checkpoint, data / "q3vl-small")
    monkeypatch.setattr(backbone, "data_dir", lambda: data)
    for stage in script.SHIPPED:
        loaded = load("q3vl-small")
        role = "reranker" if stage == "reranker" else "embedder"
        card = {"role": role, "template": "released", "stage": stage}
        model = add_lora(loaded.model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # starts at zero, and an adapter that does nothing could be lost unnoticed
                torch.nn.init.normal_(parameter, std=0.2)
        save(run / stage / "model", model, loaded.processor, card)
        (run / stage / "metrics.json").write_text("{}")
    script.ship(run, data / "adapters")
    assert {folder.name for folder in (data / "adapters").iterdir()} == set(script.SHIPPED)
    assert not list((data / "adapters").rglob("tokenizer*"))
    ours = Embedder(run / "s0" / "model").encode(["a red cat"])
    raw = Embedder("q3vl-small").encode(["a red cat"])
    assert np.abs(ours - raw).max() > 0.05
    assert np.allclose(Embedder("adapters/s0").encode(["a red cat"]), ours, atol=1e-2)


def test_the_gallerys_vectors_replace_those_of_an_earlier_model(script, tmp_path, monkeypatch):
    items = make_gallery(3, 0, 0, 0)
    monkeypatch.setattr(script, "make_gallery", lambda: items)
    shipped, models = tmp_path / "gallery", Models(["s1", "raw"])
    shipped.mkdir()
    (shipped / "vectors-old.safetensors").write_text("old")
    made = script.ship_gallery(shipped, models)
    assert list(shipped.iterdir()) == [made]
    shelf = Shelf("Gallery", items, tmp_path / "home", shipped)
    assert list(shelf.embed(models, "raw")) == [] and list(shelf.embed(models, "s1")) == [(3, 3)]


def test_an_unfinished_run_is_not_shipped(script, tmp_path):
    with pytest.raises(SystemExit, match="has not finished s0, s1"):
        script.ship(tmp_path, tmp_path / "adapters")


def test_a_new_backbone_replaces_the_shipped_one_and_its_curves(script, tmp_path, monkeypatch):
    remake = importlib.import_module("remake_artifacts")
    backbone_folder, curves, made = tmp_path / "q3vl-tiny", tmp_path / "curves", tmp_path / "made" / "2" / "q3vl-tiny"
    for folder in (backbone_folder, curves, made, tmp_path / "made" / "1"):
        folder.mkdir(parents=True)
    (backbone_folder / "model.safetensors").write_text("old")
    (made / "model.safetensors").write_text("new")
    for number in "12":
        (tmp_path / "made" / number / "vision.jsonl").write_text(f"round {number}")
    monkeypatch.setattr(remake, "BACKBONE", backbone_folder)
    monkeypatch.setattr(remake, "CURVES", curves)
    remake.install_backbone(made)
    assert (backbone_folder / "model.safetensors").read_text() == "new"
    assert [(curves / number / "vision.jsonl").read_text() for number in "12"] == ["round 1", "round 2"]
