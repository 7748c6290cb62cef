"""From hidden states as the rest of a training step meets it: compilation, autocast, checkpointing,
other losses beside it, small coefficients."""

import pytest
import torch
import torch._dynamo
from oracle import leaf

import humanline as hl

B, T, H, V = 4, 5, 6, 13
OBJECTIVES = [
    (hl.DPO(perception=hl.Clip(-1, 1)), {}),
    (hl.GRPO(perception=hl.Clip(-1, 1)), {"advantages": torch.tensor([1.0, -1.0, 0.5, 2.0])}),
    (hl.SFT(), {}),
]
each_objective = pytest.mark.parametrize("objective, extra", OBJECTIVES, ids=["DPO", "GRPO", "SFT"])


@pytest.fixture
def inputs():
    """hidden, weight, labels, log-probs of the reference."""
    labels = torch.randint(0, V, (B, T))
    labels[0, :2] = -100
    hidden, weight = torch.randn(B, T, H), torch.randn(V, H)
    with torch.no_grad():
        near = hl.linear_token_logps(hidden, weight, labels) + 0.3 * torch.randn(B, T)
    return leaf(hidden), leaf(weight), labels, near


def loss_of(objective, extra):
    """As a function of what :func:`inputs` gives."""

    def loss(hidden, weight, labels, ref_logps):
        ref_logps = ref_logps if objective.needs_reference else None
        return objective.from_hidden(hidden, weight, labels, ref_logps, **extra)[0]

    return loss


def with_gradients(function, hidden, weight, *rest):
    result = function(hidden, weight, *rest)
    return result.detach(), *torch.autograd.grad(result.sum(), (hidden, weight))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@each_objective
@pytest.mark.parametrize("workspace_bytes", [2**20, 6 * V * 4], ids=["fits", "blocks"])
def test_compiled_callers_get_the_same_numbers(inputs, objective, extra, workspace_bytes):
    loss = loss_of(objective, extra | {"workspace_bytes": workspace_bytes})

    def step(hidden, weight, *rest):  # something to compile before and after
        return 3 * loss(torch.tanh(hidden), weight, *rest)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager")
    assert equal(with_gradients(compiled, *inputs), with_gradients(step, *inputs))
    if objective.needs_reference:
        itself = torch.compile(objective.from_hidden, backend="eager")
        plain, stats = objective.from_hidden(*inputs, **extra)
        again, same = itself(*inputs, **extra)
        assert torch.equal(plain, again) and stats.keys() == same.keys()


@pytest.mark.parametrize("frozen_head", [False, True])
def test_compiled_callers_get_the_same_log_probs(inputs, frozen_head):
    hidden, weight, labels, _ = inputs
    weight.requires_grad_(not frozen_head)
    of = [hidden] if frozen_head else [hidden, weight]

    def step(hidden, weight):
        logps, entropy = hl.linear_token_logps(
            torch.tanh(hidden), weight, labels, return_entropy=True
        )
        return (logps + 0.1 * entropy).square().sum()

    torch._dynamo.reset()
    results = []
    for run in (step, torch.compile(step, backend="aot_eager")):
        loss = run(hidden, weight)
        results.append((loss.detach(), *torch.autograd.grad(loss, of)))
    assert equal(*results)
    itself = torch.compile(hl.linear_token_logps, backend="eager")
    assert torch.equal(itself(*inputs[:3]), hl.linear_token_logps(*inputs[:3]))


def test_a_graph_that_must_not_break_says_why_it_does(inputs):
    for call in (loss_of(hl.SFT(), {}), lambda *x: hl.linear_token_logps(*x[:3])):
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="as many rows as there are labels"):
            torch.compile(call, backend="eager", fullgraph=True)(*inputs)
