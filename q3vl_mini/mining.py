"""Positive refinement and hard negatives (report, section 3.3), and a measure of what they got right.

Embed all queries and documents of a sub-dataset and take each query's top K by cosine. Keep the query
only if a labelled positive in the top K scores above t+. Let s+ be the mean score of those refined
positives. A candidate that is no labelled positive becomes a hard negative only if it scores below
s+ + delta-; one above is suspected to be relevant but unlabelled, a false negative.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import faiss
import numpy as np

from q3vl_mini.records import Quadruple, Relevance

SPARE = 32  # candidates beyond k
FAISS_QUERIES, FAISS_DOCUMENTS = 4096, 1024  # whose products faiss holds at once
HISTOGRAM_EDGES = np.linspace(-1.0, 1.0, 101)  # bins of 0.02 over the range of a cosine


def top_k(
    query_vectors: np.ndarray, corpus_vectors: np.ndarray, k: int, *, memory_mb: float = 256
) -> tuple[np.ndarray, np.ndarray]:
    """The k documents of largest inner product for each query, exactly: rows (Q, k), scores (Q, k).

    query_vectors (Q, D), corpus_vectors (N, D); k is cut to N. Best first, ties by the lower row. faiss finds some
    SPARE candidates more than k in float32; their scores are summed again in float64 and then rounded, so that the
    size of a block does not show in the result. Where float32 may have missed one, as among many equal documents, the
    query is asked again in float64 throughout.

    Blocks are searched within about memory_mb, beside the vectors and the result; corpus_vectors may be a `np.memmap`
    that is larger than memory.

    Taught in notebooks/07
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    (n_queries, dim), n_docs = query_vectors.shape, len(corpus_vectors)
    k = min(k, n_docs)
    n_candidates = min(n_docs, k + SPARE)
    rows, scores = np.empty((n_queries, k), dtype=np.int64), np.empty((n_queries, k), dtype=np.float32)
    half = memory_mb * 2**20 / 2
    height = int(max(1, min(FAISS_QUERIES, half / (4 * dim + 4 * FAISS_DOCUMENTS + 96 * n_candidates))))
    width = int(max(1, half / 2 / (4 * dim)))  # the last block is there while the next is made
    if _needs_no_copy(corpus_vectors):
        width = n_docs  # a block would copy nothing, and each begins its search for the best anew
    rounding = (dim + 2) * 2.0**-24 * _longest(corpus_vectors, width)  # of a float32 score of a query of length 1
    unsure = []
    for top in range(0, n_queries, height):
        block = np.ascontiguousarray(query_vectors[top : top + height], dtype=np.float32)
        candidates, lowest = _candidates(block, corpus_vectors, n_candidates, width)
        for i, (query, found) in enumerate(zip(query_vectors[top : top + height], candidates, strict=True), start=top):
            found = np.sort(found)
            exact = (np.asarray(corpus_vectors[found], np.float64) @ np.asarray(query, np.float64)).astype(np.float32)
            order = np.argsort(-exact, kind="stable")[:k]
            rows[i], scores[i] = found[order], exact[order]
            missed_at_most = lowest[i - top] + 2 * rounding * np.linalg.norm(block[i - top])
            if n_candidates < n_docs and not scores[i, -1] > missed_at_most:
                unsure.append(i)
    if unsure:
        rows[unsure], scores[unsure] = _top_k_in_float64(query_vectors[unsure], corpus_vectors, k, memory_mb)
    return rows, scores


def _needs_no_copy(vectors: np.ndarray) -> bool:
    """Do they lie in memory as faiss reads them?"""
    return not isinstance(vectors, np.memmap) and vectors.dtype == np.float32 and vectors.flags.c_contiguous


def _longest(vectors: np.ndarray, height: int) -> float:
    """The largest length of a row."""
    blocks = (np.asarray(vectors[i : i + height], dtype=np.float32) for i in range(0, len(vectors), height))
    return math.sqrt(max(float(np.einsum("nd,nd->n", block, block).max()) for block in blocks))


def _candidates(queries: np.ndarray, corpus: np.ndarray, k: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """By float32: rows (Q, k) in no order, and the lowest score among each query's (Q,)."""
    rows, scores = np.empty((len(queries), 0), dtype=np.int64), np.empty((len(queries), 0), dtype=np.float32)
    for left in range(0, len(corpus), width):
        block = np.ascontiguousarray(corpus[left : left + width], dtype=np.float32)
        new_scores, new_rows = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        scores, rows = np.hstack([scores, new_scores]), np.hstack([rows, left + new_rows])
        if scores.shape[1] > k:
            best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
            scores, rows = (np.take_along_axis(x, best, axis=1) for x in (scores, rows))
    return rows, scores.min(axis=1)


def _top_k_in_float64(
    query_vectors: np.ndarray, corpus_vectors: np.ndarray, k: int, memory_mb: float
) -> tuple[np.ndarray, np.ndarray]:
    (n_queries, dim), n_docs = query_vectors.shape, len(corpus_vectors)
    rows, scores = np.empty((n_queries, k), dtype=np.int64), np.empty((n_queries, k), dtype=np.float32)
    budget = memory_mb * 2**20 / 8  # float64 numbers
    height = int(max(1, min(512, n_queries, budget / 2 / (dim + 4 * k))))  # queries of a block, with their best k
    width = int(max(1, (budget - height * (dim + 4 * k)) / (dim + 2 * height)))  # documents, with the products
    for top in range(0, n_queries, height):
        block = np.asarray(query_vectors[top : top + height], dtype=np.float64)
        best_rows = np.empty((len(block), 0), dtype=np.int64)
        best_scores = np.empty((len(block), 0), dtype=np.float32)
        for left in range(0, n_docs, width):
            documents = np.asarray(corpus_vectors[left : left + width], dtype=np.float64)
            products = (block @ documents.T).astype(np.float32)  # (height, width)
            best_rows, best_scores = _merge(best_rows, best_scores, products, left, k)
        rows[top : top + height], scores[top : top + height] = best_rows, best_scores
    return rows, scores


def _merge(
    rows: np.ndarray, scores: np.ndarray, products: np.ndarray, left: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of what was found so far (B, <=k) and a new block (B, M) of documents left, left + 1, ..."""
    merged = []
    for old_rows, old_scores, new in zip(rows, scores, products, strict=True):
        if len(new) > k:  # all ties with the k-th stay, so that the lower row wins below
            new_rows = np.flatnonzero(new >= np.partition(new, -k)[-k])
        else:
            new_rows = np.arange(len(new))
        all_rows = np.concatenate([old_rows, left + new_rows])
        all_scores = np.concatenate([old_scores, new[new_rows]])
        order = np.lexsort((all_rows, -all_scores))[:k]
        merged.append((all_rows[order], all_scores[order]))
    return np.stack([r for r, _ in merged]), np.stack([s for _, s in merged])


@dataclass(frozen=True)
class MinedQuery:
    """One kept query. Every tuple of rows has its scores beside it, best first.

    `row` is the query's row in the original quadruple. `hard` are the mined negatives, `rejected` the
    candidates at or above s+ + delta-, `labelled` the explicit negatives, kept without a test.

    Taught in notebooks/07
    """

    row: int
    positives: tuple[int, ...]
    positive_scores: tuple[float, ...]
    labelled: tuple[int, ...]
    hard: tuple[int, ...]
    hard_scores: tuple[float, ...]
    rejected: tuple[int, ...]
    rejected_scores: tuple[float, ...]

    @property
    def negatives(self) -> tuple[int, ...]:
        """Explicit negatives first, then mined ones from hard to easy."""
        return self.labelled + self.hard


@dataclass(frozen=True)
class Mined:
    """The result of `mine`: the kept queries, why the others went, and the setting.

    `dropped_unretrieved` and `dropped_low` are rows of queries without a labelled positive in the top
    K, and with one but none above t+. `removed_scores` are the cosines of the labelled positives in the
    top K that t+ removed, of kept and of dropped queries.

    Taught in notebooks/07
    """

    quadruple: Quadruple
    queries: tuple[MinedQuery, ...]
    dropped_unretrieved: tuple[int, ...]
    dropped_low: tuple[int, ...]
    removed_scores: tuple[float, ...]
    k: int
    t_plus: float
    delta_minus: float
    n_negatives: int

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of the kept queries in the original quadruple."""
        return tuple(q.row for q in self.queries)

    @property
    def report(self) -> dict[str, int]:
        """Counts of what was kept and dropped.

        Taught in notebooks/07
        """
        kept = [self.quadruple.relevance[q.row] for q in self.queries]
        n_refined = sum(len(q.positives) for q in self.queries)
        return {
            "queries": len(self.quadruple),
            "queries_kept": len(self.queries),
            "dropped_no_positive_in_top_k": len(self.dropped_unretrieved),
            "dropped_positives_below_t_plus": len(self.dropped_low),
            "positives_kept": n_refined,
            "positives_dropped_in_kept_queries": sum(len(set(r.positives)) for r in kept) - n_refined,
            "labelled_negatives": sum(len(q.labelled) for q in self.queries),
            "hard_negatives": sum(len(q.hard) for q in self.queries),
            "rejected_as_false_negatives": sum(len(q.rejected) for q in self.queries),
            "queries_without_negatives": sum(not q.negatives for q in self.queries),
        }

    def histograms(self) -> dict[str, np.ndarray]:
        """Counts (100,) of the scores of what was kept and dropped, and `edges` (101,).

        Kept are `positives` and `hard_negatives`, dropped `removed_positives` (by t+) and `rejected` (by delta-).

        Taught in notebooks/07
        """
        parts = {"positives": "positive_scores", "hard_negatives": "hard_scores", "rejected": "rejected_scores"}
        counts = {name: _histogram([getattr(q, part) for q in self.queries]) for name, part in parts.items()}
        return counts | {"removed_positives": _histogram([self.removed_scores]), "edges": HISTOGRAM_EDGES}

    def to_quadruple(self, name: str | None = None) -> Quadruple:
        """The kept queries with refined positives and mined negatives, over the same corpus object.

        Taught in notebooks/07
        """
        kept = self.quadruple.select(self.rows, name)
        relevance = [
            Relevance(q.positives, q.negatives, candidates=labels.candidates)
            for q, labels in zip(self.queries, kept.relevance, strict=True)
        ]
        setting = {part: getattr(self, part) for part in ("k", "t_plus", "delta_minus", "n_negatives")}
        return replace(kept, relevance=relevance, meta={**kept.meta, "mining": setting | self.report})

    def __str__(self) -> str:
        r = self.report
        return (
            f"{self.quadruple.name}: mined with K = {self.k}, t+ = {self.t_plus:g}, delta- = {self.delta_minus:g},"
            f" at most {self.n_negatives} negatives a query\n"
            f"  queries    {r['queries_kept']} of {r['queries']} kept; dropped: {r['dropped_no_positive_in_top_k']}"
            f" without a labelled positive in the top {self.k},"
            f" {r['dropped_positives_below_t_plus']} with none above t+\n"
            f"  positives  {r['positives_kept']} kept, {_mean([q.positive_scores for q in self.queries])};"
            f" {r['positives_dropped_in_kept_queries']} dropped from kept queries\n"
            f"  negatives  {r['hard_negatives']} mined, {_mean([q.hard_scores for q in self.queries])};"
            f" {r['labelled_negatives']} were labelled; {r['queries_without_negatives']} queries have none\n"
            f"  rejected   {r['rejected_as_false_negatives']} candidates as suspected false negatives,"
            f" {_mean([q.rejected_scores for q in self.queries])}"
        )


def _histogram(scores: Sequence[Sequence[float]]) -> np.ndarray:
    flat = np.concatenate([np.asarray(s, dtype=np.float64) for s in scores])
    return np.histogram(np.clip(flat, -1.0, 1.0), HISTOGRAM_EDGES)[0]  # rounding can exceed a cosine's 1


def _mean(scores: Sequence[Sequence[float]]) -> str:
    flat = np.concatenate([np.asarray(s, dtype=np.float64) for s in scores])
    return f"mean score {flat.mean():.3f}" if len(flat) else "no scores"


def mine_query(
    row: int,
    labels: Relevance,
    candidates: np.ndarray,
    scores: np.ndarray,
    *,
    t_plus: float,
    delta_minus: float,
    n_negatives: int,
    keep_labelled: bool = True,
) -> MinedQuery | None:
    """Section 3.3 for one query; None if no labelled positive among its candidates is above t+.

    candidates (K,) rows of the top K, best first, scores (K,) their cosines. A labelled positive that
    is not refined is used neither as a positive nor as a negative.

    Taught in notebooks/07
    """
    found = list(zip(candidates.tolist(), scores.tolist(), strict=True))
    labelled_positives = set(labels.positives)
    positives = [(d, s) for d, s in found if d in labelled_positives and s > t_plus]
    if not positives:
        return None
    s_plus = sum(s for _, s in positives) / len(positives)
    labelled = tuple(dict.fromkeys(labels.negatives)) if keep_labelled else ()
    others = [(d, s) for d, s in found if d not in labelled_positives and d not in labelled]
    hard = [(d, s) for d, s in others if s < s_plus + delta_minus]
    rejected = [(d, s) for d, s in others if not s < s_plus + delta_minus]
    hard = hard[: max(0, n_negatives - len(labelled))]
    return MinedQuery(row, *_split(positives), labelled, *_split(hard), *_split(rejected))


def _split(pairs: list[tuple[int, float]]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return tuple(d for d, _ in pairs), tuple(s for _, s in pairs)


def mine(
    quadruple: Quadruple,
    query_vectors: np.ndarray,
    corpus_vectors: np.ndarray,
    *,
    k: int,
    t_plus: float,
    delta_minus: float,
    n_negatives: int,
    keep_labelled: bool = True,
    memory_mb: float = 256,
    neighbours: tuple[np.ndarray, np.ndarray] | None = None,
) -> Mined:
    """Refine the positives of a sub-dataset and mine its hard negatives (report, section 3.3).

    query_vectors (Q, D) and corpus_vectors (N, D), L2-normalised, from the model that mines; the corpus
    may be a `np.memmap`. k is the report's K (cut to N), t_plus its t+ and delta_minus its delta-, both
    on the cosine. n_negatives bounds a query's negatives; explicit ones come first and are all kept
    (keep_labelled=False: they are candidates like any other). A query's own evaluation candidates do
    not restrict the search. neighbours: what `top_k` gave, rows and scores (Q, K), if it was asked already.

    Memory beside the vectors: about memory_mb, 12 bytes for each of the Q * K candidates, and the result,
    about 70 bytes for each positive, negative and rejected candidate in it. `vectors.encode_to_file`
    makes vectors that lie on disk.

    Raises ValueError if the labels are graded, the vectors do not fit, or every query is dropped.

    Taught in notebooks/07
    """
    _check(quadruple, query_vectors, corpus_vectors, n_negatives, memory_mb)
    rows, scores = neighbours or top_k(query_vectors, corpus_vectors, k, memory_mb=memory_mb)
    kept, unretrieved, low, removed_scores = [], [], [], []
    for i, labels in enumerate(quadruple.relevance):
        mined = mine_query(
            i,
            labels,
            rows[i],
            scores[i],
            t_plus=t_plus,
            delta_minus=delta_minus,
            n_negatives=n_negatives,
            keep_labelled=keep_labelled,
        )
        found = scores[i][np.isin(rows[i], labels.positives)]
        removed_scores += found[~(found > t_plus)].tolist()
        if mined is not None:
            kept.append(mined)
        elif len(found):
            low.append(i)
        else:
            unretrieved.append(i)
    if not kept:
        raise ValueError(
            f"{quadruple.name}: mining dropped all {len(quadruple)} queries ({len(unretrieved)} without a labelled"
            f" positive in the top {k}, {len(low)} with none above t+ = {t_plus:g}); raise k, lower t_plus, or mine"
            " with a better model"
        )
    dropped = tuple(unretrieved), tuple(low), tuple(removed_scores)
    return Mined(quadruple, tuple(kept), *dropped, k, t_plus, delta_minus, n_negatives)


def _check(
    quadruple: Quadruple, query_vectors: np.ndarray, corpus_vectors: np.ndarray, n_negatives: int, memory_mb: float
) -> None:
    if n_negatives < 0:
        raise ValueError(f"n_negatives is {n_negatives}; expected 0 or more")
    graded = next((i for i, labels in enumerate(quadruple.relevance) if labels.scores is not None), None)
    if graded is not None:
        raise ValueError(
            f"{quadruple.name}, query {graded}: has graded labels (STS), which mining would make into positives;"
            " leave this data set out"
        )
    if len(quadruple.relevance) != len(quadruple):
        raise ValueError(f"{quadruple.name}: {len(quadruple)} queries but {len(quadruple.relevance)} rows of labels")
    for i, labels in enumerate(quadruple.relevance):
        if outside := [d for d in (*labels.positives, *labels.negatives) if not 0 <= d < len(quadruple.corpus)]:
            raise ValueError(
                f"{quadruple.name}, query {i}: labels {outside[:3]} are outside the corpus of {len(quadruple.corpus)} "
                "documents; drop them (records.validate finds all)"
            )
    parts = (("query", query_vectors, quadruple.queries), ("document", corpus_vectors, quadruple.corpus))
    for kind, vectors, items in parts:
        if vectors.ndim != 2 or len(vectors) != len(items):
            raise ValueError(f"{quadruple.name}: {kind} vectors of shape {vectors.shape}, expected ({len(items)}, D)")
        height = int(max(1, memory_mb * 2**20 / 8 / vectors.shape[1]))  # the last block is there while the next is made
        for start in range(0, len(vectors), height):  # the corpus may lie on disk
            block = np.asarray(vectors[start : start + height], dtype=np.float32)
            lengths = np.sqrt(np.einsum("nd,nd->n", block, block))
            wrong = np.flatnonzero(~(np.abs(lengths - 1) < 0.01))  # nan is wrong too
            if len(wrong):
                raise ValueError(
                    f"{quadruple.name}, {kind} {start + wrong[0]}: its vector has length {lengths[wrong[0]]:.3g};"
                    " t+ and delta- are on the cosine, so L2-normalise the vectors"
                )
    if query_vectors.shape[1] != corpus_vectors.shape[1]:
        widths = f"{query_vectors.shape[1]} dimensions, those of documents {corpus_vectors.shape[1]}"
        raise ValueError(f"{quadruple.name}: query vectors have {widths}; encode both with the same dim")


@dataclass(frozen=True)
class NoiseReport:
    """What mining did about known noise. Precision and recall are nan where nothing was there to count.

    `removed_*`: labelled positives that mining removed (with their queries or from kept ones), against
    those that are truly irrelevant. `avoided_*`: candidates rejected by delta-, against the truly
    relevant ones that would otherwise have become negatives. `false_negatives_*`: share of truly
    relevant documents among mined negatives, with delta- and without.

    Taught in notebooks/07
    """

    wrong_positives: int
    removed: int
    removed_precision: float
    removed_recall: float
    rejected: int
    avoided_precision: float
    avoided_recall: float
    false_negatives_filtered: float
    false_negatives_unfiltered: float

    def __str__(self) -> str:
        return (
            f"wrong positives: {self.wrong_positives} injected, {self.removed} labels removed,"
            f" precision {self.removed_precision:.3f}, recall {self.removed_recall:.3f}\n"
            f"false negatives: {self.rejected} candidates rejected, precision {self.avoided_precision:.3f},"
            f" recall {self.avoided_recall:.3f}\n"
            f"share of false negatives among mined negatives: {self.false_negatives_filtered:.4f} with delta-,"
            f" {self.false_negatives_unfiltered:.4f} without"
        )


def noise_report(mined: Mined, truth: Sequence[Collection[int]]) -> NoiseReport:
    """Measure mining against the truth: for each query of the original quadruple its relevant rows.

    Labelled negatives were not mined and do not enter. Raises ValueError if truth has another length.

    Taught in notebooks/07
    """
    quadruple = mined.quadruple
    if len(truth) != len(quadruple):
        raise ValueError(f"{quadruple.name}: truth for {len(truth)} queries, expected {len(quadruple)}; kept or not")
    refined = {(q.row, d) for q in mined.queries for d in q.positives}
    labelled = {(i, d) for i, labels in enumerate(quadruple.relevance) for d in labels.positives}
    relevant = {(i, d) for i, rows in enumerate(truth) for d in rows}
    wrong, removed = labelled - relevant, labelled - refined

    filtered = {(q.row, d) for q in mined.queries for d in q.hard}
    rejected = {(q.row, d) for q in mined.queries for d in q.rejected}
    unfiltered = {(q.row, d) for q in mined.queries for d in _without_filter(q, mined.n_negatives)}
    return NoiseReport(
        wrong_positives=len(wrong),
        removed=len(removed),
        removed_precision=_share(removed, wrong),
        removed_recall=_share(wrong, removed),
        rejected=len(rejected),
        avoided_precision=_share(rejected, relevant),
        avoided_recall=_share(unfiltered & relevant, rejected),
        false_negatives_filtered=_share(filtered, relevant),
        false_negatives_unfiltered=_share(unfiltered, relevant),
    )


def _without_filter(query: MinedQuery, n_negatives: int) -> Iterable[int]:
    """What would have been mined without delta-: every rejected candidate scores above every hard one."""
    return (query.rejected + query.hard)[: max(0, n_negatives - len(query.labelled))]


def _share(part: set, of: set) -> float:
    """Share of `part` that is in `of`; nan if `part` is empty."""
    return len(part & of) / len(part) if part else float("nan")
