"""The MTP block against transformers' own layer, packed and from its cache, and where its gradient goes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from amalgam.kernels.losses import packed_logprobs
from amalgam.model import DeepseekV4, load, save
from amalgam.model.mtp import extend_mtp, mtp_block, mtp_cache, mtp_hidden, mtp_logprobs

from .. import tiny
from ..tiny import SWA
from .test_cache import borders, random_documents


def made(seed: int = 0, **changes) -> DeepseekV4:
    return tiny.model(seed, **({"num_nextn_predict_layers": 1, "vocab_size": 61} | changes)).eval()


LENGTHS = [1, 2, 3, 9, 40, 2, 17]


def test_names():
    model = made()
    names = {n.removeprefix("model.mtp.0.") for n, _ in model.named_parameters() if ".mtp." in n}
    swa = {n.removeprefix("model.layers.0.") for n, _ in model.named_parameters() if n.startswith("model.layers.0.")}
    own = {f"{n}.weight" for n in ("e_proj", "h_proj", "enorm", "hnorm", "norm")}
    assert names == swa | own | {f"hc_head.hc_{n}" for n in ("fn", "base", "scale")}
    assert "model.mtp.0.mlp.gate.e_score_correction_bias" in model.state_dict()
    assert not any("mtp" in n for n in made(num_nextn_predict_layers=0).state_dict())
    with pytest.raises(ValueError, match="num_nextn_predict_layers: 2 is not built"):
        made(num_nextn_predict_layers=2)
    with pytest.raises(ValueError, match="no MTP block"):
        mtp_hidden(made(num_nextn_predict_layers=0), torch.zeros(1, 2, 32), torch.zeros(1, 32), torch.tensor([0, 1]))


@torch.no_grad()
def test_it_travels_with_the_checkpoint_and_transformers_ignores_it(tmp_path: Path):
    model = made()
    save(model, tmp_path / "model")
    again = load(tmp_path / "model").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    (tokens,) = random_documents([30])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)(tokens[None]).logits[0]
    torch.testing.assert_close(model.logits(model(tokens, borders([tokens])).hidden), theirs, rtol=0, atol=1e-4)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def pairs(model: DeepseekV4, streams: Tensor, tokens: Tensor) -> Tensor:
    """The block's input [n - 1, streams, d] for one document, written pair by pair."""
    block = mtp_block(model)
    made = []
    for i in range(len(tokens) - 1):
        token = block.e_proj.weight @ normed(model.model.embed_tokens.weight[tokens[i + 1]], block.enorm.weight)
        made.append(torch.stack([token + block.h_proj.weight @ normed(x, block.hnorm.weight) for x in streams[i]]))
    return torch.stack(made)


def oracle(model: DeepseekV4, folder: Path):
    """transformers' model of one layer, which is the block: its layer gets `pairs`, its head is the model's."""
    alone = tiny.model(1, vocab_size=61, num_hidden_layers=1, layer_types=[SWA], mlp_layer_types=["moe"])
    state = model.state_dict()
    own = {n.replace("model.mtp.0.", "model.layers.0."): t for n, t in state.items() if n.startswith("model.mtp.0.")}
    for name in ("norm.weight", "hc_head.hc_fn", "hc_head.hc_base", "hc_head.hc_scale"):
        own[f"model.{name}"] = state[f"model.mtp.0.{name}"]
    own |= {n: state[n] for n in ("lm_head.weight", "model.embed_tokens.weight")}
    alone.load_state_dict({n: own[n] for n in alone.state_dict()})
    save(alone, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_values_and_gradients_are_those_of_transformers_layer(tmp_path: Path):
    """The next-next-token loss of documents, each alone there and packed here: log-probs, and every gradient of it."""
    model, documents = made(), random_documents(LENGTHS)
    model.unfreeze("mtp")
    theirs = oracle(model, tmp_path / "block")
    layer = theirs.model.layers[0]
    tokens, cu = torch.cat(documents), borders(documents)
    output = model(tokens, cu)
    streams = output.streams.detach().requires_grad_()
    found = mtp_logprobs(model, streams, tokens, cu)
    weight = torch.rand(len(tokens))
    (weight * found).sum().backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    own_streams = streams.grad.clone()
    model.zero_grad(set_to_none=True)
    streams.grad = None
    for start, document in zip(cu.tolist(), documents, strict=False):
        own = slice(start, start + len(document))
        assert (found[own][:2] == 0).all()
        if len(document) < 3:
            continue
        made_pairs = pairs(model, streams[own], document)
        hook = layer.register_forward_pre_hook(lambda _, args, x=made_pairs: (x.unsqueeze(0), *args[1:]))
        logits = theirs(document[None, :-1]).logits[0]
        hook.remove()
        expected = torch.log_softmax(logits[:-1], -1).gather(1, document[2:, None]).squeeze(1)
        torch.testing.assert_close(found[own][2:], expected, rtol=0, atol=2e-5)
        (weight[own][2:] * expected).sum().backward()
    torch.testing.assert_close(own_streams, streams.grad, rtol=1e-3, atol=1e-4)
    grads = {n: p.grad for n, p in theirs.named_parameters()}
    for name, gradient in ours.items():
        if name.startswith("model.mtp.0."):
            short = name.removeprefix("model.mtp.0.")
            p = model.get_parameter(name).grad  # of what `pairs` has used
            top = f"model.{short}" if short.startswith(("norm.", "hc_head.")) else f"model.layers.0.{short}"
            expected = p if p is not None else grads[top]
        elif name == "model.embed_tokens.weight":
            expected = model.get_parameter(name).grad
        else:
            assert name == "lm_head.weight", name
            expected = grads[name]
        assert expected is not None
        scale = expected.abs().max().clamp(min=1e-3)
        assert (gradient - expected).abs().max() / scale < 1e-4, name


@torch.no_grad()
def test_packed_and_from_the_cache():
    """Pairs of all documents in one pack, each alone, and fed to the block's cache in ragged pieces, 0 too."""
    model, documents = made(2), random_documents(LENGTHS)
    tokens, cu = torch.cat(documents), borders(documents)
    streams = model(tokens, cu).streams
    embedded = model.model.embed_tokens(tokens.roll(-1)).squeeze(1)
    together = mtp_hidden(model, streams, embedded, cu).split(LENGTHS)
    sizes = [n - 1 for n in LENGTHS]
    cache, done = mtp_cache(model, len(sizes), max(sizes)), [0] * len(sizes)
    for step in range(100):
        counts = [min((i + step) % 3, n - d) for i, (n, d) in enumerate(zip(sizes, done, strict=True))]
        if not any(counts):
            continue
        at = torch.cat([s + d + torch.arange(c) for s, d, c in zip(cu.tolist(), done, counts, strict=False)])
        hidden = extend_mtp(model, streams[at], tokens[at + 1], torch.tensor([0, *counts]).cumsum(0), cache)
        for states, other, d, c in zip(hidden.split(counts), together, done, counts, strict=True):
            torch.testing.assert_close(states, other[d : d + c], rtol=1e-5, atol=1e-5)
        done = [d + c for d, c in zip(done, counts, strict=True)]
    assert done == sizes
    for i, document in enumerate(documents):
        own = slice(int(cu[i]), int(cu[i + 1]))
        alone = mtp_hidden(model, streams[own], embedded[own], borders([document]))
        torch.testing.assert_close(alone[:-1], together[i][:-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_the_loss_in_float64(ahead: int):
    """Documents of 1 to 5 tokens: values and both gradients, term by term."""
    lengths = [1, 5, 2, 3]
    tokens, cu = torch.randint(7, (11,)), torch.tensor([0, *lengths]).cumsum(0)
    hidden, head, weight = torch.randn(11, 4), torch.randn(7, 4), torch.rand(11)
    ours = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    naive = [hidden.double().requires_grad_(), head.double().requires_grad_()]
    found = packed_logprobs(ours[0], ours[1], tokens, cu, ahead=ahead)
    expected = torch.zeros(11, dtype=torch.float64)
    for start, n in zip(cu.tolist(), lengths, strict=False):
        for i in range(start + ahead, start + n):
            logits = naive[1] @ naive[0][i - ahead]
            expected[i] = logits[tokens[i]] - logits.exp().sum().log()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    (weight * found).sum().backward()
    (weight.double() * expected).sum().backward()
    for one, other in zip(ours, naive, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("into_backbone", [True, False])
def test_where_the_gradient_goes(into_backbone: bool):
    model, documents = made(3), random_documents([30, 20])
    tokens, cu = torch.cat(documents), borders(documents)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".mtp." in n or ".indexer." in n)
    model.unfreeze("mtp")
    output = model(tokens, cu)
    mtp_logprobs(model, output.streams, tokens, cu, into_backbone=into_backbone).sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    block = {n for n, _ in model.named_parameters() if n.startswith("model.mtp.0.")}
    own_end = {"model.norm.weight", "model.hc_head.hc_fn", "model.hc_head.hc_base", "model.hc_head.hc_scale"}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert reached == (trained - own_end if into_backbone else block)


def test_unfreezing_what_is_not_there():
    with pytest.raises(ValueError, match="no part 'mtp'"):
        made(num_nextn_predict_layers=0).unfreeze("mtp")
