"""Prompts of 32,768 tokens through both models, and visuals that do not fit beside each other."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from q3vl_mini import attention
from q3vl_mini.embedder import Embedder
from q3vl_mini.reranker import Reranker

LENGTH = 32_768
WORDS = "red cat then 12 green apples "


def ids_of(model, inputs):
    return [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def parts_of(model, make):
    """Token ids of a short prompt before and after the one word of its text."""
    [ids] = ids_of(model, make("~"))
    [at] = [i for i, token in enumerate(ids) if "~" in model.processor.tokenizer.decode([token])]
    return ids[:at], ids[at + 1 :]


def prompts(kind, small_checkpoint):
    model = kind(small_checkpoint, max_length=LENGTH)
    if kind is Embedder:
        return model, lambda text: model.collate([text]), lambda text: model.encode([text])
    return model, lambda text: model.collate([("cat", text)]), lambda text: model.logits([("cat", text)])


@pytest.mark.parametrize("kind", [Embedder, Reranker])
def test_of_a_text_that_is_too_long_its_own_end_is_cut_and_nothing_of_the_template(kind, small_checkpoint):
    model, collate, _ = prompts(kind, small_checkpoint)
    before, after = parts_of(model, collate)
    [ids] = ids_of(model, collate(WORDS * 8_000))
    assert len(ids) == LENGTH and ids[-len(after) :] == after
    assert ids[: len(before) - 1] == before[:-1]  # the last token before the text may have joined with its first
    special = set(model.processor.tokenizer.all_special_ids)
    assert [i for i in ids if i in special] == [i for i in before + after if i in special]
    inner = model.processor.tokenizer.decode(ids[len(before) + 1 : -len(after) - 1])
    assert inner in WORDS * 8_000 and len(inner) > 50_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Embedder, Reranker])
def test_32768_tokens_go_through_and_every_part_of_them_counts(kind, small_checkpoint):
    model, collate, compute = prompts(kind, small_checkpoint)
    text = WORDS * 8_000  # cut to fit
    [ids] = ids_of(model, collate(text))
    assert len(ids) == LENGTH
    seen = []
    model.backbone.model.model.language_model.register_forward_hook(lambda m, _, out: seen.append(out[0].shape[1]))
    out = compute(text)
    assert np.isfinite(out).all() and sum(seen) == LENGTH
    assert np.abs(out - compute("house " + text)).max() > 1e-6  # another first word
    [near] = ids_of(model, collate("house " + text))
    assert near != ids and near[-3:] == ids[-3:]


@pytest.mark.parametrize("length", [40, 80])
@pytest.mark.parametrize("kind", [Embedder, Reranker])
def test_attention_in_blocks_gives_the_numbers_of_attention_in_the_open(kind, length, small_checkpoint, monkeypatch):
    model = kind(small_checkpoint)
    texts = [WORDS * (length // 6), WORDS * 3, "red cat"]
    texts = texts if kind is Embedder else [("red cat", text) for text in texts]
    compute = model.encode if kind is Embedder else model.logits
    called = []
    open_, blocks = attention.eager_attention_forward, attention.sdpa_attention_forward
    monkeypatch.setattr(attention, "eager_attention_forward", lambda *a, **k: called.append("open") or open_(*a, **k))
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: called.append("blocks") or blocks(*a, **k))
    expected = compute(texts)
    assert set(called) == {"open"}
    monkeypatch.setattr(attention, "LONG", 0)
    called.clear()
    np.testing.assert_allclose(compute(texts), expected, atol=2e-5)
    assert set(called) == {"blocks"}


def test_a_batch_of_more_tokens_than_go_at_once_is_computed_in_parts(small_checkpoint, monkeypatch):
    from q3vl_mini import forward

    model = Embedder(small_checkpoint)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))
    items = ["a red cat", {"image": picture}, WORDS * 5, {"image": picture, "text": "12 apples"}]
    expected, sizes = model.encode(items), []
    monkeypatch.setattr(forward, "TOKENS_AT_ONCE", 60)
    plain = Embedder.forward
    monkeypatch.setattr(Embedder, "forward", lambda self, x: sizes.append(len(x["input_ids"])) or plain(self, x))
    np.testing.assert_allclose(model.encode(items), expected, atol=2e-5)
    assert len(sizes) > 1 and sum(sizes) == 4


def test_visuals_that_do_not_fit_beside_each_other_are_scaled_down_with_one_notice(small_checkpoint):
    model = Embedder(small_checkpoint, max_length=512)
    large = Image.fromarray(np.random.default_rng(0).integers(0, 255, (640, 640, 3), dtype=np.uint8))  # 400 tokens
    small = large.resize((64, 64))
    with warnings.catch_warnings(action="error"):
        for item in ({"image": small}, {"image": [small] * 20}, {"image": [small], "text": "words"}):
            model.collate([item])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            inputs = model.collate([{"image": [large, large, small]}])
    [notice] = said
    assert "share its 512 tokens" in str(notice.message) and "raise max_length" in str(notice.message)
    tokens = [visual.n_tokens for visual in inputs["visuals"]]
    assert inputs["input_ids"].shape[1] <= 512 and max(tokens) < 400 and tokens[2] == 4
    assert torch.isfinite(model(inputs)).all()
