"""Caches of bytes: what the kernels write and read has the bits of `kernels.cache_formats`' packing and unpacking."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from amalgam.kernels import attention, cache_formats, compress, formats, indexer
from amalgam.kernels.places import Seen

from . import test_pages
from .test_pages import DEVICE

WIDTHS = [(512, 64), (128, 32), (64, 16), (16, 8)]


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")


def hard(rows: int, width: int, dtype: torch.dtype, largest: float = 448.0) -> Tensor:
    """Numbers of many sizes, on the borders of scales and of codes and beside them, zeros of both signs."""
    x = torch.randn(rows, width) * torch.randint(-12, 12, (rows, 1)).float().exp2()
    ties = torch.tensor(
        [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0] if largest == 6 else [1.0625, 27.0, 232.0, 3 * 2.0**-10]
    )
    powers = torch.randint(-9, 9, (4, 1)).float().exp2()
    x[1:5] = ties[torch.randint(len(ties), (4, width))] * torch.randn(4, width).sign() * powers
    x[1:5, ::8] = largest * powers  # the largest of each group, and in two rows the next number above
    x[3:5, ::8] = torch.nextafter(x[3:5, ::8], torch.tensor(torch.inf))
    x[5], x[6, ::3], x[7], x[8] = 0.0, -0.0, 1e-40, 1e-4
    return x.to(dtype)


def places(rows: int, capacity: int) -> Tensor:
    return torch.randperm(capacity)[:rows].to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width, rope", WIDTHS)
def test_entries(width: int, rope: int, dtype: torch.dtype):
    rows, where = hard(21, width, dtype), places(21, 40)
    cache = torch.full((40, cache_formats.cache_entry_bytes(width, rope)), 77, dtype=torch.uint8)
    expected = cache.clone()
    expected[where.cpu()] = cache_formats.pack_cache_entries(rows, rope)
    cache = cache.to(DEVICE)
    cache_formats.write_cache_entries(cache, where, rows.to(DEVICE), rope)
    assert torch.equal(cache.cpu(), expected)
    again = where[torch.randint(21, (30,))]
    for wish in (torch.float32, torch.bfloat16):
        found = cache_formats.read_cache_entries(cache, again, width, rope, wish)
        assert same(found, cache_formats.unpack_cache_entries(expected[again.cpu()], width, rope, wish))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [128, 32, 16, 8])
def test_keys(width: int, dtype: torch.dtype):
    keys, where = hard(21, width, dtype, largest=6.0), places(21, 40)
    cache = torch.full((40, cache_formats.index_key_bytes(width)), 77, dtype=torch.uint8)
    expected = cache.clone()
    expected[where.cpu()] = cache_formats.pack_index_keys(keys)
    cache = cache.to(DEVICE)
    cache_formats.write_index_keys(cache, where, keys.to(DEVICE))
    assert torch.equal(cache.cpu(), expected)
    again = where[torch.randint(21, (30,))]
    for wish in (torch.float32, torch.bfloat16):
        found = cache_formats.read_index_keys(cache, again, width, wish)
        assert same(found, cache_formats.unpack_index_keys(expected[again.cpu()], width, wish))


def same(found: Tensor, expected: Tensor) -> bool:
    """To the sign of a zero."""
    return torch.equal(found.cpu(), expected) and torch.equal(found.cpu().signbit(), expected.signbit())


@pytest.mark.parametrize("width, rope", WIDTHS)
def test_what_was_rounded_for_storage_loses_nothing(width: int, rope: int):
    """So a cache of bytes gives the bits of one in bf16 to a model that rounds what it keeps."""
    x, where = hard(12, width, torch.bfloat16).to(DEVICE), places(12, 12)
    rotation = torch.ones(12, rope // 2, dtype=torch.complex64, device=DEVICE)
    rows = compress.stored(x, rotation, "fp8")
    cache = torch.zeros(12, cache_formats.cache_entry_bytes(width, rope), dtype=torch.uint8, device=DEVICE)
    cache_formats.write_cache_entries(cache, where, rows, rope)
    assert torch.equal(cache_formats.read_cache_entries(cache, where, width, rope), rows)
    keys = compress.stored(x, rotation, "fp4")
    cache = torch.zeros(12, cache_formats.index_key_bytes(width), dtype=torch.uint8, device=DEVICE)
    cache_formats.write_index_keys(cache, where, keys)
    assert torch.equal(cache_formats.read_index_keys(cache, where, width), keys)


def rows_of(seen: Seen, numbers: Tensor) -> Tensor:
    """int64 [T, n]: where the entries of those numbers lie that a query sees."""
    assert seen.entry_first is not None and seen.table is not None
    return seen.table[seen.entry_first.unsqueeze(1) + numbers // seen.page].long() * seen.page + numbers % seen.page


def test_attention_over_bytes():
    """What is read of a cache of bytes, all entries of each request or a query's chosen ones, in a row: attention and
    the indexer's choice have the bits of a cache in bf16."""
    seen = test_pages.places([9, 0, 4, 3], 2, 5, 2, ring=True)
    rotation = torch.ones(4 * seen.most, 8, dtype=torch.complex64, device=DEVICE)
    made = [test_pages.entries_of(seen, width).bfloat16() for width in (64, 64)]
    entries, keys = (compress.stored(x, rotation, kind) for x, kind in zip(made, ("fp8", "fp4"), strict=True))
    rows, sinks = test_pages.rows_of(seen, 64).bfloat16(), torch.randn(2, device=DEVICE)
    q, weights = torch.randn(8, 2, 64, device=DEVICE).bfloat16(), torch.randn(8, 2, device=DEVICE)
    there, both = test_pages.paged(seen, torch.cat([entries, keys], 1), 4)
    pool, pool_keys = (x.contiguous() for x in both.split(64, 1))
    as_bytes = torch.zeros(len(pool), cache_formats.cache_entry_bytes(64, 16), dtype=torch.uint8, device=DEVICE)
    key_bytes = torch.zeros(len(pool), cache_formats.index_key_bytes(64), dtype=torch.uint8, device=DEVICE)
    everywhere = torch.arange(len(pool), device=DEVICE)
    cache_formats.write_cache_entries(as_bytes, everywhere, pool, 16)
    cache_formats.write_index_keys(key_bytes, everywhere, pool_keys)
    chosen = indexer.select(q, weights, pool_keys, there, 3)
    # Of each request's first query: all entries.
    where = rows_of(there, torch.arange(seen.most, device=DEVICE).expand(8, -1))[::2].flatten()
    first = torch.arange(4, device=DEVICE).repeat_interleave(2).int() * seen.most
    flat = replace(there, entry_first=first, table=None, page=0)
    found = cache_formats.read_index_keys(key_bytes, where, 64)
    assert torch.equal(indexer.select(q, weights, found, flat, 3), chosen)
    found = cache_formats.read_cache_entries(as_bytes, where, 64, 16)
    for some in (None, chosen):
        expected = attention.attend(q, rows, pool, sinks, there, some)[0]
        assert torch.equal(attention.attend(q, rows, found, sinks, flat, some)[0], expected)
    # Of each query: the chosen, of which the first is its own first entry.
    where = rows_of(there, chosen.clamp(min=0)).flatten()
    flat = replace(flat, entry_first=torch.arange(8, device=DEVICE).int() * 3)
    found = cache_formats.read_cache_entries(as_bytes, where, 64, 16)
    own = torch.arange(3, device=DEVICE).int().where(chosen >= 0, -1)
    assert torch.equal(attention.attend(q, rows, found, sinks, flat, own)[0], expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_read_as_nan(bad: float):
    """In the tile that it stands in; rope channels as they are."""
    rows, keys, where = torch.randn(3, 128, device=DEVICE), torch.randn(3, 64, device=DEVICE), places(3, 3)
    rows[1, 70], keys[1, 5] = bad, bad
    entries = torch.zeros(3, cache_formats.cache_entry_bytes(128, 32), dtype=torch.uint8, device=DEVICE)
    cache_formats.write_cache_entries(entries, where, rows, 32)
    nan = cache_formats.read_cache_entries(entries, where, 128, 32).isnan()
    assert nan[1, 64:96].all() and int(nan.sum()) == 32
    cache = torch.zeros(3, cache_formats.index_key_bytes(64), dtype=torch.uint8, device=DEVICE)
    cache_formats.write_index_keys(cache, where, keys)
    nan = cache_formats.read_index_keys(cache, where, 64).isnan()
    assert nan[1, :32].all() and int(nan.sum()) == 32


def test_the_reference_reads_and_writes_places(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AMALGAM_KERNELS", "reference")
    rows, keys, where = torch.randn(4, 48), torch.randn(4, 32), torch.tensor([6, 0, 3, 1])
    entries = torch.zeros(7, cache_formats.cache_entry_bytes(48, 16), dtype=torch.uint8)
    cache_formats.write_cache_entries(entries, where, rows, 16)
    found = cache_formats.read_cache_entries(entries, where.flip(0), 48, 16, torch.float32).flip(0)
    assert torch.equal(found[:, :32], formats.round_fp8(rows[:, :32], (1, 64))) and not entries[2].any()
    cache = torch.zeros(7, cache_formats.index_key_bytes(32), dtype=torch.uint8)
    cache_formats.write_index_keys(cache, where, keys)
    assert torch.equal(cache_formats.read_index_keys(cache, where, 32, torch.float32), formats.round_fp4(keys))
    rows[1, 5], rows[2, 40], keys[3, 7] = torch.nan, torch.inf, -torch.inf
    cache_formats.write_cache_entries(entries, where, rows, 16)
    cache_formats.write_index_keys(cache, where, keys)
    found = cache_formats.read_cache_entries(entries, where, 48, 16)
    assert found[1, :32].isnan().all() and found[2, 40].isinf() and int(found.isfinite().sum()) == 4 * 48 - 33
    assert cache_formats.read_index_keys(cache, where, 32).isnan().all(1).tolist() == [False, False, False, True]


@pytest.mark.parametrize("wish", ["triton", "reference"])
def test_what_nobody_wants_is_not_read(wish: str, monkeypatch: pytest.MonkeyPatch):
    """A place of -1 leaves the others as they are."""
    monkeypatch.setenv("AMALGAM_KERNELS", wish)
    rows, where = torch.randn(9, 64, device=DEVICE), places(9, 20)
    entries = torch.zeros(20, cache_formats.cache_entry_bytes(64, 16), dtype=torch.uint8, device=DEVICE)
    keys = torch.zeros(20, cache_formats.index_key_bytes(64), dtype=torch.uint8, device=DEVICE)
    cache_formats.write_cache_entries(entries, where, rows, 16)
    cache_formats.write_index_keys(keys, where, rows)
    some = where.clone()
    some[::2] = -1
    for read in (
        lambda places: cache_formats.read_cache_entries(entries, places, 64, 16),
        lambda places: cache_formats.read_index_keys(keys, places, 64),
    ):
        found = read(some)
        assert found.shape == (9, 64) and torch.equal(found[1::2], read(where)[1::2])


@pytest.mark.parametrize("wish", ["triton", "reference"])
def test_another_cache_is_refused(wish: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AMALGAM_KERNELS", wish)
    x, where = torch.randn(2, 64, device=DEVICE), places(2, 2)
    for cache in (torch.zeros(2, 90, dtype=torch.uint8), torch.zeros(2, 88), torch.zeros(88, dtype=torch.uint8)):
        cache = cache.to(DEVICE)
        for call in (
            lambda cache=cache: cache_formats.write_cache_entries(cache, where, x, 16),
            lambda cache=cache: cache_formats.read_cache_entries(cache, where, 64, 16),
            lambda cache=cache: cache_formats.write_index_keys(cache, where, x),
            lambda cache=cache: cache_formats.read_index_keys(cache, where, 64),
        ):
            with pytest.raises(ValueError, match="rows must be uint8"):
                call()
