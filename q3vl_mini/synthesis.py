"""Training data from pictures and clips alone: filter, caption, compare, balance, annotate (report, section 3).

Each asset goes through the same steps: a quality filter; a caption and a category by the annotator; a comparison of
the asset with its caption by an embedding model; a choice, so that no category fills the pool; one task, asked of the
annotator. What is learned of an asset, and why one is left out, is a line of answers.jsonl or rejects.jsonl, written at
once, so that a run that was killed goes on where it stopped and asks nothing twice.

    q3vl-mini synthesize POOL --task image_qa image_ret --endpoint http://localhost:8000/v1 \\
        --model Qwen/Qwen3-VL-32B-Instruct --out data/synthetic

POOL is a folder of pictures and videos; each task becomes a saved quadruple, OUT/<task>.
"""

import argparse
import json
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .annotation import CAPTIONS, TASKS, Task, checked, messages
from .checkpoint import claim
from .data import save_quadruple
from .embedder import Embedder
from .endpoint import OpenAIAnnotator
from .journal import Asset, Journal, for_each
from .media import IMAGE_FILES, VIDEO_FILES
from .quality import Quality, check_image, check_video, sampled
from .records import Clip, Instance, Quadruple, Rejected, Relevance

Annotator = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], str]

COMPARED = 256  # assets that the embedding model gets at a time
SEGMENT_FPS = 2.0  # frames a second of a moment that is cut out of a film
WITH_KEYFRAME = 3  # one query of so many for a moment also shows a frame of it


def assets_in(pool: str | Path) -> list[Asset]:
    """The picture and video files below a folder, in the order of their paths, which are their ids."""
    pool, found = Path(pool), []
    for file in sorted(pool.rglob("*")):
        suffix = file.suffix.lower()
        if suffix in IMAGE_FILES + VIDEO_FILES and file.is_file():
            kind = "image" if suffix in IMAGE_FILES else "video"
            found.append(Asset(file.relative_to(pool).as_posix(), kind, str(file)))
    if not found:
        raise ValueError(f"{pool} holds no file that ends in one of {', '.join(IMAGE_FILES + VIDEO_FILES)}")
    return found


def ask(annotator: Annotator, task: Task, asset: Asset, caption: str | None, seconds: float | None, tries: int) -> dict:
    """An answer that is taken, in at most `tries` tries; each new one is told what was wrong with the last."""
    chat = messages(task, asset.value, caption)
    for attempt in range(tries):
        text = annotator(chat, task.schema)
        try:
            return checked(text, task, seconds)
        except Rejected as why:
            if attempt == tries - 1:
                raise
            again = f"This cannot be used ({why}). Write the whole JSON object again, and mend that."
            chat = [*chat[:2], {"role": "assistant", "content": text}, {"role": "user", "content": again}]
    raise ValueError(f"tries {tries}; expected at least 1")


def compare(
    embedder: Any, assets: Sequence[Asset], journal: Journal, min_similarity: float, progress: bool = True
) -> None:
    """The cross-modal filter: an asset whose embedding is not like its caption's is left out."""
    for start in tqdm(range(0, len(assets), COMPARED), desc="similarity", disable=not progress):
        part = assets[start : start + COMPARED]
        captions = [{"text": journal.answers["caption"][asset.id]["caption"]} for asset in part]
        shown = np.asarray(embedder.encode([{asset.kind: asset.value} for asset in part]))
        cosines = (shown * np.asarray(embedder.encode(captions))).sum(axis=1)  # of unit vectors
        for asset, cosine in zip(part, cosines.tolist(), strict=True):
            if cosine >= min_similarity:
                journal.take("similarity", asset.id, round(cosine, 4))
            else:
                journal.reject("similarity", asset.id, Rejected("caption does not fit", f"cosine {cosine:.3f}"))


def order_of(asset: Asset, seed: int) -> int:
    """A place in a random order that depends on the asset and the seed alone, not on the other assets."""
    return zlib.crc32(f"{seed}/{asset.id}".encode())


def balance(assets: Sequence[Asset], category: Mapping[str, str], most: int | None, seed: int) -> list[Asset]:
    """At most `most` assets of each category (None is all), drawn at random and returned in their order."""
    kept, counts = set(), Counter()
    for asset in sorted(assets, key=lambda asset: order_of(asset, seed)):
        if most is None or counts[category[asset.id]] < most:
            counts[category[asset.id]] += 1
            kept.add(asset.id)
    return [asset for asset in assets if asset.id in kept]


def synthesize(
    assets: Sequence[Asset],
    tasks: Sequence[str],
    annotator: Annotator,
    folder: str | Path,
    *,
    embedder: Any = None,
    quality: Quality | None = None,
    min_similarity: float = 0.2,
    per_category: int | None = None,
    workers: int = 16,
    tries: int = 3,
    seed: int = 0,
    licence: str = "not stated",
    progress: bool = True,
) -> dict[str, Quadruple]:
    """All steps over a seed pool; each task's quadruple, also saved in folder/<task>.

    Run again with the same folder, it goes on: what was filtered, asked and compared is read, not done again, even if
    thresholds are others now; what got no answer is asked again.

    Args:
        tasks: of annotation.TASKS. An asset gets one of those of its kind, drawn at random by `seed`.
        annotator: (messages, schema) -> str, called from `workers` threads.
        embedder: anything with .encode(instances) -> unit vectors, e.g. an Embedder; None leaves the comparison out.
        min_similarity: the cosine of asset and caption below which it is left out; depends on the embedder.
        per_category: assets of a category at most; None keeps all.
        tries: of an asset whose answer cannot be used.
        licence: of the assets, for the cards.

    Raises:
        ValueError: an unknown task, equal ids, a folder of other tasks or another seed, or nothing left.
        ConnectionError: the endpoint is down, or refuses everything.
    """
    if unknown := set(tasks) - TASKS.keys():
        raise ValueError(f"no task {sorted(unknown)}; the tasks are {', '.join(TASKS)}")
    if len({asset.id for asset in assets}) < len(assets):
        raise ValueError("two assets have the same id; ids tell what is done already, so give each its own")
    claim(Path(folder) / "settings.json", {"tasks": list(tasks), "seed": seed}, "answers")
    quality, journal = quality or Quality(), Journal(folder)
    chosen = {asset.id: task for asset in assets if (task := _task_of(asset, tasks, seed))}
    assets = [asset for asset in assets if asset.id in chosen]

    def look(asset: Asset) -> dict[str, Any]:
        if asset.kind == "image":
            return check_image(asset.value, quality)
        return check_video(asset.value, quality, one_scene=chosen[asset.id].asset_is != "film")

    def caption(asset: Asset) -> dict[str, Any]:
        return ask(annotator, CAPTIONS[asset.kind], asset, None, None, tries)

    def annotate(asset: Asset) -> dict[str, Any]:
        said, seconds = journal.answers["caption"][asset.id], journal.answers["quality"][asset.id].get("seconds")
        return ask(annotator, chosen[asset.id], asset, said["caption"], seconds, tries)

    assets = for_each("quality", assets, look, journal, workers, progress)
    assets = for_each("caption", assets, caption, journal, workers, progress)
    if embedder is not None:
        compare(embedder, journal.left("similarity", assets), journal, min_similarity, progress)
        assets = journal.taken("similarity", assets)
    category = {asset.id: journal.answers["caption"][asset.id]["category"].casefold().strip() for asset in assets}
    assets = balance(assets, category, per_category, seed)
    made = {}
    for name in tasks:
        mine = [asset for asset in assets if chosen[asset.id].name == name]
        mine = for_each(name, mine, annotate, journal, workers, progress)
        meta = {"licence": licence, "split": "train", "seed": seed}
        if quadruple := quadruple_of(TASKS[name], mine, journal, meta):
            save_quadruple(quadruple, Path(folder) / name)
            made[name] = quadruple
    if not made:
        raise ValueError(f"no asset is left: {journal.report()}; see {journal.folder / 'rejects.jsonl'}")
    return made


def _task_of(asset: Asset, tasks: Sequence[str], seed: int) -> Task | None:
    fitting = [TASKS[name] for name in tasks if TASKS[name].kind == asset.kind]
    return fitting[order_of(asset, seed + 1) % len(fitting)] if fitting else None


def quadruple_of(task: Task, assets: Sequence[Asset], journal: Journal, meta: Mapping[str, Any]) -> Quadruple | None:
    """The annotated assets of a task as a quadruple; None if there are none. Equal answers are one document."""
    queries, corpus, relevance = [], [], []
    row_of: dict[str, int] = {}  # of what is text alone, which several assets may share

    def row(document: Instance) -> int:
        known = row_of.setdefault(document["text"], len(corpus)) if "text" in document else len(corpus)
        if known == len(corpus):
            corpus.append(document)
        return known

    for asset in journal.left("segments", assets):
        answer = journal.answers[task.name][asset.id]
        query: Instance = {"text": answer[task.query].strip()} if task.query else {}
        try:
            right, wrong = _documents(task, asset, answer)
        except Rejected as why:
            journal.reject("segments", asset.id, why)
            continue
        if task.asset_is == "query":
            query[asset.kind] = asset.value
        elif task.asset_is == "film" and len(queries) % WITH_KEYFRAME == 0:
            frames = right["video"].frames
            query["image"] = frames[len(frames) // 2]
        if task.types:
            query["instruction"] = task.types[answer["task_type"]]
        queries.append(query)
        relevance.append(Relevance((row(right),), tuple(row(document) for document in wrong)))
    if not queries:
        return None
    meta = {**meta, "report": journal.report()}
    return Quadruple(f"synthetic/{task.name}", task.name, task.instruction, queries, corpus, relevance, meta)


def _documents(task: Task, asset: Asset, answer: Mapping[str, Any]) -> tuple[Instance, list[Instance]]:
    """The right document of an answer, and the wrong ones."""
    if task.pair:
        right, wrong = ({"text": answer[name].strip()} for name in task.pair)
        return right, [wrong]
    if task.asset_is == "film":
        start, end, other_start, other_end = (answer[name] for name in task.numbers)
        return {"video": segment(asset.value, start, end)}, [{"video": segment(asset.value, other_start, other_end)}]
    return {asset.kind: asset.value}, []


def segment(value: Any, start: float, end: float) -> Clip:
    """The part of a video between two times in seconds, at SEGMENT_FPS frames a second."""
    frames = [frame.to_ndarray(format="rgb24") for _, frame in sampled(value, SEGMENT_FPS, start, end)]
    if not frames:
        raise Rejected("empty segment", f"{start} to {end} seconds")
    return Clip(np.stack(frames), SEGMENT_FPS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Quadruples from a folder of pictures and videos, by an annotator model."""
    example = "example: q3vl-mini synthesize pictures --task image_qa --endpoint http://localhost:8000/v1 --model NAME"
    parser = argparse.ArgumentParser(prog="q3vl-mini synthesize", description=main.__doc__, epilog=example)
    parser.add_argument("pool", type=Path, help="folder of pictures and videos, with any folders in it")
    parser.add_argument("--task", nargs="+", required=True, choices=list(TASKS), help="one or more; an asset gets one")
    parser.add_argument("--endpoint", required=True, help="an OpenAI-compatible one, e.g. http://localhost:8000/v1")
    parser.add_argument("--model", required=True, help="as the endpoint calls it, e.g. Qwen/Qwen3-VL-32B-Instruct")
    parser.add_argument("--out", type=Path, default=Path("data/synthetic"), help="default data/synthetic")
    parser.add_argument("--embedder", help="a folder, a shipped name or a Hub id, which compares assets with captions")
    parser.add_argument("--min-similarity", type=float, default=0.2, help="cosine of the two (default 0.2)")
    parser.add_argument("--min-side", type=int, default=Quality.min_side, help="pixels (default %(default)s)")
    parser.add_argument("--per-category", type=int, help="assets of a category at most (default all)")
    parser.add_argument("--workers", type=int, default=16, help="requests at a time (default 16)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds of a request (default 120)")
    parser.add_argument("--licence", default="not stated", help="of the assets, for the cards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(arguments)
    with closing(OpenAIAnnotator(options.endpoint, options.model, timeout=options.timeout)) as annotator:
        made = synthesize(
            assets_in(options.pool),
            options.task,
            annotator,
            options.out,
            embedder=Embedder(options.embedder) if options.embedder else None,
            quality=Quality(min_side=options.min_side),
            min_similarity=options.min_similarity,
            per_category=options.per_category,
            workers=options.workers,
            seed=options.seed,
            licence=options.licence,
        )
    report = Journal(options.out).report()
    if options.json:
        sets = {name: {"queries": len(q), "documents": len(q.corpus)} for name, q in made.items()}
        print(json.dumps({"folder": str(options.out), "sets": sets, "report": report}))
        return
    for name, quadruple in made.items():
        print(f"{options.out / name}: {len(quadruple)} queries, {len(quadruple.corpus)} documents")
    for step, counts in report.items():
        print(f"{step}: {counts}")


if __name__ == "__main__":
    main()
