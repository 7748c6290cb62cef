"""humanline: fused preference and RL objectives with the human perceptual bias inside the loss.

    objective × perception × entry point (log-probs | logits | hidden states) × reference

>>> import humanline as hl
>>> objective = hl.DPO(beta=0.1, perception=hl.Clip(-1.5, 1.5))
>>> loss, stats = objective.from_hidden(hidden, weight, labels, ref_logps)  # doctest: +SKIP
"""

from typing import TYPE_CHECKING

from humanline.advantages import group_advantages
from humanline.checks import debug
from humanline.mismatched import mismatched_pairs, mismatched_rows
from humanline.objectives import DPO, GRPO, KTO, PPO, SFT, Objective, SimPO, SLiC, TokenObjective
from humanline.ops import linear_token_logps, shift, token_logps
from humanline.parallel import Parallel
from humanline.perception import BetaRejection, Clip, Identity, Perception, ProspectWeight
from humanline.rows import Layout, Rows
from humanline.version import __version__

__all__ = [
    "DPO",
    "GRPO",
    "KTO",
    "PPO",
    "SFT",
    "BetaRejection",
    "Clip",
    "Identity",
    "Layout",
    "Objective",
    "Parallel",
    "Perception",
    "ProspectWeight",
    "Rows",
    "SLiC",
    "SimPO",
    "TokenObjective",
    "__version__",
    "debug",
    "group_advantages",
    "linear_token_logps",
    "mismatched_pairs",
    "mismatched_rows",
    "shift",
    "token_logps",
]

if TYPE_CHECKING:
    from humanline.integrations.trl.head import patch_trl as patch_trl
else:  # hidden from type checkers, which would believe that it has whatever they ask for

    def __getattr__(name: str):
        if name == "patch_trl":  # imports TRL, so only when it is asked for
            from humanline.integrations.trl.head import patch_trl

            return patch_trl
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
