"""Losses over a vocabulary that two processes share, beside those of one process: values and every gradient."""

import multiprocessing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from amalgam.kernels import losses
from amalgam.kernels.fused import vocabulary

RANKS, ROWS, TOKENS = 2, 48, 5  # of the head, a rank's
WAYS = [("reference", 0), ("triton", 16), ("triton", 32)]  # and the kernels' blocks


def all_losses(head: Tensor, heads: dict[int, Tensor], part: slice, group: Any = None) -> list[Tensor]:
    """Each loss, then gradients by hidden states and the head, of their sums under random weights."""
    draw = torch.Generator().manual_seed(1)
    hidden, taught = (torch.randn(TOKENS, 16, generator=draw) for _ in range(2))
    targets, teacher = torch.tensor([0, 47, 48, 95, 60]), torch.tensor([0, 1, -1, 0, 1])
    allowed = torch.rand(TOKENS, RANKS * ROWS, generator=draw) < 0.3
    allowed[torch.arange(TOKENS), targets] = True
    allowed[4, :ROWS] = False  # of a rank, nothing
    mask = losses.packed_mask(allowed[:, part])
    hidden, head = hidden.requires_grad_(), head[part].clone().requires_grad_()
    own = {i: each[part] for i, each in heads.items()}
    found = [*losses.token_scores(hidden, head, targets, 0.7, group=group)]
    found += losses.token_scores(hidden, head, targets, allowed=mask, group=group)
    found += [losses.token_logprobs(hidden, head, targets, group=group)]
    for kind in ("reverse", "forward", "jensen_shannon"):
        found += [losses.divergence(hidden, head, taught, own, teacher, kind, group=group)]
    weight = torch.randn(len(found), TOKENS, generator=draw)
    of = torch.autograd.grad((torch.stack(found) * weight).sum(), [hidden, head])
    return [torch.stack(found).detach(), *of]


def weights() -> tuple[Tensor, dict[int, Tensor]]:
    head, *others = torch.randn(3, RANKS * ROWS, 16, generator=torch.Generator().manual_seed(0))
    return head, dict(enumerate(others))


def one_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    part = slice(rank * ROWS, (rank + 1) * ROWS)
    for way in WAYS:
        with pytest.MonkeyPatch.context() as patch:
            prepare(patch, *way)
            torch.save(all_losses(*weights(), part, dist.group.WORLD), folder / f"{way}{rank}")
    dist.destroy_process_group()


def prepare(patch: pytest.MonkeyPatch, way: str, block: int) -> None:
    patch.setenv("AMALGAM_KERNELS", way)
    patch.setattr(losses, "_LOGITS_AT_ONCE", 3 * ROWS)
    patch.setattr(vocabulary, "BLOCK", block)
    patch.setattr(vocabulary, "PIECE", 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_two_ranks_are_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the kernels to the bit, where a rank has whole blocks: they merge all blocks in one order."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=one_rank, args=(rank, tmp_path)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in ranks] == [0] * RANKS
    for way in WAYS:
        prepare(monkeypatch, *way)
        values, of_hidden, of_head = all_losses(*weights(), slice(None))
        first, second = (torch.load(tmp_path / f"{way}{rank}") for rank in range(RANKS))
        for rank in (first, second):
            torch.testing.assert_close(rank[0], values, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(rank[1], of_hidden, rtol=1e-5, atol=1e-5)
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
        torch.testing.assert_close(torch.cat([first[2], second[2]]), of_head, rtol=1e-5, atol=1e-5)
        assert way[1] != 16 or (torch.equal(first[0], values) and torch.equal(first[2], of_head[:ROWS]))
