"""Which implementation runs, that the log says so once, and what the Triton kernels refuse when a model is built."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from amalgam.errors import UserError
from amalgam.kernels import dispatch
from amalgam.kernels.norm import rms_norm
from amalgam.model.config import PRESETS, config_of

from .. import tiny

# Without Triton: every operation is there, and asking for the others is one line.
WITHOUT = """
import sys
sys.modules["triton"] = None
import os, torch
from amalgam.errors import UserError
from amalgam.kernels import attention, compress, indexer, moe, norm, project, rope
weight = torch.randn(8, 16)
project.project(torch.randn(4, 16), weight)
os.environ["AMALGAM_KERNELS"] = "triton"
try:
    project.project(torch.randn(4, 16), weight)
except UserError as error:
    print(error)
"""


def test_the_log_says_once_which_ran(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(dispatch, "_said", set())
    caplog.set_level(logging.INFO, "amalgam.kernels")
    for wish in ("reference", "reference", ""):
        monkeypatch.setenv("AMALGAM_KERNELS", wish)
        rms_norm(torch.ones(2, 4), None, 1e-6)
        rms_norm(torch.ones(2, 4).double(), None, 1e-6)
    assert caplog.messages == [
        "operations run as the PyTorch reference on cpu, chosen by AMALGAM_KERNELS=reference",
        "operations run as the PyTorch reference on cpu, chosen by the device",
    ]


def test_another_wish_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AMALGAM_KERNELS", "cuda")
    with pytest.raises(UserError, match="AMALGAM_KERNELS=cuda: want reference, triton, or no such variable"):
        rms_norm(torch.ones(2, 4), None, 1e-6)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"head_dim": 24}, "head_dim: 24 (powers of two from 16 to 256, and 512 in bfloat16 with"),
        (
            {"head_dim": 512},
            "head_dim: 512 (powers of two from 16 to 256, and 512 in bfloat16 with a mu",
        ),
        ({"hc_mult": 3}, "hc_mult: 3 (one of (1, 2, 4))"),
        ({"index_head_dim": 8}, "index_head_dim: 8 (a power of two from 16 to 128)"),
        ({"index_n_heads": 256}, "index_n_heads: 256 (up to 128)"),
        ({"index_n_heads": 24}, "index_n_heads: 24 (a multiple of 16)"),
        ({"index_topk": 1040}, "index_topk: 1040 (up to 1024)"),
        ({"hidden_size": 40}, "hidden_size: 40 (a multiple of 16)"),
        ({"o_lora_rank": 8}, "o_lora_rank: 8 (a multiple of 16)"),
        ({"num_attention_heads": 4, "o_groups": 8}, "num_attention_heads * head_dim / o_groups: 8 (a multiple of 16)"),
        ({"moe_intermediate_size": 40}, "moe_intermediate_size: 40 (a multiple of 16)"),
        ({"n_routed_experts": 2048}, "n_routed_experts: 2048 (up to 1024)"),
        ({"n_routed_experts": 64, "num_experts_per_tok": 48}, "num_experts_per_tok: 48 (up to 32)"),
        ({"n_routed_experts": 6, "vocab_size": 500}, "n_routed_experts: 6 (a multiple of 16); vocab_size: 500 (a mul"),
    ],
)
def test_a_model_out_of_limits_is_refused_when_it_is_built(changes: dict, named: str):
    with pytest.raises(ValueError) as refused:
        tiny.DeepseekV4(tiny.config(**(tiny.FUSED | changes)))
    line = str(refused.value)
    assert f"the Triton kernels do not take this model: {named}" in line
    assert line.endswith("AMALGAM_KERNELS=reference computes it, slowly") and "\n" not in line


@pytest.mark.usefixtures("triton")
def test_limits_are_those_of_the_layers_that_there_are():
    model = tiny.DeepseekV4(tiny.config(**tiny.FUSED))
    with pytest.raises(ValueError, match="take bfloat16 or float32, all alike"):
        model.double()(torch.tensor([1, 2]), torch.tensor([0, 2]))
    dense = {"layer_types": [tiny.SWA, tiny.HCA, tiny.HCA], "index_head_dim": 8, "index_n_heads": 3, "index_topk": 5000}
    tiny.DeepseekV4(tiny.config(**(tiny.FUSED | dense)))


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("preset", sorted(path.name for path in PRESETS.iterdir() if path.is_dir()))
def test_presets_are_within_limits(preset: str):
    from amalgam.kernels.fused.limits import check_model

    check_model(config_of(preset), torch.device("cpu"))


def test_the_reference_takes_any_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AMALGAM_KERNELS", "reference")
    tiny.DeepseekV4(tiny.config(head_dim=24)).double()


def test_an_actor_s_log_shows_it():
    code = """
import torch
from amalgam.kernels.norm import rms_norm
from amalgam.rl.cluster import log_to_stderr
log_to_stderr()
rms_norm(torch.ones(2, 4), None, 1e-6)
"""
    environment = {name: value for name, value in os.environ.items() if name != "AMALGAM_KERNELS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "operations run as the PyTorch reference on cpu, chosen by the device\n" in done.stderr


@pytest.mark.parametrize(
    "hide, said",
    [
        (True, "the kernels for a GPU need the package triton; AMALGAM_KERNELS=reference does without"),
        (False, "AMALGAM_KERNELS=triton on a CPU needs Triton's interpreter: TRITON_INTERPRET=1 from the start"),
    ],
)
def test_without_triton_or_its_interpreter(hide: bool, said: str):
    code = WITHOUT if hide else WITHOUT.replace('sys.modules["triton"] = None', "")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd="/")
    assert (done.stdout.strip(), done.stderr) == (said, "")
