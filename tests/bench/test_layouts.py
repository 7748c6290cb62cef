"""What the model says that ranks send one another is what they do send, counted on two of them."""

import pytest
import torch
import torch.distributed as dist
from oracle import leaf
from ranks import Collectives, outcome_of, require_passed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import humanline as hl
from bench.cases import Case
from bench.paper import layouts
from bench.paper.model import H100, VALUES, Layout, predict
from humanline.ops.hidden.gathered import rows_send_less

RANKS, WIDTH = 2, 5
OBJECTIVES = {"sft": hl.SFT(), "dpo": hl.DPO(), "kto": hl.KTO(), "grpo": hl.GRPO()}


def step(objective, rows, weight, dtype=torch.float32, **options):
    """The bytes of floats that a rank gives to each collective of a step, over rows in sequences of
    six."""
    torch.manual_seed(1)
    hidden = leaf(torch.randn(rows, WIDTH, dtype=dtype))
    labels = torch.arange(rows) % 7
    if isinstance(objective, hl.GRPO):
        # One a row, so that it is no matter how many sequences a rank has.
        options["advantages"] = torch.linspace(-1, 1, rows)
    if isinstance(objective, hl.KTO):
        options |= {"desirable": torch.arange(rows // 6) % 2 == 0, "z0": 0.1}
    reference = torch.zeros(rows) if objective.needs_reference else None
    ends = torch.arange(0, rows + 1, 6)
    with Collectives() as collectives:
        loss, _ = objective.from_hidden(
            hidden, weight, labels, reference, cu_seqlens=ends, **options
        )
        loss.backward()
    return collectives.floats


def given(collectives):
    return [c.given for c in collectives]


# What both processes run


def a_split_vocabulary(rank):
    weight, rows = leaf(torch.randn(33, WIDTH)[:20] if rank == 0 else torch.randn(13, WIDTH)), 24
    parallel = hl.Parallel(vocab=dist.group.WORLD)
    for objective, entropy in ((hl.SFT(), False), (hl.GRPO(entropy_coef=0.1), True)):
        for blocks in (1, 3):
            workspace = (1 + entropy) * 4 * 20 * rows // blocks
            found = step(objective, rows, weight, parallel=parallel, workspace_bytes=workspace)
            expected = layouts.split_vocabulary(rows, WIDTH, 4, RANKS, blocks, entropy)
            assert found == given(expected)


def shared_rows(rank):
    rows = 24 if rank == 0 else 12
    for axis in ("sequence", "data"):
        parallel = hl.Parallel(**{axis: dist.group.WORLD})
        for name, objective in OBJECTIVES.items():
            own = 24 if axis == "sequence" else rows  # rows of the same sequences
            found = step(objective, own, leaf(torch.randn(33, WIDTH)), parallel=parallel)
            assert found == given(layouts.shared_rows(24, VALUES[name] + 1, RANKS)), name


def a_sharded_head(rank):
    """Both ways that it may be used, each where it is the one that is chosen."""
    mesh = init_device_mesh("cpu", (RANKS,))
    parallel = hl.Parallel(data=mesh)
    rows = 24 if rank == 0 else 12
    for vocab in (7, 67):
        head = nn.Linear(WIDTH, vocab, bias=False)
        fully_shard(head, mesh=mesh)
        for name, objective in OBJECTIVES.items():
            found = sorted(step(objective, rows, head.weight, parallel=parallel))
            travel = rows_send_less(36, vocab, 4, 4)
            assert travel == (vocab == 67)
            expected = layouts.shared_rows(24, VALUES[name] + (not travel), RANKS)
            if travel:
                expected += layouts.travelling_rows(24, 36, WIDTH, 4, RANKS)
            else:
                expected += layouts.gathered_head(vocab, WIDTH, 4, RANKS)
            assert found == sorted(given(expected)), name


CHECKS = [a_split_vocabulary, shared_rows, a_sharded_head]

outcome = outcome_of(CHECKS, RANKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_in_two_processes(check, outcome):
    require_passed(check, outcome, RANKS)


@pytest.mark.parametrize(("kind", "sent"), [("gather", 2400), ("scatter", 600), ("sum", 1200)])
def test_a_ring_sends_what_its_ranks_do_not_have(kind, sent):
    assert layouts.Collective(kind, 800.0, 4).sent == sent
    assert layouts.Collective(kind, 800.0, 1).sent == 0


def test_in_half_precision_rows_travel_up_to_one_and_a_half_vocabularies():
    most = int(1.5 * 151_936)
    assert rows_send_less(most - 1, 151_936, 2, 2) and not rows_send_less(most, 151_936, 2, 2)


@pytest.mark.parametrize("tokens", [65_536, 1_048_576])
def test_what_travels_is_what_sends_less(tokens):
    case, ways = Case("grpo", "hidden", tokens, 4096, 151_936, "bfloat16"), 64
    rows = layouts.travelling_rows(tokens / ways, tokens, 4096, 2, ways)
    head = layouts.gathered_head(151_936, 4096, 2, ways)
    sent = [sum(c.sent for c in way) for way in (rows, head)]
    assert Layout(tokens=ways, sharded=True).rows_travel(case) == (sent[0] < sent[1])
    assert not Layout(tokens=ways).rows_travel(case)


def test_one_gpu_sends_nothing_and_several_multiply_their_share():
    case = Case("grpo", "hidden", 65_536, 4096, 151_936, "bfloat16")
    one = predict(case, H100)
    assert one.collectives == 0 and not any(Layout().collectives(case).values())
    for layout in (Layout(tokens=8), Layout(tokens=8, sharded=True), Layout(vocab=8)):
        several = predict(case, H100, layout=layout)
        assert several.collectives > 0
        assert several.gemm == pytest.approx(one.gemm / 8, rel=0.1)
