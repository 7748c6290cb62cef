"""The reference: a copy of its own, renewed before the optimizer step, every so many steps."""

import pytest
import torch
from torch import nn

from humanline.reference import ReferenceCopy


class Model(nn.Module):
    """Tied weights, a shared module and a buffer, as language models have them."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids):
        return self.head(self.dropout(self.frozen(self.norm(self.embedding(ids)))))


def score(model, batch):
    return model(batch)


def storages(model):
    return {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def snapshot(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def move(model):
    """An optimizer step: every weight and buffer moves."""
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            if t.is_floating_point():
                t += torch.randn_like(t)


def test_it_shares_no_memory_and_takes_no_gradient():
    policy = Model()
    reference = ReferenceCopy(policy, score)
    assert same(reference.model, policy)
    assert not storages(reference.model) & storages(policy)
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert not reference.model.training and policy.training
    assert policy.embedding.weight.requires_grad and not policy.frozen.weight.requires_grad


def test_it_can_begin_with_another_model():
    policy, first = Model(), Model()
    kept = snapshot(first)
    reference = ReferenceCopy(policy, lambda model, batch: model(batch).sum(), model=first)
    assert reference.model is first and all(
        torch.equal(kept[name], t) for name, t in first.state_dict().items()
    )
    ids = torch.tensor([[1, 2], [3, 0]]).reshape(-1)
    with torch.no_grad():
        assert reference.scores([ids]) == [first(ids).sum()]
    reference.before_step()
    assert same(first, policy)
    with pytest.raises(ValueError, match="model is that of a reference with other weights"):
        ReferenceCopy(policy, score, model=nn.Linear(2, 3))


def test_tied_weights_stay_tied():
    policy = Model()
    reference = ReferenceCopy(policy, score)
    move(policy)
    reference.before_step()
    assert reference.model.head.weight is reference.model.embedding.weight
    assert same(reference.model, policy)
    assert not storages(reference.model) & storages(policy)
    held = sum(t.nbytes for t in [*policy.parameters(), *policy.buffers()])
    assert reference.memory_bytes() == held  # tied weights are held once


@pytest.mark.parametrize("sync_every", [0, 1, 3])
def test_the_reference_is_the_policy_of_before_the_last_sync(sync_every):
    """Losses at step s use the policy as it was before step k·⌊(s−1)/k⌋."""
    policy = Model().eval()
    reference = ReferenceCopy(policy, score, sync_every)
    history, ids = [], torch.arange(5)
    steps = reference.steps([ids, ids] for _ in range(8))
    for s, (batches, scores) in enumerate(steps):
        history.append(snapshot(policy))
        last_sync = sync_every * ((s - 1) // sync_every) if sync_every and s else 0
        expected = Model().eval()
        expected.load_state_dict(history[last_sync])
        assert len(scores) == len(batches) == 2
        torch.testing.assert_close(scores[0], expected(ids), rtol=0, atol=0)
        assert not scores[0].requires_grad
        reference.before_step()
        move(policy)


def test_a_sync_every_step_leaves_the_reference_one_step_behind():
    policy = Model()
    reference = ReferenceCopy(policy, score, sync_every=1)
    for _ in range(3):
        before = snapshot(policy)
        reference.before_step()
        move(policy)
        assert not same(reference.model, policy)  # synced after the step, it would be
        assert all(torch.equal(before[n], t) for n, t in reference.model.state_dict().items())


def test_state_round_trip_in_the_middle_of_a_period():
    policy = Model().eval()
    reference = ReferenceCopy(policy, score, sync_every=3)
    for _ in range(2):
        reference.before_step()
        move(policy)
    state = {
        name: value if name == "step" else {n: t.clone() for n, t in value.items()}
        for name, value in reference.state_dict().items()
    }
    frozen = [n for n in state["model"] if n.startswith("frozen")]
    assert state["step"] == 2 and not frozen  # frozen weights are the policy's: not saved

    resumed_policy = Model().eval()
    resumed_policy.load_state_dict(policy.state_dict())
    resumed = ReferenceCopy(resumed_policy, score, sync_every=3)
    resumed.load_state_dict(state)
    # The frozen weights moved in this test alone: bring them along.
    resumed.model.frozen.load_state_dict(reference.model.frozen.state_dict())
    assert same(resumed.model, reference.model) and resumed.step == 2
    for step in (2, 3):
        for r in (reference, resumed):
            r.before_step()
        assert same(resumed.model, reference.model), step
        torch.manual_seed(step)
        move(policy)
        torch.manual_seed(step)
        move(resumed_policy)
    assert reference.step == resumed.step == 4


def test_the_state_of_another_model_is_refused():
    reference = ReferenceCopy(nn.Linear(2, 2), score)
    for other in (nn.Linear(3, 2), nn.Linear(2, 2, bias=False)):
        with pytest.raises(ValueError, match="reference with other weights"):
            reference.load_state_dict(ReferenceCopy(other, score).state_dict())


def test_a_negative_schedule_is_refused():
    with pytest.raises(ValueError, match="sync_every must be 0"):
        ReferenceCopy(nn.Linear(2, 2), score, sync_every=-1)
