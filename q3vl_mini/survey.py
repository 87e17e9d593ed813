"""A look at a person's data before anything is trained on it: what it holds, what is wrong with it, how it is split.

Nothing that is wrong ends the survey. A row that cannot be used is left out and named; what only looks wrong is named.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .likeness import Likeness, text_key
from .media import MediaBudget, as_list
from .pairs import SPLITS, Fault, Pair, read_pairs
from .records import MODALITIES, Instance, Quadruple, is_empty, too_many
from .report import write_json
from .sheets import contact_sheet
from .spill import Spill
from .splits import SHARES, assign, task_of, to_quadruple

SHARED_SHOWN = 10  # documents with many queries that are listed
CHARACTERS_AT_ONCE = 50_000  # that are counted in tokens
LISTED = 200  # faults in the page; all are in the JSON


@dataclass(frozen=True)
class Survey:
    """Data that can be trained on, and what was found on the way.

    splits: "train", "validation" and "test" as quadruples. faults: every row that something is wrong with; most are
    left out, duplicates that are only near are kept. counts: numbers and lists for the report, JSON.
    """

    splits: dict[str, Quadruple]
    faults: list[Fault]
    counts: dict[str, Any]

    def __str__(self) -> str:
        return page(self)

    def save(self, folder: str | Path) -> None:
        """Write survey.json, survey.md and survey.png (a contact sheet of the training data) into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        faults = [asdict(fault) | {"row": fault.row.number, "source": fault.row.source} for fault in self.faults]
        write_json(folder / "survey.json", self.counts | {"faults": faults}, indent=1, ensure_ascii=False)
        (folder / "survey.md").write_text(page(self), encoding="utf-8", errors="backslashreplace")
        contact_sheet(self.splits["train"]).save(folder / "survey.png")


def survey(
    data: Any,
    *,
    columns: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    media: str | Path | None = None,
    root: str | Path | None = None,
    may_skip: float = 0.1,
    instruction: str | None = None,
    budget: MediaBudget | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    shares: Mapping[str, float] = SHARES,
    seed: int = 0,
    progress: bool = True,
) -> Survey:
    """Read, check and split a person's data. Arguments of reading: see pairs.read_pairs.

    Args:
        media: a folder for what need not stay in memory: pictures that are no files yet, and the content of the rows,
            of which keys, counts and positions are left. None keeps all of it in memory.
        may_skip: share of the rows that may be unusable; more of the first records.ENOUGH_ROWS, or later, stop the
            reading.
        instruction: the task in a sentence, for rows without their own.
        budget: what visuals are scaled to, for the count of visual tokens. tokenizer, max_length: of the model, for
            the count of text tokens and of what would be cut.
        shares: of the rows for "test" and "validation", where the person gives no split.

    Raises:
        FileNotFoundError, ValueError: the data cannot be read at all, no row of it can be used, or too few can.
    """
    likeness, faults, pairs, rows = Likeness(budget or MediaBudget()), [], [], set()
    spill = None if media is None else Spill(media)
    reading = read_pairs(data, columns, kinds, media, root)
    for found in tqdm(reading, desc="read", unit="row", disable=not progress):
        if found.row not in rows:
            _check_left_out(len(rows), len(pairs), may_skip, faults)
        rows.add(found.row)
        if isinstance(found, Fault):
            faults.append(found)
        elif (pair := _opened(found, likeness, faults)) is not None:
            pairs.append(pair if spill is None else _spilled(pair, spill))
    _check_left_out(len(rows), len(pairs), may_skip, faults)
    pairs = list(_comparable(pairs, faults))
    pairs = list(_once(pairs, likeness, faults))
    if not pairs:
        told = "; ".join(map(str, faults[:3]))
        raise ValueError(f"none of {len(rows)} rows can be used: {told}")
    sides, leaks = assign(pairs, likeness, shares, seed)
    faults += leaks
    if lost := [side for side in SPLITS if not sides[side]]:
        raise ValueError(f"no rows are left for {', '.join(lost)} once leaks are out; give these splits more rows")
    held_out = {likeness.near(d) for side in ("test", "validation") for pair in sides[side] for d in pair.positives}
    task = task_of(pairs)
    splits = {
        side: to_quadruple(sides[side], likeness, side, instruction, task, held_out if side == "train" else ())
        for side in SPLITS
    }
    kept = [pair for side in SPLITS for pair in sides[side]]
    faults.sort(key=lambda fault: (fault.row.source, fault.row.number))
    counts = {"rows": {"read": len(rows), "used": len(kept), "left_out": len(rows) - len(kept)}}
    counts["faults_by_kind"] = dict(Counter(fault.kind for fault in faults).most_common())
    counts["pairs_by_kind"] = dict(Counter(_kind_of(pair) for pair in kept).most_common())
    counts["rows_with_negatives"] = sum(bool(pair.negatives) for pair in kept)
    counts["task"] = task
    counts["splits"] = {
        side: {"rows": len(sides[side]), "queries": len(q), "documents": len(q.corpus)} for side, q in splits.items()
    }
    counts["digest"] = _digest(sides, likeness)
    counts["shared"] = _shared(kept, likeness)
    counts["near_duplicates"] = _near_groups(kept, likeness)
    roles = {"query": [p.query for p in kept], "document": [d for p in kept for d in (*p.positives, *p.negatives)]}
    counts["texts"] = {r: _texts(items, tokenizer, max_length) for r, items in roles.items()}
    counts["visuals"] = {r: _visuals(items, likeness) for r, items in roles.items()}
    return Survey(splits, faults, counts)


def _check_left_out(read: int, used: int, may_skip: float, faults: Sequence[Fault]) -> None:
    """ValueError once too many rows cannot be used (records.too_many)."""
    if too_many(read - used, read, may_skip):
        kinds = ", ".join(f"{n} x {kind}" for kind, n in Counter(fault.kind for fault in faults).most_common())
        raise ValueError(
            f"{read - used} of the first {read} rows cannot be used ({kinds}; the first is {faults[0]}); mend them, or "
            f"allow more than the share {may_skip:g} (may_skip=, --may-skip)"
        )


def _opened(pair: Pair, likeness: Likeness, faults: list[Fault]) -> Pair | None:
    """The pair without negatives that cannot be opened; None if its query or a positive cannot."""

    def can_be_seen(instance: Instance, column: str) -> bool:
        try:
            likeness.see(instance)
        except (ValueError, OSError) as error:
            faults.append(Fault(pair.row, column, "unreadable file", str(error)))
            return False
        return True

    sound = [can_be_seen(item, "positive") for item in pair.positives] + [can_be_seen(pair.query, "query")]
    negatives = tuple(item for item in pair.negatives if can_be_seen(item, "negatives"))
    if not all(sound):
        return None
    return replace(pair, negatives=negatives)


def _spilled(pair: Pair, spill: Spill) -> Pair:
    positives, negatives = (tuple(map(spill.put, items)) for items in (pair.positives, pair.negatives))
    return replace(pair, query=spill.put(pair.query), positives=positives, negatives=negatives)


def _comparable(pairs: Sequence[Pair], faults: list[Fault]) -> Iterator[Pair]:
    """Either all pairs are graded or none: where some have a score, those without are left out."""
    graded = any(pair.score is not None for pair in pairs)
    for pair in pairs:
        if graded and pair.score is None:
            faults.append(Fault(pair.row, "score", "empty cell", "other rows have a score; fill it in"))
        elif graded and len(pair.positives) > 1:
            faults.append(Fault(pair.row, "positive", "wrong type", "a score is of one document; give one a row"))
        else:
            yield pair


def _once(pairs: Sequence[Pair], likeness: Likeness, faults: list[Fault]) -> Iterator[Pair]:
    """Pairs without exact repetitions. Near duplicates, and negatives that are the positive, are named and kept."""
    rows: dict[tuple, Pair] = {}
    near_rows: dict[tuple, Pair] = {}
    near_documents: dict[tuple, tuple[tuple, Pair]] = {}
    for pair in pairs:
        document = tuple(map(likeness.exact, pair.positives))
        exact = likeness.exact(pair.query), document, pair.query.get("instruction"), pair.score, pair.split
        if exact in rows:
            faults.append(Fault(pair.row, "row", "duplicate", f"the same as {rows[exact].row}; left out"))
            continue
        rows[exact] = pair
        near_document = tuple(map(likeness.near, pair.positives)), pair.split
        like = near_rows.setdefault((likeness.near(pair.query), near_document), pair)
        first_document, first = near_documents.setdefault(near_document, (document, pair))
        if like is not pair:
            faults.append(Fault(pair.row, "row", "near duplicate", f"nearly the same as {like.row}; kept"))
        elif first_document != document:
            faults.append(Fault(pair.row, "positive", "near duplicate", f"nearly that of {first.row}; kept"))
        if {likeness.exact(item) for item in pair.negatives} & set(document):
            faults.append(Fault(pair.row, "negatives", "contradiction", "holds the positive, which is left out of it"))
        yield pair


def _digest(sides: Mapping[str, Sequence[Pair]], likeness: Likeness) -> str:
    """A hash of the pairs and their sides: the same for the same data, in whatever files it comes."""
    digest = hashlib.blake2b(digest_size=16)
    for side, pairs in sides.items():
        for pair in pairs:
            items = [likeness.exact(item) for item in (pair.query, *pair.positives, *pair.negatives)]
            digest.update(repr((side, items, pair.query.get("instruction"), pair.score)).encode())
    return digest.hexdigest()


def _kind_of(pair: Pair) -> str:
    sides = pair.query, pair.positives[0]
    return " -> ".join(" + ".join(kind for kind in MODALITIES if kind in side) for side in sides)


def _shared(pairs: Sequence[Pair], likeness: Likeness) -> dict[str, Any]:
    """How many queries the documents have, and the documents with the most."""
    rows: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        for document in pair.positives:
            rows.setdefault(likeness.exact(document), []).append(pair)
    most = sorted(rows.values(), key=len, reverse=True)[:SHARED_SHOWN]
    top = [{"queries": len(part), "rows": [str(p.row) for p in part[:5]]} for part in most if len(part) > 1]
    return {"documents": len(rows), "with_several_queries": sum(len(part) > 1 for part in rows.values()), "most": top}


def _near_groups(pairs: Sequence[Pair], likeness: Likeness) -> int:
    """Documents that have a near duplicate among the others."""
    forms: dict[tuple, set[tuple]] = {}
    for pair in pairs:
        for document in pair.positives:
            forms.setdefault(likeness.near(document), set()).add(likeness.exact(document))
    return sum(len(group) for group in forms.values() if len(group) > 1)


def _spread(values: Sequence[int]) -> dict[str, int]:
    low, middle, high, most = np.quantile(values, [0, 0.5, 0.95, 1], method="nearest").tolist()
    return {"least": int(low), "median": int(middle), "p95": int(high), "most": int(most)}


def _texts(items: Sequence[Instance], tokenizer: Any, max_length: int | None) -> dict[str, Any]:
    characters, tokens = array("q"), array("q")
    for texts in _in_blocks(_distinct_texts(items)):
        characters.extend(map(len, texts))
        if tokenizer is not None:
            tokens.extend(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    if not characters:
        return {"number": 0}
    out: dict[str, Any] = {"number": len(characters), "characters": _spread(characters)}
    if tokenizer is not None:
        out["tokens"] = _spread(tokens)
        if max_length is not None:
            out["longer_than_the_model_reads"] = sum(n > max_length for n in tokens)
    return out


def _distinct_texts(items: Sequence[Instance]) -> Iterator[str]:
    known = set()
    for item in items:
        for text in as_list(item.get("text"), "text"):
            if not is_empty(text) and text_key(text) not in known:
                known.add(text_key(text))
                yield text


def _in_blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    block, size = [], 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size > CHARACTERS_AT_ONCE:
            yield block
            block, size = [], 0
    if block:
        yield block


def _visuals(items: Sequence[Instance], likeness: Likeness) -> dict[str, Any]:
    seen = list({visual.digest: visual for item in items for visual in likeness.see(item)}.values())
    if not seen:
        return {"number": 0}
    return {
        "number": len(seen),
        "width": _spread([s.width for s in seen]),
        "height": _spread([s.height for s in seen]),
        "tokens": _spread([s.tokens for s in seen]),
        "tokens_at_own_size": _spread([s.whole for s in seen]),
        "scaled_down": sum(s.tokens < s.whole for s in seen),
        "enlarged": sum(s.tokens > s.whole for s in seen),
    }


def page(found: Survey) -> str:
    """The survey as a Markdown page."""
    counts, lines = found.counts, ["# What is in the data", ""]
    rows = counts["rows"]
    lines.append(f"{rows['read']} rows were read, {rows['used']} are used, {rows['left_out']} are left out.")
    lines += ["", "| query -> document | rows |", "|---|---:|"]
    lines += [f"| {kind} | {n} |" for kind, n in counts["pairs_by_kind"].items()]
    lines += ["", "| side | rows | queries | documents |", "|---|---:|---:|---:|"]
    lines += [f"| {s} | {c['rows']} | {c['queries']} | {c['documents']} |" for s, c in counts["splits"].items()]
    shared = counts["shared"]
    lines += [
        "",
        f"- {counts['rows_with_negatives']} rows bring negatives of their own.",
        f"- Of {shared['documents']} documents, {shared['with_several_queries']} answer several queries.",
        f"- {counts['near_duplicates']} documents have near duplicates; these are on one side of the split.",
    ]
    lines += [f"- {m['queries']} queries share the document of {', '.join(m['rows'])}." for m in shared["most"]]
    for role, texts in counts["texts"].items():
        if texts["number"]:
            unit = "tokens" if "tokens" in texts else "characters"
            lines.append(f"- {texts['number']} texts of the {role} side: {_told(texts[unit])} {unit}.")
            if cut := texts.get("longer_than_the_model_reads"):
                lines.append(f"- {cut} of them are longer than the model reads, and will be cut.")
    for role, visuals in counts["visuals"].items():
        if visuals["number"]:
            lines.append(
                f"- {visuals['number']} pictures and videos of the {role} side: {_told(visuals['tokens'])} visual "
                f"tokens; {visuals['scaled_down']} are scaled down, {visuals['enlarged']} enlarged."
            )
    lines += ["", f"## What is wrong: {len(found.faults)} findings", ""]
    lines += [f"- {n} x {kind}" for kind, n in counts["faults_by_kind"].items()]
    lines += ["", *(f"- {_one_line(fault)}" for fault in found.faults[:LISTED])]
    if len(found.faults) > LISTED:
        lines.append(f"- and {len(found.faults) - LISTED} more, in survey.json")
    return "\n".join(lines) + "\n"


def _told(spread: Mapping[str, int]) -> str:
    return f"{spread['least']} to {spread['most']}, half have at most {spread['median']}"


def _one_line(fault: Fault) -> str:
    return " ".join(str(fault).split())
