"""Bounds of the clip, from how far log-ratios get when nothing is clipped."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from humanline.reference import REFERENCES
from humanline.training import effects, examples, report, score
from humanline.training.config import TrainConfig
from humanline.training.errors import UserError
from humanline.training.launch import launched
from humanline.training.model import (
    check_fits,
    load_model,
    load_tokenizer,
    model_folder,
    moved,
)
from humanline.training.ranks import ALONE
from humanline.training.run import learning_rate, pick_device, prepare_data, read_data

STEPS = 48  # as many as the bounds of the study in bench/study were set from
QUANTILES = (0.5, 0.67, 0.9, 0.95, 0.99)
KEPT = 0.9  # share of the tokens within the bounds that are suggested


def calibrate(options: dict[str, Any], steps: int = STEPS) -> dict[str, Any]:
    """Train so many steps without perception and without writing anything; print the quantiles of
    the absolute log-ratios to the reference, in nats, and the bounds that a tenth of them exceeds.

    Args:
        options: fields of :class:`TrainConfig`; those that the bounds depend on most are
            ``learning_rate``, ``sync_every`` and ``objective``.
        steps: optimizer steps, at least 2: in the first the reference is the policy.

    Returns:
        ``quantiles`` of the absolute log-ratios, ``tokens`` they were taken of, ``log_eps_P`` and
        ``log_eps_R``.

    Raises:
        UserError: an option that does not act here, or what would end a run too.
    """
    config = _configured(options, steps)
    ratios = torch.cat(list(_log_ratios(config))).sort().values
    if not ratios[-1] > 0:
        raise UserError(
            f"none of {len(ratios)} tokens had a log-ratio to the reference other than 0: there is "
            "nothing to set bounds by"
        )
    quantiles = {q: ratios[math.ceil(q * len(ratios)) - 1].item() for q in QUANTILES}
    bound = float(f"{quantiles[KEPT]:.2g}")
    print(
        f"{len(ratios)} completion tokens of steps 2 to {steps}, {config.objective} at learning "
        f"rate {config.learning_rate:g}, sync every {config.sync_every}, nothing clipped.\n"
        "Absolute log-ratio to the reference, in nats:\n"
        + "\n".join(f"  {q:4.0%} of the tokens: at most {x:.3g}" for q, x in quantiles.items())
        + "\nBounds that a tenth of the tokens exceed: "
        f"--log-eps-P -{bound:g} --log-eps-R {bound:g}"
    )
    return {
        "quantiles": quantiles,
        "tokens": len(ratios),
        "log_eps_P": -bound,
        "log_eps_R": bound,
    }


def _configured(options: dict[str, Any], steps: int) -> TrainConfig:
    if launched()[1] != 1:
        raise UserError("--calibrate works in one process: start it without torchrun")
    if steps < 2:
        raise UserError(
            f"--calibrate must be at least 2 steps, got {steps}: in the first the reference is the "
            "policy, and every log-ratio 0"
        )
    for name, why in {
        "max_steps": "--calibrate N says how many steps there are",
        "perception": "--calibrate trains without one",
    }.items():
        if name in options:
            raise UserError(f"--{name.replace('_', '-')} has no effect: {why}")
    config = TrainConfig(**options, perception="none", max_steps=steps)
    effects.require(config, options)
    if config.loss_type == "sft":
        raise UserError("--loss-type sft has no reference, and none of its tokens a log-ratio")
    return config


def _log_ratios(config: TrainConfig) -> Iterator[torch.Tensor]:
    """Train; of each step but the first, the absolute log-ratios of its completion tokens."""
    device = pick_device(config, ALONE)
    dataset, questions, _ = read_data(config)
    folder = model_folder(config)
    tokenizer = load_tokenizer(folder)
    groups = prepare_data(dataset, questions, tokenizer, config).groups
    torch.manual_seed(config.seed)
    policy = load_model(folder, config, device)
    check_fits(policy, tokenizer, config)
    objective = score.make_objective(config)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0, fused=True)
    scores = partial(score.reference_scores, bf16=config.bf16)
    reference = REFERENCES[config.reference](policy, scores, config.sync_every)
    pad = tokenizer.tokenizer.pad_token_id
    on_device = (
        [moved(batch, device) for batch in batches]
        for batches in examples.optimizer_steps(groups, config, pad)
    )
    with report.counting(config.max_steps, "calibrating", unit="step") as bar:
        for step, (batches, of_reference) in enumerate(reference.steps(on_device)):
            for batch, scored in zip(batches, of_reference, strict=True):
                if step:
                    yield score.log_ratios(policy, batch, scored, config.bf16).abs().cpu()
                loss, _ = score.loss(objective, policy, batch, scored, batches, config.bf16)
                loss.backward()
            nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            reference.before_step()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            if step + 1 == config.max_steps:
                return
