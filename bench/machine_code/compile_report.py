"""What the compiler makes of every kernel, without a GPU: registers, spills, memory access.

    python -m bench.machine_code.compile_report [--vocab 151936] [--dtype bf16] [--targets sm_80,…]
                                                [--json FILE]
    python -m bench.machine_code.compile_report --kernel token_loss --target sm_90 --json

Compiles each kernel as its launcher would for rows of this vocabulary and reads the machine code.
Rows are assumed to be aligned to 16 bytes, which Triton makes sure of when their length and stride
are multiples of 16 elements; ``--unaligned`` shows what any other costs.

What bounds a row kernel is an estimate from these counts and a card's figures: instructions issued,
exponentials, bytes moved, and the bytes that its loads keep in flight.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: the compiler, not the interpreter

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.machine_code.cards import CARDS
from bench.machine_code.row_kernels import ROW_KERNELS
from bench.machine_code.sass import Loop, hot_loops
from humanline.kernels import (
    columns,
    head_rows,
    linear_logps,
    masses,
    matmul,
    move_rows,
    outer,
    put_rows,
    scale,
    sequence_loss,
    sequence_policy,
    take_columns,
    token_logps,
    token_loss,
    token_policy,
    token_stats,
)
from humanline.kernels.launch import READ_AGAIN, READ_ONCE, GemmConfig, gemm_config, row_config

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INTEGERS = {
    *(
        "V",
        "width",
        "H",
        "n",
        "rows",
        "rows_per_sequence",
        "weight_stride",
        "chunks",
        "tiles_per_chunk",
        "group",
        "stride",
        "K",
        "rank",
    ),
    *("row_stride", "rows_per_batch", "batch_stride_rows"),
    *("hidden_stride", "weight_stride", "dz_stride", "out_stride", "x_stride", "to_stride"),
}
LOSS = token_loss.humanline_token_loss
HEAD, HEAD_GRADIENT = linear_logps.humanline_linear_logps, linear_logps.humanline_linear_gradient
PLAIN = {"bias_ptr": None, "SOFTCAP": False, "ENTROPY": False}
# One variant of the fused loss for each combination that changes the code most.
VARIANTS = {
    "forward": (token_logps.humanline_token_logps, {"ENTROPY": False}),
    "forward, entropy": (token_logps.humanline_token_logps, {"ENTROPY": True}),
    "backward": (token_logps.humanline_token_logps_gradient, {"ENTROPY": False}),
    "backward, entropy": (token_logps.humanline_token_logps_gradient, {"ENTROPY": True}),
    "loss, clipped": (LOSS, {"KIND": 0, "PENALTY": 0, "ENTROPY": False}),
    "loss, clipped, KL": (
        LOSS,
        {"KIND": 0, "PENALTY": 3, "ENTROPY": False},
    ),
    "loss, entropy": (LOSS, {"KIND": 0, "PENALTY": 3, "ENTROPY": True}),
    "loss, CISPO, k1": (
        LOSS,
        {"KIND": 1, "PENALTY": 1, "ENTROPY": False},
    ),
    "loss, SAPO, k3": (
        LOSS,
        {"KIND": 2, "PENALTY": 2, "ENTROPY": False},
    ),
    "loss, NLL": (LOSS, {"KIND": 3, "PENALTY": 0, "ENTROPY": False}),
    "block, softmax": (head_rows.humanline_head_softmax, PLAIN),
    "block, softmax, all": (head_rows.humanline_head_softmax, {"SOFTCAP": True, "ENTROPY": True}),
    "block, dz": (head_rows.humanline_head_gradient, PLAIN),
    "block, dz, all": (head_rows.humanline_head_gradient, {"SOFTCAP": True, "ENTROPY": True}),
    "block, softmax, loss": (
        head_rows.humanline_head_softmax,
        PLAIN | {"TOKEN_LOSS": True, "KIND": 0, "PENALTY": 3},
    ),
    "moved rows": (move_rows.humanline_move_rows, {}),
    "statistics": (token_stats.humanline_token_stats, {"PENALTY": 3}),
    "coefficients": (token_policy.humanline_token_policy, {"PENALTY": 3}),
    "scale": (scale.humanline_scale, {}),
    "energies": (columns.humanline_column_sums, {"SQUARED": True}),
    "masses": (masses.humanline_masses, {}),
    "columns taken": (take_columns.humanline_take_columns, {}),
    "rows put": (put_rows.humanline_put_rows, {"ADD": False}),
    "outer": (outer.humanline_outer, {"ADD": False}),
    "pairs": (sequence_loss.humanline_sequence_loss, {"KIND": "sigmoid", "PAIRED": True}),
    "sequences": (sequence_loss.humanline_sequence_loss, {"KIND": "kto", "PAIRED": False}),
    "ratios": (sequence_policy.humanline_sequence_policy, {"KIND": 2, "PENALTY": 3}),
}
# The GEMMs, with the constants that are not False.
GATHERED = {"INDEX": True, "COUNT": True}
EVERYTHING = {"BIAS": True, "SOFTCAP": True, "ENTROPY": True, "TEMPERATURE_PER_ROW": True}
GEMMS = {
    "head": (HEAD, {}),
    "head, entropy": (HEAD, {"ENTROPY": True}),
    "head, gathered": (HEAD, GATHERED),
    "head, all": (HEAD, {**EVERYTHING, **GATHERED}),
    "dz": (HEAD_GRADIENT, {}),
    "dz, entropy": (HEAD_GRADIENT, {"ENTROPY": True, "COEFFICIENT": True}),
    "dz, counted": (HEAD_GRADIENT, {"COUNT": True}),
    "dz, all": (HEAD_GRADIENT, {**EVERYTHING, "COUNT": True, "COEFFICIENT": True}),
    "dz, energies": (HEAD_GRADIENT, {"BIAS": True, "COEFFICIENT": True, "ENERGIES": True}),
    "dz, all, energies": (HEAD_GRADIENT, {**EVERYTHING, "COEFFICIENT": True, "ENERGIES": True}),
    "dH": (matmul.humanline_matmul_hidden, {"SCALE": True, "INDEX": True}),
    "dW": (matmul.humanline_matmul_weight, {}),
}
OF_DTYPE = {"logits_ptr", "grad_ptr", "x_ptr", "dz_ptr", "hidden_ptr", "out_ptr", "to_ptr"}
REGISTERS, THREADS = 65_536, 2_048  # of an SM

# How tiles are loaded and multiplied: what the machine code calls it, what the report does.
INSTRUCTIONS = {
    **{name: name for name in ("HGMMA", "HMMA", "UTMALDG", "LDGSTS")},  # wgmma, mma, TMA, cp.async
    **{"UTCHMMA": "tcgen05", "v_mfma": "mfma"},
}


@dataclass(frozen=True)
class Report:
    """Of one compiled kernel.

    ``load_bytes`` is what a thread loads at a time: the narrowest load of a row, which only those
    give a cache policy; the widest load of all where there is no row or (AMD) no such mark.
    ``store_bytes`` is the widest store, ``instructions`` those of INSTRUCTIONS that it has.

    Of a row kernel on an NVIDIA card: its hot loops, see sass.py; instructions per element of a
    row, over all its passes; bytes that an SM's threads have in flight; which of issuing,
    exponentials (MUFU), memory and latency bounds it on the card of CARDS, and the fraction of the
    memory's bandwidth that leaves at most, were all of them to overlap.
    """

    name: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    load_bytes: int
    store_bytes: int
    instructions: tuple[str, ...]
    loops: tuple[Loop, ...] = ()
    instructions_per_element: float | None = None
    bytes_in_flight: int | None = None
    bound: str | None = None
    fraction_of_bandwidth: float | None = None


def with_bounds(report: Report, dtype: str, threads: int, element_bytes: int) -> Report:
    """The report with what its hot loops say; ``threads`` a program."""
    if not report.loops:
        return report
    registers = -(-report.registers // 8) * 8
    programs = min(REGISTERS // (registers * threads), THREADS // threads)
    each = min(loop.loads_before_use * loop.load_bytes for loop in report.loops)
    report = replace(
        report,
        instructions_per_element=round(sum(loop.per_element for loop in report.loops), 2),
        bytes_in_flight=programs * threads * each,
    )
    moved = {name: size for name, size in ROW_KERNELS.values()}.get(report.name)
    if report.target not in CARDS or moved is None:
        return report
    card = CARDS[report.target]
    mufu = sum(loop.pipes.get("MUFU", 0) / loop.elements for loop in report.loops)
    seconds = {  # of an element of a row
        "issue": card.issuing(report.instructions_per_element),
        "MUFU": card.exponentials(mufu),
        "memory": moved(TORCH_DTYPES[dtype].itemsize) / card.bandwidth,
        "latency": card.waiting(element_bytes, report.bytes_in_flight),
    }
    bound = max(seconds, key=seconds.get)
    return replace(
        report,
        bound=bound,
        fraction_of_bandwidth=round(seconds["memory"] / seconds[bound], 2),
    )


def compile_variant(name: str, target: str, vocab: int, dtype: str, aligned: bool = True) -> Report:
    """Compile one variant and read its machine code."""
    if name in GEMMS:
        return _compile_gemm(name, target, dtype, aligned)
    function, constants = VARIANTS[name]
    # Between a head's GEMMs logits are float32, whatever the GEMMs are in, and in rows of ours.
    ours = "z_ptr" in function.arg_names
    read = READ_ONCE if function is token_logps.humanline_token_logps else READ_AGAIN
    config = row_config(vocab, TORCH_DTYPES["fp32" if ours else dtype], aligned or ours, read)
    if "LANES" not in function.arg_names:
        config = dict(sys.modules[function.__module__].LAUNCH)
    warps = config.pop("num_warps")
    if TARGETS[target].backend == "hip":
        warps //= 2
    defaults = {"TEMPERATURE_PER_ROW": False, **config}
    defaults |= {"PER_TOKEN": True, "PACKED": True, "OF_LOGP": True}
    defaults |= {"KEPT": True, "ACTIVE": True, "TOKEN_LOSS": False, "KIND": 0, "PENALTY": 0}
    constants = {**{k: v for k, v in defaults.items() if k in function.arg_names}, **constants}
    types = {a: _type(a, dtype) for a in function.arg_names}
    odd = () if aligned else ("V",) if ours else INTEGERS
    report = _compile(name, target, function, constants, types, odd, ours, num_warps=warps)
    if "LANES" not in function.arg_names:
        return replace(report, loops=())
    return with_bounds(report, dtype, 32 * warps, 4 if ours else TORCH_DTYPES[dtype].itemsize)


def _compile_gemm(name: str, target: str, dtype: str, aligned: bool) -> Report:
    function, constants = GEMMS[name]
    row = "gfx" if TARGETS[target].backend == "hip" else target
    stages = linear_logps.STAGES if function in (HEAD, HEAD_GRADIENT) else 4
    config = gemm_config(TORCH_DTYPES[dtype], row, _columns(function, constants), stages)
    tiles = config.launch
    options = {option: tiles.pop(option) for option in ("num_warps", "num_stages")}
    types = {a: _type(a, dtype) for a in function.arg_names}
    types |= _operands(function, constants, config, dtype, config.descriptors and aligned)
    flags = [p.name for p in function.params if p.is_constexpr and p.name not in tiles]
    constants = {flag: constants.get(flag, False) for flag in flags}
    for flag in (f for f in flags if f.endswith("_DESCRIPTOR")):
        constants[flag] = types[flag.removesuffix("_DESCRIPTOR").lower()].startswith("tensordesc")
    if "DESCRIPTORS" in flags:
        constants["DESCRIPTORS"] = types["dz"].startswith("tensordesc")
    odd = () if aligned else INTEGERS
    return _compile(name, target, function, {**tiles, **constants}, types, odd, False, **options)


def _columns(function, constants: dict) -> int:
    """The bound on columns that the launcher sets."""
    softcap = "SOFTCAP" in constants
    if function is HEAD:
        return linear_logps.forward_columns("BIAS" in constants, softcap)
    if function is HEAD_GRADIENT:
        more = "ENTROPY" in constants, softcap, "ENERGIES" in constants
        return linear_logps.gradient_columns(*more)
    return 128 if function is matmul.humanline_matmul_weight else 256


def _operands(function, constants: dict, config: GemmConfig, dtype: str, descriptors: bool) -> dict:
    """Types of the matrices: descriptors where the launcher makes them, pointers elsewhere."""
    gathered = constants.get("INDEX", False)
    if function is matmul.humanline_matmul_hidden:
        tiles = {"dz": (config.rows, config.depth), "weight": (config.depth, config.columns)}
    elif function is matmul.humanline_matmul_weight:
        tiles = {"dz": (config.depth, config.rows), "hidden": (config.depth, config.columns)}
    else:
        tiles = {"hidden": (config.rows, config.depth), "weight": (config.columns, config.depth)}
    return {
        name: f"tensordesc<{dtype}[{tile[0]}, {tile[1]}]>"
        if descriptors and not (name == "hidden" and gathered)
        else f"*{dtype}"
        for name, tile in tiles.items()
        if name in function.arg_names
    }


def _compile(
    name, target, function, constants: dict, types: dict, odd: Iterable[str], ours: bool, **options
) -> Report:
    signature = {a: "constexpr" if a in constants else types[a] for a in function.arg_names}
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(function.arg_names.index(k),): v for k, v in constants.items()},
        attrs=_divisible_by_16(function, signature, odd),
    )
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if TARGETS[target].backend == "hip":
        found = _read_amd(compiled)
    else:
        logits = "fp32" if ours else types.get("logits_ptr", "*fp32").removeprefix("*")
        found = _read_nvidia(compiled, TORCH_DTYPES[logits].itemsize)
    return Report(name, target, shared_bytes=compiled.metadata.shared, **found)


def _type(argument: str, dtype: str) -> str:
    if argument in OF_DTYPE:
        return f"*{dtype}"
    if argument in {
        *("labels_ptr", "index_ptr", "kept_ptr", "order_ptr", "tokens_ptr", "cu_seqlens_ptr")
    }:
        return "*i64"
    if argument in ("count_ptr", "columns_ptr"):
        return "*i32"
    if argument in ("mask_ptr", "desirable_ptr"):
        return "*i1"
    if argument == "temperature_ptr":
        return "*fp64"
    if argument.endswith("_ptr"):
        return "*fp32"
    return "i32" if argument.removeprefix("grad_") in INTEGERS else "fp32"


def _divisible_by_16(function, signature: dict, odd: Iterable[str]) -> dict:
    """What the launcher's specialisation finds: pointers aligned, and integers that are not odd."""
    skip = {p.name for p in function.params if p.do_not_specialize}.union(odd)
    names = [
        n for n in signature if signature[n][0] in "*i" and n.removeprefix("grad_") not in skip
    ]
    return {(function.arg_names.index(n),): [["tt.divisibility", 16]] for n in names}


def _read_nvidia(compiled, element_bytes: int) -> dict:
    tools = triton.__path__[0] + "/backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(f"{tools}/cuobjdump", "--dump-resource-usage", file.name)
        code = _run(f"{tools}/cuobjdump", "-sass", file.name)
    widths = {"64": 8, "128": 16, "256": 32, "U16": 2, "S16": 2, "U8": 1, "S8": 1}

    def sizes(access: str) -> list[int]:
        found = (f.split(".") for f in re.findall(rf"\b{access}((?:\.\w+)*)", code))
        return [next((widths[w] for w in f if w in widths), 4) for f in found]

    of_rows = sizes(r"LDG\.E\.E[FL]")  # evict_first, evict_last
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "load_bytes": min(of_rows) if of_rows else max(sizes("LDG"), default=0),
        "store_bytes": max(sizes("STG"), default=0),
        "instructions": _instructions(code),
        "loops": tuple(hot_loops(code, element_bytes)),
    }


def _read_amd(compiled) -> dict:
    code = compiled.asm["amdgcn"]
    widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2}

    def widest(kind: str) -> int:
        found = re.findall(rf"(?:global|buffer)_{kind}_(dwordx\d|dword|u?short)", code)
        return max((widths[f] for f in found), default=0)

    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", code).group(1)),
        "spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code).group(1)),
        "load_bytes": widest("load"),
        "store_bytes": widest("store"),
        "instructions": _instructions(code),
    }


def _instructions(code: str) -> tuple[str, ...]:
    return tuple(name for found, name in INSTRUCTIONS.items() if re.search(rf"\b{found}", code))


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dtype", choices=TORCH_DTYPES, default="bf16")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--unaligned", action="store_true")
    parser.add_argument("--kernel", choices=ROW_KERNELS, help="one row kernel alone, on --target")
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const="-",
        help="also write the results here; print --kernel's",
    )
    args = parser.parse_args()
    aligned = not args.unaligned and args.vocab % 16 == 0
    if args.kernel:
        name, _ = ROW_KERNELS[args.kernel]
        record = asdict(compile_variant(name, args.target, args.vocab, args.dtype, aligned))
        record = {"kernel": args.kernel, "triton": triton.__version__, **record}
        text = json.dumps(record, indent=1)
        print(text) if args.json in (None, Path("-")) else args.json.write_text(text + "\n")
        return
    print(f"Triton {triton.__version__}, V={args.vocab}, {args.dtype}")
    print(f"{'kernel':20s} {'target':7s} {'regs':>5s} {'spills':>6s} {'smem':>6s} load store instr")
    reports = []
    for name in (*VARIANTS, *GEMMS):
        for target in args.targets.split(","):
            r = compile_variant(name, target, args.vocab, args.dtype, aligned)
            print(
                f"{r.name:20s} {r.target:7s} {r.registers:5d} {r.spills:6d} {r.shared_bytes:6d} "
                f"{r.load_bytes:4d} {r.store_bytes:5d} {r.instructions_per_element or '':>5} "
                f"{f'{r.bound} {r.fraction_of_bandwidth:.0%}' if r.bound else ''}"
                f"{' '.join(r.instructions)}"
            )
            reports.append(asdict(r))
    if args.json and args.json != Path("-"):
        commit = _run("git", "describe", "--always", "--dirty").strip()
        about = {"triton": triton.__version__, "torch": torch.__version__, "commit": commit}
        about |= {"vocab": args.vocab, "dtype": args.dtype, "aligned": aligned}
        lines = ",\n".join(map(json.dumps, reports))  # a kernel a line
        args.json.write_text(f'{{"environment": {json.dumps(about)},\n"results": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
