"""Muon: torch's update, in a format that the CPU is fast in."""

import pytest
import torch

from q3vl_mini import muon
from q3vl_mini.muon import Muon


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_moves_matrices_as_torch_s_muon_does(monkeypatch, dtype):
    monkeypatch.setattr(muon, "fast_cpu_dtype", lambda: dtype)
    torch.manual_seed(0)
    ours = [torch.randn(shape, requires_grad=True) for shape in ((8, 24), (24, 8), (16, 16))]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optimizers = Muon(ours, lr=0.1, weight_decay=0.05), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.05)
    started = [p.detach().clone() for p in ours]
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(ours, theirs, started, strict=True):
        assert (a - b).norm() < 0.03 * (a - start).norm()  # torch's rounds to bfloat16 after every product


def test_an_update_has_singular_values_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(muon.orthogonal(torch.randn(32, 96) * 5).float())
    assert values.min() > 0.5 and values.max() < 1.5
