"""The course as it is committed: fresh outputs, one set-up cell, sections, sizes; and it teaches what docstrings say.

That every notebook runs is tested by nbval (`make test`), not here.
"""

import ast
import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from run_notebooks import cleaned, code_hash, notebooks  # noqa: E402

PATHS = notebooks()
SECTIONS = ("## The report says, we measured", "## Three questions", "## Read on")
FIELDS = ("**You will be able to**", "**Time**", "**Needs**")


@pytest.fixture(scope="module", params=PATHS, ids=lambda path: path.stem)
def notebook(request):
    return request.param, nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_is_a_course():
    assert PATHS and [path.name[:2] for path in PATHS] == sorted({path.name[:2] for path in PATHS})


def test_the_outputs_are_those_of_the_code(notebook):
    path, content = notebook
    assert content.metadata.q3vl_mini.code == code_hash(content), f"{path.name} has changed; run make notebooks"
    cells = code_cells(content)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert kinds <= {"stream", "display_data", "execute_result"}
    before = nbformat.writes(content)
    assert nbformat.writes(cleaned(content)) == before, "written by other means than scripts/run_notebooks.py"


def test_it_opens_and_closes_like_the_others(notebook):
    path, content = notebook
    first, prose = content.cells[0].source, "\n".join(c.source for c in content.cells if c.cell_type == "markdown")
    assert first.startswith(f"# {path.name[:2]} · ") and f"/notebooks/{path.name})" in first
    assert all(field in first for field in FIELDS)
    assert all(section in prose for section in SECTIONS) and "arxiv.org/abs/" in prose
    assert prose.count("<details><summary>Solution</summary>") >= 1
    reference = code_cells(nbformat.read(PATHS[0], as_version=4))
    assert code_cells(content)[0].source == reference[0].source, "the set-up cell differs"
    assert code_cells(content)[1].source.startswith('PRESET = "tiny"')


def test_every_exercise_has_a_solution_and_three_questions_close_it(notebook):
    path, content = notebook
    prose = "\n".join(c.source for c in content.cells if c.cell_type == "markdown")
    exercises = re.findall(r"^(?:#+ |\*\*)Exercise", prose, re.M)
    assert 1 <= len(exercises) == prose.count("<details><summary>Solution</summary>")
    questions = prose.split("\n## Three questions\n")[1].split("\n## ")[0]
    assert re.findall(r"^(\d)\. ", questions, re.M) == ["1", "2", "3"]


def test_each_notebook_leads_to_the_next(notebook):
    path, content = notebook
    following = [after.name for before, after in zip(PATHS, PATHS[1:], strict=False) if before == path]
    assert re.findall(r"^Next: \[.*\]\((.*)\)$", content.cells[-1].source, re.M) == following


def test_it_checks_what_it_teaches_and_hides_nothing(notebook):
    path, content = notebook
    sources = [cell.source for cell in code_cells(content)]
    assert sum("assert " in source for source in sources) >= 2
    for source in sources:
        assert source.count("\n") < 50, f"a cell of {path.name} is longer than a screen"
        assert not re.search(r"^\s*from q3vl_mini\S* import .*\b_\w+|q3vl_mini\.\w+\._\w+", source, re.M)


def test_figures_have_alt_text_and_the_file_is_small(notebook):
    path, content = notebook
    assert path.stat().st_size <= 1.5 * 2**20
    for cell in code_cells(content):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert len(output.metadata["image/png"]["alt"]) > 20
            text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            assert not re.search(r"/(home|root|work|Users|tmp)/", text), "a path of the machine that ran it"


def taught() -> dict[str, set[str]]:
    """Notebook number -> names whose docstring says that it teaches them."""
    found: dict[str, set[str]] = {}
    for file in (ROOT / "q3vl_mini").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                for number in re.findall(r"Taught in notebooks/(\d\d)", ast.get_docstring(node) or ""):
                    found.setdefault(number, set()).add(node.name)
    return found


def test_a_notebook_teaches_what_the_docstrings_say(notebook):
    path, content = notebook
    text = "\n".join(cell.source for cell in content.cells)
    missing = {name for name in taught().get(path.name[:2], ()) if not re.search(rf"\b{name}\b", text)}
    assert not missing, f"{path.name} never names {sorted(missing)}"


def test_links_between_notebooks_lead_somewhere(notebook):
    path, content = notebook
    text = "\n".join(cell.source for cell in content.cells if cell.cell_type == "markdown")
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
    numbers = {p.name[:2] for p in PATHS}
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
        later = re.match(r"(\d\d)_\w+\.ipynb", target)
        assert (path.parent / target).exists() or (later and later[1] not in numbers), target
