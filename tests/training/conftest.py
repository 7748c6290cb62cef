"""Fixtures: the tiny model and the toy task of toy.py, on disk."""

import pytest
from toy import make_model_folder, toy_rows, write_jsonl


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "toy.jsonl", toy_rows())


@pytest.fixture(scope="session")
def toy_heldout(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "heldout.jsonl"
    return write_jsonl(path, [{"prompt": r["prompt"], "answer": r["answer"]} for r in toy_rows(8)])


@pytest.fixture
def options(model_folder, toy_data, toy_heldout):
    """Options of a short run."""
    return {
        "model": str(model_folder),
        "data": str(toy_data),
        "heldout": str(toy_heldout),
        "eval_limit": 2,
        "max_new_tokens": 2,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
    }
