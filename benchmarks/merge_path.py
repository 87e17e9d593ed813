"""MMEB-mini on the way from s1 to s2, and of s3 beside it.

    python benchmarks/merge_path.py --rows 30

Writes results/merge_path.json and the figure results/merge_path.png. On the validation split: the path is for choosing.
"""

import argparse
from pathlib import Path

import torch

from q3vl_mini import backbone, merge
from q3vl_mini.combine import path_scores, scores_at, vector_of
from q3vl_mini.config import load_preset
from q3vl_mini.embedder import Embedder
from q3vl_mini.emoji_world.tasks import benchmark
from q3vl_mini.forward import VisualStore
from q3vl_mini.report import plot_path, write_json

RESULTS = Path(__file__).resolve().parents[1] / "results"


def place(vectors: list[merge.Vector], merged: merge.Vector) -> tuple[float, float]:
    """The t and lambda of which `merged` is lambda * slerp(V1, V2, t), if it lies in their plane."""
    gram = merge.gram_matrix([*vectors, merged])
    c1, c2 = torch.linalg.solve(gram[:2, :2], gram[:2, 2])
    omega = torch.tensor(merge.angle(*vectors), dtype=torch.float64)
    along = torch.atan2(c2 * torch.sin(omega), c1 + c2 * torch.cos(omega))  # t * omega
    return (along / omega).item(), (c1 * torch.sin(omega) / torch.sin(omega - along)).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=30, help="validation queries of each sub-dataset")
    parser.add_argument("--points", type=int, default=5, help="of the path, ends included")
    parser.add_argument("--out", type=Path, default=RESULTS / "merge_path.json")
    options = parser.parse_args()
    preset = load_preset("tiny")
    loaded = {name: backbone.load(name, device="cpu") for name in ("s1", "s2", "s3")}
    revisions = {name: found.card.get("git") for name, found in loaded.items()}
    one, other, merged = (vector_of(found.model) for found in loaded.values())
    raw = Embedder(preset.backbone, template=preset.template, store=VisualStore())
    quadruples = benchmark("validation", options.rows, preset.data.test_seed)
    ts = torch.linspace(0, 1, options.points).tolist()
    points = path_scores(raw, one, other, quadruples, ts)
    t, scale = place([one, other], merged)
    s3 = {"t": t, "lambda": scale, **scores_at(raw, merged, quadruples)}
    facts = {"rows": options.rows, "models": revisions, "angle": merge.angle(one, other)}
    write_json(options.out, {**facts, "path": points, "s3": s3}, indent=1)
    plot_path(points, {"s3": s3}, options.out.with_suffix(".png"))
    for point in (*points, s3):
        print(f"t = {point['t']:.2f}: mean {point['mean']:.3f}")


if __name__ == "__main__":
    main()
