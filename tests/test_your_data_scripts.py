"""The builders of the outside data sets: what they split, read and check, on small packages made here."""

import hashlib
import importlib
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo

from q3vl_mini.records import Quadruple, Relevance

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "your_data"
PDF = b"""%PDF-1.4
1 0 obj <</Type/Catalog/Pages 2 0 R/Outlines 5 0 R>> endobj
2 0 obj <</Type/Pages/Kids[3 0 R 4 0 R]/Count 2>> endobj
3 0 obj <</Type/Page/Parent 2 0 R/MediaBox[0 0 72 72]>> endobj
4 0 obj <</Type/Page/Parent 2 0 R/MediaBox[0 0 72 72]>> endobj
5 0 obj <</Type/Outlines/First 6 0 R/Last 7 0 R/Count 2>> endobj
6 0 obj <</Title(2 R Basics)/Parent 5 0 R/Next 7 0 R/First 8 0 R/Last 8 0 R/Count 1/Dest[3 0 R/Fit]>> endobj
7 0 obj <</Title(B Formulas)/Parent 5 0 R/Prev 6 0 R/Dest[4 0 R/Fit]>> endobj
8 0 obj <</Title(R messages)/Parent 6 0 R/Dest[4 0 R/Fit]>> endobj
trailer <</Root 1 0 R/Size 9>>
%%EOF
"""


@pytest.fixture
def script(monkeypatch):
    """Imports a script of the folder by name."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    for name in [path.stem for path in FOLDER.glob("*.py")]:
        sys.modules.pop(name, None)


def test_held_out_names_are_new_combinations_of_words_that_training_has(script):
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(25)]
    names = sorted({"-".join(rng.choice(words, rng.integers(2, 4), replace=False)) for _ in range(300)})
    sides = script("icons").split_names(names, {"test": 0.2, "validation": 0.1})
    by_side = {side: {name for name in names if sides[name] == side} for side in ("train", "validation", "test")}
    known = {word for name in by_side["train"] for word in name.split("-")}
    assert len(by_side["test"]) == round(0.2 * len(names)) and len(by_side["validation"]) == round(0.1 * len(names))
    for name in by_side["test"] | by_side["validation"]:
        assert set(name.split("-")) <= known and name not in by_side["train"]
    negatives = script("icons").hard_negatives(sides, 2)
    assert max(map(len, negatives.values())) == 2
    for name, others in negatives.items():
        for other in others:
            assert other != name and sides[other] == sides[name] and set(other.split("-")) & set(name.split("-"))


def test_an_icon_is_drawn_black_on_white(script):
    picture = np.asarray(script("icons").draw('<path fill="currentColor" d="M0 0h12v24H0z"/>', 24, 48))
    assert (picture[:, :24] == 0).all() and (picture[:, 24:] == 255).all()


def test_the_outline_of_a_pdf_gives_titles_and_pages(script, tmp_path):
    (tmp_path / "m.pdf").write_bytes(PDF)
    found = script("manual_pages").contents(tmp_path / "m.pdf")
    assert found == [("R Basics", 1), ("R messages", 2), ("Formulas", 2)]


def test_messages_are_the_translated_ones(script, tmp_path):
    catalog = Catalog(locale="de")
    catalog.add("Cancel", "Abbrechen")
    catalog.add("Later", "")
    catalog.add("Maybe", "Vielleicht", flags=["fuzzy"])
    catalog.add(("%d file", "%d files"), ("%d Datei", "%d Dateien"))
    with open(tmp_path / "d.mo", "wb") as file:
        write_mo(file, catalog)
    assert script("translations").messages(tmp_path / "d.mo") == {"Cancel": "Abbrechen", "%d file": "%d Datei"}


def test_a_package_with_another_hash_is_refused(script, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/b.txt", "inside")
    (tmp_path / "p.whl").write_bytes(buffer.getvalue())
    fetch = script("packages").fetch
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    folder = fetch("pypi", "p", "1", digest, tmp_path / "out", tmp_path / "p.whl")
    assert (folder / "a" / "b.txt").read_text() == "inside"
    with pytest.raises(SystemExit, match="has the SHA-256"):
        fetch("pypi", "p", "1", "0" * 64, tmp_path / "other", tmp_path / "p.whl")


def test_only_baselines_that_can_be_asked_are_measured(script):
    def side(queries, documents):
        labels = [Relevance((i,)) for i in range(len(queries))]
        return Quadruple("own", "text_ret", "Find.", queries, documents, labels)

    texts = [{"text": "red"}, {"text": "blue"}]
    pictures = [{"image": np.full((8, 8, 3), level, np.uint8)} for level in (0, 200)]
    plain = script("measure").plain
    assert list(plain(side(texts, texts), side(texts, texts))) == ["BM25"]
    assert list(plain(side(pictures, pictures), side(pictures, pictures))) == ["colour histogram", "pixels"]
    through = plain(side(texts, pictures), side(texts, pictures))
    assert through["BM25 to training queries, then colour histogram"].score == 1 and len(through) == 2


def test_the_page_says_what_was_measured(script):
    page = (FOLDER.parents[1] / "docs" / "your-data.md").read_text(encoding="utf-8")
    assert page.count(":begin -->") == page.count(":end -->") == 4
    assert script("write_page").filled(page) == page, "run scripts/your_data/write_page.py"


def test_the_sweep_changes_one_setting_at_a_time(script):
    sweep = script("sweep")
    usual = {name: values[1] for name, values in sweep.GRID.items()}
    found = sweep.settings(usual)
    changed = [{name for name in usual if setting[name] != usual[name]} for setting in found]
    assert changed[0] == set() and all(len(names) == 1 for names in changed[1:])
    assert len(found) == 1 + sum(len(values) - 1 for values in sweep.GRID.values())


def test_a_split_by_row_leaks_the_documents_of_several_queries(script):
    def side(numbers):
        queries = [{"text": f"{i} {way}"} for i in numbers for way in "abc"]
        return Quadruple("own", "text_ret", "Find.", queries, [{"text": f"document {i}"} for i in numbers],
                         [Relevance((i // 3,)) for i in range(len(queries))])  # fmt: skip

    found = script("pitfalls").leaked({"train": side(range(30)), "validation": side(range(30, 34)),
                                       "test": side(range(34, 44))})  # fmt: skip
    assert found["by document"] == 0 and found["by row"] > 0.7  # 1 - P(both others are elsewhere), about 0.9
