"""The reference: a copy of its own, renewed before the optimizer step, every so many steps."""

import copy
import functools
import types

import pytest
import torch
from torch import nn

from humanline.reference import ReferenceAdapter, ReferenceCopy


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
    """Where a model keeps what changes."""
    trained = {n: t for n, t in model.state_dict().items() if not n.startswith("frozen")}
    return {t.untyped_storage().data_ptr() for t in trained.values()}


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def snapshot(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def move(model):
    """An optimizer step: every weight that trains and every buffer moves."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for t in [*trained, *model.buffers()]:
            if t.is_floating_point():
                t += torch.rand_like(t)  # not below 0: variances are among them


def test_it_shares_frozen_weights_alone():
    policy = Model()
    reference = ReferenceCopy(policy, score)
    assert same(reference.model, policy)
    assert not storages(reference.model) & storages(policy)
    assert reference.model.frozen.weight is policy.frozen.weight
    assert not reference.model.training and policy.training
    assert policy.embedding.weight.requires_grad and not policy.frozen.weight.requires_grad


def test_the_copy_computes_with_the_algorithms_the_policy_has():
    """at::matmul folds a batch or not by ``requires_grad``, whether or not gradients are on."""
    policy = nn.Linear(64, 64)
    reference = ReferenceCopy(policy, score)
    x = torch.randn(7, 5, 64).transpose(0, 1)  # not contiguous: linear goes through matmul
    (scores,) = next(reference.steps([[x]]))[1]
    with torch.no_grad():
        assert torch.equal(scores, policy(x))
    assert not scores.requires_grad
    assert all(p.requires_grad for p in reference.model.parameters())


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
    assert same(first, policy)  # frozen weights too
    assert first.frozen.weight is not policy.frozen.weight
    everything = sum(t.nbytes for t in [*policy.parameters(), *policy.buffers()])
    assert reference.memory_bytes() == everything
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
    frozen = sum(p.nbytes for p in policy.frozen.parameters())
    held = sum(t.nbytes for t in [*policy.parameters(), *policy.buffers()]) - frozen
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
    frozen = [n for n in state["weights"] if n.startswith("frozen")]
    assert state["step"] == 2 and not frozen  # frozen weights are the policy's: not saved

    resumed_policy = Model().eval()
    resumed_policy.load_state_dict(policy.state_dict())
    resumed = ReferenceCopy(resumed_policy, score, sync_every=3)
    resumed.load_state_dict(state)
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
        with pytest.raises(ValueError, match=r"weight \[2, 3\] instead of|nothing instead of bias"):
            reference.load_state_dict(ReferenceCopy(other, score).state_dict())


def test_a_live_state_dict_would_follow_the_policy_and_the_snapshot_does_not():
    policy = Model()
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1.0)
    references = [kind(policy, score) for kind in (ReferenceCopy, ReferenceAdapter)]
    before, live = snapshot(policy), policy.state_dict()
    policy(torch.arange(5)).square().sum().backward()  # moves the norm's buffers too
    optimizer.step()
    for name in ("embedding.weight", "norm.running_mean"):
        assert not torch.equal(live[name], before[name])
        for reference in references:
            assert torch.equal(reference.state_dict()["weights"][name], before[name])


def test_a_sync_is_one_multi_tensor_copy(monkeypatch):
    calls, copy = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *a: (calls.append(len(a[0])), copy(*a)))
    for kind in (ReferenceCopy, ReferenceAdapter):
        reference = kind(Model(), score)
        reference.before_step()
        assert calls.pop() == len(reference.snapshot) and not calls


@pytest.mark.parametrize("kind", [ReferenceCopy, ReferenceAdapter])
def test_weights_unfrozen_after_it_was_made_are_refused(kind):
    policy = Model()
    reference = kind(policy, score)
    policy.frozen.requires_grad_(True)
    with pytest.raises(ValueError, match=r"unfreeze.*: frozen.bias \[3\], frozen.weight"):
        reference.before_step()


def test_a_negative_schedule_is_refused():
    with pytest.raises(ValueError, match="sync_every must be 0"):
        ReferenceCopy(nn.Linear(2, 2), score, sync_every=-1)


# A copy that is none


def closure(model):
    forward = model.forward
    model.forward = lambda x: forward(x)


def wrapped(model):
    forward = model.forward

    @functools.wraps(forward)
    def replaced(*arguments):
        return functools.partial(forward)(*arguments)

    model.forward = replaced


def by_name(model):
    namespace = {"old": model.forward}
    exec("def forward(x): return old(x)", namespace)
    model.forward = namespace["forward"]


def of_a_part(model):
    closure(model.head)


@pytest.mark.parametrize("replace", [closure, wrapped, by_name, of_a_part])
@pytest.mark.parametrize("given", [False, True], ids=["copied", "given"])
def test_a_forward_that_calls_the_policy_s_is_refused(replace, given):
    policy = Model()
    replace(policy)
    named = "head" if replace is of_a_part else "Model"
    message = f"scored with the policy: the forward of {named} was replaced .*Make the reference"
    with pytest.raises(ValueError, match=message):
        ReferenceCopy(policy, score, model=copy.deepcopy(policy) if given else None)


def method(model):
    forward = model.forward
    model.forward = types.MethodType(lambda self, x: forward(x), model)


def hook(model):
    weight = model.embedding.weight
    model.register_forward_hook(lambda module, given, result: result + weight.sum())


@pytest.mark.parametrize("replace", [method, hook])
def test_scoring_with_the_policy_s_weights_is_refused(replace):
    """A method has the copy as self, and only running it shows what it computes with."""
    policy = Model()
    replace(policy)
    reference = ReferenceCopy(policy, score)
    with pytest.raises(ValueError, match=r"scoring Model used its embedding.weight\. Make the"):
        reference.scores([torch.arange(5)])


def method_of_its_own(model):
    forward = type(model).forward
    model.forward = types.MethodType(lambda self, x: forward(self, x), model)


def bound(model):
    model.forward = functools.partial(model.forward)


def unused(model):
    """As TRL's fused head keeps the forward that it replaces."""
    old = model.forward
    forward = type(model).forward
    model.forward = types.MethodType(
        lambda self, x: forward(self, x) if self is not None else old(x), model
    )


def compiled(model):
    model.compile(backend="eager")


@pytest.mark.parametrize("replace", [method_of_its_own, bound, unused, compiled])
def test_what_uses_its_own_weights_is_taken(replace):
    policy = Model().eval()
    replace(policy)
    reference, ids = ReferenceCopy(policy, score), torch.arange(5)
    with torch.no_grad():
        assert torch.equal(reference.scores([ids])[0], policy(ids))
        move(policy)
        assert not torch.equal(reference.scores([ids])[0], policy(ids))


def test_the_policy_is_not_its_own_reference():
    policy = Model()
    with pytest.raises(ValueError, match=r"model holds the policy's own embedding.weight"):
        ReferenceCopy(policy, score, model=policy)


def test_computed_tensors_cannot_be_copied():
    policy = nn.Linear(2, 2)
    policy.doubled = policy.weight * 2
    with pytest.raises(ValueError, match=r"cannot be copied: .*take ReferenceAdapter"):
        ReferenceCopy(policy, score)
    ReferenceAdapter(policy, score)


@pytest.mark.parametrize("sync_every", ["1", 1.5, None])
def test_a_schedule_is_a_whole_number(sync_every):
    with pytest.raises(TypeError, match="sync_every must be a whole number, got"):
        ReferenceCopy(nn.Linear(2, 2), score, sync_every=sync_every)
