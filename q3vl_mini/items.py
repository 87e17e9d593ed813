"""Items on disk and their embeddings on disk: what the commands embed, index and search.

A table (.jsonl, .csv, .parquet) has columns id, text, image, video and instruction, all optional but one of text, image
and video; paths count from the table's folder and lie below it, an image may be a page (`file.pdf#page=3`), other
columns are metadata. A folder gives its pictures, videos and .txt files, each an item whose id is its path.

What cannot be used is handed on as Skipped, with the reason, and the next row is read.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .checkpoint import claim
from .media import IMAGE_FILES, VIDEO_FILES
from .pages import PdfPage, pdf_page
from .paths import below
from .records import MODALITIES, Instance, lone_surrogate, validate_instance
from .tables import TABLES, read_rows

CARD = "vectors.json"
NO_NAME = "its name is not UTF-8; rename the file"


@dataclass(frozen=True)
class Item:
    """One row or file: its id, the instance that is embedded, and metadata: texts and paths of it, other columns."""

    id: str
    instance: Instance
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A row or file that cannot be embedded, and why."""

    id: str
    reason: str


def read_items(source: str | Path, root: str | Path | None = None) -> Iterator[Item | Skipped]:
    """The items of a table or a folder, one at a time, in the order of rows or of file names.

    An id is the column `id`, or the row's number from 0. Skipped are lines that cannot be read, ids that came before,
    paths that lead outside and metadata that JSON cannot hold; what is wrong with the content of an item is found when
    it is embedded.

    Args:
        root: below which the files of a table must lie; None is the table's folder.

    Raises:
        FileNotFoundError, ValueError: naming the file, where it cannot be read at all.
    """
    source = Path(source)
    if source.is_dir():
        yield from _files(source)
    elif source.suffix.lower() in TABLES:
        ids: set[str] = set()
        for number, row in enumerate(read_rows(source)):
            yield _once(row if isinstance(row, ValueError) else dict(row), number, source.parent, root, ids)
    else:
        raise ValueError(f"{source} is neither a folder nor a table; tables end in {', '.join(TABLES)}")


def _once(row: dict[str, Any] | ValueError, number: int, folder: Path, root: Any, ids: set[str]) -> Item | Skipped:
    """A row as an item, if its id is not among `ids`, which grow."""
    if isinstance(row, ValueError):
        return Skipped(f"row {number}", str(row))
    try:
        item = _item(row, number, folder, folder if root is None else root)
    except ValueError as error:
        return Skipped(f"row {number}", str(error))
    if item.id in ids:
        return Skipped(item.id, f"row {number} has the id of an earlier row; give each row its own")
    ids.add(item.id)
    return item


def _files(folder: Path) -> Iterator[Item | Skipped]:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, kind = path.relative_to(folder).as_posix(), path.suffix.lower()
        if kind in IMAGE_FILES:
            instance = {"image": str(path)}
        elif kind in VIDEO_FILES:
            instance = {"video": str(path)}
        elif kind == ".txt":
            try:
                instance = {"text": path.read_text(encoding="utf-8", errors="replace")}
            except OSError as error:
                yield Skipped(name, str(error))
                continue
        else:
            continue
        yield Item(name, instance, dict(instance)) if lone_surrogate(name) is None else Skipped(ascii(name), NO_NAME)


def _item(row: dict[str, Any], number: int, folder: Path, root: str | Path) -> Item:
    """Raises ValueError for a path outside of `root`, and for an id or metadata that cannot be written."""
    row = {name: value for name, value in row.items() if not _is_missing(value)}
    instance = {name: row.pop(name) for name in (*MODALITIES, "instruction") if name in row}
    for kind in ("image", "video"):
        if kind in instance:
            values = instance[kind] if isinstance(instance[kind], list) else [instance[kind]]
            placed = [_placed(x, folder, root) if isinstance(x, str) else x for x in values]
            instance[kind] = placed if isinstance(instance[kind], list) else placed[0]
    name = str(row.pop("id", number))
    shown = {k: v for k, v in instance.items() if isinstance(v, (str, list)) and k != "instruction"}
    shown |= {k: str(v) for k, v in instance.items() if isinstance(v, PdfPage)}
    metadata = {**shown, **row}
    try:
        metadata = json.loads(json.dumps(metadata, ensure_ascii=False, allow_nan=False, default=_told).encode())
        name.encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"its id or metadata cannot be written as JSON in UTF-8 ({error}); mend or drop it") from None
    return Item(name, instance, metadata)


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or isinstance(value, float) and math.isnan(value)


def _placed(path: str, folder: Path, root: str | Path) -> str | PdfPage:
    if "://" in path[:12]:
        return path  # an address: media.prepare says that nothing is fetched
    if page := pdf_page(path, folder):
        below(page.path, "", root)
        return page
    return str(below(path, folder, root))


def _told(value: Any) -> str:
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


def embed_items(
    embedder: Any, items: Sequence[Item | Skipped], batch_size: int = 32, **options: Any
) -> tuple[list[Item], np.ndarray, list[Skipped]]:
    """The items that could be embedded, their vectors (N, D), and the others with the reason.

    options: of Embedder.encode. Where a batch fails, its items are tried one by one.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give 1 or more")
    kept: list[Item] = []
    parts: list[np.ndarray] = []
    skipped = [item for item in items if isinstance(item, Skipped)]
    items = [item for item in items if isinstance(item, Item)]

    def attempt(part: Sequence[Item]) -> None:
        sound = []
        for item in part:
            problems = validate_instance(item.instance, item.id)
            if problems:
                skipped.append(Skipped(item.id, problems[0]))
            else:
                sound.append(item)
        if not sound:
            return
        try:
            parts.append(embedder.encode([item.instance for item in sound], batch_size=batch_size, **options))
            kept.extend(sound)
        except (ValueError, OSError) as error:
            if len(sound) == 1:
                skipped.append(Skipped(sound[0].id, str(error)))
            else:
                for item in sound:
                    attempt([item])

    for start in range(0, len(items), batch_size):
        attempt(items[start : start + batch_size])
    return kept, np.concatenate(parts) if parts else np.zeros((0, options.get("dim") or embedder.dim)), skipped


def check_skipped(skipped: Sequence[Skipped], limit: int, source: str | Path) -> None:
    """Stop a job with ValueError once more than `limit` of its items had to be left out."""
    if len(skipped) > limit:
        raise ValueError(
            f"{source}: {len(skipped)} items cannot be embedded, more than {limit}; the first is {skipped[0].id!r} "
            f"({skipped[0].reason}). Mend them or raise the limit"
        )


def check_any(kept: bool, skipped: Sequence[Skipped], source: str | Path) -> None:
    """ValueError at the end of a job that could embed nothing of what it was given."""
    if not kept:
        first = f": {skipped[0].id!r} ({skipped[0].reason})" if skipped else ", neither rows nor files that are read"
        raise ValueError(f"{source} has nothing that can be embedded{first}")


def embed_to_folder(
    embedder: Any,
    source: str | Path,
    folder: str | Path,
    *,
    shard_size: int = 4096,
    rank: int = 0,
    world: int = 1,
    limit: int = 100,
    progress: bool = True,
    root: str | Path | None = None,
    **options: Any,
) -> list[Skipped]:
    """Embed a table or folder into shards: 00000.npy (N, D), 00000.jsonl (id and metadata a row), and a card.

    A shard that is there is not made again, so a job that was cut short goes on. Of several processes, number `rank`
    of `world` makes every world-th shard. Returns what was skipped (also in skipped-RANK.jsonl).

    Args:
        limit: so many skipped items stop the job. root: see read_items. options: of Embedder.encode.

    Raises:
        ValueError: more than `limit` items, or all, cannot be embedded; the folder is of another model or setting.
    """
    folder = Path(folder)
    claim_folder(embedder, source, folder, shard_size, **options)
    skipped: list[Skipped] = []
    items = read_items(source, root)
    with tqdm(unit="item", disable=not progress or rank > 0) as bar, open(folder / f"skipped-{rank}.jsonl", "a") as log:
        for number in count():
            part = list(islice(items, shard_size))
            if not part:
                if world == 1:
                    check_any(any(rows.stat().st_size for rows in folder.glob("[0-9]*.jsonl")), skipped, source)
                return skipped
            file = folder / f"{number:05}.npy"
            if number % world == rank and not file.is_file():
                kept, vectors, bad = embed_items(embedder, part, **options)
                rows = "".join(json.dumps({"id": i.id, "metadata": i.metadata}, default=str) + "\n" for i in kept)
                file.with_suffix(".jsonl").write_text(rows, encoding="utf-8")
                np.save(new := file.with_suffix(".new.npy"), vectors)
                os.replace(new, file)
                log.writelines(json.dumps({"id": b.id, "reason": b.reason}) + "\n" for b in bad)
                skipped += bad
            bar.update(len(part))
            check_skipped(skipped, limit, source)


def claim_folder(embedder: Any, source: str | Path, folder: Path, shard_size: int = 4096, **options: Any) -> None:
    """Write down what `embed_to_folder` fills a folder with. Of several processes, one does so before the others ask.

    Raises ValueError: it is of another model or setting.
    """
    card = {"identity": embedder.identity(options.get("dim")), "precision": options.get("precision", "float32")}
    card |= {"instruction": options.get("instruction"), "source": str(source), "shard_size": shard_size}
    claim(folder / CARD, card, "vectors")


def load_vectors(folder: str | Path) -> tuple[list[str], np.ndarray, list[dict[str, Any]], dict[str, Any]]:
    """What `embed_to_folder` wrote: ids, vectors (N, D), metadata and the card. One shard is memory-mapped."""
    folder = Path(folder)
    if not (folder / CARD).is_file():
        raise FileNotFoundError(f"{folder} has no {CARD}; make it with `q3vl-mini embed`")
    files = sorted(folder.glob("[0-9]*.npy"))
    parts = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
    lines = [json.loads(x) for f in files for x in f.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    vectors = parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
    card = json.loads((folder / CARD).read_text())
    return [line["id"] for line in lines], vectors, [line["metadata"] for line in lines], card
