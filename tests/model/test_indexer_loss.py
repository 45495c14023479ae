"""The indexers' loss against plain loops in float64: values, where its gradient goes, what it may not change."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amalgam.kernels import formats
from amalgam.kernels.hadamard import hadamard
from amalgam.model import DeepseekV4, save
from amalgam.model.attention import Attention
from amalgam.model.auto import has_indexer
from amalgam.model.config import resolve
from amalgam.model.precision import set_precision
from amalgam.settings import Precision

from .. import tiny
from ..tiny import CSA, HCA, SWA
from .test_cache import borders, random_documents

LENGTHS = [1, 3, 4, 7, 8, 9, 37, 2, 24]
INDEXERS = {"q_b_proj", "scorer.weights_proj", "kv_proj", "gate_proj", "kv_norm", "position_bias"}


def made(seed: int = 0, **changes) -> DeepseekV4:
    """Two CSA layers; a query sees up to 9 entries and chooses 3."""
    kinds = {"layer_types": [CSA, SWA, HCA, CSA], "num_hidden_layers": 4, "mlp_layer_types": ["hash_moe"] + ["moe"] * 3}
    return tiny.model(seed, **(kinds | {"vocab_size": 61} | changes)).eval()


def pack(lengths=LENGTHS) -> tuple[Tensor, Tensor]:
    documents = random_documents(lengths)
    return torch.cat(documents), borders(documents)


def csa_layers(model: DeepseekV4) -> list[Attention]:
    layers = [model.get_submodule(f"model.layers.{i}.self_attn") for i in range(len(model.model.layers))]
    return [a for a in layers if isinstance(a, Attention) and hasattr(a.compressor, "indexer")]


def of_indexers(model: DeepseekV4) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if ".indexer." in name}


def index_loss(model: DeepseekV4, tokens: Tensor, cu: Tensor, weight: Tensor) -> Tensor:
    return (weight * model(tokens, cu, index_loss=True).index_kl).sum()


def taken(module: nn.Module) -> dict[str, Tensor]:
    """The gradients of all parameters that have one; then none has."""
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


# ---- the definition, in loops over one document


def rotated(x: Tensor, position: int, frequencies: Tensor) -> Tensor:
    """x [D] with the last pairs turned."""
    x = x.clone()
    at = len(x) - 2 * len(frequencies)
    for i, frequency in enumerate(frequencies.double() * position):
        a, b = x[at + 2 * i].clone(), x[at + 2 * i + 1].clone()
        x[at + 2 * i] = a * frequency.cos() - b * frequency.sin()
        x[at + 2 * i + 1] = a * frequency.sin() + b * frequency.cos()
    return x


def normed(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def naive_entries(compressor: Any, x: Tensor, ratio: int, frequencies: Tensor) -> list[Tensor]:
    dim, entries = compressor.dim, []
    for w in range(len(x) // ratio):
        values, scores = [], []
        for half, start in ((slice(dim), ratio * (w - 1)), (slice(dim, None), ratio * w)):
            for i in range(ratio if start >= 0 else 0):
                values.append((compressor.kv_proj.weight @ x[start + i])[half])
                scores.append((compressor.gate_proj.weight @ x[start + i] + compressor.position_bias[i])[half])
        mixed = (torch.stack(scores).softmax(0) * torch.stack(values)).sum(0)
        entries.append(rotated(normed(mixed, compressor.kv_norm.weight), ratio * w, frequencies))
    return entries


def naive_kl(a: Any, x: Tensor, frequencies: Tensor) -> Tensor:
    """float64 [n]: each query's KL in a CSA layer `a` (in float64) for one document's inputs x [n, d]."""
    ratio, indexer = a.ratio, a.compressor.indexer
    rows = [rotated(normed(a.kv_proj.weight @ v, a.kv_norm.weight), t, frequencies) for t, v in enumerate(x)]
    entries = naive_entries(a.compressor, x, ratio, frequencies)
    keys = naive_entries(indexer, x, ratio, frequencies)
    result = []
    for t, v in enumerate(x):
        latent = normed(a.q_a_proj.weight @ v, a.q_a_norm.weight)
        weights = indexer.scorer.weights_proj.weight @ v * (indexer.dim * indexer.heads) ** -0.5
        heads = (indexer.q_b_proj.weight @ latent.detach()).view(indexer.heads, -1)
        index = [rotated(q, t, frequencies) for q in heads]
        seen = range((t + 1) // ratio)
        scores = [(weights * torch.stack([(q @ keys[s]).clamp(min=0) for q in index])).sum() for s in seen]
        chosen = sorted(seen, key=lambda s: (-scores[s].item(), s))[: indexer.topk]
        mass = dict.fromkeys(chosen, 0.0)
        for h, q in enumerate((a.q_b_proj.weight @ latent).view(a.heads, -1)):
            q = rotated(normed(q), t, frequencies) * a.dim**-0.5
            window = sum(float((q @ rows[i]).exp()) for i in range(max(t - a.window + 1, 0), t + 1))
            own = {s: float((q @ entries[s]).exp()) for s in chosen}
            for s in chosen:
                mass[s] += own[s] / (sum(own.values()) + window + float(a.sinks[h].exp()))
        kl = torch.zeros((), dtype=torch.float64)
        for s in chosen:
            p = mass[s] / sum(mass.values())
            kl = kl + p * (torch.tensor(p, dtype=torch.float64).log() - scores[s])
            kl = kl + p * torch.stack([scores[o] for o in chosen]).logsumexp(0)
        result.append(kl)
    return torch.stack(result)


@pytest.mark.parametrize("changes", [{}, {"index_topk": 100}, {"index_topk": 1}, {"compress_rates": {CSA: 3, HCA: 5}}])
def test_values_and_gradients_are_the_definitions(changes: dict):
    """Each document alone in the loops, all of them in one pack here; the layers' inputs are the model's."""
    model = made(**changes)
    model.unfreeze("indexer")
    tokens, cu = pack()
    inputs: list[Tensor] = []
    layers = csa_layers(model)
    hooks = [a.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().double())) for a in layers]
    found = model(tokens, cu, index_loss=True).index_kl
    for hook in hooks:
        hook.remove()
    weight = torch.rand(len(tokens))
    (weight * found).sum().backward()
    expected, naive = torch.zeros(len(tokens), dtype=torch.float64), [copy.deepcopy(a).double() for a in layers]
    for a in naive:
        a.requires_grad_(False).compressor.indexer.requires_grad_()  # pyright: ignore
        a.zero_grad()
    for start, end in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        for a, x in zip(naive, inputs, strict=True):
            kl = naive_kl(a, x[start:end], model.compress_frequencies)
            expected[start + 1 : end] += kl[:-1] / len(naive)  # the query that predicts a token is the one before
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    if changes.get("index_topk") == 1:
        assert (found == 0).all()
        return
    assert found.max() > 0.05
    (weight.double() * expected).sum().backward()
    for a, b in zip(layers, naive, strict=True):
        ours, theirs = (taken(m.compressor.indexer) for m in (a, b))  # pyright: ignore
        assert {name.removesuffix(".weight") for name in ours} == INDEXERS
        for name, gradient in theirs.items():
            scale = gradient.abs().max()
            assert scale > 1e-5 and (ours[name] - gradient).abs().max() / scale < 1e-3, name


# ---- where the gradient goes


def test_it_reaches_the_indexers_alone_and_changes_nothing_else():
    """Bit for bit: outputs, and the gradients of the main loss."""
    tokens, cu = pack()
    weight = torch.rand(len(tokens))
    model = made()
    output = model(tokens, cu)
    assert output.index_kl is None
    (weight * model.logprobs_of(output, tokens, cu)).sum().backward()
    plain = taken(model)
    assert not plain.keys() & of_indexers(model).keys()
    model.unfreeze("indexer")
    assert all(p.requires_grad for p in of_indexers(model).values())
    both = model(tokens, cu, index_loss=True)
    assert torch.equal(both.hidden, output.hidden) and torch.equal(both.experts, output.experts)
    (weight * (model.logprobs_of(both, tokens, cu) + 3 * both.index_kl)).sum().backward()
    together = taken(model)
    assert together.keys() == plain.keys() | of_indexers(model).keys()
    for name, gradient in plain.items():
        assert torch.equal(together[name], gradient), name
    index_loss(model, tokens, cu, weight).backward()
    reached = taken(model)
    assert reached.keys() == of_indexers(model).keys() and all(g.abs().max() > 0 for g in reached.values())


def test_without_unfreezing_there_is_a_value_and_no_gradient():
    assert not made()(*pack(), index_loss=True).index_kl.requires_grad


def test_a_model_without_csa_layers_has_no_such_loss(tmp_path: Path):
    model = made(layer_types=[SWA, HCA, SWA, HCA])
    save(model, tmp_path / "none")
    assert has_indexer(resolve("tiny")) and has_indexer(resolve("flash")) and not has_indexer(tmp_path / "none")
    with pytest.raises(ValueError, match="no CSA layer, and so no indexer"):
        model(*pack(), index_loss=True)
    with pytest.raises(ValueError, match="no part 'indexer'"):
        model.unfreeze("indexer")


# ---- what it may not depend on


def test_packed_equals_alone_in_values_and_gradients():
    model, documents = made(1), random_documents(LENGTHS)
    model.unfreeze("indexer")
    tokens, cu = torch.cat(documents), borders(documents)
    weight = torch.rand(len(tokens))
    together = model(tokens, cu, index_loss=True).index_kl
    (weight * together).sum().backward()
    packed = taken(model)
    for start, document in zip(cu.tolist(), documents, strict=False):
        own = slice(start, start + len(document))
        alone = model(document, borders([document]), index_loss=True).index_kl
        torch.testing.assert_close(alone, together[own], rtol=1e-5, atol=1e-5)
        assert alone[0] == 0
        (weight[own] * alone).sum().backward()
    for name, gradient in taken(model).items():
        assert (gradient - packed[name]).abs().max() <= 2e-5 * packed[name].abs().max(), name


def test_documents_without_two_entries_contribute_nothing():
    """Not even an entry in the pack; and one entry, of which the softmax is 1 whatever the score."""
    model = made()
    model.unfreeze("indexer")
    for lengths in ([1, 3, 2], [7, 1, 7]):
        kl = model(*pack(lengths), index_loss=True).index_kl
        assert (kl == 0).all()
        kl.sum().backward()
        assert all((gradient == 0).all() for gradient in taken(model).values())


# ---- low precision, and training


def test_rounded_vectors_pass_the_gradient_straight_through(monkeypatch: pytest.MonkeyPatch):
    """FP4 queries and keys, against those handed in rounded with the rounding's difference as a constant."""
    model = made(index_head_dim=32)
    set_precision(model, Precision(indexer="fp4"))
    model.unfreeze("indexer")
    tokens, cu = pack()
    weight = torch.rand(len(tokens))

    def straight_through(x: Tensor, rotation: Tensor, storage: str) -> Tensor:
        if storage == "full":
            return x
        x = hadamard(x)
        return x + (formats.round_fp4(x) - x).detach()

    index_loss(model, tokens, cu, weight).backward()
    ours = taken(model)
    assert ours.keys() == of_indexers(model).keys()
    for module in ("kernels.compress", "model.attention"):
        monkeypatch.setattr(f"amalgam.{module}.stored", straight_through)
    index_loss(model, tokens, cu, weight).backward()
    for name, gradient in taken(model).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("precision", [Precision(), Precision(indexer="fp4", kv="fp8")], ids=str)
def test_training_brings_the_scores_to_where_attention_looks(precision: Precision):
    model = made(2, index_head_dim=32)
    set_precision(model, precision)
    for p in model.parameters():
        p.requires_grad_(False)
    model.unfreeze("indexer")
    tokens, cu = pack([60, 45, 80])
    weight = torch.full((len(tokens),), 1 / len(tokens))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = index_loss(model, tokens, cu, weight)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.1
    assert losses[-1] < 0.3 * losses[0], losses
