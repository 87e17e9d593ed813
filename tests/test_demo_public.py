"""The demo as a public service: what strangers may send to it, by its page or past it, and what they get."""

import _socket  # what conftest.py guards: numbers are read, and no name is looked up
import io
import json
import secrets
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import gradio as gr
import httpx
import numpy as np
import pytest
from PIL import Image

from q3vl_mini.data import video_bytes
from q3vl_mini.demo import app, collections, remote, room
from q3vl_mini.demo.collections import Collections
from q3vl_mini.demo.engine import Engine
from q3vl_mini.demo.gallery import make_gallery
from q3vl_mini.demo.models import Models
from q3vl_mini.demo.page import GALLERY, Page
from q3vl_mini.demo.shelf import Shelf
from q3vl_mini.demo.uploads import read_upload
from q3vl_mini.records import Clip

SETTINGS = ("s1", 256, "float32", True, False)
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"
SVG = f'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)">{EVIL}</svg>'


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return Shelf("Gallery", make_gallery(6, 0, 0, 0), tmp_path_factory.mktemp("gallery"))


class Visitor:
    """Somebody who talks to the server without its page."""

    def __init__(self, address: str):
        self.http, self.session = httpx.Client(base_url=address, timeout=60), secrets.token_hex()
        self.key = self.call("arrive", "")[0]

    def upload(self, content: bytes, name: str) -> dict:
        [path] = self.http.post("/gradio_api/upload", files={"files": (name, content)}).raise_for_status().json()
        return self.file(path)

    @staticmethod
    def file(path: str) -> dict:
        return {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}

    def call(self, event: str, *data) -> list:
        """What an event gives in the end. RuntimeError with what the server says where it gives nothing."""
        body = {"data": list(data), "session_hash": self.session}
        asked = self.http.post(f"/gradio_api/call/{event}", json=body).raise_for_status()
        text = self.http.get(f"/gradio_api/call/{event}/{asked.json()['event_id']}").text
        kind, content = text.strip().split("\n\n")[-1].split("\n")
        if kind != "event: complete":
            raise RuntimeError(f"{kind}: {content}")
        return json.loads(content.removeprefix("data: "))

    def search(self, text: str = "", files: tuple = (), where: str = GALLERY, key: str | None = None) -> list:
        box = {"text": text, "files": list(files)}
        return self.call("search", box, "", where, [], *SETTINGS, self.key if key is None else key)

    def index(self, name: str, *files: dict) -> list:
        return self.call("index", name, list(files), None, "", "s1", self.key)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where the server keeps collections."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def running(shelf, home, tmp_path_factory):
    """A demo that was started as a public one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        patch.setattr(app, "gallery", lambda folder: shelf)
        blocks = app.launch(models=["s1"], reranker=None, home=home, public=True, prevent_thread_lock=True)
        yield blocks
        blocks.close()


@pytest.fixture(scope="module")
def server(running):
    """Its address."""
    return running.local_url.rstrip("/")


@pytest.fixture(scope="module")
def ada(server):
    visitor = Visitor(server)
    yield visitor
    visitor.http.close()


@pytest.fixture(scope="module")
def eve(server):
    visitor = Visitor(server)
    yield visitor
    visitor.http.close()


# --- uploads


def test_what_is_no_picture_is_told_by_its_content_whatever_it_is_called(ada):
    [said, *_] = ada.search(files=[ada.upload(b"MZ\x90\0" + bytes(200), "cat.png")])
    assert "cat.png is none of what can be read" in said
    [said, *_] = ada.search(files=[ada.upload(png(), "cat.mp4")])
    assert "6 of 6 items" in said


def test_an_upload_that_is_too_large_is_refused_while_it_comes(ada):
    answer = ada.http.post("/gradio_api/upload", files={"files": ("a.png", bytes(51 * 2**20))})
    assert answer.status_code == 413


def test_a_bomb_is_refused_before_it_is_decoded(ada):
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    [said, *_] = ada.search(files=[ada.upload(buffer.getvalue(), "bomb.png")])
    assert "bomb.png has too many pixels" in said


@pytest.mark.parametrize("path", ["/etc/hostname", "../../etc/hostname", "~/.bashrc", "file:///etc/hostname"])
def test_no_path_but_that_of_an_upload_is_read(ada, path):
    with pytest.raises(RuntimeError, match="event: error"):
        ada.search(files=[ada.file(path)])


def test_a_collection_of_somebody_is_no_upload_and_is_not_served(ada, eve, home):
    ada.index("mine", ada.upload(png("blue"), "a.png"))
    [stored] = home.rglob("*.png")
    with pytest.raises(RuntimeError, match="event: error"):
        eve.search(files=[eve.file(str(stored))])
    for path in (stored, stored.parents[1] / "collection.json", "/etc/hostname"):
        assert eve.http.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_what_was_uploaded_is_never_shown_as_a_page(ada):
    for name in ("a.html", "a.svg"):
        uploaded = ada.upload(SVG.encode(), name)
        answer = ada.http.get(f"/gradio_api/file={uploaded['path']}")
        assert answer.headers["content-disposition"].startswith("attachment"), name


def test_names_words_and_drawings_of_others_are_text_and_nothing_else(ada):
    said, contents, *_ = ada.index(EVIL, ada.upload(EVIL.encode(), f"{EVIL}.txt"), ada.upload(SVG.encode(), "a.svg"))
    assert "has 2 items" in said and "&lt;svg" in contents
    [(_, place)] = [choice for choice in choices(ada) if choice[0] == EVIL]
    _, cards, _ = ada.search("script", where=place)
    for html in (said, contents, cards):
        assert "<script" not in html and "<img src=x" not in html and "<svg" not in html


def choices(visitor: Visitor) -> list:
    return visitor.call("arrive", visitor.key)[-1]["choices"]


# --- visitors


def test_another_visitor_finds_nothing_even_with_the_id(ada, eve):
    ada.index("private", ada.upload(png("lime"), "secret.png"))
    [(_, id)] = [choice for choice in choices(ada) if choice[0] == "private"]
    assert "private" not in json.dumps(choices(eve))
    for key in (eve.key, "", f"visitor {ada.key}", ada.key[:-1]):
        with pytest.raises(RuntimeError, match="not in the list of choices"):
            eve.search("lime", where=id, key=key)
        for visitor in (eve, ada):  # the session of ada, who knows the id, with another key
            assert "secret" not in json.dumps(visitor.call("contents", id, key))
            assert "⚠" in visitor.call("delete", id, True, key)[0]
        assert "⚠" in ada.search("lime", where=id, key=key)[0]
    assert "private" in json.dumps(choices(ada))


def test_a_hidden_folder_box_reads_nothing_on_a_public_page(ada):
    said, *_ = ada.call("index", "x", [], None, "/", "s1", ada.key)
    assert "choose files or a folder" in said


def test_collections_that_nobody_uses_are_let_go_of_and_one_in_use_stays_one(tmp_path, monkeypatch):
    monkeypatch.setattr(collections, "OPEN", 2)
    home = Collections(tmp_path)
    ids = [home.create("ada", f"{n}") for n in range(5)]
    used = home.get("ada", ids[0])
    for id in ids[1:]:
        home.get("ada", id)
    assert home.get("ada", ids[0]) is used
    assert len(home._open) <= 3


def test_a_full_disk_is_told(tmp_path, monkeypatch, ada):
    home = Collections(tmp_path / "home")
    collection = home.get("ada", home.create("ada", "x"))
    (tmp_path / "a.txt").write_text("words")
    monkeypatch.setattr(room, "FREE", 2**60)
    answer = ada.http.post("/gradio_api/upload", files={"files": ("a.png", png())})
    assert answer.status_code == 507 and answer.text == room.FULL
    [step] = collection.add([tmp_path / "a.txt"])
    assert step.problem == "a: this server has no room for more files; try again later" and not collection.items


def test_a_deleted_collection_leaves_no_picture_behind(shelf, tmp_path):
    page = Page(Engine(Models(["s1"], None)), shelf, Collections(tmp_path / "home"))
    id = page.collections.create(page.owner(""), "x")
    (tmp_path / "a.png").write_bytes(png())
    list(page.own(id, "").add([tmp_path / "a.png"]))
    page.as_query(page.own(id, "").items[0])
    assert len(list(page.scratch.iterdir())) == 1
    page.delete(id, True, "")
    assert list(page.scratch.iterdir()) == []


def test_uploads_are_deleted_and_the_pages_own_files_are_kept(shelf, tmp_path):
    blocks = app.build(Engine(Models(["s1"], None)), shelf, Collections(tmp_path))
    assert blocks.delete_cache == (app.CLEANED, app.UPLOADS_KEPT)
    icons = [block for block in blocks.blocks.values() if isinstance(block, gr.Button) and block.temp_files]
    assert icons and all(block.temp_files <= block.keep_in_cache for block in icons)


# --- the queue


def test_a_queue_is_bounded_and_says_so(shelf, tmp_path):
    blocks = app.build(Engine(Models(["s1"], None)), shelf, Collections(tmp_path))
    assert blocks._queue.max_size == app.QUEUE
    assert blocks._queue.default_concurrency_limit == app.AT_ONCE


@pytest.fixture
def demo_load(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    import demo_load

    return demo_load


def test_many_visitors_at_once_are_answered_or_told_that_the_queue_is_full(
    demo_load, running, server, ada, monkeypatch
):
    ada.search("a cat")  # loads the model
    monkeypatch.setattr(demo_load, "THINKS", 0.0)
    monkeypatch.setattr(running._queue, "max_size", 3)
    tally, until = demo_load.Tally(), time.monotonic() + 8
    people = [demo_load.Client(server, "s1", seed, []) for seed in range(12)]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda client: tally.visit(client, until), people))
    assert set(tally.answers) <= {"answered", "full", "hidden"}, tally.answers
    assert tally.answers["answered"] and tally.answers["full"]
    for client in people:
        client.http.close()


@pytest.mark.hard
def test_50_visitors_for_minutes_get_no_error_and_take_no_memory(demo_load, tmp_path, monkeypatch):
    monkeypatch.setattr("side_by_side.FOLDER", tmp_path)
    demo_load.main([])
    assert [row for row in json.loads((tmp_path / "demo_load.json").read_text())["rows"] if not row["met"]] == []


@pytest.mark.parametrize("event", ["search", "index", "draw"])
def test_nobody_passes_the_queue(ada, event):
    for way in ("run", "api"):
        answer = ada.http.post(f"/gradio_api/{way}/{event}", json={"data": [], "session_hash": ada.session})
        assert answer.status_code == 404 and "join the queue" in answer.text


def test_gradio_keeps_the_last_answers_of_so_many_pages(running, server, ada, monkeypatch):
    pages = running.app.state_holder
    assert pages.capacity == app.SESSIONS
    pages.session_data.clear()
    assert "6 of 6 items" in ada.search("a cat")[0]  # whose page was forgotten
    monkeypatch.setattr(pages, "capacity", 2)
    visitors = [Visitor(server) for _ in range(3)]
    assert list(pages.session_data) == [visitor.session for visitor in visitors[1:]]
    for visitor in visitors:
        visitor.http.close()


# --- addresses


def test_an_address_is_not_fetched_unless_the_demo_was_started_so(ada, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "create_connection", lambda *args, **_: asked.append(args) or 1 / 0)
    for address, message in {
        "http://93.184.215.14/a.png": remote.OFF,
        "https://example.org/a b.png": remote.OFF,
        "HTTPS://example.org/a.png": "event: error",  # which Gradio takes for a path
    }.items():
        with pytest.raises(RuntimeError, match=message):
            ada.search(files=[ada.file(address)])
        with pytest.raises(RuntimeError, match=message):
            ada.call("contents", ada.file(address), ada.key)  # a field that takes no files
    [said, *_] = ada.search("http://example.org/a.png")
    assert "6 of 6 items" in said and asked == []  # words like others


class Web:
    """A server on this machine, and what it was asked for."""

    def __init__(self):
        self.asked, self.answers = [], {}
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                web.asked.append(self.path)
                status, headers, content = web.answers[self.path]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        Thread(target=self.server.serve_forever, daemon=True).start()

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@pytest.fixture
def web():
    web = Web()
    yield web
    web.server.shutdown()
    web.server.server_close()


@pytest.fixture
def opened(monkeypatch, web):
    """This machine counts as the public internet, its neighbour 127.0.0.2 does not."""
    monkeypatch.setitem(remote.SCHEMES, "http", web.port)
    monkeypatch.setattr(remote, "is_public", lambda number: number == "127.0.0.1")


@pytest.mark.parametrize(
    "number",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "::1", "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1", "2002:7f00:1::", "64:ff9b::a00:1", "::"],
)  # fmt: skip
def test_private_numbers_are_none_of_the_public_internet(number):
    assert not remote.is_public(number)
    assert remote.is_public("93.184.215.14") and remote.is_public("2606:2800:21f:cb07:6820:80da:af6b:8b2c")


@pytest.mark.parametrize(
    "address, message",
    [
        ("http://127.0.0.1/a.png", "not on the public internet"),
        ("http://2130706433/a.png", "not on the public internet"),  # 127.0.0.1 as one number
        ("http://[::ffff:127.0.0.1]/a.png", "not on the public internet"),
        ("http://localhost:22/", "port 22 is not the usual one"),
        ("http://ada@127.0.0.1/", "no plain address"),
        ("ftp://127.0.0.1/a.png", "no plain address"),
        ("file:///etc/hostname", "no plain address"),
        ("http:///a.png", "no plain address"),
        ("http://127.0.0.1/a\r\nX: y", "no plain address"),
    ],
)
def test_an_address_that_leads_inside_is_refused(tmp_path, monkeypatch, address, message):
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, type: _socket.getaddrinfo(host, port, 0, type))
    with pytest.raises(ValueError, match=f"cannot be fetched: .*{message}.*; download the file and add it"):
        remote.fetch(address, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_looked_up_once_and_every_number_is_checked(tmp_path, monkeypatch):
    answers, connected = [["93.184.215.14", "10.0.0.1"], ["93.184.215.14"], ["127.0.0.1"]], []
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *a, **k: [(2, 1, 6, "", (number, 80)) for number in answers.pop(0)]
    )

    def connect(address, timeout):
        connected.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ValueError, match="not on the public internet"):
        remote.fetch("http://two.example/a.png", tmp_path)
    with pytest.raises(ValueError, match="no network in tests"):
        remote.fetch("http://rebound.example/a.png", tmp_path)  # the third answer would be this machine
    assert connected == [("93.184.215.14", 80)] and len(answers) == 1


def test_what_an_address_holds_is_read_like_an_upload(opened, web, tmp_path):
    web.answers["/film"] = 200, {}, video_bytes(Clip(np.zeros((4, 32, 32, 3), np.uint8), 2.0))
    web.answers["/cat.txt"] = 200, {"Content-Type": "text/plain"}, png()
    assert read_upload(remote.fetch(web.address("/film"), tmp_path)).kind == "clip"
    assert read_upload(remote.fetch(web.address("/cat.txt"), tmp_path)).kind == "picture"


def test_redirects_are_checked_like_the_first_address(opened, web, tmp_path):
    web.answers["/near"] = 302, {"Location": "/cat.png"}, b""
    web.answers["/cat.png"] = 200, {}, png()
    web.answers["/inside"] = 302, {"Location": f"http://127.0.0.2:{web.port}/secret"}, b""
    web.answers["/file"] = 302, {"Location": "file:///etc/hostname"}, b""
    web.answers["/round"] = 302, {"Location": "/round"}, b""
    assert remote.fetch(web.address("/near"), tmp_path).read_bytes() == png()
    for path, message in {
        "/inside": "127.0.0.2 is not on the public internet",
        "/file": "no plain address",
        "/round": "redirects more than 3 times",
    }.items():
        with pytest.raises(ValueError, match=message):
            remote.fetch(web.address(path), tmp_path)
    assert "/secret" not in web.asked and web.asked.count("/round") == 4


def test_bytes_and_time_of_a_fetch_are_bounded(opened, web, tmp_path, monkeypatch):
    web.answers["/a"] = 200, {}, png()
    web.answers["/gone"] = 404, {}, png()
    monkeypatch.setattr(remote, "LIMIT", 10)
    with pytest.raises(ValueError, match="more than 0 MB"):
        remote.fetch(web.address("/a"), tmp_path)
    web.answers["/cut"] = 200, {"Content-Length": "9999"}, png()[:9]
    with pytest.raises(ValueError, match="cut off"):
        remote.fetch(web.address("/cut"), tmp_path)
    with pytest.raises(ValueError, match="status 404"):
        remote.fetch(web.address("/gone"), tmp_path)
    monkeypatch.setattr(remote, "SECONDS", -1)
    monkeypatch.setattr(remote, "LIMIT", 10**6)
    with pytest.raises(ValueError, match="cannot be fetched"):
        remote.fetch(web.address("/a"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_dawdles_is_left(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setitem(remote.SCHEMES, "http", port)
        monkeypatch.setattr(remote, "is_public", lambda number: True)
        monkeypatch.setattr(remote, "SECONDS", 0.5)

        def dawdle():
            connection, _ = server.accept()
            for byte in b"HTTP/1.1 200 OK" * 100:
                try:
                    connection.sendall(bytes([byte]))
                except OSError:
                    return
                time.sleep(0.05)

        Thread(target=dawdle, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(ValueError, match="cannot be fetched"):
            remote.fetch(f"http://127.0.0.1:{port}/", tmp_path)
        assert time.monotonic() - began < 30  # to be sent in full it would take 75 seconds


def test_where_it_is_wanted_an_address_is_a_query(opened, web, shelf, tmp_path):
    web.answers["/cat.png"] = 200, {}, png()
    page = Page(Engine(Models(["s1"], None)), shelf, Collections(tmp_path), remote=True)
    *_, (said, _, _) = page.search({"text": web.address("/cat.png"), "files": []}, "", GALLERY, [], *SETTINGS, "")
    assert "6 of 6 items" in said and list(page.scratch.iterdir()) == []
    [(said, *_)] = page.search({"text": "http://127.0.0.2/a", "files": []}, "", GALLERY, [], *SETTINGS, "")
    assert "the query: http://127.0.0.2/a cannot be fetched" in said
