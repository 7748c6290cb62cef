"""``capturable``: nothing is read back to the host, and the numbers stay what they are."""

import pytest
import torch
from oracle import leaf
from torch.utils._python_dispatch import TorchDispatchMode

import humanline as hl
from humanline import checks
from humanline.kernels import linear_logps, matmul
from humanline.kernels.launch import row_length
from humanline.ops.backend import interpreting

pytestmark = pytest.mark.skipif(
    not (interpreting() or torch.cuda.is_available()), reason="needs a GPU or interpreter"
)
B, T, H, V = 4, 10, 24, 301
CLIP = hl.Clip(-0.2, 0.2)
ADVANTAGES = torch.tensor([1.0, -0.7, 0.0, 2.0])
OBJECTIVES = {
    "grpo": (hl.GRPO(perception=CLIP), {"advantages": ADVANTAGES}),
    "entropy": (hl.GRPO(perception=CLIP, entropy_coef=0.1), {"advantages": ADVANTAGES}),
    "dpo": (hl.DPO(perception=CLIP), {}),
    "kto": (
        hl.KTO(perception=CLIP),
        {"desirable": torch.tensor([True, False, True, True]), "z0": torch.tensor(0.1)},
    ),
}


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


class Batch:
    """Seven rows masked, half of the rest clipped."""

    def __init__(self, device, dtype=torch.float32):
        # Drawn on a CPU: whether a row is clipped is to be the same everywhere.
        self.hidden = torch.randn(B, T, H).to(device, dtype)
        self.weight = (torch.randn(V, H) * 3 / H).to(device, dtype)
        self.bias = torch.randn(V).to(device, dtype)
        self.labels = torch.randint(0, V, (B, T)).to(device)
        self.labels[1, 3:] = -100
        self.temperature = torch.rand(B, T).to(device) + 0.6

    def options(self, every: bool):
        if not every:
            return {}
        return {"bias": leaf(self.bias), "temperature": self.temperature, "logit_softcap": 3.0}

    def reference(self, options):
        logps = hl.linear_token_logps(self.hidden, self.weight, self.labels, **options)
        far = 5.0 * (torch.rand(B, T) < 0.5).to(self.labels.device)
        return logps.detach() + far


def gradients(objective, b, ref_logps, options, extra, **how):
    """Loss and gradients of hidden, weight, and bias if there is one; seven rows a block."""
    leaves = [leaf(b.hidden), leaf(b.weight)]
    loss, _ = objective.from_hidden(
        *leaves,
        b.labels,
        ref_logps,
        **options,
        **{k: v.to(b.labels.device) for k, v in extra.items()},
        workspace_bytes=7 * row_length(V) * leaves[1].element_size(),
        **how,
    )
    leaves += [options["bias"]] if "bias" in options else []
    return loss, *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("every", [False, True], ids=["plain", "options"])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_numbers_are_those_of_the_torch_backend(name, every, dtype, device):
    b = Batch(device, dtype)
    objective, extra = OBJECTIVES[name]
    options = b.options(every)
    ref_logps = b.reference(options)
    arguments = objective, b, ref_logps, options, extra
    if dtype == torch.float32:
        expected = gradients(*arguments, backend="torch")
    else:  # in which no products are rounded
        wide = Batch.__new__(Batch)
        wide.hidden, wide.weight = b.hidden.float(), b.weight.float()
        wide.labels = b.labels
        if every:
            options = options | {"bias": leaf(options["bias"].float())}
        expected = gradients(objective, wide, ref_logps, options, extra, backend="torch")
    ours = gradients(*arguments, backend="triton", capturable=True)
    eps = torch.finfo(dtype).eps
    for a, e in zip(ours, expected, strict=True):
        assert (a.float() - e).norm() <= (2 * eps + 1e-6) * e.norm()


def test_log_probs_alone_with_a_frozen_head(device):
    b = Batch(device)
    results = []
    for how in ({"backend": "torch"}, {"backend": "triton", "capturable": True}):
        hidden = leaf(b.hidden)
        logps = hl.linear_token_logps(hidden, b.weight, b.labels, **how)
        results.append((logps, *torch.autograd.grad(logps.square().sum(), hidden)))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


class NothingRead(TorchDispatchMode):
    """Fails where the size or the path of what follows would depend on a value."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
        masks = [x for x in indices if x is not None and x.dtype == torch.bool]
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select") and not masks, name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_is_read_back(name, device, monkeypatch):
    # checks of values, which a GPU does without
    require = checks.require
    monkeypatch.setattr(checks, "require", lambda *a, on=None, **k: on is None and require(*a, **k))
    b = Batch(device)
    objective, extra = OBJECTIVES[name]
    ref_logps = b.reference({})
    arguments = objective, b, ref_logps, {}, extra
    with NothingRead():
        gradients(*arguments, backend="triton", capturable=True)
    with pytest.raises(AssertionError), NothingRead():  # the mode does see
        gradients(*arguments, backend="triton")


class Reads(TorchDispatchMode):
    """How often a number of rows is read: ``nonzero`` does, ``tolist`` and ``int`` are told."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ == "nonzero"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name, rows_fitting, expected",
    [
        ("grpo", B * T, (1 + 1, 0)),  # labelled rows; active ones of the one block
        ("grpo", 20, (1 + 4, 0)),  # of blocks of ten rows, where ten may wait
        ("dpo", B * T, (1 + 1, 0)),
        ("dpo", 2 * T, (1 + 2, 0)),  # each sequence's; active ones of each of two pairs
        ("dpo", T, (1 + 1, 1)),  # each sequence's; labelled rows; active ones in the backward
    ],
)
def test_what_is_read_back_otherwise(name, rows_fitting, expected, device, monkeypatch):
    b = Batch(device)
    objective, extra = OBJECTIVES[name]
    ref_logps = b.reference({})
    leaves = leaf(b.hidden), leaf(b.weight)
    with Reads() as reads:

        def count(name):
            original = getattr(torch.Tensor, name)

            def counted(x):
                reads.count += 1
                return original(x)

            monkeypatch.setattr(torch.Tensor, name, counted)

        count("tolist")
        count("__int__")
        loss, _ = objective.from_hidden(
            *leaves,
            b.labels,
            ref_logps,
            **{k: v.to(device) for k, v in extra.items()},
            workspace_bytes=rows_fitting * row_length(V) * 4,
            backend="triton",
        )
        in_forward = reads.count
        loss.backward()
    assert (in_forward, reads.count - in_forward) == expected


def test_what_does_not_count_is_not_multiplied(device, monkeypatch):
    """The kernels are told of all rows, and that the last blocks hold none that count."""
    counts = {"dz": [], "dH": [], "dW": []}

    def spy(module, name, key):
        original = getattr(module, name)

        def spied(*args, **kwargs):
            counts[key].append(int(kwargs.get("count", args[3] if len(args) > 3 else None)))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, spied)

    spy(linear_logps, "linear_logits_gradient", "dz")
    spy(matmul, "hidden_gradient_", "dH")
    spy(matmul, "add_weight_gradient_", "dW")
    b = Batch(device)
    hidden, weight = leaf(b.hidden), leaf(b.weight)
    how = {"backend": "triton", "capturable": True, "workspace_bytes": 7 * row_length(V) * 4}
    logps = hl.linear_token_logps(hidden, weight, b.labels, **how)
    logps[2].sum().backward()  # ten of forty rows
    assert counts == {key: [7, 3, 0, 0, 0, 0] for key in counts}


def test_it_needs_the_kernels():
    b = Batch("cpu")
    with pytest.raises(ValueError, match='capturable needs backend="triton"'):
        hl.linear_token_logps(b.hidden, b.weight, b.labels, backend="torch", capturable=True)
    with pytest.raises(ValueError, match='capturable needs backend="triton"'):
        hl.DPO().from_hidden(
            b.hidden, b.weight, b.labels, b.temperature, backend="torch", capturable=True
        )
