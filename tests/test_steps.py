"""Micro-batches as optimizer steps: the same however early they are drawn."""

from itertools import islice

import pytest
import torch
from test_reference_kinds import make_optimizer, make_policy, score, train_from
from torch.utils.data import DataLoader, DistributedSampler

from humanline.reference import ReferenceCopy, ReferenceLookahead
from humanline.steps import optimizer_steps

DATA = list(range(10))


def ids(steps):
    return [[batch.tolist() for batch in step] for step in steps]


def test_the_last_step_of_an_epoch_takes_what_is_left():
    loader = DataLoader(DATA, batch_size=2)  # 5 micro-batches
    one = [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]]]
    assert ids(optimizer_steps(loader, 2, epochs=2)) == one + one
    assert list(optimizer_steps("abc", 2)) == [["a", "b"], ["c"]]
    assert list(optimizer_steps([], 2, epochs=3)) == []


def test_epochs_are_shuffled_anew_as_the_seed_says():
    loader = DataLoader(DATA, batch_size=10, shuffle=True)
    epochs = [step[0] for step in ids(optimizer_steps(loader, epochs=3))]
    assert all(sorted(epoch) == DATA for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    torch.rand(5)  # training's random numbers have no part in it
    again = ids(optimizer_steps(loader, epochs=3))
    assert [step[0] for step in again] == epochs
    assert ids(islice(optimizer_steps(loader, epochs=3), 2, None)) == again[2:]  # a resumed run
    assert ids(optimizer_steps(loader, epochs=3, seed=1)) != again


def test_a_loader_with_a_generator_of_its_own_is_shuffled_by_it():
    def epochs(seed):
        generator = torch.Generator().manual_seed(4)
        loader = DataLoader(DATA, batch_size=10, shuffle=True, generator=generator)
        return ids(optimizer_steps(loader, epochs=2, seed=seed))

    assert epochs(0) == epochs(1)
    assert epochs(0)[0] != epochs(0)[1]


def test_samplers_are_told_the_epoch():
    sampler = DistributedSampler(DATA, num_replicas=2, rank=1, seed=3)
    loader = DataLoader(DATA, batch_size=5, sampler=sampler)
    found = [step[0] for step in ids(optimizer_steps(loader, epochs=2))]
    for epoch, batch in enumerate(found):
        sampler.set_epoch(epoch)
        assert batch == list(sampler)
    assert found[0] != found[1]


def test_trainings_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(optimizer_steps(DataLoader(DATA, shuffle=True), epochs=2))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"gradient_accumulation_steps": 0}, "must be positive, got 0"),
        ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ({"loader": iter(DATA), "epochs": 2}, "2 epochs need a loader.*got an iterator"),
    ],
    ids=["accumulation", "epochs", "iterator"],
)
def test_bad_input_is_refused_at_the_call(arguments, message):
    with pytest.raises(ValueError, match=message):
        optimizer_steps(**{"loader": DATA} | arguments)


@pytest.mark.parametrize("sync_every, workers", [(1, 0), (3, 0), (12, 0), (3, 2)])
def test_looking_ahead_through_a_shuffling_dataloader_is_the_copy_bitwise(sync_every, workers):
    """18 rows in batches of 4: a short batch, 3 steps an epoch with the last one short too; syncs
    fall across epochs; dropout and shuffling both draw random numbers."""
    data = torch.randint(0, 11, (18, 6), generator=torch.Generator().manual_seed(1))
    loader = DataLoader(data, batch_size=4, shuffle=True, num_workers=workers)

    def run(kind):
        policy = make_policy()
        torch.manual_seed(2)
        reference = kind(policy, score, sync_every)
        steps = optimizer_steps(loader, 2, epochs=3)
        return train_from(policy, make_optimizer(policy), reference, steps, until=None)

    losses = run(ReferenceLookahead)
    assert len(losses) == 15 and losses == run(ReferenceCopy)
