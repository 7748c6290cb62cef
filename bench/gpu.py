"""What `gpu.sh` checks and counts on a GPU beside the benchmark, one command a step.

    python -m bench.gpu correctness|ops|graphs|kernels|configurations [--reduced] [--output DIR]

`--reduced` is the same on small shapes. Without a GPU the kernels run in Triton's interpreter, and
steps that need one say so.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import humanline as hl
from bench.accuracy import errors
from bench.cases import GPT2, LLAMA, QWEN, Case, inputs
from bench.peers import OURS, peers_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = None if DEVICE == "cuda" else "triton"  # the interpreter has to be asked for


def correctness(args: argparse.Namespace) -> bool:
    """humanline's error against float64 beside eager's, at real sizes and odd vocabularies.

    Passes where ours is at most 1.5 × eager's, or half a unit in the last place.
    """
    vocabs = [1001] if args.reduced else [32_000, GPT2, LLAMA, QWEN, 151_643]
    tokens, hidden = (16, 32) if args.reduced else (512, 4096)
    good = True
    for objective, entry, vocab, dtype, active, frozen in product(
        ("grpo", "dpo", "kto", "sft"),
        ("logits", "hidden"),
        vocabs,
        ("float32", "bfloat16", "float16"),
        (1.0, 0.5),
        (False, True),
    ):
        try:
            case = Case(objective, entry, tokens, hidden, vocab, dtype, active, frozen)
        except ValueError:
            continue
        found = {p.name: errors(p, case, DEVICE).gradient for p in _ours_and_eager(case)}
        bound = max(1.5 * found["eager"], torch.finfo(case.torch_dtype).eps / 2)
        record = {"check": "correctness", "case": case.name, "errors": found}
        good &= _say(args, record | {"passed": found[OURS] <= bound})
    return good & _far_offsets(args)


def _ours_and_eager(case: Case) -> list:
    return [p for p in peers_of(case) if p.name in (OURS, "eager")]


def _far_offsets(args: argparse.Namespace) -> bool:
    """More than 2³¹ logits: the last rows against the same rows alone."""
    if args.reduced:
        return _say(args, {"check": "N·V > 2³¹", "skipped": "needs a GPU"})
    rows = 2**31 // QWEN + 100
    logits = torch.empty(rows, QWEN, dtype=torch.bfloat16, device=DEVICE).normal_()
    labels = torch.randint(QWEN, (rows,), device=DEVICE)
    whole, tail = hl.token_logps(logits, labels), hl.token_logps(logits[-64:], labels[-64:])
    return _say(args, {"check": "N·V > 2³¹", "passed": torch.equal(whole[-64:], tail)})


def ops(args: argparse.Namespace) -> bool:
    """torch.library.opcheck of the registered ops, with the kernels behind them."""
    logits = torch.randn(4, 1000, device=DEVICE, requires_grad=True)
    labels = torch.randint(1000, (4,), device=DEVICE)
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    backend = "triton"
    good = True
    for entropy in (False, True):
        found = torch.library.opcheck(
            torch.ops.humanline.token_logps.default,
            (logits, labels, one, entropy, backend),
            raise_exception=False,
        )
        passed = set(found.values()) == {"SUCCESS"}
        record = {"check": f"opcheck token_logps, entropy={entropy}", "found": str(found)}
        good &= _say(args, record | {"passed": passed})
    return good


def graphs(args: argparse.Namespace) -> bool:
    """Capture in a CUDA graph, replay on other inputs, compare with the plain run."""
    names = ("token_logps", "from_logits", "from_hidden")
    if DEVICE == "cpu":
        record = {"check": f"CUDA graphs of {', '.join(names)}", "skipped": "needs a GPU"}
        return _say(args, record)
    logits = Case("grpo", "logits", 256, vocab=LLAMA, dtype="bfloat16")
    hidden = replace(logits, entry="hidden", hidden=1024, active=0.5)
    return all([_graph(args, name, hidden if name == "from_hidden" else logits) for name in names])


def _graph(args: argparse.Namespace, name: str, case: Case) -> bool:
    batch, other = inputs(case, DEVICE), inputs(case, DEVICE, seed=1)

    def step(b):
        objective = b.objective.ours
        if name == "token_logps":
            value = hl.token_logps(b.logits, b.labels).sum()
        elif name == "from_logits":
            value, _ = objective.from_logits(b.logits, b.labels, b.ref_logps, **b.extra)
        else:
            rows = b.hidden, b.weight, b.labels, b.ref_logps
            value, _ = objective.from_hidden(*rows, capturable=True, **b.extra)
        return value.detach(), *torch.autograd.grad(value, b.leaves)

    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(batch)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(batch)
        with torch.no_grad():
            for field in ("logits", "hidden", "weight", "labels", "ref_logps", "advantages"):
                if getattr(batch, field) is not None:
                    getattr(batch, field).copy_(getattr(other, field))
        graph.replay()
        same = all(map(torch.equal, captured, step(other)))
        return _say(args, {"check": f"CUDA graph of {name}", "passed": same})
    except RuntimeError as error:
        record = {"check": f"CUDA graph of {name}", "error": str(error)[:300]}
        return _say(args, record | {"passed": False})


def kernels(args: argparse.Namespace) -> bool:
    """Every row kernel once: what compute-sanitizer and ncu are pointed at.

    With --reduced small, odd shapes; else those whose bytes are counted.
    """
    tokens, vocab = (16, 1001) if args.reduced else (1024, QWEN)
    for objective, active in product(("grpo", "dpo"), (1.0, 0.5)):
        batch = inputs(Case(objective, "logits", tokens, 1, vocab, "bfloat16", active), DEVICE)
        loss, _ = batch.objective.ours.from_logits(
            batch.logits, batch.labels, batch.ref_logps, backend=BACKEND, **batch.extra
        )
        (loss * 0.5).backward()  # the scale kernel too
    record = {"check": f"row kernels ran, {tokens} × {vocab} logits"}
    return _say(args, record | {"passed": bool(loss.isfinite())})


def configurations(args: argparse.Namespace) -> bool:
    """Time every number of warps: lines for ROW_WARPS in kernels/launch.py."""
    from humanline.kernels.autotune import time_warps

    index = torch.cuda.current_device() if DEVICE == "cuda" else None
    shapes = [1000] if args.reduced else [2048, 8192, 32_000, GPT2, LLAMA, QWEN, 262_144]
    for vocab, dtype in product(shapes, (torch.bfloat16, torch.float32)):
        times = time_warps(vocab, dtype, index, rows=4 if args.reduced else 4096)
        best = None if index is None else min(times, key=times.get)
        record = {"vocab": vocab, "dtype": str(dtype)[6:], "milliseconds": times, "fastest": best}
        _say(args, record, "configurations.jsonl")
    return True


def _say(args: argparse.Namespace, record: dict, file: str = "checks.jsonl") -> bool:
    """Print a finding, keep it in the results folder; whether it is no failure."""
    print(json.dumps(record, ensure_ascii=False), flush=True)
    if args.output:
        with open(args.output / file, "a", encoding="utf-8") as out:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
    return record.get("passed", True)


STEPS = {f.__name__: f for f in (correctness, ops, graphs, kernels, configurations)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--reduced", action="store_true", help="small shapes")
    parser.add_argument("--output", type=Path, help="folder of results")
    args = parser.parse_args()
    return 0 if STEPS[args.step](args) else 1


if __name__ == "__main__":
    sys.exit(main())
