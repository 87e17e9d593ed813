"""Execute the notebooks and write them with their outputs, so that a diff shows what changed and nothing else.

    python scripts/run_notebooks.py                 all of notebooks/
    python scripts/run_notebooks.py notebooks/04*   some

A notebook is executed in its own folder, by the Python that runs this. Kept: sources, tags, outputs. Dropped: times of
execution, versions, progress on stderr. The metadata hold a hash of the code, by which tests/test_notebooks.py refuses
outputs that are older than the code.
"""

import argparse
import hashlib
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 1_200  # seconds a cell


def notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """Of the sources of all code cells in their order."""
    sources = "\n\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what changes from run to run."""
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for output in cell.outputs:
                if "execution_count" in output:
                    output["execution_count"] = cell.execution_count
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": kernel, "language_info": {"name": "python"}, "q3vl_mini": {"code": code_hash(notebook)}}
    )
    return notebook


def execute(path: Path) -> float:
    """Run a notebook and replace the file; returns the seconds it took."""
    notebook, began = nbformat.read(path, as_version=4), time.monotonic()
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": path.parent}},
    )
    client.execute()
    nbformat.write(cleaned(notebook), path)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path)
    for path in parser.parse_args().paths or notebooks():
        print(f"{path.name}: {execute(path.resolve()):.0f} s", flush=True)


if __name__ == "__main__":
    main()
