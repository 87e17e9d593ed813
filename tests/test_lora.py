"""LoRA folded into its weight gives peft's numbers."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from q3vl_mini import lora
from q3vl_mini.lora import fold_lora


def adapted(dropout=0.0):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6, bias=False))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules=["0", "2"], lora_dropout=dropout))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def test_outputs_and_gradients_are_those_of_peft():
    plain = adapted()
    folded = fold_lora(copy.deepcopy(plain))
    x = torch.randn(7, 3, 12)
    outputs = []
    for model in (plain, folded):
        out = model(x)
        out.pow(2).sum().backward()
        outputs.append(out)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    trained = 0
    for (name, a), (_, b) in zip(plain.named_parameters(), folded.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            trained += 1
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4)
    assert trained == 4


def test_disabling_the_adapter_gives_the_base_and_the_saved_state_is_unchanged():
    plain = adapted()
    folded = fold_lora(copy.deepcopy(plain))
    x = torch.randn(5, 12)
    with folded.disable_adapter():
        base = folded(x)
    first, _, last = plain.get_base_model()
    torch.testing.assert_close(base, last.base_layer(torch.tanh(first.base_layer(x))))
    assert not torch.allclose(base, folded(x))
    a, b = get_peft_model_state_dict(plain), get_peft_model_state_dict(folded)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("how", ["a step", "a copy into .data", "a new tensor"])
def test_without_gradients_the_folded_weight_is_kept_until_a_part_of_it_changes(how):
    plain = adapted()
    folded = fold_lora(copy.deepcopy(plain))
    layer, x = folded.get_base_model()[0], torch.randn(5, 12)

    def outputs():
        with torch.no_grad():
            return plain(x), folded(x)

    for a, b in (outputs(), outputs()):
        torch.testing.assert_close(b, a)
    kept = layer.folded
    torch.testing.assert_close(outputs()[1], outputs()[0])
    assert layer.folded is kept
    if how == "a copy into .data":  # as DeepSpeed updates: it counts as no new version, but comes after a backward pass
        folded(x).sum().backward()
    for model in (plain, folded):
        weight = model.get_base_model()[0].lora_A["default"].weight
        if how == "a step":
            weight.grad = torch.ones_like(weight)
            torch.optim.SGD([weight], lr=0.1).step()
        elif how == "a copy into .data":
            weight.data.copy_(weight.data + 1)
        else:
            model.get_base_model()[0].lora_A["default"].weight = nn.Parameter(weight.detach() + 1)
    plain_now, folded_now = outputs()
    torch.testing.assert_close(folded_now, plain_now)
    assert layer.folded is not kept


def test_the_sum_of_a_large_matrix_is_not_kept(monkeypatch):
    plain, x = adapted(), torch.randn(5, 12)
    folded = fold_lora(copy.deepcopy(plain))
    monkeypatch.setattr(lora, "KEPT", 200)  # between the two matrices, of 240 and of 120 numbers
    with torch.no_grad():
        torch.testing.assert_close(folded(x), plain(x))
    first, _, last = folded.get_base_model()
    assert first.folded is None and last.folded is not None


def test_the_kept_weight_is_of_the_dtype_that_is_asked_for():
    folded, x = fold_lora(adapted()), torch.randn(5, 12)
    with torch.no_grad():
        full = folded(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = folded(x)
        assert half.dtype == torch.bfloat16 and torch.equal(folded(x), full)


def test_dropout_is_refused_by_name():
    with pytest.raises(ValueError, match="0: only a single plain LoRA without dropout"):
        fold_lora(adapted(dropout=0.1))
