"""The Qwen3-VL under both models: found, loaded, given LoRA, saved with a card.

A checkpoint is a folder in Hub format: an adapter (peft) or full weights (safetensors), the processor with its chat
template, and `q3vl_mini.json`, the card.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration
from transformers.utils import is_flash_attn_2_available

from .attention import BY_LENGTH
from .compression import Quantizers
from .config import data_dir
from .disk import replacing, write_whole
from .templates import EMBEDDER_TEMPLATES, RERANKER_TEMPLATES, choose
from .vision import speed_up

CARD_FILE = "q3vl_mini.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
QUANTIZERS_FILE = "quantizers.safetensors"
HEAD = "lm_head.weight"
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]  # no o_proj, as published
# A checkpoint without a card is an original one: Qwen3-VL itself, or the released embedder and reranker.
TEMPLATE_WITHOUT_CARD = "released"


@dataclass
class Backbone:
    """A loaded checkpoint: the model (wrapped by peft if it is an adapter), its processor, card and learned steps.

    `name` is by what it was found, `files` are those that hold its weights, an adapter's and its base's; none for a
    model that was made in memory or is to be trained.
    """

    model: nn.Module
    processor: Any
    card: dict[str, Any] = field(default_factory=dict)
    quantizers: Quantizers | None = None
    name: str = "in memory"
    files: tuple[Path, ...] = ()

    def __post_init__(self):
        self._loaded = self.model  # what `files` hold; a model that takes its place is another one

    def fingerprint(self) -> str:
        """SHA-256, in hex, by which an index knows one model's vectors from another's.

        Of a loaded checkpoint it is over the weights' files, read at the first call: the same on any device and in
        any dtype. Of a model in memory, of one loaded with trainable=True and of one put in the loaded one's place it
        is over the weights as they are now, each time. Change weights in place in these alone.
        """
        return self._of_files if self.files and self.model is self._loaded else _weights_digest(self.model)

    @cached_property
    def _of_files(self) -> str:
        total = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()


def _weights_digest(model: nn.Module) -> str:
    total = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        total.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        total.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def inner(model: nn.Module) -> Qwen3VLForConditionalGeneration:
    """The Qwen3VLForConditionalGeneration itself, out of peft's wrapping; its adapters stay active."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def resolve(name_or_path: str | Path, relative_to: Path | None = None) -> Path:
    """The folder of a checkpoint: a path, a name shipped in data_samples (or its adapters/), or a Hub id.

    A relative path counts from `relative_to`, if given, then from the working directory. A Hub id is downloaded
    (safetensors and text files only), or found in the Hub's cache if HF_HUB_OFFLINE is set.

    Raises:
        FileNotFoundError: naming every place that was looked at.
    """
    return _find(name_or_path, relative_to)[0]


def _find(name_or_path: str | Path, relative_to: Path | None = None) -> tuple[Path, str]:
    """The folder, and the name by which another machine finds it: shipped name, Hub id, or else the folder's path."""
    name = str(name_or_path)
    try:
        shipped = [data_dir().resolve(), data_dir().resolve() / "adapters"]
    except FileNotFoundError:  # installed without data: paths and Hub ids still work
        shipped = []
    places = [Path(base, name) for base in ([relative_to] if relative_to else []) + [Path(), *shipped]]
    for folder in (place.resolve() for place in places if place.is_dir()):
        inside = [parent for parent in shipped if folder.is_relative_to(parent)]
        return folder, folder.relative_to(inside[-1]).as_posix() if inside else str(folder)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja"])), name
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"no checkpoint {name!r}: not a folder ({', '.join(map(str, places))}), and not to be had from the Hub "
            f"({str(error).splitlines()[0]}); give the path of a folder, a shipped name or a Hub id"
        ) from error


def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    template: str | None = None,
    trainable: bool = False,
) -> Backbone:
    """A checkpoint, full or adapter, ready to run.

    An adapter's base is found by the same rule as the checkpoint (`resolve`), also relative to the adapter's folder.
    The vision tower is frozen and gets the faster forward of vision.py. Attention is attention.py's on CPU, on a GPU
    FlashAttention 2 if installed, else "sdpa". Weights are read from safetensors only.

    Args:
        device: None is the GPU if there is one. dtype: None is float32 on CPU, on a GPU bfloat16 if it can, else
            float16.
        template: overrides the card's, which without a card is TEMPLATE_WITHOUT_CARD.
        trainable: whether the weights of an adapter get gradients.

    Raises:
        FileNotFoundError, ValueError: naming what is missing or wrong.

    Taught in notebooks/01.
    """
    folder, name = _find(name_or_path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or _default_dtype(device)
    card = _card(folder, template)
    if (folder / ADAPTER_CONFIG).is_file():
        base_folder, base_name = _base(folder)
        model = _load_full(base_folder, base_name, device, dtype)
        _require_weights(folder, ADAPTER_WEIGHTS)
        with _undamaged(folder):
            model = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
        model.peft_config["default"].base_model_name_or_path = base_name
    else:
        base_folder, model = folder, _load_full(folder, name, device, dtype)
    has_processor = any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))
    processor = AutoProcessor.from_pretrained(folder if has_processor else base_folder, trust_remote_code=False)
    files = () if trainable else _weights_files(folder, base_folder)
    return Backbone(model.eval(), processor, card, _quantizers(folder, device), name, files)


def base_of(name_or_path: str | Path) -> Path:
    """The folder of a checkpoint's full weights: of the base that an adapter names, or else its own."""
    folder, _ = _find(name_or_path)
    return _base(folder)[0] if (folder / ADAPTER_CONFIG).is_file() else folder


def load_beside(loaded: Backbone, name_or_path: str | Path, adapter_name: str) -> Backbone:
    """An adapter put onto the weights of `loaded` as `adapter_name`, so that several models need the memory of one.

    Choose one before each forward: `model.set_adapter(adapter_name)`, or `with model.disable_adapter()` for none. The
    first adapter of a full model wraps it; go on with the model of what is returned.

    Raises ValueError if the checkpoint is no adapter, or one of another base.
    """
    folder, name = _find(name_or_path)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{name} is no adapter (no {ADAPTER_CONFIG}), so it has weights of its own; load() it")
    _require_weights(folder, ADAPTER_WEIGHTS)
    base_folder, base_name = _base(folder)
    files = _weights_files(folder, base_folder)
    if files[-1:] != loaded.files[-1:]:  # the base's come last
        raise ValueError(f"{name} is an adapter of {base_name}, and {loaded.name} has other weights; load() it")
    model = loaded.model
    with _undamaged(folder):
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name=adapter_name)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=adapter_name)
    quantizers = _quantizers(folder, inner(model).device)
    return Backbone(model.eval(), loaded.processor, _card(folder, None), quantizers, name, files)


@contextmanager
def _undamaged(folder: Path) -> Iterator[None]:
    """Let the error of a file that is cut off or altered name its checkpoint and the remedy.

    So does an adapter that lacks tensors: peft warns, and leaves them as they were made.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            yield
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, UserWarning) as error:
        told = str(error)[:300]
        raise ValueError(f"{folder} has a damaged file ({told}); copy or download the checkpoint again") from error


def _json_object(folder: Path, name: str) -> dict[str, Any]:
    with _undamaged(folder):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{folder / name} is no JSON object; copy or download the checkpoint again")
    return content


def _card(folder: Path, template: str | None) -> dict[str, Any]:
    card = _json_object(folder, CARD_FILE) if (folder / CARD_FILE).is_file() else {}
    card["template"] = template or card.get("template", TEMPLATE_WITHOUT_CARD)
    choose(EMBEDDER_TEMPLATES, card["template"])
    return card


def _base(folder: Path) -> tuple[Path, str]:
    """The folder and name of an adapter's base model."""
    base = _json_object(folder, ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder / ADAPTER_CONFIG} names no base model; fill in base_model_name_or_path")
    return _find(base, relative_to=folder)


def _quantizers(folder: Path, device: torch.device) -> Quantizers | None:
    if not (folder / QUANTIZERS_FILE).is_file():
        return None
    with _undamaged(folder):
        state = load_file(folder / QUANTIZERS_FILE)
    quantizers = Quantizers(sorted({int(name.split(".")[1]) for name in state}))
    quantizers.load_state_dict(state)
    return quantizers.eval().to(device)


def _weights_files(*folders: Path) -> tuple[Path, ...]:
    """The files that hold the weights of an adapter and its base, each once."""
    return tuple(file for folder in dict.fromkeys(folders) for file in _files_of(folder))


def _files_of(folder: Path) -> list[Path]:
    adapter = folder / ADAPTER_WEIGHTS
    return [adapter] if adapter.is_file() else sorted(folder.glob("model*.safetensors"))


def _default_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float16


def _require_file(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} has no {name}; is it a checkpoint, saved as safetensors?")


def _require_weights(folder: Path, name: str) -> None:
    """`_require_file`; where there are weights in files that run code when they are read, the error names these."""
    pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind))
    if pickles and not (folder / name).is_file():
        raise FileNotFoundError(
            f"{folder} has no {name} but {', '.join(pickles)}, which can run code when read, so it is not read here; "
            "load it where you trust it, and save it again as safetensors (save_pretrained of transformers or peft)"
        )
    _require_file(folder, name)


def _load_full(folder: Path, name: str, device: torch.device, dtype: torch.dtype) -> Qwen3VLForConditionalGeneration:
    _require_file(folder, "config.json")
    if not any(folder.glob("model*.safetensors")):
        _require_weights(folder, "model.safetensors")
    text = BY_LENGTH
    if device.type != "cpu":
        text = "flash_attention_2" if is_flash_attn_2_available() and dtype != torch.float32 else "sdpa"
    # each part is named, or a config.json could name an attention of its own, which is code to be fetched from the Hub
    attention = {"": text, "text_config": text, "vision_config": "sdpa"}
    with _undamaged(folder):
        model, found = Qwen3VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, attn_implementation=attention, output_loading_info=True
        )
    # transformers warns, and draws them at random; an embedder may do without the head for words (reranker.py)
    model.has_head = HEAD not in found["missing_keys"]
    if missing := sorted(found["missing_keys"] - {HEAD}):
        told = f"{len(missing)} tensors of its weights, such as {missing[0]}"
        raise ValueError(f"{folder} lacks {told}; copy or download the checkpoint again")
    model.name_or_path = model.config._name_or_path = name  # what peft records as an adapter's base
    speed_up(model.model.visual).requires_grad_(False)
    return model.to(device)


def add_lora(model: Qwen3VLForConditionalGeneration, rank: int = 32, alpha: int = 32) -> PeftModel:
    """Freeze the model and add LoRA exactly as published: six projections of every layer of the language model.

    Their names do not occur in the vision tower, which stays as it is. B starts at zero, so the model's outputs do
    not change. Source: the official repository's README. Taught in notebooks/01.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_MODULES, lora_dropout=0.0, bias="none")
    return get_peft_model(model, config)


def save(
    folder: str | Path,
    model: nn.Module,
    processor: Any,
    card: Mapping[str, Any],
    quantizers: Quantizers | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a checkpoint in Hub format: adapter or full weights, processor, chat template, card, learned steps.

    `card` goes to q3vl_mini.json and, as a table, to README.md. It needs `role` ("embedder" or "reranker") and
    `template`; preset, stage, seed, git revision, scores and whatever else is JSON are welcome. `dtype` is that of
    the weights on disk; None is the model's.

    An interrupted save leaves the old checkpoint as it was (`replacing`). What other libraries read besides is written
    by export.export.
    """
    folder = Path(folder)
    templates = {"embedder": EMBEDDER_TEMPLATES, "reranker": RERANKER_TEMPLATES}
    if card.get("role") not in templates:
        raise ValueError(f"the card's role is {card.get('role')!r}; expected one of {list(templates)}")
    choose(templates[card["role"]], card.get("template", ""))
    card = dict(card)
    with replacing(folder) as new:
        is_adapter = isinstance(model, PeftModel)
        model.save_pretrained(new, **({"save_embedding_layers": False} if is_adapter else {}))
        if is_adapter:
            card["base"] = _relocate_base(new / ADAPTER_CONFIG, folder)
        if dtype is not None:
            for file in new.glob("*.safetensors"):
                cast_file(file, dtype)
        processor.save_pretrained(new)
        if quantizers is not None:
            save_file({name: x.cpu() for name, x in quantizers.state_dict().items()}, new / QUANTIZERS_FILE)
        (new / CARD_FILE).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n")
        (new / "README.md").write_text(model_card(folder.name, card))


def add_to_card(folder: str | Path, entries: Mapping[str, Any]) -> None:
    """Write more entries, such as measured scores, into the card and the README.md of a saved checkpoint."""
    folder = Path(folder)
    card = json.loads((folder / CARD_FILE).read_text()) | dict(entries)
    write_whole(folder / CARD_FILE, json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / "README.md", model_card(folder.name, card))


def cast_file(file: Path, dtype: torch.dtype) -> None:
    """Rewrite a safetensors file with its floating-point weights in `dtype`."""
    cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in load_file(file).items()}
    save_file(cast, file, metadata={"format": "pt"})


def _relocate_base(config_file: Path, folder: Path) -> str:
    """Name a local base by its path from the adapter's final folder, so that the two can move together."""
    config = json.loads(config_file.read_text())
    base = config["base_model_name_or_path"] or ""  # empty for a model that came from no checkpoint
    if Path(base).is_absolute():
        base = os.path.relpath(base, folder.resolve())
    config["base_model_name_or_path"] = base
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    return base


def model_card(name: str, card: Mapping[str, Any]) -> str:
    """README.md of a checkpoint, generated from its card: what it is, how to load it, every entry of the card."""
    use = {
        "embedder": 'from q3vl_mini.embedder import Embedder\n\nvectors = Embedder("path").encode(["a red cat"])',
        "reranker": 'from q3vl_mini.reranker import Reranker\n\nscores = Reranker("path").score("a cat", ["a cat"])',
    }[card["role"]]
    rows = []
    for key, value in card.items():
        items = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [f"| {key} {sub} | {_cell(x)} |".replace("  ", " ") for sub, x in items]
    base = f"base_model: {card['base']}\n" if "base" in card else ""
    return (
        f"---\nlibrary_name: {'peft' if base else 'transformers'}\n{base}tags: [qwen3_vl, {card['role']}]\n---\n\n"
        f'# {name}\n\nA Qwen3-VL {card["role"]} with the template "{card["template"]}", trained by q3vl_mini.\n\n'
        f"```python\n{use}\n```\n\n| | |\n|---|---|\n" + "\n".join(rows) + "\n"
    )


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
