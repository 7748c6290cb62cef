"""Device work of forward and backward beside the GEMMs, counted without a GPU.

    python -m bench.machine_code.launches [--json]

Each op that torch dispatches would be a kernel on a GPU, but for views and allocations; each call
of a Triton kernel a launch; each number that Python looks at a host read, for which the host waits
until the device has done all before it. So the Triton backend is run on CPU tensors with its
kernels replaced: a kernel's outputs are filled with a constant, so that what follows has numbers to
go on with and every row has a gradient. V and H are scaled down together with the workspace: the
blocks of rows, and their number, are those of V=151,936 and H=4,096 in bfloat16 on a GPU.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels on CPU tensors

import argparse
import importlib
import json
import pkgutil
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import humanline as hl
from bench.objectives import CLIP
from humanline import checks, kernels
from humanline.ops.hidden import gemms

SEQUENCES = 8
V, H = 151_936, 4_096
# Both are scaled down so that 2H rows stay 2H rows of the scaled H, and V/H what it is.
ROWS = 8_192
SMALL_V, SMALL_H = 304, ROWS // 2

# Not a kernel: a view of memory, or memory.
VIEWS = {
    *("view", "_unsafe_view", "reshape", "expand", "slice", "select", "unsqueeze", "squeeze"),
    *("detach", "t", "transpose", "permute", "alias", "as_strided", "unbind", "split"),
    *("split_with_sizes", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty"),
    *("numpy_T", "is_same_size", "_local_scalar_dense", "unfold", "movedim", "view_as"),
}
READS = {"nonzero", "_local_scalar_dense", "masked_select"}
GEMMS = {"mm", "addmm", "addmm_"}
# What a kernel leaves in its outputs, by the names of its arguments.
OUTPUTS = {
    "logps_ptr": -1.0,
    "max_ptr": 0.0,
    "sum_ptr": 1.0,
    "entropy_ptr": 1.0,
    "loss_ptr": 1.0,
    "g_ptr": 1.0,
    "g_entropy_ptr": 1.0,
    "scale_ptr": 1.0,
    "report_ptr": 1.0,
}


@dataclass
class Work:
    """Of one call, forward and backward.

    Attributes:
        torch: kernels of torch, GEMMs not among them.
        triton: launches of Triton kernels.
        gemms: matrix products.
        reads: numbers read back to the host.
        names: how often each op and kernel came.
    """

    torch: int = 0
    triton: int = 0
    gemms: int = 0
    reads: int = 0
    names: Counter = field(default_factory=Counter)

    @property
    def beside_gemms(self) -> int:
        return self.torch + self.triton


class _Dispatched(TorchDispatchMode):
    def __init__(self, work: Work):
        super().__init__()
        self._work = work

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if function.namespace == "humanline":  # one of the library's own: what it calls counts
            with self:
                return OPDEFS[function.name()]._init_fn(*args, **(kwargs or {}))
        self._work.reads += name in READS
        if name in GEMMS:
            self._work.gemms += 1
            return _product(name, *args, **(kwargs or {}))
        if name not in VIEWS:
            self._work.torch += 1
            self._work.names[name] += 1
        return function(*args, **(kwargs or {}))


def _product(name: str, *args, out_dtype=None, out=None, **_) -> Tensor:
    """Zeros of a product's shape: nothing is multiplied, and a CPU has no product of narrow
    factors to float32."""
    a, b = args[:2] if name == "mm" else args[1:3]
    out_dtype = next((x for x in args if isinstance(x, torch.dtype)), out_dtype)
    with _disable_current_modes():
        if name == "addmm_":
            return args[0]
        return out if out is not None else a.new_zeros(len(a), b.shape[1], dtype=out_dtype)


class _Replaced:
    """Stands for a kernel: counts a launch and fills its outputs."""

    def __init__(self, kernel, work: Work):
        self._names, self._work, self._name = kernel.arg_names, work, kernel.__name__

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self._work.triton += 1
            self._work.names[self._name] += 1
            given = dict(zip(self._names, args, strict=False)) | kwargs
            with _disable_current_modes():
                for name, value in OUTPUTS.items():
                    if isinstance(x := given.get(name), Tensor):
                        x.fill_(value)

        return launch


def _kernels():
    """Every module of kernels/ with what it launches."""
    for info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        for name, x in vars(module).items():
            if name.startswith("humanline_"):
                yield module, name, x


@contextmanager
def counted():
    """Within this context, work of the Triton backend is counted as a GPU would do it."""
    work = Work()

    def tolist(x):
        work.reads += 1
        with _disable_current_modes():
            return original(x)

    original = Tensor.tolist
    with ExitStack() as stack:
        for module, name, kernel in list(_kernels()):
            stack.enter_context(mock.patch.object(module, name, _Replaced(kernel, work)))
        stack.enter_context(mock.patch.object(checks, "free_to_read", lambda x: False))
        stack.enter_context(mock.patch.object(Tensor, "tolist", tolist))
        stack.enter_context(mock.patch.object(gemms, "_on_tensor_cores", lambda x: True))
        stack.enter_context(_Dispatched(work))
        yield work


OBJECTIVES = {
    "GRPO": (hl.GRPO(perception=CLIP), ("advantages",)),
    "GRPO, KL": (hl.GRPO(perception=CLIP, beta=0.04), ("advantages",)),
    "GRPO, entropy": (hl.GRPO(perception=CLIP, entropy_coef=0.01), ("advantages",)),
    "PPO": (hl.PPO(perception=CLIP), ("advantages",)),
    "SFT": (hl.SFT(), ()),
    "DPO": (hl.DPO(perception=CLIP), ()),
    "KTO": (hl.KTO(perception=CLIP), ("desirable", "z0")),
    "SimPO": (hl.SimPO(), ()),
    "SLiC": (hl.SLiC(), ()),
    "GSPO": (hl.GRPO(perception=CLIP, importance_sampling_level="sequence"), ("advantages",)),
    "GSPO, entropy": (
        hl.GRPO(perception=CLIP, importance_sampling_level="sequence", entropy_coef=0.01),
        ("advantages",),
    ),
    "DPO, ProspectWeight": (hl.DPO(perception=hl.ProspectWeight()), ()),
}
ENTRIES = ("logits", "hidden", "hidden, frozen head")


def count(
    name: str, entry: str, rows: int = ROWS, masked: bool = False, width: int = SMALL_H
) -> Work:
    """Work of one objective from one entry point.

    Args:
        name: of OBJECTIVES.
        entry: of ENTRIES.
        rows: in all, of eight sequences.
        masked: whether the first row of each sequence is a prompt's.
        width: H; its default makes ``ROWS`` rows 2H of them.
    """
    objective, extra = OBJECTIVES[name]
    shape = SEQUENCES, rows // SEQUENCES
    labels = torch.zeros(shape, dtype=torch.int64)
    if masked:
        labels[:, 0] = -100
    batch = {
        "advantages": torch.ones(SEQUENCES),
        "desirable": torch.arange(SEQUENCES) % 2 == 0,
        "z0": torch.tensor(0.1),
    }
    batch = {key: batch[key] for key in extra}
    reference = -torch.ones(shape) if objective.needs_reference else None
    vocab = SMALL_V
    hidden = torch.zeros(*shape, width if entry != "logits" else vocab, dtype=torch.bfloat16)
    weight = torch.zeros(vocab, width, dtype=torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_(entry == "hidden")
    how = {"backend": "triton", **batch}
    with counted() as work:
        if entry == "logits":
            loss, _ = objective.from_logits(hidden, labels, reference, **how)
        else:
            how["workspace_bytes"] = hl.ops.WORKSPACE_BYTES * vocab // V
            loss, _ = objective.from_hidden(hidden, weight, labels, reference, **how)
        loss.backward()
    return work


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one record a line")
    parser.add_argument("--names", action="store_true", help="also every op and kernel")
    parser.add_argument("--only", choices=OBJECTIVES, help="one objective")
    arguments = parser.parse_args(arguments)
    if not arguments.json:
        print(f"{ROWS:,} rows, V={V:,}, H={H:,} (scaled down), bf16, forward and backward\n")
        print(f"{'objective':22s}{'from':22s}{'torch':>7s}{'triton':>8s}{'GEMMs':>7s}{'reads':>7s}")
    for name in [arguments.only] if arguments.only else OBJECTIVES:
        for entry in ENTRIES:
            work = count(name, entry)
            if arguments.json:
                print(json.dumps({"objective": name, "entry": entry, **asdict(work)}))
                continue
            numbers = f"{work.torch:7d}{work.triton:8d}{work.gemms:7d}{work.reads:7d}"
            print(f"{name:22s}{entry:22s}{numbers}")
            if arguments.names:
                print("   ", ", ".join(f"{n} {k}" for n, k in work.names.most_common() if k))


if __name__ == "__main__":
    main()
