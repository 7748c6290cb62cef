"""The loss of a batch, through ``from_hidden``, and what the reference has to say about it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import humanline as hl
from humanline.rows import IGNORE_INDEX, Layout, Rows
from humanline.training.config import TrainConfig
from humanline.training.errors import UserError
from humanline.training.examples import Batch
from humanline.training.model import Parts, parts
from humanline.training.ranks import ALONE, Ranks

#: Losses that are sums over the completion tokens of the whole optimizer step.
_OVER_ITEMS = ("dapo", "cispo", "vespo")


@dataclass(frozen=True)
class _KTO(hl.KTO):
    """With an accuracy to show: sequences on their side of the reference point."""

    def stats(self, rows: Rows, desirable: Tensor, z0: float | Tensor) -> dict[str, Tensor]:
        gain = rows.sum(rows.log_ratio) - z0
        right = torch.where(desirable, gain > 0, gain < 0)
        accuracy = right.to(rows.logps.dtype).mean()
        return super().stats(rows, desirable, z0) | {"rewards/accuracies": accuracy}


@dataclass(frozen=True)
class _GRPO(hl.GRPO):
    """With a margin and an accuracy to show, as DPO has them: sequence log-ratios to the reference
    of completions better than their group's mean against worse ones."""

    def stats(self, rows: Rows, advantages: Tensor, **batch: Any) -> dict[str, Tensor]:
        log_ratio, logps = rows.sum(rows.log_ratio), rows.sum(rows.logps)
        advantage = rows.mean(torch.where(rows.mask, advantages, 0))
        better, worse = advantage > 0, advantage < 0

        def contrast(x):
            return x[better].mean(), x[worse].mean()

        chosen, rejected = contrast(log_ratio)
        logps_chosen, logps_rejected = contrast(logps)
        right = torch.where(better, log_ratio > 0, log_ratio < 0)[better | worse]
        return super().stats(rows, advantages, **batch) | {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": right.to(rows.logps.dtype).mean(),
            "logps/chosen": logps_chosen,
            "logps/rejected": logps_rejected,
        }


def make_objective(config: TrainConfig) -> hl.Objective:
    """The objective and perception that a configuration names.

    Raises:
        UserError: they refuse an option.
    """
    try:
        perception = {
            "clip": lambda: hl.Clip(config.log_eps_P, config.log_eps_R),
            "none": hl.Identity,
            "rejection": hl.BetaRejection,
        }[config.perception]()
        common = {"beta": config.beta, "loss_type": config.loss_type, "perception": perception}
        if config.objective == "dpo":
            return hl.DPO(**common)
        if config.objective == "kto":
            weights = config.desirable_weight, config.undesirable_weight
            return _KTO(**common, desirable_weight=weights[0], undesirable_weight=weights[1])
        return _GRPO(**common, epsilon=config.epsilon, max_completion_length=config.max_length)
    except ValueError as error:
        raise UserError(str(error)) from error


def reference_scores(model: nn.Module, batch: Batch, bf16: bool = False) -> dict[str, Tensor]:
    """What the loss needs of the reference: its log-probs ``[S, C]`` of the completion tokens (0
    where there is none; padding-free ``[M]``), and those of KTO's mismatched pairs."""
    with autocast(batch, bf16):
        policy = parts(model)
        prompts = policy.read_prompts(batch)
        scores = {"ref_logps": _logps(policy, policy.rows(prompts, batch.completions))}
        if batch.mismatched is not None:
            scores["kl_ref_logps"] = _logps(policy, policy.rows(prompts, batch.mismatched))
    return scores


def loss(
    objective: hl.Objective,
    model: nn.Module,
    batch: Batch,
    scores: dict[str, Tensor],
    of: list[Batch],
    bf16: bool = False,
    gradient_tolerance: float = 0.0,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The batch's share of the loss of an optimizer step whose micro-batches are ``of``.

    The step's loss is the sum over them, and the mean over ranks.
    """
    extra, share = dict(batch.extra), 1 / len(of)
    if objective.loss_type in _OVER_ITEMS:
        extra["num_items_in_batch"] = sum(b.whole.written for b in of)
        share = float(ranks.count)
    elif objective.loss_type in ("bnpo", "sft"):  # means over tokens: ranks have unequally many
        mine, all_ranks = _tokens_averaged(objective, batch)
        share *= ranks.count * mine / max(all_ranks, 1)
    with autocast(batch, bf16):
        policy = parts(model)
        prompts = policy.read_prompts(batch)
        if batch.mismatched is not None:
            with torch.no_grad():
                mismatched = policy.rows(prompts, batch.mismatched)
                extra["kl_logps"] = _logps(policy, mismatched)
            extra["kl_mask"] = mismatched["labels"] != IGNORE_INDEX
            extra["kl_cu_seqlens"] = mismatched["cu_seqlens"]
            extra["kl_ref_logps"] = scores["kl_ref_logps"]
        if ranks.count > 1 and batch.whole.mismatched:
            extra = _with_reference_point(objective, extra, batch.whole.mismatched, ranks)
        rows = policy.rows(prompts, batch.completions)
        value, stats = objective.from_hidden(
            **rows,
            **policy.head,
            **extra,
            ref_logps=scores["ref_logps"],
            gradient_tolerance=gradient_tolerance,
        )
    return value * share, stats


def _tokens_averaged(objective: hl.Objective, batch: Batch) -> tuple[int, int]:
    """How many tokens a loss that is their mean has, here and on all ranks."""
    written = batch.completions.written
    if isinstance(objective, hl.DPO):  # SFT on the chosen half
        return int(written[: len(written) // 2].sum()), batch.whole.written_first
    return int(written.sum()), batch.whole.written


def _with_reference_point(
    objective: hl.KTO, extra: dict[str, Any], pairs: int, ranks: Ranks
) -> dict[str, Any]:
    """KTO's z0 of all ranks' mismatched pairs in place of this rank's, which may be none."""
    names = ("kl_logps", "kl_ref_logps", "kl_mask", "kl_cu_seqlens")
    logps, ref_logps, mask, cu_seqlens = (extra.get(name) for name in names)
    total = 0.0
    if logps is not None:
        rows = Layout.of(mask, cu_seqlens), logps.reshape(-1), ref_logps.reshape(-1)
        total = float(objective.mismatched_rewards(*rows).sum())
    z0 = max(sum(ranks.gather("KTO's reference point", total)) / pairs, 0.0)
    return {name: x for name, x in extra.items() if name not in names} | {"z0": z0}


@torch.no_grad()
def log_ratios(
    model: nn.Module, batch: Batch, scores: dict[str, Tensor], bf16: bool = False
) -> Tensor:
    """Log-ratios ``[T]`` of the completion tokens to what the reference scored, in nats."""
    with autocast(batch, bf16):
        policy = parts(model)
        rows = policy.rows(policy.read_prompts(batch), batch.completions)
        d = _logps(policy, rows) - scores["ref_logps"]
    return d[rows["labels"] != IGNORE_INDEX]


@torch.no_grad()
def sequence_logps(model: nn.Module, batch: Batch, bf16: bool = False) -> Tensor:
    """Log-probs of whole completions, float64 ``[S]``."""
    with autocast(batch, bf16):
        policy = parts(model)
        rows = policy.rows(policy.read_prompts(batch), batch.completions)
        logps = _logps(policy, rows)
    layout = hl.Layout.of(rows["labels"] != IGNORE_INDEX, rows["cu_seqlens"])
    return layout.sum(logps.double().reshape(-1))


def _logps(policy: Parts, rows: dict[str, Any]) -> Tensor:
    return hl.linear_token_logps(rows["hidden"], labels=rows["labels"], **policy.head)


def autocast(batch: Batch, bf16: bool):
    """A context of its own for each forward: autocast caches the weights it has cast."""
    return torch.autocast(batch.prompt_ids.device.type, torch.bfloat16, enabled=bf16)
