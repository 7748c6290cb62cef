"""What every row kernel is launched with: how the rows lie in memory, how wide a tile is."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowTensor:
    """Rows of a ``[..., V]`` tensor as the kernels address them: no copy of ``logits[:, :-1]``.

    With ``b, t = divmod(r, rows_per_batch)``, row ``r`` starts ``(b · batch_stride_rows + t) ·
    row_stride`` elements into ``data``. Measuring the batch stride in rows keeps the alignment of a
    row a matter of ``row_stride`` alone: a new sequence length never changes the compiled code.
    """

    data: Tensor
    rows: int
    rows_per_batch: int
    batch_stride_rows: int
    row_stride: int

    @classmethod
    def of(cls, x: Tensor) -> "RowTensor":
        """Rows of ``x [..., V]``; a copy only if they are unevenly spaced or not contiguous."""
        vocab, rows = x.shape[-1], x.shape[:-1].numel()
        if x.dim() > 3 or (x.dim() == 3 and not _even(x)) or (vocab > 1 and x.stride(-1) != 1):
            x = x.contiguous()
        if x.is_contiguous() or x.dim() == 2:
            stride = x.stride(0) if x.dim() == 2 else vocab
            return cls(x, rows, max(rows, 1), 0, stride)
        return cls(x, rows, x.shape[1], x.stride(0) // max(x.stride(1), 1), x.stride(1))

    @property
    def arguments(self) -> tuple:
        return self.data, self.rows_per_batch, self.batch_stride_rows, self.row_stride


def _even(x: Tensor) -> bool:
    """Whether the batch stride of ``[B, T, V]`` is a whole number of rows."""
    return x.stride(1) > 0 and x.stride(0) % x.stride(1) == 0


def dense(x: Tensor | None) -> Tensor | None:
    """Row values as the kernels read them: one after the other, whatever view they came as."""
    return None if x is None else x.reshape(-1).contiguous()


def row_config(vocab: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile and warps for rows of this length.

    A long row gets 1,024 threads, so that one program fills an SM: with a row of 300 kB to each of
    132 SMs, the second read finds the row in L2. 32 bytes a thread and step keep two 16-byte loads
    in flight.
    """
    warps = 4 if vocab <= 4096 else 8 if vocab <= 16384 else 16 if vocab <= 65536 else 32
    if torch.version.hip:  # 64 lanes a warp, 1,024 threads at most
        warps = max(warps // 2, 1)
        lanes = 64 * warps
    else:
        lanes = 32 * warps
    return {"LANES": lanes, "PER_LANE": 32 // max(dtype.itemsize, 2), "num_warps": warps}
