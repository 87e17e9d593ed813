"""Cross-lingual retrieval by language and script: those that training shows, and those that it never shows.

    python benchmarks/findings/languages.py runs/seed-0 runs/seed-1 runs/seed-2

A name in one language finds the English name of the same thing. A name that is spelled as in English is not asked for:
any model finds it. Writes results/findings/languages.json.
"""

import unicodedata
from collections import Counter

import numpy as np
from seeds import arguments, claim, opened, write

from q3vl_mini.emoji_world import sprites, words
from q3vl_mini.emoji_world.tasks import TASKS, World
from q3vl_mini.evaluate import by_column
from q3vl_mini.records import Quadruple, Relevance

MODELS = ("raw", "s0", "s1", "s3")


def script(names: list[str]) -> str:
    """The script that most letters of the names are written in, as Unicode calls it: LATIN, CYRILLIC, ..."""
    letters = [unicodedata.name(c, "OTHER").split()[0] for name in names for c in name if c.isalpha()]
    return Counter(letters).most_common(1)[0][0]


def by_language(n: int, seed: int) -> list[Quadruple]:
    """For each language up to n names that the test split holds out, over the English names of all its concepts."""
    keys = World("test", "languages", seed).keys
    corpus = [{"text": words.name(key)} for key in keys]
    row = {text["text"]: i for i, text in reversed(list(enumerate(corpus)))}  # two concepts may share a name
    quadruples = []
    for code in sprites.languages():
        if code == "en":
            continue
        world = World("test", f"languages/{code}", seed)
        names = {key: world.foreign(code, key) for key in world.rng.permutation(keys).tolist()}
        asked = [key for key, name in names.items() if name and name.lower() != words.name(key).lower()][:n]
        queries = [{"text": names[key]} for key in asked]
        relevance = [Relevance((row[words.name(key)],)) for key in asked]
        instruction = TASKS["cross_lingual"].instruction
        quadruples.append(Quadruple(f"names-{code}", "cross_lingual", instruction, queries, corpus, relevance))
    return quadruples


def main() -> None:
    options = arguments(__doc__, lambda p: p.add_argument("--rows", type=int, default=60, help="names a language"))
    runs = opened(options.runs)
    quadruples = by_language(options.rows, runs[0].preset.data.test_seed)
    scripts = {q.name: script([x["text"] for x in q.queries]) for q in quadruples}
    unseen = {f"names-{code}" for code in sprites.UNSEEN_LANGUAGES}
    scores = {model: [run.scores(model, quadruples) for run in runs] for model in MODELS}

    def group(model: str, names: set[str]) -> list:
        return [
            by_column(result for name, result in seed.items() if name in names)["cross_lingual"]
            for seed in scores[model]
        ]

    seen = set(scripts) - unseen
    table = {
        model: {
            "seen": [x.score for x in group(model, seen)],
            "unseen": [x.score for x in group(model, unseen)],
            "scripts": {
                s: [x.score for x in group(model, {name for name in scripts if scripts[name] == s})]
                for s in sorted(set(scripts.values()))
            },
            "languages": {name.split("-", 1)[1]: [seed[name].score for seed in seeds] for name in scripts},
        }
        for model, seeds in scores.items()
    }
    claims = [
        claim("s3 is above raw in languages of training", group("s3", seen), group("raw", seen)),
        claim("s3 is above raw in unseen languages", group("s3", unseen), group("raw", unseen)),
    ]
    for model, row in table.items():
        print(model, {kind: round(float(np.mean(row[kind])), 3) for kind in ("seen", "unseen")})
    sizes = {"rows": options.rows, "candidates": len(quadruples[0].corpus), "chance": 1 / len(quadruples[0].corpus)}
    of_script = {name.split("-", 1)[1]: s for name, s in scripts.items()}
    command = f"python benchmarks/findings/languages.py --rows {options.rows} RUN ..."
    content = {
        **sizes,
        "unseen": sorted(sprites.UNSEEN_LANGUAGES),
        "script": of_script,
        "table": table,
        "claims": claims,
    }
    write("languages", runs, command, content)


if __name__ == "__main__":
    main()
