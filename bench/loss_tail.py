"""Time and peak memory of the loss tail on a CPU: log-probs, GRPO loss and backward.

    python bench/loss_tail.py [--json FILE]

Every variant runs in a process of its own, forward and backward, several times after a warm-up;
times are medians, memory is the high-water mark above the inputs, gradients included. Each
variant's loss and gradient are first compared with the eager one's. Linux only (/proc).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import humanline as hl

OBJECTIVE = hl.GRPO(perception=hl.Clip(-1.5, 1.5))


def inputs(n: int, hidden: int, vocab: int, dtype: torch.dtype) -> dict:
    """One batch of 8 sequences whose log-ratios lie within the clip bounds: all rows are active."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(8, n // 8, hidden, generator=generator).to(dtype)
    weight = (torch.randn(vocab, hidden, generator=generator) * hidden**-0.5).to(dtype)
    labels = torch.randint(0, vocab, (8, n // 8), generator=generator)
    with torch.no_grad():
        ref = hl.linear_token_logps(h, weight, labels)
    ref += 0.05 * torch.randn(ref.shape, generator=generator)
    advantages = torch.randn(8, generator=generator)
    return {"h": h, "weight": weight, "labels": labels, "ref": ref, "advantages": advantages}


def eager_loss(logps, ref, advantages):
    """GRPO with humanline clipping as a trainer would write it."""
    ratio = (logps - ref).clamp(-1.5, 1.5).exp()
    a = advantages[:, None]
    return -torch.min(a * ratio, a * ratio.clamp(0.8, 1.2)).mean(1).mean()


def eager_logps(logits, labels):
    return logits.float().log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)


def eager_hidden(h, weight, labels, ref, advantages):
    return eager_loss(eager_logps(h @ weight.T, labels), ref, advantages)


def humanline_hidden(h, weight, labels, ref, advantages):
    return OBJECTIVE.from_hidden(h, weight, labels, ref, advantages=advantages)[0]


def trl_hidden(h, weight, labels, ref, advantages):
    from trl.trainer.utils import selective_log_softmax

    return eager_loss(selective_log_softmax(h @ weight.T, labels), ref, advantages)


class _ThreeGemms(torch.autograd.Function):
    """The floor: the GEMMs of forward and backward, and nothing else."""

    @staticmethod
    def forward(ctx, h, weight):
        logits = h.reshape(-1, h.shape[-1]) @ weight.T
        ctx.save_for_backward(logits, h, weight)
        return logits[0, 0].float()

    @staticmethod
    def backward(ctx, grad):
        logits, h, weight = ctx.saved_tensors
        return (logits @ weight).view(h.shape), logits.T @ h.reshape(-1, h.shape[-1])


def bare_gemms(h, weight, labels, ref, advantages):
    return _ThreeGemms.apply(h, weight)


def eager_logits(logits, labels, ref, advantages):
    return eager_loss(eager_logps(logits, labels), ref, advantages)


def humanline_logits(logits, labels, ref, advantages):
    return OBJECTIVE.from_logits(logits, labels, ref, advantages=advantages)[0]


def trl_logits(logits, labels, ref, advantages):
    from trl.trainer.utils import selective_log_softmax

    return eager_loss(selective_log_softmax(logits, labels), ref, advantages)


CASES = {
    "from hidden": {
        "bare GEMMs": bare_gemms,
        "eager": eager_hidden,
        "TRL selective_log_softmax": trl_hidden,
        "humanline": humanline_hidden,
    },
    "from logits": {
        "eager": eager_logits,
        "TRL selective_log_softmax": trl_logits,
        "humanline": humanline_logits,
    },
}


def measure(case: str, variant: str, args: argparse.Namespace) -> dict:
    """Run one variant here; the process's high-water mark is reset after its inputs are built."""
    batch = inputs(args.n, args.hidden, args.vocab, getattr(torch, args.dtype))
    leaves = ["h", "weight"]
    if case == "from logits":
        batch["logits"] = batch.pop("h") @ batch.pop("weight").T
        leaves = ["logits"]
    for name in leaves:
        batch[name].requires_grad_()

    def run() -> float:
        for name in leaves:
            batch[name].grad = None
        start = time.perf_counter()
        loss = CASES[case][variant](**batch)
        loss.backward()
        run.loss = loss.item()
        return time.perf_counter() - start

    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    peak = _status("VmHWM") - before
    seconds = [run() for _ in range(args.repeats)]
    norm = sum(batch[name].grad.double().norm().item() ** 2 for name in leaves) ** 0.5
    return {
        "case": case,
        "variant": variant,
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "peak_bytes": peak,
        "loss": run.loss,
        "grad_norm": norm,
    }


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def in_child(case: str, variant: str, args: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--n", args.n, "--hidden", args.hidden, "--vocab"]
    command += [args.vocab, "--dtype", args.dtype, "--repeats", args.repeats, "--child"]
    command += [f"{case}/{variant}"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        return {"case": case, "variant": variant, "error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def check(result: dict, eager: dict) -> None:
    """The variants that claim to compute the eager loss do."""
    if result["variant"] == "bare GEMMs":
        return
    for key in ("loss", "grad_norm"):
        error = abs(result[key] - eager[key]) / max(abs(eager[key]), 1e-6)
        assert error < 0.05, f"{result['variant']}: {key} {result[key]}, eager {eager[key]}"


def report(results: list[dict]) -> None:
    for case in CASES:
        rows = {r["variant"]: r for r in results if r["case"] == case}
        eager = rows["eager"]
        print(f"\n{case:28s} {'seconds':>8s} {'/ eager':>8s} {'peak MB':>8s} {'/ eager':>8s}")
        for name, r in rows.items():
            if "error" in r:
                print(f"  {name:26s} {r['error']}")
                continue
            check(r, eager)
            print(
                f"  {name:26s} {r['seconds']:8.3f} {r['seconds'] / eager['seconds']:8.2f} "
                f"{r['peak_bytes'] / 1e6:8.0f} {r['peak_bytes'] / eager['peak_bytes']:8.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=2048, help="tokens, a multiple of 8")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the raw results here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*args.child.split("/"), args)))
        return
    results = []
    for case, variants in CASES.items():
        for variant in variants:
            print(f"running: {case}, {variant}", file=sys.stderr)
            results.append(in_child(case, variant, args))
    environment = {
        "shape": {k: getattr(args, k) for k in ("n", "hidden", "vocab", "dtype")},
        "torch": torch.__version__,
        "humanline": hl.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
    }
    report(results)
    print(f"\n{environment}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"environment": environment, "results": results}, indent=1))


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
