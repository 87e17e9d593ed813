"""Does drawing ever starve training? Scenes a second on one core, from cached sprites, by size.

    python benchmarks/rendering.py

Prints a table and writes results/rendering.json. The bar (DESIGN: rendering never starves training) is
1,500 scenes a second a core at 64 pixels.
"""

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

from q3vl_mini.emoji_world.tasks import World

REPEATS = 5


def scenes_a_second(n: int, pixels: int) -> float:
    """Median over REPEATS of n scenes of one to four objects, after one round that fills the sprite cache."""
    world = World("train", "rendering", 0)
    scenes = [replace(world.scene(1 + i % 4), pixels=pixels) for i in range(n)]
    rates = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        for scene in scenes:
            scene.array()
        rates.append(n / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def main():
    rates = {pixels: round(scenes_a_second(1000, pixels)) for pixels in (64, 128, 256)}
    print("| pixels | scenes a second |\n|---|---|")
    for pixels, rate in rates.items():
        print(f"| {pixels} | {rate:,} |")
    out = Path(__file__).resolve().parents[1] / "results" / "rendering.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"scenes_a_second": rates, "repeats": REPEATS}, indent=1) + "\n")


if __name__ == "__main__":
    main()
