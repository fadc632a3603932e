from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from latent_tiles.errors import ProgramError
from latent_tiles.executor.ops import AveragePool, Convolution, DepthToSpace, SpaceToDepth, Upsample, Window
from latent_tiles.executor.reach import cut, windows
from latent_tiles.geometry import Box, Size, Span


@given(length=st.integers(1, 3000), side=st.integers(1, 700))
def test_parts_cover_an_axis_once_and_are_few_in_kind(length: int, side: int) -> None:
    parts = cut(length, side)
    assert parts[0].start == 0
    assert parts[-1].stop == length
    assert all(one.stop == other.start for one, other in pairwise(parts))
    assert all(1 <= part.length <= side for part in parts)
    assert len({part.length for part in parts}) <= 2


@given(height=st.integers(1, 60), width=st.integers(1, 60), side=st.integers(1, 70))
def test_windows_cover_a_map_once_from_top_to_bottom(height: int, width: int, side: int) -> None:
    count = torch.zeros(height, width)
    tops = list[int]()
    for box in windows(Size(height, width), side):
        count[box.to_slices()] += 1
        tops.append(box.top)
    assert torch.equal(count, torch.ones(height, width))
    assert tops == sorted(tops)


_CONVOLUTIONS = st.builds(
    lambda kernel, stride, dilation, padding, asymmetric: (kernel, stride, dilation, padding, asymmetric),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.booleans(),
)


@given(settings=_CONVOLUTIONS, height=st.integers(11, 23), width=st.integers(11, 23), data=st.data())
def test_a_convolution_of_a_window_is_the_window_of_the_convolution(
    settings: tuple[int, int, int, int, bool], height: int, width: int, data: st.DataObject
) -> None:
    kernel, stride, dilation, padding, asymmetric = settings
    pads = (0, 1, 0, 1) if asymmetric else None
    module = nn.Conv2d(2, 3, kernel, stride, 0 if asymmetric else padding, dilation)
    op, values = Convolution(module, pads), torch.randn(1, 2, height, width)
    with torch.no_grad():
        expected = module(nn.functional.pad(values, (0, 1, 0, 1)) if asymmetric else values)
        size = Size(*expected.shape[2:])
        assert size == (op.length(0, (height,)), op.length(1, (width,)))
        top, left = data.draw(st.integers(0, size.height - 1)), data.draw(st.integers(0, size.width - 1))
        box = Box(
            top,
            left,
            data.draw(st.integers(1, size.height - top)),
            data.draw(st.integers(1, size.width - left)),
        )
        (rows,) = op.reach(0, Span(box.top, box.height), (height,))
        (columns,) = op.reach(1, Span(box.left, box.width), (width,))
        inside = Box(rows.start, columns.start, rows.length, columns.length)
        # A window that reads only zeros beyond the border has nothing of the map in it.
        if inside.height < 1 or inside.width < 1:
            return
        window = Window(box=box, sizes=(Size(height, width),), boxes=(inside,))
        found = op.run(window, [values[:, :, inside.top : inside.bottom, inside.left : inside.right]], None)
    torch.testing.assert_close(found, expected[:, :, box.top : box.bottom, box.left : box.right])


@pytest.mark.parametrize("op", [Upsample(2), DepthToSpace(2), SpaceToDepth(2), AveragePool(2), Upsample(3)])
@given(data=st.data())
def test_resampling_a_window_is_the_window_of_the_resampled(op: Upsample, data: st.DataObject) -> None:
    values = torch.randn(1, 4, 8, 12)
    height, width = op.length(0, (8,)), op.length(1, (12,))
    whole_window = Window(box=Box(0, 0, height, width), sizes=(Size(8, 12),), boxes=(Box(0, 0, 8, 12),))
    expected = op.run(whole_window, [values], None)
    assert expected.shape[2:] == (height, width)
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = Box(top, left, data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left)))
    (rows,), (columns,) = (
        op.reach(0, Span(box.top, box.height), (8,)),
        op.reach(1, Span(box.left, box.width), (12,)),
    )
    inside = Box(rows.start, columns.start, rows.length, columns.length)
    found = op.run(
        Window(box=box, sizes=(Size(8, 12),), boxes=(inside,)),
        [values[:, :, inside.top : inside.bottom, inside.left : inside.right]],
        None,
    )
    assert torch.equal(found, expected[:, :, box.top : box.bottom, box.left : box.right])


def test_a_map_that_is_not_a_multiple_is_refused() -> None:
    with pytest.raises(ProgramError, match=r"width of 13 is not a multiple of 2; pad or crop it, e\.g\. to 12"):
        SpaceToDepth(2).length(1, (13,))


def test_paddings_that_cannot_be_tiled_are_refused() -> None:
    with pytest.raises(ProgramError, match="padding_mode='reflect' cannot be tiled; only 'zeros'"):
        Convolution(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ProgramError, match="padding='same' cannot be tiled; give it as numbers"):
        Convolution(nn.Conv2d(1, 1, 3, padding="same"))
