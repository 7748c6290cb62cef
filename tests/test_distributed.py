"""Two processes (gloo): references to DDP and FSDP2 models, KTO's reference point, groups."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import Collectives, outcome_of, require_passed
from test_reference_kinds import Model, loss_of, make_optimizer, score
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial
from torch.nn.parallel import DistributedDataParallel

import humanline as hl
from humanline.reference import REFERENCES, ReferenceCopy

RANKS, STEPS = 2, 6


class Wide(Model):
    """An odd size, which shards unevenly; a buffer that a forward in training mode moves."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, ids):
        return super().forward(ids) + self.norm(torch.ones(2, 5).cumsum(0)).sum()


def make_steps(rank):
    generator = torch.Generator().manual_seed(rank)
    return [[torch.randint(0, 11, (4, 6), generator=generator)] * 2 for _ in range(STEPS)]


def make_policy():
    torch.manual_seed(1)
    return Wide().train()


def sharded():
    policy = make_policy()
    for part in (policy.embedding, policy.body):
        fully_shard(part)
    return fully_shard(policy)


def make_reference(kind, policy, sync_every=2):
    if kind == "copy" and not isinstance(policy, DistributedDataParallel):
        return ReferenceCopy(policy, score, sync_every, model=sharded())
    return REFERENCES[kind](policy, score, sync_every)


def train(policy, kind, rank):
    reference, optimizer, losses = make_reference(kind, policy), make_optimizer(policy), []
    torch.manual_seed(2)
    for batches, scores in reference.steps(make_steps(rank)):
        for batch, ref_logps in zip(batches, scores, strict=True):
            loss = loss_of(policy, batch, ref_logps)
            loss.backward()
            losses.append(loss.item())
        reference.before_step()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def transcription(rank, sync_every=2):
    """The rule in a plain loop on whole weights, gradients averaged by hand."""
    policy = make_policy()
    optimizer, ref, losses = make_optimizer(policy), copy.deepcopy(policy).eval(), []
    torch.manual_seed(2)
    for step, batches in enumerate(make_steps(rank)):
        for batch in batches:
            with torch.no_grad():
                ref_logps = score(ref, batch)
            loss = loss_of(policy, batch, ref_logps)
            loss.backward()
            losses.append(loss.item())
        for p in optimizer.param_groups[0]["params"]:
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= RANKS
        if step % sync_every == 0:
            ref.load_state_dict(policy.state_dict())
        optimizer.step()
        optimizer.zero_grad()
    return losses


# What both processes run


def ddp(rank):
    runs = [train(DistributedDataParallel(make_policy()), kind, rank) for kind in REFERENCES]
    assert runs[0] == runs[1] == runs[2]
    torch.testing.assert_close(runs[0], transcription(rank), rtol=1e-5, atol=1e-6)


def ddp_scores_as_many_batches_as_a_rank_has(rank):
    """DDP's own forward would wait for the other rank's."""
    for kind in REFERENCES:
        reference = make_reference(kind, DistributedDataParallel(make_policy()))
        with Collectives() as collectives:
            _, scores = next(reference.steps([make_steps(rank)[0][:1] * (1 + 2 * rank)]))
        assert len(scores) == 1 + 2 * rank and not collectives.seen


def fsdp2(rank):
    runs = [train(sharded(), kind, rank) for kind in REFERENCES]
    assert runs[0] == runs[1] == runs[2]
    torch.testing.assert_close(runs[0], transcription(rank), rtol=1e-5, atol=1e-6)


def fsdp2_syncs_without_communication(rank):
    policy = sharded()
    with Collectives() as collectives:
        policy(make_steps(rank)[0][0]).sum().backward()
    assert any("allgather" in name for name in collectives.seen)  # those of the forward
    whole = sum(t.nbytes for t in [*make_policy().parameters(), *make_policy().buffers()])
    for kind in ("copy", "adapter"):
        reference = make_reference(kind, policy)
        reference.score(policy, make_steps(rank)[0][0])  # leaves the root's weights gathered
        with Collectives() as collectives:
            reference.before_step()
        assert not collectives.seen
        assert reference.memory_bytes() < 0.8 * whole  # its shard, and buffers


def fsdp2_state(rank):
    """What a rank saved is put back shard by shard; the policy's own weights stay as they were."""
    for kind in ("copy", "adapter"):
        policy = sharded()
        reference = make_reference(kind, policy)
        batch = make_steps(rank)[0]
        saved = copy_of_shards(reference)
        (before,) = next(reference.steps([batch[:1]]))[1]
        with torch.no_grad():
            policy.head.weight.add_(1.0)
        reference.before_step()
        (moved,) = next(reference.steps([batch[:1]]))[1]
        assert not torch.equal(moved, before)
        with torch.no_grad():
            assert torch.equal(moved, score(policy.eval(), batch[0]))
        reference.load_state_dict(saved)
        (again,) = next(reference.steps([batch[:1]]))[1]
        assert torch.equal(again, before)


def copy_of_shards(reference):
    state = reference.state_dict()
    return state | {"weights": {name: t.detach().clone() for name, t in state["weights"].items()}}


def fsdp2_of_another_sharding_is_refused(rank):
    with pytest.raises(ValueError, match=r"weights.*bias \[8\], .* instead of .*bias \[4\]"):
        ReferenceCopy(sharded(), score, model=make_policy())


def fsdp2_without_a_second_model_is_refused(rank):
    with pytest.raises(ValueError, match=r"cannot be copied: pass model=, a second one sharded"):
        ReferenceCopy(sharded(), score)


def kto(rank):
    """Rank 0 has desirable examples alone, and another number of pairs than rank 1."""
    desirable = torch.tensor([True, True, True] if rank == 0 else [True, False])
    ratio = torch.full((len(desirable), 4), 0.3 if rank == 0 else -0.1, requires_grad=True)
    kl = ratio.detach()[: 2 + rank] * 2
    zeros, ones = torch.zeros_like(ratio), torch.ones_like(ratio)
    loss, stats = hl.KTO(perception=hl.Clip(-0.5, 0.5)).from_logps(
        ratio,
        zeros,
        ones,
        desirable=desirable,
        kl_logps=kl,
        kl_ref_logps=zeros[: len(kl)],
        kl_mask=ones[: len(kl)],
    )
    loss.backward()
    # rank 0: 4 tokens of 0.6, perceived as 0.5; rank 1: 4 of −0.2
    torch.testing.assert_close(stats["kl"], torch.tensor((2.0 - 0.8) / 2))
    assert loss.isfinite() and ratio.grad.isfinite().all() and ratio.grad.any()


def groups(rank):
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, -1.0, 0.1, 0.1])
    ids = torch.tensor([3, 3, 5, 5, 3, 8, 8])  # 3 and 8 are on both ranks
    for border in (6, 2, 0):  # down to a rank without completions
        own = slice(0, border) if rank == 0 else slice(border, None)
        for scale in ("group", "batch", "none"):
            found = hl.group_advantages(rewards[own], ids[own], scale)
            expected = []
            for r, i in zip(rewards.double(), ids, strict=True):
                of = rewards.double()[ids == i]
                std = {"group": of.std(), "batch": rewards.double().std(), "none": 1.0}[scale]
                expected.append((r - of.mean()) / (std + 1e-4 * (scale != "none")))
            torch.testing.assert_close(
                found, torch.stack(expected).float()[own], rtol=1e-6, atol=1e-7
            )
    assert found.numel() == 0 or (found[ids[own] == 8] == 0).all()


def a_sharded_head_by_the_advice(rank):
    """Each way that the refusal names gives the mean over ranks of what each one's rows give."""
    torch.manual_seed(0)  # all ranks know all rows
    vocab, hidden = 33, [torch.randn(2 + 3 * r, 16) for r in range(RANKS)]
    labels = [torch.randint(vocab, (len(h),)) for h in hidden]
    plain = torch.nn.Linear(16, vocab, bias=False)
    for h, label in zip(hidden, labels, strict=True):
        (-hl.linear_token_logps(h, plain.weight, label).sum() / RANKS).backward()
    for advice in ("unshard", "full_tensor"):
        head = copy.deepcopy(plain)
        head.weight.grad = None
        fully_shard(head)
        with pytest.raises(ValueError, match=rf"weight is a DTensor .*{advice}\(.*Partial\(.avg"):
            hl.linear_token_logps(hidden[rank], head.weight, labels[rank])
        if advice == "unshard":
            head.unshard()
            weight = head.weight
        else:
            weight = head.weight.full_tensor(grad_placements=[Partial("avg")])
        (-hl.linear_token_logps(hidden[rank], weight, labels[rank]).sum()).backward()
        if advice == "unshard":  # outside of FSDP's forward its backward hooks do not run
            ours = weight.grad.clone()
            dist.all_reduce(ours)
            ours /= RANKS
        else:
            ours = head.weight.grad.full_tensor()
        torch.testing.assert_close(ours, plain.weight.grad)


CHECKS = [
    a_sharded_head_by_the_advice,
    ddp,
    ddp_scores_as_many_batches_as_a_rank_has,
    fsdp2,
    fsdp2_syncs_without_communication,
    fsdp2_state,
    fsdp2_of_another_sharding_is_refused,
    fsdp2_without_a_second_model_is_refused,
    kto,
    groups,
]


outcome = outcome_of(CHECKS, RANKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_in_two_processes(check, outcome):
    require_passed(check, outcome, RANKS)
