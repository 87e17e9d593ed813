"""Instances whose content waits on disk, so that a table of texts need not fit into memory."""

import json
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .pages import PdfPage
from .records import Instance


class Spill:
    """A file in `folder` that grows by what `put` is given; it has no name there, and is gone with this object.

    In memory stays a SpilledInstance for each, which any number of threads may read.
    """

    def __init__(self, folder: str | Path):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)
        weakref.finalize(self, self._file.close)
        self._end, self._lock = 0, threading.Lock()

    def put(self, instance: Instance) -> "SpilledInstance":
        """The same instance, read from the file each time one of its values is asked for."""
        content = json.dumps(dict(instance), default=_as_json).encode()
        with self._lock:
            self._file.seek(self._end)
            self._file.write(content)
            place, self._end = self._end, self._end + len(content)
        return SpilledInstance(self, place, len(content))

    def _read(self, place: int, size: int) -> dict[str, Any]:
        with self._lock:
            self._file.seek(place)
            content = self._file.read(size)
        return json.loads(content, object_hook=_from_json)


def _as_json(value: Any) -> dict[str, Any]:
    """What JSON lacks: a page of a PDF."""
    if not isinstance(value, PdfPage):
        raise TypeError(f"a {type(value).__name__} cannot wait on disk; give texts, paths and pages")
    return {"page": asdict(value)}


def _from_json(content: dict[str, Any]) -> Any:
    return PdfPage(**content["page"]) if content.keys() == {"page"} else content


class SpilledInstance(Mapping):
    """An Instance that is read when it is looked at. A copy or a pickle of it is a plain dict."""

    __slots__ = ("_place", "_size", "_spill")

    def __init__(self, spill: Spill, place: int, size: int):
        self._spill, self._place, self._size = spill, place, size

    def _content(self) -> dict[str, Any]:
        return self._spill._read(self._place, self._size)

    def __getitem__(self, key: str) -> Any:
        return self._content()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content())

    def __len__(self) -> int:
        return len(self._content())

    def __repr__(self) -> str:
        return repr(self._content())

    def __reduce__(self) -> tuple:
        return dict, (self._content(),)
