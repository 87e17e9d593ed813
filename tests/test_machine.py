"""The machine: which number format is fast."""

import pytest
import torch

from q3vl_mini import machine
from q3vl_mini.machine import cpu_autocast, fast_cpu_dtype


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_products_are_computed_in_the_format_that_the_cpu_is_faster_in(monkeypatch, faster):
    clock = {torch.float32: 2.0, torch.bfloat16: 1.0 if faster is torch.bfloat16 else 160.0}
    monkeypatch.setattr(machine.timeit, "repeat", lambda product, **_: [clock[product().dtype]])
    fast_cpu_dtype.cache_clear()
    try:
        assert fast_cpu_dtype() is faster
        with cpu_autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is faster
    finally:
        fast_cpu_dtype.cache_clear()
