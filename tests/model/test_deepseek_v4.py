"""The model against transformers' own DeepSeek-V4, and against itself: packed, alone, and decoded from the cache."""

import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV4Config

from amalgam.model import DeepseekV4, initialize, load, save

SWA, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"


def tiny(layers: tuple[str, ...], **changes) -> DeepseekV4Config:
    fields = {
        "vocab_size": 61, "hidden_size": 24, "moe_intermediate_size": 16, "num_hidden_layers": len(layers),
        "num_attention_heads": 4, "head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 12, "o_groups": 2,
        "o_lora_rank": 8, "sliding_window": 5, "layer_types": list(layers), "compress_rates": {CSA: 4, HCA: 7},
        "index_n_heads": 16, "index_head_dim": 12, "index_topk": 3, "n_routed_experts": 6, "num_experts_per_tok": 2,
        "mlp_layer_types": ["hash_moe"] + ["moe"] * (len(layers) - 1), "hc_sinkhorn_iters": 3,
        "num_nextn_predict_layers": 0, "initializer_range": 0.15, "max_position_embeddings": 4096,
    }  # fmt: skip
    return DeepseekV4Config(**(fields | changes))


def random_model(config: DeepseekV4Config, seed: int = 0) -> DeepseekV4:
    """A model whose every tensor is random: sinks, biases, norms and correction biases too."""
    model = initialize(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if (tensor.dim() == 1 or "position_bias" in name) and "frequencies" not in name:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


MODELS = {
    "all kinds": (tiny((SWA, CSA, HCA, CSA)), 2e-5),
    "heavy first": (tiny((HCA, HCA, CSA), compress_rates={CSA: 3, HCA: 5}, index_topk=2), 2e-5),
    "window only": (tiny((SWA, SWA), sliding_window=1), 2e-5),
    "sparse only": (tiny((CSA, CSA), index_topk=1, sliding_window=9, hc_sinkhorn_iters=20), 2e-5),
    "yarn": (
        tiny(
            (SWA, CSA, HCA),
            rope_scaling={
                "type": "yarn", "factor": 4, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1,
            },
        ),
        2e-5,
    ),
}  # fmt: skip
LENGTHS = (1, 2, 4, 5, 6, 13, 14, 15, 40, 77)


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> DeepseekV4:
    return random_model(MODELS[request.param][0])


def documents(model: DeepseekV4, lengths=LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, model.config.vocab_size, (n,), generator=generator) for n in lengths]


def borders(docs: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([0, *(len(d) for d in docs)]).cumsum(0).int()


@torch.no_grad()
def test_agrees_with_transformers(model: DeepseekV4, tmp_path: Path):
    """fp32, unpadded single sequences, log-probs of every token; the oracle reads the checkpoint that we wrote."""
    save(model, tmp_path / "model")
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    for tokens in documents(model):
        ours = model.logits(model(tokens, borders([tokens])).hidden)
        theirs = oracle(tokens.unsqueeze(0)).logits[0]
        difference = torch.log_softmax(ours, -1) - torch.log_softmax(theirs, -1)
        assert difference.abs().max() < 1e-4


@torch.no_grad()
def test_packed_equals_alone(model: DeepseekV4):
    docs = documents(model)
    packed = model.logprobs(torch.cat(docs), borders(docs)).split([len(d) for d in docs])
    for tokens, together in zip(docs, packed, strict=True):
        alone = model.logprobs(tokens, borders([tokens]))
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
        assert together[0] == 0


@torch.no_grad()
def test_decoding_from_the_cache_equals_the_full_forward(model: DeepseekV4):
    """Ragged prompts; requests end at different times, and the cache is repacked as they do."""
    docs = [d for d in documents(model) if len(d) > 1]
    full = model(torch.cat(docs), borders(docs))
    starts = borders(docs)[:-1].tolist()
    prompts = [max(1, len(d) // 3) for d in docs]
    prefix = [d[:n] for d, n in zip(docs, prompts, strict=True)]
    output, cache = model.prefill(torch.cat(prefix), borders(prefix), max(LENGTHS))
    ends = borders(prefix)[1:].long() - 1
    torch.testing.assert_close(
        output.hidden[ends],
        full.hidden[torch.tensor([s + n - 1 for s, n in zip(starts, prompts, strict=True)])],
        rtol=1e-5,
        atol=1e-5,
    )
    alive = list(range(len(docs)))
    for step in itertools.count():
        keep = [i for i, r in enumerate(alive) if prompts[r] + step < len(docs[r])]
        alive = [alive[i] for i in keep]
        if not alive:
            break
        cache = cache.select(torch.tensor(keep))
        output = model.decode(torch.stack([docs[r][prompts[r] + step] for r in alive]), cache)
        at = torch.tensor([starts[r] + prompts[r] + step for r in alive])
        difference = torch.log_softmax(model.logits(output.hidden), -1) - torch.log_softmax(
            model.logits(full.hidden[at]), -1
        )
        assert difference.abs().max() < 1e-5
        assert torch.equal(output.experts, full.experts[at])


def test_gradients_do_not_depend_on_packing(model: DeepseekV4):
    docs = [d for d in documents(model) if len(d) > 1]
    (-model.logprobs(torch.cat(docs), borders(docs)).sum()).backward()
    packed = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    for tokens in docs:
        (-model.logprobs(tokens, borders([tokens])).sum()).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(packed[name], p.grad, rtol=1e-4, atol=1e-4, msg=name)
        else:
            assert "indexer" in name and p.grad is None


@torch.no_grad()
def test_replay_forces_recorded_experts(model: DeepseekV4):
    docs = documents(model)
    tokens, cu = torch.cat(docs), borders(docs)
    own = model(tokens, cu)
    torch.testing.assert_close(model(tokens, cu, replay=own.experts).hidden, own.hidden)
    torch.testing.assert_close(model(tokens, cu, replay=torch.full_like(own.experts, -1)).hidden, own.hidden)
    other = model(tokens, cu, replay=(own.experts + 1) % model.config.n_routed_experts).experts
    hashed = [kind == "hash_moe" for kind in model.config.mlp_layer_types or []]
    for layer, is_hashed in enumerate(hashed):
        same = torch.equal(other[:, layer], own.experts[:, layer])
        assert same == is_hashed  # a hash layer's table cannot be overruled


@torch.no_grad()
def test_exact_ties_in_the_indexer_do_not_depend_on_the_cache():
    """With two heads ReLU scores often tie exactly; prefill and decoding must break ties alike."""
    model = random_model(tiny((CSA, CSA), index_n_heads=2, index_topk=2))
    (tokens,) = documents(model, (90,))
    full = model.logits(model(tokens, borders([tokens])).hidden)
    output, cache = model.prefill(tokens[:9], borders([tokens[:9]]), 90)
    for t in range(9, 90):
        output = model.decode(tokens[t : t + 1], cache)
        torch.testing.assert_close(model.logits(output.hidden)[0], full[t], rtol=1e-4, atol=1e-4)


def test_bad_packs_are_refused():
    model = random_model(tiny((SWA,)))
    for cu in ([0, 3], [0, 2, 2, 4], [1, 4], [0]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            model(torch.zeros(4, dtype=torch.long), torch.tensor(cu))
    with pytest.raises(ValueError, match="would hold 4 tokens, there is room for 3"):
        model.prefill(torch.zeros(4, dtype=torch.long), torch.tensor([0, 4]), 3)
    _, cache = model.prefill(torch.zeros(4, dtype=torch.long), torch.tensor([0, 4]), 4)
    with pytest.raises(ValueError, match="full"):
        model.decode(torch.zeros(1, dtype=torch.long), cache)


def test_dtype_keeps_the_fp32_islands(tmp_path: Path):
    save(random_model(tiny((SWA, CSA, HCA))), tmp_path / "model")
    state = load(tmp_path / "model", dtype=torch.bfloat16).state_dict()
    assert state["model.layers.1.self_attn.q_a_proj.weight"].dtype == torch.bfloat16
    for name in ("attn_hc.fn", "self_attn.sinks", "self_attn.compressor.position_bias", "self_attn.kv_norm.weight"):
        assert state[f"model.layers.1.{name}"].dtype == torch.float32
    assert state["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert state["model.layers.0.mlp.gate.tid2eid"].dtype == torch.int64


def test_the_hash_table_is_balanced_and_distinct():
    table = initialize(tiny((SWA,), vocab_size=60), 5).state_dict()["model.layers.0.mlp.gate.tid2eid"]
    assert all(len(set(row)) == 2 for row in table.tolist())
    assert torch.bincount(table.flatten(), minlength=6).tolist() == [20] * 6
