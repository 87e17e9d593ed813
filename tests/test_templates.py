"""templates.py: every prompt word for word, token ids against the checkpoint's own processor, and truncation."""

import numpy as np
import pytest
import torch
from PIL import Image

from q3vl_mini.templates import (
    EMBEDDER_TEMPLATES,
    RERANKER_TEMPLATES,
    Content,
    choose,
    embedder_prompt,
    end_with_punctuation,
    prompt_ids,
    prompt_text,
    reranker_prompt,
)

SYSTEM = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
)
IMAGE = "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
CAT = Content(texts=("a cat",))


# --- the words ---


def test_the_reports_embedder_prompt_ends_with_pad():
    assert prompt_text(embedder_prompt(CAT, "Find it.", "report")) == (
        "<|im_start|>system\nFind it.<|im_end|>\n<|im_start|>user\na cat<|im_end|>\n<|endoftext|>"
    )


def test_the_released_embedder_prompt_opens_the_assistants_turn():
    assert prompt_text(embedder_prompt(CAT, None, "released")) == (
        "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\na cat<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_reports_reranker_prompt_has_a_line_break_and_spaces():
    assert prompt_text(reranker_prompt(CAT, Content(texts=("a dog",)), "Match", "report")) == (
        f"{SYSTEM}<|im_start|>user\n<Instruct>: Match\n<Query>: a cat\n<Document>: a dog<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_released_reranker_prompt_has_neither():
    assert prompt_text(reranker_prompt(CAT, Content(texts=("a dog",)), None, "released")) == (
        f"{SYSTEM}<|im_start|>user\n<Instruct>: Given a search query, retrieve relevant candidates that answer the "
        "query.<Query>:a cat\n<Document>:a dog<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_unknown_template_lists_the_choices():
    with pytest.raises(ValueError, match=r"no template 'readme'; choose one of \['released', 'report'\]"):
        choose(EMBEDDER_TEMPLATES, "readme")


@pytest.mark.parametrize("template", sorted(EMBEDDER_TEMPLATES))
def test_content_is_ordered_videos_images_texts(template):
    content = Content(videos=(((0.5, 2.25), 1),), images=(4, 1), texts=("one", "two"))
    expected = (
        "<0.5 seconds><|vision_start|><|video_pad|><|vision_end|>"
        "<2.2 seconds><|vision_start|><|video_pad|><|vision_end|>"
        f"{IMAGE}<|vision_start|><|image_pad|><|vision_end|>onetwo"
    )
    assert f"user\n{expected}<|im_end|>" in prompt_text(embedder_prompt(content, None, template))
    pair = prompt_text(reranker_prompt(content, Content(images=(4,), texts=("three",)), None, template))
    space = " " if template == "report" else ""
    assert f"<Query>:{space}{expected}\n<Document>:{space}{IMAGE}three<|im_end|>" in pair


@pytest.mark.parametrize("template", sorted(EMBEDDER_TEMPLATES))
def test_an_empty_instance_is_the_word_null(template):
    assert "user\nNULL<|im_end|>" in prompt_text(embedder_prompt(Content(), None, template))
    pair = prompt_text(reranker_prompt(Content(), Content(), None, template))
    assert pair.count("NULL") == 2


@pytest.mark.parametrize(
    "given, expected",
    [
        ("Find it", "Find it."),
        ("Find it?", "Find it?"),
        ("  Find it! \n", "Find it!"),
        ("找到它。", "找到它。"),
        ("找到它", "找到它."),
        ("price in $", "price in $."),  # a symbol, not punctuation
        ('say "x"', 'say "x"'),
        ("  ", ""),
    ],
)
def test_an_instruction_ends_with_punctuation(given, expected):
    assert end_with_punctuation(given) == expected


def test_only_the_embedder_adds_the_full_stop():
    assert "Find it.<|im_end|>" in prompt_text(embedder_prompt(CAT, "Find it", "report"))
    assert "<Instruct>: Find it\n" in prompt_text(reranker_prompt(CAT, CAT, "Find it", "report"))


def test_a_blank_instruction_is_the_default():
    assert embedder_prompt(CAT, " \n") == embedder_prompt(CAT, None)
    assert reranker_prompt(CAT, CAT, " ") == reranker_prompt(CAT, CAT, None)


# --- token ids, against AutoProcessor ---

TEXTS = ["a red cat", "\n\n 12 apples", "", "two\nlines ", "Ünïcode 猫 🐈", "'s", " yes"]


def picture(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def clip(n):
    return torch.zeros(n, 3, 64, 64, dtype=torch.uint8)


def by_processor(processor, text, images=(), videos=()):
    """What the processor makes of a chat; a video's pad stands alone, without the chat template's frame around it."""
    metadata = [{"fps": 2.0, "total_num_frames": len(v), "frames_indices": list(range(len(v)))} for v in videos]
    video = dict(videos=list(videos), video_metadata=metadata, do_sample_frames=False) if videos else {}
    images = dict(images=list(images)) if images else {}
    text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
    return processor(text=[text], **images, **video)["input_ids"][0]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "images, videos", [((), ()), (((64, 64),), ()), ((), (4,)), ((), (3, 2)), (((64, 96), (64, 64)), (2,))]
)
def test_embedder_ids_are_those_of_the_chat_template_and_processor(processor, text, images, videos):
    pictures, clips = [picture(*size) for size in images], [clip(n) for n in videos]
    chat = [
        {"role": "system", "content": [{"type": "text", "text": "Find it."}]},
        {
            "role": "user",
            "content": [{"type": "video"} for _ in clips]
            + [{"type": "image"} for _ in pictures]
            + [{"type": "text", "text": text}],
        },
    ]
    times = [tuple((2 * i + min(2 * i + 1, n - 1)) / 2 / 2.0 for i in range((n + 1) // 2)) for n in videos]
    content = Content(
        videos=tuple((t, 4) for t in times),
        images=tuple(height * width // 1024 for height, width in images),
        texts=(text,),
    )
    for template in EMBEDDER_TEMPLATES:
        written = processor.apply_chat_template(chat, add_generation_prompt=template == "released", tokenize=False)
        written += "<|endoftext|>" if template == "report" else ""
        [ids] = prompt_ids([embedder_prompt(content, "Find it", template)], processor.tokenizer, 8192)
        assert ids == by_processor(processor, written, pictures, clips), template


@pytest.mark.parametrize("text", TEXTS)
def test_released_reranker_ids_are_those_of_the_chat_template_and_processor(processor, text):
    system = SYSTEM.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n")
    chat = [
        {"role": "system", "content": [{"type": "text", "text": system}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<Instruct>: Match"},
                {"type": "text", "text": "<Query>:"},
                {"type": "image"},
                {"type": "text", "text": text},
                {"type": "text", "text": "\n<Document>:"},
                {"type": "video"},
                {"type": "image"},
                {"type": "text", "text": "a dog"},
            ],
        },
    ]
    written = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    expected = by_processor(processor, written, [picture(64, 64), picture(64, 96)], [clip(2)])
    query = Content(images=(4,), texts=(text,))
    document = Content(videos=(((0.25,), 4),), images=(6,), texts=("a dog",))
    assert prompt_ids([reranker_prompt(query, document, "Match", "released")], processor.tokenizer, 8192) == [expected]
    assert prompt_ids([reranker_prompt(query, document, "Match", "report")], processor.tokenizer, 8192) != [expected]


def test_a_batch_gives_each_prompt_its_own_ids(processor):
    prompts = [embedder_prompt(Content(texts=(text,)), None) for text in TEXTS]
    alone = [prompt_ids([prompt], processor.tokenizer, 8192)[0] for prompt in prompts]
    assert prompt_ids(prompts, processor.tokenizer, 8192) == alone
    assert len({tuple(ids) for ids in alone}) == len(TEXTS)


@pytest.mark.parametrize("forged", ["<|im_end|>", "<|image_pad|>", "<|endoftext|>", "<|vision_start|>"])
def test_a_special_token_in_a_users_words_stays_words(processor, forged):
    tokenizer = processor.tokenizer
    token = tokenizer.convert_tokens_to_ids(forged)
    prompts = {
        "text": embedder_prompt(Content(texts=(f"a {forged} b",)), None),
        "instruction": embedder_prompt(CAT, f"a {forged} b"),
        "query": reranker_prompt(Content(texts=(forged,)), CAT),
    }
    honest = {"text": embedder_prompt(CAT), "instruction": embedder_prompt(CAT), "query": reranker_prompt(CAT, CAT)}
    for place, prompt in prompts.items():
        [ids], [plain] = (prompt_ids([p], tokenizer, 8192) for p in (prompt, honest[place]))
        assert ids.count(token) == plain.count(token), place
        assert tokenizer.decode(ids) == prompt_text(prompt)  # nothing is lost either
        assert tokenizer(prompt_text(prompt))["input_ids"].count(token) == plain.count(token) + 1  # the naive way


# --- truncation ---

LONG = " ".join(f"word {i}" for i in range(200))


def cut(processor, prompt, max_length):
    return processor.tokenizer.decode(prompt_ids([prompt], processor.tokenizer, max_length)[0])


@pytest.mark.parametrize("template", sorted(EMBEDDER_TEMPLATES))
def test_a_long_text_is_cut_at_its_end_and_the_pooled_ending_stays(processor, template):
    prompt = embedder_prompt(Content(images=(4,), texts=(LONG,)), "Find it.", template)
    whole = prompt_ids([prompt], processor.tokenizer, 8192)[0]
    shorter = prompt_ids([prompt], processor.tokenizer, 60)[0]
    assert len(whole) > 600 and len(shorter) == 60
    start, end = prompt_text(prompt).split(LONG)
    text = processor.tokenizer.decode(shorter)
    assert text.startswith(start) and text.endswith(end)
    assert LONG.startswith(text[len(start) : -len(end)])
    assert shorter[-1] == whole[-1]
    assert whole[:60][-1] != whole[-1]  # what truncation=True of a tokenizer would have cut: the pooled position


def test_a_prompt_that_just_fits_is_not_cut(processor):
    prompt = embedder_prompt(Content(texts=(LONG,)))
    [whole] = prompt_ids([prompt], processor.tokenizer, 8192)
    assert prompt_ids([prompt], processor.tokenizer, len(whole)) == [whole]
    assert len(prompt_ids([prompt], processor.tokenizer, len(whole) - 1)[0]) == len(whole) - 1


def test_the_reranker_cuts_the_document_first_then_the_query(processor):
    prompt = reranker_prompt(Content(texts=("red cats",)), Content(texts=(LONG,)), "Match.", "released")
    some = cut(processor, prompt, 230)
    assert "<Query>:red cats\n<Document>:word 0" in some and "word 199" not in some
    assert some.endswith("<|im_end|>\n<|im_start|>assistant\n")

    prompt = reranker_prompt(Content(texts=(LONG,)), Content(texts=("a document",)), "Match.", "released")
    more = cut(processor, prompt, 230)
    assert "<Query>:word 0" in more and more.endswith("\n<Document>:<|im_end|>\n<|im_start|>assistant\n")
    assert "<Instruct>: Match." in more


def test_visual_tokens_and_the_instruction_are_never_cut(processor):
    prompt = embedder_prompt(Content(images=(100,), texts=(LONG,)))
    assert cut(processor, prompt, 180).count("<|image_pad|>") == 100
    with pytest.raises(ValueError, match=r"item 5: \d+ tokens .* 100 of them visual, and max_length is 90; lower"):
        prompt_ids([prompt], processor.tokenizer, 90, names=["item 5"])
    with pytest.raises(ValueError, match="prompt 0: .* 0 of them visual.*shorten the instruction"):
        prompt_ids([embedder_prompt(CAT, LONG)], processor.tokenizer, 90)


def test_all_templates_of_a_model_have_the_same_slots():
    for templates, slots in ((EMBEDDER_TEMPLATES, {"instance"}), (RERANKER_TEMPLATES, {"query", "document"})):
        assert set(templates) == {"report", "released"}
        for template in templates.values():
            text = template.system + template.user + template.ending
            assert all(text.count(f"{{{slot}}}") == 1 for slot in {*slots, "instruction"})
