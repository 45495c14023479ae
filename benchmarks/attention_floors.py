"""The operations and bytes of attention's parts (floors.py makes times of them).

Formulas, for T tokens, H heads of D channels, `keys` the sum over queries of what each sees (window rows, then
entries), 2 bytes a number unless said otherwise:

    attention, forward     FLOP 4 H D keys (131,072 a key at 64 x 512): q . k and weight * value
                           bytes 2 (2 T H D + T D + N D): q, rows and entries in, output out
                           gathered 2 D keys: each query fetches its own keys, as decoding needs it to
    attention, backward    FLOP 2.5 x forward's: the scores again, and four products for the gradients
                           bytes 2 (4 T H D + 2 T D + 2 N D): q, output and its gradient in, q's out; rows and entries
                           in, their gradients out
    indexer with top-k     FLOP 2 H D (16,384 at 64 x 128) for each query and complete entry; scores stay on the chip
                           bytes: q, fp32 weights and keys in, K int32 numbers a query out
"""

from floors import Work


def keys_seen(tokens: int, window: int, ratio: int = 0, topk: int | None = None) -> int:
    """Of all queries of one document: min(p + 1, window) rows, and (p + 1) // ratio entries, at most topk of them."""
    rows = sum(min(p, window) for p in range(1, tokens + 1))
    most = tokens if topk is None else topk
    return rows + (sum(min(p // ratio, most) for p in range(1, tokens + 1)) if ratio else 0)


def attention(tokens: int, heads: int, dim: int, window: int, ratio: int = 0, topk: int | None = None) -> Work:
    keys, entries = keys_seen(tokens, window, ratio, topk), tokens // ratio if ratio else 0
    moved = 2 * (2 * tokens * heads * dim + tokens * dim + entries * dim)
    return Work(4 * heads * dim * keys, moved, 2 * dim * keys)


def attention_backward(tokens: int, heads: int, dim: int, window: int, ratio: int = 0, topk: int | None = None) -> Work:
    entries = tokens // ratio if ratio else 0
    forward = attention(tokens, heads, dim, window, ratio, topk)
    return Work(2.5 * forward.flop, 2 * (4 * tokens * heads * dim + 2 * tokens * dim + 2 * entries * dim))


def indexer(tokens: int, heads: int, dim: int, ratio: int, topk: int) -> Work:
    pairs = keys_seen(tokens, 0, ratio)
    moved = 2 * (tokens * heads * dim + tokens // ratio * dim) + 4 * tokens * heads + 4 * tokens * topk
    return Work(2 * heads * dim * pairs, moved)
