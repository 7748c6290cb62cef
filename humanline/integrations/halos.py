"""HALOs (github.com/ContextualAI/HALOs): drop-ins for its two functions that see log-ratios, and
its configuration in our names.

    from humanline.integrations import halos

    BasicTrainer.get_ratios = halos.get_ratios
    BasicTrainer.get_sequence_rewards = halos.get_sequence_rewards

Where they differ from HALOs' own, on purpose:

- A completion token is one whose log-prob is not 0 under both models (HALOs sets masked ones to 0).
  HALOs takes a token for masked if its *log-ratio* is 0, so that a policy which still equals its
  reference has no tokens: IPO then divides 0 by 0, and the unclamped fraction is 0 instead of 1.
  So too, HALOs leaves tokens out of a length where bounds that touch 0 clamp them to 0.
- Padding is masked after the clip: with bounds that do not bracket 0, HALOs' padding tokens have
  the nearest bound as their reward.
- ``unclamped`` is a float32 scalar, 1 without humanline; HALOs' is then a vector of one element.

Where :func:`from_config` differs from the trainers, on purpose:

- KTO's reference point is the mean over all mismatched pairs, over ranks the mean of their means;
  HALOs leaves pairs with reward 0 out, and divides the sum over ranks by the number over ranks.
- GRPO takes the advantages it is given. :func:`humanline.group_advantages` has TRL's: the sample
  standard deviation, plus 1e-4. HALOs' are ``correction=0, epsilon=1e-2``.
- PPO is the policy's loss; HALOs adds ``critic_coef`` times that of its value head.
- Tokens are counted in integers; HALOs sums masks in the policy's dtype, in bfloat16 to 8 bits.
- The reference of PPO is synced before the optimizer step, as for all others; HALOs' PPO syncs
  after it, so that the next batch starts at a ratio of 1.
- SLiC's regulariser is the log-likelihood of the chosen *sequence*, as its paper has it; HALOs
  takes it token by token.
- ``humanline`` with a loss that has no reference is an error. HALOs' SimPO and SLiC clip the
  log-probs themselves, as log-ratios to a reference of probability 1; its SFT ignores it.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from humanline.integrations.perceived import perceived_log_ratio, share
from humanline.objectives import DPO, GRPO, KTO, PPO, SFT, Objective, SimPO, SLiC
from humanline.perception import Clip, Identity, Perception

#: HALOs' trainers, each as (our objective, from its ``loss`` configuration).
_OBJECTIVES = {
    "SFTTrainer": lambda loss: (SFT, {}),
    "DPOTrainer": lambda loss: (DPO, {"beta": loss["beta"]}),
    "CDPOTrainer": lambda loss: (DPO, {"beta": loss["beta"], "label_smoothing": loss["epsilon"]}),
    "IPOTrainer": lambda loss: (DPO, {"loss_type": "ipo", "beta": loss["tau"]}),
    "KTOTrainer": lambda loss: (
        KTO,
        {name: loss[name] for name in ("beta", "desirable_weight", "undesirable_weight")},
    ),
    "GRPOTrainer": lambda loss: (
        GRPO,
        {
            "loss_type": "bnpo",  # a mean over the tokens of the batch
            "beta": loss["beta"],
            "epsilon": loss["epsilon"],
            "use_bias_correction_kl": False,
        },
    ),
    "PPOTrainer": lambda loss: (
        PPO,
        {"epsilon": loss["cliprange"], "beta": loss["KL_coef"], "kl_estimator": "k1"},
    ),
    "SimPOTrainer": lambda loss: (
        SimPO,
        {"beta": loss["beta"], "gamma": loss["beta"] * loss["gamma_beta_ratio"]},
    ),
    "SLiCTrainer": lambda loss: (
        SLiC,
        {"delta": loss["beta"], "lambda_coef": loss["lambda_coef"]},
    ),
}


def get_ratios(self, policy_logps: Tensor, reference_logps: Tensor) -> tuple[Tensor, Tensor]:
    """``BasicTrainer.get_ratios``: each token's probability ratio, perceived.

    Args:
        policy_logps, reference_logps: ``[B, T]``, 0 where masked.

    Returns:
        Ratios ``[B, T]``, 1 where masked, and the unclamped fraction.
    """
    log_ratio, unclamped = _perceive(self.config, policy_logps, reference_logps)
    return log_ratio.exp(), unclamped


def get_sequence_rewards(
    self, policy_logps: Tensor, reference_logps: Tensor, length_normalized: bool = False
) -> tuple[Tensor, Tensor]:
    """``BasicTrainer.get_sequence_rewards``: each sequence's perceived log-ratios, summed.

    Args:
        policy_logps, reference_logps: ``[B, T]``, 0 where masked.
        length_normalized: divide by the completion tokens; a sequence without any gives 0.

    Returns:
        Rewards ``[B]`` and the unclamped fraction.
    """
    log_ratio, unclamped = _perceive(self.config, policy_logps, reference_logps)
    rewards = log_ratio.sum(-1)
    if length_normalized:
        rewards = rewards / _tokens(policy_logps, reference_logps).sum(-1).clamp(min=1)
    return rewards, unclamped


def _perceive(config: Any, logps: Tensor, ref_logps: Tensor) -> tuple[Tensor, Tensor]:
    mask = _tokens(logps, ref_logps)
    log_ratio, *counts = perceived_log_ratio(perception(config), logps, ref_logps, mask)
    return log_ratio, share(*counts)


def _tokens(logps: Tensor, ref_logps: Tensor) -> Tensor:
    return (logps != 0) | (ref_logps != 0)


def perception(config: Mapping[str, Any]) -> Perception:
    """``humanline``, ``log_epsilon_P`` and ``log_epsilon_R`` as a perception."""
    if not config["humanline"]:
        return Identity()
    return Clip(config["log_epsilon_P"], config["log_epsilon_R"])


def from_config(config: Mapping[str, Any]) -> tuple[Objective, int]:
    """HALOs' configuration as an objective and ``sync_every``, a reference's schedule.

    Args:
        config: what its ``config.yaml`` makes, as a dict or an OmegaConf one: ``loss`` (with the
            trainer's name), ``humanline``, ``log_epsilon_P``, ``log_epsilon_R``.

    Returns:
        The objective under its perception; 1 if the reference is synced at every step, which
        ``humanline`` and ``loss.sync_reference`` both ask for, else 0.

    Raises:
        ValueError: a trainer without a counterpart; humanline for a loss that has no reference.
        KeyError: an option is missing.
    """
    trainer = config["loss"]["trainer"]
    if trainer not in _OBJECTIVES:
        raise ValueError(f"no objective for HALOs' {trainer!r}; known: {', '.join(_OBJECTIVES)}")
    cls, options = _OBJECTIVES[trainer](config["loss"])
    synced = config["humanline"] or config["loss"].get("sync_reference", False)
    return cls(**options, perception=perception(config)), int(synced)
