"""The table of tensors against the model's own parameters, the published layout, and the published count."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from amalgam.model import DeepseekV4
from amalgam.model.config import CSA, HCA, SWA, config_of
from amalgam.model.names import specs

from .. import tiny
from . import official


@pytest.mark.parametrize(
    "config",
    [
        config_of("tiny"),
        config_of("flash"),
        config_of("pro"),
        tiny.config(layer_types=[HCA, SWA, CSA], o_groups=1, n_routed_experts=3, moe_intermediate_size=24),
        tiny.config(mlp_layer_types=["moe"] * 3, hc_mult=3, compress_rates={CSA: 4, HCA: 5}),
    ],
    ids=["tiny", "flash", "pro", "changed", "without hashing"],
)
def test_transformers_names_and_shapes_are_the_models(config):
    with torch.device("meta"):
        ours = {name: tuple(tensor.shape) for name, tensor in DeepseekV4(config).state_dict().items()}
    listed: dict[str, tuple[int, ...]] = {}
    parts: dict[str, list[int]] = {}
    for spec in specs(config):
        if not spec.stacked.startswith("model.mtp.") or spec.stacked in ours:  # which need not be built
            listed[spec.stacked] = spec.stacked_shape(spec.shape)
            parts.setdefault(spec.stacked, []).append(spec.part)
            assert (
                spec.parts == 1 or spec.parts * torch.Size(spec.shape).numel() == torch.Size(ours[spec.stacked]).numel()
            )
    assert listed == ours
    assert all(found == list(range(len(found))) for found in parts.values())


@pytest.mark.parametrize(("preset", "count"), [("pro", 145_116), ("pro-base", 145_116), ("flash", 69_187)])
def test_published_number_of_tensors(preset: str, count: int):
    """V4-Pro's files hold 145,116 tensors, scales counted. (Flash's is what the same rules give.)"""
    assert sum(2 if spec.kind in ("dense", "expert") else 1 for spec in specs(config_of(preset))) == count


@pytest.mark.parametrize(("experts", "code"), [("fp4", "I8"), ("fp8", "F8_E4M3")])
def test_official_names_and_shapes_are_those_of_the_published_layout(tmp_path: Path, experts: str, code: str):
    folder = official.checkpoint(tmp_path / "model", experts=experts)
    stored: dict[str, tuple[int, ...]] = {}
    for file in folder.glob("*.safetensors"):
        stored |= {name: tuple(tensor.shape) for name, tensor in load_file(file).items()}
    listed = {}
    for spec in specs(config_of(folder)):
        dtype = {"expert": code, "dense": "F8_E4M3"}.get(spec.kind, "")
        listed[spec.name] = spec.stored_shape(dtype)
        if dtype:
            listed[spec.scale] = spec.scale_shape(dtype)
    assert listed == stored
