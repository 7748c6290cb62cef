"""Run by test_trl_sharded.py: trains sharded models in two processes; the first saves.

torchrun --nproc-per-node 2 trl_sharded.py folder engine
"""

import os
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trl_tiny as tiny
from accelerate import ParallelismConfig
from gloo_engines import engine
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from humanline.integrations import trl
from humanline.sharding import local_shard


@dataclass(frozen=True)
class Case:
    """A run, equal to itself whatever the engine and the number of processes."""

    method: str = "DPO"
    reference: str | None = None
    lora: str | None = None
    model: str = "llama"
    #: The trainer loads the model: under ZeRO-3 it is partitioned from the beginning.
    by_path: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def train(self, folder: Path, name: str, processes: int, **options: Any) -> Any:
        """The trainer, when it has trained."""
        run = self.build(folder, name, processes, **options)
        run.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
        return run

    def build(self, folder: Path, name: str, processes: int, **options: Any) -> Any:
        trainer, config = (
            getattr(trl, f"Humanline{self.method}{kind}") for kind in ("Trainer", "Config")
        )
        options = DEFAULTS | self.options | {"reference": self.reference} | options
        accumulation = options.get("gradient_accumulation_steps", 1)
        size = {"DPO": 4, "KTO": 4, "GRPO": 8}[self.method]
        options["per_device_train_batch_size"] = size // processes // accumulation
        data = {"DPO": tiny.pairs, "KTO": tiny.labelled, "GRPO": tiny.groups}[self.method](16)
        if self.method == "GRPO":
            options = {"num_generations": 4, "beta": 0.04} | options
        if self.lora:
            torch.manual_seed(0)
            lora = LoraConfig(
                r=4, task_type="CAUSAL_LM", init_lora_weights=False, **tiny.LORA[self.lora]
            )
            arguments = {"peft_config": lora}
        else:
            arguments = {}
        policy = str(folder / self.model)
        if not self.by_path:
            policy = LlamaForCausalLM.from_pretrained(policy)
        return tiny.build(trainer, config, folder / name, data, policy, options, **arguments)


DEFAULTS = {
    "log_eps_P": -0.05,
    "log_eps_R": 0.05,
    "learning_rate": 0.3,
    "max_steps": 3,
    "max_grad_norm": 1.0,
}
TWICE = {"gradient_accumulation_steps": 2}
CASES = {
    "dpo": Case(),
    "dpo adapter": Case(reference="adapter"),
    "dpo tied": Case(model="tied"),
    "dpo tied adapter": Case(model="tied", reference="adapter"),
    "dpo accumulation": Case(options=TWICE | {"sync_every": 2}),
    "dpo lookahead": Case(reference="lookahead", options={"sync_every": 2}),
    "dpo lora": Case(lora="attention"),
    "dpo lora head": Case(lora="lm_head", options=TWICE),
    "dpo lora saved": Case(lora="saved"),
    "trl's lora saved": Case(lora="saved", options={"humanline": False}),
    "dpo loaded by the trainer": Case(by_path=True),
    "dpo loaded by the trainer, adapter": Case(by_path=True, reference="adapter"),
    "kto": Case("KTO"),
    "kto lora head": Case("KTO", lora="lm_head"),
    "grpo": Case("GRPO"),
    "grpo adapter": Case("GRPO", "adapter", options={"beta": 0.0}),
    "grpo lora saved": Case("GRPO", lora="saved"),
}
METHODS = ("dpo", "kto", "grpo")
#: What each engine trains; "ddp" and "zero2" for KTO, whose pairs
#: depend on the number of processes.
OF_ENGINE = {
    "ddp": ["dpo lookahead", "kto", "kto lora head"],
    "zero2": ["dpo lora head", "kto"],
    "fsdp2": [name for name in CASES if not CASES[name].by_path],
    "fsdp2 loading once": ["dpo loaded by the trainer"],
    "zero3": [
        "dpo",
        "dpo tied adapter",
        "dpo lookahead",
        "dpo lora head",
        "dpo loaded by the trainer, adapter",
        "kto",
        "grpo lora saved",
    ],
    # Most of the weights are small enough for ZeRO-3 to keep them whole.
    "zero3 persistent": ["dpo", "dpo tied adapter", "dpo lora head"],
}
#: What each engine trains again from a checkpoint.
RESUMED = {
    "ddp": ["dpo lookahead"],
    "fsdp2": ["dpo", "dpo adapter", "dpo lora head"],
    "zero3": ["dpo", "dpo lora head"],
}
#: Those that processes started once run one after the other, by DeepSpeed or without it.
WORLDS = {
    "plain": ["ddp", "fsdp2", "fsdp2 loading once"],
    "deepspeed": ["zero2", "zero3", "zero3 persistent"],
}
SETTINGS = {
    "zero3 persistent": {"stage3_param_persistence_threshold": 1000},
    "fsdp2 loading once": {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
}
#: Axes of accelerate's parallelism that split what TRL's losses need whole, each with the world and
#: the engine that it runs in.
SPLIT = {"cp": ("plain", "fsdp2"), "tp": ("plain", "gpus"), "sp": ("deepspeed", "zero2")}
MODELS = ("llama", "tied")


def result(run: Any) -> dict[str, Any]:
    """What a run logged, its weights and its reference's."""
    names = ("loss", "grad_norm", "humanline/unclamped")
    return {
        "log": [[float(row.get(n, 1)) for n in names] for row in run.state.log_history[:-1]],
        "weights": {n: whole(p) for n, p in run.model.named_parameters()},
        "processes": run.accelerator.num_processes,
    }


def whole(p: torch.Tensor) -> torch.Tensor:
    if isinstance(p, DTensor):
        return p.full_tensor().detach().clone()
    if hasattr(p, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([p]):
            return p.detach().clone()
    return p.detach().clone()


def place(folder: Path, engine: str, name: str) -> Path:
    return folder / f"{engine} {name}.pt"


def read(folder: Path, engine: str, name: str) -> dict[str, Any]:
    """What :func:`main` found. A case that failed raises what it raised."""
    found = torch.load(place(folder, engine, name), weights_only=True)
    assert "error" not in found, found["error"]
    return found


def resumed(folder: Path, name: str, case: str) -> dict[str, Any]:
    """What this rank holds after a whole run, and after one that goes on from its middle."""
    found = {}
    output = folder / f"{name} {case} resumed"
    saving = {"output_dir": str(output), "save_strategy": "steps", "save_steps": 2}
    saving |= {"optim": "adamw_torch", "learning_rate": 0.01}  # torch asks for some state
    for kind, checkpoint in (("whole", None), ("resumed", f"{output}/checkpoint-2")):
        with engine(name, **SETTINGS.get(name, {})) as options:
            options = options | saving | {"resume_from_checkpoint": checkpoint}
            run = CASES[case].train(folder, f"{name} {case}", 2, **options)
            state = tree_leaves(run.reference.state_dict())
            found[kind] = {
                "last": result(run)["log"][-1],
                "weights": [local_shard(p).detach().clone() for p in run.model.parameters()],
                "reference": [x.clone() if isinstance(x, torch.Tensor) else x for x in state],
            }
    return found


def refused(folder: Path, axis: str, case: str) -> dict[str, str]:
    """What our trainer raises when it is built with this axis, and TRL's alone by the time it
    trains; empty where it raises nothing."""
    found = {}
    for whose in ("ours", "TRL's"):
        try:
            with engine(SPLIT[axis][1]) as options:
                options["parallelism_config"] = ParallelismConfig(**{f"{axis}_size": 2})
                options["humanline"] = whose == "ours"
                run = CASES[case].build(folder, f"{axis} {case}", 2, **options)
                if whose == "TRL's":
                    run.train()
            found[whose] = ""
        except Exception as error:
            found[whose] = f"{type(error).__name__}: {error}"
    return found


def main(folder: Path, world: str, only: list[str]) -> None:
    for name in WORLDS[world]:
        for case in only or OF_ENGINE[name]:
            try:
                with engine(name.split()[0], **SETTINGS.get(name, {})) as options:
                    found = result(CASES[case].train(folder, f"{name} {case}", 2, **options))
            except Exception:
                found = {"error": traceback.format_exc()}
            if os.environ["RANK"] == "0":
                torch.save(found, place(folder, name, case))
        for case in RESUMED.get(name, ()):
            try:
                found = resumed(folder, name, case)
            except Exception:
                found = {"error": traceback.format_exc()}
            rank = os.environ["RANK"]
            torch.save(found, place(folder, name, f"{case} resumed {rank}"))
    for axis in (axis for axis in SPLIT if SPLIT[axis][0] == world):
        for case in METHODS:
            found = refused(folder, axis, case)
            if os.environ["RANK"] == "0":
                torch.save(found, place(folder, axis, case))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    # Not through the interpreter's end, which aborts where a thread of gloo still wants the GIL.
    os._exit(0)
