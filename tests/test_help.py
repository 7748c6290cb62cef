"""``help()`` of a public name is complete where it stands: it names all that is taken, and points
only to what is public too."""

import inspect
import re
from dataclasses import fields
from importlib.util import find_spec

import pytest

import humanline as hl
from humanline.objectives.dpo import LOSSES
from humanline.objectives.grpo import SHARES

PUBLIC = {name: getattr(hl, name) for name in hl.__all__ if name != "__version__"}
if find_spec("trl"):
    import humanline.integrations.trl as trl
    from humanline.integrations.trl.trainers import HumanlineOptions

    PUBLIC |= {name: getattr(trl, name) for name in trl.__all__}

POINTER = re.compile(r":[a-z]+:`~?([\w.]+)`")
ENTRY_POINTS = ("from_logps", "from_logits", "from_hidden")


def taken(thing):
    """Names of the arguments of a public function or class; of a batch too, for an objective."""
    if thing.__name__.endswith("Trainer"):
        return set()  # TRL's
    if thing.__name__.endswith("Config"):  # and TRL's, which has help of its own
        return {f.name for f in fields(HumanlineOptions)}
    names = set(_names(thing))
    for cls in inspect.getmro(thing) if inspect.isclass(thing) else ():
        if "prepare" in vars(cls):
            names |= set(_names(cls.prepare, inspect.Parameter.KEYWORD_ONLY))
    return names


def _names(function, *kinds):
    Parameter = inspect.Parameter
    kinds = kinds or (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    found = inspect.signature(function).parameters.values()
    return [p.name for p in found if p.kind in kinds and p.name != "self"]


@pytest.mark.parametrize("objective, names", [(hl.DPO, LOSSES), (hl.GRPO, SHARES)])
def test_it_names_every_loss(objective, names):
    assert not [name for name in names if f'"{name}"' not in inspect.getdoc(objective)]


def unnamed(names, text):
    return {name for name in names if not re.search(rf"\b{name}\b", text)}


@pytest.mark.parametrize("name", PUBLIC)
def test_it_names_all_that_is_taken(name):
    assert not unnamed(taken(PUBLIC[name]), inspect.getdoc(PUBLIC[name]))


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_entry_points_name_all_that_they_take(name):
    method = getattr(hl.Objective, name)
    assert not unnamed(_names(method), inspect.getdoc(method))


def members(thing):
    """Docstrings on the page of a public name: its own, and those of its public members of ours."""
    yield inspect.getdoc(thing)
    for name, value in inspect.getmembers(thing) if inspect.isclass(thing) else ():
        function = value.fget if isinstance(value, property) else inspect.unwrap(value)
        ours = (getattr(function, "__module__", None) or "").startswith("humanline")
        if ours and not name.startswith("_"):
            yield inspect.getdoc(value)


@pytest.mark.parametrize("name", PUBLIC)
def test_it_points_to_what_is_public(name):
    for text in members(PUBLIC[name]):
        for target in POINTER.findall(text or ""):
            first, *rest = target.removeprefix("humanline.").split(".")
            found = PUBLIC.get(first) or getattr(PUBLIC[name], first, None)
            for step in rest:
                found = getattr(found, step, None)
            assert found is not None, f"{target} is not public"
        assert not re.findall(r"[\w/]+\.py\b", text or "")
