from __future__ import annotations

import torch
from torch import nn

from latent_tiles.executor.cost import working_values
from latent_tiles.executor.program import ProgramBuilder
from latent_tiles.executor.schedule import passes
from latent_tiles.geometry import Size


def test_keys_and_values_lie_beside_the_layers_after_their_attention() -> None:
    build, size = ProgramBuilder(), Size(40, 40)
    x = build.input(4)
    attended = build.attention(*(build.pointwise(torch.neg, x) for _ in range(3)), heads=1)
    program = build.build(build.convolution(attended, nn.Conv2d(4, 64, 3, padding=1)))
    task = passes(program, ())[-1]
    assert len(task.streams) == 2
    sizes = program.sizes({x: size})
    whole, none = (working_values(program, task, sizes, 8, chunk_tokens=keys) for keys in (size.area, 1))
    # The convolution is the worst moment: its input, its output and a copy.
    assert none == 10 * 10 * 4 + 2 * 8 * 8 * 64
    assert whole == none + 2 * size.area * 4
