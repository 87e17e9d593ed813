"""Annotation noise on purpose: wrong labels and unlabelled near-duplicates at known rates, beside the truth."""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .emoji_world.scenes import BACKGROUNDS, COLOURS, PATTERNS
from .records import Clip, Instance, Quadruple, Relevance, as_instance


def add_noise(quadruple: Quadruple, *, wrong: float, duplicates: float, seed: int) -> Quadruple:
    """The same sub-dataset with faults of annotation at a known rate, and the truth beside it.

    A share `wrong` of the queries is labelled with one document that is not relevant, drawn from the whole corpus,
    in place of its positives. A share `duplicates` gets a near-duplicate of a true positive: it lies in the corpus,
    is relevant to every query that the original is relevant to, and nobody labelled it. A document is duplicated
    once, so where queries share documents fewer copies than that share are made. Both shares are drawn
    independently. Candidate lists grow by wrong positives alone.

    Returns:
        A quadruple with meta["truth"], a tuple for each query of the rows that are relevant, and meta["noise"].

    Raises:
        ValueError: a rate outside [0, 1], or a corpus where nothing is irrelevant to a query.

    Taught in notebooks/07.
    """
    if not (0 <= wrong <= 1 and 0 <= duplicates <= 1):
        raise ValueError(f"noise rates wrong={wrong}, duplicates={duplicates}; expected shares between 0 and 1")
    rng, n, n_docs = np.random.default_rng([seed, 3]), len(quadruple), len(quadruple.corpus)
    truth = [tuple(rows) for rows in quadruple.meta.get("truth", [r.positives for r in quadruple.relevance])]
    relevance = list(quadruple.relevance)
    for i in rng.permutation(n)[: round(wrong * n)]:
        if len(set(truth[i])) >= n_docs:
            raise ValueError(f"{quadruple.name}, query {i}: every document is relevant, so none can be a wrong label")
        while (document := int(rng.integers(n_docs))) in truth[i]:
            pass
        relevance[i] = _mislabelled(relevance[i], document)
    copies: dict[int, int] = {}  # document -> row of its copy
    corpus = quadruple.corpus
    if chosen := rng.permutation(n)[: round(duplicates * n)].tolist():
        corpus = list(corpus)
    for i in chosen:
        document = truth[i][int(rng.integers(len(truth[i])))]
        if document not in copies:
            copies[document] = len(corpus)
            corpus.append(near_duplicate(corpus[document], rng))
    truth = [(*rows, *(copies[d] for d in rows if d in copies)) for rows in truth]
    noise = {"wrong": wrong, "duplicates": duplicates, "seed": seed}
    meta = {**quadruple.meta, "truth": tuple(truth), "noise": noise}
    return replace(quadruple, corpus=corpus, relevance=relevance, meta=meta)


def _mislabelled(labels: Relevance, document: int) -> Relevance:
    return Relevance(
        positives=(document,),
        negatives=tuple(d for d in labels.negatives if d != document),
        scores=labels.scores and labels.scores[:1],
        candidates=labels.candidates and tuple(dict.fromkeys((*labels.candidates, document))),
    )


def near_duplicate(instance: Instance, rng: np.random.Generator) -> Instance:
    """The same content in other clothes: text in other case and punctuation, a drawing on another background.

    What is neither, such as a stored picture, stays the same object. Taught in notebooks/07.
    """

    def varied(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(varied(v) for v in value)
        return _reworded(value) if isinstance(value, str) else _redrawn(value, rng)

    instance = as_instance(instance)
    files = {kind: v for kind, v in instance.items() if kind == "instruction" or (kind != "text" and _is_file(v))}
    return {kind: varied(v) for kind, v in instance.items() if kind not in files} | files


def _is_file(value: Any) -> bool:
    return isinstance(value, (str, Path)) or (isinstance(value, (list, tuple)) and any(map(_is_file, value)))


def _reworded(text: str) -> str:
    """Never the same string: without its last mark, or with one, also where a script has no case."""
    text = text.lower() if text.isupper() else text.upper()
    bare = text.rstrip(".!?")
    return bare if bare and bare != text else f"{text}!"


def _redrawn(value: Any, rng: np.random.Generator) -> Any:
    if not is_dataclass(value) or isinstance(value, Clip):
        return value
    changes = {}
    choices = {"background": tuple(BACKGROUNDS), "pattern": PATTERNS, "accent": tuple(COLOURS)}
    for field in fields(value):
        now = getattr(value, field.name)
        if field.name in choices:
            others = [choice for choice in choices[field.name] if choice != now]
            changes[field.name] = others[int(rng.integers(len(others)))]
        elif field.name == "scene":  # a crop of one
            changes[field.name] = _redrawn(now, rng)
    return replace(value, **changes)
