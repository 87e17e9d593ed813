"""How s1 and s2 are merged: Self Positioning beside its baselines, and around another base.

    python benchmarks/findings/merging.py runs/seed-0 runs/seed-1 runs/seed-2

Averaging, SLERP half-way, TIES (density 0.5), and Self Positioning around s0 instead of the raw backbone, of the same
two models, on MMEB-mini's test split. Fisher and RegMean, which Li et al. 2024 compare with too, are not here. Vectors
are kept in the runs' folders, under merging/. Writes results/findings/merging.json.
"""

from collections.abc import Callable, Mapping

from seeds import Columns, Overall, SeedRun, arguments, claim, opened, write

from q3vl_mini import combine, evaluate, merge
from q3vl_mini.embedder import Embedder
from q3vl_mini.stages import Run, self_positioned

SELF = "Self Positioning"  # s3
DENSITY = 0.5  # of TIES


def around_s0(run: Run, raw: Embedder, vectors: Mapping[str, merge.Vector]) -> merge.Vector:
    """s3 with s0 as the base: what s1 and s2 add to it is merged, and s0 stays whole below."""
    base = vectors["s0"]
    added = [merge.linear([vectors[name], base], [1.0, -1.0]) for name in ("s1", "s2")]
    found = self_positioned(run, raw, added, base)
    return merge.linear([base, merge.position(added, found.a, found.lam)], [1.0, 1.0])


METHODS: dict[str, Callable[[Run, Embedder, Mapping[str, merge.Vector]], merge.Vector]] = {
    "averaging": lambda run, raw, v: merge.linear([v["s1"], v["s2"]]),
    "SLERP": lambda run, raw, v: merge.slerp(v["s1"], v["s2"], 0.5),
    "TIES": lambda run, raw, v: merge.ties([v["s1"], v["s2"]], DENSITY),
    f"{SELF} around s0": around_s0,
}


def merged(seed: SeedRun, quadruples: list) -> dict[str, Columns]:
    """The scores of each method on one seed's s1 and s2."""
    run = Run(seed.preset, seed.folder, progress=False, tracker="none")
    vectors = {name: combine.vector_of(run.model(name).model) for name in ("s0", "s1", "s2")}
    raw, found = run.model("raw"), {}
    for name, method in METHODS.items():
        folder = seed.folder / "merging" / name.replace(" ", "-")
        with merge.apply_delta(raw.model, method(run, raw, vectors)):
            rows = evaluate.encoded(raw, quadruples, batch_size=seed.preset.data.batch_size, folder=folder)
            found[name] = evaluate.by_column(evaluate.score_quadruple(q, c, x) for x, q, c in rows)
        print(f"seed {seed.preset.seed}, {name}: {100 * evaluate.mean_score(found[name]):.1f}", flush=True)
    return found


def main() -> None:
    runs = opened(arguments(__doc__).runs)
    quadruples = runs[0].quadruples()
    by_seed = [merged(run, quadruples) for run in runs]
    found = {name: [run.columns(name, quadruples) for run in runs] for name in ("s1", "s2")}
    found[SELF] = [run.columns("s3", quadruples) for run in runs]
    found |= {name: [columns[name] for columns in by_seed] for name in METHODS}
    overall = {name: list(map(Overall, columns)) for name, columns in found.items()}
    claims = [claim(f"{SELF} is above {name} overall", overall[SELF], overall[name]) for name in METHODS]
    table = {
        name: {"mean": [x.score for x in overall[name]]} | {c: [s[c].score for s in columns] for c in columns[0]}
        for name, columns in found.items()
    }
    for entry in claims:
        print(f"{entry['claim']}: {100 * entry['difference']:+.1f} points, {entry['verdict']}")
    command = "python benchmarks/findings/merging.py RUN ..."
    write("merging", runs, command, {"density": DENSITY, "table": table, "claims": claims})


if __name__ == "__main__":
    main()
