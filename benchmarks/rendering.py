"""Does drawing ever starve training? Scenes a second on one core, by size: from cached sprites, and as training does.

    python benchmarks/rendering.py

From cached sprites: the same scenes again. As training does: the single things of a training set, each for the first
time, half of them redrawn by a hand of their own, so that no sprite is there already. Prints a table and writes
results/rendering.json. The bar (DESIGN: rendering never starves training) is 1,500 scenes a second a core at 64 pixels
from cached sprites; a step of s0 has at most 96 queries and 192 documents.
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


def new_scenes_a_second(n: int, pixels: int) -> float:
    """Median over REPEATS of n single things of training, none drawn before."""
    rates = []
    for seed in range(REPEATS):
        world = World("train", "new", seed)
        scenes = [replace(world.single(), pixels=pixels) for _ in range(n)]
        start = time.perf_counter()
        for scene in scenes:
            scene.array()
        rates.append(n / (time.perf_counter() - start))
    return statistics.median(rates)


def main():
    sizes = (64, 128, 256)
    rates = {pixels: round(scenes_a_second(1000, pixels)) for pixels in sizes}
    new = {pixels: round(new_scenes_a_second(1000, pixels)) for pixels in sizes}
    print("| pixels | scenes a second | new ones |\n|---|---|---|")
    for pixels in sizes:
        print(f"| {pixels} | {rates[pixels]:,} | {new[pixels]:,} |")
    out = Path(__file__).resolve().parents[1] / "results" / "rendering.json"
    out.parent.mkdir(exist_ok=True)
    found = {"scenes_a_second": rates, "new_scenes_a_second": new, "repeats": REPEATS}
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
