"""The embedder: one instance of any kind to one vector. A bi-encoder; cosine is its score.

The embedding is the hidden state of the last attended token after the final RMSNorm, L2-normalised.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import inner
from .choices import PRECISIONS
from .compression import Quantizers, asymmetric_scores, hamming_scores, int8_scores, pack_binary, truncate
from .forward import PromptModel, as_instance, as_items, check_text, measure, pad, rough_length
from .media import Visual
from .templates import EMBEDDER_TEMPLATES, embedder_prompt, prompt_ids


class Embedder(PromptModel):
    """Text, images, videos and any mix of them to unit vectors. Arguments: see PromptModel.

    >>> embedder = Embedder("Qwen/Qwen3-VL-Embedding-2B")  # doctest: +SKIP
    >>> vectors = embedder.encode(["a red cat", {"image": "cat.png"}])  # doctest: +SKIP
    >>> embedder.similarity(vectors[:1], vectors[1:])  # doctest: +SKIP

    Taught in notebooks/02.
    """

    role = "embedder"
    templates = EMBEDDER_TEMPLATES
    default_max_length = 8192
    padding_side = "right"

    @property
    def dim(self) -> int:
        """Dimensions of the full embedding."""
        return inner(self.model).config.text_config.hidden_size

    @property
    def quantizers(self) -> Quantizers | None:
        """Learned steps of int8 and binary codes, if the checkpoint has them."""
        return self.backbone.quantizers

    def identity(self, dim: int | None = None) -> dict[str, Any]:
        """Whose vectors `encode(..., dim=dim)` gives: what an index records and compares (entries.check_identity).

        {"model": the fingerprint of the weights, "name": what the checkpoint is called, "template", "dim"}.
        """
        dim = dim or self.dim
        if not 1 <= dim <= self.dim:
            raise ValueError(f"an identity of {dim} dimensions; this model has {self.dim}, ask for 1 to {self.dim}")
        backbone = self.backbone
        return {"model": backbone.fingerprint(), "name": backbone.name, "template": self.template, "dim": dim}

    def collate(
        self, instances: Sequence[Any], instruction: str | None = None, names: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Strings or instances to `forward`'s inputs: tokens, mask, grids and visuals. No gradient, no model.

        An instance's own "instruction" comes before `instruction`, then the default. `names` is what errors call the
        instances, "item 0" and so on if None.
        """
        names = names or [f"item {i}" for i in range(len(instances))]
        check_text(instruction, "the instruction", "encode")
        seen: dict[Any, Visual] = {}
        prompts, visuals = [], []
        for item, name in zip(instances, names, strict=True):
            instance = as_instance(item, name)
            [content], found = measure(
                [instance], self.budget, self.processor, self.max_length, self.store, seen, [name]
            )
            visuals += found
            prompts.append(embedder_prompt(content, instance.get("instruction") or instruction, self.template))
        ids = prompt_ids(prompts, self.processor.tokenizer, self.max_length, names)
        return pad(ids, visuals, self.processor, self.padding_side)

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        """Inputs of `collate` to float32 unit vectors (B, D), with gradient."""
        return F.normalize(self.last_state(inputs), dim=-1)

    def encode(
        self,
        items: Sequence[Any],
        instruction: str | None = None,
        dim: int | None = None,
        precision: str = "float32",
        batch_size: int = 32,
        show_progress_bar: bool = False,
    ) -> np.ndarray:
        """Embeddings of strings or instances, in their order.

        An object that occurs more than once among `items` is computed once. Batches hold items of similar length,
        the longest first.

        Args:
            items: strings, or dicts with any of text, image, video (one value or a list of values; see
                media.prepare) and instruction. An empty one is the text "NULL".
            instruction: for the items without their own; None is "Represent the user's input.".
            dim: keep the first `dim` dimensions, normalised again; None keeps all.
            precision: "float32" gives (N, dim); "int8" int8 (N, dim); "binary" uint8 (N, dim / 8), one bit a
                dimension. int8 uses the learned step of the checkpoint, or, with a warning, one fitted on `items`.

        Raises:
            ValueError: naming the item and the remedy.

        Taught in notebooks/02.
        """
        items = as_items(items, "item")
        if precision not in PRECISIONS:
            raise ValueError(f"no precision {precision!r}; choose one of {list(PRECISIONS)}")
        dim = self.dim if dim is None else dim
        if not 1 <= dim <= self.dim or precision == "binary" and dim % 8:
            raise ValueError(f"dim is {dim}; this model has 1 to {self.dim} dimensions, binary takes multiples of 8")
        first = {id(item): i for i, item in reversed(list(enumerate(items)))}  # where an object occurs first
        order = sorted(first.values(), key=lambda i: rough_length(items[i], self.budget), reverse=True)
        rows = self._in_batches(items, order, instruction, batch_size, show_progress_bar, "item")
        vectors = np.stack([rows[first[id(item)]] for item in items]) if items else np.zeros((0, self.dim), np.float32)
        return self._codes(vectors, dim, precision)

    def _codes(self, vectors: np.ndarray, dim: int, precision: str) -> np.ndarray:
        vectors = truncate(vectors, dim)
        if precision == "float32":
            return vectors
        if precision == "binary":
            return pack_binary(vectors)
        quantizers = self.quantizers
        if quantizers is None or str(dim) not in quantizers["int8"] or not quantizers.of(dim, "int8").initialised:
            warnings.warn(
                f"this checkpoint has no learned int8 step for {dim} dimensions; one is fitted on these "
                f"{len(vectors)} embeddings, so codes of other calls have other steps (cosines do not see them)",
                stacklevel=3,
            )
            quantizers = Quantizers([dim])
            quantizers.of(dim, "int8").initialise(torch.from_numpy(vectors))
        return quantizers.codes(vectors, dim, "int8")

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosines of all pairs, float32 (N, M), of what `encode` gives: float, int8 or binary (uint8) rows.

        Binary rows may meet float rows, which then keep their precision. Taught in notebooks/02.
        """
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype == np.uint8 and b.dtype == np.uint8:
            return hamming_scores(a, b)
        if a.dtype == np.uint8:
            return asymmetric_scores(b, a).T
        if b.dtype == np.uint8:
            return asymmetric_scores(a, b)
        return int8_scores(a, b)
