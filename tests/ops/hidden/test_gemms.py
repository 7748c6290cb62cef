"""How many GEMMs the loss tail from hidden states takes, counted from what is multiplied.

F is one N×H×V product; here counted in rows, N of them to an F, so that each line is exact.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import humanline as hl
from humanline.ops.backend import interpreting

B, T, H, V = 4, 8, 6, 50
N = B * T
ONE_ROW = V * 4  # bytes of logits


class GemmRows(TorchDispatchMode):
    """Rows of all products with the head's H and V among their dimensions."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = (
                (x for x in args if isinstance(x, torch.Tensor) and x.dim() == 2)
                if (name == "mm")
                else args[1:3]
            )
            self.rows += rows_of(a.shape, b.shape)
        return function(*args, **(kwargs or {}))


def rows_of(a, b):
    """Of a product with such factors, what is left beside the head's H and V."""
    dimensions = [a[0], a[1], b[1]]
    dimensions.remove(H)
    dimensions.remove(V)
    return dimensions[0]


class ProfiledRows:
    """The same by the profiler's shapes: it also sees what custom ops multiply."""

    def __enter__(self):
        self._profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *exception):
        self._profile.__exit__(*exception)
        first = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}  # of the factors
        self.rows = sum(
            rows_of(*event.input_shapes[first[event.name] :][:2])
            for event in self._profile.events()
            if event.name in first
        )


def count(
    objective,
    *,
    frozen_head=False,
    frozen_body=False,
    masked=0,
    far=0,
    rows_fitting=N,
    counter=GemmRows,
    **kw,
):
    """Rows multiplied in forward and backward; ``far`` rows lie beyond the clip bounds."""
    hidden = torch.randn(B, T, H, requires_grad=not frozen_body)
    weight = torch.randn(V, H, requires_grad=not frozen_head)
    labels = torch.randint(0, V, (B, T))
    labels.view(-1)[:masked] = -100
    with torch.no_grad():
        ref_logps = hl.linear_token_logps(hidden, weight, labels)
    ref_logps.view(-1)[N - far :] += 5
    with counter() as gemms:
        loss, stats = objective.from_hidden(
            hidden, weight, labels, ref_logps, workspace_bytes=rows_fitting * ONE_ROW, **kw
        )
        if loss.requires_grad:
            loss.backward()
    assert stats["humanline/active_rows"] == N - masked - far
    return gemms.rows


GRPO = hl.GRPO(perception=hl.Clip(-1, 1))
DPO = hl.DPO(perception=hl.Clip(-1, 1))
ADVANTAGES = {"advantages": torch.tensor([1.0, -1.0, 0.5, -0.5])}


@pytest.mark.parametrize("rows_fitting", [N, 5])
def test_token_level_takes_three(rows_fitting):
    assert count(GRPO, rows_fitting=rows_fitting, **ADVANTAGES) == 3 * N


def test_token_level_drops_masked_rows_everywhere_and_clipped_rows_from_the_backward():
    active = N - 7 - 9
    assert count(GRPO, masked=7, far=9, rows_fitting=5, **ADVANTAGES) == (N - 7) + 2 * active


PAIR, SEQUENCE = 2 * T, T
KTO = hl.KTO(perception=hl.Clip(-1, 1))
GSPO = hl.GRPO(perception=hl.Clip(-1, 1), importance_sampling_level="sequence")
DESIRABLE = {"desirable": torch.tensor([True, False, True, False]), "z0": 0.1}


@pytest.mark.parametrize("objective, kw", [(GRPO, ADVANTAGES), (DPO, {})], ids=["GRPO", "DPO"])
@pytest.mark.parametrize("rows_fitting", [N, 5])
def test_a_frozen_head_takes_two(objective, kw, rows_fitting):
    assert count(objective, frozen_head=True, rows_fitting=rows_fitting, **kw) == 2 * N


@pytest.mark.parametrize("objective, kw", [(GRPO, ADVANTAGES), (DPO, {})], ids=["GRPO", "DPO"])
def test_with_a_frozen_head_rows_drop_out_too(objective, kw):
    assert count(objective, frozen_head=True, far=9, **kw) == N + (N - 9)


def test_a_frozen_body_takes_two():
    assert count(GRPO, frozen_body=True, **ADVANTAGES) == 2 * N


def test_sequence_level_takes_three_where_the_logits_fit():
    assert count(DPO) == 3 * N
    assert count(DPO, masked=7, far=9) == (N - 7) + 2 * (N - 7 - 9)


@pytest.mark.parametrize(
    "objective, kw, rows_fitting",
    [(DPO, {}, PAIR), (DPO, {}, N - 1), (KTO, DESIRABLE, SEQUENCE), (GSPO, ADVANTAGES, SEQUENCE)],
    ids=["DPO", "DPO-uneven", "KTO", "GSPO"],
)
@pytest.mark.parametrize("masked, far", [(0, 0), (7, 9)])
def test_sequence_level_takes_three_where_those_of_a_group_fit(
    objective, kw, rows_fitting, masked, far
):
    taken = count(objective, rows_fitting=rows_fitting, masked=masked, far=far, **kw)
    assert taken == (N - masked) + 2 * (N - masked - far)


@pytest.mark.parametrize(
    "objective, kw, rows_fitting",
    [(DPO, {}, PAIR - 1), (KTO, DESIRABLE, SEQUENCE - 1), (GSPO, ADVANTAGES, SEQUENCE - 1)],
    ids=["DPO", "KTO", "GSPO"],
)
@pytest.mark.parametrize("far", [0, 9])
def test_sequence_level_recomputes_active_rows_where_they_do_not(objective, kw, rows_fitting, far):
    assert count(objective, rows_fitting=rows_fitting, far=far, **kw) == N + 3 * (N - far)


@pytest.mark.parametrize(
    "objective",
    [hl.DPO(loss_type="aot"), hl.DPO(perception=hl.ProspectWeight())],
    ids=["loss", "perception"],
)
def test_what_looks_at_the_whole_batch_recomputes_unless_that_fits(objective):
    assert count(objective) == 3 * N
    assert count(objective, rows_fitting=N - 1) == N + 3 * N


@pytest.mark.parametrize(
    "objective, kw, expected",
    [
        (GRPO, ADVANTAGES, N - 7 + 2 * (N - 7 - 9)),
        (GRPO, ADVANTAGES | {"frozen_head": True}, N - 7 + (N - 7 - 9)),
        (DPO, {"frozen_head": True, "rows_fitting": 5}, 2 * (N - 7)),
        (DPO, {"rows_fitting": PAIR}, N - 7 + 2 * (N - 7 - 9)),
        (DPO, {"rows_fitting": PAIR - 1}, N - 7 + 3 * (N - 7 - 9)),
    ],
    ids=["token", "token-frozen", "sequence-frozen", "sequence-fits", "sequence-recomputes"],
)
def test_the_profiler_counts_the_same(objective, kw, expected):
    assert count(objective, masked=7, far=9, counter=ProfiledRows, **kw) == expected


@pytest.mark.skipif(
    not interpreting() and not torch.cuda.is_available(), reason="needs a GPU or interpreter"
)
def test_kernels_that_write_no_logits_take_as_many(monkeypatch):
    """The forward and the recomputation of the logits are kernels, the rest of the backward not."""
    from humanline.kernels import linear_logps
    from humanline.kernels.launch import row_length

    device, launched = "cuda" if torch.cuda.is_available() else "cpu", []

    def spy(name):
        launch = getattr(linear_logps, name)

        def spied(hidden, weight, labels, *args, index=None, **kwargs):
            launched.append(len(labels if index is None else index))
            if index is not None:
                kwargs["index"] = index
            return launch(hidden, weight, labels, *args, **kwargs)

        monkeypatch.setattr(linear_logps, name, spied)

    spy("linear_logps_forward")
    spy("linear_logits_gradient")
    hidden = torch.randn(B, T, H, device=device, requires_grad=True)
    weight = torch.randn(V, H, device=device, requires_grad=True)
    labels = torch.randint(0, V, (B, T), device=device)
    labels.view(-1)[:7] = -100
    with GemmRows() as gemms:
        logps = hl.linear_token_logps(
            hidden, weight, labels, backend="triton", workspace_bytes=9 * 4 * row_length(V)
        )
        logps[2:].sum().backward()
    assert launched == [N - 7, 9, 7]
    assert gemms.rows == 2 * 2 * T


@pytest.mark.skipif(torch.cuda.is_available(), reason="a matter of oneDNN's")
@pytest.mark.parametrize("rows_fitting", [N, 2])
def test_bfloat16_on_a_cpu_is_multiplied_as_such(rows_fitting):
    """In forward and backward: the factors are bfloat16, or oneDNN may take them for such."""
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
                as_such = torch.backends.mkldnn.matmul.fp32_precision == "bf16"
                seen.append(args[-1].dtype == torch.bfloat16 or as_such)
            return function(*args, **(kwargs or {}))

    hidden = torch.randn(B, T, H).bfloat16().requires_grad_()
    weight = torch.randn(V, H).bfloat16().requires_grad_()
    labels = torch.randint(0, V, (B, T))
    with Products():
        loss, _ = hl.DPO().from_hidden(
            hidden,
            weight,
            labels,
            torch.full((B, T), -4.0),
            workspace_bytes=rows_fitting * 2 * ONE_ROW,
        )
        loss.backward()
    assert len(seen) >= 3 and all(seen)


def test_packed_pairs_of_uneven_length_go_by_what_is_labelled():
    lengths = [3, 0, 9, 2, 5, 1]  # pairs of 5, 5 and 10 rows
    n, ends = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    hidden, weight = torch.randn(n, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    labels, ref_logps = torch.randint(0, V, (n,)), torch.full((n,), -4.0)
    labels[4:7] = -100  # the last pair's: 7 are left
    grads = []
    for rows_fitting, rows in [(n, 3 * (n - 3)), (7, 3 * (n - 3)), (6, 4 * (n - 3))]:
        with GemmRows() as gemms:
            loss, _ = hl.DPO().from_hidden(
                hidden,
                weight,
                labels,
                ref_logps,
                cu_seqlens=ends,
                workspace_bytes=rows_fitting * ONE_ROW,
            )
            grads.append(torch.autograd.grad(loss, (hidden, weight)))
        assert gemms.rows == rows
    for some in grads[1:]:
        for a, b in zip(some, grads[0], strict=True):
            torch.testing.assert_close(a, b)


def test_zero_advantages_and_surrogate_clipping_drop_out_too():
    hidden, weight = torch.randn(B, T, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    labels = torch.randint(0, V, (B, T))
    with torch.no_grad():
        old_logps = hl.linear_token_logps(hidden, weight, labels)
    old_logps[2] -= 0.5  # ratio 1.65: clipped where the advantage is positive
    with GemmRows() as gemms:
        loss, _ = hl.GRPO().from_hidden(
            hidden, weight, labels, old_logps, advantages=torch.tensor([0.0, 1.0, 1.0, -1.0])
        )
        loss.backward()
    assert gemms.rows == N + 2 * 2 * T


def test_without_gradients_it_takes_one():
    with torch.no_grad():
        assert count(DPO, rows_fitting=5) == N


def test_log_probs_alone_recompute_rows_with_a_gradient():
    hidden, weight = torch.randn(B, T, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    labels = torch.randint(0, V, (B, T))
    with GemmRows() as gemms:
        logps = hl.linear_token_logps(hidden, weight, labels)
        logps[1:3].sum().backward()
    assert gemms.rows == N + 3 * 2 * T


def test_log_probs_alone_take_two_with_a_frozen_head():
    hidden, weight = torch.randn(B, T, H, requires_grad=True), torch.randn(V, H)
    labels = torch.randint(0, V, (B, T))
    labels[0] = -100
    with GemmRows() as gemms:
        hl.linear_token_logps(hidden, weight, labels).square().sum().backward()
    assert gemms.rows == 2 * (N - T)
