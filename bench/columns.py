"""Columns left out of the backward, on the rows of a real model: time, memory and error against δ.

    python -m bench.columns [--model FOLDER] [--text FILE] [--json FILE]

Random logits would show nothing: there every column matters. The rows are the model's hidden states
on completions it has sampled itself at temperature 1, and on a text; without ``--model`` it is
SmolLM2-135M-Instruct, which ``humanline train`` fetches too. The loss is GRPO with a clip, forward
and backward; peers are those of ``humanline bench``, on the same rows, in turn round by round.
Errors are against float64 on the first rows of the batch. ``python -m bench.plots`` plots what is
committed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import humanline as hl
from bench.accuracy import CHECKED_TOKENS
from bench.cases import NOISE, SEQUENCES, Batch, Case
from bench.environment import write_record
from bench.measure import peak_bytes, step
from bench.peers import OURS, Peer, eager_hidden, peers_of
from bench.run import ROOT

TOLERANCES = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
KINDS = ("samples", "text")
PROMPTS = (
    "Tell me a story about a lighthouse.",
    "How do I learn to cook?",
    "Explain why the sky is blue.",
    "Write a letter to a friend about your holiday.",
)


@dataclass
class Line:
    """What one way to compute the loss took: of all rounds, seconds; bytes beside the inputs;
    relative errors of the gradients; the share of columns kept. None where there is no such."""

    rows: str
    dtype: str
    peer: str
    tolerance: float | None = None
    kept: float | None = None
    hidden_error: float | None = None
    weight_error: float | None = None
    peak_bytes: int | None = None
    seconds: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


# The rows


@torch.no_grad()
def token_ids(kind: str, model, tokenizer, text: Path, tokens: int) -> tuple[Tensor, int]:
    """Sequences ``[S, P + T]`` of which the last T tokens, ``tokens`` in all, are the rows; P."""
    length = tokens // SEQUENCES
    if kind == "text":
        ids = tokenizer(text.read_text(), return_tensors="pt").input_ids[0]
        return ids[: SEQUENCES * (length + 1)].view(SEQUENCES, length + 1), 1
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = tokenizer.apply_chat_template(
        [chat for chat in chats for _ in range(SEQUENCES // len(chats))], padding=True, **options
    )
    torch.manual_seed(0)
    ids = model.generate(
        **prompts,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        repetition_penalty=1.0,
        min_new_tokens=length,
        max_new_tokens=length,
        pad_token_id=tokenizer.pad_token_id,
    )
    return ids, prompts.input_ids.shape[1]


@torch.no_grad()
def real_batch(kind: str, folder: Path, text: Path, tokens: int) -> Batch:
    """A batch in float32 of the model's own hidden states and head."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, first = token_ids(kind, model, AutoTokenizer.from_pretrained(folder), text, tokens)
    hidden = model.model(ids).last_hidden_state[:, first - 1 : -1].contiguous()
    weight, labels = model.get_output_embeddings().weight.detach().clone(), ids[:, first:]
    generator = torch.Generator().manual_seed(0)
    ref_logps = hl.linear_token_logps(hidden, weight, labels)
    ref_logps -= NOISE * torch.randn(labels.shape, generator=generator)
    sign = torch.tensor([1.0, -1.0]).repeat(SEQUENCES // 2)
    case = Case(tokens=tokens, hidden=hidden.shape[-1], vocab=len(weight))
    return Batch(
        case,
        labels.contiguous(),
        ref_logps,
        sign * (0.5 + torch.arange(SEQUENCES) / SEQUENCES),
        sign > 0,
        torch.tensor(0.05),
        hidden.requires_grad_(),
        weight=weight.requires_grad_(),
    )


def in_dtype(batch: Batch, dtype: str) -> Batch:
    """The same rows and head in another dtype."""
    leaves = {
        name: getattr(batch, name).detach().to(getattr(torch, dtype)).requires_grad_()
        for name in ("hidden", "weight")
    }
    return replace(batch, case=replace(batch.case, dtype=dtype), **leaves)


def shortened(batch: Batch, tokens: int) -> Batch:
    """The first tokens of each sequence, at most so many in all."""
    n = min(tokens, batch.case.tokens) // SEQUENCES
    case = batch.case.shortened(n * SEQUENCES)
    hidden = batch.hidden.detach()[:, :n].clone().requires_grad_()
    of_rows = {name: getattr(batch, name)[:, :n].contiguous() for name in ("labels", "ref_logps")}
    return replace(batch, case=case, hidden=hidden, **of_rows)


# The measurement


def ours(tolerance: float, kept: Callable[[float], None], batch: Batch) -> Tensor:
    loss, stats = batch.objective.ours.from_hidden(
        batch.hidden,
        batch.weight,
        batch.labels,
        batch.ref_logps,
        gradient_tolerance=tolerance,
        **batch.extra,
    )
    kept(float(stats.get("humanline/kept_columns", 1.0)))
    return loss


def peers(batch: Batch, lines: list[Line], rows: str) -> list[tuple[Peer, Line]]:
    """Who runs, each with an empty line."""
    found = []
    for peer in peers_of(batch.case):
        line = Line(rows, batch.case.dtype, peer.name)
        reason = peer.why_not(batch.case, "cpu")
        if reason is not None:
            print(f"{peer.name}: {reason}", file=sys.stderr)
        elif peer.name != OURS:
            found.append((peer, line))
    for tolerance in TOLERANCES:
        line = Line(rows, batch.case.dtype, OURS, tolerance)
        run = partial(ours, tolerance, partial(setattr, line, "kept"))
        found.append((Peer(f"{OURS}, {tolerance:g}", run, "hidden"), line))
    lines += [line for _, line in found]
    return found


def measure(batch: Batch, rows: str, rounds: int) -> list[Line]:
    lines: list[Line] = []
    running = peers(batch, lines, rows)
    short = shortened(batch, CHECKED_TOKENS)
    wide = short.to_float64()
    truth = torch.autograd.grad(eager_hidden(wide), wide.leaves)
    for peer, line in running:
        if not peer.is_floor:
            gradients = torch.autograd.grad(peer.run(short), short.leaves)
            line.hidden_error, line.weight_error = (
                float((g.double() - t).norm() / t.norm())
                for g, t in zip(gradients, truth, strict=True)
            )
    del truth, wide, short
    torch._dynamo.reset()  # or what is compiled next is for any number of tokens
    for peer, line in running:
        step(peer, batch)  # imports, compilation
        line.peak_bytes = peak_bytes(partial(step, peer, batch), "cpu")
    for turn in range(rounds):
        first = turn % len(running)
        for peer, line in running[first:] + running[:first]:
            line.seconds += timed(peer, batch)
    return lines


def timed(peer: Peer, batch: Batch) -> tuple[float]:
    begun = time.perf_counter()
    step(peer, batch)
    return (time.perf_counter() - begun,)


# What is shown

COMMAND, FILE = "python -m bench.columns", "columns.json"
HEAD = ("rows", "dtype", "", "δ", "ρ", "error of dH", "of dW", "s", "× bare GEMMs", "peak, MB")


def table(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each result, times beside those of the bare GEMMs of the same rounds."""
    lines = [Line(**result) for result in results]
    bare = bare_seconds(lines)

    def number(x: float | None, digits: str) -> str:
        return "—" if x is None else f"{x:{digits}}"

    return [
        (
            *(x.rows, x.dtype, x.peer),
            number(x.tolerance, "g"),
            number(x.kept, ".3f"),
            number(x.hidden_error, ".1e"),
            number(x.weight_error, ".1e"),
            f"{x.median:.2f}",
            f"{x.median / bare[x.rows, x.dtype]:.2f}",
            f"{x.peak_bytes / 1e6:.0f}",
        )
        for x in lines
    ]


def bare_seconds(lines: list[Line]) -> dict[tuple[str, str], float]:
    """Of the bare GEMMs, by rows and dtype."""
    return {(x.rows, x.dtype): x.median for x in lines if x.peer == "bare GEMMs"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a Hugging Face model")
    parser.add_argument("--text", type=Path, default=ROOT / "LICENSE")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the raw results here")
    args = parser.parse_args(argv)
    folder = args.model
    if folder is None:
        from humanline.training.model import default_model

        folder = default_model()
    lines = []
    for kind in KINDS:
        batch = real_batch(kind, folder, args.text, args.tokens)
        for dtype in args.dtypes:
            print(f"{kind}, {dtype}", file=sys.stderr)
            lines += measure(in_dtype(batch, dtype), kind, args.rounds)
    results = [asdict(x) for x in lines]
    for cells in (HEAD, *table(results)):
        print("| " + " | ".join(cells) + " |")
    if args.json:
        write_record(args.json, {"tokens": args.tokens}, results)


if __name__ == "__main__":
    main()
