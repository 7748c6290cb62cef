"""A vocabulary split over two processes, unevenly, against one process that has it whole."""

import oracle
import pages
import pytest
import torch
import torch.distributed as dist
from oracle import Data, close, gradients, leaf
from ranks import Collectives, outcome_of, require_passed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import humanline as hl
from humanline.ops.backend import HAS_TRITON, interpreting

RANKS = 2
CLIP = hl.Clip(-0.4, 0.3)
SPLIT = (4, 3)  # of Data's seven columns


def parallel():
    return hl.Parallel(vocab=dist.group.WORLD)


def columns(rank, sizes=SPLIT):
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


def same_on_all_ranks(x):
    everyones = [torch.empty_like(x) for _ in range(RANKS)]
    dist.all_gather(everyones, x.detach().contiguous())
    return all(torch.equal(x, other) for other in everyones)


def perception(case):
    return CLIP if case.cls.needs_reference else hl.Identity()


def compare(rank, data, case, tol, **options):
    """From hidden states and from logits: loss, statistics, gradients."""
    own, split = columns(rank), {"parallel": parallel()}
    of_head = {k: options.pop(k) for k in ("logit_scale", "logit_softcap") if k in options}
    whole = [leaf(x) for x in (data.hidden, data.weight, data.bias)]
    mine = [leaf(x) for x in (data.hidden, data.weight[own], data.bias[own])]
    results = [
        data.from_hidden(case, perception(case), h, w, bias=b, **options, **of_head, **extra)
        for (h, w, b), extra in ((whole, {}), (mine, split))
    ]
    close(results[1], results[0], tol)
    assert same_on_all_ranks(results[1][0])
    (dh, dw, db), ours = (
        gradients(loss, *inputs) for (loss, _), inputs in zip(results, (whole, mine), strict=True)
    )
    close(ours, (dh, dw[own], db[own]), tol)
    assert same_on_all_ranks(ours[0])
    logits = oracle.eager_logits(data.hidden, data.weight, data.bias)
    options.pop("workspace_bytes", None)
    whole, mine = leaf(logits), leaf(logits[..., own])
    expected = data.from_logits(case, perception(case), whole, **options)
    found = data.from_logits(case, perception(case), mine, **options, **split)
    close(found, expected, tol)
    assert same_on_all_ranks(found[0])
    (expected,), (found,) = gradients(expected[0], whole), gradients(found[0], mine)
    close(found, expected[..., own], tol)


# What both processes run


def every_objective(rank):
    data = Data()
    for case in oracle.CASES:
        compare(rank, data, case, 1e-12)


def options_of_the_head(rank):
    data, a_row = Data(), 8 * 4  # bytes of logits of the wider slice
    for case in (oracle.BY_NAME[name] for name in ("dpo-sigmoid", "ppo-k3-entropy", "sft")):
        for options in (
            {"packed": False, "logit_scale": 0.7, "logit_softcap": 2.0},
            {"temperature": data.temperature},
            # as many blocks on both ranks, though one's rows are shorter
            {"workspace_bytes": 5 * a_row, "temperature": 0.9},
        ):
            compare(rank, data, case, 1e-12, **options)
    compare(rank, data, oracle.BY_NAME["kto"], 1e-12, packed=False)


def the_kernels(rank):
    if not (HAS_TRITON and interpreting()):
        return
    data = Data(dtype=torch.float32)
    for name in ("dpo-sigmoid", "grpo-grpo", "ppo-k3-entropy"):
        for options in ({}, {"temperature": data.temperature, "logit_scale": 0.7}):
            compare(rank, data, oracle.BY_NAME[name], 2e-5, backend="triton", **options)
    labels, own = data.labels, columns(rank)  # a frozen head
    hidden = leaf(data.hidden)
    whole = hl.linear_token_logps(hidden, data.weight, labels, backend="triton")
    mine = hl.linear_token_logps(
        hidden, data.weight[own], labels, backend="triton", parallel=parallel()
    )
    close(mine, whole, 2e-5)
    g = torch.rand(labels.shape)
    close(gradients(mine, hidden, grad_outputs=g), gradients(whole, hidden, grad_outputs=g), 2e-5)


def log_probs(rank):
    data, own = Data(), columns(rank)
    g = torch.randn(2, *data.labels.shape, dtype=torch.float64)
    logits = oracle.eager_logits(data.hidden, data.weight, data.bias)
    results = []
    for part, extra in ((slice(None), {}), (own, {"parallel": parallel()})):
        z, h = leaf(logits[..., part]), leaf(data.hidden)
        w, b = leaf(data.weight[part]), leaf(data.bias[part])
        values, inputs = [], (z, h, w, b)
        for frozen in (False, True):
            values += hl.token_logps(z, data.labels, 0.8, return_entropy=True, **extra)
            head = (w.detach(), data.labels, b.detach()) if frozen else (w, data.labels, b)
            values += hl.linear_token_logps(h, *head, 0.8, return_entropy=True, **extra)
            values.append(hl.linear_token_logps(h, *head, **extra))
            values.append(hl.token_logps(z, data.labels, **extra))
        total = sum((x * g[i % 2]).sum() for i, x in enumerate(values))
        results.append((values, gradients(total, *inputs)))
    (whole, (dz, dh, dw, db)), (mine, ours) = results
    close(mine, whole)
    close(ours, (dz[..., own], dh, dw[own], db[own]))
    assert all(same_on_all_ranks(x) for x in mine)


def a_row_that_is_nearly_certain_and_one_far_away(rank):
    """The maximum of a slice may be thousands below that of another."""
    logits = torch.tensor([[4000.0, -3000, 1, 2, -5000, 3, 4], [0.0, 60, 0, 0, 0, 0, 30]])
    for labels in ([0, 1], [4, 6]):
        z = leaf(logits[:, columns(rank)])
        whole = leaf(logits)
        expected = hl.token_logps(whole, torch.tensor(labels), return_entropy=True)
        found = hl.token_logps(z, torch.tensor(labels), return_entropy=True, parallel=parallel())
        close(found, expected, 1e-6)
        for mine, all_of_it in zip(found, expected, strict=True):
            (dz,) = gradients(mine.sum(), z, retain_graph=True)
            (expected_dz,) = gradients(all_of_it.sum(), whole, retain_graph=True)
            close(dz, expected_dz[:, columns(rank)], 1e-6)


def half_precision(rank):
    data, own = Data(dtype=torch.float32), columns(rank)
    exact = oracle.eager(data.hidden.double(), data.weight.double(), data.labels)[0]
    for dtype, tol in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        hidden = leaf(data.hidden.to(dtype))
        for frozen in (False, True):
            whole, mine = (data.weight.to(dtype)[part] for part in (slice(None), own))
            whole, mine = (x.requires_grad_(not frozen) for x in (whole.clone(), mine.clone()))
            expected = hl.linear_token_logps(hidden, whole, data.labels)
            found = hl.linear_token_logps(hidden, mine, data.labels, parallel=parallel())
            close(found, expected, 1e-6)
            close(found.double(), exact, tol)
            inputs = (hidden,) if frozen else (hidden, mine)
            ours = gradients(found.sum(), *inputs)
            theirs = gradients(expected.sum(), *((hidden,) if frozen else (hidden, whole)))
            close(ours[0], theirs[0], tol)
            if not frozen:
                close(ours[1], theirs[1][own], tol)


def dtensors(rank):
    mesh = init_device_mesh("cpu", (RANKS,))
    par, data = hl.Parallel(vocab=mesh), Data()
    hidden, labels = data.hidden[:2], data.labels[:2]  # as many sequences as ranks
    h, w, b = (leaf(x) for x in (hidden, data.weight, data.bias))
    expected = hl.SFT().from_hidden(h, w, labels, bias=b)[0]
    expected.backward()
    weight, bias = (
        distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (data.weight, data.bias)
    )
    for placement in (Replicate(), Shard(0), None):
        states = leaf(hidden)
        if placement is not None:
            states = distribute_tensor(hidden, mesh, [placement]).requires_grad_()
        weight.grad = bias.grad = None
        loss = hl.SFT().from_hidden(states, weight, labels, bias=bias, parallel=par)[0]
        loss.backward()
        close(loss, expected)
        ours = [states.grad, weight.grad, bias.grad]
        assert [x.placements for x in ours if isinstance(x, DTensor)] == [
            *([] if placement is None else [(placement,)]),
            (Shard(0),),
            (Shard(0),),
        ]
        whole = [x.full_tensor() if isinstance(x, DTensor) else x for x in ours]
        close(whole, [h.grad, w.grad, b.grad])
    logits = oracle.eager_logits(hidden, data.weight)
    z, split = leaf(logits), distribute_tensor(logits, mesh, [Shard(2)]).requires_grad_()
    hl.token_logps(z, labels).sum().backward()
    hl.token_logps(split, labels, parallel=par).sum().backward()
    close(split.grad.full_tensor(), z.grad)
    own = slice(1 + rank)
    with pytest.raises(ValueError, match=r"vocab axis .* have the same rows, got \(4, 8\) of them"):
        hl.linear_token_logps(hidden[own, :4], weight, labels[own, :4], parallel=par)
    with pytest.raises(ValueError, match=r"vocab axis .* have the same rows, got \(4, 8\) of them"):
        hl.token_logps(logits[own, :4], labels[own, :4], parallel=par)
    other = hl.Parallel(vocab=mesh)
    for wrong, message in (
        (
            distribute_tensor(data.weight, mesh, [Replicate()]),
            "weight must be split over the vocab",
        ),
        (distribute_tensor(data.weight, mesh, [Shard(1)]), "weight must be split .* dimension 0"),
    ):
        with pytest.raises(ValueError, match=message):
            hl.linear_token_logps(hidden, wrong, labels, parallel=other)


class Products(TorchDispatchMode):
    """FLOPs of matrix products."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def what_it_costs(rank):
    """3F/P of products; 12 bytes a row of statistics, one collective a block; dH summed once."""
    n, width, sizes = 24, 5, (20, 13)
    hidden = leaf(torch.randn(n, width))
    labels = torch.arange(n) % 33
    weight = leaf(torch.randn(33, width)[columns(rank, sizes)])
    advantages = torch.ones(2)
    for objective, batch, bytes_a_row in (
        (hl.SFT(), {}, 12),
        (hl.GRPO(entropy_coef=0.1), {"advantages": advantages}, 16),
    ):
        for blocks in (1, 3):
            buffers = 2 if bytes_a_row == 16 else 1
            with Products() as products, Collectives() as collectives:
                loss, _ = objective.from_hidden(
                    hidden,
                    weight,
                    labels,
                    torch.zeros(n) if objective.needs_reference else None,
                    cu_seqlens=torch.tensor([0, 12, n]),
                    workspace_bytes=buffers * 4 * max(sizes) * n // blocks,
                    parallel=parallel(),
                    **batch,
                )
                loss.backward()
            assert products.flops == 3 * 2 * n * width * sizes[rank]
            statistics = [bytes_a_row * n // blocks] * blocks
            assert collectives.floats == [*statistics, hidden.nbytes]
            assert len(collectives.seen) == 1 + blocks + 1  # the first tells the sizes


def what_is_refused(rank):
    data, own, par = Data(), columns(rank), parallel()
    hidden, weight, labels = data.hidden, data.weight[own], data.labels
    for options, message in (
        ({"gradient_tolerance": 0.1}, "gradient_tolerance needs the whole vocabulary"),
        ({"capturable": True, "backend": "triton"}, "capturable needs the whole vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            hl.linear_token_logps(hidden, weight, labels, parallel=par, **options)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 7\)"):
        hl.linear_token_logps(hidden, weight, labels + 7 * (labels >= 0), parallel=par)
    with pytest.raises(ValueError, match=r"a slice of the vocabulary, got sizes \(4, 0\)"):
        hl.linear_token_logps(
            hidden, data.weight[:4] if rank == 0 else weight[:0], labels, parallel=par
        )
    with pytest.raises(ValueError, match="not where their vocabulary is split"):
        logits = oracle.eager_logits(hidden, weight)
        hl.SFT().from_logits(logits, labels, inplace=True, parallel=par)
    with pytest.raises(TypeError, match=r"must be a humanline\.Parallel, got the ProcessGroup"):
        hl.token_logps(hidden, labels, parallel=dist.group.WORLD)
    with pytest.raises(TypeError, match=r"vocab must be a process group, .* got the str 'tp'"):
        hl.Parallel(vocab="tp")
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match="one dimension of a mesh"):
        hl.Parallel(vocab=mesh)
    one_rank = hl.Parallel(vocab=mesh["dp"])
    close(
        hl.linear_token_logps(hidden, data.weight, labels, parallel=one_rank),
        hl.linear_token_logps(hidden, data.weight, labels),
    )
    alone = dist.new_group([0])
    if rank == 1:
        with pytest.raises(ValueError, match="not include this rank"):
            hl.Parallel(vocab=alone)


def the_page(rank):
    """What humanline/README.md shows."""
    (block,) = [x for x in pages.blocks("python") if 'vocab=mesh["tp"]' in x.code]
    data, head = Data(dtype=torch.float32), torch.nn.Linear(Data.H, SPLIT[rank], bias=False)
    head.weight.data = data.weight[columns(rank)].clone()
    given = {
        "mesh": init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("dp", "tp")),
        "lm_head": head,
        "hidden": leaf(data.hidden),
        "labels": data.labels,
        "ref_logps": data.ref,
    }
    exec(block.code, given)
    expected = hl.DPO(beta=0.1, perception=hl.Clip()).from_hidden(
        data.hidden, data.weight, data.labels, data.ref
    )
    close((given["loss"], given["stats"]), expected, 1e-6)
    assert head.weight.grad.any()


CHECKS = [
    the_page,
    every_objective,
    options_of_the_head,
    log_probs,
    a_row_that_is_nearly_certain_and_one_far_away,
    half_precision,
    dtensors,
    what_it_costs,
    what_is_refused,
    the_kernels,
]


outcome = outcome_of(CHECKS, RANKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_in_two_processes(check, outcome):
    require_passed(check, outcome, RANKS)
