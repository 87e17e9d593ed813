"""`python -m q3vl_mini.demo`, which `q3vl-mini demo` calls. Its arguments are read before anything slow is imported."""

import argparse
import importlib.util
from collections.abc import Collection, Sequence
from pathlib import Path

from .models import SHIPPED

DEFAULT_RERANKER = "reranker"


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, compare, map and judge pairs in a browser."""
    example = "example: q3vl-mini demo --models s3 runs/mine/merged/model"
    parser = argparse.ArgumentParser("q3vl-mini demo", description=main.__doc__, epilog=example)
    parser.add_argument("--host", help="0.0.0.0 for every address of this machine (default: this machine alone)")
    parser.add_argument("--port", type=int, help="default: a free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="also an address at gradio.live for 72 hours")
    parser.add_argument("--folder", type=Path, help="below which the page may index files where they lie")
    parser.add_argument("--models", nargs="+", help="embedders (default: the shipped ones)")
    parser.add_argument("--reranker", default=DEFAULT_RERANKER, help="default: the shipped one")
    parser.add_argument("--home", type=Path, help="where vectors and collections are kept (default ~/.q3vl_mini)")
    parser.add_argument("--remote", action="store_true", help="let a query be a public address of a picture or clip")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("gradio") is None:
        parser.exit(1, 'q3vl-mini demo: it needs Gradio: pip install "q3vl-mini[demo]"\n')
    from .app import launch

    try:
        _find({*(options.models or ()), options.reranker} - {*SHIPPED, DEFAULT_RERANKER})
        launch(**vars(options))
    except (ValueError, OSError) as error:
        parser.exit(1, f"q3vl-mini demo: {error}\n")


def _find(names: Collection[str]) -> None:
    """FileNotFoundError for a model that is not to be had, before a page is up that cannot search with it."""
    if names:
        from ..backbone import resolve  # takes seconds to import

        for name in names:
            resolve(name)


if __name__ == "__main__":
    main()
