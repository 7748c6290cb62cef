"""The row kernels that are reported by name, and where the committed compile reports are."""

import json
from pathlib import Path
from typing import Any

REPORTS = Path(__file__).parents[1] / "results/compile-report"
TOLD = "3.7.1"  # the Triton whose machine code README and the model speak of

# Row kernels as ``--kernel`` names them, and bytes they move per element of a row in the dtype
# asked for: reads that miss the caches, and writes.
ROW_KERNELS = {
    "token_loss": ("loss, clipped", lambda size: 2 * size),
    "log_sum_exp": ("forward", lambda size: size),
    "gradient": ("backward", lambda size: 2 * size),
    "head_softmax": ("block, softmax", lambda size: 4),
    "head_gradient": ("block, dz", lambda size: 4 + size),
}


def reports() -> dict[str, dict[str, Any]]:
    """The committed compile reports, by Triton's version."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(REPORTS.iterdir())]
    return {report["environment"]["triton"]: report for report in found}
