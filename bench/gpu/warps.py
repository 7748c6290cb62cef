"""How fast a row kernel is with each number of warps, on the GPU at hand."""

import torch
from triton.testing import do_bench

from humanline.kernels.launch import RowTensor, row_tile
from humanline.kernels.token_logps import humanline_token_logps

WARPS = (4, 8, 16, 32)
ROWS = 4096


def time_warps(vocab: int, dtype: torch.dtype, index: int | None, rows: int = ROWS) -> dict:
    """Milliseconds of the log-prob forward for each number of warps; random rows.

    Without a device (the interpreter), each runs once and its time means nothing.
    """
    device = "cpu" if index is None else f"cuda:{index}"
    logits = torch.randn(rows, vocab, device=device).to(dtype)
    labels = torch.zeros(rows, dtype=torch.long, device=device)
    temperature = torch.ones((), dtype=torch.float64, device=device)
    logps, row_max, row_sum = (torch.empty(rows, device=device) for _ in range(3))

    def launch(config):
        humanline_token_logps[(rows,)](
            logits,
            rows,
            0,
            vocab,
            labels,
            temperature,
            logps,
            row_max,
            row_sum,
            None,
            vocab,
            TEMPERATURE_PER_ROW=False,
            ENTROPY=False,
            **config,
        )

    times = {}
    for warps in WARPS:
        config = row_tile(warps, dtype, RowTensor.of(logits).aligned)
        if index is None:
            launch(config)
            times[warps] = 0.0
        else:
            times[warps] = do_bench(lambda config=config: launch(config), return_mode="median")
    return times
