"""README.md of an exported model, generated: what it is, what it scored, what it was trained on, how to load it, and
what it cannot do.

Every figure comes from the results file of the run; nothing is typed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from .config import load_preset, preset_names
from .emoji_world.tasks import TASKS
from .snippets import snippets

PAPER = "https://arxiv.org/abs/2601.04720"
# Below so many parameters a model is one of the project's own small backbone.
SMALL = 100e6


@dataclass(frozen=True)
class Exported:
    """What the card tells beside the results.

    name: what a reader loads, a folder or a Hub id. card: the checkpoint's own (q3vl_mini.json). base_id: its base on
    the Hub, if it is there. dims: Matryoshka dimensions, empty if unknown. weights: e.g. "merged, float32".
    is_adapter: whether a base must be loaded too.
    """

    name: str
    card: Mapping[str, Any]
    base_id: str | None
    parameters: int
    dim: int
    dims: tuple[int, ...]
    weights: str
    is_adapter: bool

    @property
    def role(self) -> str:
        return self.card["role"]

    @property
    def trained_here(self) -> bool:
        """Whether a stage of this project made it; a released checkpoint has no card that says so."""
        return "stage" in self.card


def hub_card(model: Exported, results: Mapping[str, Any] | None = None) -> str:
    """The page, with the Hub's metadata on top. `results`: the content of a run's results file (report.write_results).

    Raises:
        ValueError: the results are of another run, or do not have this model.
    """
    limits = "## Limits\n\n" + "\n".join(f"- {sentence}" for sentence in _limits(model, results))
    sections = [_title(model), _facts(model), _scores(model, results), _data(model), _use(model), limits]
    return f"---\n{_metadata(model)}\n---\n\n" + "\n\n".join(sections) + "\n"


def _metadata(model: Exported) -> str:
    return ModelCardData(
        license="apache-2.0" if model.trained_here else None,
        library_name="peft" if model.is_adapter else "sentence-transformers",
        base_model=model.base_id,
        pipeline_tag="feature-extraction" if model.role == "embedder" else "text-ranking",
        tags=["qwen3_vl", "multimodal", model.role, "sentence-transformers", "q3vl_mini"],
    ).to_yaml()


def _title(model: Exported) -> str:
    what = {
        "embedder": "A Qwen3-VL embedding model: texts, images, videos and any mix of them become vectors that are "
        "compared by cosine.",
        "reranker": "A Qwen3-VL reranker: how relevant a document is to a query, each a text, an image, a video or any "
        "mix of them.",
    }[model.role]
    report = f"Qwen3-VL-Embedding and Qwen3-VL-Reranker ([arXiv 2601.04720]({PAPER}))"
    origin = f"Made with q3vl_mini, a reproduction of {report}; not one of the models released with that report."
    if not model.trained_here:
        origin = "Written by q3vl_mini from a checkpoint that it did not train, whose licence and origin it has."
    return f"# {model.name}\n\n{what} {origin}"


def _facts(model: Exported) -> str:
    card, facts = model.card, {"Role": model.role}
    if model.role == "embedder":
        facts["Dimensions"] = str(model.dim)
        if model.dims:
            facts["Dimensions"] += f", trained to be cut to {', '.join(str(d) for d in model.dims if d != model.dim)}"
    facts |= {"Parameters": f"{model.parameters / 1e6:,.1f} million", "Weights": model.weights}
    facts |= {"Base model": card.get("base"), "Prompt": f'"{card["template"]}"', "Stage": card.get("stage")}
    facts |= {"Preset": card.get("preset"), "Seed": card.get("seed"), "Revision of q3vl_mini": card.get("git")}
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value not in (None, "")]
    return "\n".join(["| | |", "|---|---|", *rows])


def _verdict(verdict: Mapping[str, Any]) -> str:
    """Of a model that finetune() made: is it better on the person's data, and what did it forget?"""
    said = {True: "recommended", False: "not recommended"}[verdict["recommended"]]
    low, high = (f"{100 * float(x):+.1f}" for x in verdict["interval"].split(" to "))
    return (
        f"## Verdict\n\nOn the held-out queries of the data that it was fine-tuned on, against its base: "
        f"**{verdict['on the held-out queries']}**, a difference of {100 * verdict['difference']:+.1f} points, 95 % "
        f"interval {low} to {high}. Of its mean on MMEB-mini, the benchmark over Emoji World, it lost "
        f"{100 * verdict['relative loss on MMEB-mini']:.1f} %. Of base, merged and fine-tuned model it is {said}."
    )


def _scores(model: Exported, results: Mapping[str, Any] | None) -> str:
    if results is None and "verdict" in model.card:
        return _verdict(model.card["verdict"])
    if results is None:
        return "## Scores\n\nNo results were given when this page was made."
    key, columns = _row_of(model, results)
    lines = [
        "| column | metric | score | 95 % interval | chance | queries | candidates |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for column, r in columns.items():
        if column not in ("mean", "datasets"):
            low, high = (f"{100 * x:.1f}" for x in r["ci"])
            line = [column, r["metric"], f"{100 * r['score']:.1f}", f"{low} to {high}", f"{100 * r['chance']:.1f}"]
            lines.append("| " + " | ".join([*line, str(r["n_queries"]), f"{r['n_candidates']:.0f}"]) + " |")
    if columns["mean"]["score"] is not None:
        lines.append(f"| mean | | {100 * columns['mean']['score']:.1f} | | | | |")
    meta = results["meta"]
    text = (
        f'MMEB-mini, the benchmark over Emoji World, in percent: the row "{key}" of the run with preset '
        f"`{meta['preset']}` and seed {meta['seed']}, at revision `{meta['git'][:12]}`."
    )
    if model.role == "reranker":
        text += f" The reranker re-orders the first candidates of {key.split('+')[0]}."
    unseen = results.get("unseen_styles", {}).get(key)
    after = ""
    if unseen:
        after = (
            f"\n\nSingle objects in two styles of drawing that no training shows, text to image, {unseen['n']} "
            f"queries: Hit@1 {100 * unseen['hit@1']:.1f}, Hit@10 {100 * unseen['hit@10']:.1f}."
        )
    return f"## Scores\n\n{text}\n\n" + "\n".join(lines) + after


def _row_of(model: Exported, results: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The name and the columns of this model in the results."""
    card, meta, models = model.card, results["meta"], results["models"]
    for key in ("preset", "seed", "git"):
        if card.get(key) != meta[key]:
            raise ValueError(
                f"the results are of a run with {key} {meta[key]!r}, the model is of one with {card.get(key)!r}; give "
                "the results of the run that made it"
            )
    wanted = [k for k in models if k == card.get("stage") or (k.endswith("+reranker") and model.role == "reranker")]
    if not wanted:
        raise ValueError(f"the results have no {card.get('stage')!r}; they have {list(models)}")
    return wanted[0], models[wanted[0]]


def _data(model: Exported) -> str:
    preset = model.card.get("preset")
    if base := model.card.get("fine_tuned_from"):
        return (
            "## Training data\n\nPairs of queries and documents that a person brought, who knows their licence. "
            f"Fine-tuned from `{base}`, whose own page tells what it saw before."
        )
    if preset not in preset_names():
        return "## Training data\n\nNot known to q3vl_mini; see the base model's own page."
    stages = load_preset(preset).stages.items()
    mine = [stage for name, stage in stages if (name == "reranker") == (model.role == "reranker")]
    names = list(dict.fromkeys(name for stage in mine for name in stage.tasks))
    emoji, others = [n for n in names if n in TASKS], [n for n in names if n not in TASKS]
    text = (
        "The training split of Emoji World: scenes, clips, pages and texts that a generator composes of emoji and "
        f"their names, with exact labels. Sub-datasets: {', '.join(emoji)}. The drawings: Noto Emoji (Google, "
        "Apache-2.0), Twemoji (Twitter, Inc and other contributors, CC-BY-4.0), Fluent Emoji (Microsoft, MIT). The "
        "words: CLDR (Unicode, Inc., Unicode-3.0), emojibase (Miles Johnson, MIT)."
    )
    if others:
        text += f" Saved data sets, each with its licence in its card.json: {', '.join(others)}."
    return f"## Training data\n\n{text} What the base model saw before is told where it comes from."


def _use(model: Exported) -> str:
    shorter = next((d for d in model.dims if d < model.dim), model.dim)
    codes = snippets(model.role, model.name, shorter, model.is_adapter)
    sections = [f"### {library}\n\n```python\n{code}```" for library, code in codes.items()]
    if not model.is_adapter:
        sections.append(
            "### vLLM\n\nWritten from vLLM's documentation and not run by q3vl_mini. From inside the folder:\n\n"
            "```\nvllm serve . --config vllm.yaml\n```"
        )
    return "## Use\n\n" + "\n\n".join(sections)


def _limits(model: Exported, results: Mapping[str, Any] | None) -> Iterator[str]:
    if model.trained_here and model.parameters < SMALL:
        seen = "has seen nothing but Emoji World: drawings of emoji and short generated texts"
        if "fine_tuned_from" in model.card:
            seen = "has seen drawings of emoji, short generated texts, and the pairs that it was fine-tuned on"
        yield (
            f"It has {model.parameters / 1e6:.0f} million parameters and {seen}. On photographs, real documents and "
            "free text its answers mean little. It shows how such a model is made; it is not for use."
        )
    if results is not None:
        yield (
            "The scores are of MMEB-mini, which this project generates; they say nothing of MMEB-V2 and are not to be "
            "compared with its scores."
        )
        yield "One training run with one seed: the intervals are over queries, not over training runs."
        key, columns = _row_of(model, results)
        alone = results["models"].get(key.split("+")[0], columns)["mean"]["score"]
        together = columns["mean"]["score"]
        if None not in (alone, together) and together < alone:
            yield (
                f"In this run the reranker makes the order worse: a mean of {100 * together:.1f} with it, "
                f"{100 * alone:.1f} without."
            )
    yield (
        "An instruction that is unlike those of training may help or hurt; documents were always encoded with the "
        "default instruction."
        if model.role == "embedder"
        else "A score orders documents for one query; it is not calibrated across queries."
    )
