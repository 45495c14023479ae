"""Kernels over lists of tensors, in one launch: a program takes a block of one tensor, whose address is in a table.

No launch by tensor, and no wait for the device: what is new in a table goes there from pinned memory.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # numbers of a program
WARPS = 8
ALIGNMENT = 16  # of addresses in bytes and of sizes in numbers: a thread then loads and stores 16 bytes at once
TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, None: None}


@triton.jit
def place(table, blocks, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """This program's row of the table, which block of that tensor it has, and which of the block's numbers are there.

    A tensor's size is its row's last column.
    """
    program = tl.program_id(0)
    row, block = tl.load(blocks + 2 * program), tl.load(blocks + 2 * program + 1)
    row = table + row.to(tl.int64) * COLUMNS
    left = tl.load(row + COLUMNS - 1) - block.to(tl.int64) * BLOCK
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    return row, block, tl.arange(0, BLOCK) < left


@triton.jit
def part(row, column: tl.constexpr, block, TYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to the block of the tensor whose address is in a column of the row."""
    start = tl.load(row + column).to(tl.pointer_type(TYPE)) + block.to(tl.int64) * BLOCK
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start + tl.arange(0, BLOCK)


@triton.jit
def clipping(norm, most):
    """What gradients of that norm are multiplied with, so that it is at most `most`; and whether it is finite."""
    norm = tl.load(norm)
    finite = tl.where(tl.abs(norm) < float("inf"), 1, 0)  # Triton's interpreter would take the comparison for fp32
    return tl.minimum(tl.div_rn(most, norm + 1e-6), 1.0), finite > 0


class Lists:
    """What the kernels of one grid are given: rows of addresses, then a size in numbers; `aligned` if all rows are."""

    def __init__(self, rows: Sequence[Sequence[int]], aligned: bool, device: torch.device):
        self.aligned = aligned
        self.blocks = _blocks(tuple(row[-1] for row in rows), BLOCK, device)
        self.table = _on_device(rows, device)

    @property
    def grid(self) -> tuple[int]:
        return (len(self.blocks),)


def by_type(
    columns: Sequence[Sequence[Tensor | None]], free: Sequence[int], numbers: Sequence[int] = ()
) -> list[tuple[list[Any], Lists]]:
    """Columns of tensors (None: there is none) as lists in which each of the columns `free` has one dtype, or None.

    Gives Triton's names of these. All other columns have to be fp32. The rows' `numbers`, if any, are a column more.
    """
    seen = tuple(tuple(map(_seen, column)) for column in columns)
    (device,) = {x.device for x in columns[0] if x is not None}
    return _lists(seen, tuple(free), tuple(numbers), device)


class _Seen(NamedTuple):
    """What kernels are told of a tensor."""

    address: int
    dtype: torch.dtype | None
    size: int


_NOTHING = _Seen(0, None, 0)


def _seen(x: Tensor | None) -> _Seen:
    if x is None:
        return _NOTHING
    if not x.is_contiguous():
        raise ValueError(f"kernels over lists take contiguous tensors; one has strides {x.stride()}")
    return _Seen(x.data_ptr(), x.dtype, x.numel())


@lru_cache(maxsize=256)
def _lists(
    columns: tuple[tuple[_Seen, ...], ...], free: tuple[int, ...], numbers: tuple[int, ...], device: torch.device
) -> list[tuple[list[Any], Lists]]:
    """`by_type`'s. In most steps an allocator gives tensors the addresses that they had in the step before."""
    groups: dict[tuple, list[list[int]]] = {}
    for at, tensors in enumerate(zip(*columns, strict=True)):
        for i, x in enumerate(tensors):
            if x.dtype not in (TYPES if i in free else (torch.float32,)):
                raise ValueError(f"kernels over lists take fp32, and gradients and weights in bf16; got {x.dtype}")
        row = [*(x.address for x in tensors), tensors[0].size]
        aligned = all(number % ALIGNMENT == 0 for number in row)
        row[-1:-1] = numbers[at : at + 1]
        groups.setdefault((aligned, *(tensors[i].dtype for i in free)), []).append(row)
    return [([TYPES[dtype] for dtype in key[1:]], Lists(rows, key[0], device)) for key, rows in groups.items()]


@lru_cache(maxsize=64)
def _blocks(sizes: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """int32 [blocks, 2]: of which tensor each is, and which of that."""
    counts = torch.tensor([-(-size // block) for size in sizes], dtype=torch.int64)
    rows = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first = counts.cumsum(0) - counts
    which = torch.arange(len(rows)) - first[rows]
    return torch.stack([rows, which], dim=1).to(device, torch.int32)


def _on_device(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 [rows, columns]."""
    table = torch.tensor(rows, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)
