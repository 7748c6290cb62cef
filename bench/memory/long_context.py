"""The longest sequences that a DPO step takes under a memory cap: stock TRL's loss path and ours.

    python -m bench.memory.long_context [--cap-gib 2] [--json FILE]

The step is forward, reference and backward of one preference pair of T tokens each, the first half
of them a prompt that the two share, on a random Llama with gradient checkpointing: the same model
for all. The cap is an address-space limit (RLIMIT_AS) on what a process takes beside its imports:
weights, reference, gradients, activations, loss. Every length is tried in a process of its own; the
largest is found by doubling, then halving the gap, to ``--resolution`` tokens. Linux only.

What it does not tell is a GPU's memory: there TRL folds its tiles in Triton, in place, where on a
CPU torch makes temporaries of a tile's size.
"""

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import humanline as hl
from bench.environment import write_record
from bench.measure import status
from bench.run import ROOT

COMMAND = "python -m bench.memory.long_context"
HEAD = ["", "tokens of a sequence", "× stock"]
BETA = 0.1
DOES_NOT_FIT = 7  # a child's exit code


def make_model(args):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        max_position_embeddings=2**20,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def make_pair(args):
    """Token ids ``[2, T]``, chosen and rejected, with the prompt's labels -100."""
    ids = torch.randint(3, args.vocab, (2, args.length), generator=torch.Generator().manual_seed(1))
    ids[1, : args.length // 2] = ids[0, : args.length // 2]
    return ids, ids.masked_fill(torch.arange(args.length) < args.length // 2, -100)


def dpo_loss(logps, ref_logps):
    """From ``[2, T − 1]`` log-probs, 0 where masked."""
    chosen, rejected = (logps - ref_logps).sum(1)
    return -F.logsigmoid(BETA * (chosen - rejected))


# Each variant: (model, arguments) -> the loss, after its backward


def trl(model, args):
    """As TRL 1.16's DPOTrainer._compute_loss: a second model, the fused head on both."""
    from trl.trainer.utils import add_fused_lm_head

    reference = copy.deepcopy(model).eval().requires_grad_(False)
    reference.gradient_checkpointing_disable()
    ids, labels = make_pair(args)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    for each in (model, reference):
        add_fused_lm_head(each)
    logps = model(**inputs, labels=labels, fused_lm_head=True).log_probs
    with torch.no_grad():
        ref_logps = reference(**inputs, labels=labels, fused_lm_head=True).log_probs
    return _backward(dpo_loss(logps, ref_logps))


def all_logits(model, args):
    """As a loop without any fused head: all logits, TRL's selective_log_softmax."""
    from trl.trainer.utils import selective_log_softmax

    reference = copy.deepcopy(model).eval().requires_grad_(False)
    reference.gradient_checkpointing_disable()
    ids, labels = make_pair(args)
    mask = labels[:, 1:] != -100

    def logps_of(model):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return selective_log_softmax(logits, ids[:, 1:]) * mask

    with torch.no_grad():
        ref_logps = logps_of(reference)
    return _backward(dpo_loss(logps_of(model), ref_logps))


def humanline(model, args):
    """As ``humanline train --gradient-checkpointing``: the reference is looked ahead to."""
    from humanline.reference import scoring
    from humanline.training import examples, score

    ids, _ = make_pair(args)
    half = args.length // 2
    batch = examples.make_batch([examples.Tokens(r[:half], r[half:]) for r in ids.tolist()], pad=0)
    with scoring(model):
        reference = score.reference_scores(model, batch)
    loss, _ = score.loss(hl.DPO(beta=BETA), model, batch, reference, [batch])
    return _backward(loss)


def padding_free(model, args):
    """The same with ``--padding-free``: the prompt once for both."""
    from humanline.training import packing

    packing.enable(model)
    return humanline(model, args)


VARIANTS = {
    "all logits": all_logits,
    "TRL": trl,
    "humanline": humanline,
    "humanline --padding-free": padding_free,
}


def _backward(loss):
    loss.backward()
    return loss.item()


# In a child


def attempt(variant, args):
    """One step under the cap: what it took, or an exit that says it does not fit."""
    step, warm = VARIANTS[variant], copy.copy(args)
    warm.length = 32
    step(make_model(warm), warm)  # imports, threads and their arenas are not the step's
    before = status("VmSize")
    limit = before + int(args.cap_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    start = time.perf_counter()
    try:
        model = make_model(args)
        loss = step(model, args)
    except MemoryError:
        sys.exit(DOES_NOT_FIT)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("allocate memory", "bad_alloc")):
            raise
        sys.exit(DOES_NOT_FIT)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    return {
        "length": args.length,
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": status("VmHWM"),
        "loss": loss,
        "grad_norm": norm,
    }


# In the parent


def in_child(variant, length, args):
    """The attempt's result; None if it does not fit.

    Raises:
        RuntimeError: it failed for another reason.
    """
    command = [
        sys.executable,
        "-m",
        "bench.memory.long_context",
        "--child",
        variant,
        "--length",
        length,
    ]
    for name in ("cap_gib", "hidden", "layers", "vocab"):
        command += ["--" + name.replace("_", "-"), getattr(args, name)]
    one_arena = os.environ | {"MALLOC_ARENA_MAX": "1"}  # arenas take address space unused
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=one_arena, cwd=ROOT
    )
    if done.returncode == DOES_NOT_FIT:
        return None
    if done.returncode:
        raise RuntimeError(f"{variant} at {length} tokens failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def largest(fits, start, resolution, longest):
    """The result of ``fits`` at the largest multiple of ``resolution``, up to ``longest``, where it
    is not None; None if not even ``resolution`` fits."""
    low, high, best = 0, longest // resolution + 1, None  # in units of the resolution
    candidate = min(max(start // resolution, 1), high - 1)
    while low < candidate < high:
        result = fits(candidate * resolution)
        if result is None:
            high = candidate
        else:
            low, best = candidate, result
        nothing_failed = high * resolution > longest
        candidate = min(2 * low, high - 1) if nothing_failed else (low + high) // 2
    return best


def find(variant, args):
    def fits(length):
        print(f"  {variant}, {length} tokens: ", end="", file=sys.stderr, flush=True)
        result = in_child(variant, length, args)
        what = f"{result['seconds']:.1f} s" if result else "does not fit"
        print(what, file=sys.stderr, flush=True)
        return result

    result = largest(fits, args.start, args.resolution, args.longest)
    return {"variant": variant, **(result or {"length": 0})}


def agree(args):
    """All variants compute the same, at a short length and without a cap that matters."""
    print(f"comparing all at {args.resolution} tokens", file=sys.stderr)
    args = argparse.Namespace(**vars(args) | {"cap_gib": 1024})
    results = {variant: in_child(variant, args.resolution, args) for variant in VARIANTS}
    expected = results["all logits"]
    for variant, result in results.items():
        for key in ("loss", "grad_norm"):
            error = abs(result[key] - expected[key]) / abs(expected[key])
            assert error < 1e-2, f"{variant}: {key} {result[key]}, all logits {expected[key]}"


def table(results):
    """A line for each variant; "stock" is the better of those without humanline."""
    stock = max(r["length"] for r in results if not r["variant"].startswith("humanline"))
    return [
        [r["variant"], f"{r['length']:,}", f"{r['length'] / stock:.1f}" if stock else ""]
        for r in results
    ]


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cap-gib", type=float, default=2.0, help="memory a step may take, in GiB")
    parser.add_argument("--hidden", type=int, default=576, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--start", type=int, default=2048, help="the first length to try")
    parser.add_argument("--resolution", type=int, default=256, help="lengths are multiples of this")
    parser.add_argument("--longest", type=int, default=65536, help="no length beyond this is tried")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if args.child:
        print(json.dumps(attempt(args.child, args)))
        return
    agree(args)
    results = [find(variant, args) for variant in VARIANTS]
    for line in [HEAD, *table(results)]:
        print("".join(f"{cell:26s}" for cell in line))
    if args.json:
        names = ("cap_gib", "hidden", "layers", "vocab", "resolution", "longest")
        sizes = {name: getattr(args, name) for name in names}
        write_record(args.json, sizes, results)


if __name__ == "__main__":
    main()
