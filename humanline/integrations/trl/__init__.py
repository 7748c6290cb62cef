"""TRL's trainers with humanline: change one import, keep arguments, datasets, logging, PEFT.

>>> import torch
>>> from humanline.integrations.trl import HumanlineDPOConfig, HumanlineDPOTrainer
>>> use_cpu = not torch.accelerator.is_available()
>>> args = HumanlineDPOConfig(log_eps_P=-1.5, log_eps_R=1.5, sync_every=1, use_cpu=use_cpu)
>>> HumanlineDPOTrainer(model, args=args, train_dataset=pairs).train()  # doctest: +SKIP

With ``humanline=False`` they are TRL's trainers, bit for bit. :func:`apply_humanline` turns a
trainer that someone else has built into one; :func:`patch_trl` only swaps TRL's kernels.
"""

from humanline.integrations.trl.head import patch_trl
from humanline.integrations.trl.trainers import (
    HumanlineDPOConfig,
    HumanlineDPOTrainer,
    HumanlineGRPOConfig,
    HumanlineGRPOTrainer,
    HumanlineKTOConfig,
    HumanlineKTOTrainer,
    apply_humanline,
)

__all__ = [
    "HumanlineDPOConfig",
    "HumanlineDPOTrainer",
    "HumanlineGRPOConfig",
    "HumanlineGRPOTrainer",
    "HumanlineKTOConfig",
    "HumanlineKTOTrainer",
    "apply_humanline",
    "patch_trl",
]
