"""Bytes the row kernels move, counted without a GPU: every load and store of Triton's interpreter.

    python -m bench.machine_code.traffic

A row that a kernel reads a second time is still in L2 (see READ_AGAIN in kernels/launch.py), so
"HBM reads" counts an address once a kernel; "all reads" counts every load. Masked lanes do not.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from contextlib import contextmanager
from itertools import product

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

import humanline as hl


class Traffic:
    """Bytes moved since it was made."""

    def __init__(self):
        self.loaded = self.stored = self.from_hbm = 0
        self._kernel = []  # (addresses, bytes each) of the loads of the running kernel

    def load(self, addresses: np.ndarray, size: int) -> None:
        self.loaded += addresses.size * size
        self._kernel.append((addresses, size))

    def store(self, addresses: np.ndarray, size: int) -> None:
        self.stored += addresses.size * size

    def end_kernel(self) -> None:
        for size in {s for _, s in self._kernel}:
            of_size = np.concatenate([a for a, s in self._kernel if s == size])
            self.from_hbm += np.unique(of_size).size * size
        self._kernel = []

    def per_logit(self, logits: torch.Tensor) -> dict[str, float]:
        counts = {
            "HBM reads": self.from_hbm,
            "all reads": self.loaded,
            "writes": self.stored,
            "HBM total": self.from_hbm + self.stored,
        }
        return {name: count / logits.numel() for name, count in counts.items()}


@contextmanager
def counted():
    """Within this context, the interpreter's loads and stores are added up in a Traffic."""
    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    call = GridExecutor.__call__

    def counting_load(self, ptrs, mask, *rest, **how):
        traffic.load(ptrs.data[mask.data], ptrs.get_element_ty().primitive_bitwidth // 8)
        return load(self, ptrs, mask, *rest, **how)

    def counting_store(self, ptrs, value, mask, *rest, **how):
        traffic.store(ptrs.data[mask.data], ptrs.get_element_ty().primitive_bitwidth // 8)
        return store(self, ptrs, value, mask, *rest, **how)

    def counting_call(self, *args, **kwargs):
        result = call(self, *args, **kwargs)
        traffic.end_kernel()
        return result

    InterpreterBuilder.create_masked_load = counting_load
    InterpreterBuilder.create_masked_store = counting_store
    GridExecutor.__call__ = counting_call
    try:
        yield traffic
    finally:
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store
        GridExecutor.__call__ = call


CLIP = hl.Clip(-1, 1)
OBJECTIVES = {
    "GRPO": hl.GRPO(perception=CLIP),
    "GRPO+H": hl.GRPO(perception=CLIP, entropy_coef=0.01),  # no completion row drops out
    "SFT": hl.SFT(),  # nor here
    "DPO": hl.DPO(perception=CLIP),
    "KTO": hl.KTO(perception=CLIP),
}
BATCH = {
    "GRPO": {"advantages": torch.tensor([1.0, -1.0])},
    "GRPO+H": {"advantages": torch.tensor([1.0, -1.0])},
    "KTO": {"desirable": torch.tensor([True, False]), "z0": 0.1},
}


def measure(
    name: str,
    dtype: torch.dtype = torch.bfloat16,
    active: float = 1.0,
    masked: float = 0.0,
    vocab: int = 8192,
    rows: int = 16,
    upstream: float = 1.0,
) -> dict[str, float]:
    """Bytes a logit of forward and backward.

    Args:
        active: fraction of the completion rows whose log-ratio lies within the clip bounds.
        masked: fraction of all rows outside the completion.
        upstream: the incoming gradient of the loss.
    """
    logits = torch.randn(2, rows // 2, vocab).to(dtype)
    labels = torch.randint(0, vocab, logits.shape[:-1])
    ref_logps = hl.token_logps(logits, labels, backend="torch")
    per_sequence = rows // 2
    labels[:, : round(masked * per_sequence)] = -100
    completion = per_sequence - round(masked * per_sequence)
    ref_logps[:, per_sequence - round((1 - active) * completion) :] += 5
    logits.requires_grad_()
    with counted() as traffic:
        loss, stats = OBJECTIVES[name].from_logits(
            logits, labels, ref_logps, backend="triton", **BATCH.get(name, {})
        )
        loss.backward(torch.tensor(upstream))
    active = 1.0 if name in ("GRPO+H", "SFT") else active
    assert stats["humanline/active_rows"] == 2 * round(active * completion)
    return traffic.per_logit(logits)


def main() -> None:
    print(f"{'objective':10s}{'dtype':>10s}{'active':>8s}{'masked':>8s}{'upstream':>9s}", end="")
    for i, (name, dtype, (active, masked, upstream)) in enumerate(
        product(
            OBJECTIVES,
            (torch.bfloat16, torch.float16, torch.float32),
            ((1.0, 0.0, 1.0), (0.5, 0.0, 1.0), (0.0, 0.0, 1.0), (1.0, 0.5, 1.0), (1.0, 0.0, 0.3)),
        )
    ):
        result = measure(name, dtype, active, masked, upstream=upstream)
        if i == 0:
            print("".join(f"{column:>11s}" for column in result), "  bytes per logit")
        values = "".join(f"{x:11.3f}" for x in result.values())
        print(f"{name:10s}{str(dtype)[6:]:>10s}{active:8.2f}{masked:8.2f}{upstream:9.1f}{values}")


if __name__ == "__main__":
    main()
