"""forward.py: inputs, kept visual features and the forward, against plain transformers."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from q3vl_mini import forward
from q3vl_mini.backbone import add_lora, inner, load
from q3vl_mini.embedder import Embedder
from q3vl_mini.forward import VisualStore, forward_hidden, last_attended, pad, visual_outputs
from q3vl_mini.media import MediaBudget, Visual
from q3vl_mini.records import Clip


@dataclass(frozen=True)
class Drawing:
    seed: int
    width: int = 64
    height: int = 64

    def render(self):
        pixels = np.random.default_rng(self.seed).integers(0, 256, (self.height, self.width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


@dataclass(frozen=True)
class Film:
    seed: int
    frames: int = 4

    def render(self):
        pixels = np.random.default_rng(self.seed).integers(0, 256, (self.frames, 64, 64, 3), dtype=np.uint8)
        return Clip(pixels, fps=1.0)


BATCHES = {
    "texts": ["a red cat", "12 apples are green", ""],
    "images": [{"image": Drawing(0)}, {"image": Drawing(1, 96, 128)}, {"image": Drawing(2, 70, 90)}],
    "videos": [{"video": Film(0)}, {"video": Film(1, 6)}],
    "mixes": [
        "a red cat",
        {"image": [Drawing(0), Drawing(1, 96)], "text": "two"},
        {"video": Film(0), "image": Drawing(3), "text": "a film"},
        {"video": [Film(1), Film(2, 3)]},
    ],
}


@pytest.fixture(scope="module")
def plain(small_checkpoint):
    """The checkpoint in plain transformers: its own vision tower, its own attention."""
    return Qwen3VLForConditionalGeneration.from_pretrained(small_checkpoint, dtype=torch.float32).eval()


@pytest.fixture
def embedder(small_checkpoint):
    return Embedder(small_checkpoint, template="report")


def plain_hidden(plain, inputs):
    """last_hidden_state of transformers' own forward with pixel values."""
    names = {"image": "pixel_values", "video": "pixel_values_videos"}
    pixels = {
        name: torch.cat([v.pixel_values for v in inputs["visuals"] if v.kind == kind])
        for kind, name in names.items()
        if any(v.kind == kind for v in inputs["visuals"])
    }
    tensors = {name: x for name, x in inputs.items() if name != "visuals"}
    with torch.no_grad():
        return plain.model(**tensors, **pixels).last_hidden_state


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", BATCHES)
def test_the_forward_equals_plain_transformers(embedder, plain, batch, side):
    embedder.padding_side = side
    inputs = embedder.collate(BATCHES[batch])
    with torch.no_grad():
        ours = forward_hidden(embedder.model, inputs, visual_outputs(embedder.model, inputs["visuals"]))
    theirs = plain_hidden(plain, inputs)
    attended = inputs["attention_mask"].bool()
    assert (ours - theirs)[attended].abs().max() < 1e-5
    assert theirs[attended].std() > 0.3  # the tolerance is small against the values


def test_a_pictures_features_matter_to_the_forward(embedder):
    inputs = embedder.collate(BATCHES["images"])
    outputs = visual_outputs(embedder.model, inputs["visuals"])
    right = forward_hidden(embedder.model, inputs, outputs)
    layers = outputs["image"].deepstack_features
    outputs["image"].deepstack_features = [[x.roll(1, 0) for x in layer] for layer in layers]
    assert (forward_hidden(embedder.model, inputs, outputs) - right).abs().max() > 1e-2


@pytest.mark.parametrize("batch", ["images", "videos", "mixes"])
def test_stored_features_give_the_same_forward(embedder, batch):
    fresh = embedder(embedder.collate(BATCHES[batch]))
    embedder.store = VisualStore()
    first, inputs = embedder(embedder.collate(BATCHES[batch])), embedder.collate(BATCHES[batch])
    assert all(visual.pixel_values is None for visual in inputs["visuals"])  # nothing was rendered
    assert len(embedder.store) == len({v.key for v in inputs["visuals"]})
    assert torch.allclose(first, fresh, atol=1e-6) and torch.allclose(embedder(inputs), fresh, atol=1e-6)


def test_the_tower_sees_each_visual_once(embedder, monkeypatch):
    seen = []
    tower_features = forward._tower_features
    monkeypatch.setattr(forward, "_tower_features", lambda t, v, f: seen.append(len(v)) or tower_features(t, v, f))
    embedder.store = VisualStore()
    items = [{"image": Drawing(i % 3)} for i in range(9)] + [{"image": Drawing(0).render()} for _ in range(2)]
    embedder.encode(items, batch_size=5)
    assert sum(seen) == 4  # three drawings; two pictures with the same pixels
    embedder.encode(items, batch_size=2)
    assert sum(seen) == 4


def test_large_batches_go_through_the_tower_in_pieces(embedder, monkeypatch):
    whole = embedder(embedder.collate(BATCHES["mixes"]))
    monkeypatch.setattr(forward, "PATCHES_AT_ONCE", 20)
    assert torch.allclose(embedder(embedder.collate(BATCHES["mixes"])), whole, atol=1e-6)


def test_a_full_store_stops_storing_and_stays_right(embedder):
    fresh = embedder(embedder.collate(BATCHES["images"]))
    size = 2 * 4 * 64 * 4  # tokens and one DeepStack layer, 4 visual tokens, 64 dimensions, float32
    embedder.store = VisualStore(max_bytes=size)
    for _ in range(2):
        assert torch.allclose(embedder(embedder.collate(BATCHES["images"])), fresh, atol=1e-6)
        assert (len(embedder.store), embedder.store.nbytes) == (1, size)
    embedder.store.clear()
    assert (len(embedder.store), embedder.store.nbytes) == (0, 0)
    embedder(embedder.collate(BATCHES["images"]))
    assert len(embedder.store) == 1  # there is room again


def test_a_store_of_half_precision_takes_half_the_room(embedder):
    fresh = embedder(embedder.collate(BATCHES["images"]))
    whole, half = VisualStore(), VisualStore(dtype=torch.float16)
    for embedder.store in (whole, half):
        first = embedder(embedder.collate(BATCHES["images"]))
        assert torch.equal(embedder(embedder.collate(BATCHES["images"])), first)  # the first time as the second
        assert torch.allclose(first, fresh, atol=1e-2)
    assert half.nbytes == whole.nbytes / 2


def test_features_of_encode_serve_training_later(embedder):
    embedder.store = VisualStore()
    embedder.encode(BATCHES["mixes"])  # in inference mode
    add_lora(embedder.model)
    embedder(embedder.collate(BATCHES["mixes"])).sum().backward()
    assert any(p.grad is not None for p in embedder.model.parameters())


def test_gradients_reach_every_lora_module_and_no_vision_weight(small_checkpoint):
    backbone = load(small_checkpoint)
    backbone.model = add_lora(backbone.model)
    embedder = Embedder.from_backbone(backbone, store=VisualStore())
    target = torch.randn(4, 64)
    (embedder(embedder.collate(BATCHES["mixes"])) * target).sum().backward()
    gradients = {name: p.grad for name, p in embedder.model.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * 6 * 2
    for name, gradient in gradients.items():
        if "lora_B" in name:
            assert gradient.abs().max() > 0, name
    assert all(p.grad is None for p in embedder.model.get_base_model().model.visual.parameters())


def test_a_tower_in_training_gets_gradients_and_fills_no_store(embedder):
    embedder.store = VisualStore()
    embedder.model.model.visual.requires_grad_(True)
    embedder(embedder.collate(BATCHES["images"])).sum().backward()
    assert embedder.model.model.visual.patch_embed.proj.weight.grad.abs().max() > 0
    assert len(embedder.store) == 0


def test_a_batch_of_another_store_is_refused(embedder):
    embedder.store = VisualStore()
    embedder.encode(BATCHES["images"])
    inputs = embedder.collate(BATCHES["images"])
    embedder.store = VisualStore()
    with pytest.raises(ValueError, match="run the forward with the store"):
        embedder(inputs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_attended_state_on_either_side(side):
    hidden, lengths = torch.randn(4, 6, 3), [1, 6, 3, 5]
    mask = torch.zeros(4, 6, dtype=torch.long)
    for row, n in zip(mask, lengths, strict=True):
        row[6 - n :] = 1 if side == "left" else row[6 - n :]
        row[:n] = row[:n] if side == "left" else 1
    expected = [hidden[i, 5] if side == "left" else hidden[i, n - 1] for i, n in enumerate(lengths)]
    assert torch.equal(last_attended(hidden, mask), torch.stack(expected))
    if side == "right":
        assert not torch.equal(last_attended(hidden, mask), hidden[:, -1])  # the naive choice pools padding


def test_padding_marks_kinds_and_keeps_the_order_of_grids(processor):
    image, video = processor.image_token_id, processor.video_token_id
    visuals = [Visual("video", (2, 4, 4), (0.5, 2.5), "a"), Visual("image", (1, 4, 6), None, "b")]
    pad_id = processor.tokenizer.pad_token_id
    inputs = pad([[7, video, image], [pad_id]], visuals, processor, "left")
    assert inputs["input_ids"].tolist() == [[7, video, image], [pad_id] * 3]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]  # a PAD that is the embedding's is attended
    assert inputs["mm_token_type_ids"].tolist() == [[0, 2, 1], [0, 0, 0]]
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6]] and inputs["video_grid_thw"].tolist() == [[2, 4, 4]]
    assert set(pad([[7]], [], processor, "left")) == {"input_ids", "attention_mask", "mm_token_type_ids", "visuals"}


@pytest.mark.parametrize(
    "item, message",
    [
        (7, "item 1: an item is a string or a dict, got int"),
        ({"picture": 1}, r"item 1: unknown keys \['picture'\]"),
        ({"text": 7}, "item 1: text must be a string, got int"),
        ({"image": [Drawing(0), "gone.png"]}, "item 1, image 1: there is no file 'gone.png'"),
        ({"video": "gone.mp4"}, "item 1, video 0: there is no file 'gone.mp4'"),
    ],
)
def test_a_wrong_item_is_named_with_the_remedy(embedder, item, message):
    with pytest.raises(ValueError, match=message):
        embedder.collate(["right", item])


def test_many_pictures_in_one_item_are_made_to_fit(embedder):
    embedder.max_length, embedder.budget = 600, MediaBudget(image_max_tokens=200)
    alone = embedder.collate([{"image": Drawing(0, 400, 400)}])
    with pytest.warns(UserWarning, match="share its 600 tokens"):
        many = embedder.collate([{"image": [Drawing(i, 400, 400) for i in range(6)]}])
    assert alone["visuals"][0].n_tokens == 144 and len(many["visuals"]) == 6
    assert many["input_ids"].shape[1] <= 600 and sum(v.n_tokens for v in many["visuals"]) > 200


# --- parts of a batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", BATCHES)
def test_parts_of_a_batch_have_its_vectors(embedder, name, side, monkeypatch):
    monkeypatch.setattr(embedder, "padding_side", side, raising=False)
    inputs = embedder.collate(BATCHES[name], "Find it.")
    own = inputs["input_ids"].shape[1] - forward.shared_prefix(forward.right_padded(inputs))
    with torch.no_grad():
        expected = embedder(inputs)
        for rows in range(1, len(expected) + 1):
            parts = forward.split_rows(inputs, rows * own)
            sizes = [len(part["input_ids"]) for part in parts]
            assert sum(sizes) == len(expected) and max(sizes) <= rows and len(sizes) == -(-len(expected) // rows)
            torch.testing.assert_close(torch.cat([embedder(part) for part in parts]), expected, rtol=1e-4, atol=1e-5)
    assert len(forward.split_rows(inputs, 1)) == len(expected)  # a row is never split


@pytest.mark.parametrize("seed", range(5))
def test_groups_of_similar_length_are_the_cheapest_of_all(seed):
    rng = np.random.default_rng(seed)
    lengths, prefix, call = rng.integers(8, 60, 9).tolist(), 5, int(rng.integers(1, 40))

    def cost(parts):
        return sum(len(p) * (max(lengths[row] for row in p) - prefix) + prefix + call for p in parts)

    order = sorted(range(9), key=lambda row: lengths[row])
    ways = []
    for cuts in range(2**8):  # a bit says whether the rows are cut there
        ends = [i + 1 for i in range(8) if cuts >> i & 1]
        ways.append([order[a:b] for a, b in zip([0, *ends], [*ends, 9], strict=True)])
    parts = forward.even_parts(lengths, prefix, call)
    assert sorted(row for part in parts for row in part) == list(range(9))
    assert cost(parts) == min(map(cost, ways)) < cost([order])
    assert forward.even_parts(lengths, prefix, call=10_000) == [sorted(range(9), key=lambda row: -lengths[row])]


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_of_unlike_length_are_not_padded_to_the_longest(lora_embedder, side, monkeypatch):
    words = "a red cat on the left of a green apple " * 20
    items = ["a cat", {"image": Drawing(0, 200, 200)}, words, {"image": Drawing(1), "text": words}, "two", ""]
    sizes, forward_last = [], forward.forward_last
    monkeypatch.setattr(lora_embedder, "padding_side", side, raising=False)
    monkeypatch.setattr(
        forward, "forward_last", lambda m, x, *rest: sizes.append(x["input_ids"].shape) or forward_last(m, x, *rest)
    )
    inputs = lora_embedder.collate(items)
    vectors = lora_embedder(inputs)
    rows, width = inputs["input_ids"].shape
    assert len(sizes) > 1 and sum(r * w for r, w in sizes) < 0.7 * rows * width
    one_by_one = torch.cat([lora_embedder(lora_embedder.collate([item])) for item in items])
    torch.testing.assert_close(vectors, one_by_one, rtol=1e-4, atol=1e-5)
    assert vectors.requires_grad


def test_where_the_prefix_is_not_shared_a_part_counts_it(lora_embedder):
    inputs = lora_embedder.collate([f"a cat and {n} dogs" for n in range(12)])
    tokens = 2 * inputs["input_ids"].shape[1]

    def largest(**options):
        return max(part["input_ids"].numel() for part in forward.split_rows(inputs, tokens, **options))

    assert largest(share=False) <= tokens < largest()


def test_one_call_takes_all_rows_through_the_model_at_once_with_the_same_states(lora_embedder, monkeypatch):
    inputs = lora_embedder.collate(["a cat", "a red cat on the left of a green apple " * 20, "two"])
    apart, calls = lora_embedder(inputs), []
    layer = inner(lora_embedder.model).model.language_model.layers[0]
    monkeypatch.setattr(lora_embedder, "one_call", True)
    hook = layer.register_forward_hook(lambda *_: calls.append(1))
    together = lora_embedder(inputs)
    hook.remove()
    assert len(calls) == 1
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


# --- the shared prefix --------------------------------------------------------------------------------------


@pytest.fixture
def lora_embedder(small_checkpoint):
    """An embedder whose adapter does something: B is not zero."""
    backbone = load(small_checkpoint, device="cpu")
    backbone.model = add_lora(backbone.model, rank=4)
    torch.manual_seed(0)
    for name, parameter in backbone.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return Embedder.from_backbone(backbone, template="report")


def states_and_gradients(embedder, inputs, forward_function):
    embedder.zero_grad()
    outputs = visual_outputs(embedder.model, inputs["visuals"])
    states = forward_function(embedder.model, inputs, outputs)
    torch.manual_seed(1)
    (states * torch.randn(states.shape)).sum().backward()
    return states.detach(), {n: p.grad.clone() for n, p in embedder.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", BATCHES)
def test_a_shared_prefix_changes_neither_states_nor_gradients(lora_embedder, name, side, monkeypatch):
    monkeypatch.setattr(lora_embedder, "padding_side", side, raising=False)
    inputs = lora_embedder.collate(BATCHES[name], "Find it.")
    assert forward.shared_prefix(forward.right_padded(inputs)) >= 8

    def whole(model, inputs, outputs):
        return last_attended(forward_hidden(model, inputs, outputs), inputs["attention_mask"])

    expected, expected_gradients = states_and_gradients(lora_embedder, inputs, whole)
    states, gradients = states_and_gradients(lora_embedder, inputs, forward.forward_last)
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    for parameter, gradient in expected_gradients.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(gradients[parameter] / scale, gradient / scale, rtol=0, atol=1e-4, msg=parameter)


def test_the_shared_prefix_ends_where_rows_differ_and_before_visual_tokens(lora_embedder):
    tokenizer = lora_embedder.processor.tokenizer
    inputs = lora_embedder.collate(["a cat", "a dog"], "Find it.")
    length = forward.shared_prefix(inputs)
    assert tokenizer.decode(inputs["input_ids"][0, :length]).endswith("user\na")
    inputs = lora_embedder.collate([{"image": Drawing(0)}, {"image": Drawing(1)}], "Find it.")
    assert tokenizer.decode(inputs["input_ids"][0, : forward.shared_prefix(inputs)]).endswith("<|vision_start|>")
    same = lora_embedder.collate(["a cat", "a cat"], "Find it.")  # one token a row is left to compute
    assert forward.shared_prefix(same) == same["input_ids"].shape[1] - 1


def test_rows_of_different_instructions_share_only_what_they_have_in_common(lora_embedder):
    items = [{"text": "a cat", "instruction": "Find it."}, {"text": "a cat", "instruction": "Name it."}]
    inputs = lora_embedder.collate(items)
    assert forward.shared_prefix(inputs) < 8
    one_by_one = torch.cat([lora_embedder(lora_embedder.collate([item])) for item in items])
    torch.testing.assert_close(lora_embedder(inputs), one_by_one, rtol=1e-4, atol=1e-5)
