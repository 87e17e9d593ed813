"""Write the stage table of results/tiny.json into README.md, between its two markers.

    python scripts/update_readme.py          # rewrite README.md
    python scripts/update_readme.py --check  # exit 1 if README.md is not what the results say
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from q3vl_mini.report import fill, rewrite, stage_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "README.md"
CARDS = "data_samples/adapters/{}/q3vl_mini.json"
SHIPPED = ("s0", "s1", "s2", "s3", "reranker")


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
        "",
        f"Single objects in the two unseen styles, text to image, {next(iter(unseen.values()))['n']} queries:",
        "",
        "| model | Hit@1 | Hit@10 |",
        "|---|---|---|",
        *(f"| {name} | {row['hit@1']:.3f} | {row['hit@10']:.3f} |" for name, row in unseen.items()),
    ]
    return "\n".join(lines) + "\n"


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
