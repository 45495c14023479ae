"""The tiles of hyper-connections' backward for Hopper, in Gluon: what `hyper_backward._streams_backward` computes.

A program keeps 64 channels and goes through tokens. One warp fetches tiles by TMA while others compute those that have
arrived. A token's channels lie in eight threads of one warp, so that sums over them stay in the warp; what `fn` brings
to a gradient passes through shared memory, to get there from the layout of the products.
"""

import math

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

TOKENS, CHANNELS = 32, 64  # of a tile
ROWS, STEP, OUT, STAGES = gl.constexpr(TOKENS), gl.constexpr(CHANNELS), gl.constexpr(32), gl.constexpr(3)


@gluon.jit
def _load(
    old, output, of_new, of_x, tokens, tiles_s, full, empty, D: gl.constexpr, N: gl.constexpr, PENDING: gl.constexpr
):
    """Of each tile: x's gradient and the old streams; the output and the new streams' gradients, if there are any."""
    TILES: gl.constexpr = 2 * N + 2 if PENDING else N + 1
    c, turn = gl.program_id(0) * STEP, 0
    for tile in range(gl.program_id(1), (tokens + ROWS - 1) // ROWS, gl.num_programs(1)):
        stage, t = turn % STAGES, tile * ROWS
        bar, first = full.index(stage), stage * TILES
        mbarrier.wait(empty.index(stage), (turn // STAGES & 1) ^ 1)
        mbarrier.expect(bar, TILES * ROWS * STEP * 2)
        tma.async_copy_global_to_shared(of_x, [t, c], bar, tiles_s.index(first))
        for k in gl.static_range(N):
            tma.async_copy_global_to_shared(old, [t, k * D + c], bar, tiles_s.index(first + 1 + k))
        if PENDING:
            tma.async_copy_global_to_shared(output, [t, c], bar, tiles_s.index(first + N + 1))
            for k in gl.static_range(N):
                tma.async_copy_global_to_shared(of_new, [t, k * D + c], bar, tiles_s.index(first + N + 2 + k))
        turn += 1


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
    """Of a tile's tokens: the gradients of fn's products [OUT, ROWS]; pre, three for the two norms, post and comb."""
    t = tile.to(gl.int64) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    u = tile.to(gl.int64) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, of_g))
    o = gl.arange(0, OUT, gl.SliceLayout(1, of_g))
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


@gluon.jit
def _compute(
    post, comb, fn, weight, pre, of_norm, of_logits, of_old, of_output, parts_gates, parts_fn, parts_weight, tokens,
    tiles_s, full, empty, D: gl.constexpr, N: gl.constexpr, LOGITS: gl.constexpr, PENDING: gl.constexpr,
):  # fmt: skip
    TILES: gl.constexpr = 2 * N + 2 if PENDING else N + 1
    PRE: gl.constexpr = 1  # where in what `_of_tokens` gives
    NORM: gl.constexpr = 1 + N
    SQUARE: gl.constexpr = 3 + N
    POST: gl.constexpr = 4 + N
    COMB: gl.constexpr = 4 + 2 * N
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    of_g: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [8, 1], [1, 0])
    of_products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 16, 16])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    new_s = gl.allocate_shared_memory(gl.bfloat16, [2 * N, ROWS, STEP], shared)
    products_s = gl.allocate_shared_memory(gl.float32, [N, ROWS, STEP], gl.NVMMASharedLayout(128, 32, 2))
    fn_s = gl.allocate_shared_memory(gl.bfloat16, [N, OUT, STEP], shared)
    g_s = gl.allocate_shared_memory(gl.bfloat16, [2, OUT, ROWS], gl.NVMMASharedLayout(64, 16, 2))

    first, stride, end = gl.program_id(1), gl.num_programs(1), (tokens + ROWS - 1) // ROWS
    c = gl.program_id(0) * STEP + gl.arange(0, STEP, gl.SliceLayout(0, layout))
    o = gl.arange(0, OUT, gl.SliceLayout(1, layout))
    weight_C = gl.load(weight + c).to(gl.float32)[None, :]
    of_fn, of_weight_TC = (), gl.zeros([ROWS, STEP], gl.float32, layout)
    for k in gl.static_range(N):
        w_OC = gl.load(fn + (o * (N * D))[:, None] + (k * D + c)[None, :], mask=(o < LOGITS)[:, None], other=0.0)
        fn_s.index(k).store(w_OC.to(gl.bfloat16))
        of_fn = of_fn + (gl.zeros([STEP, OUT], gl.float32, of_products),)
    parts_gates += gl.program_id(0).to(gl.int64) * (N + N * N) * tokens
    held = _of_tokens(post, comb, pre, of_norm, of_logits, first, tokens, layout, of_g, N, LOGITS, PENDING)
    turn = 0
    for tile in range(first, end, stride):
        t = tile.to(gl.int64) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        real = t < tokens
        real_TC, at_TC, streams_TC = real[:, None], t[:, None] * D + c[None, :], t[:, None] * (N * D) + c[None, :]
        tiles, flip = turn % STAGES * TILES, turn % 2
        g_s.index(flip).store(held[0].to(gl.bfloat16))
        mbarrier.wait(full.index(turn % STAGES), turn // STAGES & 1)
        before, x_TC = (), gl.zeros([ROWS, STEP], gl.float32, layout)
        for k in gl.static_range(N):
            before = before + (tiles_s.index(tiles + 1 + k).load(layout),)
        new = before
        if PENDING:  # as `hyper.expanded`, bit for bit
            output_TC = _wide(tiles_s.index(tiles + N + 1), layout)
            new = ()
            for k in gl.static_range(N):
                sums = held[POST + k][:, None] * output_TC
                for j in gl.static_range(N):
                    sums = gl.fma(held[COMB + j * N + k][:, None], before[j].to(gl.float32), sums)
                new = new + (sums.to(gl.bfloat16),)
        for k in gl.static_range(N):
            new_s.index(flip * N + k).store(new[k])
            x_TC = gl.fma(held[PRE + k][:, None], new[k].to(gl.float32), x_TC)
        fence_async_shared()
        barrier()
        if turn > 0:  # all are done with the tile before
            mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), count=1)
        zero = gl.zeros([STEP, ROWS], gl.float32, of_products)
        products, sums = (), ()
        for k in gl.static_range(N):
            w_CO = fn_s.index(k).permute((1, 0))
            products = products + (warpgroup_mma(w_CO, g_s.index(flip), zero, use_acc=False, is_async=True),)
        for k in gl.static_range(N):
            x_CT, g_TO = new_s.index(flip * N + k).permute((1, 0)), g_s.index(flip).permute((1, 0))
            sums = sums + (warpgroup_mma(x_CT, g_TO, of_fn[k], is_async=True),)
        products = warpgroup_mma_wait(N, products)
        for k in gl.static_range(N):
            products_s.index(k).store(gl.permute(products[k], (1, 0)))
        g_TC = _wide(tiles_s.index(tiles), layout) * held[NORM][:, None]
        of_weight_TC = gl.fma(g_TC, x_TC, of_weight_TC)
        g_TC = gl.fma(x_TC, held[NORM + 1][:, None], g_TC * weight_C)
        barrier()
        whole = ()
        for k in gl.static_range(N):
            of = gl.fma(held[PRE + k][:, None], g_TC, products_s.index(k).load(layout))
            of = gl.fma(held[SQUARE][:, None], new[k].to(gl.float32), of)
            if PENDING:
                of += _wide(tiles_s.index(tiles + N + 2 + k), layout)
            whole = whole + (of,)
        ahead = _of_tokens(post, comb, pre, of_norm, of_logits, tile + stride, tokens, layout, of_g, N, LOGITS, PENDING)
        of_gates = parts_gates + t
        for j in gl.static_range(N):
            of = whole[j]
            if PENDING:
                of = held[COMB + j * N][:, None] * whole[0]
                for k in gl.static_range(1, N):
                    of = gl.fma(held[COMB + j * N + k][:, None], whole[k], of)
                old_TC = _wide(tiles_s.index(tiles + 1 + j), layout)  # again: it takes fewer registers
                for k in gl.static_range(N):
                    gl.store(of_gates + (N + j * N + k) * tokens, gl.sum(old_TC * whole[k], 1), mask=real)
            gl.store(of_old + streams_TC + j * D, of.to(gl.bfloat16), mask=real_TC)
        if PENDING:
            of = held[POST][:, None] * whole[0]
            for k in gl.static_range(1, N):
                of = gl.fma(held[POST + k][:, None], whole[k], of)
            gl.store(of_output + at_TC, of.to(gl.bfloat16), mask=real_TC)
            output_TC = _wide(tiles_s.index(tiles + N + 1), layout)
            for k in gl.static_range(N):
                gl.store(of_gates + k * tokens, gl.sum(output_TC * whole[k], 1), mask=real)
        of_fn = warpgroup_mma_wait(0, sums)
        held = ahead
        turn += 1
    part = parts_fn + gl.program_id(1).to(gl.int64) * LOGITS * N * D
    o = gl.arange(0, OUT, gl.SliceLayout(0, of_products))
    d = gl.program_id(0) * STEP + gl.arange(0, STEP, gl.SliceLayout(1, of_products))
    for k in gl.static_range(N):
        gl.store(part + (o * (N * D))[None, :] + (k * D + d)[:, None], of_fn[k], mask=(o < LOGITS)[None, :])
    gl.store(parts_weight + gl.program_id(1) * D + c, gl.sum(of_weight_TC, 0))


@gluon.jit(do_not_specialize=["tokens"])
def streams_kernel(
    old, output, of_new, of_x, post, comb, fn, weight, pre, of_norm, of_logits, of_old, of_output, parts_gates,
    parts_fn, parts_weight, tokens, D: gl.constexpr, N: gl.constexpr, LOGITS: gl.constexpr, PENDING: gl.constexpr,
):  # fmt: skip
    TILES: gl.constexpr = 2 * N + 2 if PENDING else N + 1
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    tiles_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES * TILES, ROWS, STEP], shared)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    post, comb, fn, weight, pre, of_norm, of_logits, of_old, of_output, parts_gates, parts_fn,
                    parts_weight, tokens, tiles_s, full, empty, D, N, LOGITS, PENDING,
                ),
            ),
            (_load, (old, output, of_new, of_x, tokens, tiles_s, full, empty, D, N, PENDING)),
        ],
        [1],
        [24],
    )  # fmt: skip


def programs(old: Tensor) -> int:
    """Of each slice of channels: so many that each multiprocessor has one."""
    tokens, _, d = old.shape
    return max(min(multiprocessors(old.device) // (d // CHANNELS), math.ceil(tokens / TOKENS)), 1)


def _described(x: Tensor) -> TensorDescriptor:
    """Rows of x [T, ..], a tile of them at a time."""
    return TensorDescriptor.from_tensor(x.flatten(1), [TOKENS, CHANNELS], gl.NVMMASharedLayout(128, 16, 2))


def streams_backward(
    old: Tensor, update: tuple[Tensor, Tensor, Tensor] | None, fn: Tensor, weight: Tensor, pre: Tensor, of_norm: Tensor,
    of_logits: Tensor, of_new: Tensor, of_x: Tensor, of_old: Tensor, of_output: Tensor, parts_gates: Tensor,
    parts_fn: Tensor, parts_weight: Tensor,
) -> None:  # fmt: skip
    """Fills of_old, of_output and, of so many programs as it has, the parts; d is a multiple of 64, all streams bf16.

    Arguments as `hyper_backward._streams_backward` has them; without an update of_new and of_output may be any tensor
    [T, d].
    """
    d, (output, post, comb) = old.shape[2], update or (of_x, fn, fn)
    streams_kernel[(d // CHANNELS, parts_fn.shape[0])](
        *(_described(x) for x in (old, output, of_new, of_x)), post, comb, fn, weight, pre, of_norm, of_logits, of_old,
        of_output, parts_gates, parts_fn, parts_weight, old.shape[0], D=d, N=old.shape[1], LOGITS=fn.shape[0],
        PENDING=update is not None, num_warps=8,
    )  # fmt: skip
