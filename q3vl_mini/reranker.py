"""The reranker: how relevant one document is to one query. A cross-encoder that answers "yes" or "no".

The margin logit(yes) - logit(no) at the last position is one dot product of its hidden state with W_yes - W_no, so
the vocabulary's other logits are never computed. The score is its sigmoid (eq. 5).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backbone import inner
from .forward import PromptModel, as_instance, as_items, check_text, measure, pad, rough_length
from .media import Visual
from .templates import RERANKER_TEMPLATES, prompt_ids, reranker_prompt


class Reranker(PromptModel):
    """Query and document, each of any kind, to a relevance in [0, 1]. Arguments: see PromptModel.

    >>> reranker = Reranker("Qwen/Qwen3-VL-Reranker-2B")  # doctest: +SKIP
    >>> reranker.rank("a red cat", [{"image": "cat.png"}, "a green apple"], top_k=1)  # doctest: +SKIP

    Taught in notebooks/10.
    """

    role = "reranker"
    templates = RERANKER_TEMPLATES
    default_max_length = 10_240
    padding_side = "left"

    def _set(self, *args) -> None:
        super()._set(*args)
        if not getattr(inner(self.model), "has_head", True):
            raise ValueError(
                f"{self.backbone.name} has no weights for words (lm_head), so it can say neither yes nor no: it is an "
                "embedder; load it with Embedder, or give a reranker"
            )
        self.yes_id, self.no_id = (self._single_token(word) for word in ("yes", "no"))

    def _single_token(self, word: str) -> int:
        ids = self.processor.tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"the tokenizer splits {word!r} into {len(ids)} tokens; a reranker needs it whole: train the tokenizer "
                "on text where it stands often, alone on a line"
            )
        return ids[0]

    def collate(
        self, pairs: Sequence[tuple[Any, Any]], instruction: str | None = None, names: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """(query, document) pairs of strings or instances to `forward`'s inputs. No gradient, no model.

        Pairs of one and the same query object share what stands before the document (forward_by_query), if its visuals
        have one size in both: beside large ones of a document they may be scaled down.

        A query's own "instruction" comes before `instruction`, then the default; a document's is not read. `names` is
        what errors call the pairs, "pair 0" and so on if None.
        """
        names = names or [f"pair {i}" for i in range(len(pairs))]
        check_text(instruction, "the instruction", "score")
        seen: dict[Any, Visual] = {}
        prompts, visuals, numbers, queries = [], [], {}, []
        for pair, name in zip(pairs, names, strict=True):
            sides = [f"{name}, {side}" for side in ("query", "document")]
            query, document = (as_instance(item, side) for item, side in zip(pair, sides, strict=True))
            contents, found = measure(
                [query, document], self.budget, self.processor, self.max_length, self.store, seen, sides
            )
            visuals += found
            n_asked = len(contents[0].videos) + len(contents[0].images)  # the query's visuals, which come first
            same = id(pair[0]), *(visual.key for visual in found[:n_asked])
            queries.append((numbers.setdefault(same, len(numbers)), n_asked))
            prompts.append(reranker_prompt(*contents, query.get("instruction") or instruction, self.template))
        ids = prompt_ids(prompts, self.processor.tokenizer, self.max_length, names)
        return {**pad(ids, visuals, self.processor, self.padding_side), "queries": queries}

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        """Inputs of `collate` to margins logit(yes) - logit(no), float32 (B,), with gradient."""
        head = inner(self.model).lm_head.weight  # (V, D), no bias
        return self.last_state(inputs) @ (head[self.yes_id].float() - head[self.no_id].float())

    def logits(
        self,
        pairs: Sequence[tuple[Any, Any]],
        instruction: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool = False,
    ) -> np.ndarray:
        """Margins of (query, document) pairs, float32 (N,), in their order. sigmoid(margin) is the score.

        Raises ValueError naming the pair and the remedy. Taught in notebooks/10.
        """
        pairs = as_items(pairs, "pair")
        for i, pair in enumerate(pairs):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(f"pair {i}: expected (query, document), got {type(pair).__name__}; write two items")
        lengths = [np.sum([rough_length(side, self.budget) for side in pair], axis=0).tolist() for pair in pairs]
        order = sorted(range(len(pairs)), key=lengths.__getitem__, reverse=True)
        rows = self._in_batches(pairs, order, instruction, batch_size, show_progress_bar, "pair")
        return np.array([rows[i] for i in range(len(pairs))], dtype=np.float32)

    def yes_no_logits(self, pairs: Sequence[tuple[Any, Any]], instruction: str | None = None) -> np.ndarray:
        """logit(yes) and logit(no) of (query, document) pairs, float32 (N, 2), in one batch: `logits` is what they
        differ by."""
        with torch.inference_mode():
            head = inner(self.model).lm_head.weight[[self.yes_id, self.no_id]].float()  # (2, D)
            return (self.last_state(self.collate(pairs, instruction)) @ head.T).cpu().numpy()

    def score(
        self, query: Any, documents: Sequence[Any], instruction: str | None = None, batch_size: int = 32
    ) -> np.ndarray:
        """Relevance of each document to the query, float32 (N,) in [0, 1]: sigmoid of the margin (eq. 5).

        Taught in notebooks/10.
        """
        documents = as_items(documents, "document")
        margins = self.logits([(query, document) for document in documents], instruction, batch_size)
        return torch.from_numpy(margins).sigmoid().numpy()

    def rank(
        self,
        query: Any,
        documents: Sequence[Any],
        top_k: int | None = None,
        instruction: str | None = None,
        batch_size: int = 32,
    ) -> list[dict[str, Any]]:
        """The documents by falling relevance, as [{"corpus_id": position in documents, "score": ...}, ...].

        The first `top_k`, or all; equal scores keep the order of `documents`. Taught in notebooks/10.
        """
        if top_k is not None and top_k < 0:
            raise ValueError(f"top_k is {top_k}; give the number of documents wanted, or None for all")
        scores = self.score(query, documents, instruction, batch_size)
        order = np.argsort(-scores, kind="stable")[:top_k]
        return [{"corpus_id": int(i), "score": float(scores[i])} for i in order]
