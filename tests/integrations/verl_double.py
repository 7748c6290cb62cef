"""What humanline.integrations.verl uses of verl 0.9.1, transcribed: the registry of policy losses,
the signature of the vanilla loss and what it computes, the names of its metrics."""

import sys
from types import ModuleType

import torch

REGISTRY = {}


def register_policy_loss(name):
    def decorator(function):
        REGISTRY[name] = function
        return function

    return decorator


def get_policy_loss_fn(name):
    return REGISTRY[name]


def masked_mean(values, mask, axis=None):
    return torch.where(mask.bool(), values, 0).sum(axis) / (mask.sum(axis) + 1e-8)


def aggregate(loss, mask, mode, dp_size=1, batch_num_tokens=None, global_batch_size=None, **scale):
    if mode == "token-mean":
        tokens = mask.sum() if batch_num_tokens is None else batch_num_tokens
        return (loss * mask).sum() / tokens * dp_size
    lengths = mask.sum(-1)
    sequences = (loss * mask).sum(-1)
    if mode == "seq-mean-token-mean":
        sequences = sequences / (lengths + 1e-8)
    elif mode == "seq-mean-token-sum-norm":
        sequences = sequences / (scale.get("loss_scale_factor") or mask.shape[-1])
    count = (lengths > 0).sum() if global_batch_size is None else global_batch_size
    return sequences.sum() / count * dp_size


@register_policy_loss("vanilla")
def vanilla(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
):
    d = (log_prob - old_log_prob).clamp(-20, 20)
    ratio = d.exp()
    clipped = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    worse = torch.maximum(-advantages * ratio, -advantages * clipped)
    floor = -advantages * config.clip_ratio_c
    loss = torch.where(advantages < 0, torch.minimum(worse, floor), worse)
    if rollout_is_weights is not None:
        loss = loss * rollout_is_weights
    loss = aggregate(loss, response_mask, loss_agg_mode, **config.global_batch_info)

    def share(x):
        return masked_mean(x.float(), response_mask).item()

    return loss, {
        "actor/pg_clipfrac": share(-advantages * clipped > -advantages * ratio),
        "actor/ppo_kl": masked_mean(-d, response_mask).item(),
        "actor/pg_clipfrac_lower": share((worse > floor) & (advantages < 0)),
    }


def install(monkeypatch):
    """Let ``import verl`` find this."""
    contents = {
        "verl": {},
        "verl.trainer": {},
        "verl.trainer.ppo": {},
        "verl.trainer.ppo.core_algos": {
            "register_policy_loss": register_policy_loss,
            "get_policy_loss_fn": get_policy_loss_fn,
        },
        "verl.utils": {},
        "verl.utils.torch_functional": {"masked_mean": masked_mean},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
