"""Public sets as quadruples: gathered from raw rows, streamed from the Hub, prepared once in a folder.

A row that cannot be used is left out and counted by reason in meta["report"].
"""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..config import DataConfig
from ..data import save_quadruple
from ..emoji_world.tasks import Corpus
from ..media import as_list, load_image
from ..records import Instance, Quadruple, Rejected, Relevance, text_problem, too_many
from .sets import PublicSet, find

WRONG_LABELS = 8  # explicitly wrong labels that a classification query gets


class Skipped:
    """Rows that could not be used: their number and the first of them, by reason."""

    def __init__(self):
        self.reasons: dict[str, dict[str, Any]] = {}

    def add(self, row: int, why: Rejected) -> None:
        entry = self.reasons.setdefault(why.reason, {"count": 0, "first": f"row {row}: {why.detail}"})
        entry["count"] += 1

    def __len__(self) -> int:
        return sum(entry["count"] for entry in self.reasons.values())

    def __str__(self) -> str:
        said = (f"{entry['count']} x {reason} (first {entry['first']})" for reason, entry in self.reasons.items())
        return "; ".join(said) or "none"


def gather(
    name: str,
    raw_rows: Iterable[Mapping[str, Any]],
    rows: int,
    seed: int = 0,
    folder: str | Path | None = None,
    pictures: Path | None = None,
) -> Quadruple:
    """The first `rows` different queries of an iterable of raw rows, as a quadruple.

    Equal queries become one with several positives, equal documents one document. A classification query gets, besides
    the labels that its row calls wrong, others of the set, up to WRONG_LABELS: its loss has no other negatives.

    Args:
        raw_rows: dicts in the set's schema (see the set's adapter): a list, or a streamed data set.
        folder: holds local copies, each under the last part of its repository's name.
        pictures: where pictures that a table embeds are written, so that memory holds their paths; None keeps bytes.

    Raises:
        ValueError: a column is missing, or more rows than the set allows cannot be used; says which and why.
    """
    public, queries, corpus = find(name), Corpus(), Corpus()
    root = Path(folder) / public.local_name if folder else None
    labels: list[tuple[dict[int, float | None], set[int]]] = []  # of each query: positives with scores, negatives
    skipped, opened, read = Skipped(), set(), 0
    for raw in raw_rows:
        if len(queries.items) >= rows:
            break
        read += 1
        try:
            example = public.adapt(raw, root)
            groups = (example.query,), example.positives, example.negatives, example.unjudged
            [query], rights, wrongs, others = ([_kept(x, pictures, opened) for x in group] for group in groups)
        except (Rejected, TypeError, AttributeError) as why:
            skipped.add(read - 1, why if isinstance(why, Rejected) else Rejected("wrong type", str(why)))
            if too_many(len(skipped), read, public.may_skip):
                raise ValueError(
                    f"{name}: {len(skipped)} of the first {read} rows cannot be used: {skipped}; "
                    "docs/full-scale-data.md says what lies where"
                ) from why
            continue
        except KeyError as error:
            raise ValueError(f"{name}, row {read - 1}: no column {error}; it has {sorted(raw)}") from error
        i = queries.row(**query)
        if i == len(labels):
            labels.append(({}, set()))
        labels[i][0].update((corpus.row(**document), example.score) for document in rights)
        labels[i][1].update(corpus.row(**document) for document in wrongs)
        for document in others:
            corpus.row(**document)
    if not labels:
        raise ValueError(f"{name}: none of {read} rows can be used: {skipped}")
    if public.task.endswith("_cls"):
        _add_wrong_labels(labels, len(corpus.items), seed)
    report = {"rows_read": read, "skipped": skipped.reasons}
    meta = {"source": public.repo, "licence": public.licence, "seed": seed, "rows_asked": rows, "report": report}
    relevance = [_relevance(*of_query) for of_query in labels]
    return Quadruple(name, public.task, public.instruction, queries.items, corpus.items, relevance, meta)


def _kept(instance: Instance, pictures: Path | None, opened: set[Any]) -> Instance:
    """The instance with its embedded picture in a file, if that is wanted; Rejected if it cannot be used."""
    if problem := text_problem(instance.get("text"), "its text", "text"):
        raise Rejected("broken text", problem)
    content = instance.get("image")
    if pictures is not None and isinstance(content, bytes):
        file = pictures / hashlib.sha256(content).hexdigest()
        if not file.exists():
            file.write_bytes(content)
        instance = {**instance, "image": str(file)}
    for value in [*as_list(instance.get("image"), "image"), *instance.get("video", ())]:
        if value not in opened:
            try:
                load_image(value)
            except ValueError as error:
                raise Rejected("unreadable picture", str(error)) from error
            opened.add(value)
    return instance


def _add_wrong_labels(labels: list[tuple[dict[int, float | None], set[int]]], n_documents: int, seed: int) -> None:
    rng = np.random.default_rng([seed, 11])
    for rights, wrongs in labels:
        drawn = rng.choice(n_documents, min(n_documents, WRONG_LABELS + len(rights)), replace=False).tolist()
        new = [d for d in drawn if d not in rights and d not in wrongs]
        wrongs.update(new[: max(0, WRONG_LABELS - len(wrongs))])


def _relevance(rights: Mapping[int, float | None], wrongs: set[int]) -> Relevance:
    scores = tuple(rights.values())
    return Relevance(tuple(rights), tuple(sorted(wrongs - rights.keys())), None if None in scores else scores)


def load(
    name: str,
    rows: int,
    seed: int = 0,
    folder: str | Path | None = None,
    split: str | None = None,
    pictures: Path | None = None,
) -> Quadruple:
    """`gather` over a set's rows, streamed: from folder/<repository's name> if its table is there, else from the Hub.

    The order is shuffled by `seed` through a buffer of PublicSet.shuffled rows, so what lies far apart in a large set
    stays far apart.

    Raises:
        ConnectionError: neither a local copy nor the Hub is to be had.
    """
    public = find(name)
    stream = _streamed(name, public, Path(folder) if folder else None, split or public.split, seed)
    return gather(name, stream, rows, seed, folder, pictures)


def _streamed(
    name: str, public: PublicSet, folder: Path | None, split: str, seed: int
) -> Iterator[Mapping[str, Any]]:
    pattern, base = public.files.format(split=split), f"hf://datasets/{public.repo}"
    if folder and any((folder / public.local_name).glob(pattern)):
        base = str(folder / public.local_name)
    kind = "json" if pattern.endswith(".jsonl") else "parquet"
    try:
        stream = datasets.load_dataset(kind, data_files=f"{base}/{pattern}", split="train", streaming=True)
        for column, feature in (stream.features or {}).items():
            if isinstance(feature, (datasets.Image, datasets.Video)):
                stream = stream.cast_column(column, type(feature)(decode=False))
        stream = stream if public.first is None else stream.take(public.first)
        yield from stream.shuffle(seed=seed, buffer_size=public.shuffled)
    except OSError as error:
        raise ConnectionError(
            f"{name}: cannot read {base}/{pattern} ({error}); check the network, or download {public.repo} into "
            f"{(folder or Path(DataConfig.public)) / public.local_name}, or leave {name!r} out of the preset"
        ) from error


def prepare(name: str, rows: int, seed: int = 0, folder: str | Path = DataConfig.public) -> Path:
    """The folder of a saved quadruple with the first `rows` queries of a set, or more; made unless it is there.

    It is folder/prepared/<name>-<seed>, and holds the pictures. One with fewer rows is replaced by a larger one, whose
    first queries are the same.
    """
    saved = Path(folder) / "prepared" / f"{name}-{seed}"
    card = saved / "card.json"
    if not card.is_file() or json.loads(card.read_text(encoding="utf-8"))["meta"]["rows_asked"] < rows:
        saved.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pictures-", dir=saved.parent) as pictures:
            save_quadruple(load(name, rows, seed, folder, pictures=Path(pictures)), saved)
    return saved


def stand_in(name: str, rows: int) -> Quadruple:
    """A sub-dataset of about a set's sizes with blank pictures and empty words: for plans, which need no content."""
    public = find(name)
    query, [document] = public.like.query, public.like.positives
    relevance = [Relevance((i,)) for i in range(rows)]
    return Quadruple(name, public.task, public.instruction, [query] * rows, [document] * rows, relevance)
