"""The columns of the logits' gradient that matter, and the backward's GEMMs over these alone.

In a block of rows most of the vocabulary is so improbable everywhere that its part of the gradient
is far below the rounding of what is kept. For a tolerance δ > 0 the columns of least energy
``e_v = Σ_t (scale_t · dz_tv)²`` are left out, as many as keep what the block lacks of its gradient
under δ in the Frobenius norm: ``Σ_out e_v ≤ δ² Σ e_v``. The labels' columns always stay, and move
to the front of the gradient's own memory. Both products then run over the share ρ of columns that
is left: 2·ρ·F in place of 2F. Where ρ is more than :func:`dense_share`, leaving columns out would
cost what it saves, and the block is multiplied as it is; on a CPU, where it is more than
``DENSE_SHARE``. Where that share is so low that hardly any block could be below it, nobody looks.

What is left out, ``D [n, V]``, is nearly of rank 1, for rows agree on what they find improbable:
``D ≈ m qᵀ`` with ``m`` the sums of its rows and ``q`` the least-squares fit to them, which is never
worse than 0, whatever sign the coefficients have and whether or not an entropy or a softcap takes
part. That is put back: ``m (qᵀ W)`` into the gradient of hidden states, ``q (mᵀ h)`` into that of
the weight, whose rows thus all get one. It costs vectors: two reads of dz, one of the weight, one
pass over the weight's gradient (where that is summed over blocks, one for ``gemms.RANK`` of them).
The gradient of the bias is a vector itself, and exact: it is taken before columns move.

Deterministic: energies are summed in a fixed order, compared as whole numbers, and equal ones go by
index.

One number a block is read back: how many columns are kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from humanline import checks
from humanline.dtypes import compute_dtype
from humanline.ops.hidden import gemms
from humanline.ops.hidden.blocks import FLOPS_A_BYTE, FLOPS_A_BYTE_FLOAT32

#: Where more is kept than this, all is, on a CPU.
DENSE_SHARE = 0.7
#: What a GPU could move while columns are chosen in a block, by small launches and a read: an
#: estimate.
CHOOSING_BYTES = 2e9
#: Where no more than this may be kept, all is, without a look: looking costs what it might save.
WORTH_A_LOOK = 0.1

_UNITS = 2.0**60  # of a block's energy: their sum stays an int64
_TILE_ELEMENTS = 2**22  # on a CPU: of dz and of the weight, gathered at a time
_GPU_TILE_ELEMENTS = 2**27  # fewer, larger products: each reads and writes its sum
_GPU_MULTIPLE = 16  # of columns kept: an odd number of them left cuBLAS its slower kernels
_CHUNK_FLOATS = 2**20  # of dz, squared or widened at a time: what a CPU's cache holds


def check_tolerance(gradient_tolerance: Any, capturable: bool) -> None:
    """Raise TypeError or ValueError unless columns can be left out so."""
    checks.require_numbers(gradient_tolerance=gradient_tolerance)
    checks.require(
        0 <= gradient_tolerance < 1,
        lambda: f"gradient_tolerance must be in [0, 1), got {gradient_tolerance}",
    )
    checks.require(
        not (gradient_tolerance and capturable),
        lambda: (
            "capturable reads nothing back from the device, and a gradient_tolerance needs the "
            f"number of columns it keeps: it must be 0 with capturable, got {gradient_tolerance}"
        ),
    )


class Columns:
    """Chooses the columns of block after block.

    Args:
        tolerance: δ in [0, 1); at 0 every block keeps all.
        hidden: ``[..., H]``, whose device and width are those of all blocks.
        backend: "triton" takes the energies by a kernel.

    Attributes:
        share: the mean share of columns that the blocks so far have kept, each weighted by its
            rows, so that the products over them cost ``2 · share · F``. A float32 scalar tensor,
            written when blocks are chosen; 0 as long as there was none.
    """

    def __init__(self, tolerance: float, hidden: Tensor, backend: str = "torch"):
        self.tolerance, self._backend = float(tolerance), backend
        self._width, self._bytes = hidden.shape[-1], hidden.element_size()
        self._on_cpu = checks.free_to_read(hidden)
        self.share = torch.zeros((), device=hidden.device) if tolerance else None
        self._rows = self._kept = 0

    def choose(
        self, dz: Tensor, scale: Tensor | None, labels: Tensor, energies: Tensor | None = None
    ) -> "Kept | None":
        """What to keep of ``dz [n, V]``, whose rows will be multiplied by ``scale [n]``; None for
        all of it.

        Args:
            scale: None where it is not known yet: then rows count alike, whatever their norm, and
                δ bounds the root mean square of their relative errors.
            labels: ``[n]`` of these rows.
            energies: float32 ``[V]``, with the weights of :func:`row_weights`, if they are known.
        """
        n, vocab = dz.shape
        if not self.tolerance or n == 0:
            return None
        most, columns = self._most(n, vocab), None
        if most > WORTH_A_LOOK:
            weights = unit_weights(dz) if scale is None else row_weights(scale)
            if energies is None:
                energies = self._energies(dz, weights)
            multiple = 1 if self._on_cpu else _GPU_MULTIPLE
            columns = fewest(energies, labels, self.tolerance, multiple)
            if len(columns) > most * vocab:
                columns = None
        self._rows += n
        self._kept += n * (vocab if columns is None else len(columns))
        self.share.fill_(self._kept / (self._rows * vocab))
        return None if columns is None else Kept.of(dz, weights, columns, self._backend)

    def looks(self, rows: int, vocab: int) -> bool:
        """Whether it asks which columns of a block of so many rows matter."""
        return bool(self.tolerance) and self._most(rows, vocab) > WORTH_A_LOOK

    def _most(self, rows: int, vocab: int) -> float:
        """The share of columns above which all are kept."""
        if self._on_cpu:
            return DENSE_SHARE
        return dense_share(rows, vocab, self._width, self._bytes)

    def _energies(self, dz: Tensor, weights: Tensor) -> Tensor:
        if self._backend == "triton":
            from humanline.kernels.columns import column_energies

            return column_energies(dz, weights)
        total = weights.new_zeros(dz.shape[1])
        # Of every chunk in the same memory: new pages cost a CPU more than the squares do.
        squares = weights.new_empty(_rows_at_a_time(dz), dz.shape[1])
        for some, x in _in_floats(dz):
            total.addmv_(torch.mul(x, x, out=squares[: len(x)]).T, weights[some])
        return total


def dense_share(rows: int, vocab: int, width: int, element_size: int) -> float:
    """The share of columns below which it is worth to leave the others out, on a GPU.

    It spares two products of 2H FLOPs for each logit left out, and moves, for each logit there is,
    what the sums and what stays take (read twice, read and written); for each element of the
    weight, a line of it in n, the sum over its rows and an outer product, and rows gathered and put
    back. An estimate, which costs little where it errs: near this share both ways take as long.

    Args:
        rows: n of the block.
        width: H.
        element_size: bytes of an element of the logits' gradient, and of the weight.
    """
    flops_a_byte = FLOPS_A_BYTE if element_size == 2 else FLOPS_A_BYTE_FLOAT32
    spared = 4 * width / flops_a_byte
    always = 3 * element_size + 2 * element_size * width / rows + CHOOSING_BYTES / (rows * vocab)
    a_kept = element_size + 6 * element_size * width / rows
    return (spared - always) / (spared + a_kept)


def row_weights(scale: Tensor) -> Tensor:
    """Squares of the rows' scales ``[n]``, in float32 at least, the largest being 1."""
    return (scale / gemms.top(scale)).to(compute_dtype(scale.dtype)).square()


def unit_weights(dz: Tensor) -> Tensor:
    """What makes the energy of every row of ``dz [n, V]`` 1; 0 of one that has none."""
    dtype = compute_dtype(dz.dtype)
    squared = torch.linalg.vector_norm(dz, dim=1, dtype=dtype).square()
    return torch.where(squared > torch.finfo(dtype).tiny, squared.reciprocal(), 0)


def fewest(energies: Tensor, labels: Tensor, tolerance: float, multiple: int = 1) -> Tensor:
    """The fewest columns ``[K]``, in order and with the labels' among them, without which no more
    than ``tolerance²`` of the energy ``[V]`` is lost, and as many more as make K a multiple; all if
    that energy is 0 or not finite. Reads K.

    Energies are rounded up to whole numbers of ``2^-60`` of their sum, so that sums of them, and
    what is chosen, do not depend on an order of addition.
    """
    energies = energies.double()
    total = energies.sum()
    known = torch.isfinite(total) & (total > 0)
    units = (energies / total * _UNITS).ceil().nan_to_num(0, 0, 0).long()
    last = torch.full_like(labels.long(), torch.iinfo(torch.int64).max)
    key = units.clone().scatter_(0, labels.long(), last)
    order = key.argsort(stable=True)
    left_out = units[order].cumsum(0) <= int(tolerance**2 * _UNITS)
    left_out &= (key[order] != last[0]) & known
    count = left_out.sum()  # the first ones: key and sum grow
    count -= (count - len(units)) % multiple
    left_out = torch.arange(len(units), device=count.device) < count
    kept = torch.empty_like(left_out).scatter_(0, order, ~left_out)
    return kept.nonzero().squeeze(1)


@dataclass(frozen=True)
class Kept:
    """Products over some columns of a block's ``dz [n, V]``, and nearly over the others.

    Attributes:
        columns: int64 ``[K]``, in order.
        mass: ``m``, the sum of what each row leaves out, ``[n]``.
        fit: ``q [V]``, 0 at the columns that are kept: ``m qᵀ`` is nearly what is left out.
        backend: "triton" moves and sums by kernels, which widen nothing in memory.
    """

    columns: Tensor
    mass: Tensor
    fit: Tensor
    backend: str

    @classmethod
    def of(cls, dz: Tensor, weights: Tensor, columns: Tensor, backend: str = "torch") -> "Kept":
        """These columns of ``dz``; ``weights`` of :func:`row_weights`."""
        out = weights.new_ones(dz.shape[1]).index_fill_(0, columns, 0)
        mass, fit = _sums(dz, weights, out, backend)
        least = torch.finfo(out.dtype).tiny
        squared = (weights * mass).dot(mass).clamp(min=least)
        return cls(columns, mass, fit.mul_(out / squared), backend)

    def take_(self, dz: Tensor) -> Tensor:
        """The columns kept, ``[n, K]``: moved to the front of ``dz [n, V]``, whose others are lost.
        What the products below take."""
        if self.backend == "triton":
            from humanline.kernels.take_columns import take_columns_

            return take_columns_(dz, self.columns)
        front = dz[:, : len(self.columns)]
        rows = _rows_at_a_time(front)
        for some, to in zip(dz.split(rows), front.split(rows), strict=True):
            to.copy_(some.gather(1, self.columns.expand(len(some), -1)))
        return front

    def hidden_gradient(self, dz: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """``dz @ weight [n, H]`` in float32 (float64 from float64) of the columns ``dz [n, K]``;
        ``labels [n]`` of the rows."""
        of_fit = _weighted_sum(weight, self.fit, self.backend)
        product = self.mass[:, None] * of_fit
        rounds = gemms.rounds_products(weight)
        if rounds:  # as in gemms.hidden_gradient
            labels = labels.long()
            at_label = torch.searchsorted(self.columns, labels)[:, None]
            product.addcmul_(dz.gather(1, at_label).to(product.dtype), weight[labels])
        for place, tile in self._tiles(len(dz), weight.shape[1]):
            of_tile = dz[:, place]
            if rounds:
                of_tile = of_tile.to(weight.dtype, copy=True)
                of_tile.masked_fill_(tile == labels[:, None], 0)
            gemms.add_product_(product, of_tile, weight.index_select(0, tile))
        return product

    def add_weight_gradient_(self, total: Tensor, dz: Tensor, scale: Tensor, h: Tensor) -> Tensor:
        """``total [V, H] += dzᵀ @ (scale·h)`` of the columns ``dz [n, K]`` alone, in float32 or
        float64; returns ``total``."""
        scale, h = gemms.scaled_once(scale, h)
        for place, tile in self._tiles(len(dz), h.shape[1]):
            product = gemms.weight_gradient(dz[:, place], scale, h)
            _put_rows_(total, tile, product, self.backend, add=True)
        return total

    def rounded_weight_gradient(self, dz: Tensor, scale: Tensor, h: Tensor) -> Tensor:
        """``dzᵀ @ (scale·h)`` of the columns ``dz [n, K]``, and nearly of the others: ``[V, H]`` in
        the dtype of ``h``, rounded once."""
        dw = h.new_empty(len(self.fit), h.shape[1])
        _outer_(dw, [self.left_out(scale, h)], self.backend)
        scale, h = gemms.scaled_once(scale, h)
        for place, tile in self._tiles(len(dz), h.shape[1]):
            product = gemms.rounded_weight_gradient(dz[:, place], scale, h)
            _put_rows_(dw, tile, product, self.backend)
        return dw

    def left_out(self, scale: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``q [V]`` and ``mᵀ (scale·h) [H]``, whose outer product the weight's gradient nearly has
        of the columns left out."""
        return self.fit, h.to(self.mass.dtype).T @ (scale * self.mass)

    def add_left_out_(self, total: Tensor, left_out: list[tuple[Tensor, Tensor]]) -> None:
        """``total [V, H] +=`` the outer products, of this block and others, in float32 or float64:
        one pass over it."""
        _outer_(total, left_out, self.backend, add=True)

    def _tiles(self, rows: int, width: int) -> Iterator[tuple[slice, Tensor]]:
        """Some of the columns kept at a time: their places among these, and which they are."""
        elements = _TILE_ELEMENTS if checks.free_to_read(self.columns) else _GPU_TILE_ELEMENTS
        start = 0
        for tile in self.columns.split(max(1, elements // max(rows, width))):
            yield slice(start, start + len(tile)), tile
            start += len(tile)


def _outer_(
    out: Tensor, pairs: list[tuple[Tensor, Tensor]], backend: str, add: bool = False
) -> None:
    """``out +=`` the outer products of columns and rows; or, of one pair, ``out =``."""
    if backend == "triton":
        from humanline.kernels.outer import outer_

        outer_(out, *map(torch.stack, zip(*pairs, strict=True)), add)
        return
    if add:
        columns, rows = map(torch.stack, zip(*pairs, strict=True))
        out.addmm_(columns.T, rows)  # one pass over it, however many they are
    else:
        [(column, row)] = pairs  # rounded as it is written: no sum of that size in float32
        torch.mul(column[:, None], row, out=out)


def _put_rows_(to: Tensor, rows: Tensor, x: Tensor, backend: str, add: bool = False) -> None:
    """``to[rows] = x``, or ``+=``."""
    if backend == "triton":
        from humanline.kernels.put_rows import put_rows_

        put_rows_(to, rows, x, add)
    elif add:
        to.index_add_(0, rows, x)
    else:
        to[rows] = x


def _sums(dz: Tensor, weights: Tensor, out: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """``m = dz @ out [n]`` and ``(weights · m) @ dz [V]``, in float32 at least."""
    if backend == "triton":
        from humanline.kernels.columns import weighted_sum
        from humanline.kernels.masses import masses

        mass = masses(dz, out)
        return mass, weighted_sum(dz, weights * mass)
    mass, fit = torch.empty_like(weights), torch.zeros_like(out)
    for some, x in _in_floats(dz):  # while they are in the cache
        mass[some] = x @ out
        fit.addmv_(x.T, weights[some] * mass[some])
    return mass, fit


def _weighted_sum(x: Tensor, weights: Tensor, backend: str) -> Tensor:
    """``weights @ x [V]``, in float32 at least."""
    if backend == "triton":
        from humanline.kernels.columns import weighted_sum

        return weighted_sum(x, weights)
    total = weights.new_zeros(x.shape[1])
    for some, floats in _in_floats(x):
        total.addmv_(floats.T, weights[some])
    return total


def _in_floats(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of ``x`` at a time, in float32 at least."""
    rows = _rows_at_a_time(x)
    for start in range(0, len(x), rows):
        some = slice(start, start + rows)
        yield some, x[some].to(compute_dtype(x.dtype))


def _rows_at_a_time(x: Tensor) -> int:
    floats = _CHUNK_FLOATS if checks.free_to_read(x) else _GPU_TILE_ELEMENTS
    return min(len(x), max(1, floats // x.shape[1]))
