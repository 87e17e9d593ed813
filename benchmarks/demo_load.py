"""Many visitors of the demo at once: what they are answered, how long it takes, and whether its memory stays flat.

    python benchmarks/demo_load.py                            # 50 clients, 13 minutes
    python benchmarks/demo_load.py --clients 20 --seconds 300

Starts a public demo with one embedder and the reranker in a process of its own, on this machine, and writes
results/performance/demo_load.json. A client is one visitor after the other: it loads the page anew now and then. A
visitor waits THINKS seconds on average, then searches for words, for a picture that it uploads, or in a collection of
its own, to which it has added a text and where it must find it; or it asks for the collection of another visitor,
whose id it knows, and must be refused. All ask through HTTP, as the page does. The only answer to the others that may
be no result is that the queue is full (HTTP 503).

Memory is the resident set of the demo's process, read every STEP seconds. Before the clients come, as many pages are
opened as the demo keeps answers of; and memory counts when they have been at it for SETTLE seconds, in which the demo
gets its threads and fills what else it keeps. So that it does, the visual features of uploaded pictures have
STORE_BYTES here; a demo gives them more, which they would fill for the whole of the test. Start and end are medians of
the first and last fifth of the readings, the slope is that of the line with the least squares. The readings swing with
what is under way, so that a slope over a few minutes says nothing; therefore it takes eleven.
"""

import argparse
import io
import json
import os
import random
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from threading import Lock, Thread

import httpx
import numpy as np
import psutil
from PIL import Image
from side_by_side import number, write

from q3vl_mini.demo.app import SESSIONS

ROOT = Path(__file__).resolve().parents[1]
START = "from q3vl_mini.demo import app, models; models.STORE_BYTES = {store}; "
START += "app.launch(models=[{model!r}], port={port}, public=True)"
STORE_BYTES = 8 * 2**20  # of visual features, of which a demo keeps 256 MB
THINKS, STEP, LONGEST = 2.0, 2.0, 600.0  # seconds: between two questions, between readings, for the demo to be ready
WORDS = ["a bicycle", "two red apples", "ein Hund", "un gato", "a clip of a moving star", "猫", "a page with a table"]
FULL, REFUSED = 503, "not in the list of choices"
SETTLE, FLAT = 120.0, 5.0  # seconds before memory counts; MB a minute


class Client:
    """One visitor after the other, each with a key and, in time, a collection.

    collections: (id, the words in it) of every client's, which grows.
    """

    def __init__(self, address: str, model: str, seed: int, collections: list[tuple[str, str]]):
        new_each_time = httpx.Limits(max_keepalive_connections=0)  # a kept one may be closed just when it is used again
        self.http = httpx.Client(base_url=address, timeout=LONGEST, limits=new_each_time)
        self.model, self.random = model, random.Random(seed)
        self.collections, self.colour = collections, tuple(self.random.randbytes(3))
        self.key = self.session = self.words = ""
        self.place = "gallery"

    def act(self) -> str:
        """One question; what came of it: "answered", "full", "hidden" (another's collection) or a fault in words."""
        try:
            return self._one_of_many()
        except httpx.HTTPStatusError as error:
            return "full" if error.response.status_code == FULL else f"HTTP {error.response.status_code}"
        except (httpx.HTTPError, ValueError) as error:
            return f"{type(error).__name__}: {error}"[:200]

    def arrive(self) -> None:
        """Be a new visitor, who loads the page; or one who was told that the queue is full, and tries again."""
        if self.key or not self.session:
            self.http.get("/").raise_for_status()
            self.session, self.key = secrets.token_hex(8), ""
        self.key = self._call("arrive", "")[0]
        self.place, self.words = "gallery", ""

    def _one_of_many(self) -> str:
        if not self.key or self.random.random() < 0.1:
            self.arrive()
        chance = self.random.random()
        others = [known for known in list(self.collections) if known[0] != self.place]
        if others and chance < 0.1:
            return self._intrude(*self.random.choice(others))
        if self.place == "gallery" and chance < 0.25:
            said = self._collect()
        elif chance < 0.4:
            buffer = io.BytesIO()
            Image.new("RGB", (200, 150), self.colour).save(buffer, "PNG")
            said = self.search("", [self._upload(buffer.getvalue(), "a.png")], "gallery")
        else:
            where = self.random.choice(["gallery", self.place])
            said = self.search(self.random.choice(WORDS), [], where)
            if where != "gallery" and self.words not in said[1]:
                return f"a fault: {self.words!r} is not found in {said[1][:100]}"
        return "answered" if "⚠" not in said[0] else f"a fault: {said[0]}"

    def _collect(self) -> list:
        """Make a collection of one text."""
        words = f"words {secrets.token_hex(8)}"
        said = self._call("index", words, [self._upload(words.encode(), "a.txt")], None, "", self.model, self.key)
        [self.place] = [id for name, id in self._call("arrive", self.key)[-1]["choices"] if name == words]
        self.words = words
        self.collections.append((self.place, words))
        return said

    def _intrude(self, place: str, words: str) -> str:
        """Ask for the collection of another visitor."""
        if words in json.dumps(self._call("contents", place, self.key)):
            return "a fault: the contents of another's collection"
        try:
            said = self.search(words, [], place)
        except ValueError as error:
            return "hidden" if REFUSED in str(error) else f"{error}"[:200]
        return f"a fault: another's collection is searched: {said[0]}"

    def search(self, text: str, files: list, place: str) -> list:
        """Status, cards and cost, as HTML."""
        settings = self.model, 256, self.random.choice(["float32", "int8", "binary"]), True, False
        return self._call("search", {"text": text, "files": files}, "", place, [], *settings, self.key)

    def _upload(self, content: bytes, name: str) -> dict:
        [path] = self.http.post("/gradio_api/upload", files={"files": (name, content)}).raise_for_status().json()
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def _call(self, event: str, *data) -> list:
        body = {"data": list(data), "session_hash": self.session}
        asked = self.http.post(f"/gradio_api/call/{event}", json=body).raise_for_status().json()
        answer = self.http.get(f"/gradio_api/call/{event}/{asked['event_id']}").raise_for_status().text
        kind, content = answer.strip().split("\n\n")[-1].split("\n", 1)
        if kind != "event: complete":
            raise ValueError(f"{kind} {content}")
        return json.loads(content.removeprefix("data: "))


class Tally:
    """What the clients were answered, together."""

    def __init__(self):
        self.answers: Counter[str] = Counter()
        self.seconds: list[float] = []
        self._lock = Lock()

    def visit(self, client: Client, until: float) -> None:
        """Ask until the time is over."""
        while time.monotonic() < until:
            began = time.monotonic()
            answer = client.act()
            with self._lock:
                self.answers[answer] += 1
                if answer == "answered":
                    self.seconds.append(time.monotonic() - began)
            time.sleep(client.random.uniform(0, 2 * THINKS))


def warm_up(address: str, model: str) -> None:
    """Wait for the first answer, before which the gallery's vectors are made; then open as many pages as are kept."""
    client, until = Client(address, model, 0, []), time.monotonic() + LONGEST
    while (answer := client.act()) != "answered":
        if time.monotonic() > until:
            raise TimeoutError(f"no answer from {address} in {LONGEST:.0f} s: {answer}")
        time.sleep(1)
    for _ in range(SESSIONS):
        client.arrive()
        client.search("a bicycle", [], "gallery")


def measure(address: str, process: psutil.Process, clients: int, seconds: float, model: str) -> dict:
    """The figures of one run."""
    warm_up(address, model)
    collections: list[tuple[str, str]] = []
    people = [Client(address, model, seed, collections) for seed in range(clients)]
    tally, began = Tally(), time.monotonic()
    threads = [Thread(target=tally.visit, args=(client, began + seconds)) for client in people]
    for thread in threads:
        thread.start()
    readings = []
    while any(thread.is_alive() for thread in threads):
        if (passed := time.monotonic() - began) > SETTLE:
            readings.append((passed, process.memory_info().rss / 2**20))
        time.sleep(STEP)
    times, memory = np.array(readings).T
    fifth = max(1, len(memory) // 5)
    start, end = statistics.median(memory[:fifth].tolist()), statistics.median(memory[-fifth:].tolist())
    kinds = ("answered", "full", "hidden")
    return {
        "answers": {kind: tally.answers[kind] for kind in kinds},
        "errors": {answer: n for answer, n in tally.answers.items() if answer not in kinds},
        "seconds_to_answer": {f"{q} %": float(np.percentile(tally.seconds, q)) for q in (50, 95)},
        "resident_megabytes": {"start": round(start), "end": round(end), "most": round(float(memory.max()))},
        "mb_a_minute": float(60 * np.polyfit(times, memory, 1)[0]),
    }


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=780, help="more than 120 (default 780)")
    parser.add_argument("--model", default="s3", help="the embedder (default s3)")
    options = parser.parse_args(arguments)
    port = free_port()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        environment = os.environ | {"Q3VL_MINI_HOME": home, "GRADIO_TEMP_DIR": f"{home}/uploads"}
        command = [sys.executable, "-c", START.format(model=options.model, port=port, store=STORE_BYTES)]
        demo = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            process = psutil.Process(demo.pid)
            found = measure(f"http://127.0.0.1:{port}", process, options.clients, options.seconds, options.model)
        finally:
            demo.terminate()
            demo.wait()
    slope, errors = found.pop("mb_a_minute"), found.pop("errors")
    setting = f"{options.clients} clients for {options.seconds:.0f} s, memory from {SETTLE:.0f} s on, "
    setting += f"{psutil.cpu_count()} cores"
    rows = [
        number("answers that are neither a result nor that the queue is full", sum(errors.values()), "at most", 0),
        number("memory that is added, MB a minute", slope, "at most", FLAT),
    ]
    write("demo_load", setting, rows, **found, **({"errors": errors} if errors else {}))


if __name__ == "__main__":
    main()
