"""F2: the reranker over the best of each embedder (report, table 5), by task, and what it costs.

    python benchmarks/findings/reranker.py runs/seed-0 runs/seed-1 runs/seed-2

The retrieval tasks that the reranker was trained on. A pair that several embedders propose is scored once; margins are
kept in the run's folder. Writes results/findings/F2.json.
"""

import json
import time
from collections.abc import Mapping, Sequence

import numpy as np
from seeds import arguments, claim, opened, write

from q3vl_mini.emoji_world.tasks import TASKS
from q3vl_mini.evaluate import by_column, ranked_rows, rerank_quadruple, score_quadruple
from q3vl_mini.records import Quadruple
from q3vl_mini.report import write_json
from q3vl_mini.reranker import Reranker
from q3vl_mini.stages import Run

EMBEDDERS = ("s0", "s1", "s3")
# table 5, 2B models: embedding, reranker over its top 100
REPORT = {"all": [73.4, 75.1], "image": [74.8, 73.8], "video": [53.6, 52.1], "visual documents": [79.2, 83.4]}


class KeptMargins:
    """The margins of one quadruple's pairs, each computed once: what `rerank_quadruple` takes for a reranker.

    A file keeps them, with the seconds that they took.
    """

    def __init__(self, reranker: Reranker, quadruple: Quadruple, file, batch_size: int):
        self.reranker, self.file, self.batch_size = reranker, file, batch_size
        self.place = {id(x): i for rows in (quadruple.queries, quadruple.corpus) for i, x in enumerate(rows)}
        kept = json.loads(file.read_text()) if file.is_file() else {"margins": {}, "seconds": 0.0}
        self.known: dict[str, float] = kept["margins"]
        self.seconds: float = kept["seconds"]

    def logits(self, pairs: Sequence[tuple], instruction: str | None = None) -> np.ndarray:
        keys = [f"{self.place[id(q)]}-{self.place[id(d)]}" for q, d in pairs]
        new = [i for i, key in enumerate(keys) if key not in self.known]
        began = time.monotonic()
        margins = self.reranker.logits([pairs[i] for i in new], instruction, self.batch_size)
        if new:
            self.seconds += time.monotonic() - began
            self.known |= dict(zip([keys[i] for i in new], margins.tolist(), strict=True))
            write_json(self.file, {"margins": self.known, "seconds": self.seconds})
        return np.array([self.known[key] for key in keys])


def top_is_right(quadruple: Quadruple, queries: np.ndarray, corpus: np.ndarray, k: int) -> float:
    """Share of queries with a relevant document among the embedding's best k: more no reranker can reach."""
    hits = [
        relevant[np.argsort(-scores, kind="stable")[:k]].any()
        for _, _, scores, relevant in ranked_rows(quadruple, queries, corpus)
    ]
    return float(np.mean(hits))


def main() -> None:
    def more(parser):
        parser.add_argument("--rows", type=int, default=100, help="of each task's test queries")
        parser.add_argument("--top-k", type=int, default=100)

    options = arguments(__doc__, more)
    runs = opened(options.runs)
    before: dict[str, list[Mapping]] = {name: [] for name in EMBEDDERS}
    after: dict[str, list[Mapping]] = {name: [] for name in EMBEDDERS}
    reach, cost = {name: {} for name in EMBEDDERS}, []
    for run in runs:
        retrieval = {TASKS[name].column for name in run.preset.stages["reranker"].tasks}
        whole = run.quadruples()
        reranker = Run(run.preset, run.folder, progress=False, tracker="none").model("reranker", Reranker)
        rows: dict[str, list] = {name: [] for name in EMBEDDERS}
        kept: dict[str, KeptMargins] = {}
        for name in EMBEDDERS:
            embedded = []
            for x, queries, corpus in run.vectors(name, whole):
                if x.task not in retrieval:
                    continue
                x, queries = x.select(range(min(options.rows, len(x)))), queries[: options.rows]
                file = run.folder / "findings" / "margins" / f"{x.name}.json"
                if x.name not in kept:
                    kept[x.name] = KeptMargins(reranker, x, file, run.preset.data.batch_size)
                embedded.append(score_quadruple(queries, corpus, x))
                reach[name].setdefault(x.name, []).append(top_is_right(x, queries, corpus, options.top_k))
                rows[name].append(rerank_quadruple(kept[x.name], x, queries, corpus, top_k=options.top_k))
            before[name].append(by_column(embedded))
            after[name].append(by_column(rows[name]))
        pairs, seconds = sum(len(m.known) for m in kept.values()), sum(m.seconds for m in kept.values())
        cost.append({"pairs": pairs, "seconds": round(seconds, 1)})
    claims = [
        claim(f"the reranker is above {name} in {c}", [s[c] for s in after[name]], [s[c] for s in before[name]])
        for name in EMBEDDERS
        for c in before[name][0]
    ]
    table = {
        name: {
            d.name: {
                "embedding": [next(x for x in s[c].datasets if x.name == d.name).score for s in before[name]],
                "reranked": [next(x for x in s[c].datasets if x.name == d.name).score for s in after[name]],
                "reach": reach[name][d.name],
            }
            for c, column in before[name][0].items()
            for d in column.datasets
        }
        for name in EMBEDDERS
    }
    for entry in claims:
        print(f"{entry['claim']}: {100 * entry['difference']:+.1f} points, {entry['verdict']}")
    command = f"python benchmarks/findings/reranker.py --rows {options.rows} --top-k {options.top_k} RUN ..."
    content = {
        "rows": options.rows,
        "top_k": options.top_k,
        "cost": cost,
        "table": table,
        "report": REPORT,
        "claims": claims,
    }
    write("F2", runs, command, content)


if __name__ == "__main__":
    main()
