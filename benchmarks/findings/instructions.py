"""Does a model do what the instruction says? The same query under several instructions, each with its own answer.

    python benchmarks/findings/instructions.py runs/seed-0 runs/seed-1 runs/seed-2

A query ranks one right answer for each of the instructions, so a model that does not read them is right by chance.
Writes results/findings/instructions.json.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from seeds import arguments, claim, opened, write

from q3vl_mini.emoji_world import sprites, words
from q3vl_mini.emoji_world.tasks import TASKS, World
from q3vl_mini.evaluate import DatasetResult
from q3vl_mini.records import Quadruple, Relevance

MODELS = ("raw", "s0", "s1", "s2", "s3")


def how_fine(n: int, seed: int) -> list[Quadruple]:
    """A picture of one thing; its name, its kind or its broad category is asked for."""
    world = World("test", "instructions/how-fine", seed)
    queries, corpus, answers = [], [], []
    while len(queries) < n:
        scene = world.single()
        concept = sprites.concept_by_key()[scene.objects[0].key]
        texts = (words.name(concept.key), words.subgroup_label(concept.subgroup), words.GROUPS[concept.group])
        if len({text.lower() for text in texts}) < len(texts):
            continue
        rows = range(len(corpus), len(corpus) + len(texts))
        queries.append({"image": scene})
        corpus += [{"text": text} for text in texts]
        answers.append(tuple(rows))
    return _under(("concept", "subgroup", "group"), "how-fine", queries, corpus, answers)


def which_kind(n: int, seed: int) -> list[Quadruple]:
    """A picture of one thing; a text that describes it, or another picture of the same thing, is asked for."""
    world = World("test", "instructions/which-kind", seed)
    queries, corpus, answers = [], [], []
    while len(queries) < n:
        scene = world.single(tinted=0.0)
        thing = scene.objects[0]
        others = [s for s in world.styles if s != thing.style and sprites.has_style(s, thing.key)]
        if not others:
            continue
        other = replace(scene, objects=(replace(thing, style=others[0]),))
        answers.append((len(corpus), len(corpus) + 1))
        queries.append({"image": scene})
        corpus += [{"text": words.with_article(words.name(thing.key))}, {"image": other}]
    return _under(("image_to_text", "same_thing"), "which-kind", queries, corpus, answers)


def _under(names, probe, queries, corpus, answers) -> list[Quadruple]:
    """The same queries under the instruction of each task; answers[i][j] is right for query i under instruction j."""
    return [
        Quadruple(
            f"{probe}-{name}", "image_ret", TASKS[name].instruction, queries, corpus,
            [Relevance((rows[j],), candidates=rows) for rows in answers],
        )
        for j, name in enumerate(names)
    ]  # fmt: skip


def obedience(name: str, under: Sequence[DatasetResult]) -> DatasetResult:
    """How often each query is obeyed, over its instructions: one value a query, for it is the query that is drawn."""
    return replace(under[0], name=name, values=np.mean([result.values for result in under], axis=0))


def main() -> None:
    options = arguments(__doc__, lambda p: p.add_argument("--rows", type=int, default=200, help="queries a probe"))
    runs = opened(options.runs)
    seed = runs[0].preset.data.test_seed
    quadruples = [*how_fine(options.rows, seed), *which_kind(options.rows, seed)]
    found = {model: [run.scores(model, quadruples) for run in runs] for model in MODELS}

    def probe(model: str, name: str) -> list:
        return [obedience(name, [r for key, r in seed.items() if key.startswith(name)]) for seed in found[model]]

    probes = {"how-fine": 1 / 3, "which-kind": 1 / 2}
    table = {
        model: {name: [x.score for x in probe(model, name)] for name in probes}
        | {name: [seed[name].score for seed in seeds] for name in seeds[0]}
        for model, seeds in found.items()
    }
    claims = [
        claim(f"{model} obeys more often than raw, {name}", probe(model, name), probe("raw", name))
        for model in ("s0", "s1", "s3")
        for name in probes
    ]
    for model, row in table.items():
        print(model, {name: round(float(np.mean(scores)), 3) for name, scores in row.items()})
    content = {"rows": options.rows, "chance": probes, "table": table, "claims": claims}
    write("instructions", runs, f"python benchmarks/findings/instructions.py --rows {options.rows} RUN ...", content)


if __name__ == "__main__":
    main()
