"""What section 3.3 gets right on noise of a known rate: precision and recall over K, t+ and delta-.

    python benchmarks/mining_noise.py --rows 120

Each task is spoiled by noise.add_noise (wrong labels, unlabelled near-duplicates), embedded, and mined with one of the
three dials varied, the other two as in the preset's s1. Writes results/mining_noise.json: for each miner, task and
dial a list of means over the seeds of the noise, None where there is nothing to count (see mining.NoiseReport).
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np

from q3vl_mini.config import load_preset
from q3vl_mini.embedder import Embedder
from q3vl_mini.emoji_world.tasks import build
from q3vl_mini.mining import mine, noise_report
from q3vl_mini.noise import add_noise
from q3vl_mini.report import write_json

RESULT = Path(__file__).resolve().parents[1] / "results" / "mining_noise.json"
DIALS = {
    "k": (5, 10, 20, 50, 100, 200),
    "t_plus": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "delta_minus": (-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2),
}
MEASURES = (
    "removed_precision",
    "removed_recall",
    "avoided_precision",
    "avoided_recall",
    "false_negatives_filtered",
    "false_negatives_unfiltered",
)


def noisy_sets(miner: Embedder, task: str, options: argparse.Namespace) -> list[tuple]:
    """(quadruple, query vectors, corpus vectors) for each seed; what the seeds share is embedded once."""
    clean = build(task, "train", options.rows, seed=7)
    queries, corpus = miner.encode(clean.queries, clean.instruction), miner.encode(clean.corpus)
    sets = []
    for seed in range(options.seeds):
        noisy = add_noise(clean, wrong=options.wrong, duplicates=options.duplicates, seed=seed)
        copies = miner.encode(noisy.corpus[len(clean.corpus) :])
        sets.append((noisy, queries, np.concatenate([corpus, copies])))
    return sets


def measured(noisy, queries: np.ndarray, corpus: np.ndarray, setting: dict) -> dict[str, float]:
    """The share of queries kept, and precision and recall; nothing but 0 kept where every query is dropped."""
    try:
        mined = mine(noisy, queries, corpus, **setting)
    except ValueError:
        return {"kept": 0.0}
    report = asdict(noise_report(mined, noisy.meta["truth"]))
    return {"kept": len(mined.queries) / len(noisy), **{name: report[name] for name in MEASURES}}


def mean(values: list[float]) -> float | None:
    known = [value for value in values if not np.isnan(value)]
    return round(float(np.mean(known)), 4) if known else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--miners", nargs="+", default=["q3vl-tiny", "s0"], help="shipped names or folders")
    parser.add_argument("--tasks", nargs="+", default=["text_to_image", "scene_retrieval", "keyword_search"])
    parser.add_argument("--rows", type=int, default=120, help="queries of each task")
    parser.add_argument("--seeds", type=int, default=3, help="of the noise")
    parser.add_argument("--wrong", type=float, default=0.15, help="share of wrong labels")
    parser.add_argument("--duplicates", type=float, default=0.2, help="share of unlabelled near-duplicates")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    preset = load_preset("tiny")
    setting = {name: value for name, value in asdict(preset.stages["s1"].mining).items() if name != "miner"}
    curves, revisions = [], {}
    for name in options.miners:
        miner = Embedder(name, template=preset.template)
        revisions[name] = miner.card.get("git")
        for task in options.tasks:
            sets = noisy_sets(miner, task, options)
            for dial, values in DIALS.items():
                rows = [[measured(*one, {**setting, dial: value}) for one in sets] for value in values]
                curve = {m: [mean([r.get(m, np.nan) for r in seeds]) for seeds in rows] for m in ("kept", *MEASURES)}
                curves.append({"miner": name, "task": task, "dial": dial, "values": values, **curve})
                print(name, task, dial, *(f"\n  {m:27s}{v}" for m, v in curve.items()))
    facts = {name: getattr(options, name) for name in ("rows", "seeds", "wrong", "duplicates")}
    write_json(options.out, {**facts, "miners": revisions, "setting": setting, "curves": curves})


if __name__ == "__main__":
    main()
