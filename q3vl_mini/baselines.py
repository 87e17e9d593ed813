"""What a person would try before any model: BM25 for texts, colours and pixels for pictures.

Each is an object with `scores(query) -> (N,)` over the documents that it was made with. `score_with` measures it like
any model.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .evaluate import DatasetResult, score_rows
from .media import as_list, load_image
from .records import Instance, Quadruple, as_instance


class Scorer(Protocol):
    """Scores all its documents for a query."""

    def scores(self, query: Instance) -> np.ndarray: ...


def score_with(scorer: Scorer, quadruple: Quadruple, metric: str | None = None) -> DatasetResult:
    """A baseline on a data set, whose corpus the scorer was made with; the metric is that of its column."""
    return score_rows(quadruple, [scorer.scores(query) for query in quadruple.queries], metric)


def words(instance: Instance) -> list[str]:
    """The lower-case words of an instance's texts; of scripts without spaces, pairs of signs."""
    found: list[str] = []
    for text in as_list(as_instance(instance).get("text"), "text"):
        for word in re.findall(r"\w+", text.lower()):
            unspaced = any("\u3040" <= sign <= "\u9fff" or "\u0e00" <= sign <= "\u0eff" for sign in word)
            found += [word[i : i + 2] for i in range(max(1, len(word) - 1))] if unspaced else [word]
    return found


class Bm25:
    """Okapi BM25 (Robertson et al. 1994) with Lucene's idf, log(1 + (N - n + 0.5) / (n + 0.5)), which is positive."""

    def __init__(self, documents: Sequence[Instance], k1: float = 1.2, b: float = 0.75):
        counts = [Counter(words(document)) for document in documents]
        lengths = np.array([sum(count.values()) for count in counts])
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))
        self.size, self.places = len(documents), {}  # word -> [(document, weight)]
        containing = Counter(word for count in counts for word in count)
        for i, count in enumerate(counts):
            for word, n in count.items():
                idf = math.log(1 + (len(documents) - containing[word] + 0.5) / (containing[word] + 0.5))
                self.places.setdefault(word, []).append((i, idf * n * (k1 + 1) / (n + norm[i])))

    def scores(self, query: Instance) -> np.ndarray:
        out = np.zeros(self.size)
        for word in words(query):
            for i, weight in self.places.get(word, ()):
                out[i] += weight
        return out


def colour_histogram(image: Any) -> np.ndarray:
    """Roots of the shares of 8 x 8 x 8 colours, (512,): a dot product of two is their Bhattacharyya coefficient."""
    levels = load_image(image).reshape(-1, 3) // 32
    counts = np.bincount(levels @ np.array([64, 8, 1]), minlength=512)
    return np.sqrt(counts / counts.sum())


def pixels(image: Any) -> np.ndarray:
    """The picture in 16 x 16 grey levels without their mean, of length 1: a dot product is a correlation: (256,)."""
    grey = Image.fromarray(load_image(image)).convert("L").resize((16, 16), Image.Resampling.BOX)
    levels = np.asarray(grey, dtype=float).ravel()
    levels -= levels.mean()
    return levels / max(float(np.linalg.norm(levels)), 1e-9)


class Pictures:
    """Likeness of a query's first picture to each document's, by `feature`: colour_histogram or pixels."""

    def __init__(self, documents: Sequence[Instance], feature: Callable[[Any], np.ndarray]):
        self.feature = feature
        self.features = np.stack([feature(_picture(document)) for document in documents])

    def scores(self, query: Instance) -> np.ndarray:
        return self.features @ self.feature(_picture(query))


class ThroughTraining:
    """Words to pictures: BM25 finds the training queries that are most like the query, and their pictures are compared.

    The score of a document is its likeness to the pictures of the `k` best training queries, weighted by their BM25.
    """

    def __init__(
        self, train: Quadruple, documents: Sequence[Instance], feature: Callable[[Any], np.ndarray], k: int = 5
    ):
        self.asked, self.k = Bm25(train.queries), k
        known = Pictures(train.corpus, feature).features
        self.known = np.stack([known[labels.positives[0]] for labels in train.relevance])
        self.features = Pictures(documents, feature).features

    def scores(self, query: Instance) -> np.ndarray:
        found = self.asked.scores(query)
        best = np.argsort(-found, kind="stable")[: self.k]
        return self.features @ (found[best] @ self.known[best])


def _picture(instance: Instance) -> Any:
    item = as_instance(instance)
    pictures = as_list(item.get("image"), "image")
    if not pictures:
        raise ValueError(f"an item with {sorted(item)} has no picture, which this baseline compares; try Bm25")
    return pictures[0]
