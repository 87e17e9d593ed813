"""Weights come from safetensors alone, and nothing that is read can run code."""

import ast
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from q3vl_mini.backbone import add_lora, load, save
from q3vl_mini.embedder import Embedder
from q3vl_mini.reranker import Reranker

ROOT = Path(__file__).resolve().parents[1]
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
NOT_FALSE = {"allow_pickle", "trust_remote_code"}


def faults(code: str, name: str) -> list[str]:
    """What in a source could run code that a file brings with it."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            modules = [getattr(node, "module", None) or "", *names]
            wrong = PICKLES & {module.split(".")[0] for module in modules}
            if getattr(node, "module", None) == "torch" and "load" in names:
                wrong.add("torch.load")
        elif isinstance(node, ast.Attribute):
            wrong = {"torch.load", "yaml.load", "yaml.unsafe_load", "pd.read_pickle"} & {ast.unparse(node)}
        elif isinstance(node, ast.keyword):
            off = isinstance(node.value, ast.Constant) and node.value.value is False
            wrong = {node.arg} & NOT_FALSE if not off else set()
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "from_pretrained":
            # transformers' Auto classes ask at the terminal whether code may run, unless they are told that it may not
            told = any(keyword.arg == "trust_remote_code" for keyword in node.keywords)
            wrong = {"an Auto class that asks"} if ast.unparse(node.func).startswith("Auto") and not told else set()
        elif isinstance(node, ast.Name):
            wrong = {"eval", "exec"} & {node.id}
        else:
            wrong = set()
        found += [f"{name}, line {node.lineno if hasattr(node, 'lineno') else '?'}: {w}" for w in sorted(wrong)]
    return found


def sources():
    """Every module, script and notebook of the project."""
    for folder in ("q3vl_mini", "scripts", "benchmarks", "demo"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield file.relative_to(ROOT), file.read_text(encoding="utf-8")
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for number, cell in enumerate(json.loads(file.read_text(encoding="utf-8"))["cells"]):
            lines = "".join(cell["source"]).splitlines()
            if cell["cell_type"] == "code" and not "".join(lines).startswith("%%"):
                plain = "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))
                yield f"{file.relative_to(ROOT)}, cell {number}", plain


def test_nothing_that_is_read_can_run_code():
    read = list(sources())
    assert len(read) > 60
    assert [fault for name, code in read for fault in faults(code, str(name))] == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import pickle",
        "from joblib import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "load('x', trust_remote_code=flag)",
        "AutoProcessor.from_pretrained('x')",
        "eval(text)",
        "import yaml\nyaml.load(text)",
    ],
)
def test_the_search_finds_what_it_is_for(code):
    assert len(faults(code, "x")) == 1
    assert faults("import numpy as np\nnp.load('x', allow_pickle=False)\nmodel.eval()", "x") == []


@pytest.mark.parametrize("kind", [Embedder, Reranker])
def test_full_weights_in_a_pickle_are_refused(kind, small_checkpoint, tmp_path):
    for file in small_checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        kind(tmp_path)
    torch.save({"w": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"but pytorch_model\.bin, which can run code .*again as safetensors"):
        kind(tmp_path)


def test_an_adapter_in_a_pickle_is_refused(small_checkpoint, tmp_path):
    config = {"base_model_name_or_path": str(small_checkpoint), "peft_type": "LORA", "r": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"w": torch.zeros(1)}, tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin, which can run code when read"):
        Embedder(tmp_path)


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def cut_in_the_head(file):
    os.truncate(file, 20)


def lose_a_tensor(file):
    tensors = load_file(file)
    del tensors[sorted(tensors)[3]]
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("damage", [cut, cut_in_the_head, lose_a_tensor])
@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_damaged_weights_are_named_and_never_made_up(small_checkpoint, tmp_path, name, damage):
    folder = tmp_path / "saved"
    shutil.copytree(small_checkpoint, folder)
    if name.startswith("adapter"):
        loaded = load(small_checkpoint)
        folder = tmp_path / "adapter"
        save(folder, add_lora(loaded.model), loaded.processor, {"role": "embedder", "template": "report"})
    assert np.isfinite(Embedder(folder).encode(["a cat"])).all()
    damage(folder / name)
    with pytest.raises(ValueError, match=f"{folder} .*copy or download the checkpoint again"):
        Embedder(folder)


@pytest.mark.parametrize("name", ["q3vl_mini.json", "adapter_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_a_damaged_card_is_named(small_checkpoint, tmp_path, name, content):
    shutil.copytree(small_checkpoint, tmp_path / "saved")
    (tmp_path / "saved" / name).write_text(content, "utf-8", "surrogateescape")
    with pytest.raises(ValueError, match=f"{tmp_path / 'saved'}.*copy or download the checkpoint again"):
        Embedder(tmp_path / "saved")


def test_a_config_names_neither_code_nor_a_kernel_of_its_own(small_checkpoint, tmp_path):
    item, folder = {"image": Image.new("RGB", (64, 64), "red")}, tmp_path / "saved"
    shutil.copytree(small_checkpoint, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    own = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer")}
    for file in ("config.json", "processor_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / file).read_text()) | {"auto_map": own}
        for part in [settings, settings["text_config"], settings["vision_config"]] if file == "config.json" else []:
            part["attn_implementation"] = part["_attn_implementation"] = "evil/kernel"
        (folder / file).write_text(json.dumps(settings))
    np.testing.assert_array_equal(Embedder(folder).encode([item]), Embedder(small_checkpoint).encode([item]))
    settings["processor_class"] = settings["tokenizer_class"] = "Evil"  # which transformers does not know
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Evil", "auto_map": own}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        Embedder(folder)
    assert not (tmp_path / "ran").exists()
