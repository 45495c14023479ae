"""Products with a weight for Hopper, in Gluon: what `linear._linear` computes, bit for bit, for many rows in bf16.

Programs stay and take one tile of the result after another. Each of two warpgroups multiplies 64 rows with the same
columns, and the first also fetches: what the step after the next needs, while the product of this one is under way, and
so the next tile's first operands while this one is stored. A row's sums go in steps of 16 channels, one after another,
as those of `_linear` do. What becomes of a tile, a kernel's `END` says.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper import barrier, programs
from .launch import SAME_BITS

ROWS, DEPTH = gl.constexpr(64), gl.constexpr(64)  # of a warpgroup; channels of a step
PARTS = gl.constexpr(2)  # warpgroups
BAND = gl.constexpr(8)  # tiles of rows that go across together, as neighbours in time share operands in the L2 cache


@gluon.jit
def _place(item, down, across):
    """Group, and row and column in tiles, of an item."""
    g, tile = item // (down * across), item % (down * across)
    band = tile // (BAND * across)
    height = gl.minimum(down - band * BAND, BAND)
    return g, band * BAND + tile % (BAND * across) % height, tile % (BAND * across) // height


@gluon.jit
def _fetch(
    x, weight, x_s, weight_s, full, empty, at, start, down, across, depth, out, items,
    COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The operands of a step, which the tuple `at` counts: all steps, item, channel. Returns the next one."""
    step, item, k = at
    needed = item < items
    g, row, column = _place(item, down, across)
    stage = step % STAGES
    bar = full.index(stage)
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1, pred=needed)
    mbarrier.expect(bar, (PARTS * ROWS + COLUMNS) * DEPTH * 2, pred=needed)
    for part in gl.static_range(PARTS):
        place = [start + (row * PARTS + part) * ROWS, g * depth + k]
        tma.async_copy_global_to_shared(x, place, bar, x_s.index(stage * PARTS + part), pred=needed)
    tma.async_copy_global_to_shared(weight, [g * out + column * COLUMNS, k], bar, weight_s.index(stage), pred=needed)
    last = k + DEPTH >= depth
    return step + 1, gl.where(last, item + gl.num_programs(0), item), gl.where(last, 0, k + DEPTH)


@gluon.jit
def _multiply(
    own: gl.constexpr, x, weight, given, x_s, weight_s, full, empty, start, down, across, depth, out, groups,
    END: gl.constexpr, HOW: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    items = groups * down * across
    at = (0, gl.program_id(0), 0)
    if own == 0:
        for _ in range(STAGES - 2):
            at = _fetch(
                x, weight, x_s, weight_s, full, empty, at, start, down, across, depth, out, items, COLUMNS, STAGES
            )
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        g, row, column = _place(item, down, across)
        sums = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
        for k in range(0, depth, DEPTH):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            weights = weight_s.index(stage).permute((1, 0))
            sums = warpgroup_mma(x_s.index(stage * PARTS + own), weights, sums, is_async=True)
            if own == 0:
                if at[0] <= step + STAGES - 2:
                    at = _fetch(
                        x,
                        weight,
                        x_s,
                        weight_s,
                        full,
                        empty,
                        at,
                        start,
                        down,
                        across,
                        depth,
                        out,
                        items,
                        COLUMNS,
                        STAGES,
                    )
            sums = warpgroup_mma_wait(1, [sums])
            barrier()
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        sums = warpgroup_mma_wait(0, [sums])
        barrier()
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        if own == 0:
            for _ in range(2):  # more of the next tile, while this one comes to its end
                at = _fetch(
                    x, weight, x_s, weight_s, full, empty, at, start, down, across, depth, out, items, COLUMNS, STAGES
                )
        END(sums, start + (row * PARTS + own) * ROWS, g, column * COLUMNS, given, HOW)


@gluon.jit
def multiply_tiles(
    x, weight, given, start, rows, depth, out, groups,
    END: gl.constexpr, HOW: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """END(tile [64, COLUMNS] fp32, first row, group, first column of the group's, given, HOW) for every tile of so many
    rows of x from `start` times a group's `out` rows of the weight."""
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES * PARTS, ROWS, DEPTH], shared)
    weight_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, COLUMNS, DEPTH], shared)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=PARTS)
    down, across = gl.cdiv(rows, PARTS * ROWS), gl.cdiv(out, COLUMNS)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0, x, weight, given, x_s, weight_s, full, empty, start, down, across, depth, out, groups,
                    END, HOW, COLUMNS, STAGES,
                ),
            ),
            (
                _multiply,
                (
                    1, x, weight, given, x_s, weight_s, full, empty, start, down, across, depth, out, groups,
                    END, HOW, COLUMNS, STAGES,
                ),
            ),
        ],
        [4],
        [240],
    )  # fmt: skip


@gluon.jit
def places(tile, row, column):
    """Rows [64, 1] and columns [1, COLUMNS] of a tile's numbers."""
    layout: gl.constexpr = tile.type.layout
    r = row + gl.arange(0, tile.type.shape[0], gl.SliceLayout(1, layout))
    c = column + gl.arange(0, tile.type.shape[1], gl.SliceLayout(0, layout))
    return r[:, None], c[None, :]


@gluon.jit
def wide(tile):
    """A tile of 16-bit numbers, in a layout in which a thread stores 16 bytes at once."""
    return gl.convert_layout(tile, gl.BlockedLayout([2, 8], [8, 4], [4, 1], [1, 0]))


@gluon.jit
def _store(sums, row, g, column, given, HOW: gl.constexpr):
    y, rows, out, groups = given
    values = sums
    if y.dtype.element_ty == gl.bfloat16:
        values = wide(sums.to(gl.bfloat16))
    r, c = places(values, row, column)
    gl.store(y + r.to(gl.int64) * (groups * out) + g * out + c, values, mask=(r < rows) & (c < out))


@gluon.jit
def linear_kernel(x, weight, y, rows, depth, out, groups, COLUMNS: gl.constexpr, STAGES: gl.constexpr):
    """y[:, g * out:] = x[:, g * depth:] times weight[g * out:]ᵀ of each group g."""
    multiply_tiles(x, weight, (y, rows, out, groups), 0, rows, depth, out, groups, _store, 0, COLUMNS, STAGES)


def described(x: Tensor, rows: int, depth: int = 0) -> TensorDescriptor:
    """So many rows and the channels of a step; behind the first `depth` channels of x, if not all, there are zeros."""
    shape, layout = [x.shape[0], depth or x.shape[1]], gl.NVMMASharedLayout(128, 16, 2)
    return TensorDescriptor(x, shape, list(x.stride()), [rows, 64], layout)


def multiply(x: Tensor, weight: Tensor, y: Tensor, groups: int) -> None:
    """Fills y [T, G * o] with bf16 x [T, G * i] times weight [G * o, i], a block of the weight a group."""
    rows, depth, out = x.shape[0], weight.shape[1], weight.shape[0] // groups
    # Narrower tiles where there are too few for all multiprocessors.
    columns, down = 256, -(-rows // 128)
    while columns > 64 and groups * down * -(-out // columns) <= programs(1 << 20, x.device) // 2:
        columns //= 2
    stages = {256: 4, 128: 6, 64: 8}[columns]
    linear_kernel[(programs(groups * down * -(-out // columns), x.device),)](
        described(x, 64), described(weight, columns), y, rows, depth, out, groups,
        COLUMNS=columns, STAGES=stages, num_warps=4, **SAME_BITS,
    )  # fmt: skip
