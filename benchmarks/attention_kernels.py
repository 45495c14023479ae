"""Times of attention's operations one by one; attention.py is the command."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import attention_floors as floors
import gpu
import torch
import torch.nn.functional as F
from floors import Ceilings, Work, product, row
from parts import Rows
from torch import Tensor
from transformers import DeepseekV4Config

from amalgam.kernels import attention as op
from amalgam.kernels.compress import compress
from amalgam.kernels.fused.attention import attend_forward
from amalgam.kernels.fused.attention_backward import attend_backward
from amalgam.kernels.indexer import index_scores, select
from amalgam.kernels.norm import norm_rope, rms_norm
from amalgam.kernels.places import Seen
from amalgam.kernels.project import project, project_groups, project_wide
from amalgam.kernels.rope import apply_rope, inverse_frequencies
from amalgam.model.layout import Packed, packed

SWA, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
KINDS = {"sliding": SWA, "CSA": CSA, "HCA": HCA}
FORWARD, ATOMIC, DETERMINISTIC, INDEXER = 1.6, 2.2, 3.2, 2.0  # goals: at most so many times the floor


@dataclass(frozen=True)
class Setting:
    """What is measured: a model's sizes, the numbers of tokens in one document, and where."""

    config: DeepseekV4Config
    ceilings: Ceilings
    sizes: tuple[int, ...] = (4_096, 16_384, 65_536, 131_072)
    rows: tuple[int, ...] = (1, 64, 4_096)  # of a product
    passes: int = 65_536  # tokens of what only moves memory
    eager: tuple[int, ...] = (4_096, 8_192, 16_384)  # tokens of transformers' block
    context: int = 1_048_576  # of a decoding step
    device: str = "cuda"
    flashmla: Path | None = None  # vLLM's library of that name

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def ratio(self, kind: str) -> int:
        assert self.config.compress_rates is not None
        return self.config.compress_rates.get(KINDS[kind], 0)

    def shape(self, kind: str) -> dict[str, Any]:
        """Sizes of a layer kind's attention, as attention_floors has them."""
        config, topk = self.config, self.config.index_topk if kind == "CSA" else None
        sizes = {"heads": config.num_attention_heads, "dim": config.head_dim, "window": config.sliding_window}
        return {**sizes, "ratio": self.ratio(kind), "topk": topk}

    def frequencies(self) -> dict[str, Tensor]:
        parameters: Any = self.config.rope_parameters
        dim = self.config.qk_rope_head_dim
        return {kind: inverse_frequencies(dim, parameters[kind]).to(self.device) for kind in ("main", "compress")}

    def document(self, tokens: int) -> Packed:
        """One document."""
        borders = torch.tensor([0, tokens], device=self.device)
        ratios = {self.ratio(kind) for kind in KINDS} - {0}
        return packed(borders, self.config.sliding_window, ratios, self.frequencies())


def random_choice(seen: Seen, topk: int, chunk: int = 1024) -> Tensor:
    """int32 [T, K]: of each query's complete entries `topk` at random, rising, -1 behind them."""
    none = torch.iinfo(torch.int32).max
    counts = (seen.position + 1) // seen.ratio
    chosen = []
    for some in counts.split(chunk):
        keys = torch.rand(len(some), seen.most, device=some.device)
        keys[torch.arange(seen.most, device=some.device) >= some.unsqueeze(1)] = 2.0  # behind all that are complete
        drawn, numbers = keys.topk(min(topk, seen.most), largest=False)
        numbers = numbers.int().where(drawn < 1.0, none).sort(1).values
        chosen.append(numbers.where(numbers < none, -1))
    return torch.cat(chosen)


class Inputs(NamedTuple):
    """What `attend` takes."""

    q: Tensor
    rows: Tensor
    entries: Tensor | None
    sinks: Tensor
    seen: Seen
    chosen: Tensor | None


def inputs(setting: Setting, tokens: int, kind: str) -> Inputs:
    """One document's; where CSA has to choose, at random."""
    shape = setting.shape(kind)
    heads, dim, ratio = shape["heads"], shape["dim"], shape["ratio"]
    seen = setting.document(tokens).seen(ratio)
    entries = setting.random(tokens // ratio, dim) if ratio else None
    chosen = random_choice(seen, shape["topk"]) if kind == "CSA" and seen.most > shape["topk"] else None
    sinks = setting.random(heads, dtype=torch.float32)
    return Inputs(setting.random(tokens, heads, dim), setting.random(tokens, dim), entries, sinks, seen, chosen)


def attention(setting: Setting) -> Rows:
    """`attend`, forward; with its backward, deterministic and, where it makes a difference, with atomics."""
    for kind in KINDS:
        for tokens in setting.sizes:
            yield from _attention(setting, kind, tokens)


@torch.no_grad()
def _attention(setting: Setting, kind: str, tokens: int) -> Rows:
    works = [f(tokens, **setting.shape(kind)) for f in (floors.attention, floors.attention_backward)]
    given = inputs(setting, tokens, kind)
    grad = torch.randn_like(given.q)

    def both(atomic: bool) -> float:
        return gpu.on_device(
            lambda: attend_backward(grad, *given[:4], *attend_forward(*given), given.seen, given.chosen, atomic)
        )

    ms = gpu.on_device(lambda: op.attend(*given))
    yield row(f"{kind} forward", tokens, ms, works[:1], setting.ceilings, FORWARD)
    ms = both(False)
    name = f"{kind} forward + backward"
    if given.chosen is None:  # nothing is scattered, so there is nothing for atomics to do
        yield row(f"{name}, deterministic", tokens, ms, works, setting.ceilings, DETERMINISTIC)
        return
    atomic = both(True)
    yield row(f"{name}, deterministic", tokens, ms, works, setting.ceilings, DETERMINISTIC, over_atomic=ms / atomic)
    yield row(f"{name}, atomic", tokens, atomic, works, setting.ceilings, ATOMIC)


def indexer(setting: Setting) -> Rows:
    """`select`; `index_scores` with its gradients, which trains the indexer."""
    config, ratio = setting.config, setting.ratio("CSA")
    heads, dim = config.index_n_heads, config.index_head_dim
    for tokens in setting.sizes:
        seen = setting.document(tokens).seen(ratio)
        q, weights = setting.random(tokens, heads, dim), setting.random(tokens, heads, dtype=torch.float32)
        keys, topk = setting.random(tokens // ratio, dim), min(config.index_topk, seen.most)
        work = floors.indexer(tokens, heads, dim, ratio, topk)
        ms = gpu.on_device(lambda: select(q, weights, keys, seen, topk))  # noqa: B023
        yield row("scores and top-k", tokens, ms, [work], setting.ceilings, INDEXER)

        chosen = select(q, weights, keys, seen, topk)
        leaves = [x.requires_grad_() for x in (q, weights, keys)]
        grad = torch.randn(tokens, topk, device=setting.device)
        pairs = floors.keys_seen(tokens, 0, ratio, topk)
        moved = 2 * sum(x.numel() * x.element_size() for x in leaves) + 3 * 4 * tokens * topk
        work = Work(3 * 2 * heads * dim * pairs, moved, 2 * dim * pairs)
        ms = gpu.on_device(gpu.with_backward(lambda q, w, k: index_scores(q, w, k, seen, chosen), leaves, grad))  # noqa: B023
        yield row("chosen scores, forward + backward", tokens, ms, [work], setting.ceilings)


def products_of(config: DeepseekV4Config) -> dict[str, tuple[int, int, int, int]]:
    """Every product of the three kinds of block: a group's size in and out, groups, bytes of a number of the result."""
    d, dim, width = config.hidden_size, config.head_dim, config.num_attention_heads * config.head_dim
    latent, groups, index = config.q_lora_rank, config.o_groups, config.index_head_dim
    return {
        "q_a": (d, latent, 1, 2),
        "q_b": (latent, width, 1, 2),
        "kv": (d, dim, 1, 2),
        "o_a": (width // groups, config.o_lora_rank, groups, 2),
        "o_b": (groups * config.o_lora_rank, d, 1, 2),
        "CSA compressor": (d, 2 * dim, 1, 4),
        "HCA compressor": (d, dim, 1, 4),
        "indexer compressor": (d, 2 * index, 1, 4),
        "indexer q_b": (latent, config.index_n_heads * index, 1, 2),
        "indexer weights": (d, config.index_n_heads, 1, 2),
    }


def projections(setting: Setting) -> Rows:
    """Row-invariant products beside cuBLAS's of the same operands (which are in bf16 where ours are fp32)."""
    for name, (size_in, size_out, groups, out_bytes) in products_of(setting.config).items():
        weight = setting.random(groups * size_out, size_in).requires_grad_()
        ours = project_groups if groups > 1 else project_wide if out_bytes == 4 else project
        theirs = cublas_groups if groups > 1 else F.linear
        x = weight
        for rows in setting.rows:
            x = setting.random(rows, size_in) if groups == 1 else setting.random(rows, groups, size_in)
            with torch.no_grad():
                ms, beside = (gpu.on_device(lambda f=f: f(x, weight)) for f in (ours, theirs))  # noqa: B023
            work = product(rows, size_in, size_out, groups, out_bytes)
            yield row(f"{name} forward", rows, ms, [work], setting.ceilings, cublas_ms=beside, over_cublas=ms / beside)
        leaves = [x.requires_grad_(), weight]
        ms, beside = (gpu.on_device(gpu.with_backward(f, leaves, torch.randn_like(f(*leaves)))) for f in (ours, theirs))
        work = product(setting.rows[-1], size_in, size_out, groups, out_bytes, passes=3)
        beside = {"cublas_ms": beside, "over_cublas": ms / beside}
        yield row(f"{name} forward + backward", setting.rows[-1], ms, [work], setting.ceilings, **beside)


def cublas_groups(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x.transpose(0, 1), weight.unflatten(0, (x.shape[1], -1)).transpose(1, 2)).transpose(0, 1)


def passes(setting: Setting) -> Rows:
    """Norm and RoPE, and the compressors' pooling, against the bytes that they move: one pass over memory each."""
    config, tokens = setting.config, setting.passes
    place, eps = setting.document(tokens), config.rms_norm_eps
    heads, dim, index = config.num_attention_heads, config.head_dim, config.index_head_dim
    turn = place.rotation["compress"]
    gain, latent_gain = (torch.rand(n, device=setting.device) + 0.5 for n in (dim, config.q_lora_rank))
    q, kv, latent = (setting.random(tokens, *n) for n in ((heads, dim), (dim,), (config.q_lora_rank,)))
    operations: dict[str, tuple[Callable[..., Tensor], list[Tensor], int]] = {
        "queries' norm + RoPE": (lambda x: norm_rope(x, None, turn, eps), [q], 3),
        "rows' norm + RoPE": (lambda x, w: norm_rope(x, w, turn, eps), [kv, gain], 3),
        "latent's norm": (lambda x, w: rms_norm(x, w, eps), [latent, latent_gain], 3),
        "output's inverse RoPE": (lambda x: apply_rope(x, turn, inverse=True), [q], 2),
    }
    for name, (function, leaves, backward) in operations.items():
        size = leaves[0].numel() * leaves[0].element_size()
        angles = 0 if name.startswith("latent") else turn.numel() * turn.element_size()
        works = [Work(bytes=2 * size + angles), Work(bytes=backward * size + angles)]
        yield from _pass(setting, name, tokens, function, leaves, works)
    for name, ratio, width, channels in (
        ("CSA compressor", setting.ratio("CSA"), dim, 2 * dim),
        ("HCA compressor", setting.ratio("HCA"), dim, dim),
        ("indexer compressor", setting.ratio("CSA"), index, 2 * index),
    ):
        windows = place.entries[ratio].windows
        leaves = [setting.random(tokens, channels, dtype=torch.float32) for _ in range(2)]
        leaves += [setting.random(ratio, channels, dtype=torch.float32), torch.ones(width, device=setting.device)]
        size, made = 2 * 4 * tokens * channels, 2 * tokens // ratio * width
        works = [Work(bytes=size + made), Work(bytes=2 * size + made)]
        pooled = lambda v, s, b, w, windows=windows: compress(v, s, b, w, windows, eps, torch.bfloat16)  # noqa: E731
        yield from _pass(setting, name, tokens, pooled, leaves, works)


def _pass(
    setting: Setting, name: str, tokens: int, function: Callable[..., Tensor], leaves: list[Tensor], works: list[Work]
) -> Rows:
    with torch.no_grad():
        grad = torch.randn_like(function(*leaves))
        ms = gpu.on_device(lambda: function(*leaves))
    yield row(f"{name} forward", tokens, ms, works[:1], setting.ceilings)
    leaves = [x.detach().requires_grad_() for x in leaves]
    ms = gpu.on_device(gpu.with_backward(function, leaves, grad))
    yield row(f"{name} forward + backward", tokens, ms, works, setting.ceilings)
