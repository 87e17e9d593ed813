"""Make results/your_data and the tables of docs/your-data.md again: build, sweep, measure, pitfalls, plan, page.

    python scripts/your_data/remake.py [--parts build sweep measure pitfalls plan page]

Each part is one of the scripts beside this file, or a command of q3vl-mini, with the arguments below. Data and runs
are in runs/your_data; a result that is there is not made again.
"""

import argparse
import contextlib
import sys
from importlib import import_module
from pathlib import Path

from q3vl_mini.cli import main as q3vl_mini

DATA, RESULTS = Path("runs/your_data"), Path("results/your_data")
TABLES = {"icons": DATA / "icons", "translations": DATA / "translations" / "pairs.csv"}
TABLES |= {"pages": DATA / "pages" / "pairs.jsonl"}
ICONS = ["--limit", "2000", "--pixels", "64"]
BUILD = {"icons": ICONS, "icons_negatives": [*ICONS, "--negatives", "2"], "translations": [], "manual_pages": []}
BUILDER = {"icons_negatives": "icons"}  # where it has another name
SWEEP = ["--rows", "1024", "--validation-rows", "160"]
MEASURE = {
    "translations": [],
    "icons": [],
    "icons_negatives": [],
    "pages": ["--set", "data.image_max_tokens=144", "--set", "stages.embedder.batch_size=16"],
    "pages_larger": ["--set", "data.image_max_tokens=400", "--set", "stages.embedder.batch_size=16"],
}
MEASURE["pages_larger"] += ["--set", "stages.embedder.n_negatives=0", "--budget", "60steps", "--looks", "4"]
OF_DATA = {"pages_larger": "pages"}  # the same data at another size
PITFALLS = ("translations",)
PLANNED = ("icons",)


def call(script: str, arguments: list[str | Path]) -> None:
    """Run a script of this folder as a command line would, in this process."""
    sys.argv = [f"scripts/your_data/{script}.py", *map(str, arguments)]
    print(*sys.argv, flush=True)
    import_module(script).main()


def build() -> None:
    for script, arguments in BUILD.items():
        folder = DATA / {"manual_pages": "pages"}.get(script, script)
        if not (folder / "source.json").is_file():
            call(BUILDER.get(script, script), ["--out", folder, *arguments])


def sweep() -> None:
    data = [TABLES["translations"], TABLES["icons"]]
    places = ["--folder", DATA / "runs" / "sweep", "--results", RESULTS / "sweep.json"]
    call("sweep", [*data, *places, *SWEEP])


def measure() -> None:
    for name, arguments in MEASURE.items():
        if not (RESULTS / f"{name}.json").is_file():
            places = ["--folder", DATA / "runs" / name, "--results", RESULTS / f"{name}.json"]
            call("measure", [DATA / OF_DATA.get(name, name), *places, *arguments])


def pitfalls() -> None:
    for name in PITFALLS:
        places = ["--folder", DATA / "runs" / name, "--results", RESULTS / "pitfalls.json"]
        call("pitfalls", [DATA / name, *places])


def plan() -> None:
    for name in PLANNED:
        with open(RESULTS / f"plan_{name}.json", "w") as file, contextlib.redirect_stdout(file):
            q3vl_mini(["plan", "--pairs", str(TABLES[name]), "--gpu", "T4", "--json", "--quiet"])


def page() -> None:
    call("write_page", [])


PARTS = {part.__name__: part for part in (build, sweep, measure, pitfalls, plan, page)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    RESULTS.mkdir(parents=True, exist_ok=True)
    for part in parser.parse_args().parts:
        PARTS[part]()


if __name__ == "__main__":
    main()
