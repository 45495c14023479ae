"""Which implementation of an operation runs: Triton's on a GPU, plain PyTorch elsewhere.

`AMALGAM_KERNELS=reference` chooses plain PyTorch anywhere; `triton` chooses Triton anywhere, which on a CPU needs its
interpreter (TRITON_INTERPRET=1) and serves the tests. The log (logger `amalgam.kernels`, level INFO) says which ran.
"""

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..errors import UserError

VARIABLE = "AMALGAM_KERNELS"
_LOG = logging.getLogger(__package__)
_said: set[tuple[str, str, str, str]] = set()


def fused(x: Tensor) -> bool:
    """Whether the Triton kernels take x, and whatever goes with it; which is then said."""
    triton, wish = wants_triton(x.device), _wish()
    say("operations", "Triton kernels" if triton else "the PyTorch reference", x, f"{VARIABLE}={wish}" if wish else "")
    return triton


def wants_triton(device: torch.device) -> bool:
    """Whether tensors there go to the Triton kernels; UserError if they should and cannot."""
    if (wish := _wish()) not in ("", "reference", "triton"):
        raise UserError(f"{VARIABLE}={wish}: want reference, triton, or no such variable")
    if wish == "triton" or (device.type == "cuda" and wish != "reference"):
        _check_triton(device.type == "cuda")
        return True
    return False


def say(what: str, how: str, x: Tensor, why: str = "") -> None:
    """Logs, once in a process, as what `what` runs on x's kind of device, and why, if not for the device."""
    key = what, how, x.device.type, why
    if key not in _said:
        _said.add(key)
        where = f"{x.device} ({torch.cuda.get_device_name(x.device)})" if x.is_cuda else str(x.device)
        _LOG.info("%s run as %s on %s, chosen by %s", what, how, where, why or "the device")


def _wish() -> str:
    return os.environ.get(VARIABLE, "")


@cache
def _check_triton(on_gpu: bool) -> None:
    if find_spec("triton") is None:
        raise UserError(f"the kernels for a GPU need the package triton; {VARIABLE}=reference does without")
    if on_gpu:
        return
    from triton import knobs

    if not knobs.runtime.interpret:
        raise UserError(f"{VARIABLE}=triton on a CPU needs Triton's interpreter: TRITON_INTERPRET=1 from the start")
