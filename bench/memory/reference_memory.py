"""Peak memory and step time of training with each kind of reference, on a CPU.

    python -m bench.memory.reference_memory [--sync-every K] [--json FILE]

Every run is a process of its own: a causal transformer trained with AdamW on GRPO with humanline
clipping, all its weights or a LoRA adapter (PEFT). Memory is the process's high-water mark; the
table shows what it is above that of a run without any reference, medians of ``--repeats`` runs with
the least and the most, and what ``memory_bytes()`` says. The kinds must arrive at the same losses.
Linux and macOS.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

import humanline as hl
from bench.environment import write_record
from bench.run import ROOT
from humanline.reference import REFERENCES
from humanline.training.report import peak_memory_bytes

OBJECTIVE = hl.GRPO(perception=hl.Clip(-0.05, 0.05))
COMMAND = "python -m bench.memory.reference_memory"
KINDS = ("none", *REFERENCES)
TRAINED = ("all weights", "LoRA")


class Model(nn.Module):
    """Token ids ``[B, T]`` to hidden states ``[B, T, width]``."""

    def __init__(self, width: int, layers: int, vocab: int):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        self.embedding = nn.Embedding(vocab, width)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids):
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.body(self.embedding(ids), mask=causal, is_causal=True)


def make_policy(trained: str, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    model = Model(args.width, args.layers, args.vocab)
    if trained == "LoRA":
        import peft

        config = peft.LoraConfig(r=16, target_modules=["linear1", "linear2"])
        model = peft.get_peft_model(model, config)
    return model.train()


def optimizer_steps(args: argparse.Namespace):
    """One micro-batch a step: rows of token ids ``[B, T + 1]``."""
    generator = torch.Generator().manual_seed(1)
    shape = (args.batch, args.length + 1)
    for _ in range(args.steps):
        yield [torch.randint(0, args.vocab, shape, generator=generator)]


def score(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return hl.linear_token_logps(model(ids[:, :-1]), model.head.weight, ids[:, 1:])


def without_reference(steps):
    for batches in steps:
        yield batches, [None] * len(batches)


# The encoder's fused inference path would take memory and time that training's layers do not.
torch.backends.mha.set_fastpath_enabled(False)


def measure(trained: str, kind: str, args: argparse.Namespace) -> dict:
    """Train here; the process should do nothing else."""
    policy = make_policy(trained, args)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-4)
    reference = None if kind == "none" else REFERENCES[kind](policy, score, args.sync_every)
    steps = optimizer_steps(args)
    steps = without_reference(steps) if reference is None else reference.steps(steps)
    advantages = torch.linspace(-1, 1, args.batch)
    losses, seconds, held, begun = [], [], 0, time.perf_counter()
    for batches, scores in steps:
        for ids, ref_logps in zip(batches, scores, strict=True):
            hidden = policy(ids[:, :-1])
            loss, _ = OBJECTIVE.from_hidden(
                hidden, policy.head.weight, ids[:, 1:], ref_logps, advantages=advantages
            )
            loss.backward()
        if reference is not None:
            reference.before_step()
            held = max(held, reference.memory_bytes())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begun)
        begun = time.perf_counter()
    return {
        "trained": trained,
        "kind": kind,
        "losses": losses,
        "seconds_per_step": statistics.mean(seconds[1:]),  # the first one allocates
        "peak_bytes": peak_memory_bytes(torch.device("cpu")),
        "held_bytes": held,
    }


def in_child(trained: str, kind: str, args: argparse.Namespace) -> dict:
    sizes = ("steps", "sync_every", "width", "layers", "vocab", "batch", "length")
    command = [
        sys.executable,
        "-m",
        "bench.memory.reference_memory",
        "--child",
        f"{trained}/{kind}",
    ]
    for name in sizes:
        command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def table(results: list[dict]) -> list[list[str]]:
    """A line for each kind: step time, peak, peak above that of no reference, held."""
    lines = []
    for trained in dict.fromkeys(r["trained"] for r in results):
        runs = {k: [r for r in results if (r["trained"], r["kind"]) == (trained, k)] for k in KINDS}
        losses = [r["losses"] for kind in REFERENCES for r in runs[kind]]
        assert all(other == losses[0] for other in losses), "the kinds' losses differ"
        without = statistics.median(r["peak_bytes"] for r in runs["none"])
        for kind, of_kind in runs.items():
            seconds = _spread([r["seconds_per_step"] for r in of_kind], ".3f")
            peak = _spread([r["peak_bytes"] / 1e6 for r in of_kind], ".0f")
            above = _spread([(r["peak_bytes"] - without) / 1e6 for r in of_kind], ".0f")
            held = f"{of_kind[0]['held_bytes'] / 1e6:.2f}"
            lines.append([trained, kind, seconds, peak, above, held])
    return lines


def _spread(values: list[float], digits: str) -> str:
    """The median, with the least and the most."""
    low, middle, high = (f(values) for f in (min, statistics.median, max))
    return f"{middle:{digits}} ({low:{digits}} to {high:{digits}})"


HEAD = ["trained", "reference", "s a step", "peak, MB", "above none, MB", "held, MB"]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--sync-every", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=4, help="sequences in a micro-batch")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    parser.add_argument("--json", type=Path, help="also write the raw results here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, got {args.steps}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.child:
        print(json.dumps(measure(*args.child.split("/"), args)))
        return
    results = []
    for turn in range(args.repeats):  # kind after kind, so that none has the machine's best hour
        for trained in TRAINED:
            for kind in KINDS:
                print(f"{turn + 1}/{args.repeats}: {trained}, {kind}", file=sys.stderr)
                results.append(in_child(trained, kind, args))
    for line in [HEAD, *table(results)]:
        print("".join(f"{cell:24s}" for cell in line))
    if args.json:
        sizes = {k: v for k, v in vars(args).items() if k not in ("json", "child", "repeats")}
        write_record(args.json, sizes, results)


if __name__ == "__main__":
    main()
