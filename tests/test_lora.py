"""LoRA folded into its weight gives peft's numbers."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

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


def test_dropout_is_refused_by_name():
    with pytest.raises(ValueError, match="0: only a single plain LoRA without dropout"):
        fold_lora(adapted(dropout=0.1))
