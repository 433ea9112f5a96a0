"""Which blocks attention visits: what is seen, no other, and masked only where one is needed."""

import pytest
import torch
import triton.language as tl

from gptopt.kernels.attention import reference
from gptopt.kernels.attention.triton_scores import key_range, query_range
from gptopt.kernels.launch import jit, launch


@jit
def ranges_kernel(
    out, T, S, window, CAUSAL: tl.constexpr, BY_KEY: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    block, blocks = tl.program_id(0), tl.num_programs(0)
    if BY_KEY:
        a, b, c, d = query_range(None, block, blocks, 0, block * N, T, S, window, CAUSAL, M, N)
    else:
        first = S - T + block * M
        a, b, c, d = key_range(None, block, blocks, 0, first, S, window, CAUSAL, M, N)
    tl.store(out + block * 4, a)
    tl.store(out + block * 4 + 1, b)
    tl.store(out + block * 4 + 2, c)
    tl.store(out + block * 4 + 3, d)


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("blocks", [(16, 8), (8, 16), (16, 16)])
@pytest.mark.parametrize(
    ("T", "S", "window", "causal"),
    [
        (64, 64, None, True),
        (64, 64, None, False),
        (61, 77, None, True),
        (3, 130, None, True),
        (70, 71, None, False),
        (64, 64, 32, True),
        (61, 90, 19, True),
        (61, 90, 20, False),
        (40, 40, 1, True),
        (5, 90, 40, True),
    ],
)
def test_masks_are_paid_for_only_on_the_edges(device, T, S, window, causal, blocks, by_key):
    M, N = blocks
    own, other, length = (N, M, T) if by_key else (M, N, S)
    see = torch.ones(T, S, dtype=torch.bool)
    visible = reference.visible(reference.distances(T, S, None, see.device), causal, window)
    see = see if visible is None else see & visible[0]
    see = see.T if by_key else see
    out = torch.empty(-(-len(see) // own), 4, dtype=torch.int32, device=device)
    launch(ranges_kernel, (len(out),), out, out, T, S, window, causal, by_key, M, N)
    for row, (start, stop, full_start, full_stop) in zip(see.split(own), out.tolist(), strict=True):
        tiles = row.split(other, 1)
        some = [i for i, tile in enumerate(tiles) if tile.any()]
        full = [i for i, t in enumerate(tiles) if t.all() and t.shape[1] == other]
        if some:
            assert start // other == some[0]
            assert some[-1] * other < stop <= length
            assert -(-stop // other) == some[-1] + 1
        else:
            assert start >= stop
        unmasked = list(range(full_start // other, full_stop // other))
        assert set(unmasked) <= set(full)
        if len(row) == own:  # a part of a block is masked, that costs one block of a call
            assert unmasked == full
