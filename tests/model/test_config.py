"""Presets and config.json of both kinds: what is read means the same everywhere, what would be guessed is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from amalgam.errors import UserError
from amalgam.kernels.rope import inverse_frequencies
from amalgam.model import DeepseekV4, load
from amalgam.model.config import CSA, HCA, PRESETS, SWA, config_of, official_config, weights_of

from .. import tiny

OFFICIAL = ("flash", "flash-base", "pro", "pro-base")


def written(folder: Path, values: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def published(name: str) -> dict[str, Any]:
    return json.loads((PRESETS / name / "config.json").read_text())


def test_schedules_of_the_presets():
    flash, pro = config_of("flash"), config_of("pro")
    assert flash.layer_types == [SWA, SWA, *[CSA, HCA] * 20, CSA]
    assert pro.layer_types == [HCA, HCA, *[CSA, HCA] * 29, CSA]
    for config in (flash, pro):
        assert (config.layer_types or []).count(CSA) == {43: 21, 61: 30}[config.num_hidden_layers]
        assert config.mlp_layer_types == ["hash_moe"] * 3 + ["moe"] * (config.num_hidden_layers - 3)
        assert config.compress_rates == {CSA: 4, HCA: 128} and config.qk_rope_head_dim == 64
        assert config.num_nextn_predict_layers == 1


def test_yarn_of_the_presets():
    """Frequencies below the ramp are plain, above it a 16th; window-only layers have plain RoPE with 10,000."""
    parameters: Any = config_of("flash").rope_parameters
    plain = 160000.0 ** -(torch.arange(0, 64, 2) / 64)
    table = inverse_frequencies(64, parameters["compress"])
    torch.testing.assert_close(table[:16], plain[:16])
    torch.testing.assert_close(table[25:], plain[25:] / 16)
    assert bool(((table < plain) & (table > plain / 16))[16:25].all())
    torch.testing.assert_close(inverse_frequencies(64, parameters["main"]), 10000.0 ** -(torch.arange(0, 64, 2) / 64))
    assert parameters["compress"]["attention_factor"] == 1.0


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_files_are_written_as_they_are_read(name: str):
    assert official_config(config_of(name), weights_of(name)) == published(name)
    assert weights_of(name) == ("fp8" if "base" in name else "fp4")


@pytest.mark.parametrize("name", [*OFFICIAL, "tiny"])
def test_the_saved_configuration_means_the_same_to_transformers(name: str, tmp_path: Path):
    config = config_of(name)
    config.save_pretrained(tmp_path)
    theirs = AutoConfig.from_pretrained(tmp_path).to_dict() | {"_name_or_path": ""}
    assert config_of(tmp_path).to_dict() == theirs == config.to_dict()


def test_a_preset_without_weights_says_so_before_it_takes_memory():
    for name in OFFICIAL:
        with pytest.raises(UserError, match=f"^{name}: .* without weights"):
            load(name)


def test_ratios_other_than_4_and_128(tmp_path: Path):
    values = published("flash") | {"num_hidden_layers": 3, "compress_ratios": [16, 0, 4, 0]}
    config = config_of(written(tmp_path, values))
    assert config.layer_types == [HCA, SWA, CSA] and config.compress_rates == {CSA: 4, HCA: 16}
    assert official_config(config, "fp4") == values
    with torch.device("meta"):
        model = DeepseekV4(config)
    assert model.state_dict()["model.layers.0.self_attn.compressor.position_bias"].shape == (16, 512)


def test_a_rotary_share_that_floats_round_down_stays_exact(tmp_path: Path):
    """int(head_dim * (rope / head_dim)), which transformers computes, is one too few for some pairs."""
    pairs = [(h, r) for h in range(2, 400) for r in range(2, h, 2) if int(h * (r / h)) != r]
    assert pairs
    for head_dim, rope_dim in pairs[:3]:
        values = published("flash") | {"head_dim": head_dim, "qk_rope_head_dim": rope_dim, "index_head_dim": 400}
        assert config_of(written(tmp_path, values)).qk_rope_head_dim == rope_dim


def without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda values: values.pop(key)


def put(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda values: values.update(changes)


YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
REFUSED = {
    "no schedule": (without("compress_ratios"), "layer_types: missing; want 43 of .*compress_ratios"),
    "no hash layers": (without("num_hash_layers"), "mlp_layer_types: missing; want 43 of .*num_hash_layers"),
    "no rotary share": (without("qk_rope_head_dim"), "qk_rope_head_dim: missing"),
    "no scaling": (without("rope_scaling"), "rope_scaling: missing; want YaRN's parameters, or null"),
    "no MTP count": (without("num_nextn_predict_layers"), "num_nextn_predict_layers: missing; want 0 or 1"),
    "no top-k": (without("index_topk"), "index_topk: missing; want a whole number above 0"),
    "three MTP blocks": (put(num_nextn_predict_layers=3), "num_nextn_predict_layers: 3; want 0 or 1"),
    "a fractional width": (put(hidden_size=4096.0), "hidden_size: 4096.0; want a whole number"),
    "a true width": (put(hidden_size=True), "hidden_size: true; want a whole number"),
    "an infinite number": (put(hc_eps=float("inf")), "hc_eps: Infinity; want a number above 0"),
    "no clamp": (put(swiglu_limit=0), "swiglu_limit: 0; want a number above 0"),
    "unnormalized weights": (put(norm_topk_prob=False), "norm_topk_prob: false is not built; it must be true"),
    "two shared experts": (put(n_shared_experts=2), "n_shared_experts: 2 is not built; it must be 1"),
    "another choice": (put(topk_method="greedy"), "topk_method: \"greedy\" is not built"),
    "a ratio too few": (lambda v: v["compress_ratios"].pop(), "compress_ratios: want 44 entries: 43 layers and 1 MTP"),
    "a compressing MTP block": (lambda v: v["compress_ratios"].__setitem__(-1, 4), "compress_ratios: .* 0 for an MTP"),
    "three ratios": (lambda v: v["compress_ratios"].__setitem__(0, 16), r"compress_ratios: \[16, 128\] is not built"),
    "a ratio that is no number": (lambda v: v["compress_ratios"].__setitem__(0, "4"), "compress_ratios: want 0, 4"),
    "two schedules": (put(layer_types=[SWA] * 43), "layer_types: contradicts compress_ratios"),
    "two rates": (put(compress_rates={CSA: 4, HCA: 16}), "compress_rates: contradicts compress_ratios"),
    "two hash counts": (put(mlp_layer_types=["moe"] * 43), "mlp_layer_types: contradicts num_hash_layers"),
    "too many hash layers": (put(num_hash_layers=44), "num_hash_layers: 44; want 0 to 43"),
    "two rotary shares": (put(partial_rotary_factor=0.5), "partial_rotary_factor: contradicts qk_rope_head_dim"),
    "an odd rotary share": (put(qk_rope_head_dim=63), "qk_rope_head_dim: 63; want an even number"),
    "a scaled cosine": (put(rope_scaling=YARN | {"mscale": 1.0}), "rope_scaling.mscale: 1.0 does not fit"),
    "an attention factor": (put(rope_scaling=YARN | {"attention_factor": 1.3}), "attention_factor: 1.3 .*; want 1.0"),
    "half a YaRN": (put(rope_scaling={"type": "yarn", "factor": 16}), "original_max_position_embeddings: missing"),
    "another scaling": (put(rope_scaling={"type": "linear", "factor": 2}), "rope_scaling.rope_type: \"linear\" is not"),
    "YaRN in window-only layers": (
        put(rope_parameters={"main": YARN, "compress": YARN}), "rope_parameters.main.rope_type: \"yarn\" is not",
    ),
    "two thetas": (
        put(rope_parameters={"main": {"rope_theta": 500.0}, "compress": {}}), "rope_parameters.main.rope_theta: 500.0",
    ),
    "a scaling that is no object": (put(rope_scaling="yarn"), "rope_scaling: \"yarn\"; want an object"),
    "groups that do not divide": (put(o_groups=7), "o_groups: 7 does not divide"),
    "narrow index heads": (put(index_head_dim=32), "index_head_dim: 32 is less than qk_rope_head_dim, 64"),
    "more chosen than there": (put(num_experts_per_tok=300), "num_experts_per_tok: more than n_routed_experts, 256"),
    "experts without a format": (without("quantization_config"), "quantization_config: missing, but expert_dtype"),
    "experts in int4": (put(expert_dtype="int4"), "expert_dtype: \"int4\" is not built"),
    "static activations": (
        put(quantization_config=FP8 | {"activation_scheme": "static"}),
        "quantization_config.activation_scheme: \"static\" is not built",
    ),
    "other blocks": (put(quantization_config=FP8 | {"weight_block_size": [1, 32]}), "weight_block_size: .* is not"),
    "another method": (put(quantization_config={"quant_method": "awq"}), "quant_method: \"awq\" is not built"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_would_be_guessed_is_refused_by_name(tmp_path: Path, case: str):
    spoil, message = REFUSED[case]
    values = published("flash")
    spoil(values)
    with pytest.raises(UserError, match=message) as caught:
        config_of(written(tmp_path, values))
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ") and "\n" not in str(caught.value)


def test_transformers_kind_needs_its_keys_too(tmp_path: Path):
    for key in ("layer_types", "compress_rates", "mlp_layer_types", "rope_parameters", "num_hidden_layers"):
        values = tiny.config().to_dict()
        del values[key]
        with pytest.raises(UserError, match=f"{key}|rope_scaling"):
            config_of(written(tmp_path, values))
    nested = tiny.config().to_dict()
    nested["rope_parameters"]["compress"] |= {k: v for k, v in YARN.items() if k != "type"} | {"rope_type": "yarn"}
    parameters: Any = config_of(written(tmp_path, nested)).rope_parameters
    assert parameters["compress"]["attention_factor"] == 1.0  # transformers would compute 1.277 where none is given


def test_models_that_the_official_kind_cannot_describe():
    official = {"compress_rates": {CSA: 4, HCA: 16}}
    assert official_config(tiny.config(**official))["compress_ratios"] == [0, 4, 16]
    for changes, message in (
        ({"compress_rates": {CSA: 3, HCA: 16}}, "CSA with 4 only, not 3"),
        ({"compress_rates": {CSA: 4, HCA: 4}}, "HCA cannot have it"),
        (official | {"mlp_layer_types": ["moe", "hash_moe", "moe"]}, "hash layers come first"),
    ):
        with pytest.raises(UserError, match=message):
            official_config(tiny.config(**changes))
