"""How long the demo takes to start: from the command to the page, and to the first answer.

    python benchmarks/demo_start.py [--rounds 5]

Each round starts `q3vl-mini demo` in a process of its own, in an empty home, so that nothing is there but the shipped
artifacts. Writes results/performance/demo_start.json.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import httpx
import psutil
from demo_load import LONGEST, ROOT, Client, free_port
from side_by_side import number, write

BAR = 15.0  # seconds to the page
LOOKS = 0.1  # seconds between two looks


def start() -> tuple[float, float]:
    """Seconds until the page is there, and until a search is answered."""
    port = free_port()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        command = [sys.executable, "-m", "q3vl_mini", "demo", "--port", str(port), "--home", home]
        began = time.monotonic()
        demo = subprocess.Popen(
            command, env=os.environ | {"GRADIO_TEMP_DIR": f"{home}/uploads"}, cwd=ROOT, stdout=subprocess.DEVNULL
        )
        try:
            client = Client(f"http://127.0.0.1:{port}", "s3", 0, [])
            while not is_there(client.http):
                if demo.poll() is not None or time.monotonic() - began > LONGEST:
                    raise RuntimeError(f"no page from {' '.join(command)}; start it by hand to see why")
                time.sleep(LOOKS)
            page = time.monotonic() - began
            client.arrive()
            said = client.search("a bicycle", [], "gallery")
            if "⚠" in said[0]:
                raise RuntimeError(f"no answer: {said[0]}")
            return page, time.monotonic() - began
        finally:
            demo.terminate()
            demo.wait()


def is_there(http: httpx.Client) -> bool:
    try:
        return http.get("/").is_success
    except httpx.TransportError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    pages, answers = zip(*(start() for _ in range(options.rounds)), strict=True)
    rows = [
        number("seconds from the command to the page", statistics.median(pages), "at most", BAR),
        number("seconds from the command to the first answer", statistics.median(answers)),
    ]
    for row, values in zip(rows, (pages, answers), strict=True):
        row |= {"range": [round(min(values), 2), round(max(values), 2)], "rounds": options.rounds}
    write("demo_start", f"`q3vl-mini demo` in an empty home, {psutil.cpu_count()} cores", rows)


if __name__ == "__main__":
    main()
