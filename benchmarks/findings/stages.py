"""F1: each stage does what it is for (report, table 6). The stage table over several seeds, and its pattern.

    python benchmarks/findings/stages.py runs/seed-0 runs/seed-1 runs/seed-2

Reads the vectors that `q3vl-mini run` kept of the test split; computes no model. Writes results/findings/F1.json.
"""

import numpy as np
from seeds import Overall, arguments, claim, opened, write

MODELS = ("raw", "s0", "s1", "s2", "s3")
LIFTED = ("image_ret", "video_ret", "video_mret", "visdoc")  # by distillation, the report says
HURT = ("image_cls", "image_qa", "image_gd", "video_cls", "video_qa")
# of the report's 2B models on MMEB-V2, percent (table 6)
REPORT_COLUMNS = (
    "mean", "image_cls", "image_qa", "image_ret", "image_gd",
    "video_cls", "video_qa", "video_ret", "video_mret", "visdoc",
)  # fmt: skip
REPORT = {
    model: dict(zip(REPORT_COLUMNS, scores, strict=True))
    for model, scores in {
        "s0": (66.6, 62.2, 63.7, 65.9, 80.0, 60.8, 65.9, 51.1, 48.4, 74.8),
        "s1": (72.1, 71.2, 75.8, 72.4, 88.3, 73.0, 67.7, 51.3, 41.6, 77.1),
        "s2": (71.5, 61.8, 69.8, 78.8, 76.3, 63.9, 60.0, 55.6, 57.8, 80.9),
        "s3": (73.2, 70.3, 74.3, 74.8, 88.5, 71.9, 64.9, 53.9, 53.3, 79.2),
    }.items()
}


def main() -> None:
    runs = opened(arguments(__doc__).runs)
    quadruples = runs[0].quadruples()
    found = {model: [run.columns(model, quadruples) for run in runs] for model in MODELS}
    overall = {model: [Overall(columns) for columns in seeds] for model, seeds in found.items()}

    def column(model: str, name: str) -> list:
        return [columns[name] for columns in found[model]]

    claims = [
        claim("s0 is above raw overall", overall["s0"], overall["raw"]),
        claim("s1 is above s0 overall", overall["s1"], overall["s0"]),
        *(claim(f"s2 is above s1 in {c}", column("s2", c), column("s1", c)) for c in LIFTED),
        *(claim(f"s2 is below s1 in {c}", column("s1", c), column("s2", c)) for c in HURT),
        *(claim(f"s3 is above {m} overall", overall["s3"], overall[m]) for m in ("s0", "s1", "s2")),
    ]
    table = {
        model: {"mean": [x.score for x in overall[model]]}
        | {name: [columns[name].score for columns in seeds] for name in seeds[0]}
        for model, seeds in found.items()
    }
    for model, row in table.items():
        print(model, {name: round(100 * float(np.mean(scores)), 1) for name, scores in row.items()})
    for entry in claims:
        print(f"{entry['claim']}: {100 * entry['difference']:+.1f} points, {entry['verdict']}")
    write(
        "F1", runs, "python benchmarks/findings/stages.py RUN ...", {"table": table, "report": REPORT, "claims": claims}
    )


if __name__ == "__main__":
    main()
