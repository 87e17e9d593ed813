"""The public sets by name: where each lies on the Hub, its task, its instruction, its adapter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..records import Clip, Instance
from .adapters import (
    HOUND_FRAMES,
    Example,
    graded_pair,
    hound_caption,
    hound_question,
    mmeb,
    ms_marco,
    nli_triplet,
    page,
)


@dataclass(frozen=True)
class PublicSet:
    """One public set: what it is, where it lies, and the adapter of its rows.

    task: the column of the stage table, which also decides the loss (train.LOSS_OF_TASK). files: a pattern in the
    repository; {split} is filled in. like: an example of about the usual size, without content. shuffled: rows that
    are shuffled at a time. first: rows of the file that count; None is all. may_skip: the share of rows that may be
    unusable.
    """

    task: str
    instruction: str
    repo: str
    files: str
    licence: str
    adapt: Callable[[Mapping[str, Any], Path | None], Example]
    like: Example
    split: str = "train"
    shuffled: int = 10_000
    first: int | None = None
    may_skip: float = 0.1

    @property
    def local_name(self) -> str:
        """The folder of a local copy: the last part of the repository's name."""
        return self.repo.split("/")[-1]


@dataclass(frozen=True)
class Blank:
    """A white picture, or with `frames` a white clip at 1 frame a second: of a known size and without content."""

    width: int
    height: int
    frames: int = 0

    def render(self) -> Image.Image | Clip:
        if self.frames:
            return Clip(np.full((self.frames, self.height, self.width, 3), 255, np.uint8), 1.0)
        return Image.new("RGB", (self.width, self.height), "white")


def _side(words: int, size: tuple[int, ...] | None) -> Instance:
    """So many words and a visual of the size (width, height) or (width, height, frames)."""
    visual = {} if size is None else {"video" if len(size) == 3 else "image": Blank(*size)}
    return visual | ({"text": "word " * words} if words else {})


def _like(query: Instance, document: Instance) -> Example:
    return Example(query, (document,))


_VQA = "Represent the given image with the following question"
_MEMES = "Represent the given image for binary classification to determine whether it constitutes hateful speech or not"
_NEWS = "Represent the given news image with the following caption for domain classification"
_PHOTO = (640, 480)
# subset: column; the sentence that its queries begin with; words and picture of a usual query, of a usual document
MMEB_SUBSETS: dict[str, tuple[str, str, Instance, Instance]] = {
    "ImageNet_1K": (
        "image_cls", "Represent the given image for classification", _side(0, (500, 375)), _side(3, None)),
    "N24News": ("image_cls", _NEWS, _side(25, (640, 420)), _side(1, None)),
    "HatefulMemes": ("image_cls", _MEMES, _side(0, (550, 450)), _side(1, None)),
    "VOC2007": ("image_cls", "Identify the object shown in the image", _side(0, (500, 375)), _side(1, None)),
    "SUN397": ("image_cls", "Identify the scene shown in the image", _side(0, (900, 680)), _side(2, None)),
    "OK-VQA": ("image_qa", _VQA, _side(8, _PHOTO), _side(2, None)),
    "A-OKVQA": ("image_qa", _VQA, _side(9, _PHOTO), _side(2, None)),
    "DocVQA": ("image_qa", _VQA, _side(8, (1700, 2200)), _side(3, None)),
    "InfographicsVQA": ("image_qa", _VQA, _side(12, (1000, 2400)), _side(2, None)),
    "ChartQA": ("image_qa", _VQA, _side(12, (800, 600)), _side(1, None)),
    "Visual7W": ("image_qa", _VQA, _side(7, _PHOTO), _side(2, None)),
    "VisDial": (
        "image_ret", "Represent the given dialogue about an image, which is used for image retrieval",
        _side(90, None), _side(0, _PHOTO)),
    "CIRR": (
        "image_ret", "Given an image, find a similar everyday image with the described changes",
        _side(11, _PHOTO), _side(0, _PHOTO)),
    "VisualNews_t2i": (
        "image_ret", "Retrieve an image of this news caption", _side(20, None), _side(0, (640, 420))),
    "VisualNews_i2t": (
        "image_ret", "Find a caption for the news in the given photo", _side(0, (640, 420)), _side(20, None)),
    "MSCOCO_t2i": (
        "image_ret", "Find me an everyday image that matches the given caption", _side(11, None), _side(0, _PHOTO)),
    "MSCOCO_i2t": (
        "image_ret", "Find an image caption describing the given everyday image", _side(0, _PHOTO), _side(11, None)),
    "NIGHTS": (
        "image_ret", "Find a day-to-day image that looks similar to the provided image",
        _side(0, (256, 256)), _side(0, (256, 256))),
    "WebQA": ("image_ret", "Find a Wikipedia image that answers this question", _side(18, None), _side(15, _PHOTO)),
    "MSCOCO": (
        "image_gd", "Select the portion of the image that isolates the object labeled as",
        _side(1, _PHOTO), _side(0, (160, 160))),
}  # fmt: skip


def _mmeb_set(subset: str) -> PublicSet:
    task, sentence, query, document = MMEB_SUBSETS[subset]
    return PublicSet(
        task,
        f"{sentence}.",
        "TIGER-Lab/MMEB-train",
        subset + "/{split}-*.parquet",
        "Apache-2.0 (card); pictures: of their sources",
        partial(mmeb, sentence=sentence),
        _like(query, document),
        split="original",
    )


def _hound_set(task: str, instruction: str, file: str, adapt: Callable, like: Example, **options: Any) -> PublicSet:
    files, licence = f"video_instruction/{{split}}/sft/{file}", "Apache-2.0 (card); clips: of their sources"
    repo = "ShareGPTVideo/train_video_and_instruction"
    return PublicSet(task, instruction, repo, files, licence, adapt, like, **options)


def _page_set(repo: str) -> PublicSet:
    instruction = "Find a document page that answers the question."
    licence = "none on the card; pages: of their sources"
    like = _like(_side(12, None), _side(0, (1240, 1600)))
    return PublicSet("visdoc", instruction, repo, "data/{split}-*.parquet", licence, page, like, shuffled=200)


_CLIP = (336, 252, HOUND_FRAMES)
SETS: dict[str, PublicSet] = {
    **{f"mmeb/{subset}": _mmeb_set(subset) for subset in MMEB_SUBSETS},
    "llavahound/caption_to_video": _hound_set(
        "video_ret",
        "Find the video that the text describes.",
        "video_caption_300k.jsonl",
        partial(hound_caption, caption_is_query=True),
        _like(_side(130, None), _side(0, _CLIP)),
    ),
    "llavahound/video_to_caption": _hound_set(
        "video_ret",
        "Find the description of the video.",
        "video_caption_300k.jsonl",
        partial(hound_caption, caption_is_query=False),
        _like(_side(0, _CLIP), _side(130, None)),
    ),
    "llavahound/qa": _hound_set(
        "video_qa",
        "Answer the question about the video.",
        "video_240k_caption_15k.jsonl",
        hound_question,
        _like(_side(12, _CLIP), _side(30, None)),
        first=240_000,
    ),
    "vidore/colpali": _page_set("vidore/colpali_train_set"),
    "visrag/in_domain": _page_set("openbmb/VisRAG-Ret-Train-In-domain-data"),
    "visrag/synthetic": _page_set("openbmb/VisRAG-Ret-Train-Synthetic-data"),
    "msmarco/passages": PublicSet(
        "text_ret",
        "Given a question, retrieve passages that answer it.",
        "microsoft/ms_marco",
        "v2.1/{split}-*.parquet",
        "Microsoft's terms: research that is not commercial",
        ms_marco,
        _like(_side(6, None), _side(60, None)),
        may_skip=0.6,
    ),
    "nli/triplets": PublicSet(
        "text_ret",
        "Retrieve a sentence that follows from the given one.",
        "sentence-transformers/all-nli",
        "triplet/{split}-*.parquet",
        "SNLI CC-BY-SA-4.0, MultiNLI mixed",
        nli_triplet,
        _like(_side(12, None), _side(8, None)),
    ),
    "stsb/pairs": PublicSet(
        "sts",
        "Judge how similar the two texts are in meaning.",
        "sentence-transformers/stsb",
        "data/{split}-*.parquet",
        "of the SemEval tasks that it selects from",
        graded_pair,
        _like(_side(11, None), _side(11, None)),
    ),
}


def find(name: str) -> PublicSet:
    """A set by name; ValueError lists the names."""
    if name not in SETS:
        raise ValueError(f"no public set {name!r}; the sets are {', '.join(SETS)}")
    return SETS[name]
