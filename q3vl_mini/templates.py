"""The prompts of both models, word for word, and what is cut where one is too long.

The report and the released code disagree in the embedder's ending and in the reranker's user message. Both forms are
here, "report" and "released"; a checkpoint records which one it was trained with. A prompt is built from an instance
whose visuals are already measured, as a list of parts; a part knows whether it is a special token, words of the
template or words of the instance, so that an instance can neither forge a special token nor have one cut away.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Template:
    """One prompt in plain view: system message, user message, ending. {slots} are filled for each instance."""

    system: str
    user: str
    ending: str


EMBEDDER_INSTRUCTION = "Represent the user's input."
EMBEDDER_TEMPLATES = {
    "report": Template(
        system="<|im_start|>system\n{instruction}<|im_end|>\n",
        user="<|im_start|>user\n{instance}<|im_end|>\n",
        ending="<|endoftext|>",  # a PAD token; its hidden state is the embedding
    ),
    "released": Template(
        system="<|im_start|>system\n{instruction}<|im_end|>\n",
        user="<|im_start|>user\n{instance}<|im_end|>\n",
        ending="<|im_start|>assistant\n",  # no PAD: the line break is what is pooled
    ),
}
RERANKER_INSTRUCTION = "Given a search query, retrieve relevant candidates that answer the query."
RERANKER_SYSTEM = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
)
RERANKER_TEMPLATES = {
    "report": Template(
        system=RERANKER_SYSTEM,
        user="<|im_start|>user\n<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n",
        ending="<|im_start|>assistant\n",  # the next token, "yes" or "no", is scored
    ),
    "released": Template(
        system=RERANKER_SYSTEM,
        user="<|im_start|>user\n<Instruct>: {instruction}<Query>:{query}\n<Document>:{document}<|im_end|>\n",
        ending="<|im_start|>assistant\n",
    ),
}
CHAT = Template(system="", user="<|im_start|>user\n{instance}<|im_end|>\n", ending="<|im_start|>assistant\n")
# What is cut first, and next, where a prompt is too long. Nothing else is ever cut.
CUT_ORDER = ("document", "query", "instance")


class Content(NamedTuple):
    """An instance as its prompt sees it.

    videos: for each video the times of its frame pairs in seconds, and the visual tokens of one pair. images: the
    visual tokens of each image. texts: as given.
    """

    videos: tuple[tuple[tuple[float, ...], int], ...] = ()
    images: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()


class Part(NamedTuple):
    """A piece of a prompt. role: "special" (one special token, `times` times), "fixed" (words of the template or of
    the instruction) or a name in CUT_ORDER (words of an instance)."""

    text: str
    role: str
    times: int = 1


def embedder_prompt(content: Content, instruction: str | None = None, template: str = "report") -> list[Part]:
    """The embedder's prompt. None or a blank instruction is EMBEDDER_INSTRUCTION. Taught in notebooks/02."""
    instruction = end_with_punctuation(instruction or "") or EMBEDDER_INSTRUCTION
    slots = {"instruction": [Part(instruction, "fixed")], "instance": _content_parts(content, "instance")}
    return _fill(choose(EMBEDDER_TEMPLATES, template), slots)


def reranker_prompt(
    query: Content, document: Content, instruction: str | None = None, template: str = "report"
) -> list[Part]:
    """The reranker's prompt. None or a blank instruction is RERANKER_INSTRUCTION; any other stays as it is given,
    without the embedder's full stop, as in the released code. Taught in notebooks/02."""
    instruction = instruction if instruction and instruction.strip() else RERANKER_INSTRUCTION
    slots = {
        "instruction": [Part(instruction, "fixed")],
        "query": _content_parts(query, "query"),
        "document": _content_parts(document, "document"),
    }
    return _fill(choose(RERANKER_TEMPLATES, template), slots)


def chat_prompt(content: Content) -> list[Part]:
    """A plain user turn and the opened answer, as an instruct model is asked. Taught in notebooks/01."""
    return _fill(CHAT, {"instance": _content_parts(content, "instance")})


def prompt_text(parts: Sequence[Part]) -> str:
    """The prompt as one string, to read or to compare; `prompt_ids` is what a model gets. Taught in notebooks/02."""
    return "".join(part.text * part.times for part in parts)


def choose(templates: dict[str, Template], name: str) -> Template:
    """The template called `name`. ValueError lists the choices."""
    if name not in templates:
        raise ValueError(f"no template {name!r}; choose one of {sorted(templates)}")
    return templates[name]


def end_with_punctuation(instruction: str) -> str:
    """Stripped, with a full stop unless the last character is punctuation (Unicode P*), as the released code does."""
    instruction = instruction.strip()
    if instruction and not unicodedata.category(instruction[-1]).startswith("P"):
        instruction += "."
    return instruction


def _content_parts(content: Content, role: str) -> list[Part]:
    """Videos, then images, then texts, with nothing in between; an empty instance is the word NULL.

    A frame pair is written as Qwen3VLProcessor.replace_video_token writes it. From transformers 5.12 on, the
    processor leaves the chat template's vision_start and vision_end around all pairs of a video; the released models
    were trained before that, without them, and so it is here.
    """
    parts = []
    for times, tokens in content.videos:
        for seconds in times:
            parts.append(Part(f"<{seconds:.1f} seconds>", "fixed"))
            parts += _visual_parts("<|video_pad|>", tokens)
    for tokens in content.images:
        parts += _visual_parts("<|image_pad|>", tokens)
    parts += [Part(text, role) for text in content.texts]
    return parts or [Part("NULL", "fixed")]


def _visual_parts(pad: str, tokens: int) -> list[Part]:
    return [Part("<|vision_start|>", "special"), Part(pad, "special", tokens), Part("<|vision_end|>", "special")]


def _fill(template: Template, slots: dict[str, list[Part]]) -> list[Part]:
    parts: list[Part] = []
    for message in (template.system, template.user, template.ending):
        for piece in _pieces(message):
            parts += slots[piece] if isinstance(piece, str) else [piece]
    return parts


@cache
def _pieces(message: str) -> tuple[Part | str, ...]:
    """A message of a template as parts, with the names of slots in between."""
    pieces = [piece for piece in re.split(r"(<\|\w+\|>|\{\w+\})", message) if piece]
    return tuple(
        piece[1:-1] if piece.startswith("{") else Part(piece, "special" if piece.startswith("<|") else "fixed")
        for piece in pieces
    )


def prompt_ids(
    prompts: Sequence[Sequence[Part]], tokenizer: Any, max_length: int, names: Sequence[str] | None = None
) -> list[list[int]]:
    """Token ids of each prompt, at most `max_length` of them.

    Words between two special tokens are tokenised together, as a tokenizer given the whole string would, but a
    special token's name in them stays words. A prompt that is too long loses tokens of its instance's texts, from
    their end: the document's first, then the query's. A token that also holds characters of the template stays.

    Raises:
        ValueError: naming the prompt by `names` (default "prompt 0" ...), if more than `max_length` tokens are left
            once all of those are cut, because visual tokens or the instruction fill the context.

    Taught in notebooks/02.
    """
    grouped = [_grouped(parts) for parts in prompts]
    texts = list(dict.fromkeys(group for groups in grouped for group in groups if isinstance(group, str)))
    words = dict(zip(texts, _tokenize(tokenizer, texts), strict=True)) if texts else {}
    names_of_specials = {group[0] for groups in grouped for group in groups if not isinstance(group, str)}
    specials = {name: _special_id(tokenizer, name) for name in names_of_specials}
    rows = []
    for i, groups in enumerate(grouped):
        ids: list[int] = []
        for group in groups:
            ids += words[group] if isinstance(group, str) else [specials[group[0]]] * group[1]
        if len(ids) > max_length:
            ids = _shortened(prompts[i], tokenizer, max_length, names[i] if names else f"prompt {i}")
        rows.append(ids)
    return rows


def _grouped(parts: Sequence[Part]) -> list[str | tuple[str, int]]:
    """Special tokens as (name, times), with the words between them joined."""
    groups: list[str | tuple[str, int]] = []
    for part in parts:
        if part.role == "special":
            groups.append((part.text, part.times))
        elif groups and isinstance(groups[-1], str):
            groups[-1] += part.text
        elif part.text:
            groups.append(part.text)
    return groups


def _tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )["input_ids"]


def _special_id(tokenizer: Any, name: str) -> int:
    token = tokenizer.convert_tokens_to_ids(name)
    if token is None or token == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no special token {name}; use the tokenizer of a Qwen3-VL checkpoint")
    return token


def _shortened(parts: Sequence[Part], tokenizer: Any, max_length: int, name: str) -> list[int]:
    tokens = _tokens_with_roles(parts, tokenizer)
    excess = len(tokens) - max_length
    for role in CUT_ORDER:
        places = [i for i, (_, owner) in enumerate(tokens) if owner == role]
        cut = set(places[max(0, len(places) - excess) :])
        tokens = [token for i, token in enumerate(tokens) if i not in cut]
        excess -= len(cut)
        if excess == 0:
            return [token for token, _ in tokens]
    pads = ("<|image_pad|>", "<|video_pad|>")
    visual = sum(part.times for part in parts if part.role == "special" and part.text in pads)
    raise ValueError(
        f"{name}: {len(tokens)} tokens remain with all of its text cut, {visual} of them visual, and max_length is "
        f"{max_length}; lower the budgets of images and videos, shorten the instruction, or raise max_length"
    )


def _tokens_with_roles(parts: Sequence[Part], tokenizer: Any) -> list[tuple[int, str]]:
    """Each token with the role of the part that holds all of its characters; "fixed" where two parts share it."""
    tokens: list[tuple[int, str]] = []
    stretch: list[Part] = []

    def flush():
        text = prompt_text(stretch)
        if text:
            encoding = tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
            )
            owners = [part.role for part in stretch for _ in part.text]  # of each character
            for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
                roles = set(owners[start:end])
                tokens.append((token, roles.pop() if len(roles) == 1 else "fixed"))
        stretch.clear()

    for part in parts:
        if part.role == "special":
            flush()
            tokens.extend([(_special_id(tokenizer, part.text), "special")] * part.times)
        else:
            stretch.append(part)
    flush()
    return tokens
