"""What `gpu.sh` checks and counts on a GPU beside the benchmark, one command a step.

    python -m bench.gpu machine|smoke|correctness|correctness_rest|ops|graphs|kernels|dram|small|
                        configurations [--reduced] [--output DIR]

`--reduced` is the same on small shapes. Without a GPU the kernels run in Triton's interpreter, and
steps that need one say so. A finding is a line of a file in DIR, written as soon as it is there: a
step that is run again leaves out what has passed.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import datetime, timezone
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import humanline as hl
from bench.accuracy import errors, truth
from bench.card import card
from bench.cases import GPT2, LLAMA, QWEN, Batch, Case, inputs
from bench.environment import environment
from bench.objectives import CLIP
from bench.peers import OURS, peers_of
from bench.run import Results, device_is_lost
from humanline.training.errors import UserError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = None if DEVICE == "cuda" else "triton"  # the interpreter has to be asked for
SMALL, ODD = 1001, 151_643  # vocabularies: of the reduced form, and whose rows are not aligned


def machine(args: argparse.Namespace) -> bool:
    """Whether what is in the folder was measured on such a machine, with these versions; if so, a
    line in the folder says on what it goes on."""
    try:
        results = Results.open(args.output / "results.json", DEVICE)
    except UserError as error:
        print(error, file=sys.stderr)
        return False
    results.save()
    now = card(DEVICE)
    here = {
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "card": now and asdict(now),
    }
    with (args.output / "machines.jsonl").open("a") as file:
        file.write(json.dumps(here | environment(DEVICE)) + "\n")
    return True


def correctness(args: argparse.Namespace) -> bool:
    """humanline's error against float64 beside eager's, at real sizes and odd vocabularies: the
    most telling cases.

    Passes where ours is at most 1.5 × eager's, or half a unit in the last place.
    """
    good = _compare_all(args, filter(_is_telling, _cases(args.reduced)))
    return not device_is_lost(DEVICE) and _far_offsets(args) & good


def correctness_rest(args: argparse.Namespace) -> bool:
    """The same of all other cases."""
    return _compare_all(args, (c for c in _cases(args.reduced) if not _is_telling(c)))


def _is_telling(case: Case) -> bool:
    """Of bfloat16, every objective and entry point at one vocabulary whose rows are
    aligned and one odd; at the first of them half the rows, and frozen heads too."""
    if case.dtype != "bfloat16":
        return False
    plain = case.active == 1 and not case.frozen_head
    if case.vocab == ODD:
        return plain
    return case.vocab in (QWEN, SMALL) and (case.active == 1 or not case.frozen_head)


def _compare_all(args: argparse.Namespace, cases: Iterable[Case]) -> bool:
    known = _known(args)
    todo = [c for c in cases if not known.get(_about(_named(c)))]
    todo.sort(key=lambda c: _about(_named(c)) in known)  # what failed may do so for good: last
    good = True
    for case in todo:
        try:
            good &= _say(args, _named(case) | _compared(case))
        except Exception as error:
            good = _say(args, _named(case) | _failure(error))
            if device_is_lost(DEVICE):
                return False
    return good


def _cases(reduced: bool) -> Iterator[Case]:
    vocabs = [SMALL] if reduced else [32_000, GPT2, LLAMA, QWEN, ODD]
    tokens, hidden = (16, 32) if reduced else (512, 4096)
    for objective, entry, vocab, dtype, active, frozen in product(
        ("grpo", "dpo", "kto", "sft"),
        ("logits", "hidden"),
        vocabs,
        ("float32", "bfloat16", "float16"),
        (1.0, 0.5),
        (False, True),
    ):
        try:
            yield Case(objective, entry, tokens, hidden, vocab, dtype, active, frozen)
        except ValueError:
            continue


def _named(case: Case) -> dict:
    return {"check": "correctness", "case": case.name}


def _compared(case: Case) -> dict:
    peers = [p for p in peers_of(case) if p.name in (OURS, "eager")]
    true = truth(case, DEVICE)
    found = {p.name: errors(p, true).gradient for p in peers}
    bound = max(1.5 * found["eager"], torch.finfo(case.torch_dtype).eps / 2)
    return {"errors": found, "passed": found[OURS] <= bound}


def _failure(error: Exception) -> dict:
    return {"error": f"{type(error).__name__}: {str(error)[:300]}", "passed": False}


def _far_offsets(args: argparse.Namespace) -> bool:
    """More than 2³¹ logits: the last rows have the bits of the same rows alone.

    Both numbers of rows are powers of two, so that a mean over them rounds nothing.
    """
    rows, vocab = (128, 1001) if args.reduced else (2**14, QWEN)
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device=DEVICE).normal_()
    labels = torch.randint(vocab, (rows,), device=DEVICE)
    logps = -torch.rand(rows, device=DEVICE)

    def log_probs(z, labels, upstream):
        logps = hl.token_logps(z, labels, backend=BACKEND)
        return logps, torch.autograd.grad(logps, z, upstream)[0]

    def token_loss(z, labels, upstream):
        """The mean over its rows; ``upstream`` serves as log-probs that the ratio is taken to."""
        batch = z[None], labels[None], 8 * upstream[None]
        advantages = torch.ones(1, device=DEVICE)
        loss, _ = hl.GRPO().from_logits(*batch, advantages=advantages, backend=BACKEND)
        loss = loss * (len(z) / rows)
        return (torch.autograd.grad(loss, z)[0],)

    good = True
    for step in (log_probs, token_loss):
        alone = step(logits[-64:].clone().requires_grad_(), labels[-64:], logps[-64:])
        whole = [x[-64:] for x in step(logits.requires_grad_(), labels, logps)]
        record = {"check": f"far offsets, {step.__name__}", "logits": rows * vocab}
        good &= _say(args, record | {"passed": all(map(torch.equal, whole, alone))})
    return good


def ops(args: argparse.Namespace) -> bool:
    """torch.library.opcheck of the registered ops, with the kernels behind them."""
    return all([_opcheck(args, *call) for call in _op_calls()])


def _op_calls() -> Iterator[tuple[str, str, tuple, dict]]:
    """Every registered op: how it is called, its name, arguments."""
    rows, vocab = 4, 1000
    logits = torch.randn(rows, vocab, device=DEVICE)
    labels = torch.randint(vocab, (rows,), device=DEVICE)
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    row, scalar = torch.rand(rows, device=DEVICE), torch.tensor(0.3, device=DEVICE)
    for entropy in (False, True):
        how, rest = f"entropy={entropy}", (labels, one, entropy, "triton")
        yield how, "token_logps", (logits.clone().requires_grad_(), *rest), {}
        kept = torch.ops.humanline.token_logps(logits, *rest)
        backward = row, row if entropy else None, logits, labels, one, *kept, "triton"
        yield how, "token_logps_backward", backward, {}
        options = {"advantages": row, "anchor": -row, "low": 0.2}
        options |= {"entropy_weight": scalar} if entropy else {}
        loss = logits, labels, one, torch.empty_like(logits), row, "clipped"
        yield how, "token_loss", loss, options
        true = torch.ones_like(labels, dtype=torch.bool)
        sequences = true, true.sum(), 2, None, "clipped", row[:2], row
        options = {k: v for k, v in options.items() if k != "advantages"}
        yield how, "sequence_policy", (-row, row if entropy else None, *sequences), options
    true = torch.ones_like(labels, dtype=torch.bool)
    tokens = true.sum()
    stats = -row, None, row, row, true, tokens, 2, None, "clipped"
    policy = -row, true, "clipped", row, row, -row
    yield "clipped", "token_policy", policy, {"log_eps_P": -1.0, "log_eps_R": 1.0, "low": 0.2}
    yield "clipped", "token_stats", stats, {"advantages": row, "anchor": -row, "low": 0.2}
    yield "in place", "scale_", (logits, scalar), {}
    for kind, of_kind in {
        "sigmoid": {},
        "kto": {"desirable": torch.tensor([True, False], device=DEVICE), "z0": scalar},
    }.items():
        sequences = -row, -row.flip(0), true, tokens, 2, None
        options = {"log_eps_P": -1.0, "log_eps_R": 1.0, "beta": 0.1} | of_kind
        yield kind, "sequence_loss", (*sequences, kind), options


def _opcheck(args: argparse.Namespace, how: str, op: str, arguments: tuple, options: dict) -> bool:
    tests = ["test_schema", "test_faketensor"]  # of what is called inside an autograd function
    if op == "token_logps":
        tests += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    overload = getattr(torch.ops.humanline, op).default
    found = torch.library.opcheck(
        overload, arguments, options, test_utils=tests, raise_exception=False
    )
    record = {"check": f"opcheck {op}, {how}", "found": {k: str(v) for k, v in found.items()}}
    return _say(args, record | {"passed": set(found.values()) == {"SUCCESS"}})


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


# What an objective launches of the kernels that ncu is asked for.
LAUNCHES = {
    "grpo": ("humanline_token_loss", "humanline_scale"),
    "dpo": ("humanline_token_logps", "humanline_token_logps_gradient"),
}


def _counted(reduced: bool) -> list[Case]:
    tokens, vocab = (16, 1001) if reduced else (1024, QWEN)
    return [
        Case(objective, "logits", tokens, 1, vocab, "bfloat16", active)
        for objective, active in product(LAUNCHES, (1.0, 0.5))
    ]


def kernels(args: argparse.Namespace) -> bool:
    """The row kernels whose bytes ncu counts, between the marks that it starts and stops at."""
    good = True
    for case in _counted(args.reduced):
        batch = inputs(case, DEVICE)
        with torch.cuda.profiler.profile() if DEVICE == "cuda" else nullcontext():
            loss = _loss(batch)
            (loss * 0.5).backward()  # the scale kernel too
        record = {"check": "row kernels", "case": case.name}
        good &= _say(args, record | {"passed": bool(loss.isfinite())})
    return good


def _loss(b: Batch, **how) -> Tensor:
    return _result(b, **how)[0]


def _result(b: Batch, **how) -> tuple[Tensor, dict[str, Tensor]]:
    """humanline's loss and statistics, by the kernels unless told otherwise."""
    objective = how.pop("objective", b.objective.ours)
    how = {"backend": BACKEND} | how | b.extra
    if b.case.entry == "logits":
        return objective.from_logits(b.logits, b.labels, b.ref_logps, **how)
    return objective.from_hidden(b.hidden, b.weight, b.labels, b.ref_logps, **how)


def dram(args: argparse.Namespace) -> bool:
    """From ncu.csv to ncu.json: bytes a logit of each launch."""
    path = args.output / "ncu.csv"
    if not path.exists():
        return _say(args, {"check": "ncu", "skipped": "there is no ncu.csv"})
    cases = _counted(args.reduced)
    logits = cases[0].tokens * cases[0].vocab
    launches = bytes_per_logit(path.read_text(), logits)
    expected = [(case.name, kernel) for case in cases for kernel in LAUNCHES[case.objective]]
    as_expected = [x["kernel"] for x in launches] == [kernel for _, kernel in expected]
    if as_expected:
        launches = [{"case": case} | x for (case, _), x in zip(expected, launches, strict=True)]
    text = json.dumps({"logits": logits, "launches": launches}, indent=1)
    (args.output / "ncu.json").write_text(text)
    return _say(args, {"check": "ncu", "launches": len(launches), "passed": as_expected})


def bytes_per_logit(text: str, logits: int) -> list[dict]:
    """What ``ncu --csv --print-units base`` wrote, a record a launch, in order.

    Its table has a line for each metric of each launch; messages stand before and after it.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    metrics, names = {}, {}
    for line in csv.DictReader(lines):
        launch = int(line["ID"])
        names[launch] = line["Kernel Name"].split("(")[0]
        value = float(line["Metric Value"].replace(",", ""))
        metrics.setdefault(launch, {})[line["Metric Name"], line["Metric Unit"]] = value
    launches = []
    for launch, found in sorted(metrics.items()):
        read, written = (found[f"dram__bytes_{x}.sum", "byte"] / logits for x in ("read", "write"))
        record = {"kernel": names[launch], "read": read, "written": written}
        nanoseconds = found.get(("gpu__time_duration.sum", "ns"))
        launches.append(record | {"total": read + written, "nanoseconds": nanoseconds})
    return launches


def small(args: argparse.Namespace) -> bool:
    """Every kernel on small shapes: what compute-sanitizer is pointed at.

    Rows of one shape are aligned to 16 bytes, so that tiles are loaded by TMA where there is any;
    those of the other are odd. --reduced has one tile of rows, and takes each shape once.
    """
    shapes, dtypes = ((40, 328), (37, 301)), ("float16", "float32", "bfloat16")
    tokens = 16 if args.reduced else 144
    good = True
    for (hidden, vocab), dtype in (zip if args.reduced else product)(shapes, dtypes):
        for objective, entry in product(("grpo", "dpo"), ("logits", "hidden")):
            case = Case(objective, entry, tokens, hidden, vocab, dtype, active=0.5)
            batch = inputs(case, DEVICE)
            batch.labels[0, 1:] = -100
            for loss in _losses(batch):
                gradients = torch.autograd.grad(loss * 0.5, batch.leaves)
                good &= all(bool(x.isfinite().all()) for x in (loss, *gradients))
    return _say(args, {"check": "every kernel on small shapes", "passed": good})


def _losses(b: Batch, backend: str | None = BACKEND) -> Iterator[Tensor]:
    """One after the other, every way through the kernels that this case has; by torch, the same
    losses on ways of its own."""

    def loss(**how):
        return _loss(b, backend=backend, **how)

    temperature = torch.rand(b.labels.shape, device=DEVICE) + 0.5
    yield loss()
    yield loss(temperature=temperature)
    if b.case.objective == "grpo":
        with_entropy = hl.GRPO(perception=CLIP, entropy_coef=0.1)
        yield loss(objective=with_entropy)
        level = {"importance_sampling_level": "sequence"}
        yield loss(objective=hl.GRPO(perception=CLIP, entropy_coef=0.1, beta=0.1, **level))
    options = {"return_entropy": True, "backend": backend}
    if b.case.entry == "logits":
        yield sum(hl.token_logps(b.logits, b.labels, temperature, **options)).sum()
        return
    bias = torch.randn(b.case.vocab, device=DEVICE).to(b.case.torch_dtype).to(b.hidden.dtype)
    head = {"bias": bias, "temperature": temperature, "logit_softcap": 3.0}
    yield loss(**head)
    yield loss(gradient_tolerance=1e-3)
    # Most columns are so improbable that they are left out.
    left_out = {"bias": 8 * bias, "gradient_tolerance": 1e-3, "backend": backend}
    yield hl.linear_token_logps(b.hidden, b.weight, b.labels, **left_out).sum()
    yield sum(hl.linear_token_logps(b.hidden, b.weight, b.labels, **head, **options)).sum()
    capturable = backend != "torch"
    yield loss(capturable=capturable)
    yield loss(capturable=capturable, **head)
    if b.case.objective == "grpo":
        yield loss(capturable=capturable, objective=with_entropy)


def configurations(args: argparse.Namespace) -> bool:
    """Time every number of warps: for READ_ONCE and READ_AGAIN in kernels/launch.py."""
    from bench.gpu.warps import time_warps

    shapes = [1000] if args.reduced else [2048, 8192, 32_000, GPT2, LLAMA, QWEN, 262_144]
    file = "configurations.jsonl"
    known = _known(args, file)
    for vocab, dtype in product(shapes, (torch.bfloat16, torch.float32)):
        shape = {"vocab": vocab, "dtype": str(dtype)[6:]}
        if _about(shape) not in known:
            times = time_warps(vocab, dtype, DEVICE, rows=4 if args.reduced else 4096)
            _say(args, shape | {"milliseconds": times}, file)
    return True


def _say(args: argparse.Namespace, record: dict, file: str = "checks.jsonl") -> bool:
    """Print a finding, keep it in the results folder in place of an older one; whether it is no
    failure."""
    print(json.dumps(record, ensure_ascii=False), flush=True)
    if args.output:
        path, part = args.output / file, args.output / f"{file}.part"
        records = [r for r in _read(path) if _about(r) != _about(record)] + [record]
        lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in records]
        part.write_text("".join(lines), encoding="utf-8")
        os.replace(part, path)
    return record.get("passed", True)


def _about(record: dict) -> tuple:
    """What a finding is about."""
    return tuple(record.get(key) for key in ("check", "case", "vocab", "dtype"))


def _read(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def _known(args: argparse.Namespace, file: str = "checks.jsonl") -> dict[tuple, bool]:
    """What earlier runs found out, and whether it was no failure."""
    records = _read(args.output / file) if args.output else []
    return {_about(r): r.get("passed", True) for r in records}
