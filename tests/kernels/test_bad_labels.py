"""A label that is none of the vocabulary's reads nothing outside its row: its log-prob is NaN.

The checks of labels read their values, which on a GPU would wait for it; so kernels may meet one.
"""

import pytest
import torch

from humanline.kernels.head_rows import HeadRows
from humanline.kernels.linear_logps import linear_logps_forward
from humanline.kernels.token_logps import token_logps_forward
from humanline.kernels.token_loss import token_loss

N, V, H = 6, 300, 32
BAD = [1, 2, 4]  # rows, beside one that is masked and two that are right


@pytest.fixture
def labels(device):
    return torch.tensor([7, V, 10**6, -100, -7, 299], device=device)


def from_logits(labels, logits, temperature):
    return token_logps_forward(logits, labels, temperature, False)[0]


def from_logits_at_once(labels, logits, temperature):
    weight = torch.ones(N, device=logits.device)
    _, _, logps, _ = token_loss(
        logits, labels, temperature, torch.empty_like(logits), kind="nll", weight=weight
    )
    return logps


def between_the_gemms(labels, logits, temperature):
    return HeadRows(logits, labels, temperature).logps


def without_logits(labels, logits, temperature):
    hidden, weight = logits[:, :H].contiguous(), torch.eye(V, H, device=logits.device)
    return linear_logps_forward(hidden, weight, labels, temperature=temperature)[0]


@pytest.mark.parametrize(
    "logps_of", [from_logits, from_logits_at_once, between_the_gemms, without_logits]
)
def test_its_row_is_nan_and_no_other(device, labels, logps_of):
    logits = torch.randn(N, V, device=device)
    temperature = torch.ones((), dtype=torch.float64, device=device)
    if logps_of is between_the_gemms:  # whose rows are labelled, all of them
        labels[3] = 0
    found = logps_of(labels, logits, temperature)
    right = labels.index_fill(0, torch.tensor(BAD, device=device), 3)
    expected = logps_of(right, logits, temperature)
    assert expected.isfinite().all()
    assert found[BAD].isnan().all()
    others = [row for row in range(N) if row not in BAD]
    assert torch.equal(found[others], expected[others])


def test_its_gradient_is_nan_and_stays_in_its_row(device, labels):
    logits = torch.randn(N, V, device=device)
    around = torch.full((N + 2, V), 5.0, device=device)
    weight = torch.ones(N, device=device)
    temperature = torch.ones((), dtype=torch.float64, device=device)
    arguments = {"kind": "clipped", "weight": weight, "advantages": weight}
    token_loss(logits, labels, temperature, around[1:-1], **arguments)
    assert around[1:-1][BAD].isnan().all() and around[1:-1][[0, 3, 5]].isfinite().all()
    assert (around[[0, -1]] == 5).all()
