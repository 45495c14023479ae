"""Steps of Sinkhorn-Knopp for Triton kernels, forward and back, on a tuple of N x N vectors: a token is an element."""

import triton
import triton.language as tl


@triton.jit
def normalized(m, eps, AXIS: tl.constexpr, N: tl.constexpr):
    """m, a tuple of N x N, over the N sums along an axis, plus eps; and what it was divided by."""
    sums, factors, new = (), (), ()
    for i in tl.static_range(N):
        total = m[i * N if AXIS else i]
        for e in tl.static_range(1, N):
            total += m[i * N + e if AXIS else e * N + i]
        sums = sums + (total + eps,)
        factors = factors + (1 / sums[i],)
    for i in tl.static_range(N * N):
        new = new + (m[i] * factors[i // N if AXIS else i % N],)
    return new, sums


@triton.jit
def softmax(logits, eps, N: tl.constexpr):
    """Of each row of a tuple of N x N, plus eps."""
    new = ()
    for j in tl.static_range(N):
        most = logits[j * N]
        for k in tl.static_range(1, N):
            most = tl.maximum(most, logits[j * N + k])
        exps, total = (), tl.zeros_like(most)
        for k in tl.static_range(N):
            exps = exps + (tl.exp(logits[j * N + k] - most),)
            total += exps[k]
        for k in tl.static_range(N):
            new = new + (exps[k] / total + eps,)
    return new


@triton.jit
def undone(m, g, sums, AXIS: tl.constexpr, N: tl.constexpr):
    """What `normalized` was given, and its gradient, from what it gave, that one's gradient and the N divisors."""
    before, of_before, factors, dots = (), (), (), ()
    for i in tl.static_range(N):
        dot = m[i * N if AXIS else i] * g[i * N if AXIS else i]
        for e in tl.static_range(1, N):
            dot = tl.fma(m[i * N + e if AXIS else e * N + i], g[i * N + e if AXIS else e * N + i], dot)
        dots, factors = dots + (dot,), factors + (1 / sums[i],)
    for i in tl.static_range(N * N):
        before = before + (m[i] * sums[i // N if AXIS else i % N],)
        of_before = of_before + ((g[i] - dots[i // N if AXIS else i % N]) * factors[i // N if AXIS else i % N],)
    return before, of_before
