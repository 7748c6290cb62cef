"""Rows shared by processes, in every way unevenly, against one process that has all of them."""

import copy

import oracle
import pages
import pytest
import torch
import torch.distributed as dist
from oracle import Data, close, gradients, leaf
from ranks import Collectives, outcome_of, require_passed
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import humanline as hl
from humanline.ops.backend import HAS_TRITON, interpreting

RANKS = 2
ALL = slice(None)


class Batch(Data):
    """Six sequences, of which the third is empty."""

    B = 6

    def __init__(self, dtype=torch.float64):
        super().__init__(lengths=(5, 3, 0, 4, 2, 5), prompts=(1, 0, 0, 2, 0, 3), dtype=dtype)
        self.advantages = torch.tensor([1.1, -0.7, 0.4, -1.3, 0.2, 0.9], dtype=dtype)
        self.desirable = torch.tensor([True, False, True, True, False, True])

    def part(self, sequences=ALL, rows=ALL, pairs=ALL, pair_rows=ALL):
        """What a rank has: some sequences, some positions of them; the same of KTO's pairs."""
        part = copy.copy(self)
        for name in (*self.rows, "hidden", "keep"):
            setattr(part, name, getattr(self, name)[sequences, rows])
        part.lengths = part.keep.sum(1).tolist()
        for name in ("advantages", "desirable"):
            setattr(part, name, getattr(self, name)[sequences])
        for name in ("kl_logps", "kl_ref_logps", "kl_mask"):
            setattr(part, name, getattr(self, name)[pairs, pair_rows])
        return part


# Of a rank: what it has.
SEQUENCE = {
    "uneven": (
        {"rows": slice(2), "pair_rows": slice(1)},
        {"rows": slice(2, 5), "pair_rows": slice(1, 4)},
    ),
    "one without a completion": (
        {"rows": slice(1), "pair_rows": slice(4)},
        {"rows": slice(1, 5), "pair_rows": slice(4, 4)},
    ),
    "one without rows": (
        {"rows": slice(5), "pair_rows": slice(4)},
        {"rows": slice(5, 5), "pair_rows": slice(4, 4)},
    ),
}
DATA = {  # pairs are (0, 3), (1, 4), (2, 5)
    "uneven": (
        {"sequences": [0, 1, 3, 4], "pairs": slice(1)},
        {"sequences": [2, 5], "pairs": slice(1, 3)},
    ),
    "one without sequences": (
        {"sequences": [], "pairs": slice(0)},
        {"sequences": [0, 1, 2, 3, 4, 5], "pairs": slice(3)},
    ),
}


def perception(case):
    return hl.Clip(-0.4, 0.3) if case.cls.needs_reference else hl.Identity()


def same_on_all_ranks(x):
    everyones = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, x.detach().contiguous())
    return all(torch.equal(x, other) for other in everyones)


def total(x, group=None):
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


def losses(data, case, packed, columns=ALL, hidden_options=(), lying=(leaf, leaf), **options):
    """Result and leaves of each entry point; hidden states and logits as ``lying`` has them."""
    states, scores = lying
    weight, bias = leaf(data.weight[columns]), leaf(data.bias[columns])
    logps = leaf(data.shaped(data.logps, packed))
    hidden = states(data.shaped(data.hidden, packed))
    logits = oracle.eager_logits(data.hidden, data.weight, data.bias)[..., columns]
    logits = scores(data.shaped(logits, packed))
    of_logps = {k: x for k, x in options.items() if k != "backend"}
    yield data.from_logps(case, perception(case), logps, packed, **of_logps), (logps,)
    yield data.from_logits(case, perception(case), logits, packed, **options), (logits,)
    found = data.from_hidden(
        case, perception(case), hidden, weight, packed, bias=bias, **dict(hidden_options), **options
    )
    yield found, (hidden, weight, bias)


def compare(data, have, parallel, case, packed=False, tol=1e-12, factor=1, group=None, **options):
    """The loss and statistics of one process with all rows, gradients of own ones."""
    mine = data.part(**have)
    here = {"parallel": parallel}
    here |= {name: options.pop(name) for name in ("columns", "lying") if name in options}
    columns = here.get("columns", ALL)
    expected = losses(data, case, False, **options)
    found = losses(mine, case, packed, **here, **options)
    for (whole, inputs), (result, own) in zip(expected, found, strict=True):
        close(result, whole, tol)
        assert same_on_all_ranks(result[0])
        (of_rows, *of_head), (ours, *of_our_head) = (
            gradients(loss, *leaves) for (loss, _), leaves in ((whole, inputs), (result, own))
        )
        if of_rows.shape[-1] == data.V and columns != ALL:
            of_rows = of_rows[..., columns]
        of_rows = of_rows[have.get("sequences", ALL), have.get("rows", ALL)]
        of_rows = factor * mine.shaped(of_rows, packed)
        if isinstance(ours, DTensor):
            assert ours.placements == own[0].placements
            ours = ours.to_local()
        close(ours, of_rows, tol)
        for theirs, part in zip(of_head, of_our_head, strict=True):
            close(total(part, group), factor * theirs[columns], tol)


def placed(mesh, *placements):
    """What makes a DTensor, a leaf, of this rank's part."""
    return lambda x: leaf(DTensor.from_local(x.contiguous(), mesh, placements))


def along(axis, group, **options):
    return hl.Parallel(**{axis: group}, **options)


# What both processes run


def split_sequences(rank):
    data = Batch()
    for case in oracle.CASES:
        compare(data, SEQUENCE["uneven"][rank], along("sequence", dist.group.WORLD), case)


def other_sequences(rank):
    data = Batch()
    for case in oracle.CASES:
        compare(data, DATA["uneven"][rank], along("data", dist.group.WORLD), case)


def rows_as_dtensors(rank):
    """Hidden states and logits that lie on the mesh of the axis: taken as they are."""
    mesh, data = init_device_mesh("cpu", (RANKS,)), Batch()
    for case in oracle.FEW:
        for axis, have, dim in (("data", DATA, 0), ("sequence", SEQUENCE, 1)):
            lying = (placed(mesh, Shard(dim)),) * 2
            compare(data, have["uneven"][rank], along(axis, mesh), case, lying=lying)
    lying = (placed(mesh, Shard(0)),) * 2
    compare(data, DATA["uneven"][rank], along("data", mesh), case, packed=True, lying=lying)
    mesh = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("dp", "tp"))
    lying = (placed(mesh, Shard(0), Replicate()),) * 2  # what one rank has needs no axis
    compare(data, DATA["uneven"][rank], along("data", mesh["dp"]), case, lying=lying)
    parallel = hl.Parallel(data=mesh["dp"], vocab=mesh["tp"])
    weight = distribute_tensor(data.weight, mesh, [Shard(0), Replicate()])
    own = data.part(**DATA["uneven"][rank])
    found = hl.linear_token_logps(lying[0](own.hidden), weight, own.labels, parallel=parallel)
    close(found, hl.linear_token_logps(own.hidden, data.weight, own.labels))


def log_probs_of_rows_as_dtensors(rank):
    """The reference's within an objective, too, and beside a head that FSDP2 has split."""
    mesh, data, ref = init_device_mesh("cpu", (RANKS,)), Batch(), Batch()
    mine, place = data.part(**DATA["uneven"][rank]), placed(mesh, Shard(0))
    parallel, sequences = hl.Parallel(data=mesh), DATA["uneven"][rank]["sequences"]
    split = distribute_tensor(data.weight, mesh, [Shard(0)]).requires_grad_()
    hidden, weight = leaf(data.hidden), leaf(data.weight)
    whole = hl.linear_token_logps(hidden, weight, data.labels)
    upstream = torch.randn(whole.shape, dtype=whole.dtype)
    (whole * upstream).sum().backward()
    own = place(mine.hidden)
    found = hl.linear_token_logps(own, split, mine.labels, parallel=parallel)
    close(found, whole[sequences])
    (found * upstream[sequences]).sum().backward()
    close(own.grad.to_local(), hidden.grad[sequences])
    close(split.grad.full_tensor(), weight.grad)
    logits = place(oracle.eager_logits(mine.hidden, data.weight))
    close(hl.token_logps(logits, mine.labels, parallel=parallel), whole[sequences])

    of_ref, head_of_ref = torch.tanh(ref.hidden), ref.weight.flip(0)
    for objective in (hl.DPO(), hl.DPO(perception=hl.Clip())):
        states = leaf(data.hidden)
        options = {"ref_hidden": of_ref, "ref_weight": head_of_ref}
        expected = objective.from_hidden(states, data.weight, data.labels, **options)
        own = place(mine.hidden)
        options["ref_hidden"] = place(of_ref[sequences])
        found = objective.from_hidden(own, split, mine.labels, **options, parallel=parallel)
        close(found, expected)
        (theirs,), (ours,) = gradients(expected[0], states), gradients(found[0], own)
        close(ours.to_local(), theirs[sequences])


def on_their_way(rank):
    """A DTensor may be the promise of one: it is waited for, before a kernel takes its address."""
    mesh, data = init_device_mesh("cpu", (RANKS,)), Batch(dtype=torch.float32)
    backends = ("torch", "triton") if HAS_TRITON and interpreting() else ("torch",)
    split = distribute_tensor(data.weight, mesh, [Shard(0)])
    expected = hl.linear_token_logps(data.hidden, data.weight, data.labels)
    parts = DTensor.from_local(data.hidden / RANKS, mesh, [Partial()])
    for backend in backends:
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                hidden = parts.redistribute(placements=[Replicate()], async_op=True)
                found = hl.linear_token_logps(
                    *(hidden, split, data.labels), backend=backend, parallel=hl.Parallel(vocab=mesh)
                )
            close(found, expected, 1e-5)


def a_reference_that_is_gathered(rank):
    """Its part of the head once, as the policy's."""
    mesh, data = init_device_mesh("cpu", (RANKS,)), Batch(dtype=torch.float32)
    split, of_ref = (
        distribute_tensor(x, mesh, [Shard(0)]) for x in (data.weight, data.weight.flip(0))
    )
    with Collectives() as collectives:
        hl.DPO().from_hidden(
            *(data.hidden, split, data.labels),
            ref_hidden=data.hidden,
            ref_weight=of_ref,
            parallel=hl.Parallel(data=mesh),
        )
    assert collectives.floats.count(4 * -(-data.V // RANKS) * data.H) == 2


def rows_as_other_dtensors(rank):
    """Refused before anything is computed: the axis that is meant, and how it must be split."""
    mesh, data = init_device_mesh("cpu", (RANKS,)), Batch()
    labels = data.labels[:, :4]
    hidden = torch.randn(6, 4, data.H, dtype=torch.float64)
    calls = {
        "hidden": lambda x, **axes: hl.SFT().from_hidden(
            x, data.weight, labels, parallel=hl.Parallel(**axes)
        ),
        "ref_hidden": lambda x, **axes: hl.DPO().from_hidden(
            *(hidden, data.weight, labels),
            ref_hidden=x,
            ref_weight=data.weight,
            parallel=hl.Parallel(**axes),
        ),
        "logits": lambda x, **axes: hl.token_logps(x, labels, parallel=hl.Parallel(**axes)),
    }
    for name, call in calls.items():
        for axis, dim, placement in (
            ("data", 0, Replicate()),
            ("data", 0, Shard(1)),
            ("sequence", 1, Shard(0)),
            ("sequence", 1, Shard(2)),
        ):
            x = distribute_tensor(hidden, mesh, [placement])
            expected = f"^{name} must be split over the {axis} axis .* along dimension {dim}, got "
            with pytest.raises(ValueError, match=expected):
                call(x, **{axis: mesh})
        with pytest.raises(ValueError, match=rf"^{name} is a DTensor .*{name}\.to_local\(\)"):
            call(x)
    with pytest.raises(ValueError, match=r"^logits is a DTensor"):  # of one row
        one = distribute_tensor(torch.randn(8), mesh, [Shard(0)])
        hl.token_logps(one, torch.tensor(1), parallel=hl.Parallel(data=mesh))
    with pytest.raises(ValueError, match=r"^logits is a DTensor"):  # of nothing
        one = distribute_tensor(torch.tensor(1.0), mesh, [Replicate()])
        hl.token_logps(one, torch.tensor(1), parallel=hl.Parallel(vocab=mesh))
    mean = DTensor.from_local(hidden, mesh, [Partial("avg")])
    with pytest.raises(ValueError, match=r"^hidden may lie on the vocab axis .* parts of a sum"):
        hl.linear_token_logps(mean, data.weight, labels, parallel=hl.Parallel(vocab=mesh))
    logits = distribute_tensor(hidden, mesh, [Shard(0)])
    with pytest.raises(ValueError, match="inplace=True overwrites logits, and a DTensor's"):
        hl.SFT().from_logits(logits * 1, labels, inplace=True, parallel=hl.Parallel(data=mesh))


def ranks_without_rows_and_packed_ones(rank):
    data = Batch()
    for case in oracle.FEW:
        for axis, ways in (("sequence", SEQUENCE), ("data", DATA)):
            for name, have in ways.items():
                if name == "uneven":
                    compare(data, have[rank], along(axis, dist.group.WORLD), case, packed=True)
                else:
                    compare(data, have[rank], along(axis, dist.group.WORLD), case)


def gradients_for_an_engine_that_averages(rank):
    data, parallel = Batch(), along("data", dist.group.WORLD, grad="mean")
    for case in oracle.FEW:
        compare(data, DATA["uneven"][rank], parallel, case, factor=RANKS)


def rows_that_do_not_fit(rank):
    """Every rank takes its own way through the head, and they still meet once."""
    data = Batch()
    for name in (
        "dpo-sigmoid",
        "kto-kl",
        "grpo-grpo",
        "grpo-grpo-importance_sampling_level=sequence",
    ):
        for axis, have in (("sequence", SEQUENCE["uneven"]), ("data", DATA["uneven"])):
            a_row = 8 * data.V
            for rows in (1, 6):
                options = {"hidden_options": {"workspace_bytes": rows * a_row}}
                group = along(axis, dist.group.WORLD)
                compare(data, have[rank], group, oracle.BY_NAME[name], **options)


def the_kernels(rank):
    if not (HAS_TRITON and interpreting()):
        return
    data = Batch(dtype=torch.float32)
    for name in ("dpo-sigmoid", "grpo-grpo", "kto"):
        group = along("sequence", dist.group.WORLD)
        case = oracle.BY_NAME[name]
        compare(data, SEQUENCE["uneven"][rank], group, case, tol=2e-5, backend="triton")


def the_page(rank):
    """What humanline/README.md shows."""
    (block,) = [x for x in pages.blocks("python") if 'sequence=mesh["cp"]' in x.code]
    data = Batch(dtype=torch.float32)
    mine, head = data.part(**DATA["uneven"][rank]), torch.nn.Linear(data.H, data.V, bias=False)
    head.weight.data = data.weight.clone()
    given = {
        "mesh": init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("dp", "cp")),
        "lm_head": head,
        "hidden": leaf(mine.hidden),
        "labels": mine.labels,
        "ref_logps": mine.ref,
    }
    exec(block.code, given)
    weight = leaf(data.weight)
    expected = hl.DPO(beta=0.1, perception=hl.Clip()).from_hidden(
        data.hidden, weight, data.labels, data.ref
    )
    close((given["loss"], given["stats"]), expected, 1e-5)
    close(total(head.weight.grad) / RANKS, gradients(expected[0], weight)[0], 1e-5)


def an_fsdp2_head(rank):
    """Taken where it lies, it trains as a whole one does: body and head, by the engine's mean."""
    mesh, data = init_device_mesh("cpu", (RANKS,)), Batch(dtype=torch.float32)
    mine = data.part(**DATA["uneven"][rank])

    def model():
        torch.manual_seed(1)
        return nn.ModuleDict({"body": nn.Linear(data.H, data.H), "head": nn.Linear(data.H, data.V)})

    whole = model()
    for case in (oracle.BY_NAME["dpo-sigmoid"], oracle.BY_NAME["grpo-bnpo"]):
        for grad in ("mean", "sum"):
            whole.zero_grad()
            expected = data.from_hidden(
                case,
                perception(case),
                whole["body"](data.hidden),
                whole["head"].weight,
                bias=whole["head"].bias,
            )
            expected[0].backward()
            sharded = model()
            fully_shard(sharded["body"], mesh=mesh)
            fully_shard(sharded["head"], mesh=mesh)
            head = sharded["head"]
            with Collectives() as collectives:
                found = mine.from_hidden(
                    case,
                    perception(case),
                    sharded["body"](mine.hidden),
                    head.weight,
                    bias=head.bias,
                    parallel=hl.Parallel(data=mesh, grad=grad),
                )
                found[0].backward()
            close(found, expected, 1e-5)
            rows = -(-data.V // RANKS)  # FSDP2's, of which the last rank may have fewer
            assert 4 * rows * data.H in collectives.floats  # the weight
            assert 4 * rows * data.H * RANKS in collectives.floats  # its gradient
            for name in ("weight", "bias"):
                of_head = getattr(head, name).grad
                assert of_head.placements == (Shard(0),)
                close(of_head.full_tensor(), getattr(whole["head"], name).grad, 1e-5)
                of_body = getattr(sharded["body"], name).grad.full_tensor()
                of_body = of_body * (1 if grad == "mean" else RANKS)
                close(of_body, getattr(whole["body"], name).grad, 1e-5)
    logps = hl.linear_token_logps(
        mine.hidden, head.weight, mine.labels, head.bias, parallel=hl.Parallel(data=mesh)
    )
    expected = hl.linear_token_logps(
        data.hidden, whole["head"].weight, data.labels, whole["head"].bias
    )
    close(logps, expected[DATA["uneven"][rank]["sequences"]], 1e-5)
    with pytest.raises(ValueError, match=r"weight is a DTensor .*Parallel\(data="):
        hl.linear_token_logps(mine.hidden, head.weight, mine.labels)


def an_fsdp2_head_to_which_rows_travel(rank):
    """Where these are fewer bytes than the weight, which then is not sent at all."""
    mesh, width, vocab = init_device_mesh("cpu", (RANKS,)), 3, 67
    lengths = ((4, 3, 2, 4), (5, 1))[rank]
    torch.manual_seed(1)
    parts = [
        (torch.randn(sum(n), width), torch.randint(vocab, (sum(n),)))
        for n in ((4, 3, 2, 4), (5, 1))
    ]
    parts[0][1][:2] = -100
    head = nn.Linear(width, vocab)
    order = [*range(7), *range(13, 18), *range(7, 13), 18]  # the chosen of both, then the rejected
    hidden, labels = (torch.cat([part[i] for part in parts])[order] for i in range(2))
    temperature = torch.rand(19) + 0.7
    sharded = copy.deepcopy(head)
    fully_shard(sharded, mesh=mesh)
    own = slice(0, 13) if rank == 0 else slice(13, 19)
    by_rank = torch.empty(19).index_copy_(0, torch.tensor(order), temperature)
    for objective in (hl.DPO(), hl.GRPO(entropy_coef=0.1), hl.SFT()):
        batch = {}
        if isinstance(objective, hl.GRPO):
            batch = {"advantages": torch.tensor([1.0, -2, 3, 0.5, 0.2, -1])}
        whole, mine = leaf(hidden), leaf(parts[rank][0])
        ends = torch.tensor([0, 4, 7, 12, 14, 18, 19])
        ref = torch.linspace(-5, -3, 19)
        head.zero_grad()
        sharded.zero_grad()
        expected = objective.from_hidden(
            whole,
            head.weight,
            labels,
            ref,
            bias=head.bias,
            cu_seqlens=ends,
            temperature=temperature,
            **batch,
        )
        expected[0].backward()
        if batch:
            places = ([0, 1, 3, 4], [2, 5])[rank]
            batch = {"advantages": batch["advantages"][places]}
        own_ref = torch.empty(19).index_copy_(0, torch.tensor(order), ref)[own]
        with Collectives() as collectives:
            found = objective.from_hidden(
                mine,
                sharded.weight,
                parts[rank][1],
                own_ref,
                bias=sharded.bias,
                cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
                temperature=by_rank[own],
                parallel=hl.Parallel(data=mesh, grad="mean"),
                **batch,
            )
            found[0].backward()
        close(found, expected, 1e-5)
        assert same_on_all_ranks(found[0])
        theirs = torch.empty_like(hidden).index_copy_(0, torch.tensor(order), whole.grad)
        close(mine.grad, RANKS * theirs[own], 1e-5)
        for name in ("weight", "bias"):
            of_head = getattr(sharded, name).grad
            close(of_head.full_tensor(), getattr(head, name).grad, 1e-5)
        assert 4 * 13 * width in collectives.floats  # hidden states of the rank that has more
        assert 4 * 13 * width * RANKS in collectives.floats  # their gradient
        assert 4 * width * -(-vocab // RANKS) not in collectives.floats


def groups_of_completions(rank):
    rewards, ids = torch.tensor([1.0, 0, 0.5, 2, -1, 0.1]), torch.tensor([3, 3, 5, 5, 3, 5])
    own = slice(4) if rank == 0 else slice(4, 6)
    shared = hl.group_advantages(rewards[own], ids[own], parallel=along("data", dist.group.WORLD))
    alone = hl.group_advantages(rewards[own], ids[own], parallel=hl.Parallel())
    whole = hl.group_advantages(rewards, ids, parallel=hl.Parallel())
    close(shared, whole[own])
    assert not torch.allclose(alone, whole[own])
    close(hl.group_advantages(rewards[own], ids[own]), shared)  # all ranks there are


def mismatched(rank):
    prompts, completions = [[1], [1], [2], [3]], [[5, 6], [7], [8], [9]]
    own = slice(0, 3) if rank == 0 else slice(3, 4)
    parallel = along("data", dist.group.WORLD)
    whole = hl.mismatched_pairs(prompts, completions)
    assert hl.mismatched_pairs(prompts[own], completions[own], parallel=parallel) == whole[own]
    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    labels = [[-100] * len(p) + c for p, c in zip(prompts, completions, strict=True)]
    expected = hl.mismatched_rows(**packed_rows(rows, labels))
    found = hl.mismatched_rows(**packed_rows(rows[own], labels[own]), parallel=parallel)
    ends = expected["cu_seqlens"].tolist()
    some = slice(ends[own.start], ends[own.stop])
    for name in ("input_ids", "labels"):
        assert found[name].tolist() == expected[name][some].tolist()
    with pytest.raises(ValueError, match="at least two sequences"):
        hl.mismatched_pairs(prompts[:1], completions[:1], parallel=hl.Parallel())


def packed_rows(rows, labels):
    ends = torch.tensor([0, *map(len, rows)]).cumsum(0)
    ids, labels = (torch.tensor([x for row in part for x in row]) for part in (rows, labels))
    return {"input_ids": ids, "labels": labels, "cu_seqlens": ends}


class Spread(hl.Objective):
    """An objective of one's own, on the whole batch: how far apart the weighted sequences are."""

    per_sequence = ("scale",)

    def prepare(self, layout, ref_logps, scale, weights):
        return {"scale": scale, "weights": weights.reshape(-1)}

    def loss(self, rows, scale, weights):
        return (scale * rows.sum(weights * rows.log_ratio)).var()


def an_objective_of_one_s_own(rank):
    data, scale = Batch(), torch.rand(6, dtype=torch.float64)
    weights = torch.rand(6, 5, dtype=torch.float64)
    ways = ("sequence", SEQUENCE["uneven"][rank]), ("data", DATA["uneven"][rank])
    whole = leaf(data.logps)
    expected = Spread().from_logps(whole, data.ref, data.mask, scale=scale, weights=weights)
    for axis, have in ways:
        mine, sequences, rows = data.part(**have), have.get("sequences", ALL), have.get("rows", ALL)
        logps = leaf(mine.logps)
        arguments = logps, mine.ref, mine.mask
        parallel = along(axis, dist.group.WORLD)
        of_rows = weights[sequences, rows]
        found = Spread().from_logps(
            *arguments, scale=scale[sequences], weights=of_rows, parallel=parallel
        )
        close(found, expected)
        theirs = gradients(expected[0], whole, retain_graph=True)[0][sequences, rows]
        close(gradients(found[0], logps)[0], theirs)
        with pytest.raises(ValueError, match=r"weights must begin with .* or Spread\.per_sequence"):
            Spread().from_logps(
                *arguments, scale=scale[sequences], weights=torch.ones(7), parallel=parallel
            )


def what_is_sent(rank):
    """4 bytes a row of log-probs; before them, of what the batch has; then whole numbers."""
    data = Batch(dtype=torch.float32)
    for case, of_batch in (("dpo-sigmoid", 1), ("grpo-grpo", 3), ("sft", 1)):
        mine = data.part(**SEQUENCE["uneven"][rank])
        with Collectives() as collectives:
            mine.from_logps(
                oracle.BY_NAME[case],
                perception(oracle.BY_NAME[case]),
                leaf(mine.logps),
                parallel=along("sequence", dist.group.WORLD),
            )[0].backward()
        most = 6 * 3  # rows of the rank that has more of them
        assert collectives.floats == [4 * most] * (of_batch + 1)


def what_is_refused(rank):
    data = Batch()
    mine = data.part(sequences=slice(2 + 2 * rank))
    with pytest.raises(ValueError, match=r"the same sequences, got \[2, 4\] of them"):
        hl.SFT().from_logps(
            mine.logps, None, mine.mask, parallel=along("sequence", dist.group.WORLD)
        )
    with pytest.raises(ValueError, match="two axes have this rank alone in common"):
        hl.Parallel(sequence=dist.group.WORLD, data=dist.group.WORLD)
    with pytest.raises(ValueError, match='grad must be "sum" or "mean"'):
        hl.Parallel(grad="max")


CHECKS = [
    the_page,
    an_fsdp2_head,
    an_fsdp2_head_to_which_rows_travel,
    split_sequences,
    other_sequences,
    rows_as_dtensors,
    log_probs_of_rows_as_dtensors,
    on_their_way,
    a_reference_that_is_gathered,
    rows_as_other_dtensors,
    ranks_without_rows_and_packed_ones,
    gradients_for_an_engine_that_averages,
    rows_that_do_not_fit,
    an_objective_of_one_s_own,
    groups_of_completions,
    mismatched,
    what_is_sent,
    what_is_refused,
    the_kernels,
]


outcome = outcome_of(CHECKS, RANKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_in_two_processes(check, outcome):
    require_passed(check, outcome, RANKS)


# What four processes run


def two_axes(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    outer, inner = mesh.get_coordinate()
    data = Batch()
    for case in oracle.FEW:
        have = DATA["uneven"][outer] | SEQUENCE["uneven"][inner]
        parallel = hl.Parallel(data=mesh["outer"], sequence=mesh["inner"])
        compare(data, have, parallel, case)
        for axis, ways in (("data", DATA), ("sequence", SEQUENCE)):
            parallel = hl.Parallel(**{axis: mesh["outer"]}, vocab=mesh["inner"])
            columns = slice(4) if inner == 0 else slice(4, 7)
            have, group = ways["uneven"][outer], mesh["outer"].get_group()
            compare(data, have, parallel, case, group=group, columns=columns)


def dtensors_on_two_axes(rank):
    """Rows split over one dimension of a mesh, and over the other rows again, or the vocabulary: of
    it logits are split, and hidden states whole or, as sequence parallelism leaves them, split."""
    mesh, data = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner")), Batch()
    outer, inner = mesh.get_coordinate()
    columns = slice(4) if inner == 0 else slice(4, 7)
    for case in oracle.FEW:
        have = DATA["uneven"][outer] | SEQUENCE["uneven"][inner]
        parallel = hl.Parallel(data=mesh["outer"], sequence=mesh["inner"])
        compare(data, have, parallel, case, lying=(placed(mesh, Shard(0), Shard(1)),) * 2)
        for axis, ways, dim in (("data", DATA, 0), ("sequence", SEQUENCE, 1)):
            compare(
                *(data, ways["uneven"][outer]),
                hl.Parallel(**{axis: mesh["outer"]}, vocab=mesh["inner"]),
                case,
                group=mesh["outer"].get_group(),
                columns=columns,
                lying=(placed(mesh, Shard(dim), Replicate()), placed(mesh, Shard(dim), Shard(2))),
            )
    parallel = hl.Parallel(data=mesh["outer"], vocab=mesh["inner"])
    weight, whole = leaf(data.weight), leaf(data.hidden)
    expected = hl.SFT().from_hidden(whole, weight, data.labels)[0]
    expected.backward()
    split = distribute_tensor(data.weight, mesh["inner"], [Shard(0)]).requires_grad_()
    for placements in ([Shard(0), Shard(1)], [Shard(0), Replicate()], [Shard(0), Shard(2)]):
        hidden = distribute_tensor(data.hidden, mesh, placements).requires_grad_()
        split.grad = None
        own = data.labels[3 * outer : 3 * outer + 3]
        loss = hl.SFT().from_hidden(hidden, split, own, parallel=parallel)[0]
        loss.backward()
        close(loss, expected)
        assert hidden.grad.placements == tuple(placements)
        close(hidden.grad.full_tensor(), whole.grad)
        close(total(split.grad.full_tensor(), mesh["outer"].get_group()), weight.grad)
    rows = hl.Parallel(data=mesh["outer"], sequence=mesh["inner"])
    own = data.hidden[3 * outer : 3 * outer + 3, SEQUENCE["uneven"][inner]["rows"]]
    packed = DTensor.from_local(own.contiguous(), mesh, [Shard(0), Shard(1)]).view(-1, data.H)
    labels = torch.zeros(own.shape[:2], dtype=torch.int64).flatten()
    found = hl.linear_token_logps(packed, data.weight, labels, parallel=rows)
    close(found, hl.linear_token_logps(own.flatten(0, 1), data.weight, labels))
    with pytest.raises(ValueError, match=r"^hidden .* dimension 0 of its mesh .*Parallel\(data="):
        hl.SFT().from_hidden(
            *(distribute_tensor(data.hidden, mesh, [Shard(0)] * 2), data.weight, data.labels),
            parallel=hl.Parallel(vocab=mesh["inner"]),
        )
    first = DeviceMesh("cpu", [0, 1])
    if outer == 1:  # of whose ranks these two are none
        with pytest.raises(ValueError, match=r"^hidden .* dimension 0 of its mesh \[0, 1\]"):
            hidden = DTensor.from_local(data.hidden, first, [Shard(0)])
            parallel = hl.Parallel(data=mesh["inner"])
            hl.SFT().from_hidden(hidden, data.weight, data.labels, parallel=parallel)


def a_head_that_the_ranks_of_both_axes_have_split(rank):
    """FSDP2's, over one mesh of data and context parallel ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    data, outer, inner = Batch(dtype=torch.float32), *mesh.get_coordinate()
    whole = nn.Linear(data.H, data.V)
    have = DATA["uneven"][outer] | SEQUENCE["uneven"][inner]
    mine, rows = data.part(**have), (have["sequences"], have["rows"])
    for grad, factor in (("mean", 4), ("sum", 1)):
        for case in (oracle.BY_NAME["dpo-sigmoid"], oracle.BY_NAME["grpo-bnpo"]):
            states, hidden = leaf(data.hidden), leaf(mine.hidden)
            whole.zero_grad()
            expected = data.from_hidden(
                case, perception(case), states, whole.weight, bias=whole.bias
            )
            expected[0].backward()
            sharded = copy.deepcopy(whole)
            fully_shard(sharded, mesh=mesh["dp", "cp"]._flatten("dp_cp"))
            parallel = hl.Parallel(data=mesh["dp"], sequence=mesh["cp"], grad=grad)
            found = mine.from_hidden(
                *(case, perception(case), hidden, sharded.weight),
                bias=sharded.bias,
                parallel=parallel,
            )
            found[0].backward()
            close(found, expected, 1e-5)
            close(hidden.grad, factor * states.grad[rows[0]][:, rows[1]], 1e-5)
            for name in ("weight", "bias"):
                of_head = getattr(sharded, name).grad
                close(of_head.full_tensor(), getattr(whole, name).grad, 1e-5)
    with pytest.raises(ValueError, match=r"weight is a DTensor"):  # of more ranks than these
        hl.linear_token_logps(
            *(mine.hidden, sharded.weight, mine.labels),
            parallel=hl.Parallel(sequence=mesh["cp"]),
        )


def a_head_of_slices_that_are_split(rank):
    """As FSDP2 leaves a tensor-parallel one, and as a mesh has it that names that axis first."""
    data = Batch(dtype=torch.float32)
    for names in (("dp", "tp"), ("tp", "dp")):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        have = DATA["uneven"][mesh["dp"].get_local_rank()]
        mine, axes = data.part(**have), {"vocab": mesh["tp"], "data": mesh["dp"]}
        for case in (oracle.BY_NAME["dpo-sigmoid"], oracle.BY_NAME["grpo-bnpo"]):
            whole = [leaf(x) for x in (data.hidden, data.weight, data.bias)]
            expected = data.from_hidden(case, perception(case), *whole[:2], bias=whole[2])
            expected[0].backward()
            if names[0] == "dp":
                head = nn.Linear(data.H, data.V)
                head.load_state_dict({"weight": data.weight, "bias": data.bias})
                parallelize_module(head, mesh["tp"], ColwiseParallel())
                fully_shard(head, mesh=mesh["dp"])
                weight, bias = head.weight, head.bias
            else:
                weight, bias = (
                    distribute_tensor(x, mesh, [Shard(0)] * 2).requires_grad_()
                    for x in (data.weight, data.bias)
                )
            hidden = leaf(mine.hidden)
            found = mine.from_hidden(
                *(case, perception(case), hidden, weight),
                bias=bias,
                parallel=hl.Parallel(**axes, grad="mean"),
            )
            found[0].backward()
            close(found, expected, 1e-5)
            assert same_on_all_ranks(found[0])
            assert weight.grad.placements == weight.placements
            ours = hidden.grad / 2, weight.grad.full_tensor(), bias.grad.full_tensor()
            dh, dw, db = (x.grad for x in whole)
            close(ours, (dh[have["sequences"]], dw, db), 1e-5)
    wrong = distribute_tensor(data.weight, mesh, [Shard(0), Shard(1)])
    with pytest.raises(ValueError, match="weight must be split along dimension 0, by the vocab"):
        hl.linear_token_logps(mine.hidden, wrong, mine.labels, parallel=hl.Parallel(**axes))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    data_first = distribute_tensor(data.weight, mesh, [Shard(0)] * 2)
    axes = {"vocab": mesh["tp"], "data": mesh["dp"]}
    with pytest.raises(ValueError, match="weight must be split along dimension 0, by the vocab"):
        hl.linear_token_logps(mine.hidden, data_first, mine.labels, parallel=hl.Parallel(**axes))


FOUR = [
    two_axes,
    dtensors_on_two_axes,
    a_head_that_the_ranks_of_both_axes_have_split,
    a_head_of_slices_that_are_split,
]

outcome_of_four = outcome_of(FOUR, 4)


@pytest.mark.parametrize("check", FOUR, ids=lambda check: check.__name__)
def test_in_four_processes(check, outcome_of_four):
    require_passed(check, outcome_of_four, 4)
