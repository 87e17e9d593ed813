"""Line icons with the words of their names: Tabler Icons, as pictures and a metadata.jsonl for finetune().

    python scripts/your_data/icons.py --out runs/your_data/icons [--limit 2400] [--pixels 96] [--negatives 2]

Source: the npm package @iconify-json/tabler 1.2.41 (Tabler Icons 3.48.0, Paweł Kuna and contributors,
github.com/tabler/tabler-icons). Licence: MIT. Left out: brands' signs, and names of one word.

Validation and test names are new combinations: each of their words is in training, the name is not. Negatives, if they
are wanted, are icons of the same side whose names share a word with the query.
"""

import argparse
import hashlib
import io
import json
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import resvg_py
from packages import fetch, state_source
from PIL import Image

PACKAGE = ("npm", "@iconify-json/tabler", "1.2.41", "3bf99af156d28d05568aff524a35ed1ba238df640a7835a5e02e1f8e439685f6")
SHARES = {"test": 0.2, "validation": 0.1}


def split_names(names: Sequence[str], shares: dict[str, float]) -> dict[str, str]:
    """The side of each name: of `shares`, names of which every word stays in two training names at least."""

    def drawn(name: str) -> bytes:
        return hashlib.blake2b(name.encode(), digest_size=8).digest()

    sides = dict.fromkeys(names, "train")
    left = Counter(word for name in names for word in set(name.split("-")))
    room = {side: round(share * len(names)) for side, share in shares.items()}
    for name in sorted(names, key=drawn):
        words = set(name.split("-"))
        side = next((side for side in room if room[side]), None)
        if side is not None and all(left[word] > 2 for word in words):
            sides[name] = side
            room[side] -= 1
            left.subtract(words)
    return sides


def hard_negatives(sides: dict[str, str], number: int) -> dict[str, list[str]]:
    """For each name up to `number` others of its side that share a word with it."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, side in sides.items():
        for word in sorted(set(name.split("-"))):
            alike.setdefault((side, word), []).append(name)
    drawn, rng = {}, random.Random(0)
    for name, side in sides.items():
        near = sorted({other for word in name.split("-") for other in alike[side, word]} - {name})
        drawn[name] = rng.sample(near, min(number, len(near)))
    return drawn


def draw(body: str, box: float, pixels: int) -> Image.Image:
    """An icon's SVG body in black on white."""
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {box} {box}" color="black">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=pixels, height=pixels, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=2400, help="icons (default 2400)")
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--negatives", type=int, default=0, help="a name, at most (default none)")
    parser.add_argument("--file", type=Path, help="the package, if it is there already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        icons = json.loads((fetch(*PACKAGE, Path(scratch), options.file) / "icons.json").read_text(encoding="utf-8"))
    names = sorted(name for name in icons["icons"] if "-" in name and not name.startswith("brand-"))
    names = sorted(random.Random(0).sample(names, min(options.limit, len(names))))
    options.out.mkdir(parents=True, exist_ok=True)
    rows, sides = [], split_names(names, SHARES)
    negatives = hard_negatives(sides, options.negatives)
    for name, side in sides.items():
        draw(icons["icons"][name]["body"], icons["height"], options.pixels).save(options.out / f"{name}.png")
        rows.append({"file_name": f"{name}.png", "query": name.replace("-", " "), "split": side})
        rows[-1] |= {"negatives": [f"{other}.png" for other in negatives[name]]} if options.negatives else {}
    state_source(options.out, *PACKAGE[:3], "github.com/tabler/tabler-icons", "MIT")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (options.out / "metadata.jsonl").write_text(lines, encoding="utf-8")
    print(f"{options.out}: {dict(Counter(row['split'] for row in rows))}")


if __name__ == "__main__":
    main()
