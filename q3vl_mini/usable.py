"""A saved sub-dataset as a long job can use it: what cannot be used is left out, counted and named.

Every picture and video is opened once, before a model is loaded, so that a broken file ends no training in its middle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .data import LeftOut, StoredInstances, load_quadruple
from .media import MediaBudget, as_list, load_image, load_video
from .records import Instance, Quadruple, Relevance, text_problem, too_many, validate_instance, validate_labels

SHOWN = 20  # reasons in the report
TWO_FRAMES = MediaBudget(max_frames=2)


class Part(Sequence):
    """Some rows of stored instances, in their order, decoded when asked for."""

    def __init__(self, instances: Sequence[Instance], rows: Sequence[int]):
        self.instances, self.rows = instances, list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        return [self.instances[j] for j in self.rows[i]] if isinstance(i, slice) else self.instances[self.rows[i]]


def load_usable(folder: str | Path, rows: int, seed: int, may_skip: float = 0.1) -> Quadruple:
    """`data.load_quadruple` of `rows` queries, drawn by `seed`, as far as they can be used. See `usable`."""
    left_out = LeftOut()
    quadruple = load_quadruple(folder, left_out=left_out)
    chosen = np.random.default_rng([seed, 5]).permutation(len(quadruple))[:rows]
    return usable(quadruple, sorted(chosen.tolist()), left_out, may_skip)


def usable(
    quadruple: Quadruple, rows: Sequence[int], left_out: LeftOut | None = None, may_skip: float = 0.1
) -> Quadruple:
    """The queries at `rows` that can be used, over the documents that can be read.

    meta["left_out"] counts what is missing and has the first reasons, if anything is.

    Args:
        left_out: what is known already (load_quadruple). may_skip: the share of queries and documents, together, that
            may be left out.

    Raises:
        ValueError: nothing is left, or more than `may_skip` is left out; names the first rows and their faults.
    """
    found = left_out or LeftOut()
    name = quadruple.name
    if problem := text_problem(quadruple.instruction, "the instruction", name):
        raise ValueError(problem)
    kinds = (("query", quadruple.queries, rows, found.queries), ("document", quadruple.corpus, None, found.documents))
    for kind, instances, chosen, faults in kinds:
        for i in range(len(instances)) if chosen is None else chosen:
            if i not in faults and (problem := _problem(instances, i, f"{name}, {kind} {i}")):
                faults[i] = problem
    documents = [i for i in range(len(quadruple.corpus)) if i not in found.documents]
    new_row = {old: new for new, old in enumerate(documents)}
    labels = {i: _renumbered(quadruple.relevance[i], new_row) for i in rows if i not in found.queries}
    for i, relevance in labels.items():
        if problems := validate_labels(relevance, len(documents), f"{name}, query {i}"):
            found.queries[i] = problems[0]
    kept = [i for i in rows if i not in found.queries]
    bad, total = len(rows) - len(kept) + len(found.documents), len(rows) + len(quadruple.corpus)
    reasons = [*found.documents.values(), *found.labels, *found.queries.values()]  # causes before what follows
    if not kept or too_many(bad, total, may_skip):
        told = "; ".join(reasons[:3])
        raise ValueError(f"{name}: {bad} of {total} queries and documents cannot be used: {told}. Mend the data")
    if not reasons:
        return replace(
            quadruple, queries=Part(quadruple.queries, rows), relevance=[quadruple.relevance[i] for i in rows]
        )
    counts = {"queries": len(rows) - len(kept), "documents": len(found.documents), "labels": len(found.labels)}
    whole = replace(quadruple, corpus=Part(quadruple.corpus, documents), meta=_without_truth(quadruple.meta))
    selected = replace(whole, queries=Part(quadruple.queries, kept), relevance=[labels[i] for i in kept])
    return replace(selected, meta={**selected.meta, "left_out": {**counts, "first": tuple(reasons[:SHOWN])}})


def _problem(instances: Sequence[Instance], i: int, where: str) -> str | None:
    """Why a row cannot be used; None if its texts are sound and its pictures and videos can be opened."""
    try:
        instance = instances[i]
        if problems := validate_instance(instance, where):
            return problems[0]
        if not isinstance(instances, StoredInstances):  # which has opened its pictures to hand them out
            for value in as_list(instance.get("image"), "image"):
                load_image(value, where)
        for value in as_list(instance.get("video"), "video"):
            load_video(value, TWO_FRAMES, where)
    except (ValueError, OSError) as error:
        return f"{where}: {error}"
    return None


def _renumbered(labels: Relevance, new_row: Mapping[int, int]) -> Relevance:
    """The labels of documents that are left, by their new rows."""

    def rows(old: Sequence[int]) -> tuple[int, ...]:
        return tuple(new_row[d] for d in old if d in new_row)

    scores = labels.scores
    if scores is not None and len(scores) == len(labels.positives):
        scores = tuple(score for score, d in zip(scores, labels.positives, strict=True) if d in new_row)
    candidates = None if labels.candidates is None else rows(labels.candidates)
    return Relevance(rows(labels.positives), rows(labels.negatives), scores, candidates)


def _without_truth(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The truth of injected noise is by old rows, and nothing is left to measure with it."""
    return {key: value for key, value in meta.items() if key != "truth"}
