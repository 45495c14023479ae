"""Times and memory of attention blocks beside transformers', and of a decoding step; attention.py is the command."""

import math
from collections.abc import Callable
from typing import Any

import attention_floors as floors
import gpu
import torch
from attention_kernels import KINDS, Setting, products_of
from floors import Work, product, row
from parts import Rows
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention, DeepseekV4RotaryEmbedding

from amalgam.model.attention import Attention
from amalgam.model.cache import Cache, LayerCache, page_tokens
from amalgam.model.deepseek_v4 import FP32_ISLANDS
from amalgam.model.step import step

FASTER = 10.0  # goal: so many times transformers' speed ...
AT = 8_192  # ... at so many tokens


def block(setting: Setting, kind: str) -> Attention:
    """Random weights in bf16 but for what V4 keeps in fp32."""
    with torch.device(setting.device):
        made = Attention(setting.config, KINDS[kind])
    for name, parameter in made.named_parameters():
        if not any(part in f".{name}" for part in FP32_ISLANDS):
            parameter.data = parameter.data.bfloat16()
        if "sinks" in name or "position_bias" in name:
            nn.init.normal_(parameter)
    return made


def eager(setting: Setting, kind: str, ours: Attention) -> DeepseekV4Attention:
    """transformers' block with the same weights, all in bf16."""
    config = setting.config
    config._attn_implementation = "eager"
    assert config.layer_types is not None
    with torch.device(setting.device):
        theirs = DeepseekV4Attention(config, config.layer_types.index(KINDS[kind]))
    theirs.load_state_dict(ours.state_dict())
    for parameter in theirs.parameters():
        parameter.data = parameter.data.bfloat16()
    return theirs


def eager_inputs(setting: Setting, tokens: int) -> dict[str, Any]:
    """What transformers' model gives its blocks: rotations, positions and a dense additive mask."""
    position = torch.arange(tokens, device=setting.device)
    age = position.unsqueeze(1) - position
    mask = torch.zeros(1, 1, tokens, tokens, device=setting.device, dtype=torch.bfloat16)
    mask.masked_fill_((age < 0) | (age >= setting.config.sliding_window), torch.finfo(mask.dtype).min)
    rotary, x = DeepseekV4RotaryEmbedding(setting.config).to(setting.device), mask[0, 0, :1]
    embeddings = {name: rotary(x, position.unsqueeze(0), layer_type=name) for name in ("main", "compress")}
    return {"position_embeddings": embeddings, "position_ids": position.unsqueeze(0), "attention_mask": mask}


def block_work(setting: Setting, kind: str, tokens: int) -> list[Work]:
    """Products and attention with their backward, the indexer (no gradient reaches it) without; all else is fused."""
    config, sizes = setting.config, products_of(setting.config)
    names = ["q_a", "q_b", "kv", "o_a", "o_b"] + ([f"{kind} compressor"] * 2 if kind != "sliding" else [])
    works = [product(tokens, *sizes[name], passes=3) for name in names]
    works += [f(tokens, **setting.shape(kind)) for f in (floors.attention, floors.attention_backward)]
    if kind == "CSA" and tokens // setting.ratio(kind) > config.index_topk:
        works += [product(tokens, *sizes[f"indexer {name}"]) for name in ("compressor", "compressor", "q_b", "weights")]
        index = config.index_n_heads, config.index_head_dim, setting.ratio(kind), config.index_topk
        works.append(floors.indexer(tokens, *index))
    return works


def blocks(setting: Setting) -> Rows:
    """A block of each kind forward and backward, all gradients; ours, and transformers' where it fits."""
    for kind in KINDS:
        ours = block(setting, kind)
        theirs = eager(setting, kind, ours)
        for tokens in sorted({*setting.sizes, *setting.eager}):
            layout, x = setting.document(tokens), setting.random(tokens, setting.config.hidden_size).requires_grad_()
            grad = torch.randn_like(x)
            found = gpu.measured(lambda: ours(x, layout)[0].backward(grad))  # noqa: B023
            if found is None:
                yield {"name": kind, "tokens": tokens, "failed": "out of memory"}
                continue
            ms, extra = found
            more = {"gbs": None, "extra_gib": extra / 2**30, "extra_kib_a_token": extra / 2**10 / tokens}
            if tokens in setting.eager:
                more |= beside(ms, tokens, _eager(setting, theirs, x, grad))
            yield row(kind, tokens, ms, block_work(setting, kind, tokens), setting.ceilings, **more)


def _eager(setting: Setting, theirs: nn.Module, x: Tensor, grad: Tensor) -> tuple[float, int] | None:
    found = eager_inputs(setting, x.shape[0])
    return gpu.measured(lambda: theirs(x.unsqueeze(0), **found)[0].backward(grad.unsqueeze(0)))


def beside(ms: float, tokens: int, eager: tuple[float, int] | None) -> dict[str, Any]:
    """transformers' time and memory, and how many times faster ours is, with the goal where there is one."""
    if eager is None:
        return {"eager": "out of memory"}
    faster = eager[0] / ms
    result = {"eager_ms": eager[0], "eager_gib": eager[1] / 2**30, "faster": faster}
    return result | ({"goal": FASTER, "met": faster >= FASTER} if tokens == AT else {})


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By kind: the exponent e of memory ~ tokens^e from the smallest to the largest document; 1 is linear."""
    result: dict[str, float] = {}
    for kind in KINDS:
        some = [each for each in rows if each["name"] == kind and "extra_gib" in each]
        if len(some) > 1:
            memory, tokens = (math.log(some[-1][key] / some[0][key]) for key in ("extra_gib", "tokens"))
            result[kind] = memory / tokens
    return result


def filled_cache(setting: Setting, made: Attention) -> tuple[LayerCache, Callable[[], Tensor]]:
    """A cache of random rows, entries and tails for `context - 1` tokens, and the step that adds the last one.

    The last token of the context ends a window of every compressor: the most that a step has to do.
    """
    compressors = {(c.ratio, c.tokens) for c in (made.compressor,) if c is not None}
    ratios = {ratio for ratio, _ in compressors}
    whole = Cache(1, setting.context, 0, page_tokens(ratios), 1, torch.device(setting.device), None)
    whole.length += setting.context - 1
    whole.longest = setting.context - 1
    frequencies = setting.frequencies()
    layout = step(None, whole, window=setting.config.sliding_window, compressors=compressors, frequencies=frequencies)
    x, cache = setting.random(1, setting.config.hidden_size), whole.layers[0]
    made.extend(x, layout, cache)
    for tensor in cache.values():
        tensor.normal_()
    return cache, lambda: made.extend(x, layout, cache)[0]


def decode_bytes(setting: Setting, kind: str, made: Attention, cache: LayerCache) -> int:
    """What a step has to read: every weight, and of the cache all but the entries that the indexer did not choose."""
    by_number = [name for name in cache if name in ("entries", "index_keys")]
    read = [*made.parameters(), *(tensor for name, tensor in cache.items() if name not in by_number)]
    total = sum(tensor.numel() * tensor.element_size() for tensor in read)
    for name in by_number:
        count = setting.context // setting.ratio(kind)
        count = min(count, setting.config.index_topk) if kind == "CSA" and name == "entries" else count
        total += count * cache[name].shape[2] * cache[name].element_size()
    return total


@torch.no_grad()
def decode(setting: Setting) -> Rows:
    """One token of one request through a block of each kind, in bf16: launched one by one, and as a CUDA graph."""
    for kind in KINDS:
        made = block(setting, kind)
        cache, run = filled_cache(setting, made)
        work = [Work(bytes=decode_bytes(setting, kind, made, cache))]
        yield row(f"{kind}, launched one by one", setting.context, gpu.milliseconds(run), work, setting.ceilings)
        graph = gpu.captured(run)
        yield row(f"{kind}, CUDA graph", setting.context, gpu.milliseconds(graph), work, setting.ceilings)
