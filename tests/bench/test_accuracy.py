"""Every peer that runs here computes the case's loss; one that does not is found out."""

import sys
import types

import pytest
import torch

from bench.accuracy import errors, truth
from bench.cases import Case
from bench.peers import OURS, PEERS, Peer, eager_logits, peers_of

CASES = [
    Case(objective, entry, 64, 32, 200, dtype, active)
    for objective, active in (("grpo", 0.5), ("dpo", 1.0), ("kto", 1.0), ("sft", 1.0))
    for entry in ("logits", "hidden")
    for dtype in ("float32", "bfloat16")
]
COMPILED = ("torch.compile", "Liger chunked")  # minutes of compilation


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_peers_agree_with_float64(case):
    ran, true = [], truth(case, "cpu")
    for peer in peers_of(case):
        if peer.is_floor or peer.name in COMPILED or peer.why_not(case, "cpu"):
            continue
        if peer.name == "torch linear_cross_entropy" and not hasattr(
            torch.nn, "LinearCrossEntropyOptions"
        ):
            continue
        bound = 2e-6 if case.dtype == "float32" else 2e-2
        assert errors(peer, true).gradient < bound, peer.name
        ran.append(peer.name)
    assert {"eager", OURS} <= set(ran)


def test_another_loss_is_found_out():
    twice = Peer("twice", lambda batch: 2 * eager_logits(batch), "logits")
    found = errors(twice, truth(CASES[0], "cpu"))
    assert found.wrong and found.gradient == pytest.approx(1, rel=1e-3)


def test_nan_is_found_out():
    nan = Peer("nan", lambda batch: eager_logits(batch) * torch.nan, "logits")
    assert errors(nan, truth(CASES[0], "cpu")).wrong


def test_names_are_unique_within_a_case():
    for case in CASES:
        names = [p.name for p in peers_of(case)]
        assert len(names) == len(set(names)) and names[-1] == OURS


def test_what_cannot_run_says_why():
    case = Case("dpo", "hidden", 64, 32, 200, active=0.5)
    why_not = {p.name: p.why_not(case, "cpu") for p in PEERS if p.entry == "hidden"}
    assert why_not["verl"] in ("verl is not installed", "runs on CUDA devices only")
    assert why_not[OURS] is None
    liger = next(p for p in PEERS if p.name == "Liger chunked" and "dpo" in p.objectives)
    assert liger.why_not(case, "cpu") == "has no humanline clipping: another loss"


def test_quack_in_one_launch_is_the_mean_and_its_gradient(monkeypatch):
    """By a stand-in for its kernel: the sum of weighted losses, and that sum's gradient."""

    def cross_entropy_fwd(x, target, weight, return_dx):
        with torch.enable_grad():
            z = x.detach().float().requires_grad_()
            loss = torch.nn.functional.cross_entropy(z, target, weight, reduction="none")
            (gradient,) = torch.autograd.grad(loss.sum(), z)
        return loss.detach(), gradient.to(x.dtype)

    fake = types.ModuleType("quack.cross_entropy")
    fake.cross_entropy_fwd = cross_entropy_fwd
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.cross_entropy", fake)
    case = Case("sft", "logits", 64, vocab=200)
    one_launch = next(p for p in peers_of(case) if p.name == "quack, one launch")
    found = errors(one_launch, truth(case, "cpu"))
    assert found.loss < 1e-6 and found.gradient < 1e-6
    assert one_launch.name not in [p.name for p in peers_of(Case("grpo", "logits"))]
