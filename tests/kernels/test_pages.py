"""Entries and keys in pages: attention and the indexer's choice have the bits that entries in a row give."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from amalgam.kernels import attention, indexer
from amalgam.kernels.attention import reference_attend
from amalgam.kernels.fused import indexer as fused_indexer
from amalgam.kernels.fused.attention import attend_forward
from amalgam.kernels.indexer import reference_select
from amalgam.kernels.places import Seen

BOUND = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="for Triton's interpreter, on machines without a GPU")


@dataclass
class Alone:
    """Each query a block of its own, which finds its keys one by one."""

    seen: Seen | None = None

    def in_blocks(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1)

    def from_blocks(self, x: Tensor) -> Tensor:
        return x.squeeze(1)

    def keys(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        assert self.seen
        number = self.seen.position.long().unsqueeze(1) - torch.arange(self.seen.window, device=rows.device).flip(0)
        row = number.clamp(min=0) % self.seen.slots if self.seen.slots else number.clamp(min=0)
        return rows[self.seen.row_first.unsqueeze(1) + row], (number >= 0).unsqueeze(1)

    def complete(self, entries: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
        assert self.seen and self.seen.entry_first is not None
        first, number = self.seen.entry_first.unsqueeze(1), torch.arange(self.seen.most, device=entries.device)
        row = first + number
        if self.seen.table is not None:
            row = self.seen.table[first + number // self.seen.page] * self.seen.page + number % self.seen.page
        return entries[row], number < ((self.seen.position + 1) // ratio).view(-1, 1, 1)

    def column(self, ratio: int) -> Tensor:
        assert self.seen
        return torch.zeros_like(self.seen.position).unsqueeze(1)


def places(counts: list[int], new: int, window: int, ratio: int, ring: bool) -> Seen:
    """The last `new` tokens of requests that then have so many entries; these in a row, with room for the most."""
    lengths = torch.tensor([count * ratio + ratio - 1 for count in counts]).clamp(min=new)
    owner = torch.arange(len(counts)).repeat_interleave(new)
    position = (lengths.unsqueeze(1) - new + torch.arange(new)).flatten()
    slots = window + new - 1 if ring else 0
    row_first = owner * slots if ring else (lengths.cumsum(0) - lengths)[owner]
    most = int(lengths.max()) // ratio
    position, row_first, entry_first = (x.int().to(DEVICE) for x in (position, row_first, owner * most))
    blocks = Alone()
    blocks.seen = Seen(blocks, window, position, row_first, slots, ratio, entry_first, most)
    return blocks.seen


def rows_of(seen: Seen, width: int) -> Tensor:
    """What they hold is nobody's matter."""
    return torch.randn(int(seen.row_first.max()) + max(int(seen.position.max()) + 1, seen.slots), width, device=DEVICE)


def paged(seen: Seen, entries: Tensor, page: int) -> tuple[Seen, Tensor]:
    """The same entries [B most, D] in pages that lie anywhere, between others, beside other numbers where a request's
    last page is not full; behind that its part of the table says 0."""
    assert seen.entry_first is not None
    requests, each = len(entries) // seen.most, -(-seen.most // page)
    # What a request's last query sees.
    last = torch.arange(len(seen.position)).view(requests, -1)[:, -1]
    held = (seen.position[last] + 1) // seen.ratio
    pool = torch.randn(2 * requests * each + 1, page, entries.shape[1], device=DEVICE).to(entries.dtype)
    free = (torch.randperm(len(pool) - 1) + 1).tolist()
    table = torch.zeros(requests, each, dtype=torch.int32)
    for i, count in enumerate(held.tolist()):
        for place in range(-(-count // page)):
            table[i, place] = free.pop()
            own = entries[i * seen.most :][place * page : min(place * page + page, count)]
            pool[table[i, place], : len(own)] = own
    blocks = Alone()
    first = seen.entry_first // seen.most * each
    blocks.seen = replace(seen, blocks=blocks, entry_first=first, table=table.flatten().to(DEVICE), page=page)
    return blocks.seen, pool.flatten(0, 1)


def borders(page: int) -> list[int]:
    return [page + 1, 0, page - 1, page, 2 * page + 3]


def entries_of(seen: Seen, width: int) -> Tensor:
    assert seen.entry_first is not None
    return torch.randn(int(seen.entry_first.max()) + seen.most, width, device=DEVICE)


def same_attention(seen: Seen, page: int, heads: int, width: int, topk: int, dtype: torch.dtype) -> None:
    """As entries in a row give it, and as the definition has it in float64, over rows that it gathers itself."""
    rows = rows_of(seen, width).to(dtype)
    q, sinks = torch.randn(len(seen.position), heads, width, device=DEVICE).to(dtype), torch.randn(heads, device=DEVICE)
    entries = entries_of(seen, width).to(dtype)
    there, pool = paged(seen, entries, page)
    chosen = None
    if topk:
        score = torch.rand(len(q), seen.most, device=DEVICE)
        _, complete = seen.blocks.complete(entries, seen.ratio)
        best = score.masked_fill(~complete.squeeze(1), -1.0).topk(min(topk, seen.most))
        chosen = best.indices.where(best.values >= 0, seen.most).sort().values
        chosen = chosen.where(chosen < seen.most, -1).int()
    found, expected = (attend_forward(q, rows, x, sinks, s, chosen) for s, x in ((there, pool), (seen, entries)))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    exact = reference_attend(q.double(), rows.double(), pool.double(), sinks, there, chosen)
    assert (found[0].double() - exact).abs().max() <= BOUND[dtype] * exact.abs().max()


def same_choice(seen: Seen, page: int, heads: int, width: int, topk: int, dtype: torch.dtype, exact: bool) -> None:
    """As keys in a row give it, and if `exact` as the definition has it in float64."""
    q, keys = torch.randn(len(seen.position), heads, width, device=DEVICE).to(dtype), entries_of(seen, width).to(dtype)
    weights = torch.randn(len(q), heads, device=DEVICE)
    weights[::5] = 0.0  # all of these queries' entries tie
    there, pool = paged(seen, keys, page)
    rounded = None if exact else torch.bfloat16
    found = fused_indexer.select(q, weights, pool, there, topk, rounded)
    assert torch.equal(found, fused_indexer.select(q, weights, keys, seen, topk, rounded))
    if exact:
        assert torch.equal(found, reference_select(q.double(), weights.double(), pool.double(), there, topk))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ring", [True, False], ids=["ring", "copies"])
@pytest.mark.parametrize("page, ratio, new", [(1, 3, 1), (2, 4, 4), (64, 1, 1), (5, 2, 3)])
def test_pages(page: int, ratio: int, new: int, ring: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Lengths at the pages' borders; splits, several tiles, queries that share keys and some that do not."""
    monkeypatch.setattr("amalgam.kernels.fused.attention.SPLIT", 64)
    monkeypatch.setattr(fused_indexer, "KEYS", 16)
    seen = places(borders(page), new, 5, ratio, ring)
    for topk in (0, 4):
        same_attention(seen, page, 3, 16, topk, dtype)
    same_choice(seen, page, 3, 16, 4, dtype, exact=dtype == torch.float32)


@interpreted
def test_no_gradient_comes_through_pages(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")
    seen = places([3, 2], 2, 5, 2, ring=False)
    q, rows, sinks, entries = torch.randn(4, 2, 16), rows_of(seen, 16), torch.randn(2), torch.randn(2 * seen.most, 16)
    there, pool = paged(seen, entries, 2)
    out, lse = attention.attend(q.requires_grad_(), rows, pool, sinks, there)
    with pytest.raises(ValueError, match="attention over a cache has no gradient"):
        out.sum().backward()
    chosen = torch.zeros(4, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="entries in pages"):
        indexer.index_scores(q, torch.randn(4, 2), pool, there, chosen)
    with pytest.raises(ValueError, match="entries in pages"):
        attention.head_mass(q, rows, pool, sinks, there, chosen, lse)


def test_pages_that_are_no_tiles_are_refused_on_hopper():
    hopper_indexer = pytest.importorskip("amalgam.kernels.fused.hopper_indexer")
    seen = replace(places([3], 1, 5, 2, ring=True), page=32)
    x = torch.zeros(1, 16)
    with pytest.raises(ValueError, match="page: 32 entries; .* takes multiples of 64"):
        hopper_indexer.scores(x, x, x, x, seen, 1, False)


@pytest.mark.gpu
@pytest.mark.parametrize("ring", [True, False], ids=["ring", "copies"])
@pytest.mark.parametrize("new", [1, 40])
def test_pages_on_a_gpu(new: int, ring: bool):
    """At V4's sizes, on a Hopper GPU in Gluon; and heads of 256 channels, in Triton. Pages of 64 and of 2."""
    seen = places([65, 0, 63, 64, 1500, 4096], new, 128, 4, ring)
    for width, topk in ((512, 512), (512, 0), (256, 512), (256, 0)):
        same_attention(seen, 64, 64, width, topk, torch.bfloat16)
        same_attention(seen, 2, 64, width, topk, torch.bfloat16)
    same_choice(seen, 64, 64, 128, 512, torch.bfloat16, exact=False)
