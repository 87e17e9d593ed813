"""Evaluations of this project in the layout of MMEB-V2's result files (VLM2Vec-V2's eval.py and report_score_v2.py).

The figures are MMEB-mini's, of Emoji World. They are not scores of MMEB-V2, and no leaderboard may take them for such:
the report file says so in its metadata. What the layout is for: tools that read MMEB-V2's results read these.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .evaluate import encoded, ranked_rows
from .metrics import hit_at_k, ndcg_at_k, reciprocal_rank
from .records import Quadruple

# Modality and meta-task of each column; MMEB-V2 has no place for the columns of text alone.
PLACES = {
    "image_cls": ("image", "CLS"),
    "image_qa": ("image", "QA"),
    "image_ret": ("image", "RET"),
    "image_gd": ("image", "GD"),
    "video_cls": ("video", "CLS"),
    "video_qa": ("video", "QA"),
    "video_ret": ("video", "RET"),
    "video_mret": ("video", "MRET"),
    "visdoc": ("visdoc", "RET"),
}
MAIN_METRIC = {"image": "hit@1", "video": "hit@1", "visdoc": "ndcg_linear@5"}
CUTOFFS = (1, 5, 10)


@dataclass(frozen=True)
class Ranking:
    """One model's candidates for each query of a data set, best first, and the right ones; names of documents."""

    dataset: str
    column: str
    predictions: Sequence[Sequence[str]]
    labels: Sequence[Sequence[str]]


def rankings(
    embedder: Any, quadruples: Iterable[Quadruple], batch_size: int = 32, progress: bool = False, **options: Any
) -> Iterator[Ranking]:
    """Rank the candidates of every data set that has a place in the layout. `options` go to the embedder's encode."""
    placed = [quadruple for quadruple in quadruples if quadruple.task in PLACES]
    for quadruple, queries, corpus in encoded(embedder, placed, batch_size=batch_size, progress=progress, **options):
        yield rank(quadruple, queries, corpus)


def rank(quadruple: Quadruple, query_vectors: np.ndarray, corpus_vectors: np.ndarray) -> Ranking:
    """From vectors (Q, D) and (N, D). A document is called by its row of the corpus; of equal scores a wrong one comes
    first, as in this project's metrics."""
    predictions: list[list[str]] = [[] for _ in quadruple.queries]
    for i, candidates, scores, relevant in ranked_rows(quadruple, query_vectors, corpus_vectors):
        order = np.lexsort((relevant, -scores))
        predictions[i] = [str(row) for row in candidates[order]]
    labels = [[str(row) for row in sorted(set(r.positives))] for r in quadruple.relevance]
    return Ranking(quadruple.name, quadruple.task, predictions, labels)


def score_dict(ranking: Ranking) -> dict[str, float]:
    """All metrics of MMEB-V2's score files, each the mean over the queries, at 1, 5 and 10.

    Labels are binary, so both gains of ndcg are equal. map@k divides by min(k, number of labels).
    """
    values: dict[str, list[float]] = {}
    for predictions, labels in zip(ranking.predictions, ranking.labels, strict=True):
        place = {name: i for i, name in enumerate(predictions, start=1)}
        ranks = np.sort([place[name] for name in labels])
        for k in CUTOFFS:
            found = int((ranks <= k).sum())
            precision, recall = found / k, found / len(ranks)
            row = {
                "hit": hit_at_k(ranks, k),
                "ndcg_linear": ndcg_at_k(ranks, k),
                "ndcg_exponential": ndcg_at_k(ranks, k),
                "precision": precision,
                "recall": recall,
                "f1": 2 * precision * recall / (precision + recall) if found else 0.0,
                "map": float(np.sum(np.arange(1, found + 1) / ranks[:found])) / min(k, len(ranks)),
                "mrr": reciprocal_rank(ranks, k),
            }
            for metric, value in row.items():
                values.setdefault(f"{metric}@{k}", []).append(value)
    n = len(ranking.predictions)
    return {metric: float(np.mean(v)) for metric, v in values.items()} | {"num_pred": n, "num_data": n}


def write_mmeb_v2(
    records: Iterable[Ranking], folder: str | Path, model_name: str, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write rankings of this project in MMEB-V2's layout; returns the report file.

    These are MMEB-mini's figures in that layout, not scores of MMEB-V2.

    `folder`/MODALITY/DATASET_score.json: all metrics. DATASET_pred.jsonl: for each query {"prediction": [names, best
    first], "label": [names], "rel_scores": null}. `folder`/MODEL.json: {"metadata", "metrics": {modality: {dataset:
    metrics}}}, the file of a leaderboard entry. `folder`/summary.json, of this project: the means of each modality's
    main metric, over all its data sets ("all") and for each meta-task.

    Args:
        records: of `rankings`. metadata: for the report, e.g. model_size in billions, embedding_dimension, url.

    Raises:
        ValueError: there is nothing to write.
    """
    folder = Path(folder)
    metrics: dict[str, dict[str, dict[str, float]]] = {modality: {} for modality in MAIN_METRIC}
    groups: dict[str, dict[str, list[float]]] = {modality: {} for modality in MAIN_METRIC}
    for ranking in records:
        modality, meta_task = PLACES[ranking.column]
        scores = metrics[modality][ranking.dataset] = score_dict(ranking)
        for group in ("all", meta_task):
            groups[modality].setdefault(group, []).append(scores[MAIN_METRIC[modality]])
        rows = zip(ranking.predictions, ranking.labels, strict=True)
        lines = [json.dumps({"prediction": p, "label": label, "rel_scores": None}) for p, label in rows]
        place = folder / modality
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{ranking.dataset}_score.json").write_text(json.dumps(scores, indent=4) + "\n")
        (place / f"{ranking.dataset}_pred.jsonl").write_text("\n".join(lines) + "\n")
    if not any(metrics.values()):
        raise ValueError(f"no rankings of a column that MMEB-V2 has a place for; these are {list(PLACES)}")
    summary = {m: {group: float(np.mean(v)) for group, v in found.items()} for m, found in groups.items() if found}
    (folder / "summary.json").write_text(json.dumps(summary, indent=4) + "\n")
    about = {"model_name": model_name, "data_source": "Self-Reported", "benchmark": "MMEB-mini, not MMEB-V2"}
    report = folder / f"{model_name.replace('/', '_')}.json"
    report.write_text(json.dumps({"metadata": {**about, **(metadata or {})}, "metrics": metrics}, indent=4) + "\n")
    return report
