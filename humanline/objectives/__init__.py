"""Objectives: one file a family. Plain torch on ``[N]`` floats; the oracle of every kernel."""

from humanline.objectives.base import Objective, TokenObjective
from humanline.objectives.dpo import DPO
from humanline.objectives.grpo import GRPO
from humanline.objectives.kto import KTO
from humanline.objectives.ppo import PPO
from humanline.objectives.reference_free import SimPO, SLiC
from humanline.objectives.sft import SFT

__all__ = ["DPO", "GRPO", "KTO", "PPO", "SFT", "Objective", "SLiC", "SimPO", "TokenObjective"]
