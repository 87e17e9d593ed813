"""Many visitors of the demo at once: what they are answered, how long it takes, and whether its memory stays flat.

    python benchmarks/demo_load.py                            # 50 clients, 3 minutes
    python benchmarks/demo_load.py --clients 20 --seconds 60

Starts a public demo with one embedder and the reranker in a process of its own, on this machine, and writes
results/demo_load.json. A client waits THINKS seconds on average, then searches for words, for a picture that it
uploads, or in a collection of its own, to which it has added a text; it asks through HTTP, as the page does. The only
answer that may be no result is that the queue is full (HTTP 503). Memory is the resident set of the demo's process,
read every STEP seconds; it starts to count when every client has been answered once, and its start and end are medians
of the first and last fifth of the readings.
"""

import argparse
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from threading import Lock, Thread

import httpx
import psutil
from PIL import Image

from q3vl_mini.report import git_revision, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "demo_load.json"
START = "from q3vl_mini.demo.app import launch; launch(models=[{model!r}], port={port}, public=True)"
THINKS, STEP, LONGEST = 2.0, 2.0, 300.0  # seconds: between two questions, between readings, for the demo to be ready
WORDS = ["a bicycle", "two red apples", "ein Hund", "un gato", "a clip of a moving star", "猫", "a page with a table"]
FULL = 503


class Client:
    """A visitor with a key and, in time, a collection."""

    def __init__(self, address: str, model: str, seed: int):
        self.http, self.session = httpx.Client(base_url=address, timeout=LONGEST), f"client {seed}"
        self.model, self.random, self.key, self.place = model, random.Random(seed), "", "gallery"

    def act(self) -> str:
        """One question; what came of it: "answered", "full" or a fault in words."""
        try:
            return self._one_of_many()
        except httpx.HTTPStatusError as error:
            return "full" if error.response.status_code == FULL else f"HTTP {error.response.status_code}"
        except (httpx.HTTPError, ValueError) as error:
            return f"{type(error).__name__}: {error}"[:200]

    def _one_of_many(self) -> str:
        if not self.key:
            self.key = self._call("arrive", "")[0]
        chance = self.random.random()
        if self.place == "gallery" and chance < 0.1:
            file = self._upload(f"words {self.random.random()}".encode(), "a.txt")
            said = self._call("index", f"collection {self.random.random()}", [file], "", self.model, self.key)
            self.place = self._call("arrive", self.key)[-1]["choices"][0][1]
        elif chance < 0.3:
            picture, buffer = Image.new("RGB", (200, 150), self.random.choice(["red", "lime", "blue"])), io.BytesIO()
            picture.save(buffer, "PNG")
            said = self._search("", [self._upload(buffer.getvalue(), "a.png")], "gallery")
        else:
            said = self._search(self.random.choice(WORDS), [], self.random.choice(["gallery", self.place]))
        return "answered" if "⚠" not in said[0] else f"a fault: {said[0]}"

    def _search(self, text: str, files: list, place: str) -> list:
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


def ready(address: str, model: str) -> None:
    """Wait for the first answer: the gallery's vectors are made before it."""
    client, until = Client(address, model, 0), time.monotonic() + LONGEST
    while (answer := client.act()) != "answered":
        if time.monotonic() > until:
            raise TimeoutError(f"no answer from {address} in {LONGEST:.0f} s: {answer}")
        time.sleep(1)


def measure(address: str, process: psutil.Process, clients: int, seconds: float, model: str) -> dict:
    """The figures of one run."""
    ready(address, model)
    people = [Client(address, model, seed) for seed in range(clients)]
    for client in people:
        client.act()
    tally, until = Tally(), time.monotonic() + seconds
    threads = [Thread(target=tally.visit, args=(client, until)) for client in people]
    for thread in threads:
        thread.start()
    memory = []
    while any(thread.is_alive() for thread in threads):
        memory.append(process.memory_info().rss / 2**20)
        time.sleep(STEP)
    fifth = max(1, len(memory) // 5)
    waited = sorted(tally.seconds)
    faults = {answer: n for answer, n in tally.answers.items() if answer not in ("answered", "full")}
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": sum(tally.answers.values()),
        "answered": tally.answers["answered"],
        "busy_answers": tally.answers["full"],
        "errors": sum(faults.values()),
        "error_kinds": faults,
        "seconds_to_answer": {"median": statistics.median(waited), "p95": waited[int(0.95 * len(waited))]},
        "memory_mb": {
            "start": statistics.median(memory[:fifth]),
            "end": statistics.median(memory[-fifth:]),
            "most": max(memory),
        },
    }


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--model", default="s3", help="the embedder (default s3)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    port = free_port()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        environment = os.environ | {"Q3VL_MINI_HOME": home, "GRADIO_TEMP_DIR": f"{home}/uploads"}
        command = [sys.executable, "-c", START.format(model=options.model, port=port)]
        demo = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            process = psutil.Process(demo.pid)
            figures = measure(f"http://127.0.0.1:{port}", process, options.clients, options.seconds, options.model)
        finally:
            demo.terminate()
            demo.wait()
    figures = {k: round(v, 2) if isinstance(v, float) else v for k, v in figures.items()}
    for part in ("seconds_to_answer", "memory_mb"):
        figures[part] = {name: round(value, 2) for name, value in figures[part].items()}
    meta = {"git": git_revision(), "cores": psutil.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS", "all")}
    write_json(options.out, {"meta": meta, **figures}, indent=1)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
