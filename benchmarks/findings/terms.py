"""What equation 1's Z is made of, by task: what a query has to be told apart from, and what the mask leaves out.

    python benchmarks/findings/terms.py runs/seed-0 runs/seed-1 runs/seed-2

One training batch of each sub-dataset of stage 1, as that stage draws it, embedded by the model it starts from and by
the one that it ends with; whole vectors, no prefix. For each kind of term: its share of Z, and the share of its terms
that the mask takes for false negatives because they score above the positive. Writes results/findings/terms.json.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from seeds import SeedRun, arguments, opened, write

from q3vl_mini.data import Batch, mixed_batches
from q3vl_mini.embedder import Embedder
from q3vl_mini.losses import info_nce_masks, info_nce_scores
from q3vl_mini.stages import Run, mined_data
from q3vl_mini.train import encode_documents

MODELS = ("raw", "s0")  # before and after stage 1
Measured = Mapping[str, Mapping[str, float]]


def parts_of_z(model: Embedder, batch: Batch, temperature: float, margin: float) -> Measured:
    """For each kind of term its share of Z, the mean over the queries, and the share that scores above the margin."""

    def encode(rows, instruction):
        return torch.from_numpy(model.encode(rows, instruction=instruction))

    queries = encode(batch.queries, batch.instruction)
    documents, negatives, negatives_mask, negative_ids = encode_documents(encode, batch)
    ids = {"document_ids": torch.tensor(batch.positive_ids), "negative_ids": negative_ids}
    scores = info_nce_scores(queries, documents, negatives)
    kept = info_nce_masks(scores, margin=margin, negatives_mask=negatives_mask, **ids)
    allowed = info_nce_masks(scores, margin=math.inf, negatives_mask=negatives_mask, **ids)
    summands = {name: (scores[name] / temperature).exp() * kept[name] for name in scores}
    z = sum(x.sum(1) for x in summands.values())  # (B,)
    found = {}
    for name, x in summands.items():
        possible = int(allowed[name].sum())
        masked = 1 - int(kept[name].sum()) / possible if possible else 0.0
        found[name] = {"of_z": float((x.sum(1) / z).mean()), "masked": masked}
    return found


def by_task(run: SeedRun) -> dict[str, dict[str, Measured]]:
    """{model: {sub-dataset: its batch, measured}}."""
    stage, trial = run.preset.stages["s0"], Run(run.preset, run.folder, progress=False, tracker="none")
    options = {"batch_size": stage.batch_size, "n_negatives": stage.n_negatives, "steps": 1, "seed": run.preset.seed}
    batches = [next(mixed_batches([quadruple], **options)) for quadruple in mined_data(trial, "s0")]
    return {
        name: {batch.name: parts_of_z(model, batch, stage.temperature, stage.margin) for batch in batches}
        for name in MODELS
        for model in [trial.model(name)]
    }


def main() -> None:
    runs = opened(arguments(__doc__).runs)
    by_run = [by_task(run) for run in runs]
    table = {
        model: {
            task: {
                term: {what: [found[model][task][term][what] for found in by_run] for what in ("of_z", "masked")}
                for term in by_run[0][model][task]
            }
            for task in by_run[0][model]
        }
        for model in MODELS
    }
    for model, tasks in table.items():
        for task, terms in tasks.items():
            said = [f"{t} {100 * np.mean(x['of_z']):.0f} ({100 * np.mean(x['masked']):.0f})" for t, x in terms.items()]
            print(model, task, *said)
    write("terms", runs, "python benchmarks/findings/terms.py RUN ...", {"table": table})


if __name__ == "__main__":
    main()
