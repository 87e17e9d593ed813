"""chat_template.py: what Jinja writes is the prompt of templates.py."""

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from q3vl_mini.chat_template import IMAGE, VIDEO, VIDEO_IN_VLLM, chat_template
from q3vl_mini.templates import Content, embedder_prompt, prompt_text, reranker_prompt

TEMPLATES = ("report", "released")
PAIR = ((0.5,), 1)  # a video of one frame pair with one token
AS_FRAMES = "<0.5 seconds><|vision_start|><|video_pad|><|vision_end|>"  # what a processor makes of it
IMAGE_PART, VIDEO_PART = {"type": "image"}, {"type": "video", "video": "film.mp4"}


def text(words):
    return {"type": "text", "text": words}


# A message's content, and the same as templates.py has it.
CONTENTS = [
    ("12 green apples\n and a cat ", Content(texts=("12 green apples\n and a cat ",))),
    ([text("a cat")], Content(texts=("a cat",))),
    ([text("after"), IMAGE_PART, VIDEO_PART, {"image": "cat.png"}], Content((PAIR,), (1, 1), ("after",))),
    ([text("one"), text(" \n"), text(" two")], Content(texts=("one", " two"))),
    ([IMAGE_PART], Content(images=(1,))),
    ("  ", Content()),
    ([], Content()),
    ([text("")], Content()),
    ("{{ messages }} {%- if %}", Content(texts=("{{ messages }} {%- if %}",))),
]
INSTRUCTIONS = [None, "", " \n", "Find it", "Find it.", "  Find 3 ", "Suche es?", 'Find "it"', "查找图片", "查找图片。"]


def render(source, messages, **variables):
    """As transformers and vLLM do; neither says for sure whether a generation prompt is wanted."""
    written = {
        _compile_jinja_template(source).render(messages=messages, add_generation_prompt=ask, **variables)
        for ask in (True, False)
    }
    assert len(written) == 1
    return written.pop()


def system(instruction):
    return [] if instruction is None else [{"role": "system", "content": [text(instruction)]}]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_an_embedders_prompt(template, instruction):
    source = chat_template("embedder", template)
    for content, same in CONTENTS:
        expected = prompt_text(embedder_prompt(same, instruction, template)).replace(AS_FRAMES, VIDEO)
        assert render(source, [*system(instruction), {"role": "user", "content": content}]) == expected


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_a_rerankers_prompt(template, instruction):
    source = chat_template("reranker", template)
    for (query, q), (document, d) in zip(CONTENTS, reversed(CONTENTS), strict=True):
        expected = prompt_text(reranker_prompt(q, d, instruction, template)).replace(AS_FRAMES, VIDEO)
        pair = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        assert render(source, [*system(instruction), *pair]) == expected


def test_vllm_gives_the_instruction_as_a_variable_and_wants_a_video_between_its_marks():
    source = chat_template("reranker", "released", VIDEO_IN_VLLM)
    pair = [{"role": "query", "content": "a cat"}, {"role": "document", "content": [VIDEO_PART, IMAGE_PART]}]
    assert render(source, pair, instruction="Find it").endswith(
        f"<Instruct>: Find it<Query>:a cat\n<Document>:{VIDEO_IN_VLLM}{IMAGE}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_full_stop_follows_letters_and_digits_only():
    source = chat_template("embedder", "report")
    message = {"role": "user", "content": "a cat"}
    for ending in ("$", "€", "🙂"):  # where templates.py, whose rule is "anything but punctuation", would add one
        instruction = f"Find it {ending}"
        written = render(source, [*system(instruction), message])
        assert f"system\n{instruction}<|im_end|>" in written
        assert written != prompt_text(embedder_prompt(Content(texts=("a cat",)), instruction, "report"))


def test_an_unknown_template_is_refused():
    with pytest.raises(ValueError, match="no template 'readme'"):
        chat_template("embedder", "readme")
