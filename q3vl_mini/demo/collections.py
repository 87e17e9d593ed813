"""Collections of one's own: files taken in one by one, kept across restarts, deleted on request.

ROOT/OWNER/COLLECTION holds collection.json (its name and items), files/ (pictures and clips as they were decoded) and
the vectors. An owner's folder is named after a hash of the owner's key, a collection's by random, a file's after a hash
of its content: nothing that a visitor types or uploads becomes part of a path.
"""

import json
import os
import secrets
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Lock
from weakref import WeakValueDictionary

import numpy as np

from .items import Item
from .room import FULL, has_room
from .shelf import Shelf
from .uploads import Upload, printable, read_upload

MAX_ITEMS = 2_000  # of a collection
MAX_COLLECTIONS = 20  # of an owner
NAME_LENGTH = 60
OPEN = 32  # collections that stay open with their indexes, those used last
CARD = "collection.json"


@dataclass(frozen=True)
class Step:
    """A file that was looked at: the how-manieth of how many; `problem` says why it was left out, "" if it is in."""

    done: int
    total: int
    problem: str = ""


class Collection(Shelf):
    """A shelf whose items are files that somebody added."""

    def __init__(self, folder: Path):
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        super().__init__(card["name"], [_item(row, folder) for row in card["items"]], folder)
        self._rows, self._lock = card["items"], Lock()

    def add(self, files: Iterable[str | Path]) -> Iterator[Step]:
        """Take files in, one at a step: a bad one is left out and the next one tried; the same content is taken once.

        Every file is kept before the next is read, so whoever stops iterating has what came before.
        """
        files = list(files)
        for done, file in enumerate(files, 1):
            try:
                self._take(read_upload(file))
            except ValueError as error:
                yield Step(done, len(files), str(error))
            except OSError as error:
                yield Step(done, len(files), f"{Path(file).name} cannot be read ({error.strerror})")
            else:
                yield Step(done, len(files))

    def _take(self, upload: Upload) -> None:
        row = {"id": _digest(upload), "kind": upload.kind, "title": upload.title}
        with self._lock:
            if any(other["id"] == row["id"] for other in self._rows):
                return
            if len(self._rows) >= MAX_ITEMS:
                raise ValueError(f"{upload.title}: a collection has at most {MAX_ITEMS} items; start another one")
            if not has_room(self.folder):
                raise ValueError(f"{upload.title}: {FULL}")
            if upload.kind == "text":
                row["text"] = upload.instance["text"]
            else:
                content, ending = _stored(upload)
                row["file"] = f"files/{row['id']}{ending}"
                (self.folder / "files").mkdir(exist_ok=True)
                (self.folder / row["file"]).write_bytes(content)
            self._rows = [*self._rows, row]
            _write_card(self.folder, self.name, self._rows)
            self.items = [*self.items, _item(row, self.folder)]
            self.changed()


class Collections:
    """All collections of all owners below one folder. An owner sees and reaches their own alone."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        # one object for each, whoever asks for it, as long as somebody uses it or it was used lately
        self._open: WeakValueDictionary[Path, Collection] = WeakValueDictionary()
        self._recent: deque[Collection] = deque(maxlen=OPEN)
        self._opening = Lock()

    def names(self, owner: str) -> dict[str, str]:
        """Names of an owner's collections, by the id that `get` and `delete` take; in alphabetical order."""
        cards = self._folder(owner).glob(f"*/{CARD}")
        names = {card.parent.name: json.loads(card.read_text(encoding="utf-8"))["name"] for card in cards}
        return dict(sorted(names.items(), key=lambda pair: pair[1].casefold()))

    def create(self, owner: str, name: str) -> str:
        """A new, empty collection; returns its id. ValueError for a name that is empty or taken, or one too many."""
        name, known = printable(" ".join(name.split()))[:NAME_LENGTH], self.names(owner)
        if not name:
            raise ValueError("give the collection a name")
        if name in known.values():
            raise ValueError(f"there is a collection {name!r} already; add to it, or take another name")
        if len(known) >= MAX_COLLECTIONS:
            raise ValueError(f"there are {MAX_COLLECTIONS} collections already; delete one")
        folder = self._folder(owner) / secrets.token_hex(8)
        folder.mkdir(parents=True)
        _write_card(folder, name, [])
        return folder.name

    def get(self, owner: str, id: str) -> Collection:
        """A collection; KeyError if this owner has none with that id."""
        if id not in self.names(owner):
            raise KeyError(id)
        folder = self._folder(owner) / id
        with self._opening:
            collection = self._open.get(folder)
            if collection is None:
                collection = self._open[folder] = Collection(folder)
            if collection in self._recent:
                self._recent.remove(collection)
            self._recent.append(collection)
        return collection

    def delete(self, owner: str, id: str) -> None:
        """Remove a collection with its files and vectors; KeyError as `get`."""
        collection = self.get(owner, id)
        with self._opening:
            del self._open[collection.folder]
            self._recent.remove(collection)
        with collection.at_rest():
            shutil.rmtree(collection.folder)

    def _folder(self, owner: str) -> Path:
        if not owner:
            raise ValueError("no owner; the key of a visitor is not empty")
        return self.root / sha256(owner.encode()).hexdigest()[:32]


def files_below(folder: str, root: str | Path) -> list[Path]:
    """All files of a folder and those below it, in order; hidden ones are left out.

    Args:
        folder: absolute, or from `root`. root: where it must lie; what links to a place outside is left out.

    Raises ValueError for a folder that is not there or not inside.
    """
    root = Path(root).resolve()
    place = (root / folder).resolve()
    if not place.is_dir() or not place.is_relative_to(root):
        raise ValueError(f"there is no folder {folder!r} in {root}; give one that is, or . for all of it")
    paths = sorted(path for path in place.rglob("*") if path.is_file() and path.resolve().is_relative_to(root))
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(place).parts)]


def _item(row: dict[str, str], folder: Path) -> Item:
    kinds = {"picture": "image", "clip": "video"}
    instance = {kinds[row["kind"]]: str(folder / row["file"])} if "file" in row else {"text": row["text"]}
    return Item(row["id"], row["kind"], row["title"], instance)


def _digest(upload: Upload) -> str:
    """The same for the same words or pixels; files that hold them may differ."""
    [value] = upload.instance.values()
    array = np.asarray(getattr(value, "frames", value))
    content = value.encode() if upload.kind == "text" else array.tobytes()
    return sha256(f"{upload.kind} {array.shape} ".encode() + content).hexdigest()[:24]


def _stored(upload: Upload) -> tuple[bytes, str]:
    """A picture or clip as a lossless file, and the ending of its name."""
    from ..data import png_bytes, video_bytes  # here, because datasets takes a second to import

    if upload.kind == "picture":
        return png_bytes(upload.instance["image"]), ".png"
    return video_bytes(upload.instance["video"]), ".mkv"


def _write_card(folder: Path, name: str, rows: list[dict[str, str]]) -> None:
    new = folder / f"{CARD}.new"
    new.write_text(json.dumps({"name": name, "items": rows}, ensure_ascii=False, indent=1), encoding="utf-8")
    os.replace(new, folder / CARD)
