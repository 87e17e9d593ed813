"""From instances to the hidden state that both models read: inputs, visual features, one forward.

The vision tower is frozen in every stage, so what it makes of a picture is computed once and kept (`VisualStore`). No
vocabulary logits are computed: both models need only hidden states after the final RMSNorm.
"""

import math
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures, Qwen3VLModel

from .backbone import TEMPLATE_WITHOUT_CARD, Backbone, inner, load
from .media import PIXELS, MediaBudget, Visual, as_list, prepare
from .records import MODALITIES, Instance, is_empty, text_problem
from .templates import Content, Template, choose

ROWS = ("input_ids", "attention_mask", "mm_token_type_ids")  # of `pad`, each (B, T)
PATCHES_AT_ONCE = 16_384  # that the vision tower takes in one call: bounds its memory
CPU_CALL, GPU_CALL = 32, 2048  # tokens that cost as much as another forward, which on a GPU had better be large
TOKENS_AT_ONCE = 65_536  # that a forward without gradient takes in one call


def as_instance(item: Any, where: str) -> Instance:
    """A string as {"text": ...}, a dict checked for its keys. ValueError starts with `where`."""
    if isinstance(item, str):
        return {"text": item}
    if not isinstance(item, Mapping):
        raise ValueError(f"{where}: an item is a string or a dict, got {type(item).__name__}; try {{'image': ...}}")
    unknown = set(item) - {*MODALITIES, "instruction"}
    if unknown:
        raise ValueError(f"{where}: unknown keys {sorted(unknown, key=str)}; use text, image, video and instruction")
    check_text(item.get("instruction"), "instruction", where)
    return item


def check_text(value: Any, name: str, where: str) -> None:
    """ValueError that starts with `where` for what is neither a text nor None."""
    if problem := text_problem(value, name, where):
        raise ValueError(problem)


def as_items(items: Any, what: str) -> list[Any]:
    """The items of a call as a list; ValueError for one item alone, and for what is no collection."""
    if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Iterable):
        raise ValueError(f"expected a list of {what}s, got one {type(items).__name__}; write [{what}]")
    return list(items)


def rough_length(item: Any, budget: MediaBudget) -> tuple[int, int]:
    """Sorts items before they are opened: videos, then the tokens of pictures and words as far as is cheap."""
    if not isinstance(item, Mapping):
        return 0, len(item) // 4 if isinstance(item, str) else 0
    images = as_list(item.get("image"), "image")
    areas = [x.size[0] * x.size[1] if isinstance(x, Image.Image) else 0 for x in images]
    tokens = sum(min(max(area // PIXELS, 4), budget.image_max_tokens) for area in areas)
    return len(as_list(item.get("video"), "video")), tokens + len(str(item.get("text") or "")) // 4


def measure(
    instances: Sequence[Instance],
    budget: MediaBudget,
    processor: Any,
    max_length: int,
    store: "VisualStore | None",
    seen: dict[Hashable, Visual],
    names: Sequence[str],
) -> tuple[list[Content], list[Visual]]:
    """Contents and visuals of the instances that share one prompt; images, and videos, in the prompt's order.

    A visual that `store` or `seen` (those of this batch; it grows) knows is not rendered again. Visuals that would
    leave no room for each other in `max_length` tokens are made smaller, with a warning (MediaBudget.shared).
    """

    def known(key: Hashable) -> Visual | None:
        return seen.get(key) or (store.visual(key) if store is not None else None)

    values = [[(kind, as_list(x.get(kind), kind)) for kind in ("video", "image")] for x in instances]
    count = {kind: sum(len(v) for fields in values for k, v in fields if k == kind) for kind in ("video", "image")}
    own = budget
    budget = budget.shared(count["image"], count["video"], max_length) if any(count.values()) else budget
    contents, visuals = [], []
    for instance, fields, name in zip(instances, values, names, strict=True):
        found: dict[str, list[Visual]] = {}
        for kind, items in fields:
            found[kind] = [
                prepare(x, kind, budget, processor, known, f"{name}, {kind} {i}") for i, x in enumerate(items)
            ]
            visuals += found[kind]
            seen.update((visual.key, visual) for visual in found[kind])
        contents.append(
            Content(
                tuple((v.timestamps, v.n_tokens // v.grid_thw[0]) for v in found["video"]),
                tuple(v.n_tokens for v in found["image"]),
                _texts(instance.get("text"), name),
            )
        )
    if budget != own and any(_at_limit(visual, budget) for visual in visuals):
        warnings.warn(
            f"the pictures and videos of a prompt share its {max_length} tokens, and some are scaled down to fit; to "
            "show them larger raise max_length, or give fewer in one item",
            stacklevel=2,
        )
    return contents, visuals


def _at_limit(visual: Visual, budget: MediaBudget) -> bool:
    """Whether a visual is as large as its budget lets it be: one more row and column of tokens would not fit."""
    t, h, w = visual.grid_thw
    limit = budget.image_max_tokens if visual.kind == "image" else budget.video_max_tokens
    return t * (h // 2 + 1) * (w // 2 + 1) > limit


def _texts(value: Any, name: str) -> tuple[str, ...]:
    texts = value if isinstance(value, (list, tuple)) else [value]
    for text in texts:
        check_text(text, "text", name)
    return tuple(text for text in texts if not is_empty(text))


def pad(ids: Sequence[Sequence[int]], visuals: list[Visual], processor: Any, side: str) -> dict[str, Any]:
    """Token ids of a batch as the model's inputs, padded on one side ("left" or "right").

    Returns input_ids, attention_mask and mm_token_type_ids (B, T), the grids of images and videos where there are
    any, and `visuals`, in the order of the prompts.
    """
    if not len(ids):
        raise ValueError("a batch without items; give at least one")
    rows, width = len(ids), max(map(len, ids))
    tokens = np.full((rows, width), processor.tokenizer.pad_token_id)
    mask = np.zeros((rows, width), dtype=np.int64)
    for row, line in enumerate(ids):
        place = slice(width - len(line), width) if side == "left" else slice(0, len(line))
        tokens[row, place], mask[row, place] = line, 1
    kinds = (tokens == processor.image_token_id) + 2 * (tokens == processor.video_token_id)
    inputs = {"input_ids": tokens, "attention_mask": mask, "mm_token_type_ids": kinds}
    inputs = {name: torch.from_numpy(x) for name, x in inputs.items()}
    return {**inputs, **_grids(visuals), "visuals": visuals}


def _grids(visuals: Sequence[Visual]) -> dict[str, Tensor]:
    grids = {f"{kind}_grid_thw": [v.grid_thw for v in visuals if v.kind == kind] for kind in ("image", "video")}
    return {name: torch.tensor(rows) for name, rows in grids.items() if rows}


def split_rows(inputs: Mapping[str, Any], max_tokens: int, share: bool = True) -> list[dict[str, Any]]:
    """Inputs of `pad` as parts of about equal numbers of rows, each of at most `max_tokens` tokens but for one row.

    Padding counts; what all rows begin with (`shared_prefix`) does not, since it is computed once, if it is shared.
    """
    rows, width = inputs["input_ids"].shape
    size = max(1, max_tokens // (width - (shared_prefix(right_padded(inputs)) if share else 0)))
    size = math.ceil(rows / math.ceil(rows / size))
    return take_rows(inputs, [range(start, min(start + size, rows)) for start in range(0, rows, size)])


def visuals_by_row(inputs: Mapping[str, Any]) -> list[list[Visual]]:
    """The visuals of each row of inputs of `pad`, in its order."""
    visuals, of_row = iter(inputs["visuals"]), []
    for left in (inputs["mm_token_type_ids"] > 0).sum(1).tolist():
        mine: list[Visual] = []
        while left > 0:
            mine.append(next(visuals))
            left -= mine[-1].n_tokens
        of_row.append(mine)
    return of_row


def take_rows(inputs: Mapping[str, Any], parts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Inputs of `pad` for the rows of each part, in the order given, without the columns that all of them pad."""
    of_row, taken = visuals_by_row(inputs), []
    for rows in parts:
        part = {name: inputs[name][list(rows)] for name in ROWS}
        used = part["attention_mask"].bool().any(0)
        mine = [visual for row in rows for visual in of_row[row]]
        part = {**{name: x[:, used] for name, x in part.items()}, **_grids(mine), "visuals": mine}
        if "queries" in inputs:
            part["queries"] = [inputs["queries"][row] for row in rows]
        taken.append(part)
    return taken


def even_parts(lengths: Sequence[int], prefix: int, call: int) -> list[list[int]]:
    """Rows of a batch in groups of similar length, so that the forward spends the fewest tokens.

    A group costs the tokens of its rows, each as long as its longest, without the `prefix` that all rows share, and
    once the prefix and `call` tokens, the price of another forward. The cheapest way to cut the rows, sorted by length,
    is found exactly (dynamic programming). Returns row numbers, the longest first.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    ends = [n for n in range(1, len(order)) if lengths[order[n]] < lengths[order[n - 1]]] + [len(order)]
    best = {0: (0, 0)}  # the first n rows: what they cost, and where their last group begins
    for n in ends:
        best[n] = min((best[m][0] + (n - m) * (lengths[order[m]] - prefix) + prefix + call, m) for m in best)
    parts, n = [], len(order)
    while n:
        parts.append(order[best[n][1] : n])
        n = best[n][1]
    return parts[::-1]


class VisualStore:
    """What a frozen vision tower made of each visual, by `Visual.key`: its tokens and its DeepStack features.

    Holds at most `max_bytes`, then stops storing: every epoch visits everything once, so evicting would only trade
    one picture for another. One store belongs to one tower; embedder, reranker and stages may share it, and so may
    threads, except that `clear` must be alone.

    Args:
        dtype: that of the stored features; None is the tower's own.
        device: where they are kept; None is where they were computed.

    Taught in notebooks/01.
    """

    def __init__(
        self, max_bytes: int = 2 * 1024**3, dtype: torch.dtype | None = None, device: str | torch.device | None = None
    ):
        self.max_bytes, self.dtype, self.device = max_bytes, dtype, device
        self.nbytes = 0
        self._adding = Lock()
        self._visuals: dict[Hashable, Visual] = {}
        self._features: dict[Hashable, Tensor] = {}

    def __len__(self) -> int:
        return len(self._features)

    def clear(self) -> None:
        """Forget everything."""
        self.nbytes = 0
        self._visuals.clear()
        self._features.clear()

    def visual(self, key: Hashable) -> Visual | None:
        """The measured visual, without its pixels; None if its features are not here."""
        return self._visuals.get(key)

    def features(self, key: Hashable) -> Tensor | None:
        """(1 + L, n_tokens, D): the tokens, then the features of L DeepStack layers; None if not here."""
        return self._features.get(key)

    def add(self, visual: Visual, features: Tensor) -> bool:
        """Keep the features of a visual, if there is room; whether they are kept."""
        with self._adding:
            if visual.key in self._features:
                return True
            features = features.detach().to(device=self.device, dtype=self.dtype, copy=True)
            if self.nbytes + features.nbytes > self.max_bytes:
                return False
            self.nbytes += features.nbytes
            self._features[visual.key] = features.contiguous()  # before the visual, which others look up first
            self._visuals[visual.key] = Visual(visual.kind, visual.grid_thw, visual.timestamps, visual.key)
            return True


def visual_outputs(
    model: nn.Module, visuals: Sequence[Visual], store: VisualStore | None = None
) -> dict[str, BaseModelOutputWithDeepstackFeatures]:
    """What the vision tower makes of a batch's visuals (`visual_features`), as transformers takes it."""
    return encoder_outputs_of(visuals, visual_features(model, visuals, store))


def visual_features(
    model: nn.Module, visuals: Sequence[Visual], store: VisualStore | None = None
) -> dict[Hashable, Tensor]:
    """What the vision tower makes of each visual, by its key: (1 + L, n_tokens, D), see VisualStore.

    Those that the store has are looked up. The others go through the tower once each, equal sizes next to each
    other; without gradients, and into the store, if the tower is frozen.
    """
    tower, dtype = inner(model).model.visual, inner(model).dtype
    frozen = not any(parameter.requires_grad for parameter in tower.parameters())
    store = store if frozen else None
    features: dict[Hashable, Tensor] = {}
    missing: dict[Hashable, Visual] = {}
    for visual in visuals:
        kept = store.features(visual.key) if store is not None else None
        if kept is not None:
            features[visual.key] = kept.to(tower.device)
        else:
            missing[visual.key] = visual
    for group in _groups(sorted(missing.values(), key=lambda v: v.grid_thw)):
        for visual, made in zip(group, _tower_features(tower, group, frozen), strict=True):
            kept = store is not None and store.add(visual, made)
            features[visual.key] = store.features(visual.key).to(tower.device) if kept else made
    return {key: x.to(dtype) for key, x in features.items()}


def encoder_outputs_of(
    visuals: Sequence[Visual], features: Mapping[Hashable, Tensor]
) -> dict[str, BaseModelOutputWithDeepstackFeatures]:
    """Features of the visuals of a batch, in its order, as transformers takes them (`mm_encoder_outputs`)."""
    outputs = {}
    for kind in ("image", "video"):
        if chosen := [features[visual.key] for visual in visuals if visual.kind == kind]:
            tokens, *deepstack = torch.cat(chosen, dim=1)  # each (N, D)
            outputs[kind] = BaseModelOutputWithDeepstackFeatures(
                pooler_output=[tokens], deepstack_features=[[x] for x in deepstack]
            )
    return outputs


def _groups(visuals: Iterable[Visual]) -> Iterable[list[Visual]]:
    group: list[Visual] = []
    patches = 0
    for visual in visuals:
        if group and patches + 4 * visual.n_tokens > PATCHES_AT_ONCE:
            yield group
            group, patches = [], 0
        group.append(visual)
        patches += 4 * visual.n_tokens
    if group:
        yield group


def _tower_features(tower: nn.Module, visuals: list[Visual], frozen: bool) -> Sequence[Tensor]:
    """For each visual (1 + L, n_tokens, D)."""
    if any(visual.pixel_values is None for visual in visuals):
        raise ValueError(
            "a visual has neither pixels nor stored features; run the forward with the store that its batch was "
            "collated with"
        )
    with torch.no_grad() if frozen else nullcontext():
        pixels = torch.cat([visual.pixel_values for visual in visuals]).to(tower.device, tower.dtype)
        grids = torch.tensor([visual.grid_thw for visual in visuals], device=tower.device)
        made = tower(pixels, grid_thw=grids)
        stacked = torch.stack([made.pooler_output, *made.deepstack_features])
        return stacked.split([visual.n_tokens for visual in visuals], dim=1)


def forward_hidden(
    model: nn.Module, inputs: Mapping[str, Any], encoder_outputs: dict[str, BaseModelOutputWithDeepstackFeatures]
) -> Tensor:
    """last_hidden_state, after the final RMSNorm: (B, T, D). No vocabulary logits.

    inputs: of `pad`. encoder_outputs: of `visual_outputs`. The model may be wrapped by peft.
    """
    core: Qwen3VLModel = inner(model).model
    tensors = {name: x.to(core.device) for name, x in inputs.items() if isinstance(x, Tensor)}
    return core(**tensors, mm_encoder_outputs=encoder_outputs, use_cache=False).last_hidden_state


def shared_prefix(inputs: Mapping[str, Any], shortest: int = 4) -> int:
    """How many text tokens all rows of a batch begin with: the system message and the instruction.

    0 if the batch has one row or shares fewer than `shortest`; at least one token a row is left over, and no visual
    token is shared. The batch is padded on the right.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if len(ids) < 2:
        return 0
    same = (ids == ids[:1]).all(0) & mask.bool().all(0) & (inputs["mm_token_type_ids"] == 0).all(0)
    same[int(mask.sum(1).min()) - 1 :] = False
    length = int(same.long().cumprod(0).sum())
    return length if length >= shortest else 0


def right_padded(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same batch with its padding on the right: where it stands does not change a row's states."""
    mask = inputs["attention_mask"]
    first = mask.argmax(1)
    if not first.any():
        return dict(inputs)
    columns = (torch.arange(mask.shape[1]) + first[:, None]) % mask.shape[1]
    return {**inputs, **{name: inputs[name].gather(1, columns) for name in ROWS}}


def forward_last(
    model: nn.Module,
    inputs: Mapping[str, Any],
    encoder_outputs: dict[str, BaseModelOutputWithDeepstackFeatures],
    share: bool = True,
) -> Tensor:
    """The state at each row's last attended position, (B, D): what both models read.

    Attention is causal, so what all rows begin with has the same states in all rows. It is computed once, and its
    keys and values are shared by the batch, with gradient; the numbers are those of `forward_hidden`. Not so with
    share=False, where the model is called once.
    """
    inputs = right_padded(inputs)
    length = 0 if _recomputes(model) or not share else shared_prefix(inputs)
    if not length:
        return last_attended(forward_hidden(model, inputs, encoder_outputs), inputs["attention_mask"])
    core: Qwen3VLModel = inner(model).model
    tensors = {name: x.to(core.device) for name, x in inputs.items() if isinstance(x, Tensor)}
    shared = _keys_of_prefix(core, tensors["input_ids"], length, len(tensors["input_ids"]))
    rest = {name: tensors[name][:, length:] for name in ROWS}
    grids = {name: x for name, x in tensors.items() if name.endswith("grid_thw")}
    positions, _ = core.get_rope_index(**rest, **{"image_grid_thw": None, "video_grid_thw": None, **grids})
    hidden = core(
        input_ids=rest["input_ids"],
        attention_mask=tensors["attention_mask"],
        position_ids=positions + length,
        cache=shared,
        mm_encoder_outputs=encoder_outputs,
        use_cache=True,
        **grids,
    ).last_hidden_state
    return last_attended(hidden, rest["attention_mask"])


def _keys_of_prefix(core: Qwen3VLModel, ids: Tensor, length: int, rows: int) -> DynamicCache:
    """Keys and values of the first `length` tokens of the first row of `ids`, for so many rows."""
    shared = DynamicCache()
    for number, layer in enumerate(core(input_ids=ids[:1, :length], use_cache=True).cache.layers):
        shared.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), number)
    return shared


def _recomputes(model: nn.Module) -> bool:
    """Whether activations are made again in the backward pass: then no keys are kept to be shared."""
    return model.training and inner(model).is_activation_checkpointing


def _queries_repeat(inputs: Mapping[str, Any]) -> bool:
    """Whether pairs have queries in common, but not all the same one, which `forward_last` shares as well."""
    return "queries" in inputs and 1 < len({query for query, _ in inputs["queries"]}) < len(inputs["queries"])


def forward_by_query(
    model: nn.Module, inputs: Mapping[str, Any], features: Mapping[Hashable, Tensor], call: int = CPU_CALL
) -> Tensor:
    """`forward_last` for pairs of which several have the same query: what stands before the document is computed once.

    A tree of prompts, after the trunk that all rows share a branch for each query and a leaf for each document.
    Attention is causal, so a branch's keys and values serve all its leaves, with gradient; the numbers are those of
    `forward_last`. Leaves of similar length go through the model together (`even_parts`).

    Args:
        inputs: of Reranker.collate; `queries` has (number of the query, how many visuals it has) for each row.
        features: of `visual_features`.
    """
    inputs = right_padded(inputs)
    core: Qwen3VLModel = inner(model).model
    ids, mask, kinds = (inputs[name].to(core.device) for name in ROWS)
    grids = {name: x.to(core.device) for name, x in inputs.items() if name.endswith("grid_thw")}
    every = {"image_grid_thw": None, "video_grid_thw": None, **grids}
    tokens = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}
    positions, _ = core.get_rope_index(**tokens, **every)  # (3, B, T)
    lengths, visuals = mask.sum(1).tolist(), visuals_by_row(inputs)
    first: dict[int, int] = {}  # the first row of each query
    for row, (query, _) in enumerate(inputs["queries"]):
        first.setdefault(query, row)
    branches = shared_by_query(inputs, visuals)
    trunk = min(shared_prefix(inputs), max(branches.values()) - 1)  # queries of equal words are branches all the same

    def grow(rows: list[int], starts: list[int], ends: list[int], keys: DynamicCache, attended: Tensor, seen: list):
        """The model's output at tokens [start, end) of each row, and the mask of all that it attends to."""
        width = max(end - start for start, end in zip(starts, ends, strict=True))
        columns = torch.arange(width, device=core.device) + torch.tensor(starts, device=core.device)[:, None]
        own = (columns < torch.tensor(ends, device=core.device)[:, None]).long()
        at = torch.tensor(rows, device=core.device)[:, None], columns.clamp(max=ids.shape[1] - 1)
        attended = torch.cat([attended, own], dim=1)
        out = core(
            input_ids=ids[at] * own,
            attention_mask=attended,
            position_ids=positions[(slice(None), *at)],
            mm_token_type_ids=kinds[at] * own,
            cache=keys,
            mm_encoder_outputs=encoder_outputs_of(seen, features),
            use_cache=True,
            **{name: x.to(core.device) for name, x in _grids(seen).items()},
        )
        return out, attended

    def keys_of(cache: DynamicCache, rows: list[int]) -> DynamicCache:
        chosen, index = DynamicCache(), torch.tensor(rows, device=core.device)
        for number, layer in enumerate(cache.layers):
            chosen.update(layer.keys[index], layer.values[index], number)
        return chosen

    keys = _keys_of_prefix(core, ids, trunk, len(first)) if trunk > 0 else DynamicCache()
    rows, n_asked = list(first.values()), dict(inputs["queries"])
    seen = [visual for query, row in first.items() for visual in visuals[row][: n_asked[query]]]
    ends = [branches[query] for query in first]
    out, attended = grow(rows, [trunk] * len(rows), ends, keys, mask[: len(rows), :trunk], seen)
    branch = {query: i for i, query in enumerate(first)}
    leaves = [length - branches[query] for length, (query, _) in zip(lengths, inputs["queries"], strict=True)]
    states, order = [], []
    for part in even_parts(leaves, 0, call):
        queries = [inputs["queries"][row][0] for row in part]
        of = [branch[query] for query in queries]
        seen = [visual for row, query in zip(part, queries, strict=True) for visual in visuals[row][n_asked[query] :]]
        starts, ends = [branches[query] for query in queries], [lengths[row] for row in part]
        leaf, whole = grow(part, starts, ends, keys_of(out.cache, of), attended[of], seen)
        states.append(last_attended(leaf.last_hidden_state, whole[:, attended.shape[1] :]))
        order += part
    return torch.cat(states)[torch.tensor(order, device=core.device).argsort()]


def shared_by_query(inputs: Mapping[str, Any], visuals: Sequence[Sequence[Visual]]) -> dict[int, int]:
    """How many tokens the rows of each query begin with together, by its number: up to the first that differs or that
    is of a document's picture, and at least one of each row is left over. The batch is padded on the right.

    visuals: of `visuals_by_row`.
    """
    ids, mask, kinds = (inputs[name] for name in ROWS)
    numbers = torch.tensor([query for query, _ in inputs["queries"]])
    together = {}
    for query, n_asked in dict(inputs["queries"]).items():
        rows = numbers == query
        of_query = sum(visual.n_tokens for visual in visuals[int(rows.int().argmax())][:n_asked])
        same = (ids[rows] == ids[rows][:1]).all(0) & mask[rows].bool().all(0)
        same &= ((kinds[rows] > 0).cumsum(1) <= of_query).all(0)
        same[int(mask[rows].sum(1).min()) - 1 :] = False
        together[query] = int(same.long().cumprod(0).sum())
    return together


def last_attended(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The state at each row's last attended position, on either padding side: (B, T, D) to (B, D).

    Taught in notebooks/02.
    """
    mask = attention_mask.to(hidden.device)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


class PromptModel(nn.Module):
    """What Embedder and Reranker share: a loaded checkpoint, its template, and one state a prompt.

    Training uses two methods of theirs: `collate` (cheap, no gradient) and `forward` (with gradient). They are
    Modules, so that accelerate can wrap them; learned steps (`quantizers`) are not among their parameters. They start
    in eval mode, and several threads may then use one at the same time.

    Args:
        path: a folder, a shipped name or a Hub id (backbone.resolve).
        template: "report" or "released"; None is the one that the checkpoint records.
        device, dtype, trainable: see backbone.load.
        autocast: a dtype to compute in, e.g. torch.bfloat16 on a CPU that has it; None computes in `dtype`.
        max_length: tokens of a prompt, by default the released code's; templates.prompt_ids says what is cut beyond.
        budget: sizes of visuals, by default the released code's, at the frame rate of the card.
        store: keeps visual features between calls.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is missing, or made for the other role.
    """

    role: str
    templates: dict[str, Template]
    default_max_length: int
    padding_side: str

    def __init__(
        self,
        path: str | Path,
        *,
        template: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        max_length: int | None = None,
        budget: MediaBudget | None = None,
        store: VisualStore | None = None,
        trainable: bool = False,
    ):
        super().__init__()
        backbone = load(path, device=device, dtype=dtype, trainable=trainable)
        if backbone.card.get("role", self.role) != self.role:
            raise ValueError(f"{path} is a checkpoint of the role {backbone.card['role']!r}, not {self.role!r}")
        self._set(backbone, template, autocast, max_length, budget, store)

    @classmethod
    def from_backbone(
        cls,
        backbone: Backbone,
        *,
        template: str | None = None,
        autocast: torch.dtype | None = None,
        max_length: int | None = None,
        budget: MediaBudget | None = None,
        store: VisualStore | None = None,
    ):
        """Around a model that is loaded already, as in training. Whatever role its card names, it is used in this."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._set(backbone, template, autocast, max_length, budget, store)
        return self

    def _set(self, backbone, template, autocast, max_length, budget, store) -> None:
        template = template or backbone.card.get("template", TEMPLATE_WITHOUT_CARD)
        self.card = {**backbone.card, "role": self.role, "template": template}
        choose(self.templates, self.template)
        self.model, self.processor = backbone.model, backbone.processor
        self.backbone = backbone
        self.autocast, self.max_length = autocast, max_length or self.default_max_length
        self.one_call = False
        self.budget, self.store = budget or MediaBudget(fps=self.card.get("fps", MediaBudget.fps)), store
        self.eval()

    @property
    def template(self) -> str:
        """The name of the prompt in use; the card records it."""
        return self.card["template"]

    def last_state(self, inputs: Mapping[str, Any]) -> Tensor:
        """Inputs of `collate` to the state at each prompt's last attended position, float32 (B, D), with gradient.

        Rows of similar length go through the model together (`even_parts`), which does not change a row's state.
        With `one_call` all rows do, as layers that are split among processes need it (sharding.py).
        """
        device = next(self.model.parameters()).device
        lengths = inputs["attention_mask"].sum(1).tolist()
        call = CPU_CALL if device.type == "cpu" else GPU_CALL
        parts = [list(range(len(lengths)))]
        if not self.one_call:
            parts = even_parts(lengths, shared_prefix(right_padded(inputs)), call)
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            features = visual_features(self.model, inputs["visuals"], self.store)
            if not self.one_call and _queries_repeat(inputs) and not _recomputes(self.model):
                return forward_by_query(self.model, inputs, features, call).float()
            states = [
                forward_last(self.model, part, encoder_outputs_of(part["visuals"], features), not self.one_call)
                for part in take_rows(inputs, parts)
            ]
        rows = torch.tensor([row for part in parts for row in part], device=device)
        return torch.cat(states)[rows.argsort()].float()

    def _in_batches(
        self, items: Sequence[Any], order: Sequence[int], instruction: str | None, batch_size: int, bar: bool, unit: str
    ) -> dict[int, np.ndarray]:
        """forward() of items[i] for every i in `order`, batch by batch in that order, without gradient."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give 1 or more")
        outputs: dict[int, np.ndarray] = {}
        was_training = self.training
        if was_training:
            self.eval()
        try:
            with torch.inference_mode(), tqdm(total=len(order), unit=unit, disable=not bar) as progress:
                for start in range(0, len(order), batch_size):
                    rows = order[start : start + batch_size]
                    inputs = self.collate([items[i] for i in rows], instruction, [f"{unit} {i}" for i in rows])
                    made = torch.cat([self(part) for part in split_rows(inputs, TOKENS_AT_ONCE)]).cpu().numpy()
                    wrong = [i for i, output in zip(rows, made, strict=True) if not np.isfinite(output).all()]
                    if wrong:
                        raise ValueError(
                            f"{unit} {wrong[0]}: the model's output is NaN or infinite; load the model with "
                            "dtype=torch.float32 and without autocast, or check its weights"
                        )
                    outputs.update(zip(rows, made, strict=True))
                    progress.update(len(rows))
        finally:
            if was_training:  # else other threads may be at it
                self.train()
        return outputs
