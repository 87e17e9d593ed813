"""Sub-datasets on disk and in training: quadruples saved and loaded, batches of one sub-dataset.

A saved quadruple is a folder that a person and the `datasets` library can read: queries.parquet and corpus.parquet
(id, text, image, video), relevance.parquet (ids), card.json. Draw any task of Emoji World as a contact sheet with

    q3vl-mini data TASK --split train --out sheet.png [--n 200] [--save FOLDER]
"""

import argparse
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from .media import MediaBudget, as_list, load_image, load_video
from .records import MODALITIES, Clip, Instance, Quadruple, Relevance, as_instance, is_empty, validate
from .sheets import contact_sheet

ROW_GROUP = 64  # rows that a streamed read holds at once
COLUMN_TYPES = {"text": datasets.Value("string"), "image": datasets.Image(), "video": datasets.Video(decode=False)}
EMOJI_WORLD_LICENCE = "pictures Apache-2.0, CC-BY-4.0 and MIT, words Unicode-3.0: see data_samples/README.md"


def save_quadruple(quadruple: Quadruple, folder: str | Path) -> None:
    """Write a quadruple as a folder of Parquet files and a card; a folder saved before is replaced as a whole.

    Drawings are drawn and stored as PNG; files given as paths or bytes are kept byte for byte. Clips, films and lists
    of frames become FFV1 in Matroska, which gives every pixel back and which every FFmpeg decodes; their rate is
    kept, and a list of frames, which has none, gets 1 a second. Ids are q0, q1, ... and d0, d1, ...

    Raises:
        ValueError: the quadruple is not valid (records.validate), or a picture or film cannot be read; names the row.
        FileExistsError: the folder holds something else than a quadruple.

    Taught in notebooks/03.
    """
    validate(quadruple)
    folder = Path(folder).resolve()
    if folder.exists() and not (folder / "card.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not a saved quadruple (no card.json); choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        _write_instances(new / "queries.parquet", quadruple.queries, "q", f"{quadruple.name}, query")
        _write_instances(new / "corpus.parquet", quadruple.corpus, "d", f"{quadruple.name}, document")
        _write_relevance(new / "relevance.parquet", quadruple)
        card = {
            "name": quadruple.name,
            "task": quadruple.task,
            "instruction": quadruple.instruction,
            "n_queries": len(quadruple.queries),
            "n_documents": len(quadruple.corpus),
            "licence": quadruple.meta.get("licence", "not stated"),
            "meta": {key: value for key, value in quadruple.meta.items() if key != "truth"},
        }
        text = json.dumps(card, indent=2, ensure_ascii=False, default=lambda value: value.tolist())  # numpy's numbers
        (new / "card.json").write_text(text + "\n", encoding="utf-8")
        if folder.exists():
            os.replace(folder, Path(temporary) / "old")
        os.replace(new, folder)


def _write_instances(path: Path, instances: Sequence[Instance], prefix: str, where: str) -> None:
    columns: dict[str, Any] = {"id": datasets.Value("string"), **COLUMN_TYPES}
    for instance in map(as_instance, instances):
        for kind in MODALITIES:
            if len(_values(instance, kind)) > 1:
                columns[kind] = datasets.List(COLUMN_TYPES[kind])
        if instance.get("instruction"):
            columns["instruction"] = datasets.Value("string")
    features = datasets.Features(columns)

    def row(i: int) -> dict[str, Any]:
        instance = as_instance(instances[i])
        out: dict[str, Any] = {"id": f"{prefix}{i}"}
        for kind in MODALITIES:
            stored = [_stored(value, kind, f"{where} {i}, {kind}") for value in _values(instance, kind)]
            is_list = isinstance(features[kind], datasets.List)
            out[kind] = (stored if is_list else stored[0]) if stored else None
        return out | ({"instruction": instance.get("instruction")} if "instruction" in features else {})

    with pq.ParquetWriter(path, features.arrow_schema) as writer:
        for start in range(0, len(instances), ROW_GROUP):
            rows = [row(i) for i in range(start, min(start + ROW_GROUP, len(instances)))]
            writer.write_table(datasets.Dataset.from_list(rows, features=features).data.table)


def _values(instance: Instance, kind: str) -> list[Any]:
    values = as_list(instance.get(kind), kind)
    return [text for text in values if not is_empty(text)] if kind == "text" else values


def _stored(value: Any, kind: str, where: str) -> Any:
    """A value as its column holds it: a string, or the bytes of a file."""
    if kind == "text":
        return value
    if isinstance(value, (str, Path)):
        if not os.path.isfile(value):
            raise ValueError(f"{where}: there is no file {str(value)!r}; check the path")
        value = Path(value).read_bytes()
    if isinstance(value, (bytes, bytearray)):
        # read before it is stored: an unreadable file is named here, not in the middle of a training
        load_image(value, where) if kind == "image" else load_video(value, MediaBudget(max_frames=2), where)
        return {"bytes": bytes(value), "path": None}
    return {"bytes": png_bytes(value, where) if kind == "image" else video_bytes(value, where), "path": None}


def png_bytes(value: Any, where: str = "image") -> bytes:
    """Any image that `media.load_image` reads, as a PNG file. Taught in notebooks/03."""
    buffer = io.BytesIO()
    Image.fromarray(load_image(value, where)).save(buffer, "PNG")
    return buffer.getvalue()


def video_bytes(value: Any, where: str = "video") -> bytes:
    """A Clip, an object that renders one, or frames (at 1 a second), as a lossless file: FFV1 in Matroska.

    Taught in notebooks/03.
    """
    if hasattr(value, "render"):
        value = value.render()
    if not isinstance(value, Clip):
        try:
            value = Clip(np.stack([load_image(v, f"{where}, frame {i}") for i, v in enumerate(value)]), 1.0)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: cannot store these frames ({error}); give a Clip or equal frames") from error
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=Fraction(value.fps).limit_denominator(1001))
        stream.height, stream.width = value.frames.shape[1:3]
        stream.pix_fmt = "bgr0"  # FFV1's exact RGB
        for frame in value.frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


def _write_relevance(path: Path, quadruple: Quadruple) -> None:
    ids, columns = datasets.List(datasets.Value("string")), ["positives", "negatives", "candidates"]
    features = {"query_id": datasets.Value("string"), **dict.fromkeys(columns, ids)}
    features["scores"] = datasets.List(datasets.Value("float64"))
    rows = []
    for i, labels in enumerate(quadruple.relevance):
        row: dict[str, Any] = {"query_id": f"q{i}", "scores": labels.scores}
        for column in columns:
            documents = getattr(labels, column)
            row[column] = None if documents is None else [f"d{d}" for d in documents]
        rows.append(row)
    if "truth" in quadruple.meta:  # labels too, see noise.add_noise
        features["truth"] = ids
        for row, truth in zip(rows, quadruple.meta["truth"], strict=True):
            row["truth"] = [f"d{d}" for d in truth]
    pq.write_table(datasets.Dataset.from_list(rows, features=datasets.Features(features)).data.table, path)


@dataclass
class LeftOut:
    """What of a saved quadruple cannot be used: reasons by row of queries and of corpus, and those of single labels."""

    queries: dict[int, str] = field(default_factory=dict)
    documents: dict[int, str] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)


def load_quadruple(
    folder: str | Path,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
    left_out: LeftOut | None = None,
) -> Quadruple:
    """Open a folder written by `save_quadruple`, or laid out like one.

    Queries and corpus are sequences that decode a row when it is asked for: images as PIL images, videos as the bytes
    of their file. A list of one value comes back as the value. Only files that the tables hold are read: one that a
    row merely names, by a path or an address, is refused.

    Args:
        streaming: False copies the rows once into the cache of `datasets` as memory-mapped Arrow, for fast access in
            any order. True copies nothing and holds one row group of the Parquet file at a time: right for reading
            in order, slow for jumping about.
        cache_dir: another place for that copy.
        left_out: gets what is wrong with single rows and labels, which is an error if it is None. Such queries have no
            positives then; usable.usable leaves them out.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is no table or lacks a column; an id that is not there
            or comes twice. A folder from elsewhere should go through records.validate or usable.usable once; that
            decodes every row, so it is not done here.

    Taught in notebooks/03.
    """
    folder = Path(folder)
    for name in ("card.json", "queries.parquet", "corpus.parquet", "relevance.parquet"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; give a folder written by save_quadruple")
    card = _read_card(folder / "card.json")
    columns = {"queries": ("id",), "corpus": ("id",), "relevance": ("query_id", "positives")}
    for part, needed in columns.items():
        _check_columns(folder / f"{part}.parquet", needed)
    queries, corpus = (_open_rows(folder / f"{part}.parquet", streaming, cache_dir) for part in ("queries", "corpus"))
    relevance, truth = _read_relevance(folder, card["name"], left_out)
    meta = {key: _tuples(value) for key, value in card["meta"].items()} | ({"truth": truth} if truth else {})
    return Quadruple(card["name"], card["task"], card["instruction"], queries, corpus, relevance, meta)


def _read_card(file: Path) -> dict[str, Any]:
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON in UTF-8 ({error}); write it again with save_quadruple") from error
    kinds = {"name": str, "task": str, "instruction": str, "meta": dict}
    if not isinstance(card, dict) or (wrong := [k for k, kind in kinds.items() if not isinstance(card.get(k), kind)]):
        raise ValueError(f"{file} has no {wrong if isinstance(card, dict) else list(kinds)}; see save_quadruple")
    return card


def _check_columns(file: Path, needed: Sequence[str]) -> None:
    try:
        there = pq.read_schema(file).names
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} is no Parquet file, or cut off ({error}); copy or write it again") from error
    if missing := [name for name in needed if name not in there]:
        raise ValueError(f"{file} has no column {missing}, only {there}; see save_quadruple")


def _open_rows(path: Path, streaming: bool, cache_dir: str | Path | None) -> "StoredInstances":
    if streaming:
        return StoredInstances(ParquetRows(path), path.stem)
    stored = datasets.Dataset.from_parquet(str(path), cache_dir=cache_dir and str(cache_dir))
    return StoredInstances(DatasetRows(stored), path.stem)


def _read_relevance(
    folder: Path, name: str, left_out: LeftOut | None
) -> tuple[list[Relevance], tuple[tuple[int, ...], ...] | None]:
    """Labels with ids turned into positions, in the order of the queries."""

    def refused(fault: str) -> None:
        if left_out is None:
            raise ValueError(f"{fault}; mend the table")

    def ids(part: str, bad: dict[int, str]) -> dict[str, int]:
        rows: dict[str, int] = {}
        for row, i in enumerate(pq.read_table(folder / f"{part}.parquet", columns=["id"])["id"].to_pylist()):
            if i is None or i in rows:
                bad[row] = f"{name}, {part} row {row}: the id {i!r} " + ("is missing" if i is None else "comes twice")
                refused(bad[row])
            else:
                rows[i] = row
        return rows

    found = left_out or LeftOut()
    queries, position = ids("queries", found.queries), ids("corpus", found.documents)
    rows = {row["query_id"]: row for row in pq.read_table(folder / "relevance.parquet").to_pylist()}

    def rows_of(query: str, column: str) -> tuple[int, ...] | None:
        named = rows[query].get(column)
        for document in named or ():
            if document not in position:
                found.labels.append(f"{name}, query {query!r}: corpus.parquet lacks {document!r}, one of its {column}")
                refused(found.labels[-1])
        return None if named is None else tuple(position[document] for document in named if document in position)

    relevance, truth = [Relevance(())] * (len(queries) + len(found.queries)), []
    for query, i in queries.items():
        if query not in rows:
            found.queries[i] = f"{name}, query {query!r}: relevance.parquet lacks {query!r}"
            refused(found.queries[i])
            continue
        positives, negatives = rows_of(query, "positives") or (), rows_of(query, "negatives") or ()
        scores = rows[query].get("scores")
        scores = None if scores is None else tuple(scores)
        relevance[i] = Relevance(positives, negatives, scores, rows_of(query, "candidates"))
        truth.append(rows_of(query, "truth"))
    return relevance, None if None in truth or len(truth) < len(relevance) else tuple(truth)


def _tuples(value: Any) -> Any:
    """JSON has no tuples; meta, which is not to be changed, has no lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


class DatasetRows:
    """The rows of a datasets.Dataset by position, as they are stored."""

    def __init__(self, stored: datasets.Dataset):
        self.table = stored.with_format("arrow")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.table[i].to_pylist()[0]


class ParquetRows:
    """The rows of a Parquet file by position, one row group in memory; may be sent to other processes."""

    def __init__(self, path: Path):
        meta = pq.read_metadata(path)
        self.path = path
        self.ends = np.cumsum([meta.row_group(g).num_rows for g in range(meta.num_row_groups)])
        self.group, self.table = -1, None

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, i: int) -> dict[str, Any]:
        group = int(np.searchsorted(self.ends, i, side="right"))
        if group != self.group:
            with pq.ParquetFile(self.path) as file:
                self.group, self.table = group, file.read_row_group(group)
        start = int(self.ends[group - 1]) if group else 0
        return self.table.slice(i - start, 1).to_pylist()[0]


class StoredInstances(Sequence):
    """Instances over stored rows (DatasetRows or ParquetRows), decoded when asked for and not kept.

    A picture that cannot be read is a ValueError that names the row of `part`.
    """

    def __init__(self, rows: Any, part: str = "rows"):
        self.rows, self.part = rows, part

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        i = int(i) % len(self)
        row = self.rows[i]
        out = {}
        for kind in (*MODALITIES, "instruction"):
            value = row.get(kind)
            values = value if isinstance(value, list) else [value]
            if kind in ("image", "video"):
                values = [_embedded(file, kind, f"{self.part} row {i}, {kind}") for file in values if file is not None]
            if not is_empty(values):
                out[kind] = values if len(values) > 1 else values[0]
        return out


def _embedded(file: Any, kind: str, where: str) -> Any:
    """A stored picture as a PIL image, a stored video as bytes."""
    content = file.get("bytes") if isinstance(file, Mapping) else file
    if not isinstance(content, bytes):
        named = file.get("path") if isinstance(file, Mapping) else file
        raise ValueError(f"{where}: names {named!r}, and only files that the table holds are read; embed it")
    return Image.fromarray(load_image(content, where)) if kind == "image" else content


@dataclass(frozen=True)
class Batch:
    """Queries of one sub-dataset with a positive and up to n_negatives negatives each.

    positive_ids, negative_ids: rows of the corpus. scores: graded labels of the pairs (STS), else None.
    teacher: the teacher's logits of [positive, *negatives], a list a query (distillation), else None.
    """

    name: str
    task: str
    instruction: str
    queries: list[Instance]
    positives: list[Instance]
    negatives: list[list[Instance]]
    positive_ids: list[int]
    negative_ids: list[list[int]]
    scores: list[float] | None = None
    teacher: list[list[float]] | None = None


def save_batch(batch: Batch, folder: str | Path) -> None:
    """Write a batch as a quadruple, for study: `load_quadruple(folder)` reads it, and shows what the model was given.

    meta has the documents' rows in their corpus ("corpus_rows"), and the teacher's logits.
    """
    documents = dict(zip(batch.positive_ids, batch.positives, strict=True))
    for ids, instances in zip(batch.negative_ids, batch.negatives, strict=True):
        documents |= dict(zip(ids, instances, strict=True))
    place = {document: row for row, document in enumerate(documents)}
    relevance = [
        Relevance((place[positive],), tuple(place[d] for d in negatives if d != positive))
        for positive, negatives in zip(batch.positive_ids, batch.negative_ids, strict=True)
    ]
    if batch.scores is not None:
        relevance = [replace(row, scores=(score,)) for row, score in zip(relevance, batch.scores, strict=True)]
    meta = {"corpus_rows": list(documents), "teacher": batch.teacher}
    corpus = list(documents.values())
    save_quadruple(Quadruple(batch.name, batch.task, batch.instruction, batch.queries, corpus, relevance, meta), folder)


Teacher = Mapping[int, Mapping[int, float]]  # query row -> corpus row -> logit


def mixed_batches(
    quadruples: Sequence[Quadruple],
    *,
    batch_size: int,
    n_negatives: int,
    steps: int,
    seed: int,
    start: int = 0,
    exponent: float = 0.5,
    n_random: int = 0,
    teacher: Mapping[str, Teacher] | None = None,
) -> Iterator[Batch]:
    """Batches start ... steps - 1 of a training, each of one sub-dataset, so that its negatives are of one kind.

    A sub-dataset is drawn with probability proportional to (number of queries) ** exponent: 1 is proportional, 0
    uniform, 0.5 lets small ones be seen more often without being repeated as often as large ones. Within one, each
    epoch deals every query once, into ceil(n / batch_size) batches of equal size (up to one), and deals the queries
    of one positive document to different batches as far as there are batches. What still repeats, and positives of
    each other's that are not labelled, the masks of the losses handle.

    Batch k is a function of the data, the options, `seed` and k alone: after an interruption, the same call with
    `start` goes on. One of several positives, and n_negatives of the negatives, are drawn anew each epoch.

    Args:
        batch_size: queries at most. n_negatives: hard negatives a query at most; a query may have fewer.
        n_random: documents a query that are drawn from the whole corpus, none of its positives, and come after the
            hard negatives. Not with a teacher, which has not scored them.
        steps: number of batches of the whole training, `start` included.
        teacher: by name of the sub-dataset, logits of the documents of every query. Only documents that it scored
            are drawn. Sub-datasets that it does not name have batches without.

    Raises:
        ValueError: an option out of range, no or equally named sub-datasets, scores or logits for a part of the rows.

    Taught in notebooks/03.
    """
    names = [quadruple.name for quadruple in quadruples]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"sub-datasets named {names}; give at least one, with a name of its own each")
    if batch_size < 1 or min(n_negatives, n_random, seed) < 0 or not 0 <= start <= steps:
        raise ValueError(
            f"batch_size {batch_size}, n_negatives {n_negatives}, n_random {n_random}, seed {seed}, start {start}, "
            f"steps {steps}; expected batch_size >= 1, no negative number and start <= steps"
        )
    if n_random and teacher:
        raise ValueError("n_random with a teacher: it has no logits of documents that are drawn at random; set it to 0")
    if unknown := set(teacher or ()) - set(names):
        raise ValueError(f"the teacher scored {sorted(unknown)}, which are not among the sub-datasets {names}")
    labels = [_drawable_labels(quadruple, (teacher or {}).get(quadruple.name)) for quadruple in quadruples]
    return _mixed(quadruples, labels, batch_size, n_negatives, n_random, steps, seed, start, exponent, teacher or {})


def _drawable_labels(quadruple: Quadruple, teacher: Teacher | None) -> Sequence[Relevance]:
    """The labels that batches draw from: with a teacher, only of documents that it scored."""
    scored = sum(labels.scores is not None for labels in quadruple.relevance)
    if scored not in (0, len(quadruple)):
        raise ValueError(f"{quadruple.name}: {scored} of {len(quadruple)} queries have scores; give all or none")
    if teacher is None:
        return quadruple.relevance
    out = []
    for i, labels in enumerate(quadruple.relevance):
        known = teacher.get(i, {})
        kept = [n for n, document in enumerate(labels.positives) if document in known]
        if not kept:
            raise ValueError(
                f"{quadruple.name}, query {i}: the teacher scored none of its positives {labels.positives[:3]}; score "
                "them, or leave the query out with select()"
            )
        out.append(
            Relevance(
                tuple(labels.positives[n] for n in kept),
                tuple(document for document in labels.negatives if document in known),
                labels.scores and tuple(labels.scores[n] for n in kept),
            )
        )
    return out


def _mixed(
    quadruples, labels, batch_size, n_negatives, n_random, steps, seed, start, exponent, teacher
) -> Iterator[Batch]:
    sizes = np.array([len(quadruple) for quadruple in quadruples])
    weights = sizes.astype(float) ** exponent
    draws = np.random.default_rng([seed, 0]).random(steps)  # the first k are the same whatever `steps` is
    edges = np.cumsum(weights)[:-1] / weights.sum()
    chosen = np.searchsorted(edges, draws, side="right")  # (steps,)
    used = np.bincount(chosen[:start], minlength=len(sizes))  # batches of each sub-dataset before this one
    plans: dict[int, tuple[int, list]] = {}
    for step in range(start, steps):
        which = int(chosen[step])
        epoch, position = divmod(int(used[which]), math.ceil(sizes[which] / batch_size))
        used[which] += 1
        if plans.get(which, (-1,))[0] != epoch:
            rng = np.random.default_rng([seed, 1, which, epoch])
            plans[which] = epoch, deal(labels[which], batch_size, rng)
        rng = np.random.default_rng([seed, 2, step])
        yield _batch(
            quadruples[which],
            labels[which],
            plans[which][1][position],
            n_negatives,
            n_random,
            rng,
            teacher.get(quadruples[which].name),
        )


def deal(relevance: Sequence[Relevance], batch_size: int, rng: np.random.Generator) -> list[list[tuple[int, int]]]:
    """One epoch: every query once, as batches of pairs (query row, which of its positives).

    Like dealing cards: with the queries of one document next to each other, dealing them round the batches puts no
    document into a batch twice unless it has more queries than there are batches. Taught in notebooks/03.
    """
    which = [int(u * len(r.positives)) for u, r in zip(rng.random(len(relevance)), relevance, strict=True)]
    shuffled = rng.permutation(len(relevance)).tolist()
    together: dict[int, list[tuple[int, int]]] = {}  # document -> its queries, both in random order
    for row in shuffled:
        together.setdefault(relevance[row].positives[which[row]], []).append((row, which[row]))
    cards = [card for group in together.values() for card in group]
    n_batches = math.ceil(len(cards) / batch_size)
    return [cards[b::n_batches] for b in rng.permutation(n_batches)]


def _batch(
    quadruple: Quadruple,
    labels: Sequence[Relevance],
    cards: list[tuple[int, int]],
    n_negatives: int,
    n_random: int,
    rng: np.random.Generator,
    teacher: Teacher | None,
) -> Batch:
    positive_ids = [labels[row].positives[n] for row, n in cards]
    negative_ids = []
    for row, _ in cards:
        mine = labels[row].negatives
        hard = [mine[j] for j in rng.permutation(len(mine))[:n_negatives]]
        taken = {*labels[row].positives, *hard}
        negative_ids.append(hard + _drawn(len(quadruple.corpus), n_random, taken, rng))
    logits = None
    if teacher is not None:
        documents = ((row, [p, *n]) for (row, _), p, n in zip(cards, positive_ids, negative_ids, strict=True))
        logits = [[float(teacher[row][d]) for d in those] for row, those in documents]
    return Batch(
        quadruple.name,
        quadruple.task,
        quadruple.instruction,
        queries=[quadruple.queries[row] for row, _ in cards],
        positives=[quadruple.corpus[d] for d in positive_ids],
        negatives=[[quadruple.corpus[d] for d in those] for those in negative_ids],
        positive_ids=positive_ids,
        negative_ids=negative_ids,
        scores=None if labels[cards[0][0]].scores is None else [labels[row].scores[n] for row, n in cards],
        teacher=logits,
    )


def _drawn(corpus: int, n: int, taken: set[int], rng: np.random.Generator) -> list[int]:
    """n different rows of a corpus, fewer where it has fewer, none of `taken`."""
    if not n:
        return []
    few = rng.choice(corpus, min(corpus, n + len(taken)), replace=False).tolist()
    return [row for row in few if row not in taken][:n]


def main(arguments: Sequence[str] | None = None) -> None:
    """A contact sheet of a task of Emoji World, and the task as a folder if wanted."""
    example = "example: q3vl-mini data text_to_image --out sheet.png"
    parser = argparse.ArgumentParser(prog="q3vl-mini data", description=main.__doc__, epilog=example)
    parser.add_argument("task", help="name of a task, e.g. text_to_image; a wrong name lists them all")
    parser.add_argument("--split", default="train", choices=("train", "validation", "test"))
    parser.add_argument("--n", type=int, default=200, help="number of queries (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=8, help="queries on the sheet (default 8)")
    noise = "share of the queries that get {} (default 0)"
    parser.add_argument("--wrong", type=float, default=0.0, help=noise.format("a wrong label"))
    parser.add_argument("--duplicates", type=float, default=0.0, help=noise.format("an unlabelled near-duplicate"))
    parser.add_argument("--out", type=Path, required=True, help="the contact sheet, a picture file")
    parser.add_argument("--save", type=Path, help="also write the quadruple into this folder")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(arguments)
    from .emoji_world.tasks import build
    from .noise import add_noise

    try:
        quadruple = build(options.task, options.split, options.n, options.seed)
        if options.wrong or options.duplicates:
            quadruple = add_noise(quadruple, wrong=options.wrong, duplicates=options.duplicates, seed=options.seed)
    except ValueError as error:  # an unknown task, one that this split lacks, a rate outside [0, 1]
        parser.error(str(error))
    quadruple = replace(quadruple, meta={**quadruple.meta, "licence": EMOJI_WORLD_LICENCE})
    contact_sheet(quadruple, options.rows, options.seed).save(options.out)
    if options.save:
        save_quadruple(quadruple, options.save)
    made = {"sheet": str(options.out), "folder": options.save and str(options.save), "name": quadruple.name}
    made |= {"queries": len(quadruple), "documents": len(quadruple.corpus)}
    if options.json:
        print(json.dumps(made))
        return
    print(f"{options.out}: {min(options.rows, len(quadruple))} of {len(quadruple)} queries of {quadruple.name}")
    if options.save:
        print(f"{options.save}: {len(quadruple)} queries, {len(quadruple.corpus)} documents")


if __name__ == "__main__":
    main()
