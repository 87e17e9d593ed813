"""Is the fine-tuned model better than its base? Said in words, with intervals, and with what to ship.

Two things are asked of every candidate: is it better on the person's held-out queries, and what did it forget of what
the base could do in general (MMEB-mini).
"""

import math
from collections.abc import Iterator, Mapping
from statistics import NormalDist
from typing import Any

import numpy as np

from .evaluate import ColumnResult, DatasetResult, compare
from .metrics import PairedDifference
from .report import result_records, stage_table

BASE, ALONE = "base", "the embedder alone"
FORGET = 0.05  # of the base's mean on MMEB-mini, relative: what a model that is shipped may lose
CONFIDENCE, POWER = 0.95, 0.8
Columns = Mapping[str, ColumnResult]


def word(difference: PairedDifference) -> str:
    """ "better", "worse" or "undecided": whether the whole interval of the difference is above or below 0."""
    if not difference.significant:
        return "undecided"
    return "better" if difference.low > 0 else "worse"


def more_queries(a: DatasetResult, b: DatasetResult, difference: PairedDifference) -> int | None:
    """How many test queries more would decide between two models, were their difference what it now seems to be.

    So many that a test at CONFIDENCE finds it with probability POWER: n = ((z_c + z_p) s / d)^2, with d the mean and s
    the standard deviation of the paired differences. For Spearman, which has none a query, s is taken from the width of
    the bootstrap interval. None if the two do not differ at all; 0 if the queries at hand are that many already.
    """
    if difference.difference == 0:
        return None
    normal = NormalDist()
    z_confidence, z_power = normal.inv_cdf((1 + CONFIDENCE) / 2), normal.inv_cdf(POWER)
    if a.values.ndim == 1:
        spread = float(np.std(a.values - b.values, ddof=1))
    else:
        spread = (difference.high - difference.low) / (2 * z_confidence) * math.sqrt(len(a.values))
    needed = ((z_confidence + z_power) * spread / difference.difference) ** 2
    return max(0, math.ceil(needed) - len(a.values))


def judge(own: Mapping[str, Columns], general: Mapping[str, Columns], forget: float = FORGET) -> dict[str, Any]:
    """The verdict as JSON. `own` and `general`: {"base": ..., candidate: ...}, each evaluate_embedder's result.

    `own` has one column with one data set, the held-out queries. Candidates come in the order in which they are
    preferred. One may be shipped if it is better than the base on the held-out queries and its mean on MMEB-mini is at
    most `forget` below the base's, relative. The first that may is recommended, unless a later one that may is better
    than it on the held-out queries; if none may, the base is.

    Raises:
        ValueError: there is no base, or the models were measured on different queries.
    """
    if BASE not in own or own.keys() != general.keys():
        raise ValueError(f"own has {list(own)}, general {list(general)}; give both a {BASE!r} and the same candidates")
    candidates = [name for name in own if name != BASE]
    [column] = own[BASE]
    base_mean = result_records(general)[BASE]["mean"]["score"]
    differences, forgotten, may_ship = {}, {}, []
    for name in candidates:
        found = compare(own[name], own[BASE], confidence=CONFIDENCE)[column]
        entry = {**found._asdict(), "word": word(found)}
        if entry["word"] == "undecided":
            entry["more_queries"] = more_queries(_only(own[name]), _only(own[BASE]), found)
        differences[name] = entry
        lost = compare(general[name], general[BASE], confidence=CONFIDENCE)
        mean = result_records({BASE: general[BASE], name: general[name]})[name]["mean"]["score"]
        relative = (base_mean - mean) / base_mean if base_mean else 0.0
        columns = {c: {**d._asdict(), "word": word(d)} for c, d in lost.items()}
        forgotten[name] = {"relative_loss": relative, "within_limit": relative <= forget, "columns": columns}
        if entry["word"] == "better" and relative <= forget:
            may_ship.append(name)
    ship = may_ship[0] if may_ship else BASE
    for name in may_ship[1:]:
        if word(compare(own[name], own[ship], confidence=CONFIDENCE)[column]) == "better":
            ship = name
    return {
        "ship": ship,
        "why": _why(ship, candidates, differences, forgotten, forget),
        "own": {"models": result_records(own), "differences": differences},
        "general": {"models": result_records(general), "forgotten": forgotten, "limit": forget},
    }


def _only(columns: Columns) -> DatasetResult:
    [column] = columns.values()
    [dataset] = column.datasets
    return dataset


def _why(ship: str, candidates: list[str], differences: Mapping, forgotten: Mapping, forget: float) -> str:
    if ship != BASE:
        return (
            f"The {ship} model is better than the base on the held-out queries, and its mean on MMEB-mini is within "
            f"{forget:.0%} of the base's."
        )
    reasons = []
    for name in candidates:
        kind = differences[name]["word"]
        if kind == "better":
            lost = forgotten[name]["relative_loss"]
            reasons.append(f"the {name} model is better on the held-out queries, but lost {lost:.1%} on MMEB-mini")
        elif kind == "worse":
            reasons.append(f"the {name} model is worse on the held-out queries")
        else:
            reasons.append(f"whether the {name} model is better on the held-out queries is undecided")
    return "Keep the base: " + "; ".join(reasons) + "."


def verdict_page(verdict: Mapping[str, Any]) -> str:
    """The verdict as a Markdown page."""
    own, general = verdict["own"], verdict["general"]
    lines = ["# Verdict", "", f"**Ship: {verdict['ship']}.** {verdict['why']}", "", "## Your held-out queries", ""]
    lines += [stage_table(own["models"], intervals=True), ""]
    for name, d in own["differences"].items():
        said = f"- {name} against base: **{d['word']}**, {_points(d)}."
        if d["word"] == "undecided":
            said += _how_many(d["more_queries"])
        lines.append(said)
    lines += ["", "## What was forgotten: MMEB-mini", "", stage_table(general["models"]), ""]
    for name, lost in general["forgotten"].items():
        within = "within" if lost["within_limit"] else "beyond"
        mean = lost["columns"]["mean"]
        lines.append(
            f"- {name} against base: mean {_points(mean)}, a relative change of {-lost['relative_loss']:+.1%}, "
            f"{within} the limit of {-general['limit']:.0%}."
        )
        worse = [c for c, d in lost["columns"].items() if d["word"] == "worse" and c != "mean"]
        if worse:
            lines.append(f"  Worse in {', '.join(worse)}.")
    if "reranker" in verdict:
        lines += ["", "## The reranker", "", *_of_reranker(verdict["reranker"])]
    lines += [
        "",
        "Scores are in percent. In brackets are 95 % intervals: of scores by the bootstrap over queries, of "
        "differences by the paired bootstrap. They say what other queries of the same kind would give, not what other "
        "training runs would.",
    ]
    return "\n".join(lines) + "\n"


def _of_reranker(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"It reads the first {found['top_k']} candidates of the recommended model again."
    yield ""
    for name, d in found["differences"].items():
        scores = f"{100 * found['scores']['trained']:.1f} and {100 * found['scores'][name]:.1f}"
        yield f"- trained against {name}: **{d['word']}**, {scores}, {_points(d)}."
    yield ""
    yield f"Use {found['ship']}." if found["ship"] else "Rank by the embedder alone."


def _points(d: Mapping[str, float]) -> str:
    return f"{100 * d['difference']:+.1f} points [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"


def _how_many(more: int | None) -> str:
    if more is None:
        return " The two give the same score; more queries of this kind would not tell them apart."
    if more == 0:
        return " It is close to decided; another sample of as many queries might."
    return f" About {more} more test queries would decide it, if the difference is what it seems."
