"""A person's own data: pairs of a query and what it should find, from a table, a data set or a folder of pictures.

A row has `query` and `positive`, and may have `negatives`, `instruction`, `score` (how alike the two are) and `split`.
A cell is

- a text;
- the path of a picture or video, counted from the table's folder and below it, or a page: `manual.pdf#page=3`;
- a mix, {"text": ..., "image": ..., "video": ...}, in CSV as JSON;
- a picture as the `datasets` library has it ({"bytes": ..., "path": ...}), a PIL image, or an array;
- in `positive` and `negatives`, a list of these, in CSV as JSON.

One bad row does not end the reading: it is handed on as a Fault that names it.
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image

from .choices import SPLITS
from .items import Item, read_items
from .media import IMAGE_FILES, VIDEO_FILES, load_image
from .pages import PdfPage, pdf_page
from .paths import below
from .records import MODALITIES, Instance, is_empty, text_problem
from .tables import TABLES, read_rows

COLUMNS = ("query", "positive", "negatives", "instruction", "score", "split")
LOOKED_AT = 100  # first rows, in which a needed column has to be


class Row(NamedTuple):
    """Where a pair comes from: the number of its row, from 0, and the split's name if splits are separate sources."""

    number: int
    source: str = ""

    def __str__(self) -> str:
        return f"{self.source + ' ' if self.source else ''}row {self.number}"


@dataclass(frozen=True)
class Pair:
    """One sound row. `score`: graded similarity, None where pairs are simply right. `split`: the person's own."""

    row: Row
    query: Instance
    positives: tuple[Instance, ...]
    negatives: tuple[Instance, ...] = ()
    score: float | None = None
    split: str | None = None


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row: `kind` in two words ("missing file"), `message` with what was found and what to do."""

    row: Row
    column: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.row}, {self.column}: {self.kind}: {self.message}"


class CellError(ValueError):
    """A cell that cannot be used; `kind` is the Fault's."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def read_pairs(
    data: Any,
    columns: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    media: str | Path | None = None,
    root: str | Path | None = None,
) -> Iterator[Pair | Fault]:
    """The rows of `data` in their order, each as a Pair, or as the Faults that keep it from being one.

    A negative that cannot be used is a Fault and is left out; its pair stays. Files are looked for, not opened. Rows
    are read one by one, and with `media` pictures are held as paths.

    Args:
        data: a table (.jsonl, .csv, .parquet); a folder of pictures, whose queries are their captions (metadata.jsonl
            as Hugging Face's ImageFolder has it, else a .txt file beside the picture, else the file's name); a
            `datasets` data set, in memory, streamed, or the folder of `save_to_disk`; an iterable of rows (dicts); or
            {"train": one of these, "test": another}, which is also what a DatasetDict is, and a folder that has nothing
            but folders of these names.
        columns: {"query": "title"} where a column has another name.
        kinds: {"positive": "image"} where what a string is does not show in its ending: "text", "image" or "video".
        media: a folder where pictures go that are no files yet, so that they need not stay in memory.
        root: below which the files that rows name must lie. None is the folder of a table or of pictures, and anywhere
            for rows that a program makes.

    Raises:
        FileNotFoundError, ValueError: the whole cannot be read, a column is missing, or an argument is wrong.
    """
    columns, kinds = dict(columns or {}), dict(kinds or {})
    if unknown := [*(set(columns) - set(COLUMNS)), *(set(kinds) - set(COLUMNS))]:
        raise ValueError(f"unknown columns {sorted(unknown)}; they are {', '.join(COLUMNS)}")
    if wrong := set(kinds.values()) - set(MODALITIES):
        raise ValueError(f"unknown kinds {sorted(wrong)}; they are {', '.join(MODALITIES)}")
    data = _in_splits(data)
    if isinstance(data, Mapping):
        if unknown := set(data) - set(SPLITS):
            raise ValueError(f"unknown splits {sorted(unknown)}; they are {', '.join(SPLITS)}")
        for split, part in data.items():
            yield from _read(part, columns, kinds, media, root, split)
    else:
        yield from _read(data, columns, kinds, media, root, "")


def _in_splits(data: Any) -> Any:
    """A folder as what is in it: a saved `datasets` data set, or {split: folder}; other data as it is."""
    if not isinstance(data, (str, Path)) or not Path(data).is_dir():
        return data
    names = {file.name for file in Path(data).iterdir() if not file.name.startswith(".")}
    if names & {"dataset_info.json", "dataset_dict.json"}:
        return datasets.load_from_disk(str(data))
    if names and names <= set(SPLITS):
        return {split: Path(data) / split for split in SPLITS if split in names}
    return data


def _read(
    data: Any, columns: dict, kinds: dict, media: str | Path | None, root: str | Path | None, source: str
) -> Iterator[Pair | Fault]:
    rows, folder, usual = _source(data)
    first = list(islice(rows, LOOKED_AT))
    there = set().union(*(row for row in first if isinstance(row, Mapping)))
    names = {name: name for name in COLUMNS} | {k: next((n for n in v if n in there), k) for k, v in usual.items()}
    names |= columns
    if missing := [names[name] for name in ("query", "positive") if names[name] not in there]:
        if not first:
            raise ValueError(f"{data if isinstance(data, (str, Path)) else 'the data'} has no rows")
        told = sorted(there, key=str) or f"rows such as {first[0]!r:.200}"
        raise ValueError(f"no column {missing} among {told}; say which it is: columns={{'query': 'title'}}")
    if root is None and isinstance(data, (str, Path)):
        root = data if Path(data).is_dir() else folder
    cells = _Cells(folder, kinds, Path(media) if media is not None else None, root)
    for number, row in enumerate(chain(first, rows)):
        where = Row(number, source)
        if isinstance(row, ValueError):
            yield Fault(where, "row", "unreadable line", str(row))
        elif not isinstance(row, Mapping):
            yield Fault(where, "row", "wrong type", f"a {type(row).__name__}; give a dict of columns")
        else:
            yield from _pair(where, {name: row.get(names[name]) for name in COLUMNS}, cells, source)


def _source(data: Any) -> tuple[Iterator[dict[str, Any] | ValueError], Path, dict[str, tuple[str, ...]]]:
    """Rows, the folder that their paths count from, and the names that columns usually have there."""
    if isinstance(data, (str, Path)):
        path = Path(data)
        if not path.is_dir():
            return read_rows(path), path.parent, {}
        tables = sorted(file for file in path.rglob("metadata.*") if file.suffix in TABLES)
        if tables:
            rows = chain.from_iterable(_placed(table) for table in tables)
            return rows, Path(), {"query": ("query", "text", "caption"), "positive": ("file_name",)}
        return _captioned(path), Path(), {}
    if isinstance(data, (datasets.Dataset, datasets.IterableDataset)):
        return iter(_undecoded(data)), Path(), {}
    if isinstance(data, Iterable) and not isinstance(data, bytes):
        return iter(data), Path(), {}
    raise ValueError(f"a {type(data).__name__} is no data; give a table, a folder, a datasets data set or rows")


def _placed(table: Path) -> Iterator[dict[str, Any] | ValueError]:
    for row in read_rows(table):
        if isinstance(row, dict) and isinstance(row.get("file_name"), str):
            row["file_name"] = str(table.parent / row["file_name"])
            row["negatives"] = [_beside(cell, table.parent) for cell in _listed(row.get("negatives"))]
        yield row


def _beside(cell: Any, folder: Path) -> Any:
    """A file's name as its path, counted from `folder`; other cells as they are."""
    is_file = isinstance(cell, str) and PurePosixPath(cell).suffix.lower() in (*IMAGE_FILES, *VIDEO_FILES)
    return str(folder / cell) if is_file else cell


def _captioned(folder: Path) -> Iterator[dict[str, Any]]:
    """Pictures and videos with the text file beside each, or with the words of its name."""
    found = {item.id: item.instance for item in read_items(folder) if isinstance(item, Item)}
    for name, instance in found.items():
        if "text" not in instance:
            path = PurePosixPath(name)
            beside = found.get(str(path.with_suffix(".txt")), {"text": path.stem.replace("_", " ").replace("-", " ")})
            yield {"query": {"text": beside["text"].strip()}, "positive": instance}


def _undecoded(data: Any) -> Any:
    """A `datasets` data set that hands out files as they are stored."""
    for name, feature in (data.features or {}).items():
        inside = getattr(feature, "feature", feature)
        if isinstance(inside, (datasets.Image, datasets.Video)):
            raw = type(inside)(decode=False)
            data = data.cast_column(name, raw if inside is feature else datasets.List(raw))
    return data


def _pair(where: Row, row: dict[str, Any], cells: "_Cells", source: str) -> Iterator[Pair | Fault]:
    read: dict[str, Any] = {}
    readers = {
        "query": cells.instance,
        "positive": cells.instances,
        "instruction": _instruction,
        "score": _score,
        "split": _split,
    }
    for column, reader in readers.items():
        try:
            read[column] = reader(row[column], column)
        except CellError as error:
            yield Fault(where, column, error.kind, str(error))
    negatives = []
    for cell in _listed(row["negatives"]):
        try:
            negatives.append(cells.instance(cell, "negatives"))
        except CellError as error:
            yield Fault(where, "negatives", error.kind, f"{error} (this negative is left out)")
    if len(read) == len(readers):
        query = read["query"] | ({"instruction": read["instruction"]} if read["instruction"] else {})
        split = source or read["split"]
        yield Pair(where, query, tuple(read["positive"]), tuple(negatives), read["score"], split)


def _missing(value: Any) -> bool:
    return is_empty(value) or (isinstance(value, float) and math.isnan(value))


def _instruction(value: Any, column: str) -> str | None:
    if _missing(value):
        return None
    if not isinstance(value, str):
        raise CellError("wrong type", f"a {type(value).__name__}; state the task in a sentence")
    return _sound(value.strip())


def _score(value: Any, column: str) -> float | None:
    if _missing(value):
        return None
    try:
        score = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise CellError("wrong type", f"{value!r} is no number; give the similarity of the two as one")
    return score


def _split(value: Any, column: str) -> str | None:
    if _missing(value):
        return None
    if not isinstance(value, str) or value not in SPLITS:
        raise CellError("wrong type", f"{value!r} is no split; they are {', '.join(SPLITS)}")
    return value


def _listed(value: Any) -> list[Any]:
    """The cells of a list, of a list as JSON, or the one cell."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass  # a text that begins with a bracket
    if _missing(value):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _sound(text: str) -> str:
    """The text itself. CellError where it cannot be tokenised or written."""
    if problem := text_problem(text, "it", "text"):
        raise CellError("broken text", problem)
    return text


class _Cells:
    """Cells to instances. Paths count from `folder` and lie below `root`, if given; pictures without a file go into
    `media`, if given."""

    def __init__(self, folder: Path, kinds: Mapping[str, str], media: Path | None, root: str | Path | None = None):
        self.folder, self.kinds, self.media, self.root = folder, kinds, media, root

    def instances(self, value: Any, column: str) -> list[Instance]:
        cells = _listed(value)
        if not cells:
            raise CellError("empty cell", "nothing is given; fill it or drop the row")
        return [self.instance(cell, column) for cell in cells]

    def instance(self, value: Any, column: str) -> Instance:
        """Raises CellError: empty cell, wrong type, broken text, missing file or path outside."""
        if isinstance(value, Path):
            value = str(value)
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = _object(value)
        if _missing(value) or (isinstance(value, Mapping) and all(part is None for part in value.values())):
            raise CellError("empty cell", "nothing is given; fill it or drop the row")
        if isinstance(value, Mapping) and not set(value) <= {"bytes", "path"}:
            return self._mix(value)
        kind = self.kinds.get(column) or self._kind(value)
        return {kind: self._value(value, kind)}

    def _mix(self, value: Mapping[str, Any]) -> Instance:
        if unknown := set(value) - {*MODALITIES, "instruction"}:
            keys = sorted(unknown, key=str)
            raise CellError("wrong type", f"an object with {keys}; its keys are text, image and video")
        out: Instance = {}
        for kind, part in value.items():
            if not _missing(part):
                many = isinstance(part, (list, tuple))
                out[kind] = [self._value(x, kind) for x in part] if many else self._value(part, kind)
        if not set(out) & set(MODALITIES):
            raise CellError("empty cell", "an object without text, image or video; fill it or drop the row")
        return out

    def _kind(self, value: Any) -> str:
        path = value.get("path") if isinstance(value, Mapping) else value
        if not isinstance(path, str):
            return "image"
        if "\n" in path:
            return "text"
        ending = PurePosixPath(path.rstrip()).suffix.lower()
        if ending in VIDEO_FILES:
            return "video"
        is_page = pdf_page(path) is not None or ending == ".pdf"
        return "image" if ending in IMAGE_FILES or is_page or not isinstance(value, str) else "text"

    def _value(self, value: Any, kind: str) -> Any:
        if kind in ("text", "instruction"):
            if not isinstance(value, str):
                raise CellError("wrong type", f"a {type(value).__name__} where a text is expected; write it as one")
            return _sound(value.strip())
        if isinstance(value, Mapping):
            content, path = value.get("bytes"), value.get("path")
            if isinstance(content, (bytes, bytearray)):
                return self._kept(bytes(content), PurePosixPath(path).suffix if isinstance(path, str) else "")
            value = path
        if isinstance(value, str):
            return self._file(value.strip())
        if isinstance(value, (bytes, bytearray)):
            return self._kept(bytes(value), "")
        if isinstance(value, PdfPage):
            return value
        if isinstance(value, (Image.Image, np.ndarray)) and kind == "image":
            return self._picture(value)
        raise CellError("wrong type", f"a {type(value).__name__} is no text, file, picture or object with these")

    def _file(self, path: str) -> str | PdfPage:
        if "://" in path[:12]:
            raise CellError("missing file", f"{path!r} is an address, and nothing is fetched; download it")
        page = pdf_page(path, self.folder)
        if page is None and path.lower().endswith(".pdf"):
            raise CellError("wrong type", f"{path!r} names no page; write {path}#page=1, one row a page")
        try:
            file = below(page.path, "", self.root) if page else below(path, self.folder, self.root)
        except ValueError as error:
            raise CellError("path outside", str(error)) from error
        if not os.path.isfile(file):  # Path.is_file raises for a name that is too long
            raise CellError("missing file", f'there is no {str(file)[:200]!r}; if it is a text, write {{"text": ...}}')
        return page or str(file)

    def _picture(self, value: Any) -> Any:
        if self.media is None:
            return value
        buffer = io.BytesIO()
        try:
            Image.fromarray(load_image(value)).save(buffer, "PNG")
        except ValueError as error:
            raise CellError("wrong type", str(error)) from error
        return self._kept(buffer.getvalue(), ".png")

    def _kept(self, content: bytes, ending: str) -> bytes | str:
        if self.media is None:
            return content
        ending = ending if ending.lower() in (*IMAGE_FILES, *VIDEO_FILES) else ""
        file = self.media / f"{hashlib.blake2b(content, digest_size=16).hexdigest()}{ending}"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return str(file)


def _object(text: str) -> Any:
    """The object that a cell holds as JSON, or the cell itself if it is just a text with a brace."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) and set(value) <= {*MODALITIES, "instruction"} else text
