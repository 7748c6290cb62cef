"""Heads whose logits fall off as a language's do, and what tests of left-out columns measure."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import humanline as hl

N, H, V = 96, 24, 2000


def sharp(n=N, vocab=V, spread=2.0, seed=0, dtype=torch.float32):
    """Hidden states and a weight whose logits fall with the column, as a language's do."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.zeros(H)
    common[0] = 4.0
    hidden = torch.randn(n, H, generator=generator) + common
    weight = torch.randn(vocab, H, generator=generator) * 0.2
    weight[:, 0] = -spread / 4 * torch.arange(1, vocab + 1).log()
    order = torch.randperm(vocab, generator=generator)
    weight = weight[order]
    logits = hidden @ weight.T
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    return hidden.to(dtype), weight.to(dtype), labels


def flat(n=N):
    hidden, weight, labels = sharp(n)
    return hidden * 0.01, weight, labels


def random(n=N):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((n, H), (V, H)))
    return hidden, weight * 0.3, torch.randint(0, V, (n,), generator=generator)


def certain(n=N):
    """p(label) → 1, from 1 − 1e-2 to 1 − 1e-12 of it."""
    hidden, weight, _ = sharp(n)
    top = (hidden @ weight.T).argmax(-1)
    return hidden * torch.linspace(2, 8, n)[:, None], weight, top


def one_column(n=N):
    """All mass on one column, which is no row's label."""
    hidden, weight, labels = sharp(n)
    weight = weight.clone()
    weight[7, 0] = 20.0
    return hidden, weight, torch.where(labels == 7, 8, labels)


def one_row():
    return sharp(1)


CASES = [sharp, flat, random, certain, one_column, one_row]


def signed(n, seed=3):
    """Coefficients of both signs and very unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (-6 * torch.rand(n, generator=generator))
    return size * torch.where(torch.rand(n, generator=generator) < 0.5, -1, 1)


def gradients(call, *leaves):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = call(*leaves)
    return torch.autograd.grad(out, leaves)


def log_softmax_gradients(hidden, weight, labels, g):
    def loss(h, w):
        logps = (h @ w.T).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
        return logps @ g.double()

    return gradients(loss, hidden.double(), weight.double())


def relative(x, truth):
    return float((x.double() - truth).norm() / truth.norm())


class Products(TorchDispatchMode):
    """Multiplications in GEMMs; in matrix–vector products there are none worth counting."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm"):
            a, b = args[-2:]
            if min(*a.shape, *b.shape) > 1:
                self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


def token_logps_loss(labels, g, **options):
    def loss(h, w):
        return hl.linear_token_logps(h, w, labels, **options) @ g

    return loss


def grpo_loss(labels, g, stats=None, **options):
    def loss(h, w):
        value, s = hl.GRPO(beta=0.0, loss_type="grpo").from_hidden(
            h[None], w, labels[None], torch.zeros(1, len(g)), advantages=g[None], **options
        )
        if stats is not None:
            stats.update(s)
        return value

    return loss


def head_loss(labels, g, g_entropy, **options):
    def loss(h, w, b):
        logps, entropy = hl.linear_token_logps(h, w, labels, b, return_entropy=True, **options)
        return logps @ g + entropy @ g_entropy

    return loss


#: With what a batch of four sequences brings.
OBJECTIVES = [
    (hl.GRPO(beta=0.04, perception=hl.Clip(-1, 1)), {"advantages": torch.tensor([1.0, -1, 2, -3])}),
    (hl.GRPO(loss_type="dapo"), {"advantages": torch.tensor([1.0, -1, 2, -3])}),
    (hl.GRPO(entropy_coef=0.1), {"advantages": torch.tensor([1.0, -1, 2, -3])}),
    (hl.PPO(), {"advantages": torch.tensor([[1.0], [-1], [2], [-3]])}),  # a row's, see below
    (hl.DPO(perception=hl.Clip(-1, 1)), {}),
    (hl.DPO(loss_type="ipo"), {}),
    (hl.KTO(), {"desirable": torch.tensor([True, False, True, False]), "z0": 0.1}),
    (hl.SimPO(), {}),
    (hl.SFT(), {}),
]


def assert_near_exact(
    objective, extra, packed, frozen_head, backend="torch", n=N, vocab=V, tolerance=1e-2
):
    """Gradients from hidden states are those of the exact path but for what the tolerance allows,
    with all rows in one block and with as few as can be."""
    hidden, weight, labels = sharp(n, vocab)
    labels[:3] = -100
    shape = (n,) if packed else (4, n // 4)
    options = {"cu_seqlens": torch.arange(0, n + 1, n // 4)} if packed else {}
    extra = {k: v.expand(4, n // 4).reshape(shape) if getattr(v, "ndim", 0) == 2 else v
             for k, v in extra.items()}  # fmt: skip
    noise = torch.randn(n, generator=torch.Generator().manual_seed(9))
    ref = hl.linear_token_logps(hidden, weight, labels) + 0.3 * noise
    for limit in (2**29, n // 4 * -(-vocab // 16) * 16 * 8):
        results = []
        for delta in (0, tolerance):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen_head)
            loss, stats = objective.from_hidden(
                h.view(*shape, H),
                w,
                labels.view(shape),
                ref.view(shape),
                gradient_tolerance=delta,
                workspace_bytes=limit,
                backend=backend,
                **options,
                **extra,
            )
            loss.backward()
            results.append((loss, h.grad, w.grad))
        (exact_loss, exact_dh, exact_dw), (loss, dh, dw) = results
        assert torch.equal(loss, exact_loss)
        assert 0 < stats["humanline/kept_columns"] < 0.6
        assert 0 < relative(dh, exact_dh) <= 5 * tolerance
        assert frozen_head or 0 < relative(dw, exact_dw) <= 1.5 * tolerance
