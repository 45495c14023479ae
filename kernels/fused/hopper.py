"""What the Gluon kernels for Hopper share."""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Waits for all threads of a partition; Triton 3.7 gave it another name.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


def described(x: Tensor, rows: int) -> TensorDescriptor:
    """Rows of x [.., D], so many and half of their channels at a time, for the tensor memory accelerator."""
    return TensorDescriptor.from_tensor(x, [rows, x.shape[-1] // 2], gl.NVMMASharedLayout(128, 16, 2))


def programs(items: int, device: torch.device) -> int:
    """One for each multiprocessor, as each takes its shared memory, but no more than there is work for."""
    return min(items, torch.cuda.get_device_properties(device).multi_processor_count)


@gluon.jit
def paged_row(table, first, number, PAGE: gl.constexpr):
    """The row of a document's entry, whose pages stand in the table from `first` on."""
    return gl.load(table + first + number // PAGE) * PAGE + number % PAGE


@gluon.jit
def masked(scores, i, place, low, count, W: gl.constexpr, KIND: gl.constexpr):
    """The products of the tile at i, -inf where a key is not seen."""
    BLOCK: gl.constexpr = scores.type.shape[1]
    WINDOW: gl.constexpr = (W + BLOCK - 1) // BLOCK * BLOCK
    # Most tiles are seen as a whole.
    cut = place - (W - 1) + i < 0
    if KIND == 0:
        cut = cut | (i + BLOCK > W)
    else:
        cut = cut | (low + i - WINDOW + BLOCK > count) | ((i < WINDOW) & (i + BLOCK > W))
    if cut:
        at = i + gl.arange(0, BLOCK, gl.SliceLayout(0, scores.type.layout))
        number = place - (W - 1) + at
        seen = (number >= 0) & (at < W)
        if KIND != 0:
            seen = seen | ((at >= WINDOW) & (low + at - WINDOW < count))
        scores = gl.where(seen[None, :], scores, float("-inf"))
    return scores
