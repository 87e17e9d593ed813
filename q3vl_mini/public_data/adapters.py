"""What a raw row of each public set becomes: one adapter a schema.

An adapter takes a raw row and the folder of the set's local copy (None if there is none) and returns an `Example`, or
raises `Rejected` for a row that cannot be used. Its docstring says where the rows come from and what becomes what.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data import png_bytes
from ..paths import below
from ..records import Instance, Rejected

HOUND_FRAMES = 8  # of a video, as in VLM2Vec-V2's training


@dataclass(frozen=True)
class Example:
    """A raw row as a training example. `unjudged` documents join the corpus unlabelled; score: of a graded pair."""

    query: Instance
    positives: tuple[Instance, ...]
    negatives: tuple[Instance, ...] = ()
    unjudged: tuple[Instance, ...] = ()
    score: float | None = None


def mmeb(row: Mapping[str, Any], folder: Path | None, sentence: str) -> Example:
    """MMEB-train, 20 subsets of image tasks (VLM2Vec, arXiv 2410.05160).

    Source: TIGER-Lab/MMEB-train, config = subset, splits "original" and "diverse_instruction". Licence: Apache-2.0 on
    its card; the pictures keep those of the sets that they come from.
    Schema: qry, qry_image_path, pos_text, pos_image_path, and in some subsets neg_text, neg_image_path; paths are
    relative ("images/MSCOCO_t2i/Train/..."), the pictures come as zip files. `qry` is "<|image_1|>", a line break,
    the subset's instruction (`sentence`), the text. "<|image_1|>" also stands where there is no picture (WebQA).
    Query: the picture and the text without the instruction; a text that begins otherwise stays whole. Positive:
    pos_text and its picture, without "Represent the given image" and the like, since documents get the default
    instruction. Negative: neg_text and its picture, if there are any.
    Columns: image_cls (classification loss), image_qa, image_ret, image_gd (InfoNCE); see sets.MMEB_SUBSETS.
    """
    query = _mmeb_side(row["qry"], row["qry_image_path"], (sentence,), folder, "query")
    positive = _mmeb_side(row["pos_text"], row["pos_image_path"], MMEB_DOCUMENT_SENTENCES, folder, "positive")
    text, path = row.get("neg_text"), row.get("neg_image_path")
    if not text and not path:
        return Example(query, (positive,))
    return Example(query, (positive,), (_mmeb_side(text, path, MMEB_DOCUMENT_SENTENCES, folder, "negative"),))


MMEB_DOCUMENT_SENTENCES = (
    "Represent the given Wikipedia image with related text information",
    "Represent the given cropped image of the object",
    "Represent the given image",
)


def _mmeb_side(
    text: str | None, path: str | None, sentences: Sequence[str], folder: Path | None, what: str
) -> Instance:
    text = (text or "").replace("<|image_1|>", "").strip()
    for sentence in sentences:
        if text.startswith(sentence):
            text = text.removeprefix(sentence).lstrip(" .:\n")
            break
    if len(text) > 1 and text[0] == text[-1] == '"':  # a label in quotes
        text = text[1:-1]
    return _instance(what, text=text, image=_local(path, folder) if path else None)


def hound_caption(row: Mapping[str, Any], folder: Path | None, caption_is_query: bool) -> Example:
    """LLaVA-Hound (ShareGPTVideo), 300,000 clips with captions written by GPT-4V (arXiv 2404.01258).

    Source: ShareGPTVideo/train_video_and_instruction, video_instruction/train/sft/video_caption_300k.jsonl. Licence:
    Apache-2.0 on its card; the clips are from ActivityNet, WebVid and ViDAL.
    Schema: id, video, conversations: [{from: "human", value: "<video>\\n" + request}, {from: "gpt", value: caption}];
    the frames of a clip are train_300k/<video>/*.jpeg, from the archives train_300k/*.tar.gz.
    Query and positive: HOUND_FRAMES frames spread over the clip and the caption, in the direction that the set's
    name says. The request asks for a description, which the instruction says already, and is left out. No negatives.
    Column: video_ret (InfoNCE).
    """
    _, caption = _two_turns(row)
    clip, words = {"video": _hound_frames(row, folder)}, {"text": caption}
    return Example(words, (clip,)) if caption_is_query else Example(clip, (words,))


def hound_question(row: Mapping[str, Any], folder: Path | None) -> Example:
    """LLaVA-Hound, 240,000 questions about clips and their answers.

    Source: ShareGPTVideo/train_video_and_instruction, video_instruction/train/sft/video_240k_caption_15k.jsonl, whose
    first 240,000 rows are questions and the others captions. Licence: Apache-2.0 on its card. Schema and frames: as in
    hound_caption.
    Query: frames and question. Positive: the answer. No negatives. Column: video_qa (InfoNCE).
    """
    question, answer = _two_turns(row)
    return Example({"video": _hound_frames(row, folder), "text": question}, ({"text": answer},))


def _two_turns(row: Mapping[str, Any]) -> tuple[str, str]:
    turns = [(turn["value"] or "").replace("<video>", "").strip() for turn in row["conversations"] or []]
    if len(turns) < 2 or not turns[0] or not turns[1]:
        raise Rejected("no two turns", f"video {row['video']!r} has {len(turns)}")
    return turns[0], turns[1]


def _hound_frames(row: Mapping[str, Any], folder: Path | None) -> tuple[str, ...]:
    place = _inside(row["video"], _needed(folder) / "train_300k")
    frames = sorted(place.glob("*.jpeg")) if os.path.isdir(place) else []
    if not frames:
        raise Rejected("no frames", str(place))
    chosen = np.linspace(0, len(frames) - 1, min(HOUND_FRAMES, len(frames))).round().astype(int)
    return tuple(str(frames[i]) for i in chosen)


def page(row: Mapping[str, Any], folder: Path | None) -> Example:
    """Visual documents: a question and the page that answers it.

    ViDoRe's training set: vidore/colpali_train_set (arXiv 2407.01449), 118,000 rows of DocVQA, InfoVQA, TAT-DQA,
    arXivQA and synthetic questions. Schema: image {bytes, path}, image_filename, query, answer, source, options, page,
    model, prompt, answer_type. VisRAG's: openbmb/VisRAG-Ret-Train-In-domain-data (123,000 rows) and
    openbmb/VisRAG-Ret-Train-Synthetic-data (239,000) (arXiv 2410.10594). Schema: query, image {bytes, path}, source.
    Licence: none on any of the three cards; the pages keep those of their sources.
    Query: query. Positive: image, which is embedded in the table; a page with several questions is one document. The
    answers are not used: what is sought is the page. No negatives. Column: visdoc (InfoNCE).
    """
    return Example(_instance("query", text=row["query"]), (_instance("page", image=_embedded(row["image"])),))


def ms_marco(row: Mapping[str, Any], folder: Path | None) -> Example:
    """MS MARCO v2.1: questions to a search engine, with passages of which a person selected those that answer.

    Source: microsoft/ms_marco, config v2.1 (arXiv 1611.09268), 808,731 rows. Licence: Microsoft's terms, research that
    is not commercial. Schema: query, query_id, query_type, answers, wellFormedAnswers, passages {is_selected,
    passage_text, url}, three lists of one length.
    Query: query. Positives: the selected passages; a row without one (about two in five) is left out. The other
    passages are not negatives, because many of them answer too: they join the corpus, where mining and its masks
    judge them. Column: text_ret (InfoNCE).
    """
    passages = row["passages"]
    judged = list(zip(passages["passage_text"], passages["is_selected"], strict=False))
    if not len(judged) == len(passages["passage_text"]) == len(passages["is_selected"]):
        raise Rejected("passages without judgements", str(row["query"])[:80])
    selected = tuple({"text": text} for text, flag in judged if text.strip() and flag)
    others = tuple({"text": text} for text, flag in judged if text.strip() and not flag)
    if not selected:
        raise Rejected("no passage selected", str(row["query"])[:80])
    return Example(_instance("query", text=row["query"]), selected, unjudged=others)


def nli_triplet(row: Mapping[str, Any], folder: Path | None) -> Example:
    """NLI: a sentence, one that follows from it, and one that contradicts it (SNLI and MultiNLI).

    Source: sentence-transformers/all-nli, config triplet, 557,850 rows. Licence: SNLI CC-BY-SA-4.0, MultiNLI mixed
    (OANC, CC-BY-3.0, CC-BY-SA-3.0). Schema: anchor, positive, negative.
    Query: anchor. Positive: positive, which follows. Negative: negative, which contradicts. Column: text_ret (InfoNCE).
    """
    sides = {name: _instance(name, text=row[name]) for name in ("anchor", "positive", "negative")}
    return Example(sides["anchor"], (sides["positive"],), (sides["negative"],))


def graded_pair(row: Mapping[str, Any], folder: Path | None) -> Example:
    """STS-B: pairs of sentences with their similarity as people judged it.

    Source: sentence-transformers/stsb, 5,749 rows. Licence: of the SemEval tasks that it selects from, named per source
    on ixa2.si.ehu.eus/stswiki. Schema: sentence1, sentence2, score in [0, 1]; GLUE's version has label in [0, 5], and
    -1 where it is hidden. Query: sentence1. Positive: sentence2 with its score, on whichever scale: CoSENT reads the
    order alone. Column: sts (CoSENT).
    """
    score = row["score"] if "score" in row else row["label"]
    if score is None or score < 0:
        raise Rejected("no score", str(score))
    sides = [_instance(name, text=row[name]) for name in ("sentence1", "sentence2")]
    return Example(sides[0], (sides[1],), score=float(score))


def _instance(what: str, **parts: Any) -> Instance:
    """The parts that carry something, without space around words; Rejected if none does."""
    parts = {kind: value.strip() if isinstance(value, str) else value for kind, value in parts.items()}
    instance = {kind: value for kind, value in parts.items() if value}
    if not instance:
        raise Rejected(f"empty {what}")
    return instance


def _needed(folder: Path | None) -> Path:
    if folder is None:
        raise ValueError(
            "the pictures of this set lie beside its table; download them (docs/full-scale-data.md) and give folder"
        )
    return folder


def _local(path: str, folder: Path | None) -> str:
    file = _inside(path, _needed(folder))
    if not os.path.isfile(file):
        raise Rejected("no file", str(file))
    return str(file)


def _inside(path: Any, folder: Path) -> Path:
    """Rejected for what is no path, and for one that leads out of the set's own folder."""
    try:
        return below(path, folder, folder)
    except (TypeError, ValueError) as error:
        raise Rejected("path outside", str(error)) from error


def _embedded(value: Any) -> bytes | None:
    """The picture that a table holds, as bytes: {bytes, path} undecoded, or a decoded PIL image. A path is not read."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, Image.Image):
        raise Rejected("no picture", f"a {type(value).__name__}")
    return png_bytes(value)
