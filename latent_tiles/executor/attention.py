"""Attention over a whole map whose keys and values may not fit on the device.

Queries come window by window, keys and values chunk by chunk; the chunks' softmaxes are merged by their log-sum-exps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from latent_tiles.executor.maps import Map
from latent_tiles.geometry import Box


@dataclass(kw_only=True)
class KeyValues:
    """Keys and values of a whole map.

    Args:
        keys: map of keys, all heads in its channels.
        values: map of values.
        chunk_tokens: at most so many are on the device at a time.
        score_values: scores of queries and keys that are computed at a time where not all keys are there.
        picked: positions (row by row) of a chosen part of them, where not all are to be attended to.
    """

    keys: Map
    values: Map
    chunk_tokens: int
    score_values: int = 2**20
    picked: Int64[Tensor, " n"] | None = None

    @cached_property
    def whole(self) -> tuple[Tensor, Tensor]:
        """All keys and values that are attended to, as (rows, tokens, channels), on the device."""
        if self.picked is not None:
            return self._some(self.picked)
        everything = Box(0, 0, *self.keys.size)
        return _tokens(self.keys.read(everything)), _tokens(self.values.read(everything))

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Those keys and values, no more than `chunk_tokens` of them at a time."""
        if self.picked is not None:
            yield from map(self._some, self.picked.split(self.chunk_tokens))
            return
        size = self.keys.size
        band, columns = max(1, self.chunk_tokens // size.width), min(size.width, self.chunk_tokens)
        for top in range(0, size.height, band):
            for left in range(0, size.width, columns):
                box = Box(top, left, min(band, size.height - top), min(columns, size.width - left))
                yield _tokens(self.keys.read(box)), _tokens(self.values.read(box))

    @property
    def single(self) -> bool:
        """Whether all of them fit at once."""
        return (self.keys.size.area if self.picked is None else len(self.picked)) <= self.chunk_tokens

    def _some(self, picked: Tensor) -> tuple[Tensor, Tensor]:
        band = max(1, self.chunk_tokens // self.keys.size.width)
        return _pick(self.keys, picked, band), _pick(self.values, picked, band)


def _tokens(values: Tensor) -> Tensor:
    return values.flatten(2).transpose(1, 2)


def _pick(source: Map, picked: Tensor, band: int) -> Tensor:
    """The chosen tokens of a map, read a band of rows at a time."""
    width, parts = source.size.width, list[Tensor]()
    for top in range(0, source.size.height, band):
        rows = min(band, source.size.height - top)
        inside = picked[(picked >= top * width) & (picked < (top + rows) * width)] - top * width
        if len(inside):
            values = _tokens(source.read(Box(top, 0, rows, width)))
            parts.append(values[:, inside.to(values.device)])
    return torch.cat(parts, dim=1)


def attend(
    queries: Float[Tensor, "rows channels height width"], key_values: KeyValues, *, heads: int
) -> Float[Tensor, "rows channels height width"]:
    """Softmax attention of a window of queries to the keys and values of a whole map.

    Args:
        queries: all heads in the channels; scaled by 1 / sqrt(channels per head).
        key_values: what they attend to.
        heads: number of heads.

    Source:
        Milakov, Gimelshein, "Online normalizer calculation for softmax" (2018); Rabe, Staats, "Self-attention does not
        need O(n^2) memory" (2021).
    """
    query = _split(_tokens(queries), heads)
    if key_values.single:
        key, value = key_values.whole
        result = F.scaled_dot_product_attention(query, _split(key, heads), _split(value, heads))
    else:
        # Autocast would round the scores, which are to be exponentiated.
        with torch.autocast(query.device.type, enabled=False):
            result = _merged(query, key_values, heads)
    joined = result.transpose(1, 2).flatten(2)
    return joined.transpose(1, 2).unflatten(2, tuple(queries.shape[2:]))


def _split(values: Tensor, heads: int) -> Tensor:
    """(rows, tokens, channels) as (rows, heads, tokens, channels per head)."""
    return values.unflatten(2, (heads, -1)).transpose(1, 2)


def _merged(query: Tensor, key_values: KeyValues, heads: int) -> Tensor:
    """Chunk after chunk, in float32: the running maximum, the sum of exponentials and the weighted values."""
    scaled = query.float() / math.sqrt(query.shape[-1])
    peak = torch.full(query.shape[:-1], -math.inf, dtype=torch.float32, device=query.device)
    weight = torch.zeros_like(peak)
    total = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    for key, value in key_values.chunks():
        keys, values = _split(key, heads).float().transpose(-1, -2), _split(value, heads).float()
        group = max(1, key_values.score_values // (query.shape[0] * heads * keys.shape[-1]))
        for start in range(0, query.shape[2], group):
            some = slice(start, start + group)
            scores = scaled[:, :, some] @ keys
            highest = torch.maximum(peak[:, :, some], scores.amax(-1))
            scores = scores.sub_(highest[..., None]).exp_()
            old = torch.exp(peak[:, :, some] - highest)
            weight[:, :, some] = weight[:, :, some] * old + scores.sum(-1)
            total[:, :, some] = total[:, :, some] * old[..., None] + scores @ values
            peak[:, :, some] = highest
    return (total / weight[..., None]).to(query.dtype)
