"""The demo in a headless Chromium: what a visitor does on a desk, on a phone and by keyboard.

Screenshots are kept in test-results/.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from q3vl_mini.data import video_bytes
from q3vl_mini.demo.gallery import make_gallery
from q3vl_mini.demo.items import model_view
from q3vl_mini.records import Clip

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "test-results"
PATIENCE = 120  # seconds for anything: the machine may be busy with other tests
SIZES = (24, 6, 4, 4)  # of a gallery that takes few seconds to embed
SERVER = f"""
import sys
from q3vl_mini.demo import app
from q3vl_mini.demo.gallery import make_gallery
from q3vl_mini.demo.shelf import Shelf

app.gallery = lambda folder: Shelf("Gallery", make_gallery(*{SIZES}), folder)
app.launch(port=int(sys.argv[1]), home=sys.argv[2], models=["raw", "s1"])
"""


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium; where there is none, apt-get is asked for Debian's once."""
    if find_chromium() is None and shutil.which("apt-get") and getattr(os, "geteuid", lambda: 1)() == 0:
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(["apt-get", "-q", *command], capture_output=True, timeout=600)
    if (path := find_chromium()) is None:
        missing = pytest.fail if os.environ.get("Q3VL_MINI_BROWSER") == "required" else pytest.skip  # see .ci/run
        missing("no Chromium here, and apt-get could not install one; on Debian: apt-get install chromium")
    return path


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The demo, started in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.txt"
    command = [sys.executable, "-c", SERVER, str(port), str(tmp_path_factory.mktemp("home"))]
    with log.open("w") as output:
        server = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(5 * PATIENCE):
            if server.poll() is not None:
                pytest.fail(f"the demo did not start:\n{log.read_text()}")
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(30)
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def browser(chromium):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright, pinned in requirements.txt, is missing")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """A function that opens the demo in a fresh window; no script of the page may fail until the test ends."""
    contexts, faults = [], []

    def open_page(width: int = 1280, height: int = 900, query: str = ""):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: (faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(address + query)
        page.get_by_role("button", name="a bicycle", exact=True).wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def first_search(page) -> None:
    """One click, as a first-time visitor."""
    page.get_by_role("button", name="a bicycle", exact=True).click()
    page.locator("#results .q3-rank").first.wait_for()


def said(page, words: str, where: str = "#said") -> None:
    """Wait until a status line says these words."""
    page.locator(where).get_by_text(words).first.wait_for()


def keep(page, name: str, whole: bool = True) -> None:
    PICTURES.mkdir(exist_ok=True)
    page.wait_for_timeout(400)  # for the fading of what is in progress
    page.screenshot(path=PICTURES / f"{name}.png", full_page=whole)


@pytest.fixture
def files(tmp_path):
    """The gallery's first picture, a clip, a text with a name to be afraid of, and a picture that is none."""
    picture, clip, bad = tmp_path / "picture.webp", tmp_path / "film.mkv", tmp_path / "bad.png"
    picture.write_bytes(model_view(make_gallery(*SIZES)[0]))
    clip.write_bytes(video_bytes(Clip(np.arange(12288, dtype=np.uint8).reshape(4, 32, 32, 3), 2.0)))
    bad.write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    words = tmp_path / "<img src=x onerror=alert(1)>.txt"
    words.write_text("<script>alert(2)</script><img src=x onerror=alert(3)> ${alert(4)}", encoding="utf-8")
    return {"picture": picture, "clip": clip, "words": words, "bad": bad}


def test_a_first_visitor_gets_a_result_with_one_click(visit):
    page = visit()
    keep(page, "1-start", whole=False)
    first_search(page)
    said(page, "12 of 38 items")
    assert page.locator("#results li").count() == 12
    assert page.locator("#results img").first.get_attribute("alt")
    assert "embed it" in page.locator("#cost").inner_text()
    keep(page, "2-search", whole=False)


def test_keys_are_enough(visit):
    page = visit()
    page.locator("#query textarea").focus()
    page.keyboard.type("a picture of a guitar")
    page.keyboard.press("Enter")
    said(page, "12 of 38 items")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "BUTTON"
    card = page.locator("#results .q3-card").nth(1)
    title = card.locator(".q3-title").inner_text()
    card.focus()
    page.keyboard.press("Enter")  # more like the second result
    page.locator("#query .thumbnail-item").wait_for()
    said(page, "12 of 38 items")
    assert title in page.locator("#results .q3-title").all_inner_texts()[:3]


def test_a_picture_is_uploaded_and_searched(visit, files):
    page = visit()
    page.locator("#query input[type=file]").set_input_files(files["picture"])
    page.locator("#query .thumbnail-item").wait_for()
    page.locator("#query .submit-button").click()
    said(page, "12 of 38 items")
    assert page.locator("#results .q3-title").first.inner_text() == make_gallery(*SIZES)[0].title
    keep(page, "3-uploaded-picture", whole=False)


def test_a_bad_upload_is_told_in_words(visit, files):
    page = visit()
    page.locator("#query input[type=file]").set_input_files(files["bad"])
    page.locator("#query .thumbnail-item").wait_for()
    page.locator("#query .submit-button").click()
    said(page, "bad.png is")
    assert "Traceback" not in page.content()
    keep(page, "4-bad-upload", whole=False)


def test_precision_and_dimensions_change_the_size(visit):
    page = visit()
    first_search(page)
    cost = page.locator("#cost")
    assert "float32 ← in use" in cost.inner_text() and "38.0 kB" in cost.inner_text()
    page.get_by_label("binary").first.check()
    page.get_by_text("binary ← in use").wait_for()
    assert "rescore" in cost.inner_text()
    page.get_by_label("Rescore").first.uncheck()
    said(page, "256 dimensions, binary.")
    page.get_by_label("Dimensions").first.fill("64")
    said(page, "64 dimensions, binary.")
    assert "304 B" in cost.inner_text()
    keep(page, "5-binary-64")


def test_the_reranker_shows_each_move(visit):
    page = visit()
    page.get_by_role("button", name="this panda, but green").click()
    said(page, "12 of 38 items")
    assert page.locator("#results .q3-move").count() == 0
    page.get_by_label("Rerank").first.check()
    said(page, "reranked")
    moves = page.locator("#results .q3-move").all_inner_texts()
    assert len(moves) == 12 and all(move.startswith(("▲ up", "▼ down", "= same place")) for move in moves)
    assert "rerank" in page.locator("#cost").inner_text()
    keep(page, "6-reranked")


def test_two_models_are_compared(visit):
    page = visit()
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compared-query textarea").fill("a picture of a bicycle")
    page.locator("#compared-query textarea").press("Enter")
    page.get_by_text("results are in both").wait_for()
    assert [page.locator(f"#results-{side} li").count() for side in "AB"] == [9, 9]
    keep(page, "7-compare")


def test_the_map_shows_the_item_that_is_clicked(visit):
    page = visit()
    page.get_by_role("tab", name="Map").click()
    page.locator("#map .q3-mark").first.wait_for()
    assert page.locator("#map .q3-mark").count() == 38
    mark = page.locator("#map .q3-mark").last
    mark.locator("rect").click(force=True)
    page.locator("#map-item .q3-card").wait_for()
    assert page.locator("#map-item .q3-title").inner_text() == mark.locator("title").text_content()
    page.locator("#map-query textarea, #map-query input").first.fill("a bicycle")
    page.locator("#map-query textarea, #map-query input").first.press("Enter")
    page.locator("#map .q3-query").wait_for()
    keep(page, "8-map")


def test_a_pair_is_scored(visit):
    page = visit()
    page.get_by_role("tab", name="Pair scorer").click()
    page.locator("#pair-query textarea").fill("a cat")
    page.locator("#pair-document textarea").fill("a black cat")
    page.get_by_role("button", name="Score this pair").click()
    page.locator("#pair").get_by_text("logit(no)").first.wait_for()
    assert "cosine of the two embeddings" in page.locator("#pair").inner_text()
    keep(page, "9-pair")


def test_a_collection_is_made_searched_kept_and_deleted(visit, files):
    page = visit()
    page.get_by_role("tab", name="Your collection").click()
    name = page.get_by_role("combobox", name="Collection")
    name.fill("my things")
    name.press("Enter")
    page.locator("#files input[type=file]").set_input_files([str(file) for file in files.values()])
    page.locator("#files").get_by_text("bad").first.wait_for()
    page.get_by_role("button", name="Index", exact=True).click()
    said(page, "“my things” has 3 items", "#indexing")
    said(page, "Left out: bad.png", "#indexing")
    assert page.locator("#contents li").count() == 3
    assert "<script>alert(2)</script>" in page.locator("#contents").inner_text()  # as words
    keep(page, "10-collection")

    other = visit()  # the same user, later
    place = other.get_by_role("combobox", name="Search in").first
    place.click()
    other.get_by_role("option", name="my things").click()
    other.locator("#query textarea").fill("a bicycle")
    other.locator("#query textarea").press("Enter")
    said(other, "3 of 3 items")
    page.get_by_role("button", name="Delete this collection").click()
    page.get_by_label("Yes, delete its files and vectors").check()
    page.get_by_role("button", name="Delete", exact=True).click()
    said(page, "“my things” is deleted", "#indexing")
    other.locator("#query textarea").press("Enter")
    said(other, "this collection is not there")


def test_an_indexing_is_cancelled_and_keeps_what_was_done(visit, tmp_path):
    for n in range(200):
        Image.new("RGB", (32, 32), (n, 255 - n, 128)).save(tmp_path / f"{n:03}.png")
    page = visit()
    page.get_by_role("tab", name="Your collection").click()
    page.get_by_role("combobox", name="Collection").fill("many")
    page.get_by_role("combobox", name="Collection").press("Enter")
    page.locator("#files input[type=file]").set_input_files(sorted(tmp_path.iterdir()))
    page.locator("#files").get_by_text("199").first.wait_for()
    page.get_by_role("button", name="Index", exact=True).click()
    page.locator("#indexing").get_by_text(re.compile(r"files read: [1-9]")).first.wait_for()
    page.get_by_role("button", name="Cancel").click()
    said(page, "Cancelled", "#indexing")
    words = page.locator("#indexing").inner_text()
    kept = int(re.search(r"has (\d+) items", words)[1])
    page.wait_for_timeout(2000)
    assert page.locator("#indexing").inner_text() == words, "nothing goes on"
    assert 0 < kept == page.locator("#contents li").count() < 200


def test_a_folder_is_added_as_a_whole(visit, tmp_path):
    for n, name in enumerate(("a/one.png", "a/b/two.png", "three.png")):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (20 * n, 90, 128)).save(tmp_path / "mine" / name)
    page = visit()
    page.get_by_role("tab", name="Your collection").click()
    page.get_by_role("combobox", name="Collection").fill("a folder")
    page.get_by_role("combobox", name="Collection").press("Enter")
    page.locator("#folder input[type=file]").set_input_files(tmp_path / "mine")
    page.locator("#folder").get_by_text("two").first.wait_for()
    page.get_by_role("button", name="Index", exact=True).click()
    said(page, "“a folder” has 3 items", "#indexing")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_scrolls_down_alone(visit, theme):
    page = visit(390, 844, f"?__theme={theme}")
    first_search(page)
    said(page, "12 of 38 items")
    keep(page, f"11-phone-{theme}")
    for tab in ("Search", "Compare", "Map", "Pair scorer", "Your collection", "About"):
        open_tab(page, tab)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
    ink = page.evaluate("getComputedStyle(document.querySelector('.q3-head h1')).color")
    assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > 380) == (theme == "dark")


def open_tab(page, name: str) -> None:
    """A tab by name; on a narrow screen it may be in the menu of those that do not fit."""
    tab = page.get_by_role("tab", name=name)
    if not tab.is_visible():
        page.locator(".overflow-menu > button").click()
        tab = page.locator(".overflow-dropdown").get_by_text(name)
    tab.click()
