"""Write the tables of results/performance/*.json, and the times of the run of results/tiny.json, into their pages.

    python scripts/update_performance.py          # rewrite docs/performance.md and docs/reliability.md
    python scripts/update_performance.py --check  # exit 1 if a page is not what the results say
"""

import argparse
import json
from pathlib import Path

from q3vl_mini.report import fill, rewrite

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs" / name for name in ("performance.md", "reliability.md")]
RESULTS = ROOT / "results" / "performance"
RUN_MINUTES = 20
SIGNS = {"at least": "≥ {}", "at most": "≤ {}", "within": "{} to {}"}


def section(results: dict) -> str:
    """What was measured, a line a comparison, and what else the results hold."""
    lines = [
        f"{results['setting']}. Threads: {results['threads']}.",
        "",
        "| compared | measured | lowest to highest round | bar | reached |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        spread = " to ".join(f"{x:.2f}" for x in row["range"]) if "range" in row else ""
        bar = SIGNS[row["sense"]].format(*row["bar"]) if "sense" in row else ""
        reached = {True: "yes", False: "no", None: ""}[row.get("met")]
        lines.append(f"| {row['compared']} | {row['value']:.3g} | {spread} | {bar} | {reached} |")
    for name, value in results.items():
        if name not in ("setting", "threads", "rows"):
            lines += ["", f"{name.replace('_', ' ').capitalize()}: {_words(value)}."]
    return "\n".join(lines) + "\n"


def _words(value) -> str:
    if isinstance(value, dict):
        nested = any(isinstance(x, dict) for x in value.values())
        return ("; " if nested else ", ").join(f"{name} {_words(x)}" for name, x in value.items())
    if isinstance(value, list):
        return " and ".join(map(_words, value))
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def run(meta: dict) -> dict:
    """The stages of a run, from the `meta` of its results, in the form of a benchmark's results."""
    minutes = {"all stages and their evaluation": meta["wall_s"]} | meta["stage_wall_s"]
    rows = [{"compared": f"minutes, {name}", "value": seconds / 60} for name, seconds in minutes.items()]
    rows[0] |= {"sense": "at most", "bar": [RUN_MINUTES], "met": rows[0]["value"] <= RUN_MINUTES}
    setting = f"`q3vl-mini run --preset {meta['preset']}`, revision `{meta['git'][:12]}`"
    return {"setting": setting, "threads": meta["cores"], "rows": rows, "computed_in": meta["computed_in"]}


def page(text: str, results: dict[str, dict]) -> str:
    """The page with its tables from `results`, by name."""
    return fill(text, {f"performance:{name}": section(result) for name, result in results.items()})


def write(check: bool = False) -> bool:
    """Rewrite the pages, or with `check` only compare; whether they were up to date."""
    results = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in RESULTS.glob("*.json")}
    results["run"] = run(json.loads((RESULTS.parent / "tiny.json").read_text(encoding="utf-8"))["meta"])
    return all([rewrite(file, page(file.read_text(encoding="utf-8"), results), check) for file in PAGES])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    raise SystemExit(not write(args.check) and args.check)


if __name__ == "__main__":
    main()
