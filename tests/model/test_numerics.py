"""What runs in fp32 in a bf16 model, which parameters stay fp32 whoever casts, and transformers' order bit for bit."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV4ForCausalLM

from amalgam.errors import UserError
from amalgam.kernels.swiglu import swiglu
from amalgam.model import DeepseekV4
from amalgam.model.checkpoint import load, save
from amalgam.model.config import CSA, HCA, SWA
from amalgam.model.numerics import with_numerics

from .. import tiny

# Of transformers' list of modules that stay fp32, and the correction bias.
ISLANDS = (
    "attn_hc", "ffn_hc", "hc_head", "sinks", "position_bias", "e_score_correction_bias", "q_a_norm", "kv_norm",
    "input_layernorm", "post_attention_layernorm", "norm",
)  # fmt: skip
YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}
MODELS = {
    "all kinds": {"layer_types": [SWA, CSA, HCA], "index_n_heads": 16},
    "heavy first, odd ratios, YaRN": {
        "layer_types": [HCA, CSA, SWA], "compress_rates": {CSA: 3, HCA: 5}, "index_topk": 2, "index_n_heads": 16,
        "rope_scaling": YARN,
    },
    "window only": {"layer_types": [SWA, SWA, SWA], "sliding_window": 2, "mlp_layer_types": ["moe"] * 3},
}  # fmt: skip
TOKENS = torch.arange(100) * 37 % 512
ALONE = torch.tensor([0, 100])


def bf16(seed: int = 0, **changes) -> DeepseekV4:
    return tiny.model(seed, **changes).to(torch.bfloat16).eval()


@torch.no_grad()
def everything(model: DeepseekV4, tokens: Tensor) -> Tensor:
    return torch.log_softmax(model.logits(model(tokens, torch.tensor([0, len(tokens)])).hidden), -1)


@pytest.mark.parametrize("kind", list(MODELS))
def test_transformers_order_in_bf16(kind: str, tmp_path: Path):
    """Bit-equal on the CPU that this was written on. Other CPUs may split a product otherwise, so a few may differ."""
    save(bf16(**MODELS[kind]), tmp_path / "model")
    oracle = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.bfloat16, experts_implementation="eager"
    ).eval()
    theirs_order = load(tmp_path / "model", torch.bfloat16, numerics="transformers").eval()
    assert theirs_order.numerics == "transformers"
    own_order = load(tmp_path / "model", torch.bfloat16).eval()
    assert own_order.numerics == "deepseek"
    for length in (1, 9, 100):
        tokens = TOKENS[:length]
        with torch.no_grad():
            theirs = torch.log_softmax(oracle(tokens.unsqueeze(0)).logits[0].float(), -1)
        repeated = everything(theirs_order, tokens)
        assert (repeated == theirs).float().mean() > 0.9
        assert (repeated - theirs).abs().mean() < 1e-3
        assert (everything(own_order, tokens) - theirs).abs().mean() > 2e-3
    alone = theirs_order.logprobs(TOKENS, ALONE)
    torch.testing.assert_close(alone[1:], everything(theirs_order, TOKENS)[:-1].gather(1, TOKENS[1:, None]).squeeze(1))
    assert alone[0] == 0


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_orders_agree_in_fp32(kind: str):
    model, same = (tiny.model(0, **MODELS[kind]).eval() for _ in range(2))
    other = with_numerics(same, "transformers")
    assert other.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(everything(other, TOKENS), everything(model, TOKENS), rtol=0, atol=5e-5)
    with torch.no_grad():
        _, cache = other.prefill(TOKENS[:30], torch.tensor([0, 30]), 100)
        hidden = torch.cat([other.decode(TOKENS[t : t + 1], cache).hidden for t in range(30, 60)])
        decoded = torch.log_softmax(other.logits(hidden), -1)
    torch.testing.assert_close(decoded, everything(other, TOKENS)[30:60], rtol=0, atol=5e-5)
    for made in (model, other):
        made.logprobs(TOKENS, ALONE).sum().backward()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_an_unknown_order_is_refused():
    with pytest.raises(UserError, match="numerics: 'hf'; want deepseek or transformers"):
        with_numerics(tiny.model(0), "hf")  # pyright: ignore[reportArgumentType]


def test_ours_is_nearer_to_fp32_than_transformers_order():
    exact, rounded = tiny.model(0).eval(), bf16()
    for one, other in zip(exact.parameters(), rounded.parameters(), strict=True):
        one.data.copy_(other)  # so that only the arithmetic differs
    wanted = everything(exact, TOKENS)
    own = (everything(rounded, TOKENS) - wanted).abs().mean()
    theirs = (everything(with_numerics(rounded, "transformers"), TOKENS) - wanted).abs().mean()
    assert own < 0.8 * theirs


@torch.no_grad()
def test_compressors_run_in_fp32_from_projection_to_pooling():
    """DeepSeek's code casts input and weights up; the waiting rows of a cache are fp32 too."""
    model = bf16()
    compressor: Any = model.get_submodule("model.layers.2.self_attn.compressor")
    x = torch.randn(14, 32).bfloat16()
    values, scores = compressor(x)
    assert values.dtype == scores.dtype == torch.float32
    assert torch.equal(values, x.float() @ compressor.kv_proj.weight.float().T)
    torch.testing.assert_close(scores, x.float() @ compressor.gate_proj.weight.float().T)
    _, cache = model.prefill(TOKENS[:30], torch.tensor([0, 30]), 100)
    assert cache.layers[1]["values"].dtype == cache.layers[1]["index_scores"].dtype == torch.float32
    assert cache.layers[1]["rows"].dtype == cache.layers[1]["index_keys"].dtype == torch.bfloat16


@torch.no_grad()
def test_experts_round_once_before_and_once_after_the_down_projection():
    """The routing weight comes before it, in fp32; slots are added in order, in fp32, then the shared expert."""
    moe: Any = bf16(n_routed_experts=8, num_experts_per_tok=6).get_submodule("model.layers.1.mlp")
    x = 3 * torch.randn(20, 32).bfloat16()
    output, ids = moe(x, TOKENS[:20], None)
    logits = F.linear(x.float(), moe.gate.weight.float())
    affinity = F.softplus(logits).sqrt()
    order = (affinity + moe.gate.e_score_correction_bias).sort(descending=True, stable=True).indices
    assert torch.equal(ids, order[:, :6])
    weights = affinity.gather(1, ids) / affinity.gather(1, ids).sum(1, keepdim=True) * moe.gate.scaling
    shared = moe.shared_experts
    for t in range(20):
        row, total = x[t : t + 1], torch.zeros(1, 32)
        for slot in range(6):
            e = ids[t, slot]
            hidden = weights[t, slot] * swiglu(F.linear(row, moe.experts.gate_up_proj[e]).float(), moe.limit)
            total = total + F.linear(hidden.bfloat16(), moe.experts.down_proj[e]).float()
        hidden = F.silu(shared.gate_proj(row).float().clamp(max=10)) * shared.up_proj(row).float().clamp(-10, 10)
        total = total + shared.down_proj(hidden.bfloat16()).float()
        torch.testing.assert_close(output[t : t + 1], total.bfloat16(), rtol=2**-8, atol=1e-4)


@torch.no_grad()
def test_slots_are_added_in_order():
    """What `experts` sums with: the order shows in the last bits, and is the slots'."""
    outputs = torch.randn(50, 6, 32) * 10 ** torch.randint(-3, 4, (50, 6, 1)).float()
    in_order = outputs[:, 0]
    for slot in range(1, 6):
        in_order = in_order + outputs[:, slot]
    assert torch.equal(outputs.sum(1), in_order)
    assert not torch.equal(outputs.flip(1).sum(1), in_order)


@torch.no_grad()
def test_the_head_multiplies_bf16_operands_and_adds_in_fp32():
    model = bf16()
    hidden = model(TOKENS, ALONE).hidden
    assert hidden.dtype == torch.bfloat16 and model.logits(hidden).dtype == torch.float32
    assert torch.equal(model.logits(hidden), hidden.float() @ model.lm_head.weight.float().T)
    assert not torch.equal(model.logits(hidden), model.logits(hidden).bfloat16().float())
    scores = torch.log_softmax(model.logits(hidden), -1)[:-1].gather(1, TOKENS[1:, None]).squeeze(1)
    torch.testing.assert_close(model.logprobs(TOKENS, ALONE)[1:], scores)


# ---- fp32 islands


def is_island(name: str) -> bool:
    return bool(set(name.split(".")) & set(ISLANDS))


def test_the_islands_are_transformers_own():
    assert set(DeepseekV4ForCausalLM._keep_in_fp32_modules_strict or ()) == set(ISLANDS)


@pytest.mark.parametrize("how", ["bfloat16", "half", "to", "in a wrapper", "with gradients"])
def test_islands_survive_whoever_casts(how: str):
    """With `.bfloat16()`, `.half()` or `.to`, on the model or on a module that holds it."""
    model = tiny.model(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if how == "with gradients":
        model.logprobs(TOKENS, ALONE).sum().backward()
    narrow = torch.float16 if how == "half" else torch.bfloat16
    casts = {
        "bfloat16": model.bfloat16, "half": model.half, "to": lambda: model.to(torch.bfloat16),
        "in a wrapper": lambda: torch.nn.Sequential(model).bfloat16(), "with gradients": model.bfloat16,
    }  # fmt: skip
    casts[how]()
    after = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    kept = [name for name in before if is_island(name)]
    assert len({name.split(".")[-1] for name in kept}) == 10  # fn, base, scale, hc_..., sinks, biases, norms
    for name, was in before.items():
        if is_island(name):
            assert after[name].dtype == torch.float32 and torch.equal(after[name], was), name
        else:
            assert after[name].dtype == (narrow if was.is_floating_point() else torch.int64), name
    assert model.main_frequencies.dtype == model.compress_frequencies.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.dtype == parameter.dtype, name


def test_islands_cast_behind_the_model_are_noticed():
    """DeepSpeed's bf16 section sets every parameter's data, so no module can keep its own."""
    model = tiny.model(0)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    with pytest.raises(ValueError, match="fp32 parameters were cast to bfloat16"):
        model.logprobs(TOKENS, ALONE)


def test_islands_move_and_widen_with_the_rest():
    assert {tensor.device.type for tensor in tiny.model(0).to("meta").state_dict().values()} == {"meta"}
    wide = tiny.model(0).double().state_dict().values()
    assert {tensor.dtype for tensor in wide} == {torch.float64, torch.int64}
