"""How the keys of hopper_forward.py come into shared memory: which program computes what, and its loading warps."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from .hopper import paged_row

HEADS, BLOCK = gl.constexpr(64), gl.constexpr(64)  # of one program, of one tile of keys


@gluon.jit
def item_of(item, position, blocks, splits, ratio, topk, W: gl.constexpr, KIND: gl.constexpr, LIMIT: gl.constexpr):
    """Query, first head, split, position, entries, and the tiles' places `begin` ... `end`, which is 0 for none."""
    split, rest = item % splits, item // splits
    t = rest // blocks
    place = gl.load(position + t)
    count = 0
    if KIND != 0:
        count = (place + 1) // ratio
        if KIND == 2:
            count = gl.minimum(count, topk)
    WINDOW: gl.constexpr = (W + BLOCK - 1) // BLOCK * BLOCK  # where the tiles of entries begin
    begin = gl.where(split == 0, 0, WINDOW)
    end = WINDOW + gl.minimum(count - split * LIMIT, LIMIT)
    return t, rest % blocks * HEADS, split, place, count, begin, gl.where(split * LIMIT < gl.maximum(count, 1), end, 0)


@gluon.jit
def _load_tile(
    rows, entries, row_data, entry_data, window, row, index, keys_s, full, empty, turn,
    tile: gl.constexpr, D: gl.constexpr, KIND: gl.constexpr, RING: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    SPREAD: gl.constexpr = KIND == 2 or (KIND == 1 and PAGE > 0)  # entries do not lie in a row
    for half in gl.static_range(2):
        bar, to, side = full.index(2 * tile + half), keys_s.index(2 * tile + half), half * (D // 2)
        mbarrier.wait(empty.index(2 * tile + half), (turn & 1) ^ 1)
        if RING and SPREAD:
            _gather(gl.where(window, row_data, entry_data), index, side, bar, to, D)
        elif window:
            if RING:
                _gather(row_data, index, side, bar, to, D)
            else:
                _copy(rows, row, side, bar, to, D)
        elif SPREAD:
            _gather(entry_data, index, side, bar, to, D)
        elif KIND == 1:
            _copy(entries, row, side, bar, to, D)


@gluon.jit
def _gather(data, index, side, bar, to, D: gl.constexpr):
    """Keys that do not lie in a row, by every thread."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    d = gl.arange(0, D // 2, gl.SliceLayout(0, layout)) + side
    async_copy.async_copy_global_to_shared(to, data + index.to(gl.int64)[:, None] * D + d[None, :])
    async_copy.mbarrier_arrive(bar, increment_count=False)


@gluon.jit
def _copy(described, row, side, bar, to, D: gl.constexpr):
    """Keys that do, by the tensor memory accelerator; the barrier awaits all threads that could copy.

    Triton keeps the four warps together around `expect` and `arrive`: else one could wait for a phase that has passed.
    """
    mbarrier.expect(bar, BLOCK * D)
    tma.async_copy_global_to_shared(described, [row, side], bar, to)
    mbarrier.arrive(bar, count=127)


@gluon.jit
def _tile(
    chosen, table, i, place, first, first_entry, low, count, slots,
    W: gl.constexpr, KIND: gl.constexpr, RING: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Whether the tile at i is of the window, its first row, and each key's row where it is not one after another."""
    WINDOW: gl.constexpr = (W + BLOCK - 1) // BLOCK * BLOCK
    layout: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
    lane = gl.arange(0, BLOCK, layout)
    window = i < WINDOW
    row = gl.where(window, first + place - (W - 1) + i, first_entry + low + i - WINDOW)
    index = lane
    if RING:
        number = gl.maximum(place - (W - 1) + i + lane, 0)  # what is not seen only has to be there
        index = first + number % slots
    if KIND == 2 or (KIND == 1 and PAGE > 0):
        at = low + i - WINDOW + lane
        if KIND == 2:
            number = gl.load(chosen + at, mask=(at >= 0) & (at < count), other=0)
        else:
            number = gl.where((at >= 0) & (at < count), at, 0)
        if PAGE == 0:
            index = gl.where(window, index, first_entry + number)
        elif i >= WINDOW:
            index = paged_row(table, first_entry, number, PAGE)
    return window, row, index


@gluon.jit
def load(
    q, rows, entries, row_data, entry_data, chosen, position, row_first, entry_first, table,
    keys_s, query_s, full, empty, query_full, query_empty,
    heads, slots, ratio, topk, items, blocks, splits,
    D: gl.constexpr, W: gl.constexpr, LIMIT: gl.constexpr, KIND: gl.constexpr, RING: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    turn = 0
    second_turn = 0
    query_turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        t, head, split, place, count, begin, end = item_of(item, position, blocks, splits, ratio, topk, W, KIND, LIMIT)
        if end > 0:
            mbarrier.wait(query_empty, (query_turn & 1) ^ 1)
            mbarrier.expect(query_full, HEADS * D * 2)
            for half in gl.static_range(2):
                tma.async_copy_global_to_shared(q, [t * heads + head, half * (D // 2)], query_full, query_s.index(half))
            query_turn += 1
            first = gl.load(row_first + t)
            first_entry = gl.load(entry_first + t)
            low = split * LIMIT
            own = chosen + t.to(gl.int64) * topk
            for i in range(begin, end, 2 * BLOCK):
                window, row, index = _tile(
                    own, table, i, place, first, first_entry, low, count, slots, W, KIND, RING, PAGE
                )
                # Its numbers of entries arrive while the first tile is copied.
                window_, row_, index_ = _tile(
                    own, table, i + BLOCK, place, first, first_entry, low, count, slots, W, KIND, RING, PAGE
                )
                _load_tile(
                    rows, entries, row_data, entry_data, window, row, index, keys_s, full, empty, turn,
                    0, D, KIND, RING, PAGE,
                )  # fmt: skip
                turn += 1
                if i + BLOCK < end:
                    _load_tile(
                        rows, entries, row_data, entry_data, window_, row_, index_, keys_s, full, empty, second_turn,
                        1, D, KIND, RING, PAGE,
                    )  # fmt: skip
                    second_turn += 1
