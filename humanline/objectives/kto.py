"""KTO: a loss on single sequences, each labelled desirable or undesirable."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from humanline import checks
from humanline.distributed import mean_over_ranks
from humanline.dtypes import at_least_float32
from humanline.objectives.base import Objective
from humanline.rows import Layout, Rows


@dataclass(frozen=True)
class KTO(Objective):
    """Kahneman-Tversky optimization (arXiv 2402.01306).

    With the reference point ``z0 = max(0, mean R^KL)`` over mismatched prompt-completion pairs, the
    loss is the mean over sequences of ``w_D (1 − σ(β (R − z0)))`` for desirable ones and ``w_U (1 −
    σ(β (z0 − R)))`` for undesirable ones.

    Batch arguments:
        desirable: bool ``[S]``.
        z0: the reference point, a scalar; or, to have it computed (perceived, clamped at 0; the
            mean over all pairs of the ``sequence`` and ``data`` axes of ``parallel``, without
            these over the means of all ranks there are, as in TRL):
        kl_logps, kl_ref_logps, kl_mask: log-probs of the mismatched pairs, ``[S', T']``, or packed
            together with ``kl_cu_seqlens``.

    Args:
        beta: strength of the pull towards the reference.
        desirable_weight: ``w_D``.
        undesirable_weight: ``w_U``.
        loss_type: "kto", or "apo_zero_unpaired" (arXiv 2408.06266), which uses no reference point.
        perception: how a token's log-ratio to the reference is perceived: Clip, BetaRejection,
            ProspectWeight or a Perception of one's own; Identity() for as it is.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    loss_type: str = "kto"

    coupling: ClassVar[str] = "sequence"
    per_sequence: ClassVar[tuple[str, ...]] = ("desirable",)

    def __post_init__(self):
        super().__post_init__()
        if self.loss_type not in ("kto", "apo_zero_unpaired"):
            raise ValueError(
                f"unknown KTO loss_type {self.loss_type!r}; known: kto, apo_zero_unpaired"
            )

    def prepare(
        self,
        layout: Layout,
        ref_logps: Tensor | None,
        *,
        desirable: Tensor | None = None,
        z0: float | Tensor | None = None,
        kl_logps: Tensor | None = None,
        kl_ref_logps: Tensor | None = None,
        kl_mask: Tensor | None = None,
        kl_cu_seqlens: Tensor | None = None,
    ) -> dict[str, Any]:
        self.require_ref_logps(ref_logps)
        checks.require(desirable is not None, "KTO needs desirable, a bool tensor [S]")
        checks.require_tensors(desirable=desirable)
        checks.require(
            tuple(desirable.shape) == (layout.num_sequences,),
            lambda: (
                f"desirable must have shape {[layout.num_sequences]}, got {list(desirable.shape)}"
            ),
        )
        checks.require_same_device(rows=layout.mask, desirable=desirable)
        checks.require_mask("desirable", desirable)
        if z0 is not None:
            checks.require_number_or_tensor("z0", z0)
        if self.loss_type == "apo_zero_unpaired":
            z0 = 0.0
        elif z0 is None:
            z0 = self._reference_point(layout, kl_logps, kl_ref_logps, kl_mask, kl_cu_seqlens)
        if isinstance(z0, Tensor):
            checks.require(
                z0.numel() == 1, lambda: f"z0 must be one number, got shape {list(z0.shape)}"
            )
            z0 = z0.detach().reshape(())
        return {"desirable": desirable.to(torch.bool), "z0": z0}

    def _reference_point(self, rows: Layout, logps, ref_logps, mask, cu_seqlens) -> Tensor:
        missing = [
            name
            for name, x in (("kl_logps", logps), ("kl_ref_logps", ref_logps), ("kl_mask", mask))
            if x is None
        ]
        checks.require(
            not missing,
            lambda: (
                f"KTO needs its reference point: z0, or kl_logps, kl_ref_logps and kl_mask of "
                f"mismatched pairs; missing {', '.join(missing)}"
            ),
        )
        checks.require_tensors(kl_logps=logps, kl_ref_logps=ref_logps, kl_mask=mask)
        checks.require_tensors_or_none(kl_cu_seqlens=cu_seqlens)
        checks.require(
            logps.shape == ref_logps.shape == mask.shape,
            lambda: (
                f"kl_logps, kl_ref_logps and kl_mask must have one shape, got {list(logps.shape)}, "
                f"{list(ref_logps.shape)} and {list(mask.shape)}"
            ),
        )
        checks.require_floating(kl_logps=logps, kl_ref_logps=ref_logps)
        checks.require_same_device(
            rows=rows.mask, kl_logps=logps, kl_ref_logps=ref_logps, kl_mask=mask
        )
        checks.require_mask("kl_mask", mask)
        layout = Layout.of(mask, cu_seqlens)
        alone = rows.parallel is None
        checks.require(
            layout.num_sequences > 0 or not alone, "KTO's reference point needs a mismatched pair"
        )
        logps, ref_logps = (at_least_float32(x.detach()).reshape(-1) for x in (logps, ref_logps))
        checks.require_finite("kl_ref_logps", ref_logps, layout.mask)
        rewards = self.mismatched_rewards(layout, logps, ref_logps)
        mean = mean_over_ranks(rewards.mean()) if alone else rows.parallel.mean(rewards)
        return mean.clamp(min=0)

    def mismatched_rewards(self, layout: Layout, logps: Tensor, ref_logps: Tensor) -> Tensor:
        """Perceived log-ratios, summed over each of the mismatched pairs: ``[S']``, whose mean,
        clamped at 0, is the reference point. ``logps`` and ``ref_logps`` are flat."""
        d = torch.where(layout.mask, logps - ref_logps, 0)
        return layout.sum(torch.where(layout.mask, self.perception.perceive(d, layout.mask)[0], 0))

    def sequence_kernel_arguments(
        self, desirable: Tensor, z0: float | Tensor
    ) -> dict[str, Any] | None:
        if type(self) is not KTO or self.perception.bounds is None:
            return None  # a subclass may define another loss
        if not isinstance(z0, Tensor):
            z0 = torch.full((), z0, device=desirable.device)
        return {
            "kind": self.loss_type,
            "beta": self.beta,
            "p": self.desirable_weight,
            "q": self.undesirable_weight,
            "desirable": desirable,
            "z0": z0,
        }

    def stats_of(
        self, report: dict[str, Tensor], desirable: Tensor, z0: float | Tensor
    ) -> dict[str, Tensor]:
        return {
            "rewards/chosen": report["chosen"],
            "rewards/rejected": report["rejected"],
            "rewards/margins": report["margins"],
            "logps/chosen": report["chosen_logps"],
            "logps/rejected": report["rejected_logps"],
            "kl": torch.as_tensor(z0, dtype=torch.float32, device=desirable.device),
        }

    def loss(self, rows: Rows, desirable: Tensor, z0: float | Tensor) -> Tensor:
        margin = self.beta * (rows.sum(rows.log_ratio) - z0)
        gain = self.desirable_weight * (1 - torch.sigmoid(margin))
        loss = self.undesirable_weight * (1 - torch.sigmoid(-margin))
        return torch.where(desirable, gain, loss).sum() / max(rows.num_sequences, 1)

    def stats(self, rows: Rows, desirable: Tensor, z0: float | Tensor) -> dict[str, Tensor]:
        rewards, logps = self.beta * rows.sum(rows.log_ratio), rows.sum(rows.logps)

        def mean(x, keep):
            return torch.where(keep, x, 0).sum() / keep.sum()  # NaN where there are none, as in TRL

        chosen, rejected = mean(rewards, desirable), mean(rewards, ~desirable)
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "logps/chosen": mean(logps, desirable),
            "logps/rejected": mean(logps, ~desirable),
            "kl": torch.as_tensor(z0, dtype=rewards.dtype, device=rewards.device),
        }
