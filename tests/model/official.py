"""A DeepSeek-V4 checkpoint as DeepSeek publishes it, in small: names, dtypes, scales, shards and config.json.

Written from the published layout alone, not from our table of names, so that the two can be compared.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

# d and the latent are no multiples of 128: some FP8 tiles are cut off.
D, VOCABULARY, HEADS, DIM, LATENT, GROUPS, O_RANK, EXPERTS, INNER, STREAMS = 160, 512, 4, 32, 96, 2, 48, 3, 64, 2
INDEX_HEADS, INDEX_DIM, RATIOS, HASHED = 16, 16, (0, 4, 128), 1
CONFIG = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "vocab_size": VOCABULARY, "hidden_size": D,
    "moe_intermediate_size": INNER, "num_hidden_layers": len(RATIOS), "num_attention_heads": HEADS,
    "num_key_value_heads": 1, "head_dim": DIM, "qk_rope_head_dim": 8, "q_lora_rank": LATENT, "o_groups": GROUPS,
    "o_lora_rank": O_RANK, "sliding_window": 6, "compress_ratios": [*RATIOS, 0], "index_n_heads": INDEX_HEADS,
    "index_head_dim": INDEX_DIM, "index_topk": 4, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "num_hash_layers": HASHED, "hc_mult": STREAMS, "hc_sinkhorn_iters": 3, "hc_eps": 1e-6,
    "routed_scaling_factor": 1.5, "norm_topk_prob": True, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc",
    "swiglu_limit": 10.0, "rms_norm_eps": 1e-6, "rope_theta": 10000, "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1,
    },
    "max_position_embeddings": 1048576, "num_nextn_predict_layers": 1, "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "bos_token_id": 0, "eos_token_id": 1,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}  # fmt: skip


class Maker:
    """Random tensors. `wild`: every code and every scale but NaN; else numbers as a model has them."""

    def __init__(self, seed: int, wild: bool):
        self.generator, self.wild = torch.Generator().manual_seed(seed), wild

    def _bytes(self, shape: tuple[int, ...], low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=self.generator)

    def _scales(self, *shape: int) -> Tensor:
        return self._bytes(shape, *((0, 255) if self.wild else (119, 122))).view(torch.float8_e8m0fnu)

    def fp4(self, name: str, rows: int, columns: int) -> dict[str, Tensor]:
        codes = self._bytes((rows, columns // 2), 0, 256).view(torch.int8)
        return {f"{name}.weight": codes, f"{name}.scale": self._scales(rows, columns // 32)}

    def fp8(self, name: str, rows: int, columns: int) -> dict[str, Tensor]:
        codes = self._bytes((rows, columns), 0, 256)
        if not self.wild:
            codes = torch.randn(rows, columns, generator=self.generator).to(torch.float8_e4m3fn)
        codes, scales = codes.view(torch.float8_e4m3fn), self._scales(-(-rows // 128), -(-columns // 128))
        return {f"{name}.weight": codes, f"{name}.scale": scales}

    def float(self, *shape: int, mean: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (mean + 0.1 * torch.randn(shape, generator=self.generator)).to(dtype)

    def norm(self, name: str, size: int) -> dict[str, Tensor]:
        return {f"{name}.weight": self.float(size, mean=1.0, dtype=torch.bfloat16)}

    def wide(self, name: str, *shape: int) -> dict[str, Tensor]:
        return {f"{name}.weight": self.float(*shape, dtype=torch.bfloat16)}

    def table(self) -> Tensor:
        order = torch.rand(VOCABULARY, EXPERTS, generator=self.generator).argsort(1)
        return order[:, :2].contiguous()


def tensors(seed: int, experts: str, wild: bool) -> Iterator[dict[str, Tensor]]:
    """Those of the embedding, of each layer, of the MTP block, of the head."""
    make = Maker(seed, wild)
    yield make.wide("embed", VOCABULARY, D)
    for i, ratio in enumerate(RATIOS):
        layer = _block(make, experts, ratio)
        if i < HASHED:
            layer["ffn.gate.tid2eid"] = make.table()
        else:
            layer["ffn.gate.bias"] = make.float(EXPERTS)
        yield {f"layers.{i}.{name}": tensor for name, tensor in layer.items()}
    block = _block(make, experts, 0) | {"ffn.gate.bias": make.float(EXPERTS)} | _head(make)
    block |= make.fp8("e_proj", D, D) | make.fp8("h_proj", D, D) | make.norm("enorm", D) | make.norm("hnorm", D)
    yield {f"mtp.0.{name}": tensor for name, tensor in block.items()}
    yield _head(make) | make.wide("head", VOCABULARY, D)


def _head(make: Maker) -> dict[str, Tensor]:
    wide = {"hc_head_fn": make.float(STREAMS, STREAMS * D), "hc_head_base": make.float(STREAMS)}
    return make.norm("norm", D) | wide | {"hc_head_scale": make.float(1)}


def _block(make: Maker, experts: str, ratio: int) -> dict[str, Tensor]:
    found = make.norm("attn_norm", D) | make.norm("ffn_norm", D)
    for site in ("attn", "ffn"):
        mixes = (2 + STREAMS) * STREAMS
        found[f"hc_{site}_fn"] = make.float(mixes, STREAMS * D)
        found[f"hc_{site}_base"] = make.float(mixes)
        found[f"hc_{site}_scale"] = make.float(3)
    found |= make.fp8("attn.wq_a", LATENT, D) | make.norm("attn.q_norm", LATENT)
    found |= make.fp8("attn.wq_b", HEADS * DIM, LATENT)
    found |= make.fp8("attn.wkv", DIM, D) | make.norm("attn.kv_norm", DIM)
    found |= make.fp8("attn.wo_a", GROUPS * O_RANK, HEADS * DIM // GROUPS) | make.fp8("attn.wo_b", D, GROUPS * O_RANK)
    found["attn.attn_sink"] = make.float(HEADS)
    if ratio:
        found |= _compressor(make, "attn.compressor", DIM, ratio)
    if ratio == 4:
        found |= make.fp8("attn.indexer.wq_b", INDEX_HEADS * INDEX_DIM, LATENT)
        found |= make.wide("attn.indexer.weights_proj", INDEX_HEADS, D)
        found |= _compressor(make, "attn.indexer.compressor", INDEX_DIM, ratio)
    for name, shape in {"w1": (INNER, D), "w2": (D, INNER), "w3": (INNER, D)}.items():
        for expert in range(EXPERTS):
            matrix = make.fp4 if experts == "fp4" else make.fp8
            found |= matrix(f"ffn.experts.{expert}.{name}", *shape)
        found |= make.fp8(f"ffn.shared_experts.{name}", *shape)
    return found | make.wide("ffn.gate", EXPERTS, D)


def _compressor(make: Maker, name: str, dim: int, ratio: int) -> dict[str, Tensor]:
    channels = 2 * dim if ratio == 4 else dim
    found = make.wide(f"{name}.wkv", channels, D) | make.wide(f"{name}.wgate", channels, D)
    return found | {f"{name}.ape": make.float(ratio, channels)} | make.norm(f"{name}.norm", dim)


def checkpoint(folder: Path, seed: int = 0, experts: str = "fp4", wild: bool = False) -> Path:
    """Six shards with their index: FP4 experts as in the instruct models, or FP8 as in the base models."""
    folder.mkdir(parents=True)
    parts = list(tensors(seed, experts, wild))
    weight_map = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-{len(parts):05}.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG | ({"expert_dtype": "fp4"} if experts == "fp4" else {})))
    return folder
