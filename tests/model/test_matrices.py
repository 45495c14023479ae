"""What Muon takes of the model: each logically independent matrix, and nothing of the embedding, head and vectors."""

import pytest
import torch

from amalgam.errors import UserError
from amalgam.model import DeepseekV4
from amalgam.model.config import config_of
from amalgam.model.matrices import matrices


def test_flash():
    """The shapes as the paper gives them."""
    with torch.device("meta"):
        model = DeepseekV4(config_of("flash"))
    found = matrices(model)
    layer, csa, mtp = (f"model.{part}." for part in ("layers.0", "layers.2.self_attn.compressor", "mtp.0"))
    assert found[layer + "mlp.experts.gate_up_proj"] == [(2048, 4096)] * 512
    assert found[layer + "mlp.experts.down_proj"] == [(4096, 2048)] * 256
    assert found[layer + "mlp.gate.weight"] == [(256, 4096)]
    assert found[layer + "self_attn.q_b_proj.weight"] == [(32768, 1024)]
    assert found[layer + "self_attn.o_a_proj.weight"] == [(1024, 4096)] * 8
    assert found[layer + "ffn_hc.fn"] == [(4, 16384), (4, 16384), (16, 16384)]
    assert found["model.hc_head.hc_fn"] == [(4, 16384)]
    assert found[csa + "gate_proj.weight"] == [(512, 4096)] * 2
    assert found[csa + "indexer.kv_proj.weight"] == [(128, 4096)] * 2
    assert found[csa + "indexer.scorer.weights_proj.weight"] == [(64, 4096)]
    assert found["model.layers.3.self_attn.compressor.kv_proj.weight"] == [(512, 4096)]
    assert found[mtp + "e_proj.weight"] == [(4096, 4096)]
    parameters = dict(model.named_parameters())
    assert all(sum(n * m for n, m in shapes) == parameters[name].numel() for name, shapes in found.items())
    left = {name for name, p in parameters.items() if p.ndim > 1} - found.keys()
    tables = {name for name in parameters if name.endswith("position_bias")}
    assert left == {"model.embed_tokens.weight", "lm_head.weight"} | tables
    assert not any(parameters[name].ndim < 2 for name in found)


def test_another_model_is_refused():
    with pytest.raises(UserError, match=r"^optimizer\.name: muon is for DeepSeek-V4 alone; give adamw$"):
        matrices(torch.nn.Linear(2, 2))
