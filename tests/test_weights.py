"""Weights come from safetensors alone, and nothing that is read can run code."""

import ast
import json
from pathlib import Path

import pytest
import torch

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
