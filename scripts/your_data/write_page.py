"""Write what results/your_data/*.json say into docs/your-data.md, between its markers.

    python scripts/your_data/write_page.py
"""

import json
from pathlib import Path

from q3vl_mini.report import fill, rewrite

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "docs" / "your-data.md", ROOT / "results" / "your_data"
TITLES = {"icons": "line icons", "icons_negatives": "icons with negatives", "translations": "glossary"}
TITLES |= {"pages": "manual pages", "pages_larger": "manual pages, larger"}
SETS = {name: title for name, title in TITLES.items() if (RESULTS / f"{name}.json").is_file()}


def results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def percent(score: float, ci: tuple[float, float]) -> str:
    return f"{100 * score:.1f} [{100 * ci[0]:.1f}, {100 * ci[1]:.1f}]"


def points(d: dict) -> str:
    return f"**{d['word']}** {100 * d['difference']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"


def verdicts() -> str:
    """Scores of every model and baseline on each set, the verdicts, what was forgotten, and how it was run."""
    lines = ["| held-out queries | " + " | ".join(SETS.values()) + " |", "|---|" + "---|" * len(SETS)]
    found = {name: results(name) for name in SETS}
    tests = {name: found[name]["survey"]["splits"]["test"] for name in SETS}
    rows = {"queries, documents": [f"{t['queries']}, {t['documents']}" for t in tests.values()]}
    visual = [f["survey"]["visuals"]["document"].get("tokens", {}).get("median") for f in found.values()]
    rows["visual tokens a document, half have at most"] = ["none" if n is None else str(n) for n in visual]
    asked = [next(c for c in f["own"]["models"]["base"].values() if "ci" in c) for f in found.values()]
    rows["metric, chance"] = [f"{c['metric']}, {100 * c['chance']:.1f}" for c in asked]
    for model in ("base", "merged", "fine-tuned"):
        columns = [c for f in found.values() for c in f["own"]["models"][model].values() if "ci" in c]
        rows[model] = [percent(c["score"], c["ci"]) for c in columns]
    best = [max(f["baselines"].items(), key=lambda item: item[1]["score"]) for f in found.values()]
    rows["the best without a model"] = [f"{name}: {percent(b['score'], b['ci'])}" for name, b in best]
    for model in ("merged", "fine-tuned"):
        rows[f"{model} against base"] = [points(f["own"]["differences"][model]) for f in found.values()]
        lost = [f["general"]["forgotten"][model]["relative_loss"] for f in found.values()]
        rows[f"{model}: MMEB-mini's mean, relative"] = [f"{-100 * x:+.1f} %" for x in lost]
    rows["reranker: trained, its base, the embedder alone"] = [_reranked(f) for f in found.values()]
    rows["trained reranker against the embedder alone"] = [
        points(f["reranker"]["differences"]["the embedder alone"]) if "reranker" in f else "" for f in found.values()
    ]
    rows["lambda"] = [f"{f['lambda']:.2f}" for f in found.values()]
    rows["recommended"] = [f["ship"] for f in found.values()]
    chosen = [f["settings"] for f in found.values()]
    rows["rate, batch size, negatives"] = [f"{c['lr']:g}, {c['batch_size']}, {c['n_negatives']}" for c in chosen]
    rows["steps"] = [str(f["training"]["plan"]["steps"]) for f in found.values()]
    rows["minutes in all"] = [f"{f['seconds'] / 60:.0f}" for f in found.values()]
    rows["threads"] = [str(f["machine"]["threads"]) for f in found.values()]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    machine = results("icons")["machine"]
    cores = f"{machine['cores']} cores {'with' if machine['bfloat16'] else 'without'} fast bfloat16"
    commands = [found[name]["command"] for name in SETS]
    said = f"On {cores}; where there is one thread, other work was on the other core:"
    return "\n".join([*lines, "", said, "", "```", *commands, "```"]) + "\n"


def _reranked(found: dict) -> str:
    scores = found.get("reranker", {}).get("scores", {})
    return ", ".join(f"{100 * scores[name]:.1f}" for name in ("trained", "base", "the embedder alone") if scores)


def sweep() -> str:
    """The gain on the validation split of every setting, one changed at a time."""
    runs = results("sweep")["runs"]
    usual, names = runs[0]["setting"], list(dict.fromkeys(run["data"] for run in runs))
    lines = ["| setting | value | " + " | ".join(map(TITLES.get, names)) + " |", "|---|---|" + "---|" * len(names)]

    def gain(name: str, setting: dict) -> str:
        found = [run for run in runs if run["data"] == name and run["setting"] == setting]
        return f"{100 * (found[0]['after'] - found[0]['before']):+.1f}" if found else "not run"

    lines.append("| all as usual | | " + " | ".join(gain(name, usual) for name in names) + " |")
    for factor in usual:
        values = sorted({run["setting"][factor] for run in runs} - {usual[factor]})
        for value in values:
            gains = " | ".join(gain(name, usual | {factor: value}) for name in names)
            lines.append(f"| {factor}, not {usual[factor]:g} | {value:g} | {gains} |")
    about = results("sweep")["about"]
    queries = f"{about['rows']} training and {about['validation_rows']} validation queries"
    return "\n".join([*lines, "", f"Gain in MRR@10, in points; {queries}."]) + "\n"


def pitfalls() -> str:
    """What was measured of the ways in which it goes wrong."""
    found, lines = results("pitfalls"), []
    for name, one in found.items():
        lines.append(f"On the {SETS[name]}, the merged model:")
        told = [f"with {d['queries']}, {points(d)}" for d in one["fewer queries"]]
        lines.append(f"- Fewer test queries, against base: {'; '.join(told)}.")
        told = [f"{said}: {100 * score:.1f}" for said, score in one["instruction"].items()]
        lines.append(f"- Instruction at search time: {'; '.join(told)}.")
        told = [f"{said}: {100 * score:.1f}" for said, score in one["smaller vectors"].items()]
        lines.append(f"- Prefixes and codes (without `qat`): {'; '.join(told)}.")
        told = [f"split {said}: {100 * share:.0f} %" for said, share in one["leaked"].items()]
        lines += [f"- Test queries whose document, or one nearly like it, is in training: {'; '.join(told)}.", ""]
    for name in SETS:
        one = results(name)
        faults = ", ".join(f"{n} x {kind}" for kind, n in one["survey"]["faults_by_kind"].items()) or "nothing"
        lines.append(f"- The survey of the {SETS[name]} found {faults}; mining dropped {one['dropped']} queries.")
    return "\n".join(lines) + "\n"


def plan() -> str:
    """What fine-tuning a 2B model needs on a GPU of 16 GB."""
    lines = ["| set | way | tokens a step | GB | fits | tokens at once, at most | hours |", "|" + "---|" * 7]
    for file in sorted(RESULTS.glob("plan_*.json")):
        name = file.stem.removeprefix("plan_")
        for way in results(file.stem):
            gb = sum(way["memory_gb"].values())
            cells = [TITLES[name], way["stage"], f"{way['tokens']['step']:,.0f}", f"{gb:.1f}"]
            cells += ["yes" if way["fits"] else "no", f"{way['at_once']:,}", f"{way['hours']:.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def filled(page: str) -> str:
    """The page with its marked parts made anew."""
    return fill(page, {part.__name__: part() for part in (verdicts, sweep, pitfalls, plan)})


def main() -> None:
    rewrite(PAGE, filled(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
