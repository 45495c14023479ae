"""A decoding step's layout from one kernel is the definition's; in Triton's interpreter."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from amalgam.model.step import reference_step, step

from .. import tiny

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter, on machines without a GPU")
NO_LAUNCH = {"empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "_reshape_alias", "promote_types"}


@pytest.mark.parametrize("slots", [None, [4, 0, 6, 2]], ids=["all", "some"])
@pytest.mark.parametrize("slack", [0, 3])
def test_a_step_s_layout(slots: list[int] | None, slack: int, monkeypatch: pytest.MonkeyPatch):
    model = tiny.model(0, **tiny.FUSED)
    cache = model.new_cache(70 if slots is None else 7, 83, slack, page=28)
    cache.length.copy_(torch.randint(80, cache.length.shape))
    cache.length[:7] = torch.tensor([0, 3, 27, 6, 55, 12, 83])[:7] % 83
    cache.held.copy_(cache.length + 1)
    cache.table.copy_(torch.randperm(cache.table.numel()).view(cache.table.shape))
    cache.longest = 82
    chosen = None if slots is None else torch.tensor(slots)
    expected = reference_step(chosen, cache, **model.places())
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")
    found = step(chosen, cache, **model.places())
    for name in ("cu_seqlens", "slots", "past", "lengths", "position"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert (found.tokens, found.longest, found.most, found.short) == (len(found.past), 1, 83, True)
    for kind, turns in expected.rotation.items():
        assert torch.equal(found.rotation[kind], turns)
    for size in {6 + slack, 8 + slack, 7 + slack}:
        assert torch.equal(found._in_ring(size), expected._in_ring(size))
    for ratio in (0, 4, 7):
        ours, theirs = found.seen(ratio), expected.seen(ratio)
        for name in ("position", "row_first", "slots", "ratio", "entry_first", "most", "table", "page"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b, name
    assert found.finished.keys() == expected.finished.keys()
    for kind, done in expected.finished.items():
        ours, real = found.finished[kind], done.windows.number >= 0
        own = ours.windows.number >= 0
        assert own.sum() == real.sum() > 0 and ours.windows.slots == done.windows.slots
        for a, b in zip((*ours.windows[:3], ours.row), (*done.windows[:3], done.row), strict=True):
            assert torch.equal(a[own], b[real]) and a.dtype == b.dtype
        assert not ours.row[~own].any() and (ours.windows.number[~own] == -1).all()


@pytest.mark.parametrize("slots", [None, [4, 0, 3]], ids=["all", "some"])
def test_lengths_advance(slots: list[int] | None, monkeypatch: pytest.MonkeyPatch):
    chosen, tokens = None if slots is None else torch.tensor(slots), torch.randint(3, (5 if slots is None else 3,))
    caches = []
    for kernels in ("reference", "triton"):
        monkeypatch.setenv("AMALGAM_KERNELS", kernels)
        cache = tiny.model(0, **tiny.FUSED).new_cache(5, 20)
        cache.length.copy_(torch.tensor([3, 0, 9, 4, 7]))
        cache.held.copy_(torch.tensor([5, 0, 9, 4, 9]))
        cache.advance(chosen, tokens, 12)
        caches.append(cache)
    assert caches[0].longest == caches[1].longest == 12
    assert torch.equal(caches[0].length, caches[1].length) and torch.equal(caches[0].held, caches[1].held)


class Count(TorchDispatchMode):
    """PyTorch's operations that are launches, outside of Triton's kernels."""

    def __init__(self):
        super().__init__()
        self.launches: list[str] = []
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if not (self.inside or func.is_view or name in NO_LAUNCH):
            self.launches.append(name)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_launches_of_a_step(monkeypatch: pytest.MonkeyPatch):
    """In a CUDA graph each takes 2 to 4 us, and the kernels of a small model's step little more."""
    model = tiny.model(0, **tiny.FUSED).to(torch.bfloat16).eval()
    cache, slots = model.new_cache(4, 30, pages=5, page=28), torch.tensor([1, 3])
    cache.table += torch.arange(1, 5, dtype=torch.int32).view(4, 1)
    model.extend(torch.randint(512, (30,)), torch.tensor([0, 13, 30]), cache, slots)
    tokens, cache.longest = torch.randint(512, (2,)), 29
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")
    run = interpreter.GridExecutor.__call__

    def counted(executor: Any, *args: Any, **kwargs: Any) -> None:
        count.launches.append(executor.fn.__name__)
        count.inside = True
        run(executor, *args, **kwargs)
        count.inside = False

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    with Count() as count:
        model.decode(tokens, cache, slots)
    of_kernels = sum(name.startswith("_") for name in count.launches)
    assert (of_kernels, len(count.launches) - of_kernels) <= (59, 4), count.launches
