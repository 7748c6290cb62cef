"""A trainer's policy scores a batch twice alike: what is random would be taken for its drift."""

from typing import Any

import torch
from torch import Tensor

from humanline.checks import require
from humanline.dropout import noisy_modules, switch_off_noise
from humanline.integrations.trl.head import fused_head


def switch_off(trainer: Any) -> list[str]:
    """Switch off the dropout, and whatever else is random, of a trainer's policy.

    Returns:
        The names of the modules that were random.

    Raises:
        ValueError: the caller asked for humanline and to keep dropout, and there is some; or it
            cannot be switched off. The modules are named.
    """
    model = trainer.model

    def score() -> Tensor:
        ids = torch.tensor([[1, 2, 3, 4], [3, 4, 2, 1]], device=model.device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        with trainer.accelerator.autocast(), fused_head(model, only=()):
            return model(**batch, use_cache=False, fused_lm_head=True).log_probs

    if getattr(trainer.args, "humanline", False) and not trainer.args.disable_dropout:
        noisy = noisy_modules(model, score)
        require(
            not noisy,
            lambda: (
                f"disable_dropout=False contradicts humanline: {', '.join(noisy[:3])}"
                f"{f' and {len(noisy) - 3} more modules' if len(noisy) > 3 else ''} of "
                f"{type(model).__name__} draw random numbers, and the policy's ratio to its "
                "reference would hold them. Set disable_dropout=True, or their probabilities to 0"
            ),
        )
    return switch_off_noise(model, score)
