"""reranker.py: margins against the model's own vocabulary logits, scores and ranking."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from q3vl_mini import tiny
from q3vl_mini.backbone import Backbone, add_lora, load, save
from q3vl_mini.forward import VisualStore, right_padded, shared_by_query, visuals_by_row
from q3vl_mini.records import Clip
from q3vl_mini.reranker import Reranker


def picture(seed: int, height: int = 64, width: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def film(seed: int) -> Clip:
    return Clip(np.random.default_rng(seed).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8), fps=1.0)


PAIRS = [
    ("a red cat", "a cat that is red"),
    ({"image": picture(0)}, "a picture of a cat"),
    ("find the picture", {"image": picture(1, 96, 128), "text": "green apples"}),
    ({"image": picture(2), "text": "the same in red"}, {"image": picture(3)}),
    ({"video": film(0)}, {"video": film(1), "image": [picture(4), picture(5)]}),
    ("", {}),
]


@pytest.fixture(scope="module")
def reranker(small_checkpoint):
    return Reranker(small_checkpoint, template="released")


@pytest.fixture(scope="module")
def margins(reranker):
    return reranker.logits(PAIRS)


def content(item):
    item = {"text": item} if isinstance(item, str) else item
    fields = {kind: item.get(kind, []) for kind in ("video", "image", "text")}
    return {kind: [x for x in (v if isinstance(v, list) else [v]) if x] for kind, v in fields.items()}


def test_logits_are_those_of_the_language_models_own_head(small_checkpoint, reranker, margins):
    """The released prompt by the chat template and processor, and logits of the whole vocabulary by transformers."""
    processor = AutoProcessor.from_pretrained(small_checkpoint)
    model = Qwen3VLForConditionalGeneration.from_pretrained(small_checkpoint, dtype=torch.float32).eval()
    yes, no = (processor.tokenizer.get_vocab()[word] for word in ("yes", "no"))
    system = (
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the "
        'answer can only be "yes" or "no".'
    )
    instruction = "Given a search query, retrieve relevant candidates that answer the query."
    both = reranker.yes_no_logits(PAIRS)
    for pair, margin, yes_and_no in zip(PAIRS, margins, both, strict=True):
        user, images, videos = [{"type": "text", "text": f"<Instruct>: {instruction}"}], [], []
        for prefix, item in zip(("<Query>:", "\n<Document>:"), pair, strict=True):
            fields = content(item)
            user += [{"type": "text", "text": prefix}]
            user += [{"type": kind} for kind in ("video", "image") for _ in fields[kind]]
            user += [{"type": "text", "text": text} for text in fields["text"]]
            if not any(fields.values()):
                user += [{"type": "text", "text": "NULL"}]
            images += fields["image"]
            videos += fields["video"]
        chat = [{"role": "system", "content": [{"type": "text", "text": system}]}, {"role": "user", "content": user}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
        media = {"images": images} if images else {}
        if videos:
            metadata = [{"fps": 1.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]} for _ in videos]
            frames = [torch.from_numpy(clip.frames).permute(0, 3, 1, 2) for clip in videos]
            media.update(videos=frames, video_metadata=metadata, do_sample_frames=False)
        with torch.no_grad():
            logits = model(**processor(text=[text], return_tensors="pt", **media)).logits[0, -1]
        assert margin == pytest.approx((logits[yes] - logits[no]).item(), abs=2e-5)
        np.testing.assert_allclose(yes_and_no, logits[[yes, no]], atol=2e-5)
    assert margins.std() > 0.01  # the pairs differ


def test_a_batch_of_one_and_a_batch_of_many_give_the_same_margins(reranker, margins):
    for batch_size in (1, 4):
        np.testing.assert_allclose(reranker.logits(PAIRS, batch_size=batch_size), margins, atol=1e-4)


def test_pairs_are_padded_on_the_left_and_the_right_gives_the_same(reranker, margins, monkeypatch):
    mask = reranker.collate(PAIRS)["attention_mask"]
    assert mask[:, -1].all() and not mask[:, 0].all()
    monkeypatch.setattr(reranker, "padding_side", "right")
    np.testing.assert_allclose(reranker.logits(PAIRS), margins, atol=1e-4)


def test_the_score_is_the_sigmoid_of_the_margin(reranker):
    documents = [document for _, document in PAIRS]
    scores = reranker.score("a red cat", documents)
    margins = reranker.logits([("a red cat", document) for document in documents])
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-margins)), rtol=1e-5)
    assert scores.dtype == np.float32 and ((0 < scores) & (scores < 1)).all()


def test_ranking_falls_and_names_positions(reranker):
    documents = ["a cat", "12 apples", {"image": picture(0)}, "yes", "a cat"]
    scores = reranker.score("a red cat", documents)
    ranking = reranker.rank("a red cat", documents)
    assert sorted(hit["corpus_id"] for hit in ranking) == [0, 1, 2, 3, 4]
    assert [hit["score"] for hit in ranking] == sorted((float(s) for s in scores), reverse=True)
    assert all(hit["score"] == pytest.approx(float(scores[hit["corpus_id"]])) for hit in ranking)
    assert reranker.rank("a red cat", documents, top_k=2) == ranking[:2]
    assert reranker.rank("a red cat", []) == []


def test_query_and_document_are_not_symmetric(reranker):
    there, back = reranker.logits([("a red cat", "12 apples"), ("12 apples", "a red cat")])
    assert abs(there - back) > 1e-3


def test_the_querys_own_instruction_comes_first(reranker):
    own = {"text": "a cat", "instruction": "Match"}
    one, two = reranker.logits([(own, "a dog"), ("a cat", "a dog")], instruction="Find it")
    assert one == pytest.approx(reranker.logits([("a cat", "a dog")], "Match")[0], abs=1e-5)
    assert two == pytest.approx(reranker.logits([("a cat", "a dog")], "Find it")[0], abs=1e-5)
    documents = reranker.logits([("a cat", "a dog"), ("a cat", {"text": "a dog", "instruction": "Match"})])
    assert documents[0] == pytest.approx(documents[1], abs=1e-5)  # a document's is not read
    assert abs(one - two) > 1e-4


def test_the_checkpoint_records_its_template_and_an_override_wins(small_checkpoint, tmp_path):
    report = Reranker(small_checkpoint, template="report")
    save(tmp_path / "r", report.model, report.processor, report.card)
    recorded, overridden = Reranker(tmp_path / "r"), Reranker(tmp_path / "r", template="released")
    assert (recorded.template, overridden.template) == ("report", "released")
    assert recorded.logits(PAIRS[:1]) == pytest.approx(report.logits(PAIRS[:1]), abs=1e-5)
    assert abs(recorded.logits(PAIRS[:1]) - overridden.logits(PAIRS[:1])) > 1e-3


def test_the_other_role_is_refused(small_checkpoint, tmp_path):
    loaded = load(small_checkpoint)
    save(tmp_path / "s0", loaded.model, loaded.processor, {"role": "embedder", "template": "report"})
    with pytest.raises(ValueError, match="role 'embedder', not 'reranker'"):
        Reranker(tmp_path / "s0")


def test_a_long_document_is_cut_and_the_question_stays(small_checkpoint):
    short = Reranker(small_checkpoint, template="report", max_length=220)
    inputs = short.collate([("a red cat", "word " * 500)])
    text = short.processor.tokenizer.decode(inputs["input_ids"][0])
    assert inputs["input_ids"].shape[1] == 220
    assert "<Query>: a red cat\n<Document>: word" in text and text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_forward_gives_the_margins_with_gradient(small_checkpoint):
    backbone = load(small_checkpoint)
    backbone.model = add_lora(backbone.model)
    reranker = Reranker.from_backbone(backbone, template="released", store=VisualStore())
    out = reranker(reranker.collate(PAIRS))
    np.testing.assert_allclose(out.detach(), reranker.logits(PAIRS), atol=1e-4)
    labels = torch.tensor([1.0, 0, 1, 0, 1, 0])
    torch.nn.functional.binary_cross_entropy_with_logits(out, labels).backward()
    lora = [p for name, p in reranker.model.named_parameters() if "lora_B" in name]
    assert len(lora) == 12 and all(p.grad.abs().max() > 0 for p in lora)
    assert reranker.model.get_base_model().lm_head.weight.grad is None


def several_documents_a_query():
    """Pairs in no order: three queries, of which two have pictures, with documents of words, pictures and clips."""
    queries = ["find the picture", {"image": picture(2), "text": "in red"}, {"video": film(0)}]
    documents = [{"image": picture(3)}, {"image": picture(4)}, "a cat", "a cat that is red", {"video": film(1)}]
    pairs = [(query, document) for document in documents for query in queries]
    return [*pairs, (queries[1], {"image": [picture(5), picture(6)], "text": "both"})]


def test_what_a_query_shares_with_all_its_documents_changes_neither_margins_nor_gradients(small_checkpoint):
    backbone = load(small_checkpoint)
    backbone.model = add_lora(backbone.model)
    for name, parameter in backbone.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    reranker = Reranker.from_backbone(backbone, template="released")
    pairs, calls = several_documents_a_query(), []
    hook = reranker.model.get_base_model().model.register_forward_hook(lambda *x: calls.append(x))

    def margins_and_gradients(together: bool):
        calls.clear()
        reranker.zero_grad()
        parts = [pairs] if together else [[pair] for pair in pairs]
        margins = torch.cat([reranker(reranker.collate(part, "Find it.")) for part in parts])
        torch.manual_seed(1)
        (margins * torch.randn(len(pairs))).sum().backward()
        return margins.detach(), {n: p.grad.clone() for n, p in reranker.named_parameters() if p.requires_grad}

    expected, expected_gradients = margins_and_gradients(together=False)
    margins, gradients = margins_and_gradients(together=True)
    hook.remove()
    assert len(calls) < len(pairs)
    torch.testing.assert_close(margins, expected, rtol=1e-4, atol=1e-5)
    for parameter, gradient in expected_gradients.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(gradients[parameter] / scale, gradient / scale, rtol=0, atol=1e-4, msg=parameter)


def test_a_query_shares_what_its_documents_begin_with_too_but_none_of_their_pictures(reranker):
    decode = reranker.processor.tokenizer.decode

    def shared(documents):
        inputs = right_padded(reranker.collate([(query, x) for query in queries for x in documents]))
        lengths = shared_by_query(inputs, visuals_by_row(inputs))
        return [decode(inputs["input_ids"][i * len(documents)][: lengths[i]]) for i in range(len(queries))]

    queries = [{"text": "what is red"}, {"image": picture(0), "text": "what is red"}]
    assert all(text.endswith("<Document>:a cat") for text in shared(["a cat", "a cat that is red"]))
    words, image = shared([{"image": picture(1)}, {"image": picture(2)}])
    assert words.endswith("<Document>:<|vision_start|>") and image.endswith("<Document>:<|vision_start|>")
    assert "<|image_pad|>" not in words and "<|image_pad|>" in image


def test_equal_pairs_leave_a_token_of_each_to_compute(reranker):
    query = {"text": "a cat"}
    pairs = [(query, "a cat"), (query, "a cat"), ({"text": "a dog"}, "a cat")]
    margins = reranker.forward(reranker.collate(pairs)).detach().numpy()
    assert margins[0] == pytest.approx(margins[1], abs=1e-5)
    np.testing.assert_allclose(margins[2:], reranker.logits(pairs[2:]), atol=1e-5)


def test_queries_of_equal_words_are_kept_apart_and_need_no_token_of_their_own(reranker):
    pairs = [(query, document) for query in ({"text": "red"}, {"text": "red"}) for document in ("a cat", "dogs")]
    margins = reranker.forward(reranker.collate(pairs)).detach().numpy()
    one_by_one = [reranker.logits([pair])[0] for pair in pairs]
    np.testing.assert_allclose(margins, one_by_one, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the pictures and videos of a prompt share")
def test_a_query_whose_picture_is_made_smaller_beside_a_large_document_shares_nothing_there(small_checkpoint):
    reranker = Reranker(small_checkpoint, template="released", max_length=300)
    query, other = {"image": picture(0, 256, 256)}, {"text": "a cat"}
    large = {"image": [picture(i, 256, 256) for i in (1, 2, 3)]}
    pairs = [(query, "a cat"), (query, large), (other, "dogs"), (query, "x")]
    inputs = reranker.collate(pairs)
    assert [number for number, _ in inputs["queries"]] == [0, 1, 2, 0]
    one_by_one = [reranker.logits([pair])[0] for pair in pairs]
    np.testing.assert_allclose(reranker.forward(inputs).detach(), one_by_one, atol=1e-5)


def test_errors_name_the_pair_and_the_side(reranker):
    with pytest.raises(ValueError, match="pair 1, document, image 0: there is no file"):
        reranker.logits([PAIRS[0], ("a cat", {"image": "gone.png"})])
    with pytest.raises(ValueError, match="pair 0, query: unknown keys"):
        reranker.logits([({"picture": 1}, "a cat")])
    with pytest.raises(ValueError, match=r"write \[document\]"):
        reranker.score("a cat", "a dog")


def test_a_tokenizer_without_yes_or_no_is_refused(small_checkpoint):
    tokenizer = tiny.train_tokenizer(["yes"] * 9, vocab_size=300)
    model = load(small_checkpoint).model
    with pytest.raises(ValueError, match="splits 'no' into 2 tokens; a reranker needs it whole"):
        Reranker.from_backbone(Backbone(model, tiny.make_processor(tokenizer), {"template": "report"}))
