"""What is random in training mode is found by measuring, and switched off or refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

from humanline.dropout import noisy_modules, switch_off_noise


class Functional(nn.Module):
    """Dropout that no attribute tells of."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.dropout(self.inner(x), 0.3, training=self.training)


class DropsLayers(nn.Module):
    """Each layer is left out now and then; so seldom that most runs do not show it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            if not (self.training and torch.rand([]) < 1e-6):
                x = layer(x)
        return x


class AlwaysNoisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class NoiseWithoutEffect(nn.Module):
    def forward(self, x):
        torch.rand(1)
        return x


def model_of(*layers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), *layers).train()
    x = torch.randn(8, 4)
    return model, lambda: model(x)


@pytest.mark.parametrize(
    "layer, names",
    [
        (lambda: nn.Dropout(0.1), ["1"]),
        (lambda: nn.Dropout1d(0.1), ["1"]),
        (Functional, ["1"]),
        (DropsLayers, ["1"]),
        (lambda: nn.Sequential(nn.Identity(), Functional()), ["1.1"]),
        (lambda: nn.GRU(4, 4, 2, dropout=0.2), ["1"]),
        (nn.Identity, []),
    ],
)
def test_noise_is_found_and_switched_off_for_good(layer, names):
    model, score = model_of(layer())
    if isinstance(model[1], nn.GRU):
        x = torch.randn(8, 3, 4)
        score = lambda: model[1](x)[0]  # noqa: E731
    assert noisy_modules(model, score) == names
    assert switch_off_noise(model, score) == names
    model.eval()
    expected = score()
    model.train()  # as trainers do before every step
    assert noisy_modules(model, score) == []
    assert torch.equal(score(), expected) and torch.equal(score(), expected)
    assert all(module.training for module in model.modules())


def test_a_branch_that_was_not_taken_is_silent_too():
    model, x = nn.ModuleList([Functional(), Functional(), nn.Dropout(0.5)]).train(), torch.ones(4)
    switch_off_noise(model, lambda: model[0](x))
    assert torch.equal(model[1](x), model[1](x)) and torch.equal(model[2](x), x)


def test_what_cannot_be_switched_off_is_refused_by_name():
    model, score = model_of(Functional(), AlwaysNoisy())
    with pytest.raises(ValueError, match=r"same batch differently.*: 2 draw random numbers"):
        switch_off_noise(model, score)


def test_what_differs_without_chance_is_refused():
    model, score = model_of(nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="no random number is drawn"):
        switch_off_noise(model, score)


def test_noise_without_effect_is_let_be():
    model, score = model_of(NoiseWithoutEffect())
    assert switch_off_noise(model, score) == ["1"]
    assert torch.equal(score(), score())


def test_nothing_else_is_touched():
    model, score = model_of(Functional())
    model[0].eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    switch_off_noise(model, score)
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in model] == [False, True]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        x = torch.ones(2, 4)
        assert torch.equal(other.train()(x), other(x))


def test_a_forward_that_fails_leaves_the_mode():
    model, score = model_of(Functional())
    switch_off_noise(model, score)
    with pytest.raises(RuntimeError):
        model[1](torch.ones(2, 3))
    assert model[1].training
