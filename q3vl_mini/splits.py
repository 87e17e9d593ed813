"""Pairs as training, validation and test data. The split is by document, not by row.

Rows that share a document or a query, or near duplicates of them, are on the same side; otherwise a model would be
asked at the test for what it was shown in training. The same pairs are split in the same way, whatever their order.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from .choices import SPLITS
from .likeness import Groups, Likeness
from .pages import PdfPage
from .pairs import Fault, Pair
from .records import MODALITIES, Instance, Quadruple, Relevance

SHARES = {"test": 0.2, "validation": 0.1}  # of the rows; training gets the rest
INSTRUCTION = "Find the document that matches the query."
PRIORITY = ("test", "validation", "train")  # a document that is on several sides stays on the first of these


def components(pairs: Sequence[Pair], likeness: Likeness) -> list[list[int]]:
    """Positions of pairs that hang together through near-equal documents or queries, in an order of their content."""
    groups, keys = Groups(), []
    for i, pair in enumerate(pairs):
        keys.append([("document", likeness.near(d)) for d in pair.positives] + [("query", likeness.near(pair.query))])
        groups.join([i, *keys[-1]])
    rows: dict = {}
    for i in range(len(pairs)):
        rows.setdefault(groups.find(i), []).append(i)
    return sorted(rows.values(), key=lambda part: min(repr(key) for i in part for key in keys[i]))


def split_by_document(
    pairs: Sequence[Pair], likeness: Likeness, shares: Mapping[str, float] = SHARES, seed: int = 0
) -> list[str]:
    """The side of each pair: "train", or one of `shares` with at most that share of the rows.

    Raises ValueError if a side stays empty because too many rows hang together.
    """
    parts = components(pairs, likeness)

    def drawn(number: int) -> bytes:
        return hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()

    room = {side: max(1, round(share * len(pairs))) for side, share in shares.items()}
    sides = ["train"] * len(pairs)
    for number in sorted(range(len(parts)), key=drawn):
        side = next((side for side in room if len(parts[number]) <= room[side]), "train")
        for i in parts[number] if side != "train" else ():
            sides[i] = side
            room[side] -= 1
    if empty := {*shares, "train"} - set(sides):
        raise ValueError(
            f"{len(pairs)} rows in {len(parts)} parts that share no document or query, the largest of "
            f"{max(map(len, parts), default=0)} rows: nothing is left for {', '.join(sorted(empty))}. Give more rows, "
            "or a split of your own (a column `split`)"
        )
    return sides


def assign(
    pairs: Sequence[Pair], likeness: Likeness, shares: Mapping[str, float] = SHARES, seed: int = 0
) -> tuple[dict[str, list[Pair]], list[Fault]]:
    """Pairs by side, and what was wrong with the person's own split.

    Sides that the person's split lacks are taken from its training rows, by document. A row whose document, or a near
    duplicate of it, is also on a side that comes before its own in PRIORITY is a leak, and is left out. One that only
    asks the same, for another document, is named and kept: a label may well be asked for on both sides.
    """
    pairs, faults = list(pairs), []
    own = {pair.split for pair in pairs} - {None}
    if own:
        unsplit = [pair for pair in pairs if pair.split is None]
        faults += [Fault(p.row, "split", "empty cell", "other rows have a split; fill it in") for p in unsplit]
        pairs = [pair for pair in pairs if pair.split is not None]
    sides = {side: [pair for pair in pairs if pair.split == side] for side in SPLITS}
    lacking = {side: share for side, share in shares.items() if not sides[side]}
    if lacking:
        free = sides["train"] if own else pairs
        chosen = split_by_document(free, likeness, lacking, seed)
        for side in {*lacking, "train"}:
            sides[side] = [pair for pair, name in zip(free, chosen, strict=True) if name == side]
    owner: dict[tuple, tuple[str, Pair]] = {}
    for side in PRIORITY:
        kept = []
        for pair in sides[side]:
            keys = [likeness.near(document) for document in pair.positives]
            taken = next((owner[key] for key in keys if key in owner and owner[key][0] != side), None)
            if taken is None:
                owner |= {key: (side, pair) for key in keys if key not in owner}
                kept.append(pair)
                continue
            other, first = taken
            faults += [
                Fault(pair.row, "positive", "leak", f"is in {side}, and {other} has it too ({first.row}); left out"),
                Fault(first.row, "positive", "leak", f"is in {other}, and {side} had it too ({pair.row}, left out)"),
            ]
        sides[side] = kept
    asked: dict[tuple, tuple[str, Pair]] = {}
    for side in PRIORITY:
        for pair in sides[side]:
            other, first = asked.setdefault(likeness.near(pair.query), (side, pair))
            if other != side:
                told = f"is asked in {side} and, of another document, in {other} ({first.row}); kept"
                faults.append(Fault(pair.row, "query", "shared query", told))
    return sides, faults


def task_of(pairs: Sequence[Pair]) -> str:
    """The column of the stage table that names the metric: by what most of the documents are."""
    if pairs[0].score is not None:
        return "sts"
    counts: Counter[str] = Counter()
    for pair in pairs:
        kinds = {kind for item in (pair.query, *pair.positives) for kind in MODALITIES if kind in item}
        pages = any(isinstance(document.get("image"), PdfPage) for document in pair.positives)
        visual = "visdoc" if pages else "image_ret" if "image" in kinds else "text_ret"
        counts["video_ret" if "video" in kinds else visual] += 1
    return counts.most_common(1)[0][0]


def to_quadruple(
    pairs: Sequence[Pair],
    likeness: Likeness,
    name: str,
    instruction: str | None = None,
    task: str | None = None,
    held_out: Collection[tuple] = (),
) -> Quadruple:
    """One side as a quadruple: equal documents once, rows of one query as one query with several positives.

    Graded pairs stay as they are. Negatives that are a positive of their query, or near to one of `held_out` (keys of
    likeness.near), are left out. A query's own instruction goes before `instruction`.
    """
    corpus: dict[tuple, tuple[int, Instance]] = {}

    def place(document: Instance) -> int:
        return corpus.setdefault(likeness.exact(document), (len(corpus), document))[0]

    asked: dict[tuple, tuple[Instance, list[Pair]]] = {}
    for i, pair in enumerate(pairs):
        alone = (i,) if pair.score is not None else ()
        key = likeness.exact(pair.query), pair.query.get("instruction"), *alone
        asked.setdefault(key, (pair.query, []))[1].append(pair)
    relevance = []
    for _, rows in asked.values():
        positives = list(dict.fromkeys(place(d) for pair in rows for d in pair.positives))
        fair = [d for pair in rows for d in pair.negatives if not held_out or likeness.near(d) not in held_out]
        negatives = [row for row in dict.fromkeys(map(place, fair)) if row not in positives]
        scores = None if rows[0].score is None else (rows[0].score,) * len(positives)
        relevance.append(Relevance(tuple(positives), tuple(negatives), scores))
    return Quadruple(
        name,
        task or task_of(pairs),
        instruction or INSTRUCTION,
        [query for query, _ in asked.values()],
        [document for _, document in corpus.values()],
        relevance,
    )
