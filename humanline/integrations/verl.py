"""verl: its PPO loss on perceived log-ratios, as the policy loss "humanline".

    actor_rollout_ref.model.external_lib=humanline.integrations.verl
    actor_rollout_ref.actor.policy_loss.loss_mode=humanline

For other bounds, or another perception, let ``external_lib`` name a module of your own::

    import humanline as hl
    from humanline.integrations.verl import register

    register(hl.Clip(-0.05, 0.05))

The loss is verl's own "vanilla", which is handed the perceived log-ratio: ratio clip, dual clip,
``loss_agg_mode``, rollout weights, normalisers over the global batch and metrics are all verl's.

The reference is verl's ``old_log_prob``: the policy as it stood when the batch arrived, before any
of its steps, so it is synced every ``ppo_epochs`` × mini-batches optimizer steps. A batch that
makes a single step is on-policy: every ratio is 1, and there is nothing to perceive.
"""

from typing import Any

import torch
from torch import Tensor

from humanline import install
from humanline.integrations.perceived import perceived_log_ratio, share
from humanline.perception import Clip, Perception

try:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn, register_policy_loss
    from verl.utils.torch_functional import masked_mean
except ImportError as error:
    raise ImportError(
        f"humanline.integrations.verl needs verl: {install.command('verl')}"
    ) from error


def register(perception: Perception, name: str = "humanline") -> None:
    """Make ``policy_loss.loss_mode=name`` verl's vanilla loss under ``perception``.

    Args:
        perception: a frozen value such as ``Clip(log_eps_P, log_eps_R)``.
        name: what the configuration calls it; a loss of that name is replaced.

    Raises:
        TypeError: ``perception`` is not a :class:`~humanline.perception.Perception`.
    """
    if not isinstance(perception, Perception):
        raise TypeError(
            f"perception must be a humanline Perception such as Clip(), got {perception!r}"
        )

    @register_policy_loss(name)
    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        c, *counts = perceived_log_ratio(perception, log_prob, old_log_prob, response_mask)
        # The vanilla loss sees log-probs only as log_prob − old_log_prob: c and 0 stand for them
        # without rounding anything.
        loss, metrics = get_policy_loss_fn("vanilla")(
            old_log_prob=torch.zeros_like(c),
            log_prob=c,
            advantages=advantages,
            response_mask=response_mask,
            loss_agg_mode=loss_agg_mode,
            config=config,
            rollout_is_weights=rollout_is_weights,
        )
        # Of log-ratios as they are, not as perceived; bounded as in the vanilla loss.
        kl = masked_mean((old_log_prob - log_prob).clamp(-20, 20), response_mask)
        return loss, metrics | {
            "actor/ppo_kl": kl.detach().item(),
            "actor/humanline_unclamped": share(*counts).item(),
        }


register(Clip())
