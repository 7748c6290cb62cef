"""What a humanline trainer refuses, before anything runs, and why."""

import reprlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from trl import DPOTrainer, KTOTrainer
from trl.data_utils import is_conversational

from humanline.checks import require
from humanline.integrations.trl.head import causal_model, is_adapted, require_plain_lora
from humanline.reference import REFERENCES

#: Options that contradict a reference that is synced: the value they must have, and why.
CONTRADICTIONS = {
    "precompute_ref_log_probs": (False, "the reference is synced, so its log-probs do not keep"),
    "sync_ref_model": (
        False,
        "TRL syncs after the optimizer step and mixes; humanline syncs before it, see sync_every",
    ),
    "off_policy_mask_threshold": (
        None,
        "it drops sequences by their drift from the sampler, and the ratio is to the reference",
    ),
}


def check_options(args: Any, sync_every: int, kind: str | None) -> None:
    """Raise ValueError if an option of TRL's contradicts humanline.

    Args:
        args: TRL's options.
        sync_every: optimizer steps between syncs. Never synced, the reference is TRL's affair.
        kind: of the reference, as asked for.
    """
    for name, (wanted, reason) in CONTRADICTIONS.items():
        value = getattr(args, name, wanted)
        require(
            sync_every == 0 or value == wanted,
            f"{name}={value!r} contradicts humanline: {reason}. Set {name}={wanted!r}, or "
            "sync_every=0",
        )
    require(
        not getattr(args, "sync_ref_model", False) or kind in (None, "copy"),
        f"sync_ref_model=True renews a second model, and reference={kind!r} has none: leave "
        "reference out",
    )
    require(
        not getattr(args, "precompute_ref_log_probs", False) or kind is None,
        f"precompute_ref_log_probs=True needs no reference once it is trained, but reference="
        f"{kind!r}: leave one of them out",
    )


# Data


def datasets_of(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and datasets among a trainer's arguments; other types are TRL's to refuse.

    Whatever is not of the ``datasets`` library has no ``column_names``.
    """
    for name in ("train_dataset", "eval_dataset"):
        given = arguments.get(name)
        parts = given.items() if isinstance(given, dict) else [(None, given)]
        for part, dataset in parts:
            if hasattr(dataset, "column_names"):
                yield name if part is None else f"{name}[{part!r}]", dataset


def check_columns(arguments: Mapping[str, Any], *layouts: tuple[str, ...]) -> None:
    """Raise ValueError unless each dataset has the columns of one of the layouts.

    Args:
        arguments: the trainer's, by name.
        layouts: columns, the usual ones first; messages speak of those.
    """
    for name, dataset in datasets_of(arguments):
        row = first_row(dataset)
        require(len(row) > 0, f"{name} is empty")
        missing = [column for column in layouts[0] if column not in row]
        require(
            any(set(layout) <= row.keys() for layout in layouts),
            f"{name} lacks {', '.join(missing)}: it needs "
            f"{' or '.join(', '.join(layout) for layout in layouts)}. Its first row is "
            f"{_brief(row)}",
        )


def first_row(dataset: Any) -> Mapping[str, Any]:
    """The first row; empty where there is none. A stream need not know its columns otherwise."""
    return next(iter(dataset), {}) if hasattr(dataset, "column_names") else {}


def _brief(row: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key!r}: {reprlib.repr(value)}" for key, value in row.items()) + "}"


def check_chat_template(processing_class: Any, row: Mapping[str, Any], name: str) -> None:
    """Raise ValueError if the data are chats and the tokenizer has no template for them."""
    require(
        not is_conversational(row) or getattr(processing_class, "chat_template", None) is not None,
        lambda: (
            f"{name} holds chat messages, and {type(processing_class).__name__} has no chat "
            "template: set processing_class.chat_template, or pass prompts and completions as "
            f"strings. Its first row is {_brief(row)}"
        ),
    )


# Model and trainer


def check_instance(trainer: Any, mixin: type | None, mixins: Mapping[type, type]) -> None:
    """Raise unless the trainer is one that can be turned into a humanline one."""
    require(
        mixin is not None,
        lambda: (
            f"apply_humanline knows {', '.join(base.__name__ for base in mixins)} and their "
            f"subclasses, got {type(trainer).__name__}"
        ),
        error=TypeError,
    )
    require(
        getattr(trainer, "perception", None) is None,
        lambda: f"{type(trainer).__name__} has humanline already",
    )


def check_model(trainer: Any, kind: str, ref_given: bool) -> None:
    """Raise ValueError unless model and reference can be what humanline needs.

    Args:
        trainer: TRL's, built.
        kind: of the reference.
        ref_given: whether the trainer's ``ref_model`` is the caller's, not one that TRL loaded.
    """
    require(
        kind in REFERENCES,
        lambda: f"unknown reference {kind!r}; known: {', '.join(REFERENCES)}",
    )
    _check_sharding(trainer, kind)
    require(
        kind == "copy" or not ref_given,
        lambda: (
            f'reference="{kind}" begins with the policy as it is, whatever sync_every: only '
            'reference="copy" can begin with another model. Leave ref_model out, or set '
            'reference="copy"'
        ),
    )
    if kind == "lookahead":
        _check_lookahead(trainer)
    _check_head(causal_model(trainer.model), trainer.args)


def shards(trainer: Any) -> bool:
    """Whether a trainer's model will be sharded: by FSDP or DeepSpeed ZeRO-3, when it trains."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    return trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)


def _check_sharding(trainer: Any, kind: str) -> None:
    state = trainer.accelerator.state
    require(
        not trainer.is_fsdp_enabled or state.fsdp_plugin.fsdp_version == 2,
        "FSDP's first version keeps a model's weights in flat buffers, which a reference cannot be "
        "copied from by name: use FSDP2 (fsdp_version: 2 in accelerate's configuration)",
    )
    engine = "DeepSpeed" if state.deepspeed_plugin is not None else "FSDP"
    require(
        not (trainer.is_fsdp_enabled or state.deepspeed_plugin is not None)
        or not getattr(trainer.args, "precompute_ref_log_probs", False),
        f"precompute_ref_log_probs=True under {engine} would score with a model that is not placed "
        "yet: set precompute_ref_log_probs=False",
    )
    require(
        kind != "copy" or not shards(trainer) or trainer.ref_model is not None,
        'reference="copy" needs a second model, TRL has loaded none here, and the policy will be '
        "sharded, which cannot be copied: leave reference out, or set it to "
        '"adapter", which holds as much',
    )
    parallel = trainer.accelerator.parallelism_config
    for axis in ("cp", "sp", "tp"):
        size = 1 if parallel is None else getattr(parallel, f"{axis}_size", 1)
        require(size == 1, f"parallelism_config has {axis}_size={size}: {_UNSUPPORTED[axis]}")


#: Why an axis of accelerate's parallelism is refused.
_UNSUPPORTED = {
    "cp": (
        "context parallelism splits each sequence over ranks where a batch has input_ids and "
        "labels, and TRL's DPO, KTO and GRPO trainers make theirs later, inside the loss; use "
        "FSDP2 or ZeRO-3 without it (cp_size=1)"
    ),
    "sp": (
        "sequence parallelism splits each sequence over ranks in the data loader, and TRL's DPO, "
        "KTO and GRPO trainers need whole ones; use FSDP2 or ZeRO-3 without it (sp_size=1)"
    ),
    "tp": (
        "tensor parallelism splits the output head's vocabulary over ranks, and TRL's fused head "
        "reads a whole weight; use FSDP2 or ZeRO-3 without it (tp_size=1)"
    ),
}


def _check_lookahead(trainer: Any) -> None:
    require(
        isinstance(trainer, DPOTrainer | KTOTrainer),
        lambda: (
            f'reference="lookahead" needs batches that exist before their step, and '
            f'{type(trainer).__name__} makes its own: use "copy" or "adapter"'
        ),
    )
    require(
        trainer.args.eval_strategy == "no",
        lambda: (
            f'reference="lookahead" holds no weights to score an evaluation with, and '
            f'eval_strategy is {str(trainer.args.eval_strategy)!r}: use "copy" or "adapter"'
        ),
    )
    require(
        not trainer._is_vision_dataset,
        'reference="lookahead" works on text: use "copy" or "adapter"',
    )


def _check_head(model: nn.Module, args: Any) -> None:
    head = model.get_output_embeddings()
    require(
        head is None or not any(hasattr(part, "token_adapter") for part in head.modules()),
        "PEFT trains single rows of the output head (trainable_token_indices names it, or the "
        "input embeddings it is tied to), and humanline's fused head reads a whole weight: leave "
        "trainable_token_indices to untied input embeddings, or train the whole head with "
        'modules_to_save=["lm_head"], or all of tied embeddings with '
        'modules_to_save=["embed_tokens", "lm_head"] and ensure_weight_tying=True',
    )
    adapted = is_adapted(head)
    if adapted:
        require_plain_lora(head)
        require(
            not getattr(args, "cast_lm_head_to_fp32", False),
            "cast_lm_head_to_fp32=True cannot be had with an adapter on the output head",
        )
    weight = getattr(head, "weight", None)
    shape = getattr(weight, "ds_shape", getattr(weight, "shape", ()))  # ZeRO-3's, partitioned
    require(
        weight is not None
        and len(shape) == 2
        and weight.is_floating_point()
        and model.base_model is not model,
        lambda: (
            f"{type(model).__name__} has no separable output head: looked for a floating-point "
            "weight [vocab, hidden] at get_output_embeddings().weight (found "
            f"{None if weight is None else f'{weight.dtype} {list(shape)}'}) and for the "
            f"body that gives its hidden states at base_model (base_model_prefix="
            f"{model.base_model_prefix!r}, found "
            f"{'the model itself' if model.base_model is model else 'it'})"
        ),
    )


@contextmanager
def adapter_on_head_allowed(trainer: type) -> Iterator[None]:
    """Within this context TRL builds trainers of models with an adapter on the output head.

    It refuses them because its fused head reads the base's weight; ours does not.
    """
    theirs = next(base for base in trainer.__mro__ if base.__module__.startswith("trl."))
    module = sys.modules[theirs.__module__]
    original = module.BaseTunerLayer
    module.BaseTunerLayer = type("Nothing", (), {})
    try:
        yield
    finally:
        module.BaseTunerLayer = original
