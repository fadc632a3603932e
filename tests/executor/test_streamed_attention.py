from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latent_tiles.executor.attention import KeyValues, attend
from latent_tiles.executor.maps import Map


def scene(rows: int = 2, channels: int = 8, height: int = 6, width: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Sharp attention: a wrong merge of chunks shows.
    queries, keys, values = (torch.randn(rows, channels, height, width, generator=generator) * 2 for _ in range(3))
    return queries, keys, values


def oracle(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    split = [part.flatten(2).unflatten(1, (heads, -1)).transpose(-1, -2) for part in (queries, keys, values)]
    result = F.scaled_dot_product_attention(*split)
    return result.transpose(-1, -2).flatten(1, 2).unflatten(2, queries.shape[2:])


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("chunk", [1, 5, 7, 20, 42, 100])
def test_equals_attention_over_everything_whatever_the_chunk(chunk: int, heads: int) -> None:
    queries, keys, values = scene()
    whole = KeyValues(keys=Map(keys), values=Map(values), chunk_tokens=chunk)
    found = attend(queries[:, :, 1:4, 2:5], whole, heads=heads)
    torch.testing.assert_close(found, oracle(queries, keys, values, heads)[:, :, 1:4, 2:5], rtol=1e-5, atol=1e-5)


def test_huge_scores_do_not_overflow() -> None:
    queries, keys, values = scene()
    whole = KeyValues(keys=Map(keys * 100), values=Map(values), chunk_tokens=10)
    found = attend(queries * 100, whole, heads=1)
    torch.testing.assert_close(found, oracle(queries * 100, keys * 100, values, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 7, 14, 100])
def test_picked_keys_are_the_only_ones_attended_to(chunk: int) -> None:
    queries, keys, values = scene()
    picked = torch.tensor([0, 3, 8, 20, 41])
    some = KeyValues(keys=Map(keys), values=Map(values), chunk_tokens=chunk, picked=picked)
    expected = oracle(
        queries.flatten(2)[:, :, :5, None],
        keys.flatten(2)[:, :, picked, None],
        values.flatten(2)[:, :, picked, None],
        2,
    )
    found = attend(queries.flatten(2)[:, :, :5, None], some, heads=2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_picked_keys_that_do_not_fit_come_in_chunks() -> None:
    _, keys, values = scene()
    picked = torch.tensor([0, 3, 8, 20, 41])
    some = KeyValues(keys=Map(keys), values=Map(values), chunk_tokens=2, picked=picked)
    assert not some.single
    parts = list(some.chunks())
    assert [key.shape[1] for key, _ in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([key for key, _ in parts], dim=1), some.whole[0])
