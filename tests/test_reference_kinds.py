"""Copy, adapter and look-ahead give the same numbers, those of the rule written out in a loop."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from humanline.reference import REFERENCES, ReferenceAdapter, ReferenceCopy, ReferenceLookahead

STEPS, VOCAB = 30, 11


class Model(nn.Module):
    """A frozen embedding, a body with dropout that trains, a tied pair of weights."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8).requires_grad_(False)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 8))
        self.body[3].weight = self.body[0].weight
        self.head = nn.Linear(8, VOCAB)

    def forward(self, ids):
        return self.head(self.body(self.embedding(ids)))


def score(model, ids):
    return model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def loss_of(model, ids, ref_logps):
    ratio = (score(model, ids) - ref_logps).clamp(-0.5, 0.5).exp()
    return -(ratio * torch.linspace(-1, 1, len(ids))[:, None]).mean()


def make_steps(accumulation, first=0):
    for step in range(first, STEPS):
        generator = torch.Generator().manual_seed(step)
        yield [torch.randint(0, VOCAB, (4, 6), generator=generator) for _ in range(accumulation)]


def make_policy():
    torch.manual_seed(1)
    return Model().train()


def make_optimizer(policy):
    return torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)


def train_from(policy, optimizer, reference, steps, until=STEPS):
    losses = []
    for batches, scores in reference.steps(steps):
        for batch, ref_logps in zip(batches, scores, strict=True):
            loss = loss_of(policy, batch, ref_logps) / len(batches)
            loss.backward()
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        reference.before_step()
        optimizer.step()
        optimizer.zero_grad()
        if reference.step == until:
            break
    return losses


def train(kind, sync_every, accumulation):
    policy = make_policy()
    reference = REFERENCES[kind](policy, score, sync_every)
    torch.manual_seed(2)
    losses = train_from(policy, make_optimizer(policy), reference, make_steps(accumulation))
    return losses, policy, reference


def transcription(sync_every, accumulation, after_the_step=False):
    """The rule of the paper in a plain loop."""
    policy = make_policy()
    optimizer, ref = make_optimizer(policy), copy.deepcopy(policy).eval()
    torch.manual_seed(2)
    losses = []
    for step, batches in enumerate(make_steps(accumulation)):
        for batch in batches:
            with torch.no_grad():
                ref_logps = score(ref, batch)
            loss = loss_of(policy, batch, ref_logps) / len(batches)
            loss.backward()
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        if step % sync_every == 0 and not after_the_step:
            ref.load_state_dict(policy.state_dict())
        optimizer.step()
        if step % sync_every == 0 and after_the_step:
            ref.load_state_dict(policy.state_dict())
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("sync_every", [1, 3, 4, 12])
@pytest.mark.parametrize("kind", REFERENCES)
def test_bitwise_the_rule_written_out(kind, sync_every, accumulation):
    losses, policy, _ = train(kind, sync_every, accumulation)
    assert len(losses) == STEPS * accumulation
    assert losses == transcription(sync_every, accumulation)
    assert all(module.training for module in policy.modules())


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_sync_after_the_step_would_be_another_method(kind):
    assert train(kind, 1, 1)[0] != transcription(1, 1, after_the_step=True)


@pytest.mark.parametrize("kind", ["copy", "adapter"])
def test_without_syncing_the_initial_policy_stays_the_reference(kind):
    policy = make_policy()
    reference = REFERENCES[kind](policy, score, 0)
    ids = torch.arange(10).view(1, -1)
    with torch.no_grad():
        expected = score(copy.deepcopy(policy).eval(), ids)
    for _, (of_reference,) in reference.steps([ids] for _ in range(3)):
        assert torch.equal(of_reference, expected)
        reference.before_step()
        with torch.no_grad():
            policy.head.weight += torch.randn_like(policy.head.weight)


def test_a_lookahead_needs_a_next_sync():
    with pytest.raises(ValueError, match="sync_every must be positive"):
        ReferenceLookahead(make_policy(), score, 0)


def test_a_lookahead_that_falls_short_says_so():
    reference = ReferenceLookahead(make_policy(), score, 1)
    with pytest.raises(RuntimeError, match="before_step"):
        for _ in reference.steps(make_steps(1)):
            pass  # an optimizer step without before_step()


@pytest.mark.parametrize("stop", [1, 4, 7, 29])
@pytest.mark.parametrize("kind", REFERENCES)
def test_a_resumed_run_goes_on_bitwise(kind, stop):
    whole = train(kind, 3, 2)[0]
    policy = make_policy()
    reference = REFERENCES[kind](policy, score, 3)
    optimizer = make_optimizer(policy)
    torch.manual_seed(2)
    begun = train_from(policy, optimizer, reference, make_steps(2), until=stop)
    state = copy.deepcopy([policy.state_dict(), optimizer.state_dict(), reference.state_dict()])
    rng = torch.get_rng_state()

    policy = Model().train()  # other weights: all of it has to come from the state
    optimizer, reference = make_optimizer(policy), REFERENCES[kind](policy, score, 3)
    for thing, saved in zip((policy, optimizer, reference), state, strict=True):
        thing.load_state_dict(saved)
    torch.set_rng_state(rng)
    assert begun + train_from(policy, optimizer, reference, make_steps(2, stop)) == whole


def lora_policy():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["body.0", "head"], lora_dropout=0.2, init_lora_weights=False
    )
    torch.manual_seed(1)
    model = Model()
    model.body[3].weight = nn.Parameter(model.body[3].weight.clone())  # an adapter is not tied
    return peft.get_peft_model(model, config).train()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("sync_every", [1, 3, 4, 12])
def test_with_peft_the_adapter_alone_is_a_full_copys_run(sync_every, accumulation):
    """Bitwise, against a second LoRA model with a base of its own."""

    def run(make_reference):
        policy = lora_policy()
        reference = make_reference(policy)
        torch.manual_seed(2)
        steps = make_steps(accumulation)
        return train_from(policy, make_optimizer(policy), reference, steps), reference

    def full(policy):
        return ReferenceCopy(policy, score, sync_every, model=copy.deepcopy(policy))

    expected, whole = run(full)
    for kind in REFERENCES.values():
        losses, reference = run(lambda policy, kind=kind: kind(policy, score, sync_every))
        assert losses == expected
        if kind is not ReferenceLookahead:
            assert reference.snapshot and all("lora_" in name for name in reference.snapshot)
            assert reference.memory_bytes() < whole.memory_bytes() / 2


class Engine:
    """DeepSpeed's engine as accelerate drives it: the optimizer steps inside ``backward``."""

    def __init__(self, module, accumulation):
        self.module, self.accumulation, self.micro_steps = module, accumulation, 0
        self.optimizer = make_optimizer(module)

    def backward(self, loss):
        loss.backward()
        self.micro_steps += 1
        if self.micro_steps % self.accumulation == 0:
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.mark.parametrize("kind", REFERENCES)
def test_where_the_step_is_inside_backward_the_hook_is_before_it(kind):
    engine = Engine(make_policy(), 2)
    reference = REFERENCES[kind](engine.module, score, 3)
    torch.manual_seed(2)
    losses = []
    for batches, scores in reference.steps(make_steps(2)):
        for batch, ref_logps in zip(batches, scores, strict=True):
            loss = loss_of(engine.module, batch, ref_logps) / len(batches)
            if batch is batches[-1]:  # gradients will synchronise
                reference.before_step()
            engine.backward(loss)
            losses.append(loss.item())
    assert losses == transcription(3, 2)


def test_shards_on_nvme_are_refused():
    policy = make_policy()
    shard = torch.zeros(4)
    shard.final_location = "nvme"  # DeepSpeed's marks
    policy.head.weight.ds_tensor = shard
    for kind in (ReferenceCopy, ReferenceAdapter):
        with pytest.raises(ValueError, match="some of the policy's on NVMe: offload parameters to"):
            kind(policy, score)
    ReferenceLookahead(policy, score)


def test_what_each_holds():
    held = {kind: train(kind, 4, 1)[2] for kind in REFERENCES}
    policy = make_policy()
    trained = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    assert held["copy"].memory_bytes() == held["adapter"].memory_bytes() == trained
    lookahead = ReferenceLookahead(policy, score, 4)
    steps = lookahead.steps(make_steps(1))
    next(steps)
    lookahead.before_step()
    batch, scores = 4 * 6 * 8, 4 * 5 * 4  # 4 × 6 int64 ids, 4 × 5 float32 scores
    assert lookahead.memory_bytes() == 4 * (batch + scores)


def test_an_adapter_leaves_the_policy_as_it_was_even_after_an_error():
    policy = make_policy()
    reference = ReferenceAdapter(policy, lambda model, batch: 1 / 0, 1)
    with torch.no_grad():
        policy.head.weight += 1
    before = policy.head.weight.clone()
    with pytest.raises(ZeroDivisionError):
        next(reference.steps(make_steps(1)))
    assert torch.equal(policy.head.weight, before)
    assert policy.training and policy.head.weight.requires_grad


@pytest.mark.parametrize("kind", REFERENCES)
def test_scoring_leaves_random_numbers_and_modes_alone(kind):
    policy = make_policy()
    policy.body[1].eval()  # one module that the caller holds in eval mode

    def noisy(model, batch):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        return torch.rand(2)

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    reference = REFERENCES[kind](policy, noisy, 1)
    next(reference.steps(make_steps(1)))
    reference.before_step()
    assert torch.equal(torch.rand(3), expected)
    assert policy.training and not policy.body[1].training


def test_state_of_another_kind_is_refused():
    policy = make_policy()
    with pytest.raises(ValueError, match="needs a state with step, weights; got step, scores"):
        ReferenceAdapter(policy, score).load_state_dict(
            ReferenceLookahead(policy, score).state_dict()
        )


def test_a_second_epoch_cannot_begin_without_a_reference():
    policy = make_policy()
    reference = ReferenceLookahead(policy, score, 1)
    for _ in reference.steps([next(make_steps(1))]):
        reference.before_step()
    with pytest.raises(RuntimeError, match="the steps of all epochs as one iterable"):
        next(reference.steps(make_steps(1)))


def test_memory_is_counted_in_whatever_a_batch_is():
    @dataclass(frozen=True)
    class Batch:
        __slots__ = ("again", "ids", "name")
        ids: torch.Tensor
        again: dict
        name: str

    ids = torch.zeros(2, 5, dtype=torch.int64)
    batch = Batch(ids, {"the same": ids, "more": (torch.zeros(3),)}, "text")
    reference = ReferenceLookahead(make_policy(), lambda model, batch: [score(model, batch.ids)], 1)
    next(reference.steps([[batch]] * 2))
    reference.before_step()
    assert reference.memory_bytes() == ids.nbytes + 3 * 4 + 2 * 4 * 4
