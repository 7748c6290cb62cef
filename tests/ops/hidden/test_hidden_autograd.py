"""From hidden states as the rest of a training step meets it: compilation, autocast, checkpointing,
other losses beside it, small coefficients."""

import pytest
import torch
import torch._dynamo
from oracle import leaf
from torch.utils.checkpoint import checkpoint

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


@each_objective
def test_autocast_runs_the_head_in_its_dtype(inputs, objective, extra):
    loss = loss_of(objective, extra)
    hidden, weight, *rest = inputs
    with torch.autocast("cpu", torch.bfloat16):
        ours = with_gradients(loss, *inputs)
    narrow = with_gradients(loss, leaf(hidden.bfloat16()), leaf(weight.bfloat16()), *rest)
    assert ours[0].dtype == ours[1].dtype == ours[2].dtype == torch.float32
    assert equal(ours, (narrow[0], *(x.float() for x in narrow[1:])))


@each_objective
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("workspace_bytes", [2**20, 6 * V * 4], ids=["fits", "blocks"])
def test_activation_checkpointing(inputs, objective, extra, reentrant, workspace_bytes):
    loss = loss_of(objective, extra | {"workspace_bytes": workspace_bytes})

    def checkpointed(*args):
        return checkpoint(lambda *x: 0.5 * loss(*x), *args, use_reentrant=reentrant)

    results = []
    for run in (checkpointed, lambda *args: 0.5 * loss(*args)):
        leaves = [leaf(x) for x in inputs[:2]]  # a reentrant one fills .grad alone
        value = run(*leaves, *inputs[2:])
        value.backward()
        results.append((value.detach(), *(x.grad for x in leaves)))
    assert equal(*results)


@each_objective
@pytest.mark.parametrize("frozen_head", [False, True])
def test_other_losses_beside_it(inputs, objective, extra, frozen_head):
    loss, (hidden, weight, *rest) = loss_of(objective, extra), inputs
    weight.requires_grad_(not frozen_head)
    of = [hidden] if frozen_head else [hidden, weight]

    def other():
        return hidden.square().mean() + (hidden @ weight.T).logsumexp(-1).mean()

    alone = torch.autograd.grad(loss(hidden, weight, *rest), of)
    others = torch.autograd.grad(other(), of)
    both = torch.autograd.grad(loss(hidden, weight, *rest) + 0.3 * other(), of)
    for a, o, x in zip(alone, others, both, strict=True):
        torch.testing.assert_close(x, a + 0.3 * o)
