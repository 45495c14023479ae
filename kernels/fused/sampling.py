"""Triton kernels of sampling: `kernels.sampling` in two launches, before that of the log-probs.

The first has a program for each block of a row: it adds the noise, and leaves the block's best token. The second has
one for each row, which takes the best of these. Where top_k, top_p or min_p may cut the row, the first leaves the
highest logit instead, and the second

    1. counts the row's tokens by how far they are below it, in `BINS` steps, and sums up their probabilities,
    2. finds from the counts how far down the set may reach, and gathers the tokens so far down, by rising ids; of more
       than `ROOM`, all steps that follow read the row itself,
    3. finds the border, the lowest logit in the set, bit by bit: by counts for top_k, by probabilities for top_p, and,
       of several tokens at the border, the last id that has room,
    4. draws among those that are left.

So a cut row is read three times, twice of them by one program, which finds some of it in the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sampling import EXP2, LOG2E, DrawSettings
from .launch import SAME_BITS, next_power
from .vocabulary import is_allowed

BLOCK = 2048  # tokens of a program that draws
TILE = 2048  # tokens that a program looks at together, where it has a whole row
ROOM = 8192  # tokens of a row that are gathered
BINS: tl.constexpr = tl.constexpr(256)  # 16 an octave of 1 + 16 times the logits' distance
POWER: tl.constexpr = tl.constexpr(EXP2)
LOG2: tl.constexpr = tl.constexpr(LOG2E)
LAST: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # above every id
NOTHING: tl.constexpr = tl.constexpr(-(2**63))  # of `_packed`: nothing may be drawn ...
BROKEN: tl.constexpr = tl.constexpr(2**63 - 1)  # ... or there is a NaN or +inf


@triton.jit
def _order(x):
    """int32 in the order of fp32 numbers; 0.0 and -0.0 are equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unordered(order):
    """The number that has this order."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _packed(x, token, there):
    """int64: the highest x, and of equal ones the lowest token, is the highest."""
    return tl.where(there, (_order(x).to(tl.int64) << 32) | (LAST - token), NOTHING)


@triton.jit
def _unpacked(best):
    return _unordered((best >> 32).to(tl.int32)), LAST - (best & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _words(word, seed, request, position):
    """Philox's four words of each counter `word`."""
    high = (request >> 32).to(tl.uint32)
    return tl.philox(seed, word.to(tl.uint32), position.to(tl.uint32), request.to(tl.uint32), high)


@triton.jit
def _gumbel(bits):
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))


@triton.jit
def _temperature(temperature):
    """At 0 as at 1; what logits are multiplied with for the noise, as PyTorch divides, and for probabilities, as a loss
    does."""
    t = tl.where(temperature == 0, 1.0, temperature)
    return tl.div_rn(1.0, t.to(tl.float32)), (1.0 / t).to(tl.float32)


@triton.jit
def _weights(below):
    """`kernels.sampling._weights`."""
    y = tl.maximum(below * LOG2, -42.0)
    whole = tl.floor(y)
    f = y - whole
    power = f * POWER[4] + POWER[3]
    power = power * f + POWER[2]
    power = power * f + POWER[1]
    power = power * f + POWER[0]
    return (((power * f + 1.0) * 8388608.0).to(tl.int64) << 17) >> (-whole).to(tl.int64)


@triton.jit
def _bin(distance):
    """Of logits that lie `distance` below the highest: int32, rising with it."""
    steps = (distance * 16.0 + 1.0).to(tl.int32, bitcast=True) - 0x3F800000
    return tl.minimum(steps >> 19, BINS - 1)


@triton.jit
def _nearest(bins):
    """The least distance of a bin."""
    return (((bins << 19) + 0x3F800000).to(tl.float32, bitcast=True) - 1.0) * 0.0625


@triton.jit
def _draw(
    logits, allowed, temperature, seed, top_k, top_p, min_p, request, position, best, sets, vocabulary, words,
    MASKED: tl.constexpr, CUTS: tl.constexpr, SETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """best [B, blocks]: the block's best token, packed with its logit and noise, or, of a row that may be cut or is
    greedy, its logit alone. And of sets [B, words] the block's, nothing if the row may be cut."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocabulary
    x = tl.load(logits + row * vocabulary + token, mask=inside, other=float("-inf"))
    there = x > float("-inf")
    if MASKED:
        there = there & is_allowed(allowed + row * words, token, inside)
    wrong = tl.max((x < float("inf")).to(tl.int32) ^ 1) > 0
    whole = True
    if CUTS:
        whole = (tl.load(top_k + row) <= 0) & (tl.load(top_p + row) >= 1) & (tl.load(min_p + row) <= 0)
    t = tl.load(temperature + row)
    if whole & (t != 0):
        inverse, _ = _temperature(t)
        word = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        w0, w1, w2, w3 = _words(word, tl.load(seed + row), tl.load(request + row), tl.load(position + row))
        bits = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK)
        x = x * inverse + _gumbel(bits)
    found = tl.max(_packed(x, token, there))
    tl.store(best + row * tl.num_programs(1) + block, tl.where(wrong, BROKEN, found))
    if SETS:
        bit = (there & whole).to(tl.int32).reshape(BLOCK // 32, 32) << tl.arange(0, 32)[None, :]
        word = block * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
        tl.store(sets + row * words + word, tl.sum(bit, 1), mask=word < words)


@triton.jit
def _tile(logits, allowed, gathered, ids, start, count, few, MASKED: tl.constexpr, TILE: tl.constexpr):
    """Tokens of a row from `start` on, their logits, and whether they may be drawn: of the gathered ones, if `few`."""
    at = start + tl.arange(0, TILE)
    inside = at < count
    token = tl.where(few, tl.load(ids + at, mask=inside & few, other=0), at)
    x = tl.load(logits + at, mask=inside & (few == 0), other=float("-inf"))
    x = tl.where(few, tl.load(gathered + at, mask=inside & few, other=float("-inf")), x)
    there = x > float("-inf")
    if MASKED:
        there = there & is_allowed(allowed, token, inside)
    return token, x, there


@triton.jit
def _shares(x, most, scale, there, BY_MASS: tl.constexpr):
    """What each token counts for: its probability, or one."""
    if BY_MASS:
        return tl.where(there, _weights((x - most) * scale), 0)
    return there.to(tl.int64)


@triton.jit
def _border(
    logits, allowed, gathered, ids, count, few, most, scale, lowest, last, need,
    BY_MASS: tl.constexpr, MASKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The order of the lowest logit, or one below it and above the next, and the last id there, of the first tokens
    that count for `need`: of those above the border that is given, `lowest` and `last`."""
    # As unsigned numbers, so that bits go from the highest to the lowest, until the border parts the right tokens.
    border, bit, parted = tl.full([], 0, tl.uint32), 31, tl.full([], 0, tl.int1)
    while (bit >= 0) & (parted == 0):
        higher = border | (tl.full([], 1, tl.uint32) << bit)
        signed = (higher ^ 0x80000000).to(tl.int32, bitcast=True)
        shares, least = tl.zeros([TILE], tl.int64), tl.full([TILE], BROKEN, tl.int64)
        for start in range(0, count, TILE):
            token, x, there = _tile(logits, allowed, gathered, ids, start, count, few, MASKED, TILE)
            order = _order(x)
            there = there & ((order > lowest) | ((order == lowest) & (token <= last))) & (order >= signed)
            each = _shares(x, most, scale, there, BY_MASS)
            shares += each
            least = tl.minimum(least, tl.where(there, each, BROKEN))
        reached = tl.sum(shares)
        if reached >= need:
            border, parted = higher, reached - tl.min(least) < need
        bit -= 1
    # What parts the right tokens may be below the border that was given, which holds on.
    signed = tl.maximum((border ^ 0x80000000).to(tl.int32, bitcast=True), lowest)
    above, level = tl.zeros([TILE], tl.int64), tl.zeros([TILE], tl.int32)
    for start in range(0, count, TILE):
        token, x, there = _tile(logits, allowed, gathered, ids, start, count, few, MASKED, TILE)
        order = _order(x)
        there = there & ((order > lowest) | ((order == lowest) & (token <= last)))
        above += _shares(x, most, scale, there & (order > signed), BY_MASS)
        level += (there & (order == signed)).to(tl.int32)
    one = tl.full([], 1, tl.int64)
    if BY_MASS:
        one = tl.maximum(_weights((_unordered(signed) - most) * scale), 1)
    room = (need - tl.sum(above) + one - 1) // one
    end = tl.where(signed == lowest, last, LAST)
    if room < tl.sum(level):
        seen, end = 0, -1
        for start in range(0, count, TILE):
            token, x, there = _tile(logits, allowed, gathered, ids, start, count, few, MASKED, TILE)
            order = _order(x)
            there = there & (order == signed) & ((order > lowest) | (token <= last))
            place = seen + tl.cumsum(there.to(tl.int32), 0)
            end = tl.maximum(end, tl.max(tl.where(there & (place <= room), token, -1)))
            seen += tl.sum(there.to(tl.int32))
    return signed, end


@triton.jit
def _cut(
    logits, allowed, gathered, ids, sets, most, temperature, seed, top_k, top_p, min_p, request, position, vocabulary,
    MASKED: tl.constexpr, TILE: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """The token drawn from what top_k, top_p and min_p leave of a row, whose highest logit is `most`; and its set."""
    inverse, scale = _temperature(temperature)
    bins = tl.arange(0, BINS)
    counts, mass = tl.zeros([BINS], tl.int32), tl.zeros([TILE], tl.int64)
    for start in range(0, vocabulary, TILE):
        _, x, there = _tile(logits, allowed, gathered, ids, start, vocabulary, False, MASKED, TILE)
        counts += tl.histogram(_bin(tl.where(there, most - x, 0.0)), BINS, mask=there)
        mass += _shares(x, most, scale, there, True)
    total, number, up_to = tl.sum(mass), tl.sum(counts), tl.cumsum(counts, 0)
    # How far down what counts may reach: by counts, or by probabilities, of which those further down are at most `rest`
    # (a hundredth is more than all rounding), and by the share of the highest.
    reach, least = BINS - 1, float("-inf")
    if min_p > 0:
        least = tl.log(tl.minimum(min_p, 1.0).to(tl.float64)).to(tl.float32)
    if (top_k > 0) & (top_k < number):
        reach = tl.sum((up_to < top_k).to(tl.int32))
    else:
        if top_p < 1:
            rest = tl.cumsum(counts.to(tl.float32) * tl.exp(-_nearest(bins) * scale), 0, reverse=True)
            beyond = rest * 1.01 > (1.0 - top_p) * (total.to(tl.float32) * 9.094947017729282e-13)
            reach = tl.maximum(tl.sum(beyond.to(tl.int32)) - 1, 0)
        reach = tl.minimum(reach, _bin(-least / scale * 1.0001))
    count = tl.sum(tl.where(bins <= reach, counts, 0))
    few = count <= ROOM
    if few:
        have = 0
        for start in range(0, vocabulary, TILE):
            token, x, there = _tile(logits, allowed, gathered, ids, start, vocabulary, False, MASKED, TILE)
            there = there & (_bin(tl.where(there, most - x, 0.0)) <= reach)
            place = have + tl.cumsum(there.to(tl.int32), 0) - 1
            tl.store(gathered + place, x, mask=there)
            tl.store(ids + place, token, mask=there)
            have += tl.sum(there.to(tl.int32))
        tl.debug_barrier()
    else:
        count = vocabulary
    lowest, last = tl.full([], -2147483648, tl.int32), LAST
    if (top_k > 0) & (top_k < number):
        lowest, last = _border(
            logits, allowed, gathered, ids, count, few, most, scale, lowest, last, top_k.to(tl.int64),
            False, MASKED, TILE,
        )  # fmt: skip
        mass = tl.zeros([TILE], tl.int64)
        for start in range(0, count, TILE):
            token, x, there = _tile(logits, allowed, gathered, ids, start, count, few, MASKED, TILE)
            order = _order(x)
            there = there & ((order > lowest) | ((order == lowest) & (token <= last)))
            mass += _shares(x, most, scale, there, True)
        total = tl.sum(mass)
    if top_p < 1:
        need = tl.maximum(tl.ceil(total.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64), 1)
        lowest, last = _border(
            logits, allowed, gathered, ids, count, few, most, scale, lowest, last, need, True, MASKED, TILE
        )
    best = tl.full([TILE], NOTHING, tl.int64)
    for start in range(0, count, TILE):
        token, x, there = _tile(logits, allowed, gathered, ids, start, count, few, MASKED, TILE)
        order = _order(x)
        there = there & ((order > lowest) | ((order == lowest) & (token <= last))) & ((x - most) * scale >= least)
        tl.atomic_or(sets + token // 32, 1 << (token % 32), mask=there, sem="relaxed")
        if temperature != 0:
            w0, w1, w2, w3 = _words(token // 4, seed, request, position)
            lane = token % 4
            bits = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
            x = x * inverse + _gumbel(bits)
        best = tl.maximum(best, _packed(x, token, there))
    _, drawn = _unpacked(tl.max(best))
    return drawn


@triton.jit
def _finish(
    logits, allowed, temperature, seed, top_k, top_p, min_p, request, position, best, gathered, ids, sets, tokens,
    finite, vocabulary, words, blocks,
    MASKED: tl.constexpr, CUTS: tl.constexpr, SETS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    ROOM: tl.constexpr,
):  # fmt: skip
    """A row's token, and whether there is one; the set of a row that may be cut."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    found = tl.max(tl.load(best + row * blocks + at, mask=at < blocks, other=NOTHING))
    good = (found != NOTHING) & (found != BROKEN)
    most, token = _unpacked(found)
    if CUTS:
        k, p, share = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
        if good & ((k > 0) | (p < 1) | (share > 0)):
            token = _cut(
                logits + row * vocabulary, allowed + row * words, gathered + row * ROOM, ids + row * ROOM,
                sets + row * words, most, tl.load(temperature + row), tl.load(seed + row), k, p, share,
                tl.load(request + row), tl.load(position + row), vocabulary, MASKED, TILE, ROOM,
            )  # fmt: skip
    if SETS:
        if good == 0:
            for start in range(0, words, TILE):
                word = start + tl.arange(0, TILE)
                tl.store(sets + row * words + word, 0, mask=word < words)
    tl.store(tokens + row, tl.where(good, token, 0).to(tl.int64))
    tl.store(finite + row, good)


def draw(
    logits: Tensor, request: Tensor, position: Tensor, settings: DrawSettings, allowed: Tensor | None, sets: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, which rows are finite, and, if a row may be cut or `sets` are wanted, the sets packed."""
    (rows, vocabulary), words = logits.shape, triton.cdiv(logits.shape[1], 32)
    blocks, room = triton.cdiv(vocabulary, BLOCK), min(ROOM, vocabulary)
    tokens, finite = logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.bool)
    cuts, wanted = settings.cuts, sets or settings.cuts
    mask = logits.new_empty(rows, words, dtype=torch.int32) if wanted else None
    if not rows:
        return tokens, finite, mask
    best = logits.new_empty(rows, blocks, dtype=torch.int64)
    gathered = logits.new_empty(rows if cuts else 0, room)
    ids = torch.empty_like(gathered, dtype=torch.int32)
    # A kernel does not read what its constants exclude.
    logits, allowed_ = logits.contiguous(), tokens if allowed is None else allowed.contiguous()
    how = (x.contiguous() for x in (*settings[:2], *(settings.complete() if cuts else (tokens,) * 3)))
    of_row = (logits, allowed_, *how, request.contiguous(), position.contiguous(), best)
    out = tokens if mask is None else mask
    flags = {"MASKED": allowed is not None, "CUTS": cuts, "SETS": wanted}
    _draw[(rows, blocks)](*of_row, out, vocabulary, words, **flags, BLOCK=BLOCK, num_warps=8, **SAME_BITS)
    # Two programs of 16 warps fit beside each other.
    size = {"num_warps": 16, "maxnreg": 64} if cuts else {"num_warps": 1}
    _finish[(rows,)](
        *of_row, gathered, ids, out, tokens, finite, vocabulary, words, blocks,
        **flags, WIDTH=next_power(blocks), TILE=TILE, ROOM=room, **size, **SAME_BITS,
    )  # fmt: skip
    return tokens, finite, mask
