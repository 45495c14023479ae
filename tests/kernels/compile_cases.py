"""What compile_for_h100.py compiles: calls at V4-Flash's sizes, on tensors without memory (`meta`).

compile_caches.py has those over a cache.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from amalgam.kernels.compress import Storage
from amalgam.kernels.fused import (
    adamw,
    compress,
    embedding,
    fp8,
    fp8_experts,
    hopper_forward,
    hopper_fp8,
    hopper_hyper,
    hopper_indexer,
    hopper_queries,
    hopper_rows,
    hopper_vocabulary,
    hyper,
    indexer,
    linear,
    losses,
    moe,
    muon,
    norm,
    router,
    sampling,
    storage,
    swiglu,
    symmetric,
)
from amalgam.kernels.fused.attention import attend_forward
from amalgam.kernels.fused.attention_backward import attend_backward
from amalgam.kernels.places import Seen, Windows
from amalgam.kernels.sampling import DrawSettings

FP32 = torch.float32
TOKENS = 4096
HEADS, WIDTH, WINDOW, TOPK = 64, 512, 128, 512  # of attention
NARROW = 256  # the widest heads of the kernels for any GPU
VOCABULARY = 129_280


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def places(count: int = TOKENS) -> Tensor:
    return meta(count, dtype=torch.int32)


def seen(ratio: int = 0, tokens: int = TOKENS, slots: int = 0, most: int = 0, page: int = 0) -> Seen:
    blocks: Any = None  # the reference's
    most = most or (tokens // ratio if ratio else 0)
    first, table = places(tokens) if ratio else None, places() if page else None
    return Seen(blocks, WINDOW, places(tokens), places(tokens), slots, ratio, first, most, table, page)


def attention(
    ratio: int, topk: int = 0, dtype: torch.dtype = torch.bfloat16, heads: int = HEADS, width: int = NARROW
) -> None:
    """Forward and backward of a pack."""
    q, rows, sinks = meta(TOKENS, heads, width, dtype=dtype), meta(TOKENS, width, dtype=dtype), meta(heads, dtype=FP32)
    entries = meta(TOKENS // ratio, width, dtype=dtype) if ratio else None
    chosen = meta(TOKENS, topk, dtype=torch.int32) if topk else None
    out, lse = attend_forward(q, rows, entries, sinks, seen(ratio), chosen)
    rotation = meta(TOKENS, 32, dtype=torch.complex64)
    norm.rope_in_place(out, rotation, back=True)
    attend_backward(out, q, rows, entries, sinks, out, lse, seen(ratio), chosen, rotation=rotation)


def product(rows: int, out: int, depth: int, wide: bool = False) -> None:
    linear.multiply(meta(rows, depth), meta(out, depth), wide=wide)


def on_hopper(run: Callable[[], None]) -> None:
    """With the Gluon kernels, which are chosen by the device."""
    patches = [mock.patch.object(module, "is_hopper", lambda _: True) for module in (linear, losses, hopper_vocabulary)]
    for each in patches:
        each.start()
    try:
        run()
    finally:
        mock.patch.stopall()


def fp8_linear(rows: int, out: int, depth: int) -> None:
    """Both operands quantized (the weight through FP4 too), multiplied, and read back, in bf16 and in fp32."""
    for dtype in (torch.bfloat16, FP32):
        fp8.quantize(meta(out, depth, dtype=dtype), False, fp4=True)
        x, weight = (fp8.quantize(meta(n, depth, dtype=dtype), by_row) for n, by_row in ((rows, True), (out, False)))
        fp8.multiply(*x, *weight, dtype)
        fp8.dequantize(*x, dtype, True)
        fp8.dequantize(*weight, dtype, False)


def normed(*shape: int, weight: bool = True, rotated: bool = False) -> None:
    """RMSNorm, and RoPE if `rotated`, forward and backward."""
    w = meta(shape[-1], dtype=FP32).requires_grad_() if weight else None
    rotation = meta(shape[0], 32, dtype=torch.complex64) if rotated else None
    backward(norm.NormRope.apply(meta(*shape).requires_grad_(), w, rotation, 1e-6, False))


def rotated_back() -> None:
    """RoPE alone, on attention's output."""
    x, rotation = meta(TOKENS, HEADS, WIDTH).requires_grad_(), meta(TOKENS, 32, dtype=torch.complex64)
    backward(norm.NormRope.apply(x, None, rotation, None, True))


def compressed(ratio: int, channels: int, width: int, storage: Storage) -> None:
    """Forward and backward."""
    values, scores, bias = (meta(n, channels, dtype=FP32).requires_grad_() for n in (TOKENS, TOKENS, ratio))
    count = TOKENS // ratio
    windows = Windows(places(count), places(count), meta(count, 32, dtype=torch.complex64))
    weight = meta(width, dtype=FP32).requires_grad_()
    backward(compress.Compress.apply(values, scores, bias, weight, windows, 1e-6, torch.bfloat16, storage))


def kept() -> None:
    """Rows in FP8, and the indexer's queries in FP4 with their gradient."""
    storage.Stored.apply(meta(TOKENS, WIDTH), WIDTH - 64, "fp8")
    backward(storage.Stored.apply(meta(TOKENS, 64, 128).requires_grad_(), 64, "fp4"))


def indexed(dtype: torch.dtype = torch.bfloat16) -> None:
    """The choice, the scores' gradients and the mass that they are held to."""
    q, keys = meta(TOKENS, 64, 128, dtype=dtype), meta(TOKENS // 4, 128, dtype=dtype)
    weights = meta(TOKENS, 64, dtype=FP32)
    chosen = indexer.select(q, weights, keys, seen(4), TOPK, None)
    backward(indexer.IndexScores.apply(*(x.requires_grad_() for x in (q, weights, keys)), chosen, seen(4)))
    queries, entries = meta(TOKENS, HEADS, WIDTH, dtype=dtype), meta(TOKENS // 4, WIDTH, dtype=dtype)
    indexer.mass(queries, entries, meta(TOKENS, HEADS, dtype=FP32), seen(4), chosen)


def hyper_connections(head: bool = False, first: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
    """Forward and backward of a site: before a sublayer, or before the head; with an output to add, or the first."""
    n, width = 4, 4096
    logits = n if head else (2 + n) * n
    update = (
        [] if first else [meta(TOKENS, width, dtype=dtype), *(meta(*s, TOKENS, dtype=FP32) for s in ((n,), (n, n)))]
    )
    weights = (meta(*s, dtype=FP32) for s in ((logits, n * width), (logits,), (1 if head else 3,), (width,)))
    leaves = [meta(TOKENS, n, width, dtype=dtype), *(update or [None] * 3), *weights]
    for leaf in leaves:
        _ = leaf is None or leaf.requires_grad_()
    outs: Any = hyper.Site.apply(*leaves, 0 if head else 20, 1e-6, 1e-6)
    made = [out for out in outs if out is not None]
    torch.autograd.backward(made, [torch.empty_like(out) for out in made])


def hopper_streams(first: bool = False) -> None:
    """The tiles of a site's backward."""
    n, width = 4, 4096
    logits, pre, pair = (2 + n) * n, meta(n, TOKENS, dtype=FP32), meta(2, TOKENS, dtype=FP32)
    streams, x, comb = meta(TOKENS, n, width), meta(TOKENS, width), meta(n, n, TOKENS, dtype=FP32)
    hopper_hyper.streams_backward(
        streams, None if first else (x, pre, comb), meta(logits, n * width, dtype=FP32), meta(width, dtype=FP32), pre,
        pair, meta(logits + 1, TOKENS, dtype=FP32), x if first else streams, x, streams, x,
        meta(width // 64, n + n * n, 0 if first else TOKENS, dtype=FP32), meta(2, logits, n * width, dtype=FP32),
        meta(2, width, dtype=FP32),
    )  # fmt: skip


def backward(result: Any) -> None:
    result.backward(torch.empty_like(result))


def token_loss(tokens: int = TOKENS, masked: bool = False) -> None:
    """Forward and backward; of more tokens than channels, with the product again."""
    hidden, weight = meta(tokens, 4096).requires_grad_(), meta(VOCABULARY, 4096).requires_grad_()
    allowed = meta(tokens, VOCABULARY // 32, dtype=torch.int32) if masked else None
    scores = losses.TokenLoss.apply(hidden, weight, meta(tokens, dtype=torch.int64), 0.7, allowed, None, True)
    torch.autograd.backward(scores, [torch.empty_like(x) for x in scores])


def sampled() -> None:
    losses.chosen_logprobs(meta(64, VOCABULARY, dtype=FP32), meta(64, dtype=torch.int64), 0.7, None)


def drawn(cuts: bool, masked: bool) -> None:
    """Tokens of 64 requests, and their log-probs, each at its own temperature."""
    rows = 64
    logits, ids = meta(rows, VOCABULARY, dtype=FP32), meta(rows, dtype=torch.int64)
    temperature, floats = meta(rows, dtype=torch.float64), meta(rows, dtype=FP32)
    settings = DrawSettings(temperature, ids, *((places(rows), floats, floats) if cuts else ()))
    allowed = meta(rows, VOCABULARY // 32, dtype=torch.int32) if masked else None
    sampling.draw(logits, ids, ids, settings, allowed, False)
    losses.chosen_logprobs(logits, ids, temperature, allowed)


def divergence(kind: str, tokens: int = TOKENS) -> None:
    """Forward and backward, from four teachers, two of them wider."""
    hidden, weight = meta(tokens, 4096).requires_grad_(), meta(VOCABULARY, 4096).requires_grad_()
    heads = {i: meta(VOCABULARY, width) for i, width in enumerate((4096, 4096, 7168, 7168))}
    teachers = losses.sorted_by_teacher(meta(tokens, 7168), heads, meta(tokens, dtype=torch.int64))
    backward(losses.Divergence.apply(hidden, weight, teachers, kind, None, True))


def hopper(kind: int) -> None:
    """The Gluon kernels, forward and backward; their descriptors name their layouts, which the calls give them."""
    q, rows, entries = meta(TOKENS, HEADS, WIDTH), meta(TOKENS, WIDTH), meta(TOKENS // 4, WIDTH)
    sinks, lse, chosen = meta(HEADS, dtype=FP32), meta(TOKENS, HEADS, dtype=FP32), meta(TOKENS, TOPK, dtype=torch.int32)
    parts, pairs = meta(1, TOKENS, WIDTH, dtype=FP32), meta(TOKENS * TOPK, WIDTH)
    of_query = (places(), places(), places(), WIDTH**-0.5)
    for slots in (0, WINDOW):
        hopper_forward.forward(
            q, rows, entries, chosen, sinks, q, lse, lse, lse, *of_query, slots, 4, TOPK, 1, WINDOW, kind, 1024
        )
    queries_backward = hopper_queries.queries_backward
    given = (q, rows, entries, chosen, q, lse, lse, q)
    queries_backward(*given, pairs if kind == 2 else lse, lse, *of_query, 4, TOPK, WINDOW, kind, False)
    if kind == 2:
        totals = meta(TOKENS // 4, WIDTH, dtype=FP32), meta(TOKENS, WIDTH, dtype=FP32)
        queries_backward(*given, *totals, *of_query, 4, TOPK, WINDOW, kind, True)
    else:
        tiles = places(TOKENS // 64)
        hopper_rows.rows_backward(
            q, rows, q, lse, lse, parts, places(), places(), tiles, tiles, WIDTH**-0.5, 4, 0 if kind else WINDOW
        )


def expert_layer(
    tokens: int, experts: int, hidden: int, inner: int, k: int, dtype: torch.dtype = torch.bfloat16
) -> None:
    """The router after the gate's product, and the experts, forward and backward."""
    logits = meta(tokens, experts, dtype=FP32).requires_grad_()
    chosen = meta(tokens, k, dtype=torch.int64)
    ids, weights = router.Route.apply(logits, meta(experts, dtype=FP32), chosen, None, k, 1.5)  # pyright: ignore
    x = meta(tokens, hidden, dtype=dtype).requires_grad_()
    gate_up = meta(experts, 2 * inner, hidden, dtype=dtype).requires_grad_()
    down = meta(experts, hidden, inner, dtype=dtype).requires_grad_()
    backward(moe.Experts.apply(x, ids, weights, gate_up, down, x, 10.0, True))


def shared_expert() -> None:
    """What lies between its products, forward and backward."""
    backward(swiglu.Gated.apply(meta(TOKENS, 2 * 2048).requires_grad_(), 10.0))


def embedded() -> None:
    """Forward and backward."""
    tokens, table = meta(TOKENS, dtype=torch.int64), meta(VOCABULARY, 4096).requires_grad_()
    backward(embedding.Embed.apply(tokens, table, 4))


def low_experts(tokens: int, fp4: bool = False, train: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
    """Flash's experts in low precision: from packed FP4, or from masters, forward and, if `train`, backward."""
    experts, hidden, inner, k = 256, 4096, 2048, 6
    x, ids = meta(tokens, hidden, dtype=dtype), meta(tokens, k, dtype=torch.int64)
    weights = meta(tokens, k, dtype=FP32)
    if fp4:
        scales = torch.float8_e8m0fnu
        up, down = (
            (
                meta(*shape, depth // 2, dtype=torch.int8),
                meta(*shape[:-1], shape[-1] // 128, depth // 128, dtype=scales),
                meta(*shape, depth // 32, dtype=scales),
            )
            for shape, depth in (((experts, 2, inner), hidden), ((experts, hidden), inner))
        )
        fp8_experts.experts_forward(x, ids, weights, up, down, 10.0, False)
    else:
        leaves = (x, weights, meta(experts, 2 * inner, hidden, dtype=dtype), meta(experts, hidden, inner, dtype=dtype))
        x, weights, up, down = (leaf.requires_grad_(train) for leaf in leaves)
        out: Any = fp8_experts.QuantizedExperts.apply(x, ids, weights, up, down, 10.0, True, train)
        _ = train and backward(out)


def optimizer_step() -> None:
    """AdamW's of a bf16 weight and of one that is fp32, whose gradients have one norm."""
    wide, weight = meta(4096, 4096, dtype=FP32), meta(4096, 4096)
    norm = adamw.gradient_norm([weight, wide])
    columns = ([wide, wide], [weight, wide], [wide, wide], [wide, wide], [weight, None])
    adamw.adamw_step(*columns, norm, 3, 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0)


def muon_steps() -> None:
    """Of experts' matrices, wide and tall."""
    wide, weight, runs = meta(64, 512, 1024, dtype=FP32), meta(64, 512, 1024), [(32, 512, 1024), (32, 1024, 512)]
    norm = meta(1, dtype=FP32)
    muon.muon_step([wide], [weight], [wide], [weight], norm, [runs], 1e-4, 0.95, 0.1, 1.0, torch.bfloat16)
    for y in (meta(64, 512, 1024), meta(64, 1024, 512).mT):
        symmetric.product(symmetric.product(y), 3.4445, -4.775, 2.0315)


def hopper_fp8_products(rows: int, out: int, depth: int) -> None:
    x, weight = fp8.quantize(meta(rows, depth), True), fp8.quantize(meta(out, depth), False)
    hopper_fp8.multiply(*x, *weight, meta(rows, out))


def hopper_experts(keep: bool) -> None:
    """Both products, where fp8_experts.py takes this kernel."""
    choice, fp8_experts.on_hopper = fp8_experts.on_hopper, lambda *_: True
    try:
        low_experts(16384, train=keep)
    finally:
        fp8_experts.on_hopper = choice


def hopper_scores() -> None:
    q, keys, weights = meta(TOKENS, 64, 128), meta(TOKENS // 4, 128), meta(TOKENS, 64, dtype=FP32)
    out = meta(TOKENS, TOKENS // 4, dtype=FP32)
    hopper_indexer.scores(q, weights, keys, out, seen(4), TOPK, False)


def choice() -> None:
    """Among the entries of 65,536 and of 131,072 tokens."""
    for width in (16_384, 32_768):
        indexer._best(meta(64, width, dtype=FP32), places(64), 4, TOPK, meta(64, TOPK, dtype=torch.int32))


CASES: dict[str, Callable[[], None]] = {
    "attention, window": lambda: attention(0),
    "attention, CSA": lambda: attention(4, TOPK),
    "attention, HCA": lambda: attention(128),
    "attention, 16 heads of 128": lambda: attention(4, heads=16, width=128),
    "attention, fp32": lambda: attention(4, TOPK, FP32),
    "linear, q_b_proj": lambda: product(TOKENS, 32768, 1024),
    "linear, compressor": lambda: product(TOKENS, 1024, 4096, wide=True),
    "linear, 64 columns": lambda: product(TOKENS, 64, 4096),
    "linear, 64 rows": lambda: product(64, 1024, 4096),
    "linear, 16 rows": lambda: product(16, 1024, 4096),
    "fp8, q_b_proj": lambda: fp8_linear(TOKENS, 32768, 1024),
    "fp8, 64 rows": lambda: fp8_linear(64, 1024, 4096),
    "norm, hidden": lambda: normed(TOKENS, 4096),
    "norm, streams": lambda: normed(TOKENS, 16384, weight=False),
    "norm, queries": lambda: normed(TOKENS, HEADS, WIDTH, weight=False, rotated=True),
    "norm, rows": lambda: normed(TOKENS, WIDTH, rotated=True),
    "rope, output": rotated_back,
    "embedding": embedded,
    "shared expert": shared_expert,
    "compress, CSA": lambda: compressed(4, 1024, 512, "fp8"),
    "compress, index keys": lambda: compressed(4, 256, 128, "fp4"),
    "stored": kept,
    "compress, HCA": lambda: compressed(128, 512, 512, "full"),
    "hyper-connections": hyper_connections,
    "hyper-connections, first": lambda: hyper_connections(first=True),
    "hyper-connections, head": lambda: hyper_connections(head=True),
    "hyper-connections, fp32": lambda: hyper_connections(dtype=FP32),
    "indexer": indexed,
    "indexer, fp32": lambda: indexed(FP32),
    "choice, long": choice,
    "experts, Flash": lambda: expert_layer(16384, 256, 4096, 2048, 6),
    "experts, 128 of 768": lambda: expert_layer(16384, 128, 2048, 768, 8),
    "experts, 64 rows": lambda: expert_layer(2048, 256, 4096, 2048, 6),
    "experts, decoding": lambda: expert_layer(32, 256, 4096, 2048, 6),
    "experts, fp32": lambda: expert_layer(16384, 256, 4096, 2048, 6, FP32),
    "fp8, experts": lambda: low_experts(16384, train=True),
    "fp8, experts, 64 rows": lambda: low_experts(2048),
    "fp8, experts, fp32": lambda: low_experts(16384, dtype=FP32),
    "fp8, experts, fp32, 64 rows": lambda: low_experts(2048, dtype=FP32),
    "fp8, experts in FP4": lambda: low_experts(16384, fp4=True),
    "fp8, experts in FP4, 64 rows": lambda: low_experts(32, fp4=True),
    "fp8, experts in FP4, fp32": lambda: low_experts(16384, fp4=True, dtype=FP32),
    "fp8, experts in FP4, fp32, 64 rows": lambda: low_experts(32, fp4=True, dtype=FP32),
    "loss, tokens": token_loss,
    "loss, tokens, masked": lambda: token_loss(tokens=2 * TOKENS, masked=True),
    "loss, reverse KL": lambda: divergence("reverse"),
    "loss, reverse KL, many tokens": lambda: divergence("reverse", 2 * TOKENS),
    "loss, forward KL": lambda: divergence("forward"),
    "loss, Jensen-Shannon": lambda: divergence("jensen_shannon"),
    "sampling": lambda: drawn(cuts=False, masked=False),
    "sampling, cut": lambda: drawn(cuts=True, masked=False),
    "sampling, masked": lambda: drawn(cuts=False, masked=True),
    "sampling, masked and cut": lambda: drawn(cuts=True, masked=True),
    "AdamW": optimizer_step,
    "Muon": muon_steps,
    "hopper, window": lambda: hopper(0),
    "hopper, HCA": lambda: hopper(1),
    "hopper, CSA": lambda: hopper(2),
    "hopper, indexer": hopper_scores,
    "hopper, hyper-connections": hopper_streams,
    "hopper, hyper-connections, first": lambda: hopper_streams(first=True),
    "hopper, linear": lambda: on_hopper(lambda: product(TOKENS, 32768, 1024)),
    "hopper, linear, narrow": lambda: on_hopper(lambda: product(TOKENS, 256, 1024)),
    "hopper, loss, tokens": lambda: on_hopper(token_loss),
    "hopper, loss, tokens, masked": lambda: on_hopper(lambda: token_loss(2 * TOKENS, masked=True)),
    "hopper, log-probs of the sampler": lambda: on_hopper(sampled),
    "hopper, sampling": lambda: on_hopper(lambda: drawn(cuts=False, masked=True)),
    "hopper, loss, reverse KL": lambda: on_hopper(lambda: divergence("reverse", 2 * TOKENS)),
    "hopper, loss, Jensen-Shannon": lambda: on_hopper(lambda: divergence("jensen_shannon")),
    "hopper, fp8": lambda: hopper_fp8_products(TOKENS, 32768, 1024),
    "hopper, fp8 experts": lambda: hopper_experts(keep=False),
    "hopper, fp8 experts, kept": lambda: hopper_experts(keep=True),
}
