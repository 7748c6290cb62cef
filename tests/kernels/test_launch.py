"""What row kernels are launched with: the warps of a row by its length, the tile of a thread."""

import pytest
import torch

from humanline.kernels import launch

HALF = torch.bfloat16


@pytest.mark.parametrize(
    "vocab, once, again",
    [(1, 4, 4), (4_096, 4, 4), (4_097, 8, 8), (32_769, 8, 16), (65_537, 16, 32), (2**40, 16, 32)],
)
def test_a_row_is_given_warps_by_its_length(vocab, once, again):
    for warps, table in ((once, launch.READ_ONCE), (again, launch.READ_AGAIN)):
        assert launch.row_config(vocab, HALF, True, table) == launch.row_tile(warps, HALF, True)
