"""Write the stage table of results/tiny.json into README.md, between its two markers.

    python scripts/update_readme.py          # rewrite README.md
    python scripts/update_readme.py --check  # exit 1 if README.md is not what the results say
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from q3vl_mini.config import load_preset
from q3vl_mini.emoji_world import words
from q3vl_mini.emoji_world.scenes import COLOURS
from q3vl_mini.emoji_world.tasks import build
from q3vl_mini.report import fill, rewrite, stage_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "README.md"
CARDS = "data_samples/adapters/{}/q3vl_mini.json"
SHIPPED = ("s0", "s1", "s2", "s3", "reranker")
ANSWERED = ("image_qa", "video_qa")  # tasks with answers of several kinds, and columns of the same names


def section(results: dict, cards: Mapping[str, dict]) -> str:
    """The table, what run it is of, and single-object retrieval in the styles that no training saw.

    cards: of the shipped stages, which name the revision that each was trained at: a run that goes on keeps others.
    """
    meta, unseen = results["meta"], results["unseen_styles"]
    trained: dict[str, list[str]] = {}
    for stage, card in cards.items():
        trained.setdefault(card["git"][:12], []).append(stage)
    revisions = "; ".join(f"{', '.join(stages)} at `{git}`" for git, stages in trained.items())
    memory = f"{meta['peak_rss_mb'] / 1024:.1f} GB" if meta["peak_rss_mb"] else "not measured"
    lines = [
        stage_table(results["models"]),
        "",
        f"Preset `{meta['preset']}`, seed {meta['seed']}, revision `{meta['git'][:12]}`, {meta['cores']} cores: "
        f"{meta['wall_s'] / 60:.0f} minutes, peak memory {memory}.",
        f"Trained: {revisions}.",
        "",
        f"Not above chance, by the lower end of its 95 % interval: {no_better_than_chance(results['models'])}.",
        guesses(results["models"]),
        "",
        f"Single objects in the two unseen styles, text to image, {next(iter(unseen.values()))['n']} queries:",
        "",
        "| model | Hit@1 | Hit@10 |",
        "|---|---|---|",
        *(f"| {name} | {row['hit@1']:.3f} | {row['hit@10']:.3f} |" for name, row in unseen.items()),
    ]
    return "\n".join(lines) + "\n"


def guesses(models: dict) -> str:
    """What one who sees nothing gets in the QA columns, and who gets no more."""
    levels = {name: guess_by_kind(name) for name in ANSWERED}
    said = " and ".join(f"{100 * level:.1f} % in {name}" for name, level in levels.items())
    no_more = [
        f"{model} in {name}" for model, x in models.items() for name in ANSWERED if x[name]["ci"][0] <= levels[name]
    ]
    return (
        "Who does not look, but tells from the question if a place, a count, a colour, a size, a motion or a thing is "
        f"asked for, and guesses among those, gets {said}; no better than that: {', '.join(no_more) or 'none'}."
    )


def guess_by_kind(task: str) -> float:
    """Chance of the right answer among a query's candidates of the right kind, mean over the test split."""
    data = load_preset("tiny").data
    quadruple = build(task, "test", data.test_rows, data.test_seed)
    kinds = [kind_of_answer(answer["text"]) for answer in quadruple.corpus]
    alike = [[kinds[d] for d in x.candidates].count(kinds[x.positives[0]]) for x in quadruple.relevance]
    return float(np.mean(1 / np.array(alike)))


def kind_of_answer(text: str) -> str:
    closed = {"place": words.PLACES, "count": words.NUMBERS, "colour": COLOURS, "size": words.SIZES}
    closed["motion"] = ["it " + said[0] for said in words.MOTION_WORDS.values()]
    return next((kind for kind, answers in closed.items() if text in answers), "thing")


def no_better_than_chance(models: dict) -> str:
    """The columns of each model whose interval reaches down to chance, or "nothing"."""
    found = {
        model: [name for name, x in columns.items() if "ci" in x and x["ci"][0] <= x["chance"]]
        for model, columns in models.items()
    }
    return "; ".join(f"{model} in {', '.join(names)}" for model, names in found.items() if names) or "nothing"


def write(check: bool = False) -> bool:
    """Rewrite README.md from the results, or with `check` only compare; whether it was up to date."""
    results = json.loads((ROOT / "results" / "tiny.json").read_text())
    cards = {stage: json.loads((ROOT / CARDS.format(stage)).read_text(encoding="utf-8")) for stage in SHIPPED}
    return rewrite(PAGE, fill(PAGE.read_text(encoding="utf-8"), {"stage-table": section(results, cards)}), check)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    raise SystemExit(not write(args.check) and args.check)


if __name__ == "__main__":
    main()
