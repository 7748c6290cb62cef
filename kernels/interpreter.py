"""What Triton's interpreter (``TRITON_INTERPRET=1``) computes otherwise than a GPU, put right.

- It truncates float32 to bfloat16, where hardware rounds to the nearest.
- It multiplies the bit patterns of bfloat16 matrices as integers.
- It multiplies the others by numpy's BLAS, whose order of summation, and with it the last bits of a
  row, depends on the processor and on the rows around it. No program on a GPU knows of these.
- It rounds a fused multiply-add twice, until Triton 3.9: what a subtraction cancels is then noise.
- Triton 3.6 ends a loop at a number that a kernel loaded, such as a count of rows, by a conversion
  that numpy 2.4 refuses.

The interpreter is one for the whole process, so the kernels of others get the right values too.
"""

from functools import reduce
from operator import iadd

import torch
import triton

FLOATS = ("fp16", "bf16", "fp32")


def correct_interpreter() -> None:
    """Puts the interpreter right, once, if kernels that are defined now will run in it."""
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    if interpreter.InterpreterBuilder.create_dot.__module__ == __name__:
        return
    interpreter._convert_float = _rounding_to_nearest(interpreter)
    interpreter.InterpreterBuilder.create_dot = _multiplying_in_order(interpreter)
    interpreter.InterpreterBuilder.create_fma = _fusing(interpreter)
    interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)


def _rounding_to_nearest(interpreter):
    convert_float, truncation = interpreter._convert_float, interpreter._ir.ROUNDING_MODE.RTZ

    def convert(data, source, target, rounding_mode):
        if (source.name, target.name) != ("fp32", "bf16") or rounding_mode == truncation:
            return convert_float(data, source, target, rounding_mode)
        rounded = torch.tensor(data, device="cpu").bfloat16()
        return rounded.view(torch.uint16).numpy()  # their bits, as the interpreter holds them

    return convert


def _with_index(patch_lang_tensor):
    """A scalar is an array of one element, of whatever shape."""

    def patch(tensor, scope):
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda x: int(x.handle.data.item()))

    return patch


def _multiplying_in_order(interpreter):
    create_dot = interpreter.InterpreterBuilder.create_dot

    def dot(self, a, b, d, *rest):
        if any(x.dtype.scalar.name not in FLOATS for x in (a, b)):
            return create_dot(self, a, b, d, *rest)
        total = product_in_order(_as_float32(a), _as_float32(b)) + d.data
        return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    return dot


def _fusing(interpreter):
    create_fma = interpreter.InterpreterBuilder.create_fma

    def fma(self, x, y, z):
        if z.dtype.scalar.name != "fp32":
            return create_fma(self, x, y, z)
        # A product of float32 is a float64; of the sum's two roundings the first one is 2²⁹ finer.
        total = x.data.astype("float64") * y.data + z.data
        return interpreter.TensorHandle(total.astype("float32"), z.dtype.scalar)

    return fma


def _as_float32(x):
    """The values of an operand; the interpreter holds those of bfloat16 as their bits."""
    if x.dtype.scalar.name == "bf16":
        return (x.data.astype("uint32") << 16).view("float32")
    return x.data.astype("float32")


def product_in_order(a, b):
    """``a [..., M, K] @ b [..., K, N]`` of numpy arrays, summed from the first k to the last.

    Of multiplications and additions alone, each rounded: IEEE 754 defines them to the last bit.
    """
    b = b.copy()  # rows contiguous: it often comes transposed
    terms = (a[..., :, k, None] * b[..., k, None, :] for k in range(b.shape[-2]))
    return reduce(iadd, terms)
