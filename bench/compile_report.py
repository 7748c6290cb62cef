"""What the compiler makes of every kernel, without a GPU: registers, spills, memory access.

    python bench/compile_report.py [--vocab 151936] [--dtype bf16] [--targets sm_80,sm_90,...]

Compiles each kernel as its launcher would for rows of this vocabulary and reads the machine code.
Rows are assumed to be aligned to 16 bytes, as they are when the row stride is a multiple of 8
half-precision or 4 single-precision elements; ``--unaligned`` shows what an odd row stride costs.
"""

import argparse
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: the compiler, not the interpreter

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from humanline.kernels import scale, sequence_loss, token_logps, token_loss
from humanline.kernels.launch import row_config

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INTEGERS = ("V", "rows", "row_stride", "rows_per_batch", "batch_stride_rows", "rows_per_sequence")
# One variant of the fused loss for each combination that changes the code most.
VARIANTS = {
    "forward": (token_logps._forward, {"ENTROPY": False}),
    "forward, entropy": (token_logps._forward, {"ENTROPY": True}),
    "backward": (token_logps._backward, {"ENTROPY": False}),
    "backward, entropy": (token_logps._backward, {"ENTROPY": True}),
    "loss, clipped": (token_loss._token_loss, {"KIND": 0, "PENALTY": 0, "ENTROPY": False}),
    "loss, clipped, KL": (token_loss._token_loss, {"KIND": 0, "PENALTY": 3, "ENTROPY": False}),
    "loss, entropy": (token_loss._token_loss, {"KIND": 0, "PENALTY": 3, "ENTROPY": True}),
    "loss, NLL": (token_loss._token_loss, {"KIND": 3, "PENALTY": 0, "ENTROPY": False}),
    "scale": (scale._scale, {"BLOCK": 8192}),
    "pairs": (sequence_loss._sequence_loss, {"KIND": "sigmoid", "PAIRED": True}),
    "sequences": (sequence_loss._sequence_loss, {"KIND": "kto", "PAIRED": False}),
}


@dataclass(frozen=True)
class Report:
    """Of one compiled kernel; ``load_bytes`` is the widest global load a thread makes."""

    name: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    load_bytes: int
    store_bytes: int


def compile_variant(name: str, target: str, vocab: int, dtype: str, aligned: bool = True) -> Report:
    """Compile one variant and read its machine code."""
    function, constants = VARIANTS[name]
    config = row_config(vocab, TORCH_DTYPES[dtype])
    warps = config.pop("num_warps")
    if "LANES" not in function.arg_names:
        warps = 8 if name == "scale" else 4
    if TARGETS[target].backend == "hip":
        warps //= 2
    defaults = {"TEMPERATURE_PER_ROW": False, "ON_POLICY": False, **config}
    defaults |= {"PER_TOKEN": True, "PACKED": True, "BLOCK": 1024}
    constants = {**{k: v for k, v in defaults.items() if k in function.arg_names}, **constants}
    signature = {
        argument: "constexpr" if argument in constants else _type(argument, dtype)
        for argument in function.arg_names
    }
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(function.arg_names.index(k),): v for k, v in constants.items()},
        attrs=_divisible_by_16(function, signature, aligned),
    )
    compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": warps})
    read = _read_amd if TARGETS[target].backend == "hip" else _read_nvidia
    return Report(name, target, shared_bytes=compiled.metadata.shared, **read(compiled))


def _type(argument: str, dtype: str) -> str:
    if argument in ("logits_ptr", "grad_ptr", "x_ptr"):
        return f"*{dtype}"
    if argument in ("labels_ptr", "cu_seqlens_ptr"):
        return "*i64"
    if argument in ("mask_ptr", "desirable_ptr"):
        return "*i1"
    if argument == "temperature_ptr":
        return "*fp64"
    if argument.endswith("_ptr"):
        return "*fp32"
    return "i32" if argument.removeprefix("grad_") in INTEGERS else "fp32"


def _divisible_by_16(function, signature: dict, aligned: bool) -> dict:
    """What the launcher's specialisation finds: pointers aligned, vocabulary and row stride too."""
    if not aligned:
        names = [n for n in signature if signature[n].startswith("*")]
    else:
        skip = {p.name for p in function.params if p.do_not_specialize}
        names = [n for n in signature if signature[n][0] in "*i" and n not in skip]
    return {(function.arg_names.index(n),): [["tt.divisibility", 16]] for n in names}


def _read_nvidia(compiled) -> dict:
    tools = triton.__path__[0] + "/backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(f"{tools}/cuobjdump", "--dump-resource-usage", file.name)
        code = _run(f"{tools}/cuobjdump", "-sass", file.name)
    widths = {"": 4, ".64": 8, ".128": 16, ".256": 32, ".U16": 2, ".U8": 1, ".S16": 2}

    def widest(instruction: str) -> int:
        found = re.findall(rf"\b{instruction}\.E([.\w]*)", code)
        sizes = (re.search(r"\.(256|128|64|U16|S16|U8)\b", f) for f in found)
        return max((widths["." + m.group(1)] if m else 4 for m in sizes), default=0)

    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "load_bytes": widest("LDG"),
        "store_bytes": widest("STG"),
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
    }


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dtype", choices=TORCH_DTYPES, default="bf16")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--unaligned", action="store_true")
    args = parser.parse_args()
    print(f"Triton {triton.__version__}, V={args.vocab}, {args.dtype}")
    print(f"{'kernel':20s} {'target':7s} {'regs':>5s} {'spills':>6s} {'smem':>6s} load store")
    for name in VARIANTS:
        for target in args.targets.split(","):
            r = compile_variant(name, target, args.vocab, args.dtype, not args.unaligned)
            print(
                f"{r.name:20s} {r.target:7s} {r.registers:5d} {r.spills:6d} {r.shared_bytes:6d} "
                f"{r.load_bytes:4d} {r.store_bytes:5d}"
            )


if __name__ == "__main__":
    main()
