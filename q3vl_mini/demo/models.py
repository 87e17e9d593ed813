"""The demo's models: loaded when first asked for, one at work at a time, all adapters of a base on the same weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from ..memory import give_back_freed

if TYPE_CHECKING:
    from ..backbone import Backbone
    from ..embedder import Embedder
    from ..forward import PromptModel, VisualStore
    from ..media import MediaBudget
    from ..reranker import Reranker

SHIPPED = {"raw": "q3vl-tiny", "s0": "s0", "s1": "s1", "s2": "s2", "s3": "s3"}
# Of a MediaBudget. Q3VL-tiny is trained on pictures of 4 to 36 visual tokens; a larger model gains from more.
TINY_BUDGET = dict(image_max_tokens=36, video_max_tokens=144, fps=2.0, max_frames=16)
STORE_BYTES = 256 * 2**20
TIDIED = 50  # uses of a model between two returns of freed memory


class Models:
    """Embedders by name, and a reranker. Nothing is imported or loaded before a model is used.

    Several adapters of one base take the memory of one model: they lie on the same weights, and share what the frozen
    vision tower has made of a picture.

    Args:
        embedders: checkpoints (backbone.resolve), by which they are called; "raw" is the shipped backbone, None is all
            that is shipped.
        reranker: a checkpoint; None is no reranker.
        budget: sizes of visuals; None is TINY_BUDGET.
    """

    def __init__(
        self,
        embedders: Sequence[str] | None = None,
        reranker: str | None = "reranker",
        budget: "MediaBudget | None" = None,
    ):
        self.paths = {name: SHIPPED.get(name, name) for name in (SHIPPED if embedders is None else embedders)}
        if not self.paths:
            raise ValueError("no embedders; name at least one, e.g. ['s3']")
        self.reranker_path, self.budget = reranker, budget
        self._lock, self._uses = RLock(), 0
        self._bases: dict[Path, tuple[Backbone, VisualStore]] = {}  # by folder
        self._adapted: dict[Path, Backbone] = {}  # the adapter put on last; its model has all of that base
        self._identities: dict[tuple[str, int | None], dict[str, Any]] = {}
        self._loaded: dict[str, tuple[PromptModel, Path, str | None]] = {}  # by checkpoint: with base and adapter

    @property
    def names(self) -> list[str]:
        """Of the embedders, in their order."""
        return list(self.paths)

    @contextmanager
    def embedder(self, name: str) -> Iterator["Embedder"]:
        """The embedder called `name`; nobody else uses a model meanwhile.

        Raises ValueError for a name that is not among `names`, FileNotFoundError where its checkpoint is missing.
        """
        if name not in self.paths:
            raise ValueError(f"no model {name!r}; choose one of {self.names}")
        from ..embedder import Embedder  # here, because transformers takes seconds to import: the page does not wait

        with self._at_work(self.paths[name], Embedder) as model:
            yield model

    @contextmanager
    def reranker(self) -> Iterator["Reranker"]:
        """The reranker, as `embedder`. ValueError if there is none."""
        if self.reranker_path is None:
            raise ValueError("there is no reranker here; start the demo with one")
        from ..reranker import Reranker

        with self._at_work(self.reranker_path, Reranker) as model:
            yield model

    def dim(self, name: str) -> int:
        """Dimensions of an embedder's full vectors."""
        with self.embedder(name) as embedder:
            return embedder.dim

    def identity(self, name: str, dim: int | None = None) -> dict[str, Any]:
        """Embedder.identity: what tells this embedder's vectors from another's."""
        if (name, dim) not in self._identities:
            with self.embedder(name) as embedder:
                self._identities[name, dim] = embedder.identity(dim)
        return self._identities[name, dim]

    @contextmanager
    def _at_work(self, path: str, kind: type) -> Iterator["PromptModel"]:
        """A model with its own adapter on, or with none if it has none."""
        with self._lock:
            if path not in self._loaded:
                self._loaded[path] = self._load(path, kind)
            model, base, adapter = self._loaded[path]
            if adapter is not None:
                model.model.set_adapter(adapter, inference_mode=True)
            bare = adapter is None and base in self._adapted
            with self._adapted[base].model.disable_adapter() if bare else nullcontext():
                yield model
            self._uses += 1
            if self._uses % TIDIED == 0:
                give_back_freed()

    def _load(self, path: str, kind: type) -> tuple["PromptModel", Path, str | None]:
        from ..backbone import base_of, load, load_beside, resolve
        from ..forward import VisualStore
        from ..media import MediaBudget

        base, adapter = base_of(path), None
        if base not in self._bases:
            self._bases[base] = load(base), VisualStore(STORE_BYTES)
        backbone, store = self._bases[base]
        if resolve(path) != base:
            adapter = f"adapter{len(self._loaded)}"
            backbone = self._adapted[base] = load_beside(self._adapted.get(base, backbone), path, adapter)
        if backbone.card.get("role", kind.role) != kind.role:
            raise ValueError(f"{path} is a checkpoint of the role {backbone.card['role']!r}, not {kind.role!r}")
        budget = self.budget or MediaBudget(**TINY_BUDGET)
        return kind.from_backbone(backbone, budget=budget, store=store), base, adapter
