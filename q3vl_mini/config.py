"""Configuration: one frozen dataclass, filled from a preset (a TOML file) or from a run's saved config.

A preset is data. Nothing in the code asks which preset it runs; it reads the numbers that the preset gives.
"""

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .disk import write_whole

TERMS = ("query_document", "query_query", "document_document", "others_negatives")
QUANTIZED = ("int8", "binary")


@cache
def data_dir() -> Path:
    """The folder data_samples: of the checkout, of an installed wheel, or where Q3VL_MINI_DATA points."""
    package = Path(__file__).resolve().parent
    choices = [package.parent / "data_samples", package / "data_samples"]
    if os.environ.get("Q3VL_MINI_DATA"):
        choices.insert(0, Path(os.environ["Q3VL_MINI_DATA"]))
    for folder in choices:
        if (folder / "emoji_world" / "concepts.json").is_file():
            return folder
    raise FileNotFoundError(
        f"data_samples not found (looked at {', '.join(map(str, choices))}); run from a checkout of the "
        "repository, or set Q3VL_MINI_DATA to the folder"
    )


@dataclass(frozen=True)
class MiningConfig:
    """Section 3.3: who mines, the report's K, t+ and delta- (on the cosine), and how many negatives a query keeps.

    `miner` is an earlier stage of the run, or "raw" for the backbone without training.
    """

    miner: str
    k: int = 50
    t_plus: float = -1.0
    delta_minus: float = 0.05
    n_negatives: int = 4


@dataclass(frozen=True)
class StageConfig:
    """One stage of training: its data, its loss and its steps.

    tasks: rows of each sub-dataset, by name of an Emoji World task or of a public set, or folder of a saved quadruple.
    start: the stage whose weights it goes on from; "raw" is the backbone with a fresh adapter. batch_size counts the
    queries of all processes. n_negatives of the mined ones, and n_random that are drawn from the whole corpus, enter a
    batch for each query. accumulate: batches a step, each with its own in-batch negatives. chunk_tokens: how many are
    embedded at once (gradient cache); 0 embeds a batch whole. warmup: share of the steps. terms: what enters InfoNCE's
    Z_i besides the query's own negatives. masks_of: what is masked at a prefix and precision, by its own scores
    ("each") or by those of the whole embedding ("whole"). loss_per_task: classification and STS get their own loss.
    teacher_temperature: distillation alone.
    """

    tasks: Mapping[str, int] = field(default_factory=dict)
    start: str = "raw"
    steps: int = 100
    batch_size: int = 32
    n_negatives: int = 2
    n_random: int = 0
    accumulate: int = 1
    chunk_tokens: int = 0
    exponent: float = 0.5
    lr: float = 1e-3
    quantizer_lr: float = 1e-5
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    temperature: float = 0.05
    teacher_temperature: float = 1.0
    margin: float = 0.1
    terms: tuple[str, ...] = ("query_document",)
    masks_of: str = "each"
    loss_per_task: bool = False
    mining: MiningConfig | None = None
    log_every: int = 10
    checkpoint_every: int = 100

    def __post_init__(self):
        positive = {name: getattr(self, name) for name in ("steps", "batch_size", "accumulate", "temperature")}
        if min(positive.values()) <= 0 or self.chunk_tokens < 0:
            raise ValueError(
                f"{positive}, chunk_tokens {self.chunk_tokens}; expected positive numbers (chunk_tokens may be 0)"
            )
        if unknown := set(self.terms) - set(TERMS):
            raise ValueError(f"unknown terms {sorted(unknown)}; choose among {list(TERMS)}")
        if self.masks_of not in ("each", "whole"):
            raise ValueError(f"masks_of {self.masks_of!r}; choose each or whole")


@dataclass(frozen=True)
class MergeConfig:
    """Self Positioning: steps and rate for a_i and lambda, mu of the penalty, and the merged adapter's rank.

    probe: queries of each sub-dataset of s1 in the probe set. The loss is s1's.
    """

    steps: int = 40
    lr: float = 0.02
    mu: float = 0.01
    probe: int = 200
    rank: int = 64


@dataclass(frozen=True)
class DataConfig:
    """Sizes of visuals, the cache of their features, and the rows of evaluation.

    evaluators: processes that measure the models of a run side by side on a CPU, whose cores they share.
    public: the folder of public data sets, local copies and what public_data.prepare makes of them. wrong_labels,
    unlabelled_duplicates: shares of the queries of training that are spoiled on purpose (noise.add_noise).
    """

    image_min_tokens: int = 4
    image_max_tokens: int = 1280
    video_max_tokens: int = 4500
    fps: float = 1.0
    max_frames: int = 64
    max_length: int = 4096
    store_mb: int = 2048
    batch_size: int = 64  # of encoding
    train_documents: int = 0  # of each sub-dataset of training, besides those that its labels name; 0: all
    test_rows: int = 300
    test_seed: int = 1
    test_documents: int = 0  # of each task of MMEB-mini, besides those that labels and candidates name; 0: all
    validation_rows: int = 40  # 0: no validation after each stage
    rerank_top_k: int = 100
    evaluators: int = 1
    public: str = "data/public"
    wrong_labels: float = 0.0
    unlabelled_duplicates: float = 0.0


@dataclass(frozen=True)
class Preset:
    """All that a run depends on, besides the code.

    dims, dim_weights: prefixes of the Matryoshka objective; 0 is the full embedding. quantizers: weights of the
    quantised losses. dtype: of the frozen weights ("" is float32 on CPU, else what the GPU does best). autocast: a
    dtype to compute in, "" for none, "auto" for bfloat16 on a CPU that is faster in it than in float32. checkpointing:
    keep only each layer's input for the backward pass and compute the rest again, for memory. shard: split the frozen
    weights among the processes of a training, for memory (sharding.py). lora_rank: 0 is full fine-tuning of the
    language model, in float32 (or autocast); for single stages, because s3 merges adapters.
    """

    name: str
    backbone: str
    stages: Mapping[str, StageConfig]
    template: str = "report"
    seed: int = 0
    dtype: str = ""
    autocast: str = ""
    checkpointing: bool = False
    shard: bool = False
    lora_rank: int = 32
    lora_alpha: int = 32
    dims: tuple[int, ...] = (0,)
    dim_weights: tuple[float, ...] | None = None
    quantizers: Mapping[str, float] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)

    def __post_init__(self):
        if unknown := set(self.quantizers) - set(QUANTIZED):
            raise ValueError(f"unknown quantizers {sorted(unknown)}; choose among {list(QUANTIZED)}")
        if self.dim_weights is not None and len(self.dim_weights) != len(self.dims):
            raise ValueError(f"{len(self.dims)} dims with {len(self.dim_weights)} dim_weights; give one each")

    def require_adapters(self, what: str) -> None:
        """ValueError if full weights are trained, which `what` has no way to merge or to plan."""
        if not self.lora_rank:
            raise ValueError(f"{what} takes adapters, and lora_rank = 0 trains full weights; q3vl-mini train does that")


def preset_names() -> list[str]:
    """The presets that ship with the package."""
    return sorted(file.stem for file in (Path(__file__).parent / "presets").glob("*.toml"))


def load_preset(name_or_path: str | Path) -> Preset:
    """A preset by name ("tiny", "colab", "full"), or from a TOML or JSON file such as a run's saved config.json.

    Raises:
        FileNotFoundError: no such preset or file. ValueError: an unknown key, a missing one or a wrong type, by its
        place in the file.
    """
    path = Path(__file__).parent / "presets" / f"{name_or_path}.toml"
    return load_config(path if path.is_file() else name_or_path)


def load_config(path: str | Path) -> Preset:
    """A Preset from a .toml or .json file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no preset {str(path)!r}; choose one of {preset_names()}, or give the path of a .toml or .json file"
        )
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        return _read(Preset, content, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_config(preset: Preset, path: str | Path) -> None:
    """Write a Preset as JSON; `load_config` reads the same Preset back."""
    write_whole(Path(path), json.dumps(asdict(preset), indent=1, ensure_ascii=False) + "\n")


def differences(one: Preset, other: Preset) -> list[str]:
    """What two presets disagree on, as "stages.s0.lr 0.005 -> 0.25", sorted by place."""

    def flat(table: Mapping[str, Any], place: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, value in table.items():
            inside = isinstance(value, Mapping)
            out |= flat(value, f"{place}{name}.") if inside else {f"{place}{name}": value}
        return out

    a, b = flat(asdict(one)), flat(asdict(other))
    changed = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    return [f"{name} {a.get(name)} -> {b.get(name)}" for name in changed]


def override(preset: Preset, changes: Sequence[str]) -> Preset:
    """The preset with single values changed: "stages.s0.steps=100", "dims=[0, 64]"; a value as TOML writes it.

    Raises ValueError naming the change: no such key, or a value that does not fit.
    """
    content = asdict(preset)
    for change in changes:
        key, _, text = change.partition("=")
        *path, last = key.strip().split(".")
        table = content
        for name in path:
            table = table.get(name) if isinstance(table, Mapping) else None
        if not isinstance(table, dict) or last not in table:
            raise ValueError(f"{change!r}: the preset {preset.name!r} has no {key.strip()!r}; try stages.s0.steps=9")
        try:
            table[last] = tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            table[last] = text.strip()  # a word without quotes
    try:
        return _read(Preset, json.loads(json.dumps(content)), "")
    except ValueError as error:
        raise ValueError(f"{', '.join(changes)}: {error}") from error


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` of a TOML or JSON file as `kind`: a dataclass, a mapping, a tuple or a scalar."""
    place = where or "the top level"
    if isinstance(kind, UnionType):  # X | None
        return None if value is None else _read(get_args(kind)[0], value, where)
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"{place} is {value!r}; expected a table of {[f.name for f in fields(kind)]}")
        hints, known = get_type_hints(kind), {f.name: f for f in fields(kind)}
        if unknown := sorted(set(value) - set(known)):
            raise ValueError(f"{place} has unknown keys {unknown}; the keys are {sorted(known)}")
        needed = {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
        if missing := sorted(needed - set(value)):
            raise ValueError(f"{place} lacks {missing}")
        read = {name: _read(hints[name], x, f"{where}.{name}".lstrip(".")) for name, x in value.items()}
        try:
            return kind(**read)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    origin = get_origin(kind)
    if origin is Mapping and isinstance(value, Mapping):
        return {name: _read(get_args(kind)[1], x, f"{where}.{name}") for name, x in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(_read(get_args(kind)[0], x, f"{where}[{i}]") for i, x in enumerate(value))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    raise ValueError(f"{place} is {value!r}; expected {getattr(kind, '__name__', kind) if origin is None else kind}")
