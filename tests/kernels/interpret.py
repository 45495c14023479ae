"""Triton's interpreter (3.6) made right for bf16 and FP8, and faster: importing this changes it for the process.

It holds numbers of these types as their bits, computes with the bits, and truncates where a GPU rounds. Here casts and
products are right; other arithmetic is refused, as our kernels compute in fp32.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language import core as core  # `_patch_lang` looks for it among this module's names
from triton.runtime import interpreter

# By Triton's name: torch's, its bits, and where casts saturate.
LOW: dict[str, tuple[torch.dtype, torch.dtype, float | None]] = {
    "bf16": (torch.bfloat16, torch.uint16, None),
    "fp8e4nv": (torch.float8_e4m3fn, torch.uint8, 448.0),
}
builder: Any = interpreter.InterpreterBuilder
Handle = Any  # a TensorHandle: an array `data` and Triton's `dtype`


def numbers(x: Handle) -> np.ndarray:
    """In fp32 where they are held as bits."""
    name = x.dtype.scalar.name
    return torch.tensor(x.data).view(LOW[name][0]).float().numpy() if name in LOW else x.data


def cast(self: object, x: Handle, dtype: Any, rounding: object = None) -> Handle:
    """To nearest, ties to even; to FP8 it saturates."""
    source, target = x.dtype.scalar.name, dtype.scalar.name
    if source == target or not (source in LOW or target in LOW):
        return plain_cast(self, x, dtype)
    if target not in LOW:
        return plain_cast(self, interpreter.TensorHandle(numbers(x), tl.float32), dtype)
    kind, bits, most = LOW[target]
    wide = torch.tensor(numbers(x).astype(np.float32))
    rounded = (wide if most is None else wide.clamp(-most, most)).to(kind)
    return interpreter.TensorHandle(rounded.view(bits).numpy(), dtype.scalar)


def dot(self: object, a: Handle, b: Handle, sums: Handle, *_: object) -> Handle:
    """In float64, so that a row's product does not depend on how many rows BLAS is given."""
    product = np.matmul(numbers(a).astype(np.float64), numbers(b).astype(np.float64))
    return interpreter.TensorHandle((product + sums.data).astype(sums.data.dtype), sums.dtype.scalar)


def refusing(compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute`, but not on what is held as bits."""

    def checked(self: object, *args: Any) -> Any:
        for x in args:
            for each in x if isinstance(x, tuple) else [x]:
                if hasattr(each, "dtype") and each.dtype.scalar.name in LOW:
                    raise NotImplementedError(f"arithmetic in {each.dtype}: the interpreter has none; use fp32")
        return compute(self, *args)

    return checked


plain_cast = builder.cast_impl
builder.cast_impl = builder.create_fp_to_fp = cast
builder.create_dot = dot
for name in ("binary_op", "unary_op", "create_fma", "create_rsqrt", "create_clampf", "create_atomic_rmw"):
    setattr(builder, name, refusing(getattr(builder, name)))
for operation in (interpreter.ReduceOps, interpreter.ScanOps):
    operation.apply_impl = refusing(operation.apply_impl)

# Each launch, and each call of a device function, patches triton.language, which takes 1-2 ms: once is enough.
interpreter._patch_lang(cast)
interpreter._patch_lang = lambda _: interpreter._LangPatchScope()
# `int` of an array of one number, which NumPy 2.4 refuses.
vars(tl)["tensor"].__index__ = lambda self: self.handle.data.item()
