"""Made-up local copies of the public sets, in their schema and layout: what a dry run reads without a download.

The adapters read them as they read the real ones. Words, pictures and clips are Emoji World's.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from PIL import Image

from ..data import png_bytes
from ..emoji_world import tasks
from ..records import Instance
from . import adapters
from .sets import Blank, PublicSet, find

TEXT = datasets.Value("string")
PAGE_COLUMNS = datasets.Features({"query": TEXT, "image": datasets.Image(), "source": TEXT})
SHRINK = 4  # of each side of a picture, against the set's usual size


@dataclass(frozen=True)
class Thing:
    """What a row is made of: words, the picture and the clip (a list of frames) that they describe."""

    words: str
    picture: Image.Image
    clip: list[Image.Image]


def write_copies(names: Iterable[str], folder: str | Path, rows: int, seed: int = 0) -> None:
    """A copy of each named set in folder/<last part of its repository's name>, with `rows` rows.

    Raises ValueError for a name that is none of a public set.
    """
    found = [find(name) for name in names]
    things = _things(rows, seed) if found else []
    for public in found:
        write = WRITERS[getattr(public.adapt, "func", public.adapt)]
        file = Path(folder) / public.local_name / public.files.format(split=public.split).replace("*", "00000-of-00001")
        file.parent.mkdir(parents=True, exist_ok=True)
        made = [write(public, i, things, Path(folder) / public.local_name) for i in range(rows)]
        if file.suffix == ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        else:
            table = datasets.Dataset.from_list(made, features=PAGE_COLUMNS if "image" in made[0] else None)
            pq.write_table(table.data.table, file)


def _things(rows: int, seed: int) -> list[Thing]:
    pictures, clips = (tasks.build(name, "train", rows, seed) for name in ("text_to_image", "video_retrieval"))
    things = []
    for i in range(rows):
        [picture, clip] = (q.corpus[q.relevance[i].positives[0]] for q in (pictures, clips))
        frames = [Image.fromarray(frame) for frame in clip["video"].render().frames]
        things.append(Thing(f"{pictures.queries[i]['text']}, number {i}", picture["image"].render(), frames))
    return things


def _mmeb(public: PublicSet, i: int, things: Sequence[Thing], folder: Path) -> dict[str, str]:
    """Every other row has a negative: the next row's positive."""
    subset, sentence = public.files.split("/")[0], public.adapt.keywords["sentence"]
    asked, [found] = public.like.query, public.like.positives

    def side(name: str, n: int, usual: Instance, lead: str) -> tuple[str, str]:
        """Text and path of a side; it has what the set usually has there."""
        thing, path = things[n % len(things)], ""
        text = lead + (thing.words if "text" in usual else "") + "\n"
        if "image" in usual:
            path = f"images/{subset}/Train/{name}_{n}.jpg"
            _save(thing.picture, _small(usual["image"]), folder / path)
            text = f"<|image_1|>\n{text}"
        return text, path

    query = side("query", i, asked, f"{sentence}: " if "text" in asked else sentence)
    lead = "Represent the given image.\n" if "image" in found else ""
    positive = side("document", i, found, lead)
    negative = side("document", i + 1, found, lead) if i % 2 == 0 else ("", "")
    columns = "qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"
    return dict(zip(columns, (*query, *positive, *negative), strict=True))


def _hound(public: PublicSet, i: int, things: Sequence[Thing], folder: Path) -> dict[str, Any]:
    video = f"clip_{i}"
    for n, frame in enumerate(things[i].clip):
        _save(frame, frame.size, folder / "train_300k" / video / f"c01_{n:04d}.jpeg")
    said = [("human", "<video>\nWhat happens?"), ("gpt", f"Something happens with {things[i].words}.")]
    turns = [{"from": who, "value": text} for who, text in said]
    return {"id": f"{video}_0", "video": video, "conversations": turns}


def _page(public: PublicSet, i: int, things: Sequence[Thing], folder: Path) -> dict[str, Any]:
    page = things[i].picture.resize(_small(public.like.positives[0]["image"]))
    return {"query": f"Where is {things[i].words}?", "image": {"bytes": png_bytes(page), "path": None}, "source": "-"}


def _ms_marco(public: PublicSet, i: int, things: Sequence[Thing], folder: Path) -> dict[str, Any]:
    texts = [f"This is about {things[n % len(things)].words}." for n in (i, i + 1)]
    passages = {"is_selected": [1, 0], "passage_text": texts, "url": ["", ""]}
    return {"query": f"what is {things[i].words}", "query_id": i, "passages": passages}


def _nli(public: PublicSet, i: int, things: Sequence[Thing], folder: Path) -> dict[str, str]:
    words = things[i].words
    return {"anchor": f"Here is {words}.", "positive": f"There is {words}.", "negative": f"There is no {words}."}


def _graded(public: PublicSet, i: int, things: Sequence[Thing], folder: Path) -> dict[str, Any]:
    pair = {"sentence1": f"Here is {things[i].words}.", "sentence2": f"There is {things[i // 2].words}."}
    return pair | {"score": i / len(things)}


def _small(usual: Blank) -> tuple[int, int]:
    return usual.width // SHRINK, usual.height // SHRINK


def _save(picture: Image.Image, size: tuple[int, int], file: Path) -> None:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.resize(size).save(file)


WRITERS = {
    adapters.mmeb: _mmeb,
    adapters.hound_caption: _hound,
    adapters.hound_question: _hound,
    adapters.page: _page,
    adapters.ms_marco: _ms_marco,
    adapters.nli_triplet: _nli,
    adapters.graded_pair: _graded,
}
