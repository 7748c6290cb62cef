"""What the kernels are launched with: how the rows lie in memory, how large a tile is."""

import sys
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .interpreter import correct_interpreter

correct_interpreter()


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
    def aligned(self) -> bool:
        """Whether every row can be loaded 16 bytes at a time, of which Triton makes sure by what
        16 divides: the address, the distance of two rows, and their length."""
        numbers = self.data.data_ptr(), self.row_stride, self.data.shape[-1]
        return all(number % 16 == 0 for number in numbers)

    @property
    def arguments(self) -> tuple:
        return self.data, self.rows_per_batch, self.batch_stride_rows, self.row_stride


def _even(x: Tensor) -> bool:
    """Whether the batch stride of ``[B, T, V]`` is a whole number of rows."""
    return x.stride(1) > 0 and x.stride(0) % x.stride(1) == 0


def row_length(vocab: int) -> int:
    """Elements from one row to the next where we lay them out: with every row at a multiple of 16,
    a vocabulary such as 50,257 is loaded, and multiplied, 16 bytes at a time."""
    return triton.cdiv(vocab, 16) * 16


def dense(x: Tensor | None) -> Tensor | None:
    """Row values as the kernels read them: one after the other, whatever view they came as."""
    return None if x is None else x.reshape(-1).contiguous()


# Warps a row is given, by its length: up to so many logits, so many warps. Measured on an H100, in
# bfloat16. What is read once wants several rows on an SM: while one is summed up others are read.
# What is read again wants them to stay in the caches, which one long row to each SM already fills.
READ_ONCE = {4_096: 4, 65_536: 8, sys.maxsize: 16}
READ_AGAIN = {4_096: 4, 32_768: 8, 65_536: 16, sys.maxsize: 32}

# Bytes of a tile that are a thread's. Of an aligned row, one load; another is loaded an element at
# a time, see rows.tiles_in_flight.
LANE_BYTES = {"aligned": 16, "unaligned": 8}


def row_config(
    vocab: int, dtype: torch.dtype, aligned: bool, by_length: dict[int, int]
) -> dict[str, int]:
    """Tile and warps for rows of this length, by one of the tables above.

    They are fixed, not tuned on the spot: the fastest differs from run to run, and with it the last
    bits of a sum.

    Args:
        aligned: see :attr:`RowTensor.aligned`.
    """
    warps = next(w for length, w in by_length.items() if vocab <= length)
    return row_tile(warps, dtype, aligned)


def row_tile(warps: int, dtype: torch.dtype, aligned: bool) -> dict[str, int]:
    """The launch arguments for so many warps of 32 threads."""
    lanes = 32 * warps
    if torch.version.hip:  # 64 lanes a warp, 1,024 threads at most
        warps = max(warps // 2, 1)
        lanes = 64 * warps
    per_lane = LANE_BYTES["aligned" if aligned else "unaligned"] // max(dtype.itemsize, 2)
    return {"LANES": lanes, "PER_LANE": per_lane, "num_warps": warps}


@dataclass(frozen=True)
class GemmConfig:
    """Tiles of a GEMM ``[N, H] @ [V, H]ᵀ``: ``rows`` of N × ``columns`` of V × ``depth`` of H.

    ``descriptors`` says whether the target loads tiles by TMA.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    descriptors: bool = False

    @property
    def launch(self) -> dict[str, int]:
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# Chosen by reasoning (see linear_logps.py) and by bench/machine_code/compile_report.py: no
# registers spilled.
# - sm_90: what two warpgroups can accumulate, four stages of 48 kB.
# - sm_100: the accumulator is in tensor memory, the rest the same.
# - others: 128 × 128 in 64 kB of shared memory, which sm_86, sm_89, sm_120 and gfx942 have too.
# A row's numbers must not depend on the number of rows, so a tile does not either.
_HALF = {
    "sm_90": GemmConfig(128, 256, 64, warps=8, stages=4, descriptors=True),
    "sm_100": GemmConfig(128, 256, 64, warps=8, stages=4, descriptors=True),
    "gfx": GemmConfig(128, 128, 64, warps=8, stages=2),
    "sm_80": GemmConfig(128, 128, 32, warps=8, stages=4),
}
# Full float32 without tensor cores: multiply-adds from registers.
_FULL = GemmConfig(64, 64, 16, warps=4, stages=2)


def gemm_target(x: Tensor) -> str:
    """The row of the table for the device of ``x``; Triton's interpreter runs sm_90's tiles."""
    if torch.version.hip:
        return "gfx"
    major = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def gemm_config(dtype: torch.dtype, target: str, columns: int = 256, stages: int = 4) -> GemmConfig:
    """Tiles for this dtype and target, at most so many columns (a long epilogue needs registers)
    and stages."""
    config = _FULL if dtype == torch.float32 else _HALF[target]
    return replace(config, columns=min(config.columns, columns), stages=min(config.stages, stages))


def operand(x: Tensor, tile: tuple[int, int], config: GemmConfig) -> Tensor | TensorDescriptor:
    """``x [R, C]`` as a descriptor of such tiles, where the target has them and rows are aligned
    to 16 bytes; as it is elsewhere."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    if not (config.descriptors and aligned and x.stride(0) >= x.shape[1]):
        return x
    return TensorDescriptor(x, [*x.shape], [*x.stride()], [*tile])


def row_group(config: GemmConfig, width: int, dtype: torch.dtype) -> int:
    """Row tiles that run together: as many as 16 MiB of L2 hold the hidden states of."""
    return max(16 * 2**20 // (config.rows * width * dtype.itemsize), 1)
