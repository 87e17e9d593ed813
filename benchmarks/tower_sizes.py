"""Vision towers of several sizes, patches and resolutions, each trained for the same time, without one training style.

    python benchmarks/tower_sizes.py

To choose Q3VL-tiny's shape by drawings of the training style that was left out, never by a test style. A picture is
four visual tokens in all of them, so the language model's share is the same. A variant's number of steps is the budget
over the time of one of its steps, which is measured first, all variants in turns. Writes results/tower_sizes.json and
the table of docs/pretraining.md.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from q3vl_mini import tiny
from q3vl_mini.emoji_world.dialogues import tokenizer_texts
from q3vl_mini.pretrain_vision import VisionConfig, pretrain_vision
from q3vl_mini.report import fill, rewrite
from q3vl_mini.vision import speed_up

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "pretraining.md"
HOLD_OUT = "twemoji"
VARIANTS = {  # name: (changes of the shape, pixels of a picture's edge)
    "as shipped: 6 layers, 192 wide, patches of 16 pixels, 2 x 2 a token": ({}, 64),
    "4 layers": ({"vision_depth": 4}, 64),
    "8 layers": ({"vision_depth": 8}, 64),
    "128 wide": ({"vision_width": 128}, 64),
    "256 wide": ({"vision_width": 256}, 64),
    "patches of 32 pixels, one a token": ({"patch": 32, "merge": 1}, 64),
    "pictures of 32 pixels, patches of 8": ({"patch": 8}, 32),
}


def tower(tokenizer, shape: dict) -> torch.nn.Module:
    return speed_up(tiny.make_model(tiny.make_config(tokenizer, **shape), tokenizer).model.visual)


def train(tokenizer, name: str, steps: int) -> tuple[dict, torch.nn.Module]:
    """The last row of the variant's curve, and its tower."""
    shape, edge = VARIANTS[name]
    visual = tower(tokenizer, shape)
    with tempfile.TemporaryDirectory() as folder:
        pretrain_vision(visual, Path(folder), VisionConfig(steps=steps, hold_out=HOLD_OUT, edge=edge), log_every=steps)
        return json.loads((Path(folder) / "vision.jsonl").read_text().splitlines()[-1]), visual


def seconds_a_step(tokenizer, rounds: int = 3, steps: int = 5) -> dict[str, float]:
    """The shortest of `rounds` measurements, the variants in turns."""
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name in VARIANTS:
            times[name].append(train(tokenizer, name, steps)[0]["seconds"] / steps)
    return {name: min(seconds) for name, seconds in times.items()}


def table(content: dict) -> str:
    """The results as a Markdown table with what they are of."""
    lines = [
        f"{content['seconds']:.0f} seconds a variant on one core; drawings of {content['held_out_style']}, which no "
        "step shows.",
        "",
        "| tower | parameters | steps | time a step | first guess | among ten |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in content["variants"].items():
        shape = f"{name} | {row['parameters'] / 1e6:.1f} M | {row['steps']} | {row['relative_step_time']:.2f}"
        lines.append(f"| {shape} | {row['top1']:.2%} | {row['top10']:.2%} |")
    return "\n".join(lines) + "\n"


def page(text: str, content: dict) -> str:
    """docs/pretraining.md with the table."""
    return fill(text, {"tower_sizes": table(content)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=720, help="a variant (default 720)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "tower_sizes.json")
    options = parser.parse_args()
    tokenizer = tiny.train_tokenizer(tokenizer_texts())
    seconds, rows = seconds_a_step(tokenizer), {}
    for name in VARIANTS:
        scores, visual = train(tokenizer, name, round(options.seconds / seconds[name]))
        rows[name] = {
            "parameters": sum(p.numel() for p in visual.parameters()),
            "steps": scores["step"],
            "relative_step_time": round(seconds[name] / next(iter(seconds.values())), 2),
            "top1": scores["top1"],
            "top10": scores["top10"],
        }
        print(json.dumps({name: rows[name]}), flush=True)
        content = {"seconds": options.seconds, "held_out_style": HOLD_OUT, "variants": rows}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
        rewrite(PAGE, page(PAGE.read_text(encoding="utf-8"), content))


if __name__ == "__main__":
    main()
