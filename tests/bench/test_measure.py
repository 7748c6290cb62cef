"""Peers take turns: rounds over all of them, humanline a second time, failures left behind."""

import ctypes
import json
from dataclasses import asdict

import pytest
import torch

from bench import measure as module
from bench.card import Card, card, read
from bench.cases import Case
from bench.measure import Result, measure_in_turn
from bench.peers import OURS, Peer, eager_logits, peers_of
from bench.report import terminal
from bench.run import Results

CASE = Case("grpo", "logits", tokens=16, vocab=100)
OUR_PEER = next(p for p in peers_of(CASE) if p.name == OURS)


@pytest.fixture(autouse=True)
def no_warm_up(monkeypatch):
    monkeypatch.setattr(module, "WARM_SECONDS", 0)
    monkeypatch.setattr(module, "TIMED_SECONDS", 0)  # a run a round


def peer(name, run=eager_logits):
    return Peer(name, run, "logits")


def in_turn(*peers, rounds=3, **options):
    return {r.peer: r for r in measure_in_turn(peers, CASE, "cpu", rounds, **options)}


def test_every_round_begins_with_another_peer_and_has_ours_once_more():
    order = []
    found = in_turn(peer("a"), OUR_PEER, begin=lambda p: order.append(p.name))
    rounds = order[-9:]
    assert rounds == ["a", OURS, OURS, OURS, OURS, "a", OURS, "a", OURS]
    assert {len(r.all_seconds) for r in found.values()} == {3}
    assert {len(r.ours_seconds) for r in found.values()} == {3}
    assert found["a"].ours_seconds == found[OURS].ours_seconds != found[OURS].all_seconds
    assert found["a"].gradient_error < 1e-6 and found["a"].cards == (None,) * 3


def test_peers_that_come_later_are_measured_beside_ours():
    assert len(in_turn(peer("a"))["a"].ours_seconds) == 3
    assert in_turn(peer("a"), beside_ours=False)["a"].ours_seconds == ()


def test_one_truth_and_one_batch_serve_all_peers(monkeypatch):
    made = []
    for name in ("truth", "inputs"):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, name=name, original=original: made.append(name) or original(*a)
        )
    in_turn(peer("a"), peer("b"), OUR_PEER)
    assert made == ["truth", "inputs"]


def test_compilers_forget_the_shape_of_the_truth(monkeypatch):
    """They would make code for any number of tokens of the second shape they meet."""
    events = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: events.append("reset"))

    def run(batch):
        events.append(batch.case.tokens)
        return eager_logits(batch)

    list(measure_in_turn([peer("a", run)], Case("grpo", "logits", 1024, vocab=20), "cpu", 1))
    events = [e for i, e in enumerate(events) if i == 0 or e != events[i - 1]]
    assert events == [512, "reset", 1024]


@pytest.mark.parametrize("dies_at", range(1, 6))
def test_a_failure_at_any_time_leaves_the_others_their_turns(dies_at):
    calls = []

    def run(batch):
        calls.append(batch)
        if len(calls) == dies_at:
            raise torch.OutOfMemoryError("no room")
        return eager_logits(batch)

    found = in_turn(peer("dies", run), peer("lives"), OUR_PEER)
    assert found["dies"].why_not == "OutOfMemoryError: no room" and not found["dies"].seconds
    assert all(len(found[name].all_seconds) == 3 for name in ("lives", OURS))


def test_a_wrong_peer_has_no_turn():
    found = in_turn(peer("wrong", lambda batch: 3 * eager_logits(batch)), peer("right"))
    assert found["wrong"].why_not.startswith("wrong: Errors(loss=")
    assert not found["wrong"].all_seconds and found["right"].seconds > 0


def test_inputs_that_cannot_be_drawn_are_the_result_of_all(monkeypatch):
    def inputs(*args):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(module, "inputs", inputs)
    found = in_turn(peer("a"), OUR_PEER)
    assert {r.why_not for r in found.values()} == {"OutOfMemoryError: no room"}


class Library:
    """Stands in for the driver's: every function writes a number and tells whether it failed."""

    uuid = None

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        self.uuid = uuid
        return 0

    def nvmlDeviceGetClockInfo(self, handle, which, value):
        return self.write(value, {1: 1980, 2: 2619}[which])

    def nvmlDeviceGetPowerUsage(self, handle, value):
        return self.write(value, 640_500)

    def nvmlDeviceGetTemperature(self, handle, which, value):
        return 3  # not supported

    def write(self, value, number):
        ctypes.cast(value, ctypes.POINTER(ctypes.c_uint))[0] = number
        return 0


def test_the_state_of_a_card():
    library = Library()
    assert read(library, "GPU-1") == Card(1980, 2619, 640.5, None) and library.uuid == b"GPU-1"
    library.nvmlDeviceGetHandleByUUID = lambda *args: 6  # not found
    assert read(library, "GPU-1") is None
    assert card("cpu") is None


def test_clocks_power_and_noise_stand_beside_the_numbers():
    cards = (Card(1900, 2619, 600.0, 50), None, Card(1800, 2619, None, 50))
    seconds = {"seconds": 1.1, "peak_bytes": 3, "ours_seconds": (1.0, 1.0), "cards": cards}
    result = Result(CASE, OURS, **seconds)
    assert Result.from_json(json.loads(json.dumps(asdict(result)))) == result
    text = terminal(Results({}, [result]))
    assert "1,850 MHz, 600 W" in text and "1.10" in text
