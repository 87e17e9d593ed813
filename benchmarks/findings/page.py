"""Write docs/findings.md and its figures from results/findings/*.json.

    python benchmarks/findings/page.py            # rewrite page and figures
    python benchmarks/findings/page.py --check    # exit 1 if the page is not what the results say

A finding without a file has not been measured, and the page says so.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from seeds import ENOUGH, RESULTS

from q3vl_mini.config import load_preset

PAGE = RESULTS.parents[1] / "docs" / "findings.md"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v", "P")
Found = Mapping[str, Any]

HEAD = f"""# The findings, measured

Which of the findings of the report (arXiv [2601.04720](https://arxiv.org/abs/2601.04720)) appear on Emoji World, with
a model of ten million parameters. Each difference is paired: the same seeds and the same test queries on both sides. A
seed draws the training data anew, their order and the adapter's start; backbone and test queries are the same for all.

Intervals are of 95 %: a bootstrap over the queries, widened by Student's t for the seeds, which are few. A claim that
one side is above the other is **shown** by at least {ENOUGH} seeds that all agree and an interval wholly above 0,
**contradicted** by the same below 0; all else is **undecided**. Each interval is for its claim alone: of many claims
about nothing, about one in twenty would have an interval beside 0.

This page is written by `benchmarks/findings/page.py` from `results/findings/`; nothing on it is typed. The runs are
`q3vl-mini run --preset tiny --seed K --folder runs/seed-K`, and the scores those of the test split. Seeds 3 and 4 were
added when the first three had left much undecided; most of F6 has three. What was chosen by measurement before, and on
what, is in [method.md](method.md), section 4.
"""


def mean(scores: Sequence[float]) -> float:
    return float(np.mean(scores))


def percent(scores: Sequence[float]) -> str:
    return f"{100 * mean(scores):.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def claims(found: Sequence[Found]) -> list[str]:
    """A table of claims: points gained, the interval, each seed's own, the verdict."""
    rows = []
    for entry in found:
        points = [f"{100 * x:+.1f}" for x in entry["by_seed"]]
        row = [entry["claim"], f"{100 * entry['difference']:+.1f}"]
        row += [f"{100 * entry['low']:+.1f} to {100 * entry['high']:+.1f}", ", ".join(points)]
        rows.append([*row, f"**{entry['verdict']}**"])
    return table(["claim", "points", "95 %", "by seed", "verdict"], rows)


def head(title: str, found: Found) -> list[str]:
    seeds = found["seeds"]
    few = "" if len(seeds) >= ENOUGH else f" Fewer than {ENOUGH} seeds: no verdict yet."
    said = f"Seeds {', '.join(map(str, seeds))}; revision `{found['git'][:12]}`; `{found['command']}`.{few}"
    return [f"## {title}", "", said, ""]


FIGURES: dict[str, Callable[[], None]] = {}  # what draws each figure of the page


def figure(name: str, draw: Callable[[Figure], None], alt: str, size: tuple[float, float] = (9, 3.6)) -> list[str]:
    """The line that shows a figure, which lies beside the results; `draw` fills it when the page is written."""

    def save() -> None:
        made = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(made)
        draw(made)
        for axis in made.axes:
            axis.spines[["top", "right"]].set_visible(False)
        made.savefig(RESULTS / f"{name}.png", dpi=110, metadata={"Software": None})

    FIGURES[name] = save
    return [f"![{alt}](../results/findings/{name}.png)", ""]


def stages(found: Found) -> list[str]:
    ours, report = found["table"], found["report"]
    columns = list(ours["s0"])
    rows = [[f"{m}, here", *(percent(ours[m][c]) for c in columns)] for m in ours]
    rows += [[f"{m}, report", *(f"{report[m][c]:.1f}" if c in report[m] else "–" for c in columns)] for m in report]

    def draw(made: Figure) -> None:
        left, right = made.subplots(1, 2)
        groups = {
            "retrieval": ("image_ret", "video_ret", "video_mret", "visdoc"),
            "classification and QA": ("image_cls", "image_qa", "video_cls", "video_qa"),
            "all": ("mean",),
        }
        for axis, title, scores in (
            (left, "here, Q3VL-tiny on MMEB-mini", {m: {c: 100 * mean(s) for c, s in ours[m].items()} for m in report}),
            (right, "the report, 2B on MMEB-V2", report),
        ):
            for (group, names), colour, marker in zip(groups.items(), COLOURS, MARKERS, strict=False):
                axis.plot(list(scores), [mean([row[c] for c in names]) for row in scores.values()],
                          color=colour, marker=marker, label=group)  # fmt: skip
            axis.set(title=title, ylabel="score, %")
        made.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)

    alt = "Mean of the retrieval columns, of classification and QA, and of all, from s0 to s3: here and in the report"
    lines = head("F1: each stage does what it is for", found)
    lines += ["A stage goes on from an earlier one, so it has seen more: the table says what a stage adds, not what"]
    lines += ["as many more steps of the earlier one would have. `mean` is that of the columns here, and of 78 data"]
    lines += ["sets in the report.", ""]
    return lines + table(["model", *columns], rows) + figure("F1", draw, alt) + claims(found["claims"])


def reranker(found: Found) -> list[str]:
    lines = head("F2: the reranker over the best of an embedder", found)
    lines += [
        f"The first {found['rows']} test queries of each task, the {found['top_k']} best candidates of each model."
    ]
    lines += ["`reach` is the share of queries with a right document among them: no reranker gets further.", ""]
    rows = [
        [f"{name}, {task}", percent(r["embedding"]), percent(r["reranked"]), percent(r["reach"])]
        for name, by_task in found["table"].items()
        for task, r in by_task.items()
    ]
    lines += table(["embedder, task", "embedding", "reranked", "reach"], rows)
    report = ", ".join(f"{kind} {a} to {b}" for kind, (a, b) in found["report"].items())
    lines += [f"The report, 2B, top 100: {report}.", ""]
    pairs, seconds = (sum(c[part] for c in found["cost"]) for part in ("pairs", "seconds"))
    each = 1000 * seconds / pairs
    lines += [f"A pair took {each:.1f} ms on the machine that measured this ({pairs:,} pairs).", ""]
    worse = [e["claim"] for e in found["claims"] if e["high"] < 0]
    if worse:
        lines += [
            "Where it makes the order worse, compare `reranked` with `reach` divided by the number of candidates, what"
        ]
        lines += [
            "drawing one of them would score: the nearer, the less it tells apart what an embedder finds confusable,"
        ]
        lines += ["whatever it tells apart otherwise. Its training negatives decide (notebook 10).", ""]
    return lines + claims(found["claims"])


def teacher(found: Found) -> list[str]:
    columns = list(found["table"]["s1"])
    right = percent(found["reranker_right"])
    lines = head("Why s2 is as it is: the same stage with a teacher that is always right", found)
    lines += ["Among a query's right document and the hard negatives of stage 3, the reranker has the right one first"]
    lines += [f"for {right} % of the queries that it teaches. Here the labels teach instead: margins of"]
    lines += [f"{found['margin']:g} for right and as much below 0 for wrong, all else the same.", ""]
    rows = [[model, *(percent(scores[c]) for c in columns)] for model, scores in found["table"].items()]
    return lines + table(["model", *columns], rows) + claims(found["claims"])


def merging(found: Found) -> list[str]:
    columns = list(found["table"]["s1"])
    lines = head("How s1 and s2 are merged", found)
    lines += ["Self Positioning around the raw backbone is s3. Around s0, what s1 and s2 add to s0 is merged instead."]
    lines += [f"TIES keeps the largest {100 * found['density']:.0f} % of each task vector's numbers.", ""]
    rows = [[model, *(percent(scores[c]) for c in columns)] for model, scores in found["table"].items()]
    return lines + table(["model", *columns], rows) + claims(found["claims"])


def compression(found: Found) -> list[str]:
    rows = found["table"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    precisions = list(dict.fromkeys(row["precision"] for row in rows))

    def draw(made: Figure) -> None:
        for axis, task in zip(made.subplots(1, len(tasks)), tasks, strict=True):
            for precision, colour, marker in zip(precisions, COLOURS, MARKERS, strict=False):
                mine = sorted(
                    (r["dim"], mean(r["mrr@10"])) for r in rows if (r["task"], r["precision"]) == (task, precision)
                )
                axis.plot(*zip(*mine, strict=True), color=colour, marker=marker, label=precision)
            dims = sorted({r["dim"] for r in rows})
            axis.set(title=task, xlabel="dimensions", ylabel="MRR@10", xscale="log", ylim=(0, None))
            axis.set_xticks(dims, dims)
            axis.minorticks_off()
        axis.legend(frameon=False)

    lines = head("F3 and F4: fewer dimensions, fewer bits", found)
    cells = [[r["task"], str(r["dim"]), r["precision"], f"{r['bytes']:g}", f"{mean(r['mrr@10']):.3f}"] for r in rows]
    lines += figure("F3-F4", draw, "MRR@10 against dimensions in float32, int8 and binary, for text and text to image")
    lines += table(["task", "dimensions", "precision", "bytes a vector", "MRR@10"], cells)
    for task, known in found["report"].items():
        lines += [f"The report, {task}: " + ", ".join(f"{key} {value}" for key, value in known.items()) + ".", ""]
    lines += ["`points` are MRR@10 above the share that is claimed to be kept. Of documents with equal scores, which"]
    lines += ["few bits make many of, the right one counts as the last: an index that breaks ties by chance is better."]
    lines += [""]
    lines += index_costs()
    return lines + claims(found["claims"]) + compression_trials()


def index_costs(n: int = 100_000) -> list[str]:
    """What n vectors take in an index, and a search without rescoring."""
    rows = json.loads((RESULTS.parent / "index_sizes.json").read_text())["rows"]
    rows = [row for row in rows if row["vectors"] == n and not row["rescore"]]
    cost = {(row["dim"], row["precision"]): (row["scanned_bytes"] / 1e6, row["ms"]) for row in rows}
    precisions = list(dict.fromkeys(precision for _, precision in cost))
    lines = [f"What {n:,} vectors take in an index and an exact search among them, on one thread; the report has half"]
    lines += ["the storage and twice the speed for half the dimensions. More sizes, recall and rescoring:"]
    lines += ["[index.md](index.md#what-to-choose).", ""]
    header = ["dimensions", *(f"{p}, {unit}" for p in precisions for unit in ("MB", "ms a query"))]
    cells = [
        [str(dim), *(text for p in precisions for mb, ms in [cost[dim, p]] for text in (f"{mb:.1f}", f"{ms:.2f}"))]
        for dim in sorted({dim for dim, _ in cost}, reverse=True)
    ]
    return lines + table(header, cells)


def compression_trials() -> list[str]:
    """What other settings of MRL and QAT keep, on validation."""
    lines = ["Other settings, tried on validation (`benchmarks/findings/compression_trials.py`): MRR@10 of s0 with"]
    own = load_preset("tiny").stages["s0"].steps
    lines += ["whole vectors, with half their dimensions at int8, and with the signs of the whole. `all` steps are the"]
    lines += [f"run's own, {own}, chosen for its time. What half the dimensions keep grows with training: what raises"]
    lines += ["it by lowering the whole is no remedy, more steps are one.", ""]
    header = ["dim_weights, quantizers", "steps", "seeds"]
    header += [f"{task}, {what}" for task in ("text", "text to image") for what in ("whole", "half", "kept", "signs")]
    trials: dict[tuple[str, str], list[Found]] = {}
    for line in (RESULTS.parent / "compression_trials.jsonl").read_text().splitlines():
        trial = json.loads(line)
        if trial["stages"] == ["s0"]:
            setting = trial["set"] or "the preset's"
            trials.setdefault((setting, str(trial["steps"] or "all")), []).append(trial)
    rows = []
    for (setting, steps), same in trials.items():
        row = [setting, steps, ", ".join(sorted(str(trial["seed"]) for trial in same))]
        for task in ("keyword_search", "text_to_image"):
            full = mean([t[task]["full"] for t in same])
            half, signs = (mean([t[task]["full"] * t[task][x] for t in same]) for x in ("128 int8", "256 binary"))
            row += [f"{full:.3f}", f"{half:.3f}", f"{100 * half / full:.1f} %", f"{signs:.3f}"]
        rows.append(row)
    return lines + table(header, rows)


def granularity(found: Found) -> list[str]:
    curves = found["curves"]

    def draw(made: Figure) -> None:
        axes = made.subplots(1, len(curves))
        for axis, (name, points), colour, marker in zip(axes, curves.items(), COLOURS, MARKERS, strict=False):
            sizes, scores = [p["size"] for p in points], np.array([mean(p["score"]) for p in points])
            axis.plot(sizes, scores, color=colour, marker=marker)
            axis.fill_between(sizes, *np.array([p["ci"] for p in points]).T, color=colour, alpha=0.2)
            axis.axhline(points[0]["chance"], color="#999999", linestyle=":")
            axis.set(title=found["task"][name], xlabel=name, ylabel=points[0]["metric"], ylim=(0, None))

    alt = "Score against tokens a picture, tokens a page, frames a clip and tokens a clip, with chance dotted"
    lines = head("F5: visual tokens and frames", found)
    lines += ["The report, figure 7: more tokens and frames help, with diminishing returns; images regress slightly"]
    lines += ["above about 1000 tokens, visual documents peak near 2000, video near 4800; frames do not regress.", ""]
    lines += ["Training shows every task at one size. Another size is a change of what the model is used to as well as"]
    lines += ["of the tokens: a loss above that size need not come from the tokens.", ""]
    return lines + figure("F5", draw, alt, (12, 3.2)) + claims(found["claims"])


def choices(found: Found) -> list[str]:
    entries = list(found["choices"].values())

    def draw(made: Figure) -> None:
        axis = made.subplots()
        for y, entry in enumerate(entries[::-1]):
            points = 100 * entry["difference"]
            spread = [[points - 100 * entry["low"]], [100 * entry["high"] - points]]
            axis.errorbar([points], [y], xerr=spread, color=COLOURS[0], marker="o", capsize=3)
            axis.plot([100 * x for x in entry["by_seed"]], [y] * len(entry["by_seed"]), "|", color=COLOURS[1])
        axis.axvline(0, color="#999999", linestyle=":")
        axis.set_yticks(range(len(entries)), [e["claim"] for e in entries[::-1]])
        axis.set(xlabel="points of MMEB-mini's mean gained by it; ticks: single seeds")

    fewest, most = (which((e["seeds"] for e in entries), key=len) for which in (min, max))
    lines = head("F6, and other choices", found | {"seeds": fewest})
    if most != fewest:
        lines += [f"Choices that the report itself speaks of: seeds {', '.join(map(str, most))}.", ""]
    lines += ["The report, 5.1: dropping the q-q and d-d terms in stage 2 helps. It gives no figure.", ""]
    lines += ["Pairs of trainings, most of them short, that differ in one setting, with equal steps, queries and"]
    lines += ["documents a query; the claim is that the setting which is named, by default the preset's, scores"]
    lines += ["higher. (Stages that are compared with each other each have their own number of documents.) A run gives"]
    lines += ["each stage several times these steps, so what learns fast has an advantage here. A"]
    lines += ["reranker is scored by the order that it gives the best candidates of s1, in its retrieval tasks.", ""]
    lines += figure("F6", draw, "Points gained by each choice, with intervals", (9, 1.2 + 0.35 * len(entries)))
    lines += claims(entries)
    lines += ["Where a claim is decided, the three columns that differ most, in points:", ""]
    for e in [e for e in entries if e["verdict"] != "undecided"]:
        most = sorted(e["columns"].items(), key=lambda column: -abs(column[1]["difference"]))[:3]
        said = [f"{name} {100 * column['difference']:+.1f}" for name, column in most]
        lines += [f"- {e['claim']}: {', '.join(said)}"]
    lines += [""]
    rows = []
    for e in entries:
        ours, others = ([f"`{s}`" for s in side if s] for side in (e["ours"], (e["instead_of"], *e["instead"])))
        sides = [", ".join(ours), ", ".join(others)]
        rows.append([e["claim"], *sides, str(len(e["seeds"])), str(e["steps"]), str(e["rows"]), f"`{e['git'][:12]}`"])
    return lines + table(["claim", "this side", "the other side", "seeds", "steps", "queries a task", "revision"], rows)


def terms(found: Found) -> list[str]:
    lines = head("What stage 1's denominator is made of", found)
    lines += ["Shares of equation 1's Z in percent: the positive, documents (those of other queries and hard"]
    lines += ["negatives), q-q and d-d. The loss's gradient at a score is its term's share, over the temperature."]
    lines += ["`masked` is the percentage of q-q and of d-d terms that score above the positive by more than the"]
    lines += ["margin and so are left out. Once the positive has come that near, such a term enters Z at"]
    lines += ["e^(margin / temperature) times the positive's weight. raw is where stage 1 starts, s0 where it ends;"]
    lines += ["F6 has what the two terms do, together, one at a time, and with nothing masked.", ""]
    parts = {"positive": ("positive",), "documents": ("query_document", "hard_negative")}
    parts |= {"q-q": ("query_query",), "d-d": ("document_document",)}

    def of(measured: Found) -> list[float]:
        masked = [mean(measured[term]["masked"]) for term in ("query_query", "document_document")]
        return [sum(mean(measured[term]["of_z"]) for term in terms) for terms in parts.values()] + masked

    models = found["table"]
    by_task = {task: [x for model in models for x in of(models[model][task])] for task in models["s0"]}
    by_task["mean"] = np.mean(list(by_task.values()), axis=0)
    header = [f"{model}: {part}" for model in models for part in (*parts, "q-q masked", "d-d masked")]
    return lines + table(["task", *header], [[t, *(f"{100 * x:.0f}" for x in xs)] for t, xs in by_task.items()])


def instructions(found: Found) -> list[str]:
    lines = head("Does it do what the instruction says?", found)
    lines += ["One query, several instructions, one right answer for each; share of queries whose answer fits. A"]
    lines += ["model that reads no instruction is right by chance: it may answer by kind, and be above or below it for"]
    lines += ["each. In all tasks but `instructed` the documents of one task are of one kind, so that no loss asks a"]
    lines += [
        "model to read the instruction. Nor does InfoNCE in `instructed`: its mask leaves out what scores 0.1 above"
    ]
    lines += [
        "the right answer, often the name where a category is asked for. So s1 has it with the classification loss."
    ]
    lines += [""]
    probes = list(next(iter(found["table"].values())))
    rows = [[model, *(percent(scores[p]) for p in probes)] for model, scores in found["table"].items()]
    rows.append(
        ["chance", *(f"{100 * next(c for n, c in found['chance'].items() if p.startswith(n)):.1f}" for p in probes)]
    )
    return lines + table(["model", *probes], rows) + claims(found["claims"])


def languages(found: Found) -> list[str]:
    scripts = sorted(next(iter(found["table"].values()))["scripts"])
    unseen = {found["script"][code] for code in found["unseen"]}

    def draw(made: Figure) -> None:
        axis = made.subplots()
        for (model, row), colour, marker in zip(found["table"].items(), COLOURS, MARKERS, strict=False):
            axis.plot(range(len(scripts)), [100 * mean(row["scripts"][s]) for s in scripts], marker,
                      color=colour, label=model)  # fmt: skip
        axis.set_xticks(range(len(scripts)), [s.title() for s in scripts], rotation=60, ha="right")
        axis.set(ylabel="Hit@1, %")
        axis.legend(frameon=False)

    lines = head("Languages", found)
    lines += [f"A name in one of {len(found['script'])} languages, spelled otherwise than in English, finds the"]
    lines += [f"English one among {found['candidates']}"]
    lines += [f"(chance {100 * found['chance']:.2f} %). Unseen in all training: {', '.join(found['unseen'])}"]
    lines += [f"(scripts {', '.join(s.title() for s in sorted(unseen))}).", ""]
    lines += figure("languages", draw, "Hit@1 by script, for each model")
    rows = [[model, percent(row["seen"]), percent(row["unseen"])] for model, row in found["table"].items()]
    lines += table(["model", "languages of training", "unseen languages"], rows) + claims(found["claims"])
    model, row = list(found["table"].items())[-1]
    lines += [f"Each language of {model}, the best first, unseen ones in italics:", ""]
    best = sorted(row["languages"], key=lambda code: -mean(row["languages"][code]))
    named = {code: f"*{code}*" if code in found["unseen"] else code for code in best}
    by_script = {script: [code for code in best if found["script"][code] == script] for script in scripts}
    cells = [
        [s.title(), ", ".join(f"{named[c]} {percent(row['languages'][c])}" for c in by_script[s])] for s in scripts
    ]
    return lines + table(["script", "languages, Hit@1 in %"], cells)


SECTIONS: dict[str, Callable[[Found], list[str]]] = {
    "F1": stages,
    "F2": reranker,
    "teacher": teacher,
    "merging": merging,
    "F3-F4": compression,
    "F5": granularity,
    "F6": choices,
    "terms": terms,
    "instructions": instructions,
    "languages": languages,
}


def at_a_glance(found: Mapping[str, Found]) -> list[str]:
    """How many claims of each finding have which verdict, and the names of those that are contradicted."""
    rows, against = [], []
    for name, finding in found.items():
        entries = finding.get("claims") or list(finding.get("choices", {}).values())
        if not entries:
            continue  # it describes, and claims nothing
        verdicts = [entry["verdict"] for entry in entries]
        rows.append([name, *(str(verdicts.count(v)) for v in ("shown", "undecided", "contradicted"))])
        against += [f"- {name}: {entry['claim']}" for entry in entries if entry["verdict"] == "contradicted"]
    lines = ["## At a glance", "", *table(["finding", "shown", "undecided", "contradicted"], rows)]
    return lines + (["Contradicted:", "", *against, ""] if against else [])


def page() -> str:
    """The page as the results say it."""
    files = {name: RESULTS / f"{name}.json" for name in SECTIONS}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    missing = [name for name in SECTIONS if name not in found]
    lines = [HEAD, *at_a_glance(found)]
    for name, finding in found.items():
        lines += SECTIONS[name](finding)
    if missing:
        lines += ["## Not measured yet", "", ", ".join(missing) + ".", ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    text, current = page(), PAGE.read_text() if PAGE.is_file() else ""
    if not parser.parse_args().check:
        PAGE.write_text(text)
        for save in FIGURES.values():
            save()
    elif text != current:
        raise SystemExit("docs/findings.md is not what results/findings say; run python benchmarks/findings/page.py")


if __name__ == "__main__":
    main()
