"""The faster vision tower gives the numbers of transformers' own code; its training sees what it should."""

import copy

import pytest
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from q3vl_mini import pretrain_vision as pretrain_vision_module
from q3vl_mini import tiny
from q3vl_mini.emoji_world import sprites
from q3vl_mini.emoji_world.bank import SpriteBank, drawings, flippable, tint
from q3vl_mini.pretrain_vision import VisionConfig, make_batch, pretrain_vision, rate
from q3vl_mini.vision import patchify, speed_up


@pytest.fixture(scope="module")
def tower(processor):
    torch.manual_seed(0)
    config = tiny.make_config(processor.tokenizer, vision_depth=2, vision_width=64, width=64).vision_config
    config._attn_implementation = "eager"
    return Qwen3VLVisionModel(config)


def mixed_pixels():
    """Two pictures of one size, one of another, and a clip of two frame pairs."""
    torch.manual_seed(1)
    grids = torch.tensor([[1, 4, 4], [1, 4, 6], [1, 4, 4], [2, 2, 4]])
    return torch.randn(int(grids.prod(1).sum()), 3 * 2 * 16 * 16), grids


def test_the_faster_tower_gives_the_numbers_and_gradients_of_the_original(tower):
    pixels, grids = mixed_pixels()
    fast = speed_up(copy.deepcopy(tower))
    outputs = []
    for model in (tower, fast):
        model.zero_grad()
        out = model(pixels, grid_thw=grids)
        (out.pooler_output.pow(2).sum() + out.deepstack_features[0].sum()).backward()
        outputs.append((out, {n: p.grad for n, p in model.named_parameters()}))
    (a, grads_a), (b, grads_b) = outputs
    torch.testing.assert_close(a.pooler_output, b.pooler_output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.deepstack_features[0], b.deepstack_features[0], rtol=1e-4, atol=1e-5)
    for name, grad in grads_a.items():
        scale = grad.abs().max()
        torch.testing.assert_close(grads_b[name] / scale, grad / scale, rtol=0, atol=1e-4, msg=name)


def test_a_picture_is_attended_alone_whatever_is_beside_it(tower):
    pixels, grids = mixed_pixels()
    fast = speed_up(copy.deepcopy(tower))
    together = fast(pixels, grid_thw=grids).pooler_output[:4]
    torch.testing.assert_close(together, fast(pixels[:16], grid_thw=grids[:1]).pooler_output, rtol=1e-4, atol=1e-5)


def test_patchify_lays_pixels_out_as_the_processor_does(processor):
    pictures = torch.randint(0, 256, (3, 3, 64, 96)).float()
    expected = processor.image_processor(images=list(pictures.to(torch.uint8)), return_tensors="pt")
    pixels, grids = patchify(pictures / 255)
    torch.testing.assert_close(pixels, expected.pixel_values)
    assert torch.equal(grids, expected.image_grid_thw)


def test_token_labels_of_a_scene_follow_the_order_of_its_visual_tokens():
    keys = [c.key for c in sprites.concepts()][:40]
    bank = SpriteBank(["noto"], keys)
    bank.flippable[:] = False
    c = VisionConfig(batch=4, scenes=1.0, strength=0.0, tinted=0.0, steps=1)
    x, concept, _ = make_batch(bank, c, 0, torch.Generator().manual_seed(0))
    assert x.shape == (1, 3, 128, 128) and concept.shape == (1, 16)
    cells = [x[0, :, i : i + 64, j : j + 64] for i in (0, 64) for j in (0, 64)]
    grid = concept.view(4, 4)
    for cell, label in zip(cells, (grid[0, 0], grid[0, 2], grid[2, 0], grid[2, 2]), strict=True):
        rgba = bank.rgba[0, label].permute(2, 0, 1).float() / 255
        ink = rgba[3] == 1
        assert (cell[:, ink] - rgba[:3, ink]).abs().mean() < 0.03  # the quarter shows the concept of its tokens
    assert (grid[:2, :2] == grid[0, 0]).all() and (grid[2:, 2:] == grid[2, 2]).all()


def test_tinted_sprites_have_the_colour_that_is_their_label():
    rgba = drawings("noto", ["1f408"])
    red = tint(rgba, torch.tensor([[214.0, 40.0, 40.0]]))[0].float()
    ink = red[..., 3] == 255
    assert (red[ink][:, 0] > 2 * red[ink][:, 1]).all() and torch.equal(red[..., 3], rgba[0, ..., 3].float())


def test_only_drawings_that_mean_the_same_mirrored_are_mirrored():
    by_name = {c.name: c for c in sprites.concepts()}
    assert flippable(by_name["cat"]) and not flippable(by_name["left arrow"])
    assert not flippable(by_name["right-facing fist"]) and not flippable(by_name["three o’clock"])


def test_the_rate_warms_up_holds_and_falls_to_zero():
    c = VisionConfig(steps=1000, warmup=100, decay=0.3)
    assert rate(0, c) == pytest.approx(0.01) and rate(500, c) == 1.0
    assert rate(850, c) == pytest.approx(0.5) and rate(999, c) == pytest.approx(1 / 300)
    heads = VisionConfig(steps=1000, warmup=100, decay=0.3, heads=200)
    assert rate(150, heads) == 1.0 and rate(200, heads) == pytest.approx(0.01) and rate(300, heads) == 1.0


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(tower, tmp_path, monkeypatch):
    c = VisionConfig(steps=12, batch=8, warmup=2, scenes=0.3)
    whole = pretrain_vision(copy.deepcopy(tower), tmp_path / "whole", c, log_every=1)

    class Killed(Exception):
        pass

    def dies_at_step_8(bank, config, step, generator):
        if step == 8:
            raise Killed
        return make_batch(bank, config, step, generator)

    monkeypatch.setattr(pretrain_vision_module, "make_batch", dies_at_step_8)
    with pytest.raises(Killed):
        pretrain_vision(copy.deepcopy(tower), tmp_path / "cut", c, log_every=1)
    monkeypatch.undo()
    resumed = pretrain_vision(copy.deepcopy(tower), tmp_path / "cut", c, log_every=1)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), tower.parameters(), strict=True))
