"""The ops as torch sees them: registered, compilable, safe under autocast; their memory."""

import pytest
import torch
import torch._dynamo.testing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import humanline as hl
import humanline.ops.logits.token_logps
from humanline.ops.backend import interpreting
from humanline.ops.logits.objective import _scale_, _token_loss
from humanline.ops.logits.token_logps import _token_logps, _token_logps_backward
from humanline.ops.whole_batch import (
    _sequence_loss,
    _sequence_policy,
    _token_policy,
    _token_stats,
)

V, H = 13, 6


@pytest.fixture
def batch():
    logits = torch.randn(2, 5, V, requires_grad=True)
    labels = torch.randint(0, V, (2, 5))
    labels[0, :2] = -100
    return logits, labels


BY_KERNELS = pytest.mark.skipif(
    not interpreting(), reason="the kernel needs a GPU or Triton's interpreter"
)
BACKENDS = ["torch", pytest.param("triton", marks=BY_KERNELS)]
# Of an op that is called inside an autograd function: it has no gradient of its own.
INSIDE_AUTOGRAD = ("test_schema", "test_faketensor")


def assert_passes_opcheck(op, arguments, options=None, **more):
    result = torch.library.opcheck(op, arguments, options, **more)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_opcheck(batch, with_entropy, backend):
    temperature = torch.tensor(1.3, dtype=torch.float64)
    assert_passes_opcheck(_token_logps, (*batch, temperature, with_entropy, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_opcheck_of_the_backward(batch, with_entropy, backend):
    logits, labels = batch[0].detach(), batch[1]
    temperature = torch.rand(10) + 0.5
    outputs = _token_logps(logits, labels, temperature, with_entropy, backend)
    g, g_entropy = torch.randn(2, 5), torch.randn(2, 5) if with_entropy else None
    arguments = (g, g_entropy, logits, labels, temperature, *outputs, backend)
    assert_passes_opcheck(_token_logps_backward, arguments)


OBJECTIVES = [
    (hl.DPO(perception=hl.Clip(-1, 1)), {}),
    (hl.GRPO(perception=hl.Clip(-1, 1), beta=0.1), {"advantages": torch.tensor([1.0, -1.0])}),
    (hl.KTO(), {"desirable": torch.tensor([True, False]), "z0": 0.1}),
    (hl.SFT(), {}),
]


@pytest.mark.parametrize("objective, extra", OBJECTIVES, ids=lambda x: type(x).__name__)
def test_fullgraph_compile_of_from_logits(batch, objective, extra):
    logits, labels = batch
    ref_logps = torch.randn(labels.shape) - 3
    # Eagerly, each row's gradient is formed in the forward; compiled, it is the op's backward.
    compiled = torch.compile(objective.from_logits, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, objective.from_logits):
        loss, stats = run(logits, labels, ref_logps, temperature=0.8, **extra)
        results.append(
            (loss, torch.autograd.grad(loss, logits)[0], stats["humanline/unclamped"])
            if objective.needs_reference
            else (loss, torch.autograd.grad(loss, logits)[0])
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_new_lengths_do_not_compile_anew():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(logits, labels):
        return hl.token_logps(logits, labels).sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for length in (3, 5, 8, 9):
        compiled(torch.randn(2, length, V), torch.zeros(2, length, dtype=torch.long))
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 4


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("objective", [hl.GRPO(), hl.DPO()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("frozen_head", [False, True])
def test_from_hidden_never_holds_all_logits(objective, frozen_head):
    n, vocab, rows = 64, 1000, 8
    hidden = torch.randn(4, n // 4, H, requires_grad=True)
    weight = torch.randn(vocab, H, requires_grad=not frozen_head)
    labels = torch.randint(0, vocab, (4, n // 4))
    extra = {"advantages": torch.randn(4)} if isinstance(objective, hl.GRPO) else {}
    with LargestTensor() as largest:
        loss, _ = objective.from_hidden(
            hidden,
            weight,
            labels,
            torch.zeros(labels.shape),
            workspace_bytes=rows * vocab * 4,
            **extra,
        )
        loss.backward()
    assert largest.elements == max(rows * vocab, weight.numel())


@pytest.mark.parametrize("frozen_head", [False, True])
def test_an_observer_sees_the_logits_of_every_labelled_row_once(frozen_head):
    hidden, weight = torch.randn(7, 4, requires_grad=True), torch.randn(11, 4)
    weight.requires_grad_(not frozen_head)
    labels = torch.tensor([3, -100, 0, 10, -100, 5, 5])
    seen = torch.full((7, 11), torch.nan)

    def observe(index, logits):
        assert seen[index].isnan().all() and len(index) <= 2
        seen[index] = logits

    options = {"temperature": 0.5, "logit_softcap": 3.0, "workspace_bytes": 2 * 2 * 11 * 4}
    logps = hl.linear_token_logps(hidden, weight, labels, observe=observe, **options)
    logps.sum().backward()  # the backward shows nothing
    logits = 3 * torch.tanh(hidden @ weight.T / 3) / 0.5
    assert torch.allclose(seen[labels != -100], logits[labels != -100], atol=1e-5)
    assert seen[labels == -100].isnan().all()
    assert torch.equal(logps, hl.linear_token_logps(hidden, weight, labels, **options))


def test_autocast_runs_the_head_in_its_dtype():
    hidden = torch.randn(2, 3, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    labels = torch.randint(0, V, (2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        logps = hl.linear_token_logps(hidden, weight, labels)
    expected = hl.linear_token_logps(hidden.bfloat16(), weight.bfloat16(), labels)
    assert logps.dtype == torch.float32
    assert torch.equal(logps, expected)
    logps.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_an_observer_needs_the_backend_that_forms_logits():
    hidden, weight = torch.randn(2, 3, H), torch.randn(V, H)
    labels = torch.randint(0, V, (2, 3))
    with pytest.raises(ValueError, match=r'observe needs backend="torch".*triton'):
        hl.linear_token_logps(hidden, weight, labels, observe=print, backend="triton")


def test_bfloat16_logps_are_not_rounded_to_bfloat16():
    hidden = torch.randn(4, 8, 64).bfloat16()
    weight = (torch.randn(5000, 64) / 8).bfloat16()
    labels = torch.randint(0, 5000, (4, 8))
    truth = hl.linear_token_logps(hidden.double(), weight.double(), labels)
    error = (hl.linear_token_logps(hidden, weight, labels) - truth).abs()
    assert error.max() < 2e-4 and error.mean() < 2e-5


def test_double_backward_is_an_error(batch):
    logits, labels = batch
    hidden = torch.randn(2, 5, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    for loss, x in (
        (hl.SFT().from_hidden(hidden, weight, labels)[0], hidden),
        (hl.linear_token_logps(hidden, weight, labels).sum(), hidden),
        (hl.SFT().from_logits(logits, labels)[0], logits),
        (hl.token_logps(logits, labels).sum(), logits),
    ):
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(loss, x, create_graph=True)


def test_activation_checkpointing_gives_the_same_gradient(batch):
    from torch.utils.checkpoint import checkpoint

    _, labels = batch
    hidden = torch.randn(2, 5, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)

    def loss(h):
        return hl.SFT().from_hidden(h, weight, labels)[0]

    (plain,) = torch.autograd.grad(loss(hidden), hidden)
    (again,) = torch.autograd.grad(checkpoint(loss, hidden, use_reentrant=False), hidden)
    assert torch.equal(plain, again)


NO_VALUES = [  # objective and batch arguments, on a device whose tensors hold no values
    (hl.GRPO(perception=hl.Clip(-1, 1), beta=0.1), {"advantages": (2,)}),
    (hl.GRPO(importance_sampling_level="sequence", entropy_coef=0.1), {"advantages": (2,)}),
    (hl.PPO(entropy_coef=0.1), {"advantages": (2, 5)}),
    (hl.SFT(), {}),
    (hl.DPO(perception=hl.Clip(-1, 1), loss_type=("sigmoid", "ipo")), {}),
    (hl.DPO(perception=hl.Clip(-1, 1)), {}),
    (hl.KTO(perception=hl.Clip(-1, 1)), {"desirable": (2,)}),
    (hl.DPO(perception=hl.ProspectWeight()), {}),
    (hl.DPO(perception=hl.BetaRejection(seed=1)), {}),
    (hl.SimPO(), {}),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("objective, shapes", NO_VALUES, ids=lambda x: type(x).__name__)
def test_from_logits_with_kernels_reads_nothing_back(objective, shapes, packed, monkeypatch):
    """A value read on the host would stall a GPU and forbid a CUDA graph: here it cannot be had."""
    for module in (humanline.ops, humanline.ops.logits.token_logps):
        monkeypatch.setattr(module, "choose_backend", lambda *_: "triton")
    rows = (10,) if packed else (2, 5)
    shapes = {name: rows if shape == (2, 5) else shape for name, shape in shapes.items()}
    with torch.device("meta"):
        logits = torch.empty(*rows, V, requires_grad=True)
        labels, ref_logps = torch.empty(rows, dtype=torch.long), torch.empty(rows)
        batch = {name: torch.empty(shape) for name, shape in shapes.items()}
        if isinstance(objective, hl.KTO):
            batch["z0"] = torch.empty(())
        if packed:
            batch["cu_seqlens"] = torch.empty(3, dtype=torch.int32)
        loss, stats = objective.from_logits(logits, labels, ref_logps, temperature=0.7, **batch)
        loss.backward()
    assert logits.grad.shape == logits.shape
    assert all(x.device.type == "meta" for x in stats.values())


@BY_KERNELS
def test_opcheck_of_the_one_launch_op():
    logits, labels = torch.randn(2, 5, V), torch.randint(0, V, (2, 5))
    row = torch.rand(10)
    arguments = (logits, labels, torch.tensor(0.7), torch.empty_like(logits), row, "clipped")
    options = {"advantages": row, "anchor": row, "entropy_weight": torch.tensor(0.1), "low": 0.2}
    assert_passes_opcheck(_token_loss, arguments, options, test_utils=INSIDE_AUTOGRAD)


@BY_KERNELS
@pytest.mark.parametrize("kind", ["sigmoid", "kto"])
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_of_the_loss_of_sequences(kind, packed):
    cu_seqlens = torch.tensor([0, 2, 2, 7, 12]) if packed else None
    row = torch.randn(12)
    mask = row > -1
    arguments = row, row.double() + 0.1, mask, mask.sum(), 4, cu_seqlens, kind, -0.5, 0.5, 0.1
    options = {"p": 0.1, "q": 0.9}
    if kind == "kto":
        options |= {"desirable": torch.arange(4) % 2 == 0, "z0": torch.tensor(0.1)}
    assert_passes_opcheck(_sequence_loss, arguments, options, test_utils=INSIDE_AUTOGRAD)


@BY_KERNELS
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_opcheck_of_the_ratios_of_sequences(with_entropy, packed):
    cu_seqlens = torch.tensor([0, 2, 2, 7, 12]) if packed else None
    row = torch.randn(12)
    mask = row > -1
    options = {"anchor": row.double() + 0.1, "ref": row, "penalty": "k3", "beta": 0.1, "low": 0.2}
    if with_entropy:
        options["entropy_weight"] = torch.tensor(0.1)
    arguments = row, row if with_entropy else None, mask, mask.sum(), 4, cu_seqlens, "clipped"
    weights = torch.tensor(0.1).expand(4), row
    assert_passes_opcheck(
        _sequence_policy, (*arguments, *weights), options, test_utils=INSIDE_AUTOGRAD
    )


@BY_KERNELS
def test_opcheck_of_the_coefficients_of_tokens():
    row = torch.randn(12)
    arguments = row, row > -1, "clipped", torch.rand(12), row, row.double() + 0.1
    options = {"penalty": "k3", "ref": row, "beta": 0.1, "low": 0.2, "high": 0.2}
    assert_passes_opcheck(_token_policy, arguments, options, test_utils=INSIDE_AUTOGRAD)


@BY_KERNELS
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_of_the_statistics_of_tokens(packed):
    cu_seqlens = torch.tensor([0, 2, 2, 7, 12]) if packed else None
    row = torch.randn(12)
    mask = row > -1
    arguments = row, None, row, row, mask, mask.sum(), 4, cu_seqlens, "clipped"
    options = {"advantages": row, "anchor": row + 0.1, "low": 0.2, "high": 0.2}
    assert_passes_opcheck(_token_stats, arguments, options, test_utils=INSIDE_AUTOGRAD)


@BY_KERNELS
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_opcheck_of_the_scaling(factor):
    x = torch.randn(3, V).bfloat16()
    assert_passes_opcheck(_scale_, (x, torch.tensor(factor)), test_utils=INSIDE_AUTOGRAD)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_that_all_drop_out(dtype):
    hidden = torch.randn(2, 5, H).to(dtype).requires_grad_()
    weight = torch.randn(V, H).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (2, 5))
    loss, stats = hl.GRPO().from_hidden(hidden, weight, labels, advantages=torch.zeros(2))
    loss.backward()
    assert stats["humanline/active_rows"] == 0
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_an_overflowing_row_without_a_coefficient_does_not_spread_with_a_frozen_head():
    hidden = torch.randn(1, 2, H)
    hidden[0, 0] = 3e38
    hidden.requires_grad_()
    logps = hl.linear_token_logps(hidden, torch.randn(V, H), torch.zeros(1, 2, dtype=torch.long))
    logps[0, 1].backward()
    assert (hidden.grad[0, 0] == 0).all() and hidden.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", [3, -100])
def test_a_single_row(backend, label):
    """Logits ``[V]`` and a label ``[]`` give what they give as a batch of one."""
    logits, label = torch.randn(V), torch.tensor(label)
    hidden, weight = torch.randn(H), torch.randn(V, H)
    for call, inputs in (
        (hl.token_logps, (logits,)),
        (hl.linear_token_logps, (hidden, weight)),
    ):
        results = []
        for one in (False, True):
            leaves = [x.clone().requires_grad_() for x in inputs]
            first = leaves[0] if one else leaves[0][None]
            logps, entropy = call(
                *(first, *leaves[1:], label if one else label[None]),
                temperature=1.3,
                return_entropy=True,
                backend=backend,
            )
            assert logps.shape == entropy.shape == (() if one else (1,))
            (2 * logps + entropy).sum().backward()
            results.append([logps.view(1), entropy.view(1), *(x.grad for x in leaves)])
        torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_row_has_logits_and_an_objective_has_sequences():
    for call in (hl.token_logps, hl.SFT().from_logits):
        with pytest.raises(ValueError, match=r"got \[\] and \[\]|rows must have shape \[B, T\]"):
            call(torch.tensor(1.0), torch.tensor(0))
    with pytest.raises(ValueError, match=r"rows must have shape \[B, T\]"):
        hl.SFT().from_logits(torch.randn(V), torch.tensor(0))
