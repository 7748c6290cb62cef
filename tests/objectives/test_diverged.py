"""A NaN of the policy's shows in the loss, with every objective and on every backend."""

import math

import pytest
import torch

import humanline as hl
from humanline.ops.backend import interpreting

BACKENDS = ["torch", *(["triton"] if interpreting() or torch.cuda.is_available() else [])]
RL = {"advantages": torch.tensor([1.0, -1.0, 0.5, -0.5])}
CASES = [
    *((hl.GRPO(loss_type=kind), RL) for kind in ("grpo", "bnpo", "dapo", "cispo")),
    (hl.GRPO(beta=0.1, perception=hl.Clip(-0.5, 0.5)), RL),
    (hl.GRPO(importance_sampling_level="sequence"), RL),
    (hl.PPO(), RL),
    *((hl.DPO(loss_type=kind), {}) for kind in ("sigmoid", "hinge", "ipo")),
    (hl.DPO(perception=hl.Clip(-0.5, 0.5)), {}),
    (hl.SimPO(), {}),
    (hl.SLiC(), {}),
    (hl.KTO(), {"desirable": torch.tensor([True, False, True, False]), "z0": torch.tensor(0.0)}),
    (hl.SFT(), {}),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", ["logps", "logits", "hidden"])
@pytest.mark.parametrize("objective, batch", CASES, ids=lambda x: repr(x)[:40])
def test_it_shows_in_the_loss(objective, batch, entry, backend):
    ref = torch.full((4, 3), -3.0) if objective.needs_reference else None
    labels = torch.zeros(4, 3, dtype=torch.long)
    x = torch.randn(4, 3, *{"logps": (), "logits": (33,), "hidden": (16,)}[entry])
    x[1, 2] = math.nan
    rest = {
        "logps": (ref, torch.ones(4, 3, dtype=torch.bool)),
        "logits": (labels, ref),
        "hidden": (torch.randn(33, 16), labels, ref),
    }[entry]
    loss, _ = getattr(objective, f"from_{entry}")(
        x.requires_grad_(), *rest, backend=backend, **batch
    )
    assert loss.isnan()
