"""What is measured: the cases, the suites they come in, and the inputs each one draws."""

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

import humanline as hl
from bench.objectives import OBJECTIVES
from humanline.checks import require

SEQUENCES = 8
NOISE = 0.03  # of the active rows' log-ratios: far from every bound, so rounding flips no row
FAR = 5.0  # log-ratio of the rows that take no gradient
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """One line of the benchmark: forward and backward of a loss on ``SEQUENCES`` sequences.

    Args:
        objective: a key of ``OBJECTIVES``.
        entry: "logits" or "hidden": where the loss starts.
        tokens: rows, all of them completion tokens; a multiple of 16.
        hidden: width of the hidden states; does not matter from logits.
        vocab: logits a row.
        dtype: of the inputs.
        active: fraction of rows with a gradient. The log-ratios of the others are ±5, where
            humanline clipping, and for GRPO the surrogate alone, cuts it off.
        frozen_head: the head's weight takes no gradient.
        logit_std: standard deviation of the logits.

    Raises:
        ValueError: a value that no case can have.
    """

    objective: str = "grpo"
    entry: str = "hidden"
    tokens: int = 2048
    hidden: int = 576
    vocab: int = 49152
    dtype: str = "float32"
    active: float = 1.0
    frozen_head: bool = False
    logit_std: float = 1.0

    def __post_init__(self):
        def one_of(name, allowed):
            value = getattr(self, name)
            require(
                value in allowed,
                lambda: f"{name} must be one of {', '.join(allowed)}; got {value!r}",
            )

        one_of("objective", OBJECTIVES)
        one_of("entry", ("logits", "hidden"))
        one_of("dtype", DTYPES)
        step = 2 * SEQUENCES
        require(
            self.tokens > 0 and self.tokens % step == 0,
            lambda: f"tokens must be a positive multiple of {step}, got {self.tokens}",
        )
        for name in ("hidden", "vocab", "logit_std"):
            value = getattr(self, name)
            require(value > 0, lambda name=name, value=value: f"{name} must be > 0, got {value}")
        require(
            0 <= self.active <= 1, lambda: f"active must be a fraction in [0, 1], got {self.active}"
        )
        require(
            not (self.frozen_head and self.entry == "logits"),
            "frozen_head has no meaning from logits",
        )
        require(
            self.active == 1 or OBJECTIVES[self.objective].ours.needs_reference,
            lambda: f"{self.objective} has no log-ratio to clip: active must be 1",
        )

    @property
    def name(self) -> str:
        """Such as ``grpo-hidden-2048x576x49152-float32-active0.5``."""
        shape = [self.tokens, self.hidden, self.vocab]
        if self.entry == "logits":
            shape.remove(self.hidden)
        parts = [self.objective, self.entry, "x".join(map(str, shape)), self.dtype]
        parts += [f"active{self.active:g}"] if self.active != 1 else []
        parts += ["frozen"] if self.frozen_head else []
        parts += [f"std{self.logit_std:g}"] if self.logit_std != 1 else []
        return "-".join(parts)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def logits_bytes(self) -> int:
        return self.tokens * self.vocab * self.torch_dtype.itemsize

    @property
    def least_bytes(self) -> int:
        """Of the inputs and their gradients, which no peer can do without."""
        if self.entry == "logits":
            return 2 * self.logits_bytes
        rows, weight = self.tokens * self.hidden, self.vocab * self.hidden
        elements = 3 * rows + (1 if self.frozen_head else 2) * weight  # the reference's hidden too
        return elements * self.torch_dtype.itemsize

    def shortened(self, tokens: int) -> "Case":
        """The same with at most so many tokens."""
        return replace(self, tokens=min(self.tokens, tokens))


@dataclass
class Batch:
    """Inputs of a case, ``[B, T, …]``. What requires a gradient does so already."""

    case: Case
    labels: Tensor
    ref_logps: Tensor
    advantages: Tensor
    desirable: Tensor
    z0: Tensor
    hidden: Tensor | None = None
    ref_hidden: Tensor | None = None
    weight: Tensor | None = None
    logits: Tensor | None = None

    @property
    def objective(self):
        return OBJECTIVES[self.case.objective]

    @property
    def extra(self) -> dict[str, Tensor]:
        """What humanline's objective takes besides the reference."""
        return {name: getattr(self, name) for name in self.objective.extra}

    def loss(self, logps: Tensor) -> Tensor:
        """The trainers' loss from log-probs of any row shape."""
        return self.objective.loss(logps.view(self.labels.shape), self)

    @property
    def leaves(self) -> list[Tensor]:
        tensors = (self.hidden, self.weight, self.logits)
        return [x for x in tensors if x is not None and x.requires_grad]

    def to_float64(self) -> "Batch":
        """The same numbers in float64: the inputs of the truth."""

        def wide(x):
            if x is None or not x.is_floating_point():
                return x
            return x.detach().double().requires_grad_(x.requires_grad)

        return replace(self, **{k: wide(v) for k, v in vars(self).items() if k != "case"})


def inputs(case: Case, device: str, seed: int = 0) -> Batch:
    """Draw a batch; the same one in every process on one kind of device.

    The reference is the policy's own log-prob of ``hidden`` moved a little, minus ``FAR`` with a
    sign on the rows without a gradient: for GRPO that of the advantage, so that the surrogate
    clips them too and libraries without perception compute the same loss; else alternating, so
    that sequence rewards stay where the sigmoid is steep.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = (SEQUENCES, case.tokens // SEQUENCES)

    def normal(*size, std=1.0, dtype=torch.float32):
        x = torch.empty(size, device=device, dtype=dtype)
        return x.normal_(0, std, generator=generator)

    labels = torch.randint(case.vocab, shape, generator=generator, device=device)
    sign = torch.tensor([1.0, -1.0], device=device).repeat(SEQUENCES // 2)
    values = {
        "labels": labels,
        "advantages": sign * (0.5 + torch.arange(SEQUENCES, device=device) / SEQUENCES),
        "desirable": sign > 0,
        "z0": torch.tensor(0.05, device=device),
    }
    with torch.no_grad():
        if case.entry == "logits":
            logits = normal(*shape, case.vocab, std=case.logit_std, dtype=case.torch_dtype)
            values["logits"] = logits
            ref_logps = hl.token_logps(logits, labels) - NOISE * normal(*shape)
        else:
            hidden = normal(*shape, case.hidden, dtype=case.torch_dtype)
            std = case.logit_std * case.hidden**-0.5
            weight = normal(case.vocab, case.hidden, std=std, dtype=case.torch_dtype)
            moved = normal(*hidden.shape, std=NOISE / case.logit_std, dtype=hidden.dtype)
            ref_hidden = hidden + moved
            values |= {"hidden": hidden, "weight": weight, "ref_hidden": ref_hidden}
            ref_logps = hl.linear_token_logps(ref_hidden, weight, labels)
    if case.active < 1:
        ref_logps -= _far_rows(case, sign, generator)
    batch = Batch(case, ref_logps=ref_logps, **values)
    for x in (batch.logits, batch.hidden, None if case.frozen_head else batch.weight):
        if x is not None:
            x.requires_grad_()
    return batch


def _far_rows(case: Case, sign: Tensor, generator: torch.Generator) -> Tensor:
    """``±FAR`` on the rows without a gradient, 0 on the others; they come in pairs of tokens."""
    pairs = case.tokens // SEQUENCES // 2
    rank = torch.rand(SEQUENCES, pairs, generator=generator, device=sign.device)
    far = rank.argsort(1).argsort(1) < round((1 - case.active) * pairs)
    if case.objective == "grpo":
        signs = sign[:, None].expand(SEQUENCES, 2)
    else:
        signs = sign[:2].expand(SEQUENCES, 2)
    return FAR * (far[:, :, None] * signs[:, None, :]).flatten(1)


# Suites: named lists of cases, what `--suite` takes

LLAMA, QWEN, GPT2 = 128_256, 151_936, 50_257


def _product(**choices) -> list[Case]:
    """Every combination, without those that no case can have."""
    cases = []
    for values in product(*choices.values()):
        try:
            cases.append(Case(**dict(zip(choices, values, strict=True))))
        except ValueError:
            continue
    return cases


def _unique(*lists: list[Case]) -> list[Case]:
    return list(dict.fromkeys(case for cases in lists for case in cases))


_QUICK = {"tokens": [64], "hidden": [64], "vocab": [1000]}
_CPU = {"tokens": [2048], "hidden": [576], "vocab": [49152], "dtype": ["float32", "bfloat16"]}
_GPU = {"tokens": [8192], "hidden": [4096], "vocab": [QWEN], "dtype": ["bfloat16"]}
_LENGTHS = [2**k for k in range(11, 21)]
_ACTIVE = [1.0, 0.75, 0.5, 0.25, 0.0]
_STDS = [0.5, 1.0, 2.0, 4.0, 8.0]

# The most telling first, as a GPU may be lent for minutes.
_HEADLINE = _unique(
    _product(entry=["hidden", "logits"], **_GPU),
    _product(entry=["hidden"], **_GPU | {"hidden": [1024]}),
    _product(objective=["dpo", "sft"], entry=["hidden"], **_GPU),
    _product(entry=["logits"], **_GPU | {"vocab": [32_000]}),
)

SUITES = {
    # one case: does it start?
    "smoke": [Case("grpo", "hidden", active=0.5, **{k: v for k, [v] in _QUICK.items()})],
    # seconds, anywhere: does all of it work?
    "quick": _unique(
        _product(objective=OBJECTIVES, entry=["logits", "hidden"], **_QUICK),
        _product(objective=["grpo", "dpo"], active=[0.5], frozen_head=[False, True], **_QUICK),
    ),
    # the head of SmolLM2-135M on a CPU
    "cpu": _unique(
        _product(entry=["logits", "hidden"], active=[1.0, 0.5], **_CPU),
        _product(objective=["dpo", "kto", "sft"], **_CPU | {"dtype": ["float32"]}),
        _product(objective=["grpo", "dpo"], frozen_head=[True], **_CPU | {"dtype": ["float32"]}),
    ),
    "cpu-active": _product(entry=["logits", "hidden"], active=_ACTIVE, **_CPU),
    "cpu-tokens": _product(
        entry=["logits", "hidden"],
        **_CPU | {"tokens": [512, 1024, 2048, 4096], "dtype": ["float32"]},
    ),
    "cpu-scale": _product(
        entry=["logits", "hidden"],
        logit_std=_STDS,
        **_CPU | {"tokens": [512], "dtype": ["bfloat16"]},
    ),
    "gpu-headline": _HEADLINE,
    # the head of a 7B model with Qwen's vocabulary on a GPU
    "gpu": _unique(
        _HEADLINE,
        _product(entry=["logits", "hidden"], active=[1.0, 0.5], **_GPU),
        _product(objective=["dpo", "kto", "sft"], entry=["logits", "hidden"], **_GPU),
        _product(objective=["grpo", "dpo"], frozen_head=[True], **_GPU),
        _product(entry=["logits"], **_GPU | {"dtype": ["float32"], "vocab": [QWEN, LLAMA]}),
        _product(entry=["logits", "hidden"], **_GPU | {"vocab": [GPT2, LLAMA]}),
    ),
    "gpu-tokens": _product(entry=["logits", "hidden"], **_GPU | {"tokens": _LENGTHS}),
    "gpu-active": _product(
        objective=["grpo", "dpo"], entry=["logits", "hidden"], active=_ACTIVE, **_GPU
    ),
    "gpu-scale": _product(entry=["logits", "hidden"], logit_std=_STDS, **_GPU | {"tokens": [512]}),
}
