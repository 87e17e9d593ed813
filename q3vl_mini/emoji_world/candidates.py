"""Queries with several documents each, of which the right ones are to be found: what Q3VL-tiny learns to judge by.

Every document of a query has a label, and some are wrong in a confusing way. Single things come from a bank of
drawings, many a second; all else is built as the tasks build it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..records import Instance
from . import words
from .bank import SpriteBank
from .dialogues import JUDGED
from .scenes import Placed
from .tasks import TASKS, World, build, keywords
from .words import pick

# The tasks that have a form for a single thing.
THINGS = ("text_to_image", "image_to_text", "same_thing", "cross_lingual", "keyword_search")
TOKENS = {  # about what a document and the prompt's end take, where it is more than 12
    "image_to_text": 20, "scene_retrieval": 24, "composed": 16, "video_retrieval": 34, "moment": 34,
    "visual_document": 38,
}  # fmt: skip
Thing = tuple[str, str | None]  # a concept and its colour


@dataclass(frozen=True)
class Candidates:
    """N queries of one task with K documents each.

    pairs: (query, document), N * K, those of a query together. relevant: bool (N, K), at least one a query.
    """

    name: str
    pairs: list[tuple[Instance, Instance]]
    relevant: Tensor

    @property
    def instruction(self) -> str:
        return TASKS[self.name].instruction


def of_things(bank: SpriteBank, name: str, n: int, k: int, confusing: int, seed: int, strength: float) -> Candidates:
    """Candidates of single things in a task of THINGS, in augmented drawings.

    `confusing` of a query's documents are of the same subgroup, or of the same thing in another colour.
    """
    w, g = World("train", f"candidates of {name}", seed), torch.Generator().manual_seed(seed)
    coloured = 0.2 if name in ("text_to_image", "image_to_text", "same_thing") else 0.0
    things = [(key, w.tint(key, coloured)) for key in (w.key() for _ in range(n))]
    rows = []
    for thing in things:
        row = [thing, *(_confused(w, thing) for _ in range(confusing))]
        others = [other for other in things if other[0] != thing[0]]
        row += [pick(w.rng, others) for _ in range(k - len(row))]
        rows.append([row[i] for i in w.rng.permutation(k)])
    shown = list(dict.fromkeys(thing for row in rows for thing in row))
    if name in ("text_to_image", "same_thing"):
        documents = [{"image": picture} for picture in bank.drawn(shown, strength, g)]
    elif name == "image_to_text":
        documents = [{"text": _caption(w, thing)} for thing in shown]
    else:
        documents = [{"text": words.name(key)} for key, _ in shown]
    if name in ("image_to_text", "same_thing"):
        queries = [{"image": picture} for picture in bank.drawn(things, strength, g)]
    elif name == "text_to_image":
        queries = [{"text": _caption(w, thing)} for thing in things]
    elif name == "keyword_search":
        cues = [keywords(w, key, int(w.rng.integers(2, 5))) or [words.name(key)] for key, _ in things]
        queries = [{"text": ", ".join(found)} for found in cues]
    else:
        queries = [{"text": _foreign(w, key)} for key, _ in things]
    place = {thing: i for i, thing in enumerate(shown)}
    pairs = [(query, documents[place[x]]) for query, row in zip(queries, rows, strict=True) for x in row]
    relevant = [[x == thing for x in row] for thing, row in zip(things, rows, strict=True)]
    return Candidates(name, pairs, torch.tensor(relevant))


def _confused(w: World, thing: Thing) -> Thing:
    key, colour = thing
    if colour and w.rng.random() < 0.4:
        other = w.tint(key, 0.5)
        return (key, other) if other != colour else (key, None)
    near = w.neighbour(key)
    return near, colour if colour and w.rng.random() < 0.5 and w.belongs(near, colour) else None


def _caption(w: World, thing: Thing) -> str:
    key, colour = thing
    foreign = colour is None and w.rng.random() < 0.4
    language = pick(w.rng, tuple(words.CAPTION_FRAMES)) if foreign else "en"
    return words.caption_one(w.rng, Placed(key, "", tint=colour), language)


def _foreign(w: World, key: str) -> str:
    """The concept's name in another language, by a word of this split; in English if ten draws find none."""
    codes = [code for code in w.languages if code != "en"]
    found = (w.foreign(pick(w.rng, codes), key) for _ in range(10))
    return next((name for name in found if name), words.name(key))


def of_task(name: str, split: str, n: int, k: int, confusing: int, seed: int) -> Candidates:
    """Candidates of a task's sub-dataset: a right document, up to `confusing` that the task names, others at random."""
    q = build(name, split, max(n, 8), seed)  # a few queries more, if need be, so that there are other documents
    rng = np.random.default_rng([seed, n])
    pairs, relevant = [], []
    for query, labels in zip(q.queries[:n], q.relevance[:n], strict=True):
        rows = [pick(rng, labels.positives), *labels.negatives[:confusing]]
        others = [d for d in range(len(q.corpus)) if d not in {*labels.positives, *labels.negatives}]
        rows += rng.choice(others, k - len(rows), replace=len(others) < k).tolist()
        rows = [rows[i] for i in rng.permutation(k)]
        pairs += [(query, q.corpus[d]) for d in rows]
        relevant.append([d in labels.positives for d in rows])
    return Candidates(name, pairs, torch.tensor(relevant))


def draw(
    bank: SpriteBank, things: float, n: int, k: int, confusing: int, seed: int, strength: float, tokens: int
) -> Candidates:
    """Candidates of one task: of single things for a share `things` of the seeds, else of a task's sub-dataset.

    There n is less where a document is long, so that all take about `tokens` visual and text tokens.
    """
    rng = np.random.default_rng([seed, k])
    if rng.random() < things:
        return of_things(bank, pick(rng, (*THINGS[:3], *THINGS)), n, k, confusing, seed, strength)
    name = pick(rng, JUDGED)
    return of_task(name, "train", min(n, max(3, tokens // (k * TOKENS.get(name, 12)))), k, confusing, seed)
