"""embedder.py: pooling, batching, instructions, precision, and the vectors of other libraries."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from q3vl_mini.backbone import add_lora, load, save
from q3vl_mini.compression import Quantizers, pack_binary, truncate, unpack_binary
from q3vl_mini.embedder import Embedder
from q3vl_mini.forward import VisualStore, forward_hidden, visual_outputs
from q3vl_mini.media import MediaBudget
from q3vl_mini.records import Clip


def picture(seed: int, height: int = 64, width: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def film(seed: int, frames: int = 4) -> Clip:
    return Clip(np.random.default_rng(seed).integers(0, 256, (frames, 64, 64, 3), dtype=np.uint8), fps=1.0)


ITEMS = [
    "a red cat",
    {"text": ["12 apples", " are green"]},
    {"image": picture(0)},
    {"image": picture(1, 96, 128), "text": "what is this?"},
    {"image": [picture(2), picture(3)]},
    {"video": film(0)},
    {"video": [film(1, 2), film(2, 3)], "image": picture(4), "text": "a film"},
    "",
]


@pytest.fixture(scope="module")
def embedder(small_checkpoint):
    return Embedder(small_checkpoint, template="report")


@pytest.fixture(scope="module")
def vectors(embedder):
    return embedder.encode(ITEMS)


def test_embeddings_are_unit_vectors_that_differ(vectors):
    assert vectors.shape == (len(ITEMS), 64) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    cosines = vectors @ vectors.T - np.eye(len(ITEMS))
    assert cosines.max() < 0.9999


def test_a_video_is_sampled_as_in_training_which_the_card_records(small_checkpoint, tmp_path):
    base = load(small_checkpoint)
    card = {"role": "embedder", "template": "report", "fps": 2.0}
    save(tmp_path / "dense", add_lora(base.model), base.processor, card)
    dense, sparse = Embedder(tmp_path / "dense"), Embedder(small_checkpoint)
    seconds = Clip(film(0, 8).frames, fps=4.0)  # two seconds
    pairs = [model.collate([{"video": seconds}])["video_grid_thw"][0, 0] for model in (dense, sparse)]
    assert pairs == [2, 1]  # four frames and two
    assert Embedder(tmp_path / "dense", budget=MediaBudget()).budget.fps == 1.0


def test_a_batch_of_one_and_a_batch_of_many_give_the_same_vectors(embedder, vectors):
    for batch_size in (1, 3, 8):
        np.testing.assert_allclose(embedder.encode(ITEMS, batch_size=batch_size), vectors, atol=1e-5)
    alone = np.concatenate([embedder.encode([item]) for item in ITEMS])
    np.testing.assert_allclose(alone, vectors, atol=1e-5)


def test_the_padding_side_does_not_matter(embedder, vectors, monkeypatch):
    monkeypatch.setattr(embedder, "padding_side", "left")
    inputs = embedder.collate(ITEMS)
    assert not inputs["attention_mask"].bool().all() and inputs["attention_mask"][:, -1].all()
    np.testing.assert_allclose(embedder.encode(ITEMS), vectors, atol=1e-5)


def test_the_embedding_is_the_last_state_after_the_final_norm(embedder, vectors):
    inputs = embedder.collate(ITEMS)
    core = embedder.model.model
    before = []
    hook = core.language_model.norm.register_forward_pre_hook(lambda module, args: before.append(args[0]))
    with torch.no_grad():
        after = forward_hidden(embedder.model, inputs, visual_outputs(embedder.model, inputs["visuals"]))
    hook.remove()
    last = inputs["attention_mask"].sum(1) - 1  # padded on the right
    rows = torch.arange(len(ITEMS))
    np.testing.assert_allclose(F.normalize(after[rows, last], dim=-1), vectors, atol=1e-5)
    pre_norm = F.normalize(before[0][rows, last], dim=-1)  # hidden_states[-1] of some implementations
    assert np.abs(pre_norm.numpy() - vectors).max() > 0.05


def plain_vectors(folder, template, items):
    """The embeddings by transformers alone: its processor, chat template and forward. Videos are sampled already."""
    processor = AutoProcessor.from_pretrained(folder)
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for item in items:
        item = {"text": item} if isinstance(item, str) else item
        fields = {kind: item.get(kind, []) for kind in ("video", "image", "text")}
        fields = {kind: x if isinstance(x, list) else [x] for kind, x in fields.items()}
        user = [{"type": "video"} for _ in fields["video"]] + [{"type": "image"} for _ in fields["image"]]
        user += [{"type": "text", "text": text} for text in fields["text"]]
        system = [{"type": "text", "text": item.get("instruction", "Represent the user's input.")}]
        chat = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        text = processor.apply_chat_template(chat, add_generation_prompt=template == "released", tokenize=False)
        text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
        text += "<|endoftext|>" if template == "report" else ""
        media = {"images": fields["image"]} if fields["image"] else {}
        if fields["video"]:
            n_frames = [len(clip.frames) for clip in fields["video"]]
            metadata = [{"fps": 1.0, "total_num_frames": n, "frames_indices": list(range(n))} for n in n_frames]
            frames = [torch.from_numpy(clip.frames).permute(0, 3, 1, 2) for clip in fields["video"]]
            media.update(videos=frames, video_metadata=metadata, do_sample_frames=False)
        inputs = processor(text=[text], return_tensors="pt", **media)
        with torch.no_grad():
            rows.append(F.normalize(model.model(**inputs).last_hidden_state[0, -1], dim=-1).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("template", ["report", "released"])
def test_vectors_are_those_of_plain_transformers(small_checkpoint, template):
    items = [*ITEMS[:-1], {"text": "a red cat", "instruction": "Find it."}]
    ours = Embedder(small_checkpoint, template=template).encode(items)
    np.testing.assert_allclose(ours, plain_vectors(small_checkpoint, template, items), atol=1e-5)


# --- templates, instructions, cards ---


def test_the_checkpoint_records_its_template_and_an_override_wins(small_checkpoint, tmp_path):
    report = Embedder(small_checkpoint, template="report")
    save(tmp_path / "s0", report.model, report.processor, report.card)
    recorded, overridden = Embedder(tmp_path / "s0"), Embedder(tmp_path / "s0", template="released")
    assert recorded.template == "report" and overridden.template == "released"
    assert overridden.card["template"] == "released"  # and saving records it
    np.testing.assert_allclose(recorded.encode(["a cat"]), report.encode(["a cat"]), atol=1e-6)
    assert np.abs(overridden.encode(["a cat"]) - report.encode(["a cat"])).max() > 0.01


def test_an_items_own_instruction_comes_first(embedder):
    items = ["a cat", {"text": "a cat", "instruction": "Match."}]
    own = embedder.encode(items, instruction="Find it")
    np.testing.assert_allclose(own[0], embedder.encode(["a cat"], instruction="Find it.")[0], atol=1e-6)
    np.testing.assert_allclose(own[1], embedder.encode(["a cat"], instruction="Match")[0], atol=1e-6)
    default = embedder.encode(items)
    np.testing.assert_allclose(default[0], embedder.encode(["a cat"], "Represent the user's input.")[0], atol=1e-6)
    assert np.abs(own[0] - default[0]).max() > 0.01 and np.abs(own[0] - own[1]).max() > 0.01


def test_content_order_is_fixed_whatever_the_order_of_keys(embedder):
    one, two = {"image": picture(0), "text": "a cat"}, {"text": "a cat", "image": picture(0)}
    np.testing.assert_allclose(*embedder.encode([one, two]), atol=1e-6)


def test_an_empty_item_is_null(embedder):
    np.testing.assert_allclose(*embedder.encode(["", "NULL"]), atol=1e-6)
    assert np.array_equal(embedder.encode([{"text": " ", "image": []}]), embedder.encode([{}]))


def test_a_long_text_keeps_its_pooled_ending(small_checkpoint):
    short = Embedder(small_checkpoint, template="report", max_length=64)
    inputs = short.collate(["word " * 500, "a cat"])
    assert inputs["input_ids"].shape[1] == 64
    assert inputs["input_ids"][0, -1] == short.processor.tokenizer.pad_token_id  # <|endoftext|>, attended
    assert inputs["attention_mask"][0, -1] == 1


def test_the_other_role_is_refused(small_checkpoint, tmp_path):
    loaded = load(small_checkpoint)
    save(tmp_path / "r", loaded.model, loaded.processor, {"role": "reranker", "template": "report"})
    with pytest.raises(ValueError, match="role 'reranker', not 'embedder'"):
        Embedder(tmp_path / "r")


# --- encode ---


def test_results_keep_the_order_of_items(embedder):
    texts = [f"{'cat ' * (i % 5)}{i}" for i in range(11)]
    together = embedder.encode(texts, batch_size=4)
    for i, text in enumerate(texts):
        np.testing.assert_allclose(together[i], embedder.encode([text])[0], atol=1e-5)


def test_batches_hold_items_of_similar_length(embedder, monkeypatch):
    widths, collate = [], embedder.collate
    monkeypatch.setattr(embedder, "collate", lambda *a: widths.append(collate(*a)["input_ids"].shape[1]) or collate(*a))
    embedder.encode(["cat " * n for n in (1, 40, 2, 41, 3, 42)], batch_size=3)
    assert len(widths) == 2 and widths[0] > widths[1] + 30  # the longest first


def test_an_object_that_occurs_twice_is_computed_once(embedder, monkeypatch):
    rows, collate = [], embedder.collate
    monkeypatch.setattr(embedder, "collate", lambda items, *a: rows.extend(items) or collate(items, *a))
    item = {"image": picture(0)}
    vectors = embedder.encode([item, "a cat", item, item])
    assert len(rows) == 2
    assert np.array_equal(vectors[0], vectors[2]) and not np.array_equal(vectors[0], vectors[1])


def test_nothing_gives_no_rows(embedder):
    assert embedder.encode([]).shape == (0, 64)
    assert embedder.encode([], precision="binary").shape == (0, 8)


def test_errors_name_the_item_by_its_place_in_the_call(embedder):
    with pytest.raises(ValueError, match="item 2, image 0: there is no file"):
        embedder.encode(["a cat", "a very long text " * 9, {"image": "gone.png"}], batch_size=1)
    with pytest.raises(ValueError, match=r"write \[item\]"):
        embedder.encode("a cat")
    with pytest.raises(ValueError, match="no precision 'int4'; choose one of"):
        embedder.encode(["a cat"], precision="int4")


def test_encode_leaves_the_mode_of_training_as_it_was(embedder):
    embedder.train()
    embedder.encode(["a cat"])
    assert embedder.training and embedder.model.training
    embedder.eval()
    embedder.encode(["a cat"])
    assert not embedder.training


def test_forward_gives_encodes_vectors_with_gradient(small_checkpoint):
    backbone = load(small_checkpoint)
    backbone.model = add_lora(backbone.model)
    embedder = Embedder.from_backbone(backbone, template="report", store=VisualStore())
    out = embedder(embedder.collate(ITEMS))
    assert out.requires_grad and out.dtype == torch.float32
    np.testing.assert_allclose(out.detach(), embedder.encode(ITEMS), atol=1e-5)


def test_autocast_computes_in_half_precision_and_returns_float32(small_checkpoint, vectors):
    half = Embedder(small_checkpoint, template="report", autocast=torch.bfloat16)
    out = half(half.collate(ITEMS))
    assert out.dtype == torch.float32
    difference = np.abs(out.detach().numpy() - vectors).max()
    assert 1e-5 < difference < 0.1


def test_a_vector_that_is_not_finite_names_its_item(small_checkpoint):
    embedder = Embedder(small_checkpoint)
    mine, others = (set(embedder.collate([text])["input_ids"][0].tolist()) for text in ("12", "x cat"))
    broken = max(mine - others)
    with torch.no_grad():
        embedder.model.get_input_embeddings().weight[broken] = float("nan")
    assert np.isfinite(embedder.encode(["x", "cat"])).all()
    with pytest.raises(ValueError, match="item 1: the model's output is NaN or infinite; .*float32"):
        embedder.encode(["x", "12", "cat"])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(batch_size=0), "batch_size is 0"),
        (dict(dim=0), "dim is 0; this model has 1 to 64"),
        (dict(dim=65), "dim is 65"),
        (dict(dim=12, precision="binary"), "binary takes multiples of 8"),
        (dict(instruction=7), "encode: the instruction must be a string, got int"),
    ],
)
def test_an_option_out_of_range_is_refused_before_anything_is_computed(embedder, monkeypatch, options, message):
    monkeypatch.setattr(Embedder, "forward", None)
    with pytest.raises(ValueError, match=message):
        embedder.encode(["x"], **options)


# --- dimensions, precision, similarity ---


def test_fewer_dimensions_are_a_normalised_prefix(embedder, vectors):
    np.testing.assert_allclose(embedder.encode(ITEMS, dim=16), truncate(vectors, 16), atol=1e-6)


def test_int8_without_a_learned_step_warns_and_stays_close(embedder, vectors):
    with pytest.warns(UserWarning, match="no learned int8 step for 64 dimensions; one is fitted on these 8"):
        codes = embedder.encode(ITEMS, precision="int8")
    assert codes.dtype == np.int8 and codes.shape == (8, 64)
    np.testing.assert_allclose(embedder.similarity(codes, codes), vectors @ vectors.T, atol=0.02)


def test_int8_uses_the_learned_step_of_the_checkpoint(embedder, vectors, tmp_path, recwarn):
    quantizers = Quantizers([32])
    quantizers.of(32, "int8").initialise(torch.tensor(vectors[:, :32]) * 3)
    save(tmp_path / "s1", embedder.model, embedder.processor, embedder.card, quantizers)
    again = Embedder(tmp_path / "s1")
    recwarn.clear()
    codes = again.encode(ITEMS, dim=32, precision="int8")
    assert not [w for w in recwarn if "int8" in str(w.message)]
    step = quantizers.of(32, "int8").learned_step.item()
    expected = np.rint(np.clip(truncate(vectors, 32) / step, -128, 127))
    assert np.abs(codes - expected).max() <= 1 and (codes == expected).mean() > 0.99
    with pytest.warns(UserWarning, match="for 64 dimensions"):
        again.encode(ITEMS, precision="int8")


def test_binary_codes_are_packed_signs(embedder, vectors):
    assert np.array_equal(embedder.encode(ITEMS, dim=32, precision="binary"), pack_binary(vectors[:, :32]))


def test_similarity_is_the_cosine_of_whatever_encode_gives(embedder, vectors):
    a, b = vectors[:3], vectors[3:]
    np.testing.assert_allclose(embedder.similarity(a, b), a @ b.T, atol=1e-6)
    np.testing.assert_allclose(embedder.similarity(2 * a, b), a @ b.T, atol=1e-6)
    signs_a, signs_b = (unpack_binary(pack_binary(x)) for x in (a, b))
    np.testing.assert_allclose(embedder.similarity(pack_binary(a), pack_binary(b)), signs_a @ signs_b.T / 64, atol=1e-6)
    expected = a @ signs_b.T / 8  # a float query against stored bits
    np.testing.assert_allclose(embedder.similarity(a, pack_binary(b)), expected, atol=1e-6)
    np.testing.assert_allclose(embedder.similarity(pack_binary(b), a), expected.T, atol=1e-6)


@dataclass(frozen=True)
class Forbidden:
    """A drawing that must not be drawn again."""

    def render(self):
        raise AssertionError("drawn although its features are known")


def test_a_warm_batch_is_collated_without_drawing(embedder, monkeypatch):
    store = VisualStore()
    monkeypatch.setattr(embedder, "store", store)
    embedder.encode([{"image": picture(0)}])
    [key] = store._features
    kind, _, budget = key
    twin = (kind, Forbidden(), budget)
    store._features[twin], store._visuals[twin] = store._features[key], store._visuals[key]
    np.testing.assert_allclose(*embedder.encode([{"image": Forbidden()}, {"image": picture(0)}]), atol=1e-6)


def test_the_identity_names_weights_template_and_dimension(small_checkpoint, embedder):
    identity = embedder.identity()
    assert identity == {
        "model": load(small_checkpoint).fingerprint(),
        "name": str(small_checkpoint),
        "template": "report",
        "dim": 64,
    }
    assert embedder.identity(16) == identity | {"dim": 16}
    assert Embedder(small_checkpoint, template="released").identity()["template"] == "released"
    with pytest.raises(ValueError, match="ask for 1 to 64"):
        embedder.identity(65)
