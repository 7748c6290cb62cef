"""``coupling``: a row's coefficient depends on no log-probs but those it says."""

from dataclasses import dataclass

import pytest
import torch
from oracle import CASES, Data, case_perceptions

import humanline as hl
from humanline.rows import Layout
from humanline.seam import evaluate


def together(coupling: str, sequence: int) -> list[int]:
    """Sequences that one's rows may depend on."""
    other = (sequence + Data.B // 2) % Data.B
    return {"sequence": [sequence], "pair": [sequence, other], "batch": [*range(Data.B)]}[coupling]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "case, perception", case_perceptions(CASES, ["identity", "clip", "prospect"])
)
def test_coefficients_ignore_what_they_are_not_coupled_to(case, perception, packed):
    data, objective = Data(), case.build(perception)
    batch = data.batch(case, packed)
    layout = Layout.of(data.shaped(data.mask, packed), batch.pop("cu_seqlens", None))
    problem = objective._problem(layout, data.shaped(data.ref, packed), batch)
    coupling = "sequence" if problem.coupling == "token" else problem.coupling

    def coefficients(logps):
        rows = [data.shaped(x, packed).reshape(-1) for x in (logps, data.entropy)]
        result = evaluate(problem, rows[0], rows[1] if objective.needs_entropy else None)
        g = result.coefficients.logps.view(layout.shape)
        return torch.where(data.mask, data.unpacked(g, packed), 0)

    expected = coefficients(data.logps)
    for sequence in range(Data.B):
        known = together(coupling, sequence)
        missing = torch.zeros_like(data.logps)  # as where they were not computed yet
        missing[known] = data.logps[known]
        given = coefficients(missing)
        torch.testing.assert_close(given[sequence], expected[sequence], rtol=1e-12, atol=0)
        assert given.isfinite().all()


@pytest.mark.parametrize(
    "objective", [hl.DPO(loss_type="aot"), hl.DPO(loss_type="aot_unpaired")], ids=repr
)
def test_sorting_couples_the_batch(objective):
    assert objective.coupling == "batch"


def test_another_loss_in_a_subclass_is_not_taken_for_the_old_one():
    @dataclass(frozen=True)
    class Ranked(hl.DPO):
        def loss(self, rows):
            return super().loss(rows) * rows.logps.max()

    @dataclass(frozen=True)
    class Logged(hl.DPO):
        def stats(self, rows):
            return {}

    assert Ranked().coupling == "batch" and Logged().coupling == "pair"
    assert hl.KTO().coupling == "sequence" and hl.SFT().coupling == "token"
