"""A trained model as a folder that this module, transformers, sentence-transformers and vLLM load.

The weights are merged (base plus adapter, one sum) or the adapter alone. Prompt and sizes of pictures, which this
module keeps in its own code, are written where the other libraries look: into the chat template and the processor.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from peft import PeftModel

from .backbone import CARD_FILE, Backbone, inner, load, resolve, save
from .chat_template import chat_template
from .choices import ROLES
from .disk import replacing
from .hub_card import Exported, hub_card
from .media import PIXELS, MediaBudget
from .sentence_transformers_files import write_embedder_files, write_reranker_files
from .vllm_files import write_vllm_files

# Files of an earlier upload that would change what the model is: an adapter's beside merged weights, or the reverse.
WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "vllm.*"]


def export(
    model: str | Path,
    out: str | Path,
    merged: bool = True,
    dtype: torch.dtype | str | None = None,
    results: str | Path | Mapping[str, Any] | None = None,
    name: str | None = None,
    role: str | None = None,
    base: str | None = None,
) -> Path:
    """Write a checkpoint to the folder `out` in the form that other libraries load; returns `out`.

    Everything is loaded on the CPU in float32: 4 bytes a parameter of memory.

    Args:
        model: a folder, a shipped name or a Hub id of an embedder or a reranker.
        merged: full weights; False keeps the adapter, which other libraries load on top of its base.
        dtype: of the weights on disk, e.g. "bfloat16"; None is float32, in which the merged model has the adapter's
            vectors. Half precision rounds the sum of base and adapter, and so changes them.
        results: the run's results file, or its content, for the table of scores in README.md.
        name: what README.md calls the model and loads; None is the name of `out`. For the Hub, the repository's id.
        role: "embedder" or "reranker", only for a checkpoint without a card, such as a released one.
        base: for an adapter, the name by which others find its base. None is its Hub id, or the absolute path of a
            local base, since other libraries know no shipped names.

    Raises:
        FileNotFoundError, ValueError: what is missing, or does not fit together.
    """
    out, source = Path(out), resolve(model)
    _check_target(out, source)
    backbone = load(model, device="cpu", dtype=torch.float32)
    backbone.card["role"] = _role(backbone.card, role, model)
    is_adapter = isinstance(backbone.model, PeftModel) and not merged
    if not merged and not is_adapter:
        raise ValueError(f"{model} has full weights, no adapter; export it merged")
    results = json.loads(Path(results).read_text()) if isinstance(results, (str, Path)) else results
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    if isinstance(backbone.model, PeftModel):
        recorded = backbone.model.peft_config["default"].base_model_name_or_path
        local = str(resolve(recorded)) if is_adapter and not _is_hub_id(recorded) else recorded
        backbone.card["base"] = base or local
    if not is_adapter:
        merged_model = backbone.model.merge_and_unload() if isinstance(backbone.model, PeftModel) else backbone.model
        backbone.model = merged_model.to(dtype)
    page = _page(backbone, name or out.resolve().name, dtype, is_adapter, results)  # fails before anything is written
    with replacing(out) as folder:
        _write(folder, backbone, dtype, is_adapter)
        (folder / "README.md").write_text(page)
    return out


def _check_target(out: Path, source: Path) -> None:
    if out.resolve() == source:
        raise ValueError(f"{out} is the checkpoint itself; give another folder to write to")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / CARD_FILE).is_file())):
        raise ValueError(f"{out} exists and is no checkpoint of this module; it would be replaced. Give a new folder")


def _role(card: Mapping[str, Any], role: str | None, model: str | Path) -> str:
    recorded = card.get("role", role)
    if recorded not in ROLES:
        raise ValueError(f"{model} has no card that tells its role; give role as one of {list(ROLES)}")
    if role not in (None, recorded):
        raise ValueError(f"{model} is a checkpoint of the role {recorded!r}, not {role!r}")
    return recorded


def _is_hub_id(base: str) -> bool:
    """True for "owner/name"; a folder's recorded name is an absolute path, a shipped one has no slash."""
    return "/" in base and not Path(base).is_absolute()


def _dims(backbone: Backbone) -> tuple[int, ...]:
    """Matryoshka dimensions: those that have learned steps."""
    return tuple(sorted(int(d) for d in backbone.quantizers["int8"])) if backbone.quantizers is not None else ()


def _page(backbone: Backbone, name: str, dtype: torch.dtype, is_adapter: bool, results: Any) -> str:
    network, base = inner(backbone.model), backbone.card.get("base", "")
    model = Exported(
        name,
        backbone.card,
        base_id=base if _is_hub_id(base) else None,
        parameters=network.num_parameters(),
        dim=network.config.text_config.hidden_size,
        dims=_dims(backbone),
        weights=f"{'a LoRA adapter' if is_adapter else 'merged'}, {str(dtype).removeprefix('torch.')}",
        is_adapter=is_adapter,
    )
    return hub_card(model, results)


def _write(folder: Path, backbone: Backbone, dtype: torch.dtype, is_adapter: bool) -> None:
    card, network = backbone.card, inner(backbone.model)
    processor = export_processor(backbone.processor, card["role"], card["template"], card.get("fps", MediaBudget.fps))
    save(folder, backbone.model, processor, card, backbone.quantizers, dtype if is_adapter else None)
    if is_adapter:
        for file, key in (("adapter_config.json", "base_model_name_or_path"), (CARD_FILE, "base")):
            content = json.loads((folder / file).read_text()) | {key: card["base"]}
            (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    else:
        write_vllm_files(folder, card["role"], card["template"], _dims(backbone))
    if card["role"] == "embedder":
        write_embedder_files(folder, network.config.text_config.hidden_size)
    else:
        write_reranker_files(folder, *processor.tokenizer.convert_tokens_to_ids(["yes", "no"]))


def export_processor(processor: Any, role: str, template: str, fps: float = MediaBudget.fps) -> Any:
    """A copy of the processor that writes the role's prompt and sizes visuals as this module does by default."""
    budget, processor = MediaBudget(fps=fps), copy.deepcopy(processor)
    processor.chat_template = processor.tokenizer.chat_template = chat_template(role, template)
    image, video = processor.image_processor, processor.video_processor
    image.size = _pixels(budget.image_min_tokens, budget.image_max_tokens)
    video.size = _pixels(2 * budget.video_min_tokens, 2 * budget.video_max_tokens)  # of both frames of a pair
    video.fps, video.min_frames, video.max_frames = budget.fps, budget.min_frames, budget.max_frames
    video.cap_pixels_per_frame = False  # the budget is the whole video's
    return processor


def _pixels(low: int, high: int) -> dict[str, int]:
    """Limits in tokens as the processors want them; "edge" is their word for an area."""
    return {"shortest_edge": low * PIXELS, "longest_edge": high * PIXELS}


def push(folder: str | Path, repo_id: str, private: bool = True) -> str:
    """Upload an exported folder to the Hub, into a repository that is made if it is not there; returns its address.

    Needs a login (`hf auth login`). `private` holds for a new repository; an existing one stays as it is, but for
    weights of an earlier upload that this one does not have (WEIGHT_FILES): they go.

    Raises:
        ValueError: the folder is no export, or its adapter names a base that only this machine has.
    """
    folder = Path(folder)
    if not (folder / CARD_FILE).is_file() or not (folder / "modules.json").is_file():
        raise ValueError(f"{folder} is not what export wrote; export the model first")
    adapter = folder / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else None
    if base and Path(base).is_absolute():
        raise ValueError(
            f"the adapter's base is {base}, which only this machine has; push the base, then export with base= its id, "
            "or export merged"
        )
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    message = "Upload a model exported by q3vl_mini"
    api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, delete_patterns=WEIGHT_FILES)
    return f"https://huggingface.co/{repo_id}"
