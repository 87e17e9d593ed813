"""F3 and F4: fewer dimensions, fewer bits (report, figure 6). MRR@10 of text and of text-to-image retrieval.

    python benchmarks/findings/compression.py runs/seed-0 runs/seed-1 runs/seed-2

Queries and documents have the same precision, as in an index without rescoring; int8 uses the step that training
learned. Of documents with equal scores, which few bits make many of, the right one counts as the last. What a vector
costs in a real index, in storage and search time, is in results/index_sizes.json. Writes results/findings/F3-F4.json.
"""

import numpy as np
from seeds import Share, arguments, claim, opened, write

from q3vl_mini import evaluate
from q3vl_mini.choices import PRECISIONS
from q3vl_mini.compression import Quantizers, hamming_scores, int8_scores
from q3vl_mini.emoji_world.tasks import build
from q3vl_mini.records import Quadruple
from q3vl_mini.stages import Run

TASKS = {"keyword_search": "text retrieval", "text_to_image": "text to image"}
BYTES = {"float32": 4.0, "int8": 1.0, "binary": 1 / 8}  # a dimension
# the report's 2B model at 1024 dimensions, read off its figure 6
REPORT = {
    "text retrieval": {"1024 float32": 0.360, "1024 int8": 0.360, "1024 binary": 0.348, "128 binary": 0.188},
    "text to image": {
        "1024 float32": 0.497,
        "512 float32": 0.438,
        "1024 int8": 0.487,
        "1024 binary": 0.487,
        "128 binary": 0.138,
    },
}


def compressed(
    quantizers: Quantizers, queries: np.ndarray, corpus: np.ndarray, quadruple: Quadruple, dim: int, precision: str
) -> evaluate.DatasetResult:
    """MRR@10 of the first `dim` entries of the vectors (N, D) in a precision."""
    q, c = (quantizers.codes(np.asarray(vectors), dim, precision) for vectors in (queries, corpus))
    scores = hamming_scores(q, c) if precision == "binary" else int8_scores(q, c)
    return evaluate.score_rows(quadruple, np.round(scores, evaluate.COSINE_DECIMALS), metric="mrr@10")


def main() -> None:
    def more(parser):
        parser.add_argument("--rows", type=int, default=1000, help="test queries a task")
        parser.add_argument("--model", default="s3")

    options = arguments(__doc__, more)
    runs = opened(options.runs)
    quadruples = [build(name, "test", options.rows, runs[0].preset.data.test_seed + 1) for name in TASKS]
    found: dict[tuple[str, int, str], list[evaluate.DatasetResult]] = {}
    for run in runs:
        model = Run(run.preset, run.folder, progress=False, tracker="none").model(options.model)
        kept = run.folder / "findings" / f"{options.model}-{options.rows}"
        for x, queries, corpus in evaluate.encoded(
            model, quadruples, batch_size=run.preset.data.batch_size, folder=kept
        ):
            for dim in [d or model.dim for d in run.preset.dims]:
                for precision in PRECISIONS:
                    result = compressed(model.quantizers, queries, corpus, x, dim, precision)
                    found.setdefault((x.name, dim, precision), []).append(result)
    full = max(dim for _, dim, _ in found)
    table = [
        {
            "task": TASKS[task],
            "dim": dim,
            "precision": precision,
            "bytes": dim * BYTES[precision],
            "mrr@10": [x.score for x in seeds],
            "queries": seeds[0].n_queries,
            "candidates": seeds[0].n_candidates,
        }
        for (task, dim, precision), seeds in found.items()
    ]

    def keeps(task: str, dim: int, precision: str, share: float) -> dict:
        """The claim that a setting scores above a share of what full vectors score."""
        bar = [Share(x, share) for x in found[task, full, "float32"]]
        text = f"{TASKS[task]}: {dim} dimensions in {precision} keep {share:.1%} of {full} in float32"
        return claim(text, found[task, dim, precision], bar)

    claims = [keeps(task, full, "int8", 0.99) for task in TASKS]
    claims += [keeps(task, full // 2, "int8", 0.986) for task in TASKS]
    half, whole = (REPORT["text to image"][f"{dim} float32"] for dim in (512, 1024))
    claims += [keeps("text_to_image", full // 2, "float32", half / whole)]  # what halving leaves the report there
    for row in table:
        print(row["task"], row["dim"], row["precision"], round(float(np.mean(row["mrr@10"])), 3))
    for entry in claims:
        print(f"{entry['claim']}: {entry['difference']:+.4f} above it, {entry['verdict']}")
    command = f"python benchmarks/findings/compression.py --rows {options.rows} --model {options.model} RUN ..."
    write("F3-F4", runs, command, {"model": options.model, "table": table, "report": REPORT, "claims": claims})


if __name__ == "__main__":
    main()
