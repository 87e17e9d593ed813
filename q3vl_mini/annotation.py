"""What an annotator is asked about an asset, and which answers are taken (report, section 3 and appendix B).

Each asset is first captioned and given a category, then annotated for one task, each time as one JSON object. The
tasks, their types and the fields of image questions and video classification are the report's; the wording, the other
fields and the limits without a number in the report are this project's.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .records import Rejected

GAP = 2.0  # seconds between the right moment of a film and the wrong one
SHORTEST = 1.0  # seconds of a moment
FENCE = re.compile(r"^```(?:json)?\s*|\s*```$")  # which models like to put around JSON


@dataclass(frozen=True)
class Task:
    """One kind of annotation.

    name: also the column of the stage table. kind: of the asset, "image" or "video". request: what is asked. fields:
    the texts of the answer in their order, with the most words that each may have. instruction: of the quadruple.
    types: task_type, to the instruction of a query of that type. query: the field that is the query's text, if any.
    pair: the fields of the right and of the wrong document. numbers: fields in seconds. asset_is: "query" if the asset
    is a part of the query, "document" if it is the document, "film" if its segments are the documents.
    """

    name: str
    kind: str
    request: str
    fields: Mapping[str, int]
    instruction: str = ""
    types: Mapping[str, str] = field(default_factory=dict)
    query: str | None = None
    pair: tuple[str, str] | None = None
    numbers: tuple[str, ...] = ()
    asset_is: str = "query"

    @property
    def schema(self) -> dict[str, Any]:
        """JSON Schema of the answer. The description comes first, so that it is written before what follows from it."""
        first, *others = self.fields
        properties: dict[str, Any] = {first: {"type": "string"}}
        if self.types:
            properties["task_type"] = {"type": "string", "enum": list(self.types)}
        properties |= {name: {"type": "string"} for name in others}
        properties |= {name: {"type": "number"} for name in self.numbers}
        closed = {"required": list(properties), "additionalProperties": False}
        return {"title": self.name, "type": "object", "properties": properties, **closed}


_PLAIN = "Write in plain English. State only what can be seen or read, and do not guess who a private person is."
CAPTIONS = {
    kind: Task(
        "caption",
        kind,
        f"Write `caption`: what the {kind} shows, in 30 to 120 words, the main thing first, then what is around it, "
        f"and any text word for word. Then write `category`: the kind of {kind}, in one to four words, as fine as a "
        f"librarian would file it, such as 'street market', 'line chart' or 'knot tutorial'. {_PLAIN}",
        {"caption": 150, "category": 6},
    )
    for kind in ("image", "video")
}
_LABELS = (
    "Write `label`: the right class of that type, in one to six words, neither broader nor narrower than a person "
    "would say. Write `misleading_label`: another class of that type, which a hasty viewer could take for the right "
    "one and which is certainly wrong here."
)
_QUESTION = (
    "Write `question`: of that type, not to be answered without looking, with one right answer. Write "
    "`positive_answer`: short and complete. Write `hard_negative_answer`: alike in form and length, plausible to "
    "someone who has not looked, and wrong."
)
_SEARCH = (
    "Write `query`: of that type, what a person would type to find exactly this one among millions. It must fit this "
    "one and hardly any other."
)
_MOMENT = (
    "Choose one moment that a person could look for. Write `query`: what happens in it, such that it fits no other "
    "moment. Write `start` and `end`, its first and last second, and `other_start` and `other_end`, those of a moment "
    f"to which the query does not apply. Between the two lie at least {GAP:.0f} seconds."
)
_ASK_FOR_PAGE = (
    "Write `question`: what a person would ask a collection of documents, which this page answers and hardly any "
    "other. Do not write 'this page' or 'the figure': who asks has not seen it."
)


def _task(
    name: str,
    instruction: str,
    words: int,
    request: str,
    fields: Mapping[str, int],
    types: Mapping[str, tuple[str, str]],
    **options: Any,
) -> Task:
    """A task that begins with a description of at most `words` words. types: name to (meaning, instruction)."""
    kind = name.split("_")[0] if name != "visdoc" else "image"
    asked = f"First write `description`: what the {kind} shows in detail, in at most {words} words. "
    if types:
        meanings = "; ".join(f"{type_} ({meaning})" for type_, (meaning, _) in types.items())
        asked += f"Then choose `task_type`, whichever suits this {kind} best: {meanings}. "
    instructions = {type_: own or instruction for type_, (_, own) in types.items()}
    limits = {"description": words, **fields}
    return Task(name, kind, f"{asked}{request} {_PLAIN}", limits, instruction, instructions, **options)


_ANSWERED = {"query": "question", "pair": ("positive_answer", "hard_negative_answer")}
_LABELLED = {"pair": ("label", "misleading_label")}
_SOUGHT = {"query": "query", "asset_is": "document"}
_ANSWER_FIELDS = {"question": 60, "positive_answer": 60, "hard_negative_answer": 60}
_LABEL_FIELDS = {"label": 8, "misleading_label": 8}
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _task("image_cls", "Classify the image.", 500, _LABELS, _LABEL_FIELDS, {
            "object": ("its main thing", "Name the main object in the image."),
            "scene": ("a kind of place", "Name the kind of scene in the image."),
            "landmark": ("a place with a name", "Name the landmark in the image."),
            "action": ("what is being done", "Name the action in the image."),
        }, **_LABELLED),
        _task("image_qa", "Answer the question about the image.", 500, _QUESTION, _ANSWER_FIELDS, {
            "factoid": ("a visible fact", ""),
            "visual_reasoning": ("counting, comparing, relations", ""),
            "ocr": ("text to be read out", ""),
            "domain_knowledge": ("what is seen, with what one knows of it", ""),
        }, **_ANSWERED),
        _task("image_ret", "Find the image that fits the text.", 500, _SEARCH, {"query": 100}, {
            "description": ("what is visible", "Find the image that the text describes."),
            "narrative": ("the story that it tells", "Find the image that fits the story."),
            "compositional": ("conditions joined by and, or, without", "Find the image that meets all conditions."),
            "knowledge": ("a text on its subject", "Find the image that illustrates the text."),
        }, **_SOUGHT),
        _task("video_cls", "Classify the video.", 300, _LABELS, _LABEL_FIELDS, {
            "activity": ("what is being done", "Name the activity in the video."),
            "scene": ("a kind of place", "Name the kind of scene in the video."),
            "event": ("an occasion", "Name the event in the video."),
            "sentiment": ("a mood or an intent", "Name the mood or the intent of the video."),
        }, **_LABELLED),
        _task("video_qa", "Answer the question about the video.", 300, _QUESTION, _ANSWER_FIELDS, {
            "factual": ("a visible fact", ""),
            "temporal": ("when, or in which order", ""),
            "thematic": ("what it is about", ""),
            "cinematic": ("camera, cuts, light", ""),
        }, **_ANSWERED),
        _task("video_ret", "Find the video that fits the text.", 300, _SEARCH, {"query": 100}, {
            "entity_action": ("who does what", "Find the video in which this happens."),
            "temporal_event": ("what follows what", "Find the video in which this happens in this order."),
            "thematic": ("its subject", "Find a video on this subject."),
            "tutorial": ("what one learns from it", "Find a video that teaches this."),
        }, **_SOUGHT),
        _task("video_mret", "Find the moment of the video that the text describes.", 300, _MOMENT, {"query": 60}, {},
              query="query", numbers=("start", "end", "other_start", "other_end"), asset_is="film"),
        _task("visdoc", "Find the page that answers the question.", 500, _ASK_FOR_PAGE, {"question": 60}, {
            "text": ("the answer stands in running text", ""),
            "table": ("in a table", ""),
            "figure": ("in a chart or picture", ""),
        }, query="question", asset_is="document"),
    )
}  # fmt: skip


def messages(task: Task, value: Any, caption: str | None = None) -> list[dict[str, Any]]:
    """A chat in which `task` is asked about an asset. The asset is a part of its own, as the value that it is."""
    shown = "an image" if task.kind == "image" else "a video"
    system = f"You write training data for a search engine. You are shown {shown}. Answer with one JSON object alone."
    known = f"A first caption, which may be wrong in details: {caption}\n\n" if caption else ""
    content = [{"type": task.kind, task.kind: value}, {"type": "text", "text": known + task.request}]
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def checked(text: str, task: Task, seconds: float | None = None) -> dict[str, Any]:
    """The answer as a dict, if it is taken. seconds: length of the asset, where the answer names moments of it.

    Raises:
        Rejected: "not JSON", "not of the schema", "empty field", "too long", "right and wrong are the same",
        "no moments", "no gap between moments", "moment outside the video".
    """
    try:
        import jsonschema
    except ImportError as error:
        raise ImportError("checking answers needs jsonschema: pip install q3vl-mini[synthesis]") from error
    try:
        answer = json.loads(FENCE.sub("", text.strip()))
        json.dumps(answer, ensure_ascii=False).encode()  # half a character, as an escape, is no text
    except (ValueError, RecursionError) as error:
        raise Rejected("not JSON", str(error)) from error
    fault = next(jsonschema.Draft202012Validator(task.schema).iter_errors(answer), None)
    if fault is not None:
        raise Rejected("not of the schema", f"{fault.json_path}: {fault.message}"[:300])
    for name, most in task.fields.items():
        words = len(answer[name].split())
        if not words:
            raise Rejected("empty field", name)
        if words > most:
            raise Rejected("too long", f"{name} has {words} words, at most {most} are taken")
    if task.pair and len({_bare(answer[name]) for name in task.pair}) == 1:
        raise Rejected("right and wrong are the same", answer[task.pair[0]][:100])
    if task.numbers:
        _check_moments(*(answer[name] for name in task.numbers), seconds)
    return answer


def _bare(text: str) -> str:
    """'A dog.' and 'a  dog' are the same answer."""
    return " ".join(text.casefold().split()).strip(" .!?\"'")


def _check_moments(start: float, end: float, other_start: float, other_end: float, seconds: float | None) -> None:
    told = f"{start} to {end} and {other_start} to {other_end} seconds"
    if not (0 <= start <= end - SHORTEST and 0 <= other_start <= other_end - SHORTEST):  # also if one is nan
        raise Rejected("no moments", told)
    if max(start, other_start) - min(end, other_end) < GAP:
        raise Rejected("no gap between moments", told)
    if seconds is not None and max(end, other_end) > seconds + 1:
        raise Rejected("moment outside the video", f"{told}, of {seconds:.1f}")
