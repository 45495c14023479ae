"""What the Triton kernels take of an H100 at V4-Flash's sizes: they are compiled for one here, on any machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

pytestmark = pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="its limits are those of Triton 3.6")
SHARED = 232_448  # bytes of a multiprocessor's shared memory that one program can have
# In fp32, at a Flash's width, kernels serve tests on a GPU: they run, however slowly.
SLOW = {"attention, fp32", "indexer, fp32", "experts, fp32", "hyper-connections, fp32"}
FEW_ROWS = {
    "linear, 16 rows",
    "each product, 1 row",
    "each product, MoE",
    "experts, decoding",
}  # wgmma multiplies 64 at once
# Bytes that some numbers take which did not find a register; they must not grow.
SPILLED = {
    "attention, CSA": {"_forward": 8},  # at 256 channels
    "cache, CSA": {"_forward": 16, "_choose": 8},  # 8 without pages
    "hopper, window": {"forward_kernel": 8},
    "hopper, indexer": {"scores_kernel": 24},  # of an item, not of a query
    "indexer": {"_choose": 8},
    "fp8, experts in FP4": {"_up": 16},
    "fp8, experts in FP4, fp32": {"_up": 16},
    "sampling, cut": {"_finish": 16},  # so that two programs fit beside each other
    "choice, long": {"_choose": 48},  # so that two rows fit beside each other, which is faster
    # Of a tile of 128 rows and 256 columns, not of a step.
    "hopper, loss, tokens, masked": {"token_kernel": 280},
    "hopper, sampling": {"measure_kernel": 152},  # under a mask, as that of tokens
    "hopper, loss, reverse KL": {"teacher_kernel": 32},
    "hopper, loss, Jensen-Shannon": {"teacher_kernel": 32, "slope_kernel": 80},
    # As do two programs; on a Hopper GPU `_streams_backward` is not what runs.
    "hyper-connections": {"_site": 40, "_streams_backward": 2056},
    "hyper-connections, head": {"_streams_backward": 2032},
    "hopper, hyper-connections": {"streams_kernel": 184},
}


@pytest.fixture(scope="module")
def kernels() -> list[tuple[str, dict[str, Any]]]:
    """Case and kernel, from a process whose Triton compiles; here it interprets."""
    script = Path(__file__).with_name("compile_for_h100.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return [(case, kernel) for case, found in json.loads(done.stdout).items() for kernel in found]


def test_kernels_fit_into_shared_memory(kernels):
    assert len(kernels) > 40
    assert [each for each in kernels if each[1]["shared"] > SHARED] == []


def test_nothing_is_spilled(kernels):
    def allowed(case: str, kernel: dict[str, Any]) -> int:
        return SPILLED.get(case, {}).get(kernel["kernel"], 0)

    assert [each for each in kernels if each[0] not in SLOW and each[1]["spilled"] > allowed(*each)] == []


def test_matrices_are_multiplied_by_warpgroups(kernels):
    multiplying = [each for each in kernels if each[1]["products"] and each[0] not in SLOW | FEW_ROWS]
    assert len({kernel["kernel"] for _, kernel in multiplying}) >= 8
    assert [each for each in multiplying if not each[1]["wgmma"] or each[1]["mma"]] == []


def test_fp8_is_multiplied_as_fp8(kernels):
    found = [kernel for case, kernel in kernels if case.startswith("fp8") and kernel["fp8"]]
    assert {kernel["kernel"] for kernel in found} == {"_multiply", "_up", "_down"}
    assert all(kernel["wgmma"] == kernel["fp8"] == 8 for kernel in found)  # 128 channels of two tiles, 32 at a time
