"""Compiles what the Triton kernels' Python code launches at V4-Flash's sizes, for an H100, on a machine without one.

    python tests/kernels/compile_for_h100.py [CASE ...]   # prints {case: [what each of its kernels takes]} as JSON

The cases are calls (compile_cases.py, compile_caches.py). Instead of launching, Triton compiles: with the types,
constants, warps and stages of the call, so that tiles stand in one place, the code under test. Run it without
TRITON_INTERPRET.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.backends.nvidia
from compile_caches import CASES as OF_CACHES
from compile_cases import CASES as OF_OTHERS
from compile_decoding import CASES as OF_STEPS
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CASES = {**OF_OTHERS, **OF_CACHES, **OF_STEPS}
CUOBJDUMP = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", "cuobjdump")


def taken(kernel: Any) -> dict[str, Any]:
    """Bytes of shared memory and those spilled, registers, products of matrices, and the instructions they became."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", usage)
    ptx, source = kernel.asm["ptx"], kernel.asm.get("ttir") or kernel.asm["ttgir"]
    return {
        "kernel": kernel.metadata.name,
        "shared": kernel.metadata.shared,
        "registers": int(found[0]),
        "spilled": int(found[1]) + int(found[2]),
        "products": len(re.findall(r"tt\.dot |warp_group_dot ", source)),
        "wgmma": ptx.count("wgmma.mma_async"),
        "fp8": len(re.findall(r"wgmma\.mma_async.*e4m3\.e4m3", ptx)),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
    }


def compiled(case: str) -> list[dict[str, Any]]:
    """Each kernel that a case launches, once."""
    found: dict[str, Any] = {}
    launch = JITFunction.run

    def compile_instead(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        kernel: Any = launch(self, *args, **{**kwargs, "warmup": True})
        found[kernel.hash] = kernel

    JITFunction.run = compile_instead
    try:
        CASES[case]()
    finally:
        JITFunction.run = launch
    return [taken(kernel) for kernel in found.values()]


def pretend() -> None:
    """What is asked of the device while nothing is launched."""
    target = GPUTarget("cuda", 90, 32)
    fake: Any = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    driver.set_active(fake)
    properties: Any = SimpleNamespace(multi_processor_count=132)
    torch.cuda.get_device_properties = lambda device=None: properties


def main() -> None:
    cases = sys.argv[1:] or list(CASES)
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, len(cases)), pretend) as pool:
        results = pool.map(compiled, cases, chunksize=1)
    print(json.dumps(dict(zip(cases, results, strict=True))))


if __name__ == "__main__":
    main()
