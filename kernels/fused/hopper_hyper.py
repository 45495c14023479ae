"""The tiles of hyper-connections' backward for Hopper, in Gluon: what `hyper_backward._streams_backward` computes.

A program keeps 64 channels and goes through tokens, 32 at a time. While it computes a tile the next ones are on their
way, by TMA. A token's channels lie in eight threads of one warp, so that sums over them stay in the warp; what `fn`
brings to a gradient passes through shared memory to get there from the layout of the products.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper import barrier
from .launch import multiprocessors

ROWS, STEP, OUT, STAGES = 32, 64, 32, 3  # tokens, channels and, padded, logits of a tile; tiles in shared memory
_ROWS, _STEP, _OUT, _STAGES = gl.constexpr(ROWS), gl.constexpr(STEP), gl.constexpr(OUT), gl.constexpr(STAGES)


@gluon.jit
def _load(old, output, of_new, of_x, tile, turn, tiles_s, full, D: gl.constexpr, N: gl.constexpr, PENDING: gl.constexpr):
    """Of a tile: x's gradient and the old streams; the output and the new streams' gradients, if there are any."""
    TILES: gl.constexpr = 2 * N + 2 if PENDING else N + 1
    t, c, stage = tile * _ROWS, gl.program_id(0) * _STEP, turn % _STAGES
    bar, first = full.index(stage), stage * TILES
    mbarrier.expect(bar, TILES * _ROWS * _STEP * 2)
    tma.async_copy_global_to_shared(of_x, [t, c], bar, tiles_s.index(first))
    for k in gl.static_range(N):
        tma.async_copy_global_to_shared(old, [t, k * D + c], bar, tiles_s.index(first + 1 + k))
    if PENDING:
        tma.async_copy_global_to_shared(output, [t, c], bar, tiles_s.index(first + N + 1))
        for k in gl.static_range(N):
            tma.async_copy_global_to_shared(of_new, [t, k * D + c], bar, tiles_s.index(first + N + 2 + k))


@gluon.jit
def _columns(table, t, real, tokens, COUNT: gl.constexpr):
    """The rows of a table [COUNT, T] at tokens t, as a tuple."""
    found = ()
    for i in gl.static_range(COUNT):
        found = found + (gl.load(table + i * tokens + t, mask=real, other=0.0),)
    return found


@gluon.jit
def _of_tokens(
    post, comb, pre, of_norm, of_logits, tile, tokens, layout: gl.constexpr, of_g: gl.constexpr,
    N: gl.constexpr, LOGITS: gl.constexpr, PENDING: gl.constexpr,
):  # fmt: skip
    """Of a tile's tokens: the gradients of fn's products [OUT, ROWS]; pre, what the norm brings, post and comb."""
    t = tile.to(gl.int64) * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, layout))
    u = tile.to(gl.int64) * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(0, of_g))
    o = gl.arange(0, _OUT, gl.SliceLayout(1, of_g))
    mask = (o < LOGITS)[:, None] & (u < tokens)[None, :]
    g_OT = gl.load(of_logits + o.to(gl.int64)[:, None] * tokens + u[None, :], mask=mask, other=0.0)
    real = t < tokens
    found = (g_OT,) + _columns(pre, t, real, tokens, N) + _columns(of_norm, t, real, tokens, 2)
    found = found + _columns(of_logits + LOGITS * tokens, t, real, tokens, 1)
    if PENDING:
        found = found + _columns(post, t, real, tokens, N) + _columns(comb, t, real, tokens, N * N)
    return found


@gluon.jit
def _wide(tile_s, layout: gl.constexpr):
    return tile_s.load(layout).to(gl.float32)


@gluon.jit(do_not_specialize=["tokens"])
def streams_kernel(
    old, output, of_new, of_x, post, comb, fn, weight, pre, of_norm, of_logits, of_old, of_output, parts_gates,
    parts_fn, parts_weight, tokens, D: gl.constexpr, N: gl.constexpr, LOGITS: gl.constexpr, PENDING: gl.constexpr,
):  # fmt: skip
    TILES: gl.constexpr = 2 * N + 2 if PENDING else N + 1
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    of_g: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [8, 1], [1, 0])
    of_products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 16, 16])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    tiles_s = gl.allocate_shared_memory(gl.bfloat16, [_STAGES * TILES, _ROWS, _STEP], shared)
    new_s = gl.allocate_shared_memory(gl.bfloat16, [2 * N, _ROWS, _STEP], shared)
    fn_s = gl.allocate_shared_memory(gl.bfloat16, [N, _OUT, _STEP], shared)
    g_s = gl.allocate_shared_memory(gl.bfloat16, [2, _OUT, _ROWS], gl.NVMMASharedLayout(64, 16, 2))
    products_s = gl.allocate_shared_memory(gl.float32, [N, _ROWS, _STEP], gl.NVMMASharedLayout(128, 32, 2))
    full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(_STAGES):
        mbarrier.init(full.index(i), count=1)
    barrier()

    first, stride, end = gl.program_id(1), gl.num_programs(1), (tokens + _ROWS - 1) // _ROWS
    for i in gl.static_range(_STAGES - 1):
        if first + i * stride < end:
            _load(old, output, of_new, of_x, first + i * stride, i, tiles_s, full, D, N, PENDING)
    c = gl.program_id(0) * _STEP + gl.arange(0, _STEP, gl.SliceLayout(0, layout))
    o = gl.arange(0, _OUT, gl.SliceLayout(1, layout))
    weight_C = gl.load(weight + c).to(gl.float32)[None, :]
    of_fn, of_weight_TC = (), gl.zeros([_ROWS, _STEP], gl.float32, layout)
    for k in gl.static_range(N):
        w_OC = gl.load(fn + (o * (N * D))[:, None] + (k * D + c)[None, :], mask=(o < LOGITS)[:, None], other=0.0)
        fn_s.index(k).store(w_OC.to(gl.bfloat16))
        of_fn = of_fn + (gl.zeros([_STEP, _OUT], gl.float32, of_products),)
    parts_gates += gl.program_id(0).to(gl.int64) * (N + N * N) * tokens
    held = _of_tokens(post, comb, pre, of_norm, of_logits, first, tokens, layout, of_g, N, LOGITS, PENDING)
    turn = 0
    for tile in range(first, end, stride):
        t = tile.to(gl.int64) * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, layout))
        real = t < tokens
        real_TC, at_TC, streams_TC = real[:, None], t[:, None] * D + c[None, :], t[:, None] * (N * D) + c[None, :]
        tiles = turn % _STAGES * TILES
        flip = turn % 2
        g_s.index(flip).store(held[0].to(gl.bfloat16))
        mbarrier.wait(full.index(turn % _STAGES), turn // _STAGES & 1)
        before, x_TC = (), gl.zeros([_ROWS, _STEP], gl.float32, layout)
        for k in gl.static_range(N):
            before = before + (tiles_s.index(tiles + 1 + k).load(layout),)
        new = before
        if PENDING:
            output_TC = _wide(tiles_s.index(tiles + N + 1), layout)
            new = ()
            for k in gl.static_range(N):
                # As `hyper.expanded`, bit for bit.
                sums = held[4 + N + k][:, None] * output_TC
                for j in gl.static_range(N):
                    sums = gl.fma(held[4 + 2 * N + j * N + k][:, None], before[j].to(gl.float32), sums)
                new = new + (sums.to(gl.bfloat16),)
        for k in gl.static_range(N):
            new_s.index(flip * N + k).store(new[k])
            x_TC = gl.fma(held[1 + k][:, None], new[k].to(gl.float32), x_TC)
        fence_async_shared()
        barrier()
        # All are done with the tile before: its place takes the next that has none.
        if tile + (_STAGES - 1) * stride < end:
            _load(old, output, of_new, of_x, tile + (_STAGES - 1) * stride, turn + _STAGES - 1, tiles_s, full, D, N, PENDING)
        zero = gl.zeros([_STEP, _ROWS], gl.float32, of_products)
        products, sums = (), ()
        for k in gl.static_range(N):
            product = warpgroup_mma(fn_s.index(k).permute((1, 0)), g_s.index(flip), zero, use_acc=False, is_async=True)
            products = products + (product,)
        for k in gl.static_range(N):
            of = warpgroup_mma(new_s.index(flip * N + k).permute((1, 0)), g_s.index(flip).permute((1, 0)), of_fn[k], is_async=True)
            sums = sums + (of,)
        products = warpgroup_mma_wait(N, products)
        for k in gl.static_range(N):
            products_s.index(k).store(gl.permute(products[k], (1, 0)))
        g_TC = _wide(tiles_s.index(tiles), layout) * held[1 + N][:, None]
        of_weight_TC = gl.fma(g_TC, x_TC, of_weight_TC)
        g_TC = gl.fma(x_TC, held[2 + N][:, None], g_TC * weight_C)
        barrier()
        whole = ()
        for k in gl.static_range(N):
            of = gl.fma(held[1 + k][:, None], g_TC, products_s.index(k).load(layout))
            of = gl.fma(held[3 + N][:, None], new[k].to(gl.float32), of)
            if PENDING:
                of += _wide(tiles_s.index(tiles + N + 2 + k), layout)
            whole = whole + (of,)
        of_gates = parts_gates + t
        ahead = _of_tokens(post, comb, pre, of_norm, of_logits, tile + stride, tokens, layout, of_g, N, LOGITS, PENDING)
        for j in gl.static_range(N):
            of = whole[j]
            if PENDING:
                of = held[4 + 2 * N + j * N][:, None] * whole[0]
                for k in gl.static_range(1, N):
                    of = gl.fma(held[4 + 2 * N + j * N + k][:, None], whole[k], of)
                old_TC = _wide(tiles_s.index(tiles + 1 + j), layout)
                for k in gl.static_range(N):
                    dots = gl.sum(old_TC * whole[k], 1)
                    gl.store(of_gates + (N + j * N + k) * tokens, dots, mask=real)
            gl.store(of_old + streams_TC + j * D, of.to(gl.bfloat16), mask=real_TC)
        if PENDING:
            of = held[4 + N][:, None] * whole[0]
            for k in gl.static_range(1, N):
                of = gl.fma(held[4 + N + k][:, None], whole[k], of)
            gl.store(of_output + at_TC, of.to(gl.bfloat16), mask=real_TC)
            output_TC = _wide(tiles_s.index(tiles + N + 1), layout)
            for k in gl.static_range(N):
                gl.store(of_gates + k * tokens, gl.sum(output_TC * whole[k], 1), mask=real)
        of_fn = warpgroup_mma_wait(0, sums)
        held = ahead
        turn += 1
    part = parts_fn + gl.program_id(1).to(gl.int64) * LOGITS * N * D
    o = gl.arange(0, _OUT, gl.SliceLayout(0, of_products))
    d = gl.program_id(0) * _STEP + gl.arange(0, _STEP, gl.SliceLayout(1, of_products))
    for k in gl.static_range(N):
        gl.store(part + (o * (N * D))[None, :] + (k * D + d)[:, None], of_fn[k], mask=(o < LOGITS)[None, :])
    gl.store(parts_weight + gl.program_id(1) * D + c, gl.sum(of_weight_TC, 0))


def takes(old: Tensor, logits: int) -> bool:
    return old.shape[2] % STEP == 0 and logits <= OUT


def programs(tokens: int, d: int, device) -> int:
    """Of each 64 channels: so many that each multiprocessor has one."""
    return max(min(multiprocessors(device) // (d // STEP), triton.cdiv(tokens, ROWS)), 1)


def _described(x: Tensor) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x.flatten(1), [ROWS, STEP], gl.NVMMASharedLayout(128, 16, 2))


def streams_backward(
    old: Tensor, update, fn: Tensor, weight: Tensor, pre: Tensor, of_norm: Tensor, of_logits: Tensor,
    of_new: Tensor | None, of_x: Tensor, of_old: Tensor, of_output: Tensor | None, parts_gates: Tensor,
    parts_fn: Tensor, parts_weight: Tensor,
) -> None:  # fmt: skip
    tokens, n, d = old.shape
    output, post, comb = update or (of_x, fn, fn)
    given = (_described(x) for x in (old, output, of_x if of_new is None else of_new, of_x))
    streams_kernel[(d // STEP, parts_fn.shape[0])](
        *given, post, comb, fn, weight, pre, of_norm, of_logits, of_old, of_x if of_output is None else of_output,
        parts_gates, parts_fn, parts_weight, tokens, D=d, N=n, LOGITS=fn.shape[0], PENDING=update is not None, num_warps=8,
    )  # fmt: skip
