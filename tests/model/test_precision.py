"""Quantization-aware training in the model: what is rounded and how, gradients, and no difference by cache or pack."""

import pytest
import torch
from torch import Tensor

from amalgam.errors import UserError
from amalgam.kernels import cache_formats, formats
from amalgam.kernels.hadamard import hadamard
from amalgam.model import DeepseekV4
from amalgam.model.attention import Attention, Indexer
from amalgam.model.checkpoint import load, save
from amalgam.model.deepseek_v4 import Experts
from amalgam.model.precision import set_precision, store_weights, stored_weights
from amalgam.settings import FULL, Precision

from .. import tiny
from ..tiny import CSA, HCA, SWA

V4 = Precision(experts="fp4", indexer="fp4", kv="fp8")
ALL = Precision(experts="fp4", linear="fp8", indexer="fp4", kv="fp8")
WEIGHTS = [Precision(experts="fp4"), Precision(experts="fp8"), Precision(linear="fp8")]
STORAGE = [Precision(indexer="fp4"), Precision(kv="fp8")]
SIZES = {"moe_intermediate_size": 32, "index_head_dim": 32, "index_topk": 3}


def model(precision: Precision = FULL, seed: int = 0, **changes) -> DeepseekV4:
    made = tiny.model(seed, **(SIZES | changes))
    set_precision(made, precision)
    return made


def attention(made: DeepseekV4, layer: int = 0) -> Attention:
    return made.get_submodule(f"model.layers.{layer}.self_attn")  # pyright: ignore[reportReturnType]


def indexer(made: DeepseekV4) -> Indexer:
    return made.get_submodule("model.layers.0.self_attn.compressor.indexer")  # pyright: ignore[reportReturnType]


def experts(made: DeepseekV4, layer: int = 2) -> Experts:
    return made.get_submodule(f"model.layers.{layer}.mlp.experts")  # pyright: ignore[reportReturnType]


def pack(lengths=(1, 2, 5, 13, 14, 40, 61)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 512, (sum(lengths),), generator=generator), torch.tensor([0, *lengths]).cumsum(0).int()


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-5, but for few: fp32 rounding of another batch's shape can turn a value on a border between codes."""
    difference = (ours - theirs).abs()
    assert (difference > 1e-5).any(-1).double().mean() <= 0.05
    assert difference.max() < 0.1


def gradients(made: DeepseekV4) -> dict[str, Tensor]:
    made.zero_grad()
    made.logprobs(*pack()).square().sum().backward()
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


@torch.no_grad()
@pytest.mark.parametrize("precision", [*WEIGHTS, *STORAGE, V4], ids=str)
def test_every_part_takes_effect_alone(precision: Precision):
    full, low = model().logprobs(*pack()), model(precision).logprobs(*pack())
    assert low.isfinite().all() and 1e-3 < (low - full).abs().max() < 3
    made = model(precision)
    set_precision(made, FULL)
    assert torch.equal(made.logprobs(*pack()), full)


def test_experts_are_their_fp4_values_and_masters_get_the_gradient_of_those():
    """A model whose weights hold the FP4 values is the same model: same log-probs, same gradients, bit for bit."""
    masters, stored = model(V4), model(V4)
    state = {name: p for name, p in stored.named_parameters() if ".experts." in name}
    assert len(state) == 2 * 3
    with torch.no_grad():
        for weight in state.values():
            packed, scales = formats.quantize_fp4(weight)
            weight.copy_(formats.dequantize_fp8(*formats.fp4_to_fp8(packed, scales)))
    assert torch.equal(masters.logprobs(*pack()), stored.logprobs(*pack()))
    ours, theirs = gradients(masters), gradients(stored)
    assert ours.keys() == theirs.keys() and ours.keys() >= state.keys()
    for name, gradient in theirs.items():
        assert torch.equal(ours[name], gradient), name
    assert not torch.equal(experts(masters).down_proj, experts(stored).down_proj)


def test_rounded_rows_pass_the_gradient_straight_through(monkeypatch: pytest.MonkeyPatch):
    """kv: a model with one layer whose rows are handed in rounded, with the rounding's difference as a constant."""
    made = model(Precision(kv="fp8"), layer_types=[SWA], num_hidden_layers=1, mlp_layer_types=["hash_moe"])
    ours = gradients(made)

    def straight_through(rows: Tensor, rotation: Tensor, storage: str) -> Tensor:
        assert storage == "fp8" and rotation.shape[1] == 4
        plain, rope = rows.split([8, 8], dim=-1)
        return torch.cat([plain + (formats.round_fp8(plain, (1, 64)) - plain).detach(), rope], dim=-1)

    monkeypatch.setattr("amalgam.model.attention.stored", straight_through)
    for name, gradient in gradients(made).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_the_cache_holds_what_the_byte_formats_hold():
    """The first layer's rows and keys, whose inputs no rounding has touched, through 584-byte-like entries and back."""
    kinds = {"layer_types": [CSA, HCA], "num_hidden_layers": 2, "mlp_layer_types": ["hash_moe", "moe"]}
    tokens, cu = pack((40, 23))
    full, low = (model(p, **kinds).prefill(tokens, cu, 64)[1].layers[0] for p in (FULL, V4))
    rows, kept = full["rows"].flatten(0, 1), low["rows"].flatten(0, 1)
    entries = cache_formats.unpack_cache_entries(cache_formats.pack_cache_entries(rows, 8), 16, 8, torch.float32)
    assert torch.equal(kept[:, :8], entries[:, :8]) and torch.equal(kept[:, 8:], rows[:, 8:])
    keys = hadamard(full["index_keys"]).flatten(0, 1)
    packed = cache_formats.pack_index_keys(keys)
    assert packed.shape[1] == 17
    assert torch.equal(low["index_keys"].flatten(0, 1), cache_formats.unpack_index_keys(packed, 32, torch.float32))
    for name in ("values", "scores", "index_values", "index_scores"):  # what is not compressed yet stays as it is
        assert torch.equal(low[name], full[name])


@torch.no_grad()
def test_the_index_score_is_of_rotated_fp4_vectors():
    full, low = (indexer(model(p, layer_types=[CSA] * 3)) for p in (FULL, V4))
    x, latent = torch.randn(9, 32), torch.randn(9, 16)
    rotation = torch.polar(torch.ones(9, 4), torch.randn(9, 4))
    q, weights = full.queries(x, latent, rotation)
    rounded, same = low.queries(x, latent, rotation)
    stored = formats.dequantize_fp4(*formats.quantize_fp4(hadamard(q)))
    assert torch.equal(rounded, stored) and torch.equal(weights, same)
    assert low.score_dtype == torch.bfloat16
    assert float((rounded - hadamard(q)).norm() / q.norm()) < 0.2


@torch.no_grad()
@pytest.mark.parametrize("precision", [WEIGHTS[0], *STORAGE, ALL], ids=str)
def test_a_learner_s_pack_equals_alone_and_a_sampler_s_chunks_and_steps(precision: Precision):
    made, sampler = model(precision), model(precision)
    store_weights(sampler)
    tokens, cu = pack()
    output = made(tokens, cu)
    together = torch.log_softmax(made.logits(output.hidden), -1)
    ours, theirs = [], []
    for start, end in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        document = tokens[start:end]
        alone = made(document, torch.tensor([0, end - start])).hidden
        prompt = 1 + (end - start) // 3
        output, cache = sampler.prefill(document[:prompt], torch.tensor([0, prompt]), 64)
        steps = [output.hidden[-1:], *(sampler.decode(token.view(1), cache).hidden for token in document[prompt:])]
        ours += [alone, *steps]
        theirs += [together[start:end], together[start + prompt - 1 : end]]
    assert_near(torch.log_softmax(made.logits(torch.cat(ours)), -1), torch.cat(theirs))


@torch.no_grad()
@pytest.mark.parametrize("precision", [*WEIGHTS, ALL], ids=str)
def test_stored_weights_give_the_learner_s_bits(precision: Precision):
    learner, sampler = model(precision), model(precision)
    store_weights(sampler)
    expected = learner.logprobs(*pack())
    assert torch.equal(sampler.logprobs(*pack()), expected)
    store_weights(sampler)  # nothing is left to do
    sampler.bfloat16().float()  # only what is no code is cast
    for name, stored in stored_weights(sampler).items():
        again = stored_weights(sampler)[name].state_dict()
        assert all(torch.equal(tensor, again[part]) for part, tensor in stored.state_dict().items())
    with pytest.raises(ValueError, match="the model's weights are stored in low precision"):
        set_precision(sampler, FULL)


@torch.no_grad()
def test_what_is_stored_takes_the_place_of_masters():
    """Half a byte a number of experts and a byte a group of 32; a byte a number of what is FP8."""
    made, full = model(ALL), model()
    masters = {name: p.clone() for name, p in made.named_parameters()}
    store_weights(made)
    stored = stored_weights(made)
    assert len(stored) == 3 * (2 + 3 + 5) + 1  # of each layer's experts, shared expert and attention; of an indexer
    assert masters.keys() - dict(made.named_parameters()).keys() == stored.keys()
    for name, module in stored.items():
        sizes = {part: tensor.numel() for part, tensor in module.named_buffers()}
        numbers = masters[name].numel()
        if ".experts." in name:
            assert sizes["packed"] == numbers // 2 and sizes["groups"] == numbers // 32
            assert torch.equal(module.experts().packed.flatten(), formats.quantize_fp4(masters[name])[0].flatten())  # pyright: ignore
        elif "o_a_proj" not in name:
            assert sizes["codes"] == numbers
    store_weights(full)
    assert not stored_weights(full)


def test_load_takes_a_precision_and_refuses_sizes_that_do_not_fit(tmp_path):
    save(model(), tmp_path / "fits")
    loaded = load(tmp_path / "fits", precision=V4)
    assert loaded.precision == V4
    with torch.no_grad():
        assert torch.equal(loaded.logprobs(*pack()), model(V4).logprobs(*pack()))
    stored, expected = load(tmp_path / "fits", precision=V4, stored=True), model(V4)
    store_weights(expected)
    for name, tensor in stored.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    assert len(stored_weights(stored)) == 2 * 3 and not any(p.requires_grad for p in stored.parameters())
    save(loaded, tmp_path / "again")  # the masters, not what is stored of them
    for name, tensor in load(tmp_path / "again").state_dict().items():
        assert torch.equal(tensor, model().state_dict()[name])
    save(model(moe_intermediate_size=24), tmp_path / "narrow")
    save(model(index_head_dim=24), tmp_path / "odd")
    with pytest.raises(UserError, match=r"narrow/config.json: moe_intermediate_size: 24 is no multiple of 32, which"):
        load(tmp_path / "narrow", precision=V4)
    with pytest.raises(UserError, match=r"odd/config.json: index_head_dim: 24 is no power of two, which precision"):
        load(tmp_path / "odd", precision=V4)
    load(tmp_path / "odd", precision=Precision(experts="fp4", kv="fp8"))
    with pytest.raises(ValueError, match="index_head_dim: 24"):
        set_precision(load(tmp_path / "odd"), V4)
