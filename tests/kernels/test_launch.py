"""What row kernels are launched with: the table by device, its fallback, tuning when asked."""

import pytest
import torch

from humanline.kernels import launch

HALF = torch.bfloat16


@pytest.fixture
def gpu(monkeypatch):
    """A GPU named as one likes, as far as launch.py looks at it."""

    def named(key):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(launch, "device_key", lambda index: key)

    return named


@pytest.mark.parametrize("vocab, warps", [(1, 4), (4_096, 4), (4_097, 8), (65_537, 32)])
def test_a_device_without_a_line_takes_that_of_any(vocab, warps, gpu):
    without_gpu = launch.row_config(vocab, HALF, True)
    gpu("sm_999")
    assert launch.row_config(vocab, HALF, True) == without_gpu
    assert without_gpu["num_warps"] == warps or torch.version.hip


def test_a_device_with_a_line_takes_it(gpu, monkeypatch):
    monkeypatch.setitem(launch.ROW_WARPS, "sm_90", {10**9: 2})
    gpu("sm_90")
    assert launch.row_config(151_936, HALF, True) == launch.row_tile(2, HALF, True)
