"""FP8 products for Hopper, in Gluon: what `fp8._multiply` and fp8_experts.py's products compute, with the same bits.

One warp loads, by the tensor memory accelerator, 128 channels of 128 rows and of two tiles of 128 of the weight at a
time. Two warpgroups multiply 64 of the rows each, one tile after the other: while one scales a sum of 128 channels and
adds it up in fp32, the other's product runs. Programs stay and take one tile after another, so that the next one's
loads run while this one is stored.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .fp8 import as_rows, gated, power, rounded
from .hopper import barrier, programs
from .launch import SAME_BITS
from .linear import tile_place
from .moe import locate
from .moe_rows import Rows

HEIGHT, BLOCK = gl.constexpr(64), gl.constexpr(128)  # rows of a warpgroup; channels, and rows of a weight's tile
STAGES = gl.constexpr(4)
GROUP = gl.constexpr(8)  # tiles of rows that go across together
PRODUCT, UP, DOWN = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)


@gluon.jit
def _place(tile, expert_of_tile, first, count, tall, across, width, KIND: gl.constexpr):
    """Of a tile: its first row, its number among those across, and the weight's rows where its two halves begin."""
    if KIND == PRODUCT:
        down, number = tile_place(tile, tall, across, GROUP)
        row, left = down * 2 * HEIGHT, number * 2 * BLOCK
    else:
        expert, row, number = locate(tile, expert_of_tile, first, count, across, 2 * HEIGHT, GROUP)
        left = expert * 2 * width + number * BLOCK if KIND == UP else expert * width + number * 2 * BLOCK
    return row, number, left, left + (width if KIND == UP else BLOCK)


@gluon.jit
def _load(
    x, weight, x_s, weight_s, full, empty, expert_of_tile, first, count, tiles, tall, across, blocks, width,
    KIND: gl.constexpr,
):  # fmt: skip
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, _, left, right = _place(tile, expert_of_tile, first, count, tall, across, width, KIND)
        for block in range(blocks):
            stage = step % STAGES
            bar, k = full.index(stage), block * BLOCK
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, 2 * (HEIGHT + BLOCK) * BLOCK)
            tma.async_copy_global_to_shared(x, [row, k], bar, x_s.index(2 * stage))
            tma.async_copy_global_to_shared(weight, [left, k], bar, weight_s.index(2 * stage))
            tma.async_copy_global_to_shared(x, [row + HEIGHT, k], bar, x_s.index(2 * stage + 1))
            tma.async_copy_global_to_shared(weight, [right, k], bar, weight_s.index(2 * stage + 1))
            step += 1


@gluon.jit
def _store(out, values, row, rows, column, width):
    """values [64, 128] to rows from `row` on, of which there are `rows`, of out [rows, width]: 16 bytes a thread."""
    EACH: gl.constexpr = 128 // values.dtype.primitive_bitwidth
    wide: gl.constexpr = gl.BlockedLayout([1, EACH], [32 * EACH // BLOCK, BLOCK // EACH], [4, 1], [1, 0])
    r = row + gl.arange(0, HEIGHT, gl.SliceLayout(1, wide))
    c = column + gl.arange(0, BLOCK, gl.SliceLayout(0, wide))
    at = out + r.to(gl.int64)[:, None] * width + c[None, :]
    gl.store(at, gl.convert_layout(values, wide), mask=(r < rows)[:, None])


@gluon.jit
def _multiply(
    own: gl.constexpr, x_scales, w_scales, out, projected, h_scales, weights, slot_of_row, x_s, weight_s, full, empty,
    expert_of_tile, first, count, tiles, tall, across, blocks, width, rows, limit,
    KIND: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
    lane = own * HEIGHT + gl.arange(0, HEIGHT, gl.SliceLayout(1, layout))
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, number, low, high = _place(tile, expert_of_tile, first, count, tall, across, width, KIND)
        r = row + lane
        of_rows = x_scales + gl.minimum(r, rows - 1).to(gl.int64) * blocks
        of_left, of_right = w_scales + low // BLOCK * blocks, w_scales + high // BLOCK * blocks
        scale_R, scale, other = gl.load(of_rows), gl.load(of_left), gl.load(of_right)
        left = gl.zeros([HEIGHT, BLOCK], gl.float32, layout)
        right = gl.zeros([HEIGHT, BLOCK], gl.float32, layout)
        for block in range(blocks):
            by_left, by_right = power(scale_R) * power(scale), power(scale_R) * power(other)
            ahead = gl.minimum(block + 1, blocks - 1)
            scale_R, scale, other = gl.load(of_rows + ahead), gl.load(of_left + ahead), gl.load(of_right + ahead)
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            some = x_s.index(2 * stage + own)
            sums = gl.zeros([HEIGHT, BLOCK], gl.float32, layout)
            sums = warpgroup_mma(some, weight_s.index(2 * stage).permute((1, 0)), sums, use_acc=False, is_async=True)
            sums = warpgroup_mma_wait(0, [sums])
            left = gl.fma(sums, by_left[:, None], left)
            sums = gl.zeros([HEIGHT, BLOCK], gl.float32, layout)
            tile_s = weight_s.index(2 * stage + 1).permute((1, 0))
            sums = warpgroup_mma(some, tile_s, sums, use_acc=False, is_async=True)
            sums = warpgroup_mma_wait(0, [sums])
            barrier()
            mbarrier.arrive(empty.index(stage), count=1)
            right = gl.fma(sums, by_right[:, None], right)
            step += 1
        start = row + own * HEIGHT
        if KIND == UP:
            slot = gl.load(slot_of_row + r)
            real = slot >= 0
            weight = gl.load(weights + slot, mask=real, other=0.0)
            # The rows of padding hold anything.
            gate = rounded(gl.where(real[:, None], left, 0.0), gl.bfloat16)
            up = rounded(gl.where(real[:, None], right, 0.0), gl.bfloat16)
            if KEEP:
                _store(projected, gate.to(gl.bfloat16), start, rows, number * BLOCK, 2 * width)
                _store(projected, up.to(gl.bfloat16), start, rows, width + number * BLOCK, 2 * width)
            codes, scales = as_rows(rounded(gated(gate, up, limit) * weight[:, None], gl.bfloat16))
            _store(out, codes, start, rows, number * BLOCK, width)
            gl.store(h_scales + r.to(gl.int64) * across + number, scales.to(gl.uint8))
        else:
            _store(out, left.to(gl.bfloat16), start, rows, 2 * number * BLOCK, width)
            _store(out, right.to(gl.bfloat16), start, rows, 2 * number * BLOCK + BLOCK, width)


@gluon.jit
def product_kernel(
    x, x_scales, weight, w_scales, out, projected, h_scales, weights, slot_of_row, expert_of_tile, first, count, total,
    tall, across, blocks, width, rows, limit, KIND: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    x_s = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, HEIGHT, BLOCK], shared)
    weight_s = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, BLOCK, BLOCK], shared)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    tiles = tall * across
    if KIND != PRODUCT:
        tiles = gl.load(total) * across
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0, x_scales, w_scales, out, projected, h_scales, weights, slot_of_row, x_s, weight_s, full, empty,
                    expert_of_tile, first, count, tiles, tall, across, blocks, width, rows, limit, KIND, KEEP,
                ),
            ),
            (
                _multiply,
                (
                    1, x_scales, w_scales, out, projected, h_scales, weights, slot_of_row, x_s, weight_s, full, empty,
                    expert_of_tile, first, count, tiles, tall, across, blocks, width, rows, limit, KIND, KEEP,
                ),
            ),
            (
                _load,
                (
                    x, weight, x_s, weight_s, full, empty, expert_of_tile, first, count, tiles, tall, across, blocks,
                    width, KIND,
                ),
            ),
        ],
        [4, 1],
        [224, 56],
    )  # fmt: skip


def _described(x: Tensor, rows: int) -> TensorDescriptor:
    """x [.., K] as rows of K, so many of them and 128 channels at a time."""
    return TensorDescriptor.from_tensor(x.flatten(0, -2), [rows, 128], gl.NVMMASharedLayout(128, 8, 2))


def takes(*sizes: int) -> bool:
    """Whether the kernel takes channels, and rows of a weight's, that many."""
    return all(size % 128 == 0 for size in sizes)


def multiply(x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor, out: Tensor) -> None:
    """out bf16 [T, o] = codes x [T, i] times weight [o, i]; o is a multiple of 256, i of 128."""
    rows, width = out.shape
    tall, across = -(-rows // 128), width // 256
    scales = w_scales.view(torch.uint8)
    product_kernel[(programs(tall * across, x.device),)](
        _described(x, 64), x_scales.view(torch.uint8), _described(weight, 128), scales, out, out, scales, out,
        scales, scales, scales, scales, scales, tall, across, x.shape[1] // 128, width, rows, 0.0,
        KIND=0, KEEP=False, num_warps=4, **SAME_BITS,
    )  # fmt: skip


def project_up(
    x: tuple[Tensor, Tensor], weights: Tensor, gate_up: Tensor, scales: Tensor, rows: Rows, limit: float,
    projected: Tensor, hidden: Tensor, h_scales: Tensor, keep: bool,
) -> None:  # fmt: skip
    """`fp8_experts.project_up`, of sorted rows x."""
    codes, x_scales = x
    width = hidden.shape[1]
    across = width // 128
    product_kernel[(programs(rows.expert.numel() * across, codes.device),)](
        _described(codes, 64), x_scales, _described(gate_up, 128), scales.view(torch.uint8),
        hidden, projected, h_scales, weights, rows.slot, rows.expert, rows.first, rows.counts, rows.total,
        0, across, codes.shape[1] // 128, width, codes.shape[0], limit, KIND=1, KEEP=keep, num_warps=4, **SAME_BITS,
    )  # fmt: skip


def project_down(x: tuple[Tensor, Tensor], down: Tensor, scales: Tensor, rows: Rows, out: Tensor) -> None:
    """`fp8_experts.project_down`."""
    (codes, x_scales), scales = x, scales.view(torch.uint8)
    width = out.shape[1]
    across = width // 256
    product_kernel[(programs(rows.expert.numel() * across, codes.device),)](
        _described(codes, 64), x_scales, _described(down, 128), scales,
        out, out, scales, out, rows.slot, rows.expert, rows.first, rows.counts, rows.total,
        0, across, codes.shape[1] // 128, width, codes.shape[0], 0.0, KIND=2, KEEP=False, num_warps=4, **SAME_BITS,
    )  # fmt: skip
