"""The Axolotl plugin, in Axolotl where it is installed and on a transcription of its base class."""

import importlib
import inspect
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest

import humanline as hl
from humanline import install

pydantic = pytest.importorskip("pydantic", reason="Axolotl's schemas are pydantic's")

PLUGIN = "humanline.integrations.axolotl"


class BasePlugin:
    """What the plugin overrides of Axolotl 0.19's."""

    def get_input_args(self):
        return None

    def post_trainer_create(self, cfg, trainer):
        pass


@pytest.fixture(params=["installed", "transcription"])
def plugin(request, monkeypatch):
    """The plugin's module, freshly imported."""
    if request.param == "transcription":
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            module = ModuleType(name)
            module.__path__, module.BasePlugin = [], BasePlugin
            monkeypatch.setitem(sys.modules, name, module)
    else:
        reason = "axolotl (or something it imports) is not installed"
        pytest.importorskip("axolotl.integrations.base", reason=reason, exc_type=ImportError)
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    yield importlib.import_module(PLUGIN)
    sys.modules.pop(PLUGIN, None)


@pytest.fixture
def applied(monkeypatch):
    """The calls of ``apply_humanline``, which others test."""
    calls, trl = [], ModuleType("humanline.integrations.trl")
    trl.apply_humanline = lambda trainer, **options: calls.append((trainer, options))
    monkeypatch.setitem(sys.modules, trl.__name__, trl)
    return calls


DEFAULTS = {
    "perception": hl.Clip(),
    "sync_every": 1,
    "reference": None,
    "gradient_tolerance": 0.0,
}


def config(plugin, **given):
    """As Axolotl makes it: the schema's dump without what is None, attributes None if absent."""
    module, _, name = plugin.HumanlinePlugin().get_input_args().rpartition(".")
    schema = getattr(importlib.import_module(module), name)
    options = {"reference": None} | schema(**given).model_dump(exclude_none=True)
    return SimpleNamespace(**options)


def test_the_trainer_becomes_a_humanline_one(plugin, applied):
    trainer = object()
    options = {"log_eps_P": -0.05, "log_eps_R": 0.1, "sync_every": 4, "reference": "copy"}
    options["gradient_tolerance"] = 1e-3
    plugin.HumanlinePlugin().post_trainer_create(config(plugin, **options), trainer)
    expected = {"perception": hl.Clip(-0.05, 0.1), "sync_every": 4, "reference": "copy"}
    expected["gradient_tolerance"] = 1e-3
    assert applied == [(trainer, expected)]


def test_by_default_too(plugin, applied):
    plugin.HumanlinePlugin().post_trainer_create(config(plugin), None)
    assert applied == [(None, DEFAULTS)]


def test_or_is_left_alone(plugin, applied):
    plugin.HumanlinePlugin().post_trainer_create(config(plugin, humanline=False), None)
    assert applied == []


def test_the_call_is_one_that_apply_humanline_takes(plugin, applied):
    plugin.HumanlinePlugin().post_trainer_create(config(plugin), object())
    del sys.modules["humanline.integrations.trl"]
    trl = pytest.importorskip(
        "humanline.integrations.trl", reason="needs TRL", exc_type=ImportError
    )
    ((trainer, options),) = applied
    inspect.signature(trl.apply_humanline).bind(trainer, **options)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"log_eps_P": 1.0, "log_eps_R": 0.5}, "log_eps_P <= log_eps_R, got log_eps_P=1.0"),
        ({"sync_every": -1}, "sync_every\n.*greater than or equal to 0"),
        ({"gradient_tolerance": 1.0}, r"gradient_tolerance must be in \[0, 1\), got 1.0"),
        ({"reference": "ema"}, "reference\n.*'copy', 'adapter' or 'lookahead'"),
    ],
)
def test_bad_options_are_refused_when_the_yaml_is_read(plugin, given, message):
    with pytest.raises(ValueError, match=message):
        config(plugin, **given)


def test_axolotl_merges_and_calls_it(applied, monkeypatch):
    reason = "axolotl (or something it imports) is not installed"
    base = pytest.importorskip("axolotl.integrations.base", reason=reason, exc_type=ImportError)
    merging = pytest.importorskip("axolotl.utils.config", reason=reason, exc_type=ImportError)
    manager = base.PluginManager.get_instance()
    monkeypatch.setattr(manager, "plugins", {})
    manager.register(f"{PLUGIN}.HumanlinePlugin")
    given = {
        "plugins": [f"{PLUGIN}.HumanlinePlugin"],
        "base_model": "tiny",
        "rl": "dpo",
        "datasets": [{"path": "x", "type": "chatml.intel", "split": "train"}],
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-5,
        "sync_every": 3,
    }
    from axolotl.utils.dict import DictDefault

    cfg = merging.validate_config(DictDefault(given))
    manager.post_trainer_create(cfg, "the trainer")
    assert applied == [("the trainer", DEFAULTS | {"sync_every": 3})]


def test_without_axolotl_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", None)
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    with pytest.raises(ImportError, match=re.escape(install.command("axolotl"))):
        importlib.import_module(PLUGIN)
