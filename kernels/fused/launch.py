"""What the kernels' launches share: sizes of tiles by dtype and width, and what is refused."""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
HOPPER_KEYS, HOPPER_ROWS = 64, 64  # of a tile of the Gluon kernels that go by queries, by rows
# A product and a sum stay two operations unless `fma` makes them one. The compiler's choice may differ between variants
# of a kernel, such as those for a pack and for a cache, whose results have to have the same bits.
SAME_BITS = {"enable_fp_fusion": False}
DTYPES = (torch.bfloat16, torch.float32)
STEP = 16  # the channels of a product's operands and result come in multiples of it


class Tiles(NamedTuple):
    """Of one program: heads, keys of a tile, warps, stages of the loads' pipeline."""

    heads: int
    keys: int
    warps: int
    stages: int


class PairTiles(NamedTuple):
    """Of one program: pairs (query, head) of a tile, rows or keys of a tile, warps, stages of the loads' pipeline."""

    pairs: int
    keys: int
    warps: int
    stages: int


@cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; where kernels are interpreted, any number."""
    return 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def next_power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: bf16 operands exactly; fp32 as three products in TF32, about 2^-21 of rounding."""
    return "ieee" if dtype == torch.bfloat16 else "tf32x3"


def is_width(width: int, least: int = 16, most: int = 512) -> bool:
    return width & (width - 1) == 0 and least <= width <= most


def check_width(name: str, width: int, least: int = 16, most: int = 512) -> None:
    if not is_width(width, least, most):
        raise ValueError(f"{name}: {width}; the Triton kernels take powers of two from {least} to {most}")


def check_dtypes(**tensors: Tensor) -> torch.dtype:
    """The one dtype of the tensors; ValueError by name otherwise, or for one that no kernel takes."""
    found = {name: tensor.dtype for name, tensor in tensors.items()}
    dtype = next(iter(found.values()))
    if dtype not in DTYPES or len(set(found.values())) > 1:
        raise ValueError(f"the Triton kernels take bfloat16 or float32, all alike; got {found}")
    return dtype
