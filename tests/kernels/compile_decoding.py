"""More of compile_cases.py: what a decoding step has in one launch, at V4-Flash's sizes."""

from collections.abc import Callable

import torch
from compile_cases import FP32, HEADS, VOCABULARY, WIDTH, meta, places

from amalgam.kernels.compress import Pooling, Storage
from amalgam.kernels.fused import compress, hyper, layout, linear_each, norm, router
from amalgam.kernels.norm import Norm
from amalgam.kernels.places import Windows
from amalgam.kernels.project import Into, Product

TOKENS = 256


def products(rows: int, hidden: int, outs: list[int]) -> None:
    """Those of a CSA layer's input: two in bf16, four in fp32 into rings, and one that is scaled."""
    kept = [Into(meta(rows * 8, out, dtype=FP32), meta(rows, dtype=torch.int64)) for out in outs[2:6]]
    wanted = [Product(meta(out, hidden)) for out in outs[:2]]
    wanted += [Product(meta(out, hidden), True, into=into) for out, into in zip(outs[2:6], kept, strict=True)]
    linear_each.multiply_each(meta(rows, hidden), [*wanted, Product(meta(outs[6], hidden), scale=0.1)])


def entering() -> None:
    """What router and shared expert make of the MoE's input."""
    for rows, hidden, experts, inner in ((1, 1024, 32, 512), (TOKENS, 4096, 256, 2048)):
        gate, up = meta(inner, hidden), meta(inner, hidden)
        wanted = [Product(meta(experts, hidden), True), Product(gate, up=up, limit=10.0)]
        linear_each.multiply_each(meta(rows, hidden), wanted)


def norms() -> None:
    """Of a CSA layer's latent and row, and of its queries."""
    rotation = meta(TOKENS, 32, dtype=torch.complex64)
    into = Into(meta(TOKENS * 8, WIDTH), meta(TOKENS, dtype=torch.int64))
    row = Norm(meta(TOKENS, WIDTH), meta(WIDTH, dtype=FP32), rotation, 1e-6, into)
    norm.norm_each([Norm(meta(TOKENS, 1024), meta(1024, dtype=FP32), None, 1e-6), row])
    queries = Norm(meta(TOKENS, HEADS, WIDTH), None, rotation, 1e-6)
    norm.norm_each([queries, Norm(meta(TOKENS, 64, 128), None, rotation)])


def sites() -> None:
    """Before a sublayer, and before the head."""
    n, width = 4, 4096
    streams, output = meta(TOKENS, n, width), meta(TOKENS, width)
    update = output, meta(n, TOKENS, dtype=FP32), meta(n, n, TOKENS, dtype=FP32)
    for logits, scales in (((2 + n) * n, 3), (n, 1)):
        fn, base = meta(logits, n * width, dtype=FP32), meta(logits, dtype=FP32)
        scale, norm = meta(scales, dtype=FP32), meta(width, dtype=FP32)
        iterations, counts = 20 if scales == 3 else 0, places(hyper.count_size(TOKENS))
        hyper.site_forward(streams, update, fn, base, scale, norm, iterations, 1e-6, 1e-6, counts)


def laid_out() -> None:
    """The layout of a step, and the cache's lengths after it."""
    length, table = meta(TOKENS, dtype=torch.int64), meta(TOKENS, 4096, dtype=torch.int32)
    kinds, frequencies = [layout.Kind(4, 8), layout.Kind(128, 128)], (meta(32, dtype=FP32), meta(32, dtype=FP32))
    for slots in (None, meta(TOKENS, dtype=torch.int64)):
        layout.step(length, slots, table, 256, 128, kinds, frequencies)
        layout.advance(length, length, slots, length)


def hashed() -> None:
    """A layer's choice by its table."""
    table, tokens = meta(VOCABULARY, 6, dtype=torch.int64), meta(TOKENS, dtype=torch.int64)
    router.Route.apply(meta(TOKENS, 256, dtype=FP32), None, table, tokens, 6, 1.5)


def pools() -> None:
    """Entries and index keys of a CSA layer."""
    windows = Windows(places(TOKENS), places(TOKENS), meta(TOKENS, 32, dtype=torch.complex64), 8)
    kinds: list[tuple[int, Storage]] = [(WIDTH, "fp8"), (128, "fp4")]
    poolings = []
    for width, kept in kinds:
        values, scores, bias = (meta(rows, 2 * width, dtype=FP32) for rows in (TOKENS * 8, TOKENS * 8, 4))
        poolings.append(Pooling(values, scores, bias, meta(width, dtype=FP32), 1e-6, meta(4096, width), kept))
    compress.compress_each(poolings, windows, meta(TOKENS, dtype=torch.int64))


CASES: dict[str, Callable[[], None]] = {
    "each product, 1 row": lambda: products(1, 1024, [256, 128, 256, 256, 128, 128, 16]),
    "each product, 256 rows": lambda: products(256, 4096, [1024, 512, 1024, 1024, 256, 256, 64]),
    "each product, MoE": entering,
    "each norm": norms,
    "site, one launch": sites,
    "layout": laid_out,
    "hash layer": hashed,
    "each pool": pools,
}
