"""What a run says of itself before it starts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from humanline.training import report, state
from humanline.training.config import TrainConfig
from humanline.training.ranks import Ranks

_UNITS = {"dpo": "pairs", "kto": "labelled completions", "grpo": "completions with advantages"}


def lines(
    config: TrainConfig,
    output: Path,
    folder: Path,
    policy: nn.Module,
    device: torch.device,
    units: int,
    measured: str | None,
    ranks: Ranks,
) -> Iterator[str]:
    """The header, a line a fact.

    Args:
        config, output, device, ranks: of the run.
        folder: the model's.
        policy: the model, with its adapters if it has any.
        units: how many pairs or completions there are to train on.
        measured: what is held out and measured; None: nothing is.
    """
    facts = {
        "model": _model(config, folder, policy),
        "data": _data(config, units, measured, ranks),
        "objective": _objective(config, ranks),
        "perception": _perception(config),
        "device": _device(config, device, ranks),
        "folder": _folder(config, output, policy),
        "plan": _plan(config, measured),
    }
    return (f"{name:<11} {text}" for name, text in facts.items())


def _model(config: TrainConfig, folder: Path, policy: nn.Module) -> str:
    weights = list(policy.parameters())
    count, trained = (sum(p.numel() for p in w) for w in (weights, _trained(policy)))
    which = "all of them train" if count == trained else f"{report.count(trained)} train (LoRA)"
    return f"{folder.name}: {report.count(count)} weights in {config.dtype}, {which}"


def _data(config: TrainConfig, units: int, measured: str | None, ranks: Ranks) -> str:
    source = config.data or "the example task (arithmetic)"
    steps = config.per_device_train_batch_size * config.gradient_accumulation_steps * ranks.count
    passes = steps * config.max_steps / units
    held = f"{measured} are held out" if measured else "nothing is held out"
    return f"{source}: {units:,} {_UNITS[config.objective]}, read {passes:.2g} times; {held}"


def _objective(config: TrainConfig, ranks: Ranks) -> str:
    whole = config.gradient_accumulation_steps * ranks.count
    batch = f"{config.per_device_train_batch_size}" + (f" × {whole}" if whole > 1 else "")
    return (
        f"{config.objective} (loss {config.loss_type}, beta {config.beta:g}): {config.max_steps} "
        f"steps of {batch} {_UNITS[config.objective]}, learning rate {config.learning_rate:g}"
    )


def _perception(config: TrainConfig) -> str:
    if config.loss_type == "sft":
        return "none: the loss has no reference"
    acts = {
        "none": "none",
        "clip": f"log-ratios are clipped to [{config.log_eps_P:g}, {config.log_eps_R:g}]",
        "rejection": "tokens are rejected at random, the extreme ones most likely",
    }[config.perception]
    return f"{acts}; the reference is {reference(config)} ({config.reference})"


def reference(config: TrainConfig) -> str:
    """The reference in words."""
    if config.sync_every == 0:
        return "the policy before training"
    if config.sync_every == 1:
        return "the policy one step ago"
    return f"the policy up to {config.sync_every} steps ago"


def _device(config: TrainConfig, device: torch.device, ranks: Ranks) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type}, {torch.get_num_threads()} threads"
    if ranks.count == 1:
        return name
    return f"{ranks.count} processes ({'FSDP2' if config.fsdp else 'DDP'}), each with {name}"


def _folder(config: TrainConfig, output: Path, policy: nn.Module) -> str:
    size = report.size(state.expected_bytes(policy, config))
    often = f"every {config.save_steps} steps and " if config.save_steps else ""
    return f"{output}; checkpoints of about {size}, {often}at the end, of which the last is kept"


def _plan(config: TrainConfig, measured: str | None) -> str:
    train = f"train {config.max_steps} steps"
    if measured is None:
        return f"{train}; how long that takes is said after the first ones"
    return f"measure, {train}, measure again; how long that takes is said after the first steps"


def _trained(policy: nn.Module) -> list[Any]:
    return [p for p in policy.parameters() if p.requires_grad]
