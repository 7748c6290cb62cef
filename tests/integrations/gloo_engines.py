"""Accelerate's engines on CPUs: it shards with FSDP2 and DeepSpeed on devices alone, and gloo can.

What is replaced is which devices accelerate believes to have. The engines are the real ones.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from accelerate import state
from accelerate.utils import DistributedType
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
}


def deepspeed_config(stage: int, **zero: Any) -> dict[str, Any]:
    """DeepSpeed's, in float32. Of ZeRO-3 nothing persists, as in models of a usual size most."""
    zero3 = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {
        "zero_optimization": {"stage": stage, **zero3, **zero},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def _set_device(self) -> None:
    self.device = torch.device("cpu")


@contextmanager
def engine(name: str, **zero: Any) -> Iterator[dict[str, Any]]:
    """Within this context accelerate trains by "ddp", "fsdp2", "zero2" or "zero3".

    Yields the options that a trainer's config needs for it. The process group outlives the context.
    """
    options, environment = {}, {}
    if name == "fsdp2":
        environment = FSDP | zero
    elif name.startswith("zero"):
        environment = {"DS_ACCELERATOR": "cpu"}
        options = {"deepspeed": deepspeed_config(int(name[-1]), **zero)}
        os.environ |= environment
        import deepspeed.comm.torch

        # A collective that is compiled for shared memory; gloo serves.
        deepspeed.comm.torch.build_shm_op = lambda: None
    if name == "ddp":
        _forget()
        yield {"ddp_backend": "gloo"}
        _forget()
        return
    gpus = mock.Mock(return_value=("gloo", DistributedType.MULTI_GPU))
    _forget()
    try:
        with (
            mock.patch.dict(os.environ, environment),
            mock.patch.object(state.PartialState, "_prepare_backend", gpus),
            mock.patch.object(state.PartialState, "set_device", _set_device),
        ):
            yield options | {"use_cpu": False}
    finally:
        _forget()


def _forget() -> None:
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
    unset_hf_deepspeed_config()
    gc.collect()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
