"""The columns of the logits' gradient that matter, and the backward's GEMMs over these alone.

In a block of rows most of the vocabulary is so improbable everywhere that its part of the gradient
is far below the rounding of what is kept. For a tolerance δ > 0 the columns of least energy
``e_v = Σ_t (scale_t · dz_tv)²`` are left out, as many as keep what the block lacks of its gradient
under δ in the Frobenius norm: ``Σ_out e_v ≤ δ² Σ e_v``. The labels' columns always stay. Both
products then run over the share ρ of columns that is left, gathered a tile at a time: 2·ρ·F in
place of 2F. Where ρ is more than ``DENSE_SHARE``, gathering would cost what it saves, and the block
is multiplied as it is.

What is left out, ``D [n, V]``, is nearly of rank 1, for rows agree on what they find improbable:
``D ≈ m qᵀ`` with ``m`` the sums of its rows and ``q`` the least-squares fit to them, which is never
worse than 0, whatever sign the coefficients have and whether or not an entropy or a softcap takes
part. That is put back: ``m (qᵀ W)`` into the gradient of hidden states, ``q (mᵀ h)`` into that of
the weight, whose rows thus all get one. It costs vectors: two reads of dz, one of the weight, one
pass over the weight's gradient. The gradient of the bias is a vector itself, and exact.

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

#: Where more is kept than this, all is.
DENSE_SHARE = 0.7

_UNITS = 2.0**60  # of a block's energy: their sum stays an int64
_TILE_ELEMENTS = 2**22  # on a CPU: of dz and of the weight, gathered at a time
_GPU_TILE_ELEMENTS = 2**26  # fewer, larger products: each reads and writes its sum
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
        device: of the statistic.
        backend: "triton" takes the energies by a kernel.

    Attributes:
        share: the mean share of columns that the blocks so far have kept, each weighted by its
            rows, so that the products over them cost ``2 · share · F``. A float32 scalar tensor,
            written when blocks are chosen; 0 as long as there was none.
    """

    def __init__(self, tolerance: float, device: torch.device, backend: str = "torch"):
        self.tolerance, self._backend = float(tolerance), backend
        self.share = torch.zeros((), device=device) if tolerance else None
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
        weights = unit_weights(dz) if scale is None else row_weights(scale)
        if energies is None:
            energies = self._energies(dz, weights)
        columns = fewest(energies, labels, self.tolerance)
        if len(columns) > DENSE_SHARE * vocab:
            columns = None
        self._rows += n
        self._kept += n * (vocab if columns is None else len(columns))
        self.share.fill_(self._kept / (self._rows * vocab))
        return None if columns is None else Kept.of(dz, weights, columns, self._backend)

    def _energies(self, dz: Tensor, weights: Tensor) -> Tensor:
        if self._backend == "triton":
            from humanline.kernels.columns import column_energies

            return column_energies(dz, weights)
        total = weights.new_zeros(dz.shape[1])
        for some, x in _in_floats(dz):
            total.addmv_(x.square().T, weights[some])
        return total


def row_weights(scale: Tensor) -> Tensor:
    """Squares of the rows' scales ``[n]``, in float32 at least, the largest being 1."""
    return (scale / gemms.top(scale)).to(compute_dtype(scale.dtype)).square()


def unit_weights(dz: Tensor) -> Tensor:
    """What makes the energy of every row of ``dz [n, V]`` 1; 0 of one that has none."""
    dtype = compute_dtype(dz.dtype)
    squared = torch.linalg.vector_norm(dz, dim=1, dtype=dtype).square()
    return torch.where(squared > torch.finfo(dtype).tiny, squared.reciprocal(), 0)


def fewest(energies: Tensor, labels: Tensor, tolerance: float) -> Tensor:
    """The fewest columns ``[K]``, in order and with the labels' among them, without which no more
    than ``tolerance²`` of the energy ``[V]`` is lost; all if that is 0 or not finite. Reads K.

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
    kept = torch.empty_like(left_out).scatter_(0, order, ~left_out)
    return kept.nonzero().squeeze(1)


@dataclass(frozen=True)
class Kept:
    """Products over some columns of a block's ``dz [n, V]``, and nearly over the others.

    Attributes:
        columns: int64 ``[K]``, in order.
        mass: ``m``, the sum of what each row leaves out, ``[n]``.
        fit: ``q [V]``, 0 at the columns that are kept: ``m qᵀ`` is nearly what is left out.
        backend: "triton" takes sums by kernels, which widen nothing in memory.
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

    def hidden_gradient(self, dz: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """``dz @ weight [n, H]`` in float32 (float64 from float64); ``labels [n]`` of the rows."""
        of_fit = _weighted_sum(weight, self.fit, self.backend)
        product = self.mass[:, None] * of_fit
        if gemms.rounds_products(weight):  # as in gemms.hidden_gradient
            at_label = labels.long()[:, None]
            product.addcmul_(dz.gather(1, at_label).to(product.dtype), weight[at_label[:, 0]])
        for tile in self._tiles(len(dz), weight.shape[1]):
            gathered = dz[:, tile]
            if gemms.rounds_products(weight):
                gathered.masked_fill_(tile == labels[:, None], 0)
            gemms.add_product_(product, gathered, weight[tile])
        return product

    def add_weight_gradient_(self, total: Tensor, dz: Tensor, scale: Tensor, h: Tensor) -> Tensor:
        """``total [V, H] += dzᵀ @ (scale·h)``, in float32 or float64; returns ``total``."""
        total.addr_(self.fit, self._of_left_out(scale, h))
        for tile in self._tiles(len(dz), h.shape[1]):
            total.index_add_(0, tile, gemms.weight_gradient(dz[:, tile], scale, h))
        return total

    def rounded_weight_gradient(self, dz: Tensor, scale: Tensor, h: Tensor) -> Tensor:
        """``dzᵀ @ (scale·h)``, ``[V, H]`` in the dtype of ``h``, rounded once."""
        left_out = self.fit[:, None], self._of_left_out(scale, h)
        dw = torch.mul(*left_out, out=h.new_empty(dz.shape[1], h.shape[1]))
        for tile in self._tiles(len(dz), h.shape[1]):
            dw[tile] = gemms.rounded_weight_gradient(dz[:, tile], scale, h)
        return dw

    def _of_left_out(self, scale: Tensor, h: Tensor) -> Tensor:
        """``mᵀ (scale·h)``, ``[H]``."""
        return h.to(self.mass.dtype).T @ (scale * self.mass)

    def _tiles(self, rows: int, width: int) -> tuple[Tensor, ...]:
        elements = _TILE_ELEMENTS if checks.free_to_read(self.columns) else _GPU_TILE_ELEMENTS
        return self.columns.split(max(1, elements // max(rows, width)))


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
    floats = _CHUNK_FLOATS if checks.free_to_read(x) else _GPU_TILE_ELEMENTS
    rows = max(1, floats // x.shape[1])
    for start in range(0, len(x), rows):
        some = slice(start, start + rows)
        yield some, x[some].to(compute_dtype(x.dtype))
