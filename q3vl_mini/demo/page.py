"""What the page's events do: values of components in, values of components out, and every fault as a line of words."""

import secrets
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from . import markup
from .collections import Collection, Collections, files_below
from .engine import Engine, Settings
from .examples import SAME
from .items import KINDS, Item, model_view
from .remote import fetch, is_address
from .shelf import Shelf
from .uploads import read_query

GALLERY = "gallery"
LOCAL = "local"  # whose collections these are where the demo has one user
COMPARED = 9  # results of each side
INSTRUCTION = 300  # characters
FAULTS = (ValueError, FileNotFoundError)  # their texts are written for the user


class Page:
    """The demo's state and its events.

    public: each visitor has collections of their own, by a key that their browser keeps. folder: below which files may
    be indexed where they lie; not on a public page. remote: a query of one address is the picture or clip behind it.
    """

    def __init__(
        self,
        engine: Engine,
        shipped: Shelf,
        collections: Collections,
        folder: Path | None = None,
        public: bool = False,
        remote: bool = False,
    ):
        if public and folder is not None:
            raise ValueError(f"a public demo cannot open the folder {folder}; leave one of the two out")
        self.engine, self.models, self.shipped, self.collections = engine, engine.models, shipped, collections
        self.folder, self.public, self.remote = folder, public, remote
        self._cancelled: set[str] = set()  # owners
        self.scratch = Path(tempfile.mkdtemp(prefix="q3vl-demo-"))  # Gradio serves what an event takes from there

    # --- whose, and where

    def owner(self, visitor: str) -> str:
        """The key of a visitor's collections. ValueError without a visitor on a public page."""
        if not self.public:
            return LOCAL
        if not visitor:
            raise ValueError("this browser keeps no data of the page, so it cannot have a collection; load it again")
        return f"visitor {visitor}"

    def shelf(self, where: str, visitor: str) -> Shelf:
        """The gallery, or a collection of this visitor's."""
        return self.shipped if where == GALLERY else self.own(where, visitor)

    def own(self, id: str | None, visitor: str) -> Collection:
        """A collection of this visitor's."""
        try:
            return self.collections.get(self.owner(visitor), id or "")
        except KeyError:
            raise ValueError("this collection is not there (any more); choose another one") from None

    def places(self, visitor: str) -> list[tuple[str, str]]:
        """What can be searched, as choices of a dropdown."""
        return [*self.shipped_choice, *self.owned(visitor)]

    @property
    def shipped_choice(self) -> list[tuple[str, str]]:
        """The gallery as the choice that everybody has."""
        return [(f"Gallery ({len(self.shipped)} items)", GALLERY)]

    def owned(self, visitor: str) -> list[tuple[str, str]]:
        """A visitor's collections, as choices of a dropdown."""
        return [(name, id) for id, name in self.collections.names(self.owner(visitor)).items()]

    def arrive(self, visitor: str) -> tuple:
        """A page that loads: the visitor's key, and the choices of places (three times) and of collections."""
        visitor = visitor or secrets.token_urlsafe(24)
        places = gr.Dropdown(choices=self.places(visitor))
        return visitor, places, places, places, gr.Dropdown(choices=self.owned(visitor))

    def widest(self, model: str) -> Any:
        """The slider of dimensions, as wide as the model's vectors, at all of them."""
        dim = self.models.dim(model)
        return gr.Slider(maximum=dim, value=dim)

    def fitted(self, model: str, dim: int) -> Any:
        """The slider as wide as the vectors of the model that has been chosen, and where it was, if it can be."""
        most = self.models.dim(model)
        return gr.Slider(maximum=most, value=min(dim, most))

    # --- search, compare, map, pair

    def search(self, query: dict, instruction: str, where: str, kinds: list[str], *chosen: Any) -> Iterator[tuple]:
        """Status, cards and cost. chosen: model, dim, precision, rescore, rerank, then the visitor."""
        *chosen, visitor = chosen
        try:
            instance, shelf = self._instance(query), self.shelf(where, visitor)
            settings = _settings(instruction, kinds, chosen)
            for bar in self._looking(shelf, settings.model):
                yield bar, gr.skip(), gr.skip()
            answer = self.engine.search(shelf, instance, settings)
        except FAULTS as error:
            yield markup.status(str(error), bad=True), gr.skip(), gr.skip()
            return
        yield markup.found(answer), markup.cards(answer.results, pick=True), markup.cost(answer)

    def search_again(self, query: dict, *chosen: Any) -> Iterator[tuple]:
        """`search` after a setting has changed: with no query yet, nothing happens."""
        if query and (_filled(query["text"]) or query["files"]):
            yield from self.search(query, *chosen)
        else:
            yield gr.skip(), gr.skip(), gr.skip()

    def like_this(self, where: str, visitor: str, event: gr.EventData) -> tuple[Any, str, str]:
        """The clicked item as a query, its instruction, and a status."""
        try:
            item = self.shelf(where, visitor).item(event.id)
        except (ValueError, KeyError):
            return gr.skip(), gr.skip(), markup.status("this item is gone; search again", bad=True)
        return self.as_query(item), SAME, markup.status(f"Searching for more like “{item.title}” …")

    def as_query(self, item: Item, text: str = "") -> dict[str, Any]:
        """An item, with words beside it, as the value of a search box."""
        content = model_view(item)
        if content is None:
            return {"text": str(item.instance["text"]), "files": []}
        file = self._query_file(item)
        file.write_bytes(content)
        return {"text": text, "files": [str(file)]}

    def _query_file(self, item: Item) -> Path:
        return self.scratch / f"{item.id}.webp"

    def compare(self, query: dict, instruction: str, where: str, *chosen: Any) -> Iterator[tuple]:
        """Status, then cards and cost of both sides. chosen: twice model to rerank, then the visitor."""
        *chosen, visitor = chosen
        nothing = [gr.skip()] * 4
        try:
            instance, shelf = self._instance(query), self.shelf(where, visitor)
            half = len(chosen) // 2
            sides = [
                replace(_settings(instruction, (), part), k=COMPARED) for part in (chosen[:half], chosen[half:])
            ]
            for model in dict.fromkeys(side.model for side in sides):
                for bar in self._looking(shelf, model):
                    yield bar, *nothing
            compared = self.engine.compare(shelf, instance, *sides)
        except FAULTS as error:
            yield markup.status(str(error), bad=True), *nothing
            return
        shown = [[markup.cards(x.results, compared.shared), markup.cost(x)] for x in (compared.left, compared.right)]
        yield markup.comparison(compared), *shown[0], *shown[1]

    def draw(self, where: str, model: str, words: str | None, visitor: str) -> Iterator[tuple]:
        """Status, legend, map, and the choices of its items."""
        try:
            shelf = self.shelf(where, visitor)
            for bar in self._looking(shelf, model):
                yield bar, gr.skip(), gr.skip(), gr.skip()
            query = read_query(words, []) if _filled(words) else None
            drawn = self.engine.map(shelf, model, query=query)
        except FAULTS as error:
            yield markup.status(str(error), bad=True), gr.skip(), gr.skip(), gr.skip()
            return
        kinds = [kind for kind in KINDS if any(item.kind == kind for item in drawn.items)]
        items = gr.Dropdown(choices=[(item.title, item.id) for item in drawn.items], value=None)
        said = markup.status(f"{len(drawn.items)} items as {model} sees them. Click one, or choose it by name.")
        yield said, markup.legend(kinds), markup.scatter(drawn), items

    def clicked(self, where: str, visitor: str, event: gr.EventData) -> tuple[Any, str]:
        """A mark of the map: its item as the choice, and its card."""
        return event.id, self.shown(where, event.id, visitor)

    def shown(self, where: str, id: str | None, visitor: str) -> str:
        """The card of an item."""
        try:
            return markup.one_card(self.shelf(where, visitor).item(id or ""))
        except (ValueError, KeyError):
            return markup.status("this item is gone; draw the map again", bad=True)

    def score_pair(self, query: dict, document: dict, model: str, instruction: str) -> tuple[str, Any]:
        """Status and scores."""
        try:
            boxes = ((query, "the query"), (document, "the document"))
            one, other = (self._instance(box, name) for box, name in boxes)
            score = self.engine.score_pair(one, other, model, _shortened(instruction))
        except FAULTS as error:
            return markup.status(str(error), bad=True), gr.skip()
        return markup.status(f"{sum(score.ms.values()):.0f} ms."), markup.pair(score)

    def _instance(self, box: dict | None, what: str = "the query") -> dict[str, Any]:
        """The value of a search box as an instance; an address is what is behind it, if that is wanted."""
        text, files = (box["text"], box["files"]) if box else ("", [])
        try:
            if not (self.remote and text and is_address(text)):
                return read_query(text, files)
            file = fetch(text.strip(), self.scratch)
            try:
                return read_query("", [*files, file])
            finally:
                file.unlink(missing_ok=True)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error

    def _looking(self, shelf: Shelf, model: str) -> Iterator[str]:
        """Progress while a model makes vectors that are not there yet."""
        for done, total in shelf.embed(self.models, model):
            yield markup.progress(done, total, f"{model} looks at “{shelf.name}” for the first time")

    # --- own collections

    def ask_to_index(self, visitor: str) -> str:
        """Status. A `cancel` from now on is of the indexing that is asked for, even while that waits in the queue."""
        try:
            self._cancelled.discard(self.owner(visitor))
        except FAULTS as error:
            return markup.status(str(error), bad=True)
        return markup.status("Waiting for its turn …")

    def index(
        self,
        chosen: str | None,
        files: list[str] | None,
        more: list[str] | None,
        folder: str | None,
        model: str,
        visitor: str,
    ) -> Iterator[tuple]:
        """Status, contents, the choices of collections, of places (three times), and files (twice), in the end none.

        files, more: uploaded, one by one or as a folder. They are removed: a collection keeps what it has made of them.
        """
        same = [gr.skip()] * 6
        uploaded = [Path(file) for file in [*(files or []), *(more or [])]]
        try:
            owner, paths = self.owner(visitor), list(uploaded)
            if owner in self._cancelled:
                yield markup.status("Cancelled before it began."), gr.skip(), *same
                return
            if self.folder is not None and _filled(folder):
                paths += files_below(folder, self.folder)
            if not paths:
                raise ValueError("choose files or a folder of them")
            names = self.collections.names(owner)
            id = chosen if chosen in names else self.collections.create(owner, chosen or "")
            collection = self.collections.get(owner, id)
        except FAULTS as error:
            yield markup.status(str(error), bad=True), gr.skip(), *same
            return
        places = gr.Dropdown(choices=self.places(visitor))
        known = [gr.Dropdown(choices=self.owned(visitor), value=id), places, places, places, *same[4:]]
        yield markup.progress(0, len(paths), "files read"), gr.skip(), *known
        left_out: list[str] = []
        for bar in self._indexing(collection, paths, model, left_out):
            if owner in self._cancelled:
                said = f"Cancelled. “{collection.name}” has {len(collection)} items; index again to go on."
                yield markup.status(said), markup.plain_cards(collection.items), *same
                return
            yield bar, gr.skip(), *same
        for file in uploaded:
            file.unlink(missing_ok=True)
        said = markup.indexed(collection, len(paths), left_out)
        yield said, markup.plain_cards(collection.items), *same[:4], None, None

    def _indexing(self, collection: Collection, paths: list[Path], model: str, left_out: list[str]) -> Iterator[str]:
        """Take files in and embed them; yields progress, and fills `left_out` with what went wrong."""
        for step in collection.add(paths):
            left_out += [step.problem] if step.problem else []
            yield markup.progress(step.done, step.total, "files read")
        try:
            for done, total in collection.embed(self.models, model):
                yield markup.progress(done, total, "items embedded")
        except FAULTS as error:
            left_out.append(str(error))

    def cancel(self, visitor: str) -> None:
        """End what this visitor is indexing, or has asked for, after its present step; what is done is kept."""
        self._cancelled.add(self.owner(visitor))

    def contents(self, chosen: str | None, visitor: str) -> tuple[str, str]:
        """Status and cards of a chosen collection; of a name that is new, that it is."""
        try:
            collection = self.own(chosen, visitor)
        except ValueError:
            return markup.status("A new collection: add files, then press Index." if chosen else ""), ""
        return markup.status(f"{len(collection)} items."), markup.plain_cards(collection.items)

    def delete(self, chosen: str | None, sure: bool, visitor: str) -> tuple:
        """Status, contents, the choices of collections, and of places (three times), and the tick taken back."""
        same = [gr.skip()] * 5
        try:
            if not sure:
                raise ValueError("tick the box first: what is deleted cannot be brought back")
            collection = self.own(chosen, visitor)
            name = collection.name
            self.collections.delete(self.owner(visitor), chosen)
            for item in collection.items:  # what has been a query
                self._query_file(item).unlink(missing_ok=True)
        except ValueError as error:
            return markup.status(str(error), bad=True), gr.skip(), *same
        said = markup.status(f"“{name}” is deleted, with its files and vectors.")
        places = gr.Dropdown(choices=self.places(visitor), value=GALLERY)
        return said, "", gr.Dropdown(choices=self.owned(visitor), value=None), places, places, places, False


def _filled(words: str | None) -> bool:
    """Whether a box holds words; one that was never touched may hold None."""
    return bool((words or "").strip())


def _shortened(instruction: str | None) -> str:
    return (instruction or "").strip()[:INSTRUCTION]


def _settings(instruction: str | None, kinds: Sequence[str], chosen: Sequence[Any]) -> Settings:
    """chosen: model, dim, precision, rescore, rerank."""
    model, dim, precision, rescore, rerank = chosen
    kinds = () if set(kinds) >= set(KINDS) else tuple(kinds)
    return Settings(model, int(dim), precision, rescore, rerank, _shortened(instruction), kinds)
