"""Configurations: presets, and config.json of both kinds, transformers' and the official one, read without guessing.

transformers fills what a file leaves out with values that are neither Flash's nor Pro's, and reads some keys otherwise
than DeepSeek's code does. Here a key that shapes the model has to be in the file; where the two readings differ, it is
read as DeepSeek's code does, or refused by name. The result means the same to transformers once it is saved.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import DeepseekV4Config

from ..errors import UserError

PRESETS = Path(__file__).parent / "presets"
SWA, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
Weights = Literal["bf16", "fp8", "fp4"]  # how a checkpoint stores matrices: fp4 is FP8 but for the routed experts

_COUNTS = (
    "vocab_size hidden_size moe_intermediate_size num_hidden_layers num_attention_heads head_dim q_lora_rank o_groups "
    "o_lora_rank sliding_window index_n_heads index_head_dim index_topk n_routed_experts num_experts_per_tok hc_mult "
    "hc_sinkhorn_iters max_position_embeddings"
).split()
_NUMBERS = "routed_scaling_factor swiglu_limit hc_eps rms_norm_eps rope_theta compress_rope_theta".split()
# What V4 fixes, or what else is not built here: the allowed values; what a file need not say comes first.
_FIXED: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "n_shared_experts": (1,),
    "tie_word_embeddings": (False,),
    "num_key_value_heads": (1,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
_OFFICIAL_ONLY = ("compress_ratios", "num_hash_layers", "qk_rope_head_dim", "rope_scaling", "topk_method")
_DROPPED = ("architectures", "transformers_version", "quantization_config", "expert_dtype", *_OFFICIAL_ONLY)


def resolve(path_or_preset: str | Path) -> Path:
    """The folder of a checkpoint, or of a preset that ships with the package; UserError names what there is."""
    preset = PRESETS / str(path_or_preset)
    if (preset / "config.json").is_file():
        return preset
    folder = Path(path_or_preset)
    if not (folder / "config.json").is_file():
        names = ", ".join(sorted(p.name for p in PRESETS.iterdir() if p.is_dir()))
        raise UserError(
            f"{path_or_preset}: neither a checkpoint's folder (no config.json) nor a preset; presets: {names}"
        )
    return folder


def config_of(path_or_preset: str | Path) -> DeepseekV4Config:
    """The model that a folder's or preset's config.json describes; UserError names the file and the key.

    How the weights are stored is not part of it (`weights_of`), so that saving the model cannot repeat a stale claim.
    """
    file, values = _read(path_or_preset)
    try:
        return _parsed(values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except Exception as error:  # transformers raises many kinds for values that do not fit
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error


def weights_of(path_or_preset: str | Path) -> Weights:
    """How config.json says that the matrices are stored.

    "fp8" may still mean FP4 experts, which the tensors show: `expert_dtype` was added after the first official files.
    """
    file, values = _read(path_or_preset)
    try:
        return _weights(values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def official_config(config: DeepseekV4Config, weights: Weights = "bf16") -> dict[str, Any]:
    """config.json of the official kind, with weights stored so. UserError for a model that it cannot describe."""
    rates, layers = config.compress_rates or {}, config.layer_types or []
    hashed = [kind == "hash_moe" for kind in config.mlp_layer_types or []]
    if CSA in layers and rates[CSA] != 4:
        raise UserError(f"compress_rates: the official config.json knows CSA with 4 only, not {rates[CSA]}")
    if HCA in layers and rates[HCA] == 4:
        raise UserError("compress_rates: in the official config.json 4 means CSA, so HCA cannot have it")
    if hashed != sorted(hashed, reverse=True):
        raise UserError("mlp_layer_types: in the official config.json the hash layers come first")
    ratio = {SWA: 0, CSA: 4, HCA: rates.get(HCA)}
    parameters: Any = config.rope_parameters
    compress = parameters["compress"]
    yarn = {"type": "yarn", **{key: compress[key] for key in _YARN}} if compress["rope_type"] == "yarn" else None
    fixed = {key: allowed[0] for key, allowed in _FIXED.items()}
    values: dict[str, Any] = fixed | {key: getattr(config, key) for key in (*_COUNTS, *_NUMBERS)}
    values |= {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "compress_ratios": [ratio[kind] for kind in layers] + [0] * config.num_nextn_predict_layers,
        "num_hash_layers": sum(hashed),
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "rope_scaling": yarn,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "torch_dtype": "bfloat16",
    }
    if weights != "bf16":
        values["quantization_config"] = QUANTIZATION
    if weights == "fp4":
        values["expert_dtype"] = "fp4"
    return dict(sorted(values.items()))


def _read(path_or_preset: str | Path) -> tuple[Path, dict[str, Any]]:
    file = resolve(path_or_preset) / "config.json"
    try:
        values = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not JSON: {error.msg}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file}: not JSON: {error}") from error
    kind = values.get("model_type") if isinstance(values, dict) else "not an object"
    if kind != "deepseek_v4":
        raise UserError(f"{file}: model_type: {kind!r} is not built; it must be 'deepseek_v4'")
    return file, values


def _parsed(values: dict[str, Any]) -> DeepseekV4Config:
    _weights(values)
    for key, allowed in _FIXED.items():
        if values.get(key, allowed[0]) not in allowed:
            wanted = " or ".join(json.dumps(value) for value in allowed)
            raise UserError(f"{key}: {json.dumps(values[key])} is not built; it must be {wanted}")
    for key in _COUNTS:
        _positive(values, key, whole=True)
    for key in _NUMBERS:  # a swiglu_limit of 0 is no clamp in DeepSeek's code and a clamp to 0 in transformers'
        _positive(values, key)
    drafts = values.get("num_nextn_predict_layers")
    if drafts not in (0, 1) or isinstance(drafts, bool):
        raise UserError(f"num_nextn_predict_layers: {_told(values, 'num_nextn_predict_layers')}; want 0 or 1")
    layers, rates = _layer_types(values, drafts)
    rope_dim = _rope_dim(values)
    factor = rope_dim / values["head_dim"]
    if int(values["head_dim"] * factor) != rope_dim:  # transformers multiplies again, and rounds down
        factor = math.nextafter(factor, 1.0)
    _consistent(values, rope_dim)
    read: dict[str, Any] = {
        "layer_types": layers,
        "compress_rates": rates,
        "mlp_layer_types": _mlp_layer_types(values),
        "partial_rotary_factor": factor,
        "rope_parameters": _rope(values, factor),
    }
    # transformers' default for this one is Mixtral's balance loss, which is not DeepSeek's.
    others: dict[str, Any] = {"router_aux_loss_coef": 0.0} | values
    return DeepseekV4Config(**{key: value for key, value in others.items() if key not in _DROPPED} | read)


def _told(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "missing"


def _positive(values: Mapping[str, Any], key: str, whole: bool = False, within: str = "") -> None:
    value = values.get(key)
    fits = isinstance(value, int) or (isinstance(value, float) and not whole and math.isfinite(value))
    if isinstance(value, bool) or not fits or not value > 0:  # pyright: ignore[reportOptionalOperand]
        kind = "whole number" if whole else "number"
        raise UserError(f"{within}{key}: {_told(values, key)}; want a {kind} above 0")


def _layer_types(values: Mapping[str, Any], drafts: int) -> tuple[list[str], dict[str, int]]:
    """Layer types and compress rates, from `layer_types` and `compress_rates` or from `compress_ratios`."""
    n = values["num_hidden_layers"]
    if "compress_ratios" not in values:
        if not _is_list_of(values.get("layer_types"), n, (SWA, CSA, HCA)):
            want = f"{n} of {SWA}, {CSA}, {HCA} (or the official compress_ratios)"
            raise UserError(f"layer_types: {_told(values, 'layer_types')}; want {want}")
        rates = values.get("compress_rates")
        if not isinstance(rates, dict) or not set(rates) <= {CSA, HCA}:
            raise UserError(f"compress_rates: {_told(values, 'compress_rates')}; want the ratios of {CSA} and {HCA}")
        for kind in {CSA, HCA} & set(values["layer_types"]):
            _positive(rates, kind, whole=True, within="compress_rates.")
        return list(values["layer_types"]), {CSA: 4, HCA: 128} | rates
    ratios = values["compress_ratios"]
    if not isinstance(ratios, list) or len(ratios) != n + drafts:
        raise UserError(f"compress_ratios: want {n + drafts} entries: {n} layers and {drafts} MTP block(s)")
    if any(not isinstance(r, int) or isinstance(r, bool) or r < 0 for r in ratios) or any(ratios[n:]):
        raise UserError("compress_ratios: want 0, 4 or HCA's ratio for every layer, and 0 for an MTP block")
    heavy = sorted(set(ratios) - {0, 4})
    if len(heavy) > 1:
        raise UserError(f"compress_ratios: {heavy} is not built; at most one ratio other than 0 and 4")
    layers = [{0: SWA, 4: CSA}.get(r, HCA) for r in ratios[:n]]
    rates = {CSA: 4, HCA: heavy[0] if heavy else 128}
    for key, ours in (("layer_types", layers), ("compress_rates", rates)):
        if values.get(key, ours) != ours:
            raise UserError(f"{key}: contradicts compress_ratios")
    return layers, rates


def _mlp_layer_types(values: Mapping[str, Any]) -> list[str]:
    n = values["num_hidden_layers"]
    if "num_hash_layers" not in values:
        if not _is_list_of(values.get("mlp_layer_types"), n, ("hash_moe", "moe")):
            want = f"{n} of hash_moe, moe (or the official num_hash_layers)"
            raise UserError(f"mlp_layer_types: {_told(values, 'mlp_layer_types')}; want {want}")
        return list(values["mlp_layer_types"])
    hashed = values["num_hash_layers"]
    if not isinstance(hashed, int) or isinstance(hashed, bool) or not 0 <= hashed <= n:
        raise UserError(f"num_hash_layers: {_told(values, 'num_hash_layers')}; want 0 to {n}, the number of layers")
    types = ["hash_moe"] * hashed + ["moe"] * (n - hashed)
    if values.get("mlp_layer_types", types) != types:
        raise UserError("mlp_layer_types: contradicts num_hash_layers")
    return types


def _is_list_of(value: Any, length: int, allowed: tuple[str, ...]) -> bool:
    return isinstance(value, list) and len(value) == length and all(each in allowed for each in value)


def _rope_dim(values: Mapping[str, Any]) -> int:
    dim = values.get("qk_rope_head_dim", 0)
    if "qk_rope_head_dim" in values:
        _positive(values, "qk_rope_head_dim", whole=True)
    if values.get("partial_rotary_factor") is not None:
        _positive(values, "partial_rotary_factor")
        share = int(values["head_dim"] * values["partial_rotary_factor"])
        if values.get("qk_rope_head_dim", share) != share:
            raise UserError("partial_rotary_factor: contradicts qk_rope_head_dim")
        dim = share
    elif "qk_rope_head_dim" not in values:
        raise UserError("qk_rope_head_dim: missing; want it, or transformers' partial_rotary_factor")
    if dim < 2 or dim % 2 or dim > values["head_dim"]:
        raise UserError(f"qk_rope_head_dim: {dim}; want an even number, from 2 to head_dim, {values['head_dim']}")
    return dim


def _rope(values: Mapping[str, Any], factor: float) -> dict[str, dict[str, Any]]:
    """`rope_parameters` of transformers: plain in window-only layers; plain or YaRN where a layer compresses."""
    key = "rope_parameters" if values.get("rope_parameters") is not None else "rope_scaling"
    if key not in values:
        raise UserError("rope_scaling: missing; want YaRN's parameters, or null for plain RoPE")
    given = values[key] if values[key] is not None else {}
    if not isinstance(given, dict):
        raise UserError(f"{key}: {_told(values, key)}; want an object")
    nested = {"main": "rope_theta", "compress": "compress_rope_theta"}
    flat = not nested.keys() & given.keys()
    result = {}
    for kind, theta in nested.items():
        part = given if flat and kind == "compress" else given.get(kind, {})
        where = f"{key}." if flat else f"{key}.{kind}."
        if not isinstance(part, dict):
            raise UserError(f"{where.rstrip('.')}: {json.dumps(part)}; want an object")
        name = part.get("rope_type", part.get("type", "default"))
        if name not in (("default",) if kind == "main" else ("default", "yarn")):
            want = "default" if kind == "main" else "default or yarn"
            raise UserError(f"{where}rope_type: {json.dumps(name)} is not DeepSeek-V4's; want {want}")
        ours = {"rope_type": name, "rope_theta": float(values[theta]), "partial_rotary_factor": factor}
        if name == "yarn":
            for each in _YARN:
                _positive(part, each, within=where)
            # V4 never scales cos and sin; transformers would, where a nested entry does not say 1.0.
            ours |= {each: part[each] for each in _YARN} | {"attention_factor": 1.0}
        for each, value in part.items():
            if each != "type" and value is not None and ours.get(each) != value:
                raise UserError(f"{where}{each}: {json.dumps(value)} does not fit; want {json.dumps(ours.get(each))}")
        result[kind] = ours
    return result


def _consistent(values: Mapping[str, Any], rope_dim: int) -> None:
    if values["num_attention_heads"] * values["head_dim"] % values["o_groups"]:
        raise UserError(f"o_groups: {values['o_groups']} does not divide num_attention_heads * head_dim")
    if values["index_head_dim"] < rope_dim:
        raise UserError(f"index_head_dim: {values['index_head_dim']} is less than qk_rope_head_dim, {rope_dim}")
    if values["num_experts_per_tok"] > values["n_routed_experts"]:
        raise UserError(f"num_experts_per_tok: more than n_routed_experts, {values['n_routed_experts']}")


def _weights(values: Mapping[str, Any]) -> Weights:
    given = values.get("quantization_config")
    if given is None:
        if values.get("expert_dtype") is not None:
            raise UserError("quantization_config: missing, but expert_dtype is there")
        return "bf16"
    if not isinstance(given, dict):
        raise UserError(f"quantization_config: {_told(values, 'quantization_config')}; want an object")
    for key, wanted in QUANTIZATION.items():
        if given.get(key, wanted if key in ("fmt", "scale_fmt") else None) != wanted:
            raise UserError(f"quantization_config.{key}: {_told(given, key)} is not built; want {json.dumps(wanted)}")
    experts = values.get("expert_dtype", given.get("expert_dtype"))
    if experts not in (None, "fp8", "fp4"):
        raise UserError(f"expert_dtype: {json.dumps(experts)} is not built; want fp4 or fp8")
    return "fp4" if experts == "fp4" else "fp8"
