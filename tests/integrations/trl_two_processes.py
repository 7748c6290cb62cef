"""Run by test_trl_distributed.py: trains in as many processes as there are; the first saves. Of
KTO each rank saves, as its numbers are the rank's own."""

import os
import sys
from pathlib import Path

import torch
import trl_tiny as tiny
from transformers import LlamaForCausalLM

from humanline.integrations import trl

CLIP = {"log_eps_P": -0.05, "log_eps_R": 0.05}


#: Sequences or pairs of a step, over all processes. With two, a group of GRPO's spans both.
BATCH_SIZE = {"DPO": 4, "GRPO": 12, "DPO precomputed": 4}
#: Of which two processes score six at a time, and the last time fewer.
PRECOMPUTED = {"sync_every": 0, "precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}


def train(folder: Path, method: str, processes: int = 1) -> dict:
    """Weights, reference and what was logged of a run."""
    loss, *precomputed = method.split()
    trainer, config = (getattr(trl, f"Humanline{loss}{kind}") for kind in ("Trainer", "Config"))
    options = CLIP | {"per_device_train_batch_size": BATCH_SIZE[method] // processes}
    options |= PRECOMPUTED if precomputed else {}
    if processes > 1:
        options["ddp_backend"] = "gloo"
    if method == "GRPO":
        options |= {"num_generations": 4, "beta": 0.04}
    data = tiny.groups(8) if method == "GRPO" else tiny.pairs(16)
    policy = LlamaForCausalLM.from_pretrained(folder / "model")
    run = tiny.build(trainer, config, folder, data, policy, options)
    run.train()
    return {
        "weights": tiny.weights(run),
        "reference": dict(run.reference.model.named_parameters()),
        "unclamped": [row.get("humanline/unclamped") for row in run.state.log_history],
        "processes": run.accelerator.num_processes,
    }


#: A rank's batch of KTO: every other one is of desirable examples alone, as the first rank's are.
KTO_LABELS = [True, True, False, True, True, True, False, False]


def kto(folder: Path) -> dict:
    """A batch with its loss and metrics, before training; what was logged and the weights, after.

    Once disturbed, the policy is no longer its reference, on all ranks alike.
    """
    data = tiny.labelled(len(KTO_LABELS)).remove_columns("label").add_column("label", KTO_LABELS)
    options = CLIP | {"per_device_train_batch_size": 2, "max_steps": 2, "ddp_backend": "gloo"}
    options["train_sampling_strategy"] = "sequential"
    policy = LlamaForCausalLM.from_pretrained(folder / "model")
    run = tiny.build(trl.HumanlineKTOTrainer, trl.HumanlineKTOConfig, folder, data, policy, options)
    tiny.disturb(run.model)
    disturbed, batch = tiny.weights(run), tiny.batch_of(run)
    loss, gradients, metrics = tiny.loss_and_gradients(run, batch)
    (point,) = metrics["kl"]
    batches = tiny.recorded(run)
    run.train()
    return {
        "disturbed": disturbed,
        "batch": dict(batch),
        "loss": loss,
        "gradients": gradients,
        "point": point,
        "labels": [batch["label"] for batch in batches],
        "logged": [row["loss"] for row in run.state.log_history[:-1]],
        "weights": tiny.weights(run),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.save(kto(folder), folder / f"KTO-{os.environ['RANK']}.pt")
    for method in BATCH_SIZE:
        result = train(folder, method, int(os.environ["WORLD_SIZE"]))
        if os.environ["RANK"] == "0":
            torch.save(result, folder / f"{method}.pt")
    torch.distributed.barrier()
    # Not through the interpreter's end, which aborts where a thread of gloo still wants the GIL.
    os._exit(0)
