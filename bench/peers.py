"""Who runs a case: humanline, the trainers' own code, other libraries, and the bare floor.

Each is a function of a few lines from a batch to the loss, whose backward is then run and measured
too. What a peer cannot do is declared beside it, and shown as the reason why it was skipped.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

import humanline as hl
from bench.cases import Batch, Case
from bench.objectives import BETA, EPSILON
from humanline.dtypes import at_least_float32

OURS = "humanline"
ALL = ("grpo", "dpo", "kto", "sft")


@dataclass(frozen=True)
class Peer:
    """A way to compute a case.

    Attributes:
        name: as the tables show it.
        run: from a batch to the loss; a floor does its work, backward included, and returns None.
        entry: the entry point it starts from.
        objectives: those it can compute.
        package: distribution it needs, None for torch alone.
        gpu: whether it runs on CUDA devices alone.
        perceives: whether it can clip as humanline does; else it is held to rows within bounds.
        note: what a reader of the table should know.
    """

    name: str
    run: Callable[[Batch], Tensor | None]
    entry: str
    objectives: tuple[str, ...] = ALL
    package: str | None = None
    gpu: bool = False
    perceives: bool = True
    note: str = ""

    @property
    def is_floor(self) -> bool:
        return self.name.startswith("bare")

    def why_not(self, case: Case, device: str) -> str | None:
        """The reason why this peer does not run this case here, or None."""
        if not self.perceives and case.active < 1 and case.objective in ("dpo", "kto"):
            return "has no humanline clipping: another loss"
        if self.package and _version(self.package) is None:
            return f"{self.package} is not installed"
        if self.gpu and not device.startswith("cuda"):
            return "runs on CUDA devices only"
        return None


PEERS: list[Peer] = []


def _peer(name: str, entry: str, **options):
    def register(run):
        PEERS.append(Peer(name, run, entry, **options))
        return run

    return register


def peers_of(case: Case) -> list[Peer]:
    """All that can compute the case, installed here or not: the floor first, humanline last."""
    peers = [p for p in PEERS if p.entry == case.entry and case.objective in p.objectives]
    return [p for p in peers if p.run is not bare_active_gemms or case.active < 1]


def versions() -> dict[str, str]:
    """Installed versions of the peers' packages."""
    packages = {p.package for p in PEERS if p.package}
    return {p: v for p in sorted(packages) if (v := _version(p))}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# The floor


@_peer("bare copy", "logits", note="one read and one write of the logits")
def bare_copy(batch: Batch) -> None:
    batch.logits.detach().clone()


@_peer("bare GEMMs", "hidden", note="forward and backward, all rows")
def bare_gemms(batch: Batch) -> None:
    _gemms(batch, batch.case.tokens)


@_peer("bare GEMMs, active rows", "hidden", note="backward over the rows with a gradient")
def bare_active_gemms(batch: Batch) -> None:
    _gemms(batch, round(batch.case.active * batch.case.tokens))


def _gemms(batch: Batch, active: int) -> None:
    hidden, weight = batch.hidden.detach().flatten(0, 1), batch.weight.detach()
    logits = (hidden @ weight.T)[:active]
    gradients = [logits @ weight]
    if batch.weight.requires_grad:
        gradients.append(logits.T @ hidden[:active])


# The trainers' own code


@_peer("eager", "logits", note="float32 log_softmax, as trainers write it")
def eager_logits(batch: Batch) -> Tensor:
    return batch.loss(_eager_logps(batch.logits, batch.labels))


@_peer("eager", "hidden", note="all logits, then float32 log_softmax")
def eager_hidden(batch: Batch) -> Tensor:
    return batch.loss(_eager_logps(batch.hidden @ batch.weight.T, batch.labels))


def _eager_logps(logits: Tensor, labels: Tensor) -> Tensor:
    log_p = at_least_float32(logits).log_softmax(-1)
    return log_p.gather(-1, labels[..., None]).squeeze(-1)


_compiled = cache(torch.compile)


@_peer("torch.compile", "logits", note="of eager")
def compiled_logits(batch: Batch) -> Tensor:
    return _compiled(eager_logits)(batch)


@_peer("torch.compile", "hidden", note="of eager")
def compiled_hidden(batch: Batch) -> Tensor:
    return _compiled(eager_hidden)(batch)


# Other libraries


@_peer("TRL selective_log_softmax", "logits", package="trl")
def trl_logits(batch: Batch) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return batch.loss(selective_log_softmax(batch.logits, batch.labels))


@_peer("TRL selective_log_softmax", "hidden", package="trl")
def trl_hidden(batch: Batch) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return batch.loss(selective_log_softmax(batch.hidden @ batch.weight.T, batch.labels))


@_peer("TRL ChunkedLogProbFunction", "hidden", package="trl")
def trl_chunked(batch: Batch) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

    hidden, labels = batch.hidden.flatten(0, 1), batch.labels.flatten()
    logps, *_ = ChunkedLogProbFunction.apply(
        hidden, batch.weight, None, labels, 1.0, chunk, None, 1.0, ()
    )
    return batch.loss(logps)


@_peer(
    "Liger grpo_loss",
    "logits",
    package="liger-kernel",
    objectives=("grpo",),
    gpu=True,
    note="and a copy of the logits, which it wants with a row more",
)
def liger_grpo_loss(batch: Batch) -> Tensor:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    # Its logits hold one row more, the last, which it ignores.
    logits = torch.nn.functional.pad(batch.logits, (0, 0, 0, 1))
    loss, _ = triton_grpo_loss(
        logits,
        batch.ref_logps,
        None,
        batch.labels,
        batch.advantages,
        temperature=1.0,
        beta=0.0,
        eps_low=EPSILON,
        eps_high=EPSILON,
        loss_type="grpo",
        reduce=True,
    )
    return loss


_LIGER_REFERENCE = "computes the reference of DPO and KTO too, 1F more"


@_peer("Liger chunked", "hidden", package="liger-kernel", objectives=("grpo",))
def liger_grpo(batch: Batch) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        epsilon_low=EPSILON,
        epsilon_high=EPSILON,
        loss_type="grpo",
        use_ref_model=False,
    )
    mask = torch.ones_like(batch.labels)
    return loss(
        batch.hidden,
        batch.weight,
        batch.labels,
        mask,
        batch.advantages,
        old_per_token_logps=batch.ref_logps,
    )[0]


@_peer(
    "Liger chunked",
    "hidden",
    package="liger-kernel",
    objectives=("dpo",),
    perceives=False,
    note=_LIGER_REFERENCE,
)
def liger_dpo(batch: Batch) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=True)
    frozen = batch.weight.detach()
    return loss(
        batch.weight, batch.hidden, batch.labels, ref_input=batch.ref_hidden, ref_weight=frozen
    )[0]


@_peer(
    "Liger chunked",
    "hidden",
    package="liger-kernel",
    objectives=("kto",),
    perceives=False,
    note=_LIGER_REFERENCE,
)
def liger_kto(batch: Batch) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    loss = LigerFusedLinearKTOLoss(beta=BETA, use_ref_model=True)
    return loss(
        batch.hidden,
        batch.weight,
        batch.labels,
        preference_labels=batch.desirable,
        ref_input=batch.ref_hidden,
        ref_weight=batch.weight.detach(),
        kl=batch.z0,
    )[0]


@_peer("Liger fused linear CE", "hidden", package="liger-kernel", objectives=("sft",), gpu=True)
def liger_ce(batch: Batch) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    hidden, labels = batch.hidden.flatten(0, 1), batch.labels.flatten()
    return liger_fused_linear_cross_entropy(hidden, batch.weight, labels)


@_peer("cut-cross-entropy", "hidden", package="cut-cross-entropy", gpu=True)
def cut_cross_entropy(batch: Batch) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(batch.hidden, batch.weight, batch.labels, reduction="none")
    return batch.loss(-nll)


@_peer("verl", "hidden", package="verl", gpu=True)
def verl(batch: Batch) -> Tensor:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return batch.loss(
        linear_cross_entropy(batch.hidden, batch.weight, batch.labels, 1.0, "none")[0]
    )


@_peer("quack", "logits", package="quack-kernels", gpu=True)
def quack_logits(batch: Batch) -> Tensor:
    from quack.cross_entropy import cross_entropy

    nll = cross_entropy(batch.logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    return batch.loss(-nll)


@_peer(
    "quack, one launch",
    "logits",
    package="quack-kernels",
    objectives=("sft",),
    gpu=True,
    note="return_dx: the gradient comes with the loss; the mean is a weight of each class",
)
def quack_one_launch(batch: Batch) -> Tensor:
    return _QuackOneLaunch.apply(batch.logits, batch.labels)


class _QuackOneLaunch(torch.autograd.Function):
    """The mean negative log-prob, whose gradient is written as the logits are read.

    It serves an upstream gradient of 1 alone: another would take a second launch.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        from quack.cross_entropy import cross_entropy_fwd

        ctx.shape, vocab = logits.shape, logits.shape[-1]
        # An equal weight for each class divides loss and gradient by the number of rows at once.
        mean = torch.full((vocab,), 1 / labels.numel(), device=logits.device)
        rows, targets = logits.view(-1, vocab), labels.flatten()
        nll, ctx.gradient = cross_entropy_fwd(rows, targets, weight=mean, return_dx=True)
        return nll.sum()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return ctx.gradient.view(ctx.shape), None


@_peer("quack", "hidden", package="quack-kernels", objectives=("sft",), gpu=True)
def quack_hidden(batch: Batch) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    hidden, labels = batch.hidden.flatten(0, 1), batch.labels.flatten()
    return chunked_linear_cross_entropy(hidden, batch.weight, labels)


@_peer("torch linear_cross_entropy", "hidden", objectives=("sft",), note="torch 2.13 or later")
def torch_linear_ce(batch: Batch) -> Tensor:
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    hidden, labels = batch.hidden.flatten(0, 1), batch.labels.flatten()
    options = LinearCrossEntropyOptions()
    return linear_cross_entropy(hidden, batch.weight, labels, options=options)


# humanline


@_peer("humanline, log-probs alone", "logits", note="the loss is the trainers'")
def our_logps(batch: Batch) -> Tensor:
    return batch.loss(hl.token_logps(batch.logits, batch.labels))


@_peer("humanline, log-probs alone", "hidden", note="the loss is the trainers'")
def our_linear_logps(batch: Batch) -> Tensor:
    return batch.loss(hl.linear_token_logps(batch.hidden, batch.weight, batch.labels))


@_peer(OURS, "logits")
def our_logits(batch: Batch) -> Tensor:
    objective = batch.objective.ours
    ref_logps = batch.ref_logps if objective.needs_reference else None
    return objective.from_logits(batch.logits, batch.labels, ref_logps, **batch.extra)[0]


@_peer(OURS, "hidden")
def our_hidden(batch: Batch) -> Tensor:
    objective = batch.objective.ours
    ref_logps = batch.ref_logps if objective.needs_reference else None
    loss, _ = objective.from_hidden(
        batch.hidden, batch.weight, batch.labels, ref_logps, **batch.extra
    )
    return loss
