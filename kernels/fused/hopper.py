"""What the Gluon kernels for Hopper share."""

import torch
from torch import Tensor
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
