"""What a run will need before it is started: memory of a training step, floating-point operations, hours.

Nothing is loaded: the model is built on the meta device, which has shapes and no numbers, and one forward and backward
on it says how many bytes autograd keeps and how many operations it does. What is assumed and not counted is the share
of the GPU's peak that training reaches (`utilisation`), and a margin for what fragments (`MARGIN`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from .backbone import add_lora, resolve
from .choices import Gpu
from .config import Preset, StageConfig
from .data import Batch
from .embedder import Embedder
from .public_data.gather import stand_in
from .public_data.sets import SETS
from .records import Quadruple
from .reranker import Reranker
from .stages import batch_stream, media_budget, sub_dataset
from .train import encode_documents, reranker_step

GB = 1e9
MARGIN = 1.1  # of memory: fragments, the library's workspaces, the batch itself
ADAM = 4 + 4 + 8  # bytes an adapter's parameter: float32 weight, gradient, two moments

# From the config.json of each checkpoint on the Hub, so that a plan needs no network.
SIZES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-VL-2B-Instruct": {
        "text": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
        "vision": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        "tied": True,
    },
    "Qwen/Qwen3-VL-8B-Instruct": {
        "text": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
        "vision": {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        "tied": False,
    },
}


def model_config(name: str) -> Qwen3VLConfig:
    """The configuration of a model of SIZES, of a shipped name, or of a folder or Hub id (resolve)."""
    if name not in SIZES:
        return AutoConfig.from_pretrained(resolve(name), trust_remote_code=False)
    size = SIZES[name]
    return Qwen3VLConfig(
        text_config={**size["text"], "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936},
        vision_config={**size["vision"], "num_heads": 16, "out_hidden_size": size["text"]["hidden_size"]},
        tie_word_embeddings=size["tied"],
    )


def meta_model(config: Qwen3VLConfig, rank: int = 32) -> nn.Module:
    """The model with its LoRA, on the meta device."""
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return add_lora(Qwen3VLForConditionalGeneration(config), rank, rank)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by part: vision, language (embeddings included, an untied head too) and lora."""
    counts = {"vision": 0, "language": 0, "lora": 0}
    for name, p in model.named_parameters():
        counts["lora" if "lora_" in name else "vision" if ".visual." in name else "language"] += p.numel()
    return counts


def _one_pass(model: nn.Module, tokens: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that autograd keeps for one sequence, and operations of its forward and backward."""
    language = model.get_base_model().model.language_model.to(dtype)
    device = next(language.parameters()).device
    embeddings = torch.empty(1, tokens, language.config.hidden_size, device=device, dtype=dtype, requires_grad=True)
    positions = torch.arange(tokens, device=device).expand(3, 1, tokens)
    kept: dict[int, int] = {}
    weights = {p.untyped_storage()._cdata for p in language.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return x

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = language(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state
        total = sum(kept.values())
        out.sum().backward()
    return total, counter.get_total_flops()


@dataclass(frozen=True)
class Costs:
    """Of the language model with LoRA, forward and backward, a token of a sequence of T tokens.

    bytes_per_token: what autograd keeps, with an attention that keeps no T x T matrix (FlashAttention, or sdpa's
    kernels). checkpointed: the same with activation checkpointing, which keeps each layer's input. flops(T) =
    linear * T + square * T^2 for the whole sequence; vision: operations a visual token, forward alone.
    """

    bytes_per_token: float
    checkpointed: float
    linear: float
    square: float
    vision: float

    def flops(self, tokens: float, length: float) -> float:
        """Operations for `tokens` tokens in sequences of `length`."""
        return tokens * (self.linear + self.square * length)


def measure_costs(model: nn.Module, dtype: torch.dtype = torch.bfloat16, length: int = 256) -> Costs:
    """Costs from two passes on the meta device, at `length` and twice that: what grows linearly and what squarely."""
    (one, flops_one), (two, flops_two) = (_one_pass(model, n, dtype) for n in (length, 2 * length))
    config, counts = model.get_base_model().config, count_parameters(model)
    linear_bytes = (4 * one - two) / (2 * length)
    layers, width = config.text_config.num_hidden_layers, config.text_config.hidden_size
    return Costs(
        bytes_per_token=linear_bytes,
        checkpointed=layers * width * dtype.itemsize + linear_bytes / layers,
        linear=(4 * flops_one - flops_two) / (2 * length),
        square=(flops_two - 2 * flops_one) / (2 * length**2),
        vision=2 * counts["vision"] * 4,  # a visual token is four patches; each weight multiplies and adds
    )


@dataclass(frozen=True)
class Tokens:
    """Of a stage: tokens a step, visual ones among them, the mean and the longest row."""

    step: float
    visual: float
    row: float
    longest: int


def stage_tokens(preset: Preset, stage: str, n_batches: int = 24, batch_size: int = 8, rows: int = 64) -> Tokens:
    """Measured on batches of the stage's sub-datasets and scaled to its batch size.

    Documents drawn at random stand for the mined negatives, and blank pictures and words of about the usual size for
    public sets, which are not downloaded. Text is cut by q3vl-tiny's tokenizer, whose vocabulary is small, so words
    take somewhat more tokens than with Qwen's; visual tokens of Emoji World are exact.
    """
    quadruples = [
        stand_in(name, min(n, rows)) if name in SETS else sub_dataset(name, min(n, rows), preset.seed)
        for name, n in preset.stages[stage].tasks.items()
    ]
    return batch_tokens(quadruples, preset, stage, n_batches, batch_size)


def batch_tokens(
    quadruples: Sequence[Quadruple], preset: Preset, stage: str, n_batches: int = 24, batch_size: int = 8
) -> Tokens:
    """The same on batches of given sub-datasets."""
    config, data = preset.stages[stage], preset.data
    kind = Reranker if stage == "reranker" else Embedder
    template = preset.template or None
    reader = kind("q3vl-tiny", device="cpu", template=template, max_length=data.max_length, budget=media_budget(data))
    n_random = config.n_negatives + config.n_random
    small = replace(config, batch_size=batch_size, n_negatives=0, n_random=n_random)
    stream = batch_stream(quadruples, small, n_batches, preset.seed)(0)
    lengths, visual, queries = [], 0, 0
    for batch in stream:
        queries += len(batch.queries)
        for inputs in _collated(reader, batch):
            lengths += inputs["attention_mask"].sum(1).tolist()
            visual += int((inputs["mm_token_type_ids"] > 0).sum())
    scale = config.batch_size / queries
    return Tokens(scale * sum(lengths), scale * visual, sum(lengths) / len(lengths), max(lengths))


def _collated(reader: Embedder | Reranker, batch: Batch) -> list[dict[str, Any]]:
    """The inputs of a step's forwards: what its objective asks to be encoded, without encoding it."""
    forwards = []

    def encode(rows: Sequence[Any], instruction: str | None) -> torch.Tensor:
        forwards.append(reader.collate(rows, instruction))
        return torch.zeros(len(rows)) if isinstance(reader, Reranker) else torch.zeros(len(rows), 1)

    if isinstance(reader, Reranker):
        reranker_step(encode, batch)
    else:
        encode(batch.queries, batch.instruction)
        encode_documents(encode, batch)
    return forwards


@dataclass(frozen=True)
class StagePlan:
    """What a stage needs on each GPU: GB by part, whether they fit, and the hours of the whole stage on all of them.

    at_once: so many tokens could be embedded at once; what chunk_tokens may be. hours: of training; mining, the
    teacher's logits and evaluation come on top.
    """

    stage: str
    steps: int
    tokens: Tokens
    memory_gb: dict[str, float]
    fits: bool
    at_once: int
    hours: float

    @property
    def total_gb(self) -> float:
        return sum(self.memory_gb.values())


def plan(
    preset: Preset, gpu: Gpu, n_gpus: int = 1, utilisation: float = 0.35, checkpointing: bool = False
) -> list[StagePlan]:
    """Memory on one GPU and hours on all, for every stage of a preset that is trained.

    Every process holds the whole model, or its part of the layers (preset.shard), and embeds its share of a batch. With
    the gradient cache (chunk_tokens, or preset.shard) at most so many tokens are kept, and their forward is done twice;
    with activation checkpointing once more.
    """
    needs, shard = Needs.of(preset), preset.shard and n_gpus > 1
    return [
        needs.stage(name, config, stage_tokens(preset, name), gpu, n_gpus, utilisation, checkpointing, shard)
        for name, config in preset.stages.items()
    ]


def plan_finetune(
    train: Quadruple, preset: Preset, gpu: Gpu, epochs: float, utilisation: float = 0.35
) -> list[StagePlan]:
    """What finetune() needs to train the embedder on `train` on one GPU, in four ways.

    The batch embedded whole; with the gradient cache; with activation checkpointing; with both. The cache embeds as
    many tokens at once as fit, at most the preset's chunk_tokens. The steps are those of the epochs. Measuring and
    positioning keep less: they hold one model, and what autograd keeps is of chunk_tokens at most.
    """
    config = preset.stages["embedder"]
    steps = math.ceil(epochs * len(train) / (config.batch_size * config.accumulate))
    tokens, needs, plans = batch_tokens([train], preset, "embedder"), Needs.of(preset), []
    for again, names in ((False, ("batch whole", "gradient cache")), (True, ("checkpointing", "both"))):
        config = replace(config, steps=steps, chunk_tokens=0)
        whole = needs.stage(names[0], config, tokens, gpu, 1, utilisation, again)
        chunk = min(preset.stages["embedder"].chunk_tokens or whole.at_once, whole.at_once)
        config = replace(config, chunk_tokens=max(1, chunk))
        plans += [whole, needs.stage(names[1], config, tokens, gpu, 1, utilisation, again)]
    return plans


@dataclass(frozen=True)
class Needs:
    """A preset's model as numbers: what a token costs, how many parameters of each part, bytes of a frozen one.

    layers: frozen parameters of each of the language model's layers, which are what sharding.py splits.
    """

    costs: Costs
    counts: dict[str, int]
    itemsize: int
    layers: Sequence[int] = ()

    @classmethod
    def of(cls, preset: Preset) -> "Needs":
        preset.require_adapters("a plan")
        model = meta_model(model_config(preset.backbone), preset.lora_rank)
        dtype = getattr(torch, preset.dtype or "float16")
        layers = model.get_base_model().model.language_model.layers
        frozen = [sum(p.numel() for p in layer.parameters() if not p.requires_grad) for layer in layers]
        return cls(measure_costs(model, dtype), count_parameters(model), dtype.itemsize, frozen)

    def stage(
        self,
        name: str,
        config: StageConfig,
        tokens: Tokens,
        gpu: Gpu,
        n_gpus: int,
        utilisation: float,
        checkpointing: bool,
        shard: bool = False,
    ) -> StagePlan:
        """A stage's memory on one GPU and hours on all; see `plan`."""
        share = tokens.step / n_gpus
        in_parts = 0 < config.chunk_tokens < share
        chunked = in_parts or shard
        kept = max(config.chunk_tokens, tokens.longest) if in_parts else share
        weights = self.counts["vision"] + self.counts["language"]
        if shard:  # a part of every layer, and two whole ones: that which computes and that which comes next
            weights += sum(self.layers) / n_gpus + 2 * max(self.layers) - sum(self.layers)
        each = self.costs.checkpointed if checkpointing else self.costs.bytes_per_token
        memory = {
            "weights": weights * self.itemsize / GB,
            "adapter and optimiser": self.counts["lora"] * ADAM / GB,
        }
        at_once = max(0, int((gpu.memory_gb / MARGIN - sum(memory.values())) * GB / each))
        memory["activations"] = kept * each / GB
        memory["margin"] = (MARGIN - 1) * sum(memory.values())
        passes = 1 + (chunked + checkpointing) / 2  # weights are frozen: a backward costs as much as a forward
        flops = self.costs.flops(tokens.step, tokens.row) * passes + tokens.visual * self.costs.vision
        flops *= config.steps * config.accumulate
        hours = flops / (n_gpus * gpu.tflops * 1e12 * utilisation) / 3600
        fits, batches = sum(memory.values()) <= gpu.memory_gb, config.steps * config.accumulate
        return StagePlan(name, batches, tokens, memory, fits, at_once, hours)


def plan_table(plans: Sequence[StagePlan]) -> str:
    """The plans as a Markdown table."""
    parts = list(plans[0].memory_gb)
    head = ["stage", "steps", "tokens a step", "visual", *(f"{part}, GB" for part in parts), "in all, GB", "fits"]
    head += ["tokens at once", "hours of training"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for p in plans:
        row = [p.stage, f"{p.steps:,}", f"{p.tokens.step:,.0f}", f"{p.tokens.visual:,.0f}"]
        row += [f"{p.memory_gb[part]:.1f}" for part in parts]
        row += [f"{p.total_gb:.1f}", "yes" if p.fits else "no", f"at most {p.at_once:,}", f"{p.hours:.1f}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)
