from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from latent_tiles.executor.statistics import MomentPool, SumPool


def reference(values: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(values.double().reshape(values.shape[0], groups, -1), dim=-1, correction=0)
    return mean, variance


@given(
    cuts=st.lists(st.integers(1, 11), min_size=1, max_size=5),
    offset=st.floats(-1000, 1000),
    rows=st.integers(1, 3),
    last=st.booleans(),
)
def test_pooled_moments_equal_those_of_the_whole(cuts: list[int], offset: float, rows: int, last: bool) -> None:
    width = sum(cuts)
    values = torch.randn(rows, 8, 5, width, generator=torch.Generator().manual_seed(width)) + offset
    pool = MomentPool(4)
    for part in values.split(cuts, dim=3):
        pool.add(part.contiguous(memory_format=torch.channels_last) if last else part)
    found, (mean, variance) = pool.result(), reference(values, 4)
    torch.testing.assert_close(found.mean, mean, rtol=1e-6, atol=1e-5)
    # float32 holds a deviation of 1 beside an offset of 1000 to about 1e-4.
    torch.testing.assert_close(found.variance, variance, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_constant_has_no_variance(dtype: torch.dtype) -> None:
    pool = MomentPool(2)
    for _ in range(3):
        pool.add(torch.full((1, 4, 3, 5), 0.25, dtype=dtype))
    found = pool.result()
    assert torch.equal(found.variance, torch.zeros(1, 2, dtype=torch.float64))
    assert torch.equal(found.mean, torch.full((1, 2), 0.25, dtype=torch.float64))


def test_half_precision_is_pooled_in_float32() -> None:
    values = (torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0)) + 30).half()
    pool = MomentPool(1)
    pool.add(values)
    _, variance = reference(values, 1)
    torch.testing.assert_close(pool.result().variance, variance, rtol=1e-5, atol=0)


def test_sums_are_added_up() -> None:
    values = torch.randn(2, 3, 4, 10)
    pool = SumPool(lambda part: part.sum((2, 3)))
    for part in values.split(3, dim=3):
        pool.add(part)
    torch.testing.assert_close(pool.result(), values.double().sum((2, 3)), rtol=1e-5, atol=1e-5)


def test_nothing_pooled_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing was pooled"):
        SumPool(lambda part: part.sum((2, 3))).result()
