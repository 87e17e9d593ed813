"""What docs/*.md name is there: code, tests, links and the values of presets.

In a page, a code span `file.py:name` is a function, class, method or constant that the file defines, `file.py::test`
a test of it, and `preset: key = value` a setting as the preset has it, e.g. `tiny: stages.s0.temperature = 0.05`.
"""

import ast
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from q3vl_mini.config import load_preset, preset_names

ROOT = Path(__file__).resolve().parents[1]
METHOD = ROOT / "docs" / "method.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
FOLDERS = ("", "q3vl_mini", "q3vl_mini/emoji_world", "tests", "scripts", "benchmarks")  # where a bare file.py may lie

SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINKED_SPAN = re.compile(r"\[`([^`\n]+)`\]\(<?([^)\s>]+)>?\)")
LINK = re.compile(r"\]\(<?([^)\s>]+)>?\)|^\[[^\]\n]+\]: +<?([^\s>]+)>?", re.M)
CODE = re.compile(r"(?P<file>[\w./-]+\.py)(?P<colons>::?)(?P<name>[A-Za-z_][\w.]*)")
SETTING = re.compile(r"(?P<preset>\w+): (?P<key>\w+(?:\.\w+)*) = (?P<value>.+)")


def prose(page: Path) -> str:
    """The page without its fenced blocks, which hold commands."""
    return re.sub(r"^(```|~~~).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@cache
def defined(file: Path) -> frozenset[str]:
    """What a Python file defines at its top level, and `Class.name`; what it only imports is not among it."""
    return frozenset(_names(ast.parse(file.read_text(encoding="utf-8")).body))


def _names(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from _names(node.body, f"{prefix}{node.name}.")
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


def code_problems(page: Path) -> list[str]:
    """Named code and tests that are not there, or whose link leads to another file."""
    text = prose(page)
    linked = LINKED_SPAN.findall(text)  # (span, target)
    bare = [(span, "") for span in SPAN.findall(LINKED_SPAN.sub("", text))]
    problems = []
    for span, target in dict.fromkeys([*linked, *bare]):
        if ".py:" not in span:
            continue
        match = CODE.fullmatch(span)
        if match is None:
            problems.append(f"`{span}`: write file.py:name or file.py::test, without line numbers")
            continue
        places = [ROOT / folder / match["file"] for folder in FOLDERS]
        if target:
            places = [(page.parent / target.partition("#")[0]).resolve()]
        file = next((place for place in places if place.is_file()), None)
        if file is None or not file.as_posix().endswith("/" + match["file"]):
            problems.append(f"`{span}`: there is no {match['file']} at {target or 'the usual places'}")
        elif match["name"] not in defined(file):
            problems.append(f"`{span}`: {file.name} does not define {match['name']}")
        elif match["colons"] == "::" and not (file.name.startswith("test_") and match["name"].startswith("test_")):
            problems.append(f"`{span}`: this is no test; write one colon")
    return problems


def link_problems(page: Path) -> list[str]:
    """Relative links to files that are not there."""
    links = [inline or reference for inline, reference in LINK.findall(prose(page))]
    relative = [link for link in links if not re.match(r"[a-z]+:", link) and not link.startswith("#")]
    return [link for link in relative if not (page.parent / link.partition("#")[0]).exists()]


def settings(page: Path) -> list[re.Match]:
    return [match for span in SPAN.findall(prose(page)) if (match := SETTING.fullmatch(span))]


def setting_problems(page: Path) -> list[str]:
    """Quoted settings that the presets do not have, or have with another value."""
    problems = []
    for match in settings(page):
        if match["preset"] not in preset_names():
            problems.append(f"`{match[0]}`: no preset {match['preset']!r}")
            continue
        try:
            value = setting(match["preset"], match["key"])
        except (AttributeError, KeyError, TypeError):
            problems.append(f"`{match[0]}`: the preset has no {match['key']}")
            continue
        try:
            quoted = tomllib.loads(f"quoted = {match['value']}")["quoted"]
        except tomllib.TOMLDecodeError:
            problems.append(f"`{match[0]}`: write the value as in TOML")
            continue
        if quoted != value:
            problems.append(f"`{match[0]}`: the preset has {value!r}")
    return problems


def setting(preset: str, key: str):
    """The value at stages.s0.lr, defaults included; a tuple as a list."""
    value = load_preset(preset)
    for part in key.split("."):
        value = value[part] if isinstance(value, Mapping) else getattr(value, part)
    return list(value) if isinstance(value, tuple) else value


# ---------------------------------------------------------------- the pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_code_and_tests_are_there(page):
    assert code_problems(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    assert link_problems(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_settings_are_the_presets(page):
    assert setting_problems(page) == []


@pytest.mark.parametrize("item", [*(f"Equation {n}" for n in range(1, 6)), "Figure 5", "Figure 6", "Figure 7"])
def test_every_equation_and_figure_has_its_code_and_its_test(item):
    rows = [line for line in prose(METHOD).splitlines() if line.startswith(f"| **{item}**")]
    assert rows
    for row in rows:
        colons = {match["colons"] for span in SPAN.findall(row) if (match := CODE.fullmatch(span))}
        assert colons == {":", "::"}, row


def test_every_undisclosed_choice_is_quoted():
    """The choices that the report leaves open and that a preset makes."""
    stages = ("s0", "s1", "s2")
    keys = {f"stages.{stage}.lr" for stage in (*stages, "reranker")}
    keys |= {f"stages.{stage}.batch_size" for stage in (*stages, "reranker")}
    keys |= {f"stages.{stage}.mining.{part}" for stage in stages for part in ("k", "t_plus", "delta_minus")}
    keys |= {"stages.s0.temperature", "stages.s2.n_negatives", "stages.s2.teacher_temperature", "stages.s0.terms"}
    keys |= {"dims", "dim_weights", "quantizers.int8", "quantizers.binary", "merge.probe", "merge.mu", "template"}
    assert keys <= {match["key"] for match in settings(METHOD) if match["preset"] == "tiny"}


# ---------------------------------------------------------------- the checks can fail


@pytest.fixture
def page(tmp_path):
    """A function that writes a page and returns its path."""

    def write(text: str) -> Path:
        (tmp_path / "page.md").write_text(text, encoding="utf-8")
        return tmp_path / "page.md"

    return write


def test_right_names_are_accepted(page):
    text = "`losses.py:info_nce` `q3vl_mini/config.py:StageConfig.margin` `compression.py:Quantizers.codes` "
    text += "`config.py:TERMS` `test_docs.py::test_right_names_are_accepted` `python -m q3vl_mini.data` `note.py`\n"
    assert code_problems(page(text + "```\n`losses.py:in_a_fence`\n```\n")) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("`losses.py:info_mce`", "losses.py does not define info_mce"),
        ("`train.py:info_nce`", "train.py does not define info_nce"),  # it imports it
        ("`compression.py:Quantizers.encode`", "does not define Quantizers.encode"),
        ("`test_losses.py::test_nothing`", "does not define test_nothing"),
        ("`losses.py::info_nce`", "this is no test"),
        ("`loss.py:info_nce`", "there is no loss.py"),
        ("`losses.py:31`", "without line numbers"),
        ("[`losses.py:info_nce`](other/merge.py) as `losses.py:info_nce`", "there is no losses.py at other/merge.py"),
    ],
)
def test_a_wrong_name_is_found(page, text, problem):
    [found] = code_problems(page(f"See {text}."))
    assert problem in found


def test_a_broken_link_is_found(page):
    text = "[a](page.md) [b](page.md#x) [c](#x) [d](https://example.org/e) [e](absent.md) [f][g]\n\n[g]: gone.md\n"
    assert link_problems(page(text)) == ["absent.md", "gone.md"]


def test_right_settings_are_accepted(page):
    keys = ("name", "lora_rank", "dims", "stages.s0.terms", "stages.s0.mining.k", "quantizers.int8")
    text = "\n".join(f"`tiny: {key} = {json.dumps(setting('tiny', key))}`" for key in keys)
    assert setting_problems(page(text)) == [] and len(settings(page(text))) == len(keys)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tiny: stages.s0.temperature = -1.0", "the preset has 0"),
        ("tiny: dims = [7]", r"the preset has \[0"),
        ("tiny: stages.s0.tau = 0.05", "has no stages.s0.tau"),
        ("tiny: stages.s9.lr = 0.05", "has no stages.s9.lr"),
        ("small: stages.s0.lr = 0.05", "no preset 'small'"),
        ("tiny: stages.s0.start = bootstrap", "write the value as in TOML"),
    ],
)
def test_a_wrong_setting_is_found(page, text, problem):
    [found] = setting_problems(page(f"With `{text}`."))
    assert re.search(problem, found)
