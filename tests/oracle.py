"""What several tests share: a small ragged batch, padded and packed; every objective with its own
batch arguments; log-probs and entropies by eager autograd."""

import math
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import humanline as hl

PERCEPTIONS = {
    "identity": hl.Identity(),
    "clip": hl.Clip(-0.4, 0.3),
    "clip-off-zero": hl.Clip(0.1, 0.6),
    "beta": hl.BetaRejection(gamma_P=0.2, gamma_R=0.2, seed=3),
    "prospect": hl.ProspectWeight(),
}


@dataclass(frozen=True)
class Case:
    """An objective without its perception.

    Attributes:
        exact: the gradient is that of the value: nothing in the definition is detached.
    """

    name: str
    cls: type
    options: dict[str, Any] = field(default_factory=dict)
    batch: tuple[str, ...] = ()
    exact: bool = True

    def build(self, perception: hl.Perception) -> hl.Objective:
        if not self.cls.needs_reference:
            return self.cls(**self.options)
        return self.cls(**self.options, perception=perception)


DPO_LOSSES = [
    *("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"),
    *("discopop", "sft", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired"),
]
GRPO_LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
DETACHED = ("cispo", "vespo")


def dpo_options(loss_type: str) -> dict[str, Any]:
    smoothed = loss_type in ("robust", "exo_pair", "aot", "aot_unpaired")
    return {"loss_type": loss_type, "label_smoothing": 0.1 if smoothed else 0.0, "beta": 0.3}


def grpo_case(loss_type: str, **options) -> Case:
    options = {"loss_type": loss_type, "epsilon_high": 0.3, "max_completion_length": 9} | options
    name = "-".join(["grpo", loss_type, *(f"{k}={v}" for k, v in options.items() if k in _NAMED)])
    return Case(
        name, hl.GRPO, options, ("advantages", "old_logps"), exact=loss_type not in DETACHED
    )


_NAMED = ("beta", "delta", "entropy_coef", "importance_sampling_level")

CASES = [
    *(Case(f"dpo-{loss}", hl.DPO, dpo_options(loss)) for loss in DPO_LOSSES),
    Case("dpo-cdpo", hl.DPO, {"label_smoothing": 0.1}),
    Case("dpo-mpo", hl.DPO, {"loss_type": ("sigmoid", "ipo"), "loss_weights": (0.7, 0.3)}),
    Case("kto", hl.KTO, {"desirable_weight": 1.3, "beta": 0.4}, ("desirable", "z0")),
    Case("kto-kl", hl.KTO, {"beta": 0.4}, ("desirable", "kl")),
    Case("kto-apo", hl.KTO, {"loss_type": "apo_zero_unpaired"}, ("desirable",)),
    *(grpo_case(loss) for loss in GRPO_LOSSES),
    grpo_case("grpo", importance_sampling_level="sequence"),
    grpo_case("luspo", importance_sampling_level="sequence", beta=0.1),
    grpo_case("grpo", beta=0.2),
    grpo_case("dapo", beta=0.2, entropy_coef=0.05),
    grpo_case("bnpo", delta=1.2),
    Case("ppo", hl.PPO, {}, ("row_advantages", "old_logps")),
    Case("ppo-k1", hl.PPO, {"beta": 0.2, "kl_estimator": "k1"}, ("row_advantages", "old_logps")),
    Case("ppo-k3-entropy", hl.PPO, {"beta": 0.2, "entropy_coef": 0.1}, ("advantages",)),
    Case("simpo", hl.SimPO),
    Case("slic", hl.SLiC),
    Case("sft", hl.SFT),
]
BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES)
WITH_REFERENCE = [case for case in CASES if case.cls.needs_reference]
# One or two of each way through the fused ops: what goes from hidden states as well.
FEW = [
    BY_NAME[name]
    for name in [
        *("dpo-sigmoid", "dpo-ipo", "dpo-aot", "dpo-sft", "kto", "grpo-grpo", "grpo-cispo"),
        *("grpo-grpo-importance_sampling_level=sequence", "grpo-dapo-beta=0.2-entropy_coef=0.05"),
        *("ppo-k1", "ppo-k3-entropy", "simpo", "slic", "sft"),
    ]
]


def case_ids(cases):
    return [pytest.param(case, id=case.name) for case in cases]


def case_perceptions(cases, perceptions=tuple(PERCEPTIONS)):
    """(case, perception) for every perception, or for Identity alone where there is no reference"""
    return [
        pytest.param(case, PERCEPTIONS[name], id=f"{case.name}-{name}")
        for case, name in product(cases, perceptions)
        if case.cls.needs_reference or name == "identity"
    ]


class Data:
    """Four ragged sequences in float64; the third is empty, two begin with a prompt.

    ``keep`` marks the rows that stay when packed: all but the padding at the end.
    """

    B, T, V, H = 4, 5, 7, 3
    rows: ClassVar = ("logps", "ref", "mask", "entropy", "old", "row_advantages", "labels")

    def __init__(self, seed=0, lengths=(5, 3, 0, 4), prompts=(1, 0, 0, 2), dtype=torch.float64):
        rng = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=rng, dtype=dtype)

        self.lengths, shape = lengths, (self.B, self.T)
        position = torch.arange(self.T)
        self.keep = position < torch.tensor(lengths)[:, None]
        self.mask = self.keep & (position >= torch.tensor(prompts)[:, None])
        self.hidden = randn(*shape, self.H)
        self.weight, self.bias = randn(self.V, self.H), randn(self.V)
        self.labels = torch.randint(self.V, shape, generator=rng).masked_fill(~self.mask, -100)
        self.temperature = torch.rand(shape, generator=rng, dtype=dtype) + 0.7
        self.logps, self.entropy = eager(self.hidden, self.weight, self.labels, self.bias)
        # Values outside the mask must not matter: they are absurd.
        self.ref = (self.logps + 0.5 * randn(*shape)).masked_fill(~self.mask, 99)
        self.old = (self.logps + 0.5 * randn(*shape)).masked_fill(~self.mask, -77)
        self.logps = self.logps.masked_fill(~self.mask, 55)
        self.entropy = self.entropy.masked_fill(~self.mask, 33)
        self.row_advantages = randn(*shape)
        self.advantages = torch.tensor([1.1, -0.7, 0.4, -1.3], dtype=dtype)
        self.desirable = torch.tensor([True, False, True, False])
        self.kl_logps = randn(3, 4)
        self.kl_ref_logps = self.kl_logps - 0.2 - 0.3 * randn(3, 4).abs()
        self.kl_mask = torch.rand(3, 4, generator=rng) < 0.7

    @property
    def cu_seqlens(self):
        return torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def shaped(self, x: Tensor, packed: bool) -> Tensor:
        """A row tensor ``[B, T, …]`` as it is, or packed."""
        return x[self.keep] if packed else x

    def unpacked(self, x: Tensor, packed: bool) -> Tensor:
        """Back to ``[B, T, …]``, with 0 for the padding."""
        if not packed:
            return x
        out = x.new_zeros(self.B, self.T, *x.shape[1:])
        out[self.keep] = x
        return out

    def batch(self, case: Case, packed: bool = False) -> dict[str, Any]:
        values = {"cu_seqlens": self.cu_seqlens} if packed else {}
        for name in case.batch:
            if name == "old_logps":
                values[name] = self.shaped(self.old, packed)
            elif name == "row_advantages":
                values["advantages"] = self.shaped(self.row_advantages, packed)
            elif name == "z0":
                values[name] = 0.13
            elif name == "kl":
                values |= {k: getattr(self, k) for k in ("kl_logps", "kl_ref_logps", "kl_mask")}
            else:
                values[name] = getattr(self, name)
        return values

    def from_logps(self, case: Case, perception, logps: Tensor | None = None, packed=False, **over):
        """Loss and statistics from (row-shaped, packed if asked for) log-probs."""
        objective = case.build(perception)
        if objective.needs_entropy:
            over = {"entropy": self.shaped(self.entropy, packed)} | over
        return objective.from_logps(
            self.shaped(self.logps, packed) if logps is None else logps,
            self.shaped(self.ref, packed),
            self.shaped(self.mask, packed),
            **self.batch(case, packed) | over,
        )

    def from_logits(self, case: Case, perception, logits: Tensor, packed=False, **over):
        return case.build(perception).from_logits(
            logits,
            self.shaped(self.labels, packed),
            self.shaped(self.ref, packed),
            **self.batch(case, packed) | over,
        )

    def from_hidden(self, case: Case, perception, hidden: Tensor, weight, packed=False, **over):
        return case.build(perception).from_hidden(
            hidden,
            weight,
            self.shaped(self.labels, packed),
            self.shaped(self.ref, packed),
            **self.batch(case, packed) | over,
        )


def eager_logits(hidden, weight, bias=None, logit_scale=1.0, logit_softcap=None):
    z = hidden @ weight.T
    z = (z if bias is None else z + bias) * logit_scale
    return z if logit_softcap is None else logit_softcap * torch.tanh(z / logit_softcap)


def eager_from_logits(logits, labels, temperature=1.0):
    """Log-probs (0 where masked) and entropies by eager autograd."""
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature[..., None]
    log_p = (logits / temperature).log_softmax(-1)
    picked = log_p.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return picked.where(labels != -100, 0), -(log_p.exp() * log_p).sum(-1)


def eager(hidden, weight, labels, bias=None, temperature=1.0, **options):
    return eager_from_logits(eager_logits(hidden, weight, bias, **options), labels, temperature)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def gradients(loss: Tensor, *inputs: Tensor, **options) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, materialize_grads=True, **options)


def close(actual, expected, tol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def capacity(a: float, gamma: float) -> float:
    """Tversky and Kahneman's (1992) equation 6, in Python floats."""
    return a**gamma / math.pow(a**gamma + (1 - a) ** gamma, 1 / gamma)
