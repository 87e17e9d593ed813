"""Embedder and Reranker as the models that mteb evaluates (pip install "q3vl-mini[eval]").

mteb hands over batches as dicts of columns and names the task; here they become instances and instructions. A query's
instruction is its own (instruction-following tasks), else the task's prompt; documents get the default, as in
training. Nothing is added to a text: the instruction has its place in the prompt.

>>> import mteb  # doctest: +SKIP
>>> model = MtebEmbedder("runs/tiny/s3/model")  # doctest: +SKIP
>>> mteb.evaluate(model, mteb.get_tasks(tasks=["STS12"]))  # doctest: +SKIP
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .compression import unpack_binary
from .embedder import Embedder
from .forward import PromptModel
from .media import MediaBudget, sample_frames
from .records import MODALITIES, Clip, Instance
from .reranker import Reranker

Batch = Mapping[str, Any]


class _MtebModel:
    """What both share: a model of this module and mteb's description of it."""

    kind: type[PromptModel]
    model_type: str

    def __init__(
        self,
        model_name: str | Path | PromptModel,
        revision: str | None = None,
        device: str | None = None,
        **options: Any,
    ):
        """model_name: what Embedder or Reranker takes, or one of them that is loaded already. revision: for mteb's
        records; None is the card's. options: those of Embedder or Reranker."""
        _require_mteb()
        loaded = isinstance(model_name, PromptModel)
        self.model = model_name if loaded else self.kind(model_name, device=device, **options)
        self.name = self.model.card.get("stage", "model") if loaded else str(model_name)
        self.revision = revision or self.model.card.get("git")
        self.settings: dict[str, Any] = {"template": self.model.template}

    @property
    def mteb_model_meta(self) -> Any:
        """mteb's ModelMeta: what keeps results of different models apart, and which inputs are possible."""
        from mteb.models.model_meta import ModelMeta

        known = dict(
            loader=type(self),
            name="/".join(Path(self.name).parts[-2:]) if "/" in self.name else f"q3vl_mini/{self.name}",
            revision=self.revision,
            n_parameters=sum(p.numel() for p in self.model.parameters()),
            max_tokens=self.model.max_length,
            embed_dim=self.settings.get("dim"),
            open_weights=True,
            framework=["PyTorch", "Transformers"],
            use_instructions=True,
            adapted_from=self.model.card.get("base"),
            modalities=list(MODALITIES),
            model_type=[self.model_type],
            experiment_kwargs=self.settings,
        )
        return ModelMeta.create_empty({key: value for key, value in known.items() if value is not None})


class MtebEmbedder(_MtebModel):
    """mteb's EncoderProtocol. `dim` in the options cuts the vectors; the rest goes to Embedder."""

    kind, model_type = Embedder, "dense"

    def __init__(
        self,
        model_name: str | Path | Embedder,
        revision: str | None = None,
        *,
        device: str | None = None,
        dim: int | None = None,
        **options: Any,
    ):
        super().__init__(model_name, revision, device, **options)
        self.settings["dim"] = dim or self.model.dim

    def encode(
        self,
        inputs: Iterable[Batch],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        batch_size: int = 32,
        show_progress_bar: bool = False,
        precision: str = "float32",
        **kwargs: Any,
    ) -> np.ndarray:
        """Vectors (N, dim) of all rows of the batches, in their order; with precision "binary" of -1 and 1."""
        instruction = task_instruction(task_metadata, prompt_type)
        vectors = [
            self.model.encode(rows, instruction, self.settings["dim"], precision, batch_size)
            for rows in batches_of_instances(inputs, self.model.budget)
        ]
        joined = np.concatenate(vectors)
        return unpack_binary(joined) if precision == "binary" else joined

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines of all pairs, (N, M)."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines of the rows that face each other, (N,)."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


class MtebReranker(_MtebModel):
    """mteb's CrossEncoderProtocol; for tasks that give each query its candidates."""

    kind, model_type = Reranker, "cross-encoder"

    def predict(
        self,
        inputs1: Iterable[Batch],
        inputs2: Iterable[Batch],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> np.ndarray:
        """Margins logit(yes) - logit(no) (N,) of the pairs of queries and documents; they order as the scores do."""
        instruction = task_instruction(task_metadata, "query")
        budget = self.model.budget
        pairs = zip(batches_of_instances(inputs1, budget), batches_of_instances(inputs2, budget), strict=True)
        margins = [
            self.model.logits(list(zip(queries, documents, strict=True)), instruction, batch_size)
            for queries, documents in pairs
        ]
        return np.concatenate(margins)


def _require_mteb() -> None:
    try:
        import mteb  # noqa: F401
    except ImportError as error:
        raise ImportError('mteb is not installed; pip install "q3vl-mini[eval]"') from error


def task_instruction(task_metadata: Any, prompt_type: str | None) -> str | None:
    """The task's prompt for queries, and for tasks that tell no queries from documents (prompt_type None).

    Documents get one only if the task has one for documents. None is the model's default.
    """
    prompt = task_metadata.prompt
    if isinstance(prompt, Mapping):
        return prompt.get(prompt_type or "query")
    return None if prompt_type == "document" else prompt


def batches_of_instances(batches: Iterable[Batch], budget: MediaBudget) -> Iterator[list[Instance]]:
    """mteb's batches, {column: values of the rows}, as lists of instances."""
    for batch in batches:
        rows = len(next(iter(batch.values())))
        yield [_instance({column: values[i] for column, values in batch.items()}, budget) for i in range(rows)]


def _instance(row: Mapping[str, Any], budget: MediaBudget) -> Instance:
    """mteb's "text" of a query has its instruction behind it; "query" is the text alone."""
    found = {"text": row.get("query", row.get("text")), "image": row.get("image"), "video": row.get("video")}
    found["instruction"] = row.get("instruction")
    instance = {key: value for key, value in found.items() if value is not None}
    if "video" in instance:
        instance["video"] = _clip(instance["video"], budget)
    return instance


def _clip(video: Any, budget: MediaBudget) -> Clip:
    """A decoder of torchcodec, which is what a video column holds, or frames (T, 3, H, W) at the budget's rate."""
    if isinstance(video, torch.Tensor):
        frames, fps = video, budget.fps
    else:
        total, rate = video.metadata.num_frames, video.metadata.average_fps
        wanted = sample_frames(total, rate, budget)
        frames, fps = video.get_frames_at(wanted).data, rate * len(wanted) / total
    return Clip(frames.permute(0, 2, 3, 1).numpy(), fps)
