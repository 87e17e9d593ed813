"""Every task of the report, composed from the seed pool: deterministic from a seed, labels exact.

`build(task, split, n, seed)` gives one sub-dataset, a quadruple (I, Q, C, R). Splits are by content, not
by seed: validation and test hold pairs of concepts, and pairs of a concept and a colour, that training
never shows, and in the tasks of text alone concepts, sets of keywords and foreign words; the test split
alone is drawn in the two test styles. Taught in notebooks/03.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..choices import SPLITS
from ..records import Instance, Quadruple, Relevance
from . import sprites, words
from .scenes import BACKGROUNDS, COLOURS, MOTIONS, PATTERNS, Block, Crop, Film, Frame, Page, Placed, Scene, Track
from .words import NUMBERS, PLACES, SIZES, describe, pick

CENTRES = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))  # in the order of words.PLACES
BIG, SMALL = 0.44, 0.27
TOPICS = (
    "Harvest", "Market", "Travel", "Music", "Garden", "Kitchen", "School", "Sports", "Weather", "Museum", "Festival",
    "Factory", "Library", "Hospital", "Harbour", "Airport", "Forest", "Village", "Theatre", "Workshop", "Energy",
    "Safety", "Housing", "Fishing", "Science", "Culture", "Budget", "Staff", "Sales", "Stock",
)  # fmt: skip
PAPERS = ("report", "survey", "plan", "notes", "review", "guide")


def bucket(*parts: str) -> int:
    """0 to 9 from content, the same on every machine: 0 is for the test split, 1 for validation."""
    return zlib.crc32("|".join(sorted(parts)).encode()) % 10


@dataclass(frozen=True)
class World:
    """What one split may show, and its random numbers."""

    split: str
    task: str
    seed: int

    def __post_init__(self):
        if self.split not in SPLITS:
            raise ValueError(f"unknown split {self.split!r}; the splits are {', '.join(SPLITS)}")

    @cached_property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(f"{self.task}/{self.split}".encode())])

    @property
    def styles(self) -> tuple[str, ...]:
        return sprites.TEST_STYLES if self.split == "test" else sprites.TRAIN_STYLES

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Concepts that can be drawn in this split's styles."""
        return tuple(c.key for c in sprites.concepts() if any(sprites.has_style(s, c.key) for s in self.styles))

    @cached_property
    def by_subgroup(self) -> dict[str, list[str]]:
        table: dict[str, list[str]] = {}
        for key in self.keys:
            table.setdefault(sprites.concept_by_key()[key].subgroup, []).append(key)
        return table

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(code for code in sprites.languages() if code not in sprites.UNSEEN_LANGUAGES)

    def belongs(self, *parts: str) -> bool:
        """Whether a combination is this split's: held-out ones appear in validation or in the test alone."""
        held = {"test": 0, "validation": 1}
        return bucket(*parts) == held[self.split] if self.split in held else bucket(*parts) >= 2

    @cached_property
    def _deck(self) -> list[str]:
        return []

    def own_key(self) -> str:
        """The next concept that is this split's alone: for tasks that hold out a concept itself."""
        while not self.belongs(k := self.key()):
            pass
        return k

    def key(self) -> str:
        """The next concept of a shuffled deck of all: none comes twice before each came once."""
        if not self._deck:
            self._deck.extend(self.rng.permutation(self.keys).tolist())
        return self._deck.pop()

    def foreign(self, code: str, key: str) -> str | None:
        """A concept's name in a language, if it has one and the word is this split's (languages share some)."""
        name = sprites.name_in(code, key)
        return name if name and self.belongs(key, name.lower()) else None

    def style(self, key: str) -> str:
        return pick(self.rng, [s for s in self.styles if sprites.has_style(s, key)])

    def hand(self) -> int:
        """0, a style's own drawing, or for half of what training shows a number by which it is redrawn."""
        return int(self.rng.integers(1, 2**31)) if self.split == "train" and self.rng.random() < 0.5 else 0

    def placed(self, key: str, x: float, y: float, size: float, tint: str | None) -> Placed:
        return Placed(key, self.style(key), x, y, size, tint, self.hand())

    def neighbour(self, key: str) -> str:
        """Another concept of the same subgroup (a confusing one), or any other where it is alone."""
        near = [k for k in self.by_subgroup[sprites.concept_by_key()[key].subgroup] if k != key]
        return pick(self.rng, near) if near else self.other(key)

    def other(self, *keys: str) -> str:
        while (k := self.key()) in keys:
            pass
        return k

    def tint(self, key: str, share: float) -> str | None:
        """A colour for a concept, with probability `share`; the pair is this split's."""
        if self.rng.random() >= share:
            return None
        for _ in range(40):
            colour = pick(self.rng, tuple(COLOURS))
            if self.belongs(key, colour):
                return colour
        return None

    def ground(self) -> dict[str, str]:
        return {"background": pick(self.rng, tuple(BACKGROUNDS)), "pattern": pick(self.rng, PATTERNS)}

    def clutter(self, beside: Sequence[str]) -> tuple[Placed, ...]:
        """Mostly nothing, or a concept that may be seen together with those `beside` it."""
        if self.rng.random() < 0.7:
            return ()
        k = self.key()
        while self.split == "train" and not all(self.belongs(k, other) for other in beside):
            k = self.key()
        x, y = self.rng.uniform(0.2, 0.8, 2).round(2).tolist()
        return (Placed(k, self.style(k), x, y, 0.3),)

    def single(self, key: str | None = None, tinted: float = 0.3) -> Scene:
        """One object, 64 x 64 pixels: 4 visual tokens."""
        k = key or self.key()
        size = round(float(self.rng.uniform(0.7, 0.98)), 2)
        x, y = (0.5 + self.rng.uniform(-0.5, 0.5, 2) * (1 - size)).round(2).tolist()
        return Scene((self.placed(k, x, y, size, self.tint(k, tinted)),), **self.ground())

    def keys_together(self, n: int) -> list[str]:
        """n different concepts that may share a picture: held-out splits show at least one held-out pair."""
        for _ in range(2000):
            keys = [self.key() for _ in range(n)]
            if len(set(keys)) < n:
                continue
            pairs = [(a, b) for i, a in enumerate(keys) for b in keys[:i]]
            if self.split == "train":
                if all(self.belongs(a, b) for a, b in pairs):
                    return keys
            elif any(self.belongs(a, b) for a, b in pairs):
                return keys
        raise RuntimeError(f"no {n} concepts found that the {self.split} split may show together")

    def scene(self, n: int, *, same: bool = False, tinted: float = 0.3, sizes: bool = False) -> Scene:
        """n objects in the quarters of a picture of 128 x 128 pixels: 16 visual tokens."""
        keys = [self.key()] * n if same else self.keys_together(n)
        cells = self.rng.permutation(4)[:n]
        tint = self.tint(keys[0], tinted) if same else None
        objects = []
        for k, cell in zip(keys, cells, strict=True):
            x, y = CENTRES[cell]
            size = SMALL if sizes and self.rng.random() < 0.5 else BIG
            objects.append(self.placed(k, x, y, size, tint if same else self.tint(k, tinted)))
        objects.sort(key=lambda o: (o.y, o.x))
        return Scene(tuple(objects), **self.ground(), pixels=128, clutter=self.clutter(keys))

    def film(self, events: Sequence[tuple[str, str]], seconds: float = 4.0, tinted: float = 0.2) -> Film:
        """A clip of 96 x 96 pixels (9 visual tokens a pair of frames); events (concept, motion) follow each other."""
        n = len(events)
        places = [(0.5, 0.5)] if n == 1 else [(0.5, 0.27), (0.5, 0.73)] if n == 2 else list(CENTRES)
        tracks = []
        for i, (k, motion) in enumerate(events):
            x, y = places[i]
            thing = self.placed(k, x, y, 0.5 if n == 1 else 0.42, self.tint(k, tinted))
            tracks.append(Track(thing, motion, round(i / n, 2), round((i + 1) / n, 2)))
        return Film(tuple(tracks), **self.ground(), pixels=96, seconds=seconds)


class Corpus:
    """Documents without repeats; `row` gives a document's position, adding it if it is new."""

    def __init__(self):
        self.items: list[Instance] = []
        self._rows: dict = {}

    def row(self, **instance) -> int:
        key = tuple(sorted(instance.items()))
        if key not in self._rows:
            self._rows[key] = len(self.items)
            self.items.append(instance)
        return self._rows[key]


@dataclass(frozen=True)
class TaskInfo:
    """A task: its column in the stage table, its instruction, and the function that fills a sub-dataset."""

    column: str
    instruction: str
    fill: Callable[[World, int], tuple[list[Instance], Corpus, list[Relevance]]]


TASKS: dict[str, TaskInfo] = {}


def task(column: str, instruction: str):
    def register(fill):
        TASKS[fill.__name__] = TaskInfo(column, instruction, fill)
        return fill

    return register


def build(name: str, split: str = "train", n: int = 1000, seed: int = 0) -> Quadruple:
    """A sub-dataset of n queries. The same (name, split, n, seed) is the same everywhere."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}")
    info, world = TASKS[name], World(split, name, seed)
    queries, corpus, relevance = info.fill(world, n)
    meta = {"split": split, "seed": seed}
    return Quadruple(name, info.column, info.instruction, queries, corpus.items, relevance, meta)


def _own_candidates(world: World, corpus: Corpus, relevance: list[Relevance], n: int) -> list[Relevance]:
    """Give each query n candidates: its positives and negatives, filled up at random from the corpus."""
    out = []
    for labels in relevance:
        rows = dict.fromkeys((*labels.positives, *labels.negatives))
        while len(rows) < min(n, len(corpus.items)):
            rows[int(world.rng.integers(len(corpus.items)))] = None
        out.append(replace(labels, candidates=tuple(sorted(rows))))
    return out


# --- image classification -----------------------------------------------------------------------------------


@task("image_cls", "Name the thing in the picture.")
def concept(w: World, n: int):
    queries, corpus, relevance = [], Corpus(), []
    for k in w.keys:
        corpus.row(text=words.name(k))
    for _ in range(n):
        k = w.key()
        queries.append({"image": w.single(k)})
        wrong = [corpus.row(text=words.name(w.neighbour(k))) for _ in range(3)]
        right = corpus.row(text=words.name(k))
        relevance.append(Relevance((right,), tuple(dict.fromkeys(r for r in wrong if r != right))))
    return queries, corpus, relevance


def _labelled(
    w: World, keys: Iterable[str], label: Callable[[str], str], labels: Sequence[str], make: Callable[[str], Instance]
):
    """Each of `keys` as a query, by `make`, and its label among all labels."""
    queries, corpus, relevance = [], Corpus(), []
    for text in labels:
        corpus.row(text=text)
    for k in keys:
        queries.append(make(k))
        right = corpus.row(text=label(k))
        wrong = [r for r in w.rng.permutation(len(corpus.items))[:5].tolist() if r != right]
        relevance.append(Relevance((right,), tuple(wrong[:3])))
    return queries, corpus, relevance


def _group(key: str) -> str:
    return words.GROUPS[sprites.concept_by_key()[key].group]


def _subgroup(key: str) -> str:
    return words.subgroup_label(sprites.concept_by_key()[key].subgroup)


@task("image_cls", "Decide which broad category the picture belongs to.")
def group(w: World, n: int):
    labels = list(words.GROUPS.values())
    return _labelled(w, (w.key() for _ in range(n)), _group, labels, lambda k: {"image": w.single(k)})


@task("image_cls", "Decide which kind of thing the picture shows.")
def subgroup(w: World, n: int):
    labels = sorted({_subgroup(k) for k in w.keys})
    return _labelled(w, (w.key() for _ in range(n)), _subgroup, labels, lambda k: {"image": w.single(k)})


@task("image_cls", "Do with the picture what is asked for.")  # not in MMEB-mini: each query has its own instruction
def instructed(w: World, n: int):
    """A picture of one thing under one of several instructions; what another of them asks for is wrong.

    In every other task all documents are of one kind, so that a model need not read its instruction.
    """
    queries, corpus, relevance = [], Corpus(), []
    while len(queries) < n:
        scene = w.single(tinted=0.0)
        thing = scene.objects[0]
        styles = [s for s in w.styles if s != thing.style and sprites.has_style(s, thing.key)]
        name, kind, category = words.name(thing.key), _subgroup(thing.key), _group(thing.key)
        if not styles or len({name.lower(), kind.lower(), category.lower()}) < 3:
            continue
        drawn = replace(scene, objects=(replace(thing, style=pick(w.rng, styles), hand=w.hand()),))
        rows = {
            "concept": corpus.row(text=name),
            "image_to_text": corpus.row(text=words.with_article(name)),
            "subgroup": corpus.row(text=kind),
            "group": corpus.row(text=category),
            "same_thing": corpus.row(image=drawn),
        }
        asked = pick(w.rng, tuple(rows))
        alike = ("concept", "image_to_text")  # the same thing in about the same words: neither is wrong for the other
        wrong = [row for task, row in rows.items() if task != asked and not (task in alike and asked in alike)]
        queries.append({"image": scene, "instruction": TASKS[asked].instruction})
        relevance.append(Relevance((rows[asked],), tuple(w.rng.permutation(wrong).tolist())))
    return queries, corpus, relevance


# --- image question answering -------------------------------------------------------------------------------


def ask(w: World, scene: Scene) -> tuple[str, str, str] | None:
    """(question, answer, plausible wrong answer) about a scene; None if this question does not fit it."""
    r, things = w.rng, scene.objects
    thing = pick(r, things)
    noun, place = describe(thing), words.place_of(thing)
    rest = [t for t in things if t is not thing]
    alike = len({(t.key, t.tint) for t in things}) == 1
    kind = int(r.integers(7))
    if kind == 0 and not alike:  # what is there?
        wrong = words.name(pick(r, rest).key) if rest else words.name(w.neighbour(thing.key))
        frames = ("What is at the {}?", "Which thing is in the {} corner?", "{}: what do you see?")
        return pick(r, frames).format(place), words.name(thing.key), wrong
    if kind == 1 and not alike:  # where?
        frames = ("Where is the {}?", "In which corner is the {}?", "Find the {}: where is it?")
        return pick(r, frames).format(noun), place, pick(r, [p for p in PLACES if p != place])
    if kind == 2 and alike:  # how many?
        count = NUMBERS[len(things)]
        frames = ("How many pictures of {} are there?", "Count: {}.", "How often do you see {}?")
        return pick(r, frames).format(noun), count, pick(r, [c for c in NUMBERS[1:] if c != count])
    if kind == 3 and thing.tint:  # which colour?
        wrong = pick(r, [c for c in COLOURS if c != thing.tint])
        frames = ("What colour is the {}?", "Which colour does the {} have?", "The {}: which colour?")
        return pick(r, frames).format(words.name(thing.key)), thing.tint, wrong
    two_sizes = len({t.size for t in things}) == 2
    if kind == 4 and two_sizes and len(things) == 2:  # which is bigger?
        small, big = sorted(things, key=lambda t: t.size)
        a, b = (big, small) if r.random() < 0.5 else (small, big)
        frames = ("Which of the two is {}?", "Of the two things, which one is {}?")
        return pick(r, frames).format("bigger" if a is big else "smaller"), words.name(a.key), words.name(b.key)
    if kind == 5 and two_sizes:  # which size?
        size, wrong = SIZES if thing.size == SMALL else SIZES[::-1]
        return pick(r, ("How big is the {}?", "Which size is the {}?", "The {}: which size?")).format(noun), size, wrong
    if kind == 6 and len(things) >= 2 and not alike:  # what is next to it?
        for other in rest:
            if abs(other.y - thing.y) < 0.1:
                side = "left" if other.x < thing.x else "right"
                question = pick(r, ("What is to the {} of the {}?", "Which thing is {} of the {}?")).format(side, noun)
            elif abs(other.x - thing.x) < 0.1:
                side = "above" if other.y < thing.y else "below"
                question = pick(r, ("What is {} the {}?", "Which thing is {} the {}?")).format(side, noun)
            else:
                continue
            return question, words.name(other.key), words.name(w.neighbour(other.key))
    return None


@task("image_qa", "Answer the question about the picture.")
def image_qa(w: World, n: int):
    queries, corpus, relevance = [], Corpus(), []
    for text in (*PLACES, *NUMBERS[1:], *COLOURS, *SIZES):
        corpus.row(text=text)
    while len(queries) < n:
        if w.rng.random() < 0.3:
            scene = w.scene(int(w.rng.integers(1, 5)), same=True)
        else:
            scene = w.scene(int(w.rng.integers(2, 5)), tinted=0.4, sizes=w.rng.random() < 0.4)
        asked = ask(w, scene)
        if asked:
            question, answer, wrong = asked
            queries.append({"image": scene, "text": question})
            relevance.append(Relevance((corpus.row(text=answer),), (corpus.row(text=wrong),)))
    return queries, corpus, _own_candidates(w, corpus, relevance, 50)


# --- image retrieval ----------------------------------------------------------------------------------------


def _language(w: World, english: float = 0.7) -> str:
    return "en" if w.rng.random() < english else pick(w.rng, tuple(words.CAPTION_FRAMES))


def shows(scene: Scene) -> tuple:
    """What a picture shows, however it is drawn: two pictures that show the same answer the same query."""
    return tuple((o.key, o.tint) for o in scene.objects)


def _label_alike(content: Sequence, relevance: list[Relevance]) -> list[Relevance]:
    """Label every document that says or shows what a query's positive does, so that none is a false negative.

    content: of each document what it shows, as a value to compare.
    """
    alike: dict = {}
    for row, shown in enumerate(content):
        alike.setdefault(shown, []).append(row)
    out = []
    for labels in relevance:
        positives = tuple(alike[content[labels.positives[0]]])
        out.append(Relevance(positives, tuple(r for r in labels.negatives if r not in positives)))
    return out


def _pictured(corpus: Corpus) -> list[tuple]:
    return [shows(document["image"]) for document in corpus.items]


@task("image_ret", "Find the picture that matches the text.")
def text_to_image(w: World, n: int):
    queries, corpus, relevance = [], Corpus(), []
    for _ in range(n):
        k = w.key()
        scene = w.single(k)
        thing = scene.objects[0]
        language = "en" if thing.tint else _language(w)
        queries.append({"text": words.caption_one(w.rng, thing, language)})
        near = w.single(w.neighbour(k)) if w.rng.random() < 0.3 else None
        relevance.append(Relevance((corpus.row(image=scene),), (corpus.row(image=near),) if near else ()))
    return queries, corpus, _label_alike(_pictured(corpus), relevance)


@task("image_ret", "Find the text that describes the picture.")
def image_to_text(w: World, n: int):
    queries, corpus, relevance = [], Corpus(), []
    told: dict[int, tuple] = {}  # what each text describes
    for _ in range(n):
        scene = w.single() if w.rng.random() < 0.6 else w.scene(int(w.rng.integers(2, 4)))
        things = scene.objects
        language = "en" if len(things) > 1 or things[0].tint else _language(w, 0.8)
        if len(things) == 1:
            text = words.caption_one(w.rng, things[0], language)
        else:
            text = words.caption_scene(w.rng, things, False)
        queries.append({"image": scene})
        row = corpus.row(text=text)
        told.setdefault(row, shows(scene) if len(things) == 1 else (*shows(scene), text))
        relevance.append(Relevance((row,)))
    return queries, corpus, _label_alike([told[row] for row in range(len(corpus.items))], relevance)


@task("image_ret", "Find the picture of the described scene.")
def scene_retrieval(w: World, n: int):
    queries, corpus, relevance = [], Corpus(), []
    for _ in range(n):
        sizes = bool(w.rng.random() < 0.3)
        same = bool(w.rng.random() < 0.25)
        scene = w.scene(int(w.rng.integers(2, 5 if same else 4)), same=same, sizes=sizes and not same)
        queries.append({"text": words.caption_scene(w.rng, scene.objects, sizes and not same)})
        wrong = replace(scene, objects=_rearranged(w, scene.objects))
        relevance.append(Relevance((corpus.row(image=scene),), (corpus.row(image=wrong),)))
    return queries, corpus, relevance


def _rearranged(w: World, things: tuple[Placed, ...]) -> tuple[Placed, ...]:
    """The same scene with one object replaced by a confusing one, or left out."""
    i = int(w.rng.integers(len(things)))
    rest = things[:i] + things[i + 1 :]
    alike = len(things) > 1 and len({t.key for t in things}) == 1
    for _ in range(0 if alike else 20):
        k = w.neighbour(things[i].key)
        if w.split != "train" or all(w.belongs(k, t.key) for t in rest):
            return things[:i] + (replace(things[i], key=k, style=w.style(k)),) + things[i + 1 :]
    return rest or (replace(things[i], key=(k := w.other(things[i].key)), style=w.style(k)),)


@task("image_ret", "Find the same thing drawn by another hand.")
def same_thing(w: World, n: int):
    queries, corpus, relevance = [], Corpus(), []
    while len(queries) < n:
        k = w.key()
        if sum(sprites.has_style(s, k) for s in w.styles) < 2:
            continue
        first, second = w.rng.permutation([s for s in w.styles if sprites.has_style(s, k)])[:2].tolist()
        a, b = w.single(k, 0.0), w.single(k, 0.0)
        a = replace(a, objects=(replace(a.objects[0], style=first),))
        b = replace(b, objects=(replace(b.objects[0], style=second),))
        queries.append({"image": a})
        relevance.append(Relevance((corpus.row(image=b),)))
    return queries, corpus, _label_alike(_pictured(corpus), relevance)


@task("image_ret", "Find the picture that results from the change.")
def composed(w: World, n: int):
    queries, corpus, relevance = [], Corpus(), []
    while len(queries) < n:
        kind = int(w.rng.integers(3))
        if kind == 0:  # recolour
            before = w.single(tinted=0.0)
            thing = before.objects[0]
            colour = w.tint(thing.key, 1.0)
            if colour is None:
                continue
            text = pick(w.rng, ("the same in {}", "make it {}", "now {}", "change its colour to {}")).format(colour)
            after = replace(before, objects=(replace(thing, tint=colour),))
        elif kind == 1:  # add
            scene = w.scene(2, tinted=0.2)
            kept, new = scene.objects if w.rng.random() < 0.5 else scene.objects[::-1]
            before = replace(scene, objects=(kept,))
            noun = words.with_article(describe(new))
            text = pick(w.rng, ("add {} at the {}", "with {} at the {}", "put {} in the {}")).format(
                noun, words.place_of(new)
            )
            after = scene
        else:  # replace
            before = w.single(tinted=0.0)
            thing = before.objects[0]
            k = w.other(thing.key)
            if not w.belongs(thing.key, k):
                continue
            text = pick(w.rng, ("replace it with {}", "{} instead", "the same picture, but {}")).format(
                words.with_article(words.name(k))
            )
            after = replace(before, objects=(replace(thing, key=k, style=w.style(k)),))
        queries.append({"image": before, "text": text})
        relevance.append(Relevance((corpus.row(image=after),), (corpus.row(image=before),)))
    return queries, corpus, relevance


# --- grounding ----------------------------------------------------------------------------------------------


@task("image_gd", "Find the part of the picture that the phrase points to.")
def grounding(w: World, n: int):
    queries, corpus, relevance = [], Corpus(), []
    while len(queries) < n:
        scene = w.scene(int(w.rng.integers(2, 5)), tinted=0.3)
        thing = pick(w.rng, scene.objects)
        frames = ("the {n}", "{n}", "the thing at the {p}", "the {n} at the {p}", "where is the {n}?")
        text = pick(w.rng, frames).format(n=describe(thing), p=words.place_of(thing))
        crops = [corpus.row(image=Crop(scene, t.x, t.y)) for t in scene.objects]
        right = crops[scene.objects.index(thing)]
        queries.append({"image": scene, "text": text})
        relevance.append(Relevance((right,), tuple(c for c in crops if c != right)))
    return queries, corpus, _own_candidates(w, corpus, relevance, 12)


# --- video --------------------------------------------------------------------------------------------------


@task("video_cls", "Say what happens in the clip.")
def motion(w: World, n: int):
    queries, corpus, relevance = [], Corpus(), []
    for m in MOTIONS:
        corpus.row(text="something " + words.MOTION_WORDS[m][0])
    for _ in range(n):
        m = pick(w.rng, MOTIONS)
        queries.append({"video": w.film([(w.key(), m)])})
        right = corpus.row(text="something " + words.MOTION_WORDS[m][0])
        wrong = [r for r in w.rng.permutation(len(MOTIONS)).tolist() if r != right]
        relevance.append(Relevance((right,), tuple(wrong[:3])))
    return queries, corpus, relevance


def _events(w: World, n: int) -> list[tuple[str, str]]:
    keys = w.keys_together(n) if n > 1 else [w.key()]
    motions = w.rng.permutation([m for m in MOTIONS if m != "still"])[:n].tolist()
    return list(zip(keys, motions, strict=True))


def _ask_film(w: World, film: Film) -> tuple[str, str, str]:
    """(question, answer, plausible wrong answer) about a clip of two events."""
    r = w.rng
    first, second = film.tracks
    a, b = (first, second) if r.random() < 0.5 else (second, first)
    name_a, name_b = words.name(a.thing.key), words.name(b.thing.key)
    doing = pick(r, words.MOTION_WORDS[a.motion])
    kind = int(r.integers(3))
    if kind == 0:
        return pick(r, ("What {}?", "Which thing {}?")).format(doing), name_a, name_b
    if kind == 1:
        frames = ("What does the {} do?", "What happens to the {}?")
        said = "it " + words.MOTION_WORDS[a.motion][0]
        return pick(r, frames).format(describe(a.thing)), said, "it " + words.MOTION_WORDS[b.motion][0]
    when = "first" if a is first else "last"
    frames = ("What moves or changes {}?", "Which thing does something {}?", "Whose turn comes {}?")
    return pick(r, frames).format(when), name_a, name_b


@task("video_qa", "Answer the question about the clip.")
def video_qa(w: World, n: int):
    queries, corpus, relevance = [], Corpus(), []
    for m in MOTIONS:
        corpus.row(text="it " + words.MOTION_WORDS[m][0])
    for _ in range(n):
        film = w.film(_events(w, 2))
        question, answer, wrong = _ask_film(w, film)
        queries.append({"video": film, "text": question})
        relevance.append(Relevance((corpus.row(text=answer),), (corpus.row(text=wrong),)))
    return queries, corpus, _own_candidates(w, corpus, relevance, 20)


def _told(w: World, film: Film) -> str:
    return words.caption_film(w.rng, [(t.thing, t.motion) for t in film.tracks])


@task("video_ret", "Find the clip that the text describes.")
def video_retrieval(w: World, n: int):
    queries, corpus, relevance = [], Corpus(), []
    for _ in range(n):
        film = w.film(_events(w, 1 if w.rng.random() < 0.5 else 2))
        i = int(w.rng.integers(len(film.tracks)))
        track = film.tracks[i]
        other = pick(w.rng, [m for m in MOTIONS if m != track.motion])
        wrong = replace(film, tracks=film.tracks[:i] + (replace(track, motion=other),) + film.tracks[i + 1 :])
        queries.append({"text": _told(w, film)})
        relevance.append(Relevance((corpus.row(video=film),), (corpus.row(video=wrong),)))
    return queries, corpus, relevance


@task("video_mret", "Find the moment of the long clip that the text describes.")
def moment(w: World, n: int):
    """A long film as its five segments of one event each; the query names one, with a keyframe in a third of cases."""
    queries, corpus, relevance = [], Corpus(), []
    while len(queries) < n:
        keys = w.keys_together(3)
        events = [(pick(w.rng, keys), pick(w.rng, MOTIONS)) for _ in range(5)]
        if len(set(events)) < 5:
            continue
        ground, tints = w.ground(), {k: w.tint(k, 0.2) for k in keys}
        things = {k: w.placed(k, 0.5, 0.5, 0.5, tints[k]) for k in keys}
        segments = [Film((Track(things[k], m),), **ground, pixels=96, seconds=4.0) for k, m in events]
        rows = [corpus.row(video=s) for s in segments]
        for i in w.rng.permutation(5)[: min(2, n - len(queries))].tolist():
            query: Instance = {"text": _told(w, segments[i])}
            if w.rng.random() < 0.33:
                there = 0.75 if events[i][1] == "appear" else 0.25  # when the thing can be seen
                query["image"] = Frame(segments[i], there)
            queries.append(query)
            # a clear temporal gap: the neighbours of the right segment are not counted as wrong
            far = tuple(r for j, r in enumerate(rows) if abs(j - i) > 1)
            relevance.append(Relevance((rows[i],), far, candidates=tuple(rows)))
    # each query ranks its own film's segments and five of other films
    fuller = []
    for labels in relevance:
        rows = dict.fromkeys(labels.candidates)
        while len(rows) < min(10, len(corpus.items)):
            rows[int(w.rng.integers(len(corpus.items)))] = None
        fuller.append(replace(labels, candidates=tuple(sorted(rows))))
    return queries, corpus, fuller


# --- visual documents ---------------------------------------------------------------------------------------


def _page(w: World) -> tuple[Page, list[str]]:
    """A page and questions that it alone should answer."""
    r = w.rng
    while True:
        topic, paper, year = pick(r, TOPICS), pick(r, PAPERS), str(int(r.integers(2010, 2030)))
        if w.belongs(topic, year):  # what every heading names
            break
    heading = pick(r, (f"{topic} {paper} {year}", f"{year} {topic} {paper}", f"{topic} {year}"))
    subject = (f"{topic} {paper}" if paper in heading else topic).lower()
    keys = w.keys_together(4)
    icons = tuple((w.style(k), k) for k in keys)
    names = [words.name(k) for k in keys]
    questions = [f"the page titled {heading}"]
    if r.random() < 0.5:
        values = tuple(int(v) for v in r.permutation(np.arange(2, 10))[:3])
        blocks = [Block("bars", icons=icons[:3], values=values), Block("icons", icons=icons[3:])]
        top, low = names[int(np.argmax(values))], names[int(np.argmin(values))]
        questions += [
            f"{subject}: a chart in which {top} is the highest",
            f"chart of {names[0]}, {names[1]} and {names[2]}",
            f"bar chart where {top} beats {low}",
            f"{subject} with a picture of {names[3]} below the chart",
        ]
    else:
        values = tuple(int(v) for v in r.integers(10, 99, 3))
        labels = tuple(n.split()[-1][:12] for n in names[:3])
        blocks = [
            Block("table", labels, icons[:3], values),
            Block("words", (pick(r, TOPICS).lower() + " and " + pick(r, TOPICS).lower(),)),
        ]
        questions += [
            f"{subject}: how many of {names[0]}?",
            f"table of {names[0]}, {names[1]} and {names[2]}",
            f"{subject} with the number of {names[1]}",
            f"which page lists {names[0]} and {names[2]}?",
        ]
    return Page(heading, tuple(blocks), pick(r, ("blue", "green", "red", "purple", "brown"))), questions


@task("visdoc", "Find the page that answers the question.")
def visual_document(w: World, n: int):
    queries, corpus, relevance = [], Corpus(), []
    while len(queries) < n:
        page, questions = _page(w)
        row = corpus.row(image=page)
        for i in w.rng.permutation(len(questions))[: min(2, n - len(queries))].tolist():
            queries.append({"text": questions[i]})
            relevance.append(Relevance((row,)))
    return queries, corpus, relevance


# --- text ---------------------------------------------------------------------------------------------------


def keywords(w: World, key: str, n: int, language: str = "en") -> list[str]:
    """Up to n keywords of a concept that are not its name."""
    known = [k for k in sprites.keywords_in(language, key) if k.lower() != words.name(key)]
    return w.rng.permutation(known)[:n].tolist() if known else []


@task("text_ret", "Find the name of what is described.")
def keyword_search(w: World, n: int):
    queries, corpus, relevance = [], Corpus(), []
    for k in w.keys:
        corpus.row(text=words.name(k))
    while len(queries) < n:
        k = w.key()
        cues = keywords(w, k, int(w.rng.integers(2, 5)))
        if len(cues) < 2 or not w.belongs(*cues):
            continue
        frames = ("{c}", "a kind of {s}: {c}", "looking for {c}", "{g}, {c}", "which {s} has to do with {c}?")
        text = pick(w.rng, frames).format(c=", ".join(cues), s=_subgroup(k), g=_group(k))
        queries.append({"text": text})
        relevance.append(Relevance((corpus.row(text=words.name(k)),)))
    return queries, corpus, relevance


@task("text_cls", "Decide which broad category the text belongs to.")
def text_group(w: World, n: int):
    def text(k: str) -> Instance:
        drawn = (keywords(w, k, 2) for _ in range(20))
        cues = next((c for c in drawn if w.belongs(*c)), [])  # another concept may have the same
        frames = ("{n}", "{n}: {c}", "something about {c}") if cues else ("{n}",)
        return {"text": pick(w.rng, frames).format(n=words.name(k), c=" and ".join(cues))}

    return _labelled(w, (w.own_key() for _ in range(n)), _group, list(words.GROUPS.values()), text)


def _translation(w: World, n: int, codes: Sequence[str]):
    queries, corpus, relevance = [], Corpus(), []
    for k in w.keys:
        corpus.row(text=words.name(k))
    while len(queries) < n:
        k, code = w.key(), pick(w.rng, codes)
        foreign = w.foreign(code, k)
        if foreign:
            queries.append({"text": foreign})
            relevance.append(Relevance((corpus.row(text=words.name(k)),)))
    return queries, corpus, relevance


@task("cross_lingual", "Find the English name of the same thing.")
def cross_lingual(w: World, n: int):
    return _translation(w, n, [code for code in w.languages if code != "en"])


@task("cross_lingual", "Find the English name of the same thing.")
def unseen_languages(w: World, n: int):
    if w.split != "test":
        raise ValueError("unseen_languages exists in the test split only: no training may show these languages")
    return _translation(w, n, sprites.UNSEEN_LANGUAGES)


def likeness(a: str, b: str) -> float:
    """Graded similarity of two concepts, 0 to 5: category tree and shared keywords."""
    if a == b:
        return 5.0
    one, two = sprites.concept_by_key()[a], sprites.concept_by_key()[b]
    shared = set(sprites.keywords_in("en", a)) & set(sprites.keywords_in("en", b))
    both = set(sprites.keywords_in("en", a)) | set(sprites.keywords_in("en", b))
    overlap = len(shared) / max(len(both), 1)
    tree = 2.5 if one.subgroup == two.subgroup else 1.0 if one.group == two.group else 0.0
    return round(tree + 2.0 * min(1.0, 2 * overlap), 2)


@task("sts", "Judge how similar the two texts are in meaning.")
def similarity(w: World, n: int):
    queries, corpus, relevance = [], Corpus(), []

    def say(k: str) -> str:
        noun, cues = words.name(k), keywords(w, k, 2)
        frames = ("{n}", "{a}", "{n} ({c})", "{c}, that is {n}") if cues else ("{n}", "{a}")
        return pick(w.rng, frames).format(n=noun, a=words.with_article(noun), c=", ".join(cues))

    while len(queries) < n:
        a = w.key()
        draw = w.rng.random()
        b = a if draw < 0.2 else w.neighbour(a) if draw < 0.6 else w.other(a)
        if 0.6 <= draw < 0.75:  # the same group, another subgroup
            same = [k for k in w.keys if sprites.concept_by_key()[k].group == sprites.concept_by_key()[a].group]
            b = pick(w.rng, same)
        if not w.belongs(a, b):
            continue
        queries.append({"text": say(a)})
        relevance.append(Relevance((corpus.row(text=say(b)),), scores=(likeness(a, b),)))
    return queries, corpus, relevance


# --- the benchmark ------------------------------------------------------------------------------------------

MMEB_MINI = (
    "concept", "group", "subgroup", "image_qa", "text_to_image", "image_to_text", "scene_retrieval", "same_thing",
    "composed", "grounding", "motion", "video_qa", "video_retrieval", "moment", "visual_document", "keyword_search",
    "text_group", "similarity", "cross_lingual",
)  # fmt: skip


def benchmark(split: str = "test", n: int = 300, seed: int = 1) -> list[Quadruple]:
    """MMEB-mini: every task with n queries; the test split adds the languages that no training shows."""
    names = MMEB_MINI + (("unseen_languages",) if split == "test" else ())
    return [build(name, split, n, seed) for name in names]


def unseen_styles(seed: int = 1) -> list[Quadruple]:
    """Single-object text-to-image retrieval in each test style: one query and one picture a concept."""
    out = []
    for style in sprites.TEST_STYLES:
        w = World("test", f"unseen/{style}", seed)
        keys = [k for k in w.keys if sprites.has_style(style, k)]
        queries = [{"text": f"a picture of {words.with_article(words.name(k))}"} for k in keys]
        corpus = [{"image": Scene((Placed(k, style),))} for k in keys]
        relevance = [Relevance((i,)) for i in range(len(keys))]
        instruction = TASKS["text_to_image"].instruction
        out.append(Quadruple(f"unseen/{style}", "image_ret", instruction, queries, corpus, relevance))
    return out
