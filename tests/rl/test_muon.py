"""Muon under DeepSpeed against float64: with one and two ranks, at every stage of ZeRO; and the exchange of shards."""

import sys
import threading
import zlib
from pathlib import Path

import pytest
import torch
from ray import cloudpickle
from safetensors.torch import load_file
from torch import Tensor

from amalgam.errors import UserError
from amalgam.model import load
from amalgam.rl import shards
from amalgam.rl.shards import Shards

from .small_learner import ENGINES, batches, nll, sent

cloudpickle.register_pickle_by_value(sys.modules[__name__])

LR, DECAY, CLIP = 0.1, 0.1, 0.5
SETTINGS = {"name": "muon", "lr": LR, "weight_decay": DECAY, "gradient_clipping": CLIP, "warmup_steps": 0}
SETTINGS |= {"decay": "constant", "micro_batch_tokens": 60}


def random_gradients(model, batch, shared, *, seed):
    """A loss whose gradients are replaced: real ones of so few tokens have no rank to speak of."""

    def replace(name: str, gradient: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + model.seed)
        return torch.randn(gradient.shape, generator=generator)

    if not hasattr(model, "seed"):
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.register_hook(lambda gradient, name=name: replace(name, gradient))
    model.seed = seed
    return nll(model, batch, shared, scale=1.0)


def matrices(name: str, x: Tensor) -> list[Tensor]:
    """Views of the small model's matrices; none of what is AdamW's."""
    if x.ndim < 2 or "position_bias" in name or name in ("model.embed_tokens.weight", "lm_head.weight"):
        return []
    if x.ndim == 3:
        return [part for each in x for part in (each.chunk(2) if "gate_up" in name else [each])]
    if name.endswith("_hc.fn"):
        return list(x.split([2, 2, 4]))
    csa = "layers.1.self_attn.compressor" in name and ("kv_proj" in name or "gate_proj" in name)
    return list(x.chunk(2 if csa or "o_a_proj" in name else 1))


def orthogonal(x: Tensor) -> Tensor:
    """Newton-Schulz of one matrix as polynomials of its singular values, in float64."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(8):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    for _ in range(2):
        s = 2 * s - 1.5 * s**3 + 0.5 * s**5
    return (u * s) @ v


def saved(learner, folder: Path) -> dict[str, Tensor]:
    step = learner.save_state(folder)
    return {name: x.double() for name, x in load_file(folder / f"{'ab'[step % 2]}.safetensors").items()}


def assert_steps(before: dict[str, Tensor], after: dict[str, Tensor], step: int) -> None:
    """From one state to the next, in float64, with the gradient that the moments tell."""
    names, squares = {name.rpartition("/")[0] for name in before}, 0.0
    for name in names:
        old, new = before[f"{name}/weight"], after[f"{name}/weight"]
        if parts := matrices(name, old):
            held = after[f"{name}/momentum"]
            gradient = held - 0.95 * before[f"{name}/momentum"]
            found = (old * (1 - LR * DECAY) - new) / LR
            for ahead, update in zip(matrices(name, gradient + 0.95 * held), matrices(name, found), strict=True):
                expected = orthogonal(ahead) * 0.18 * max(ahead.shape) ** 0.5
                assert (update - expected).norm() <= 1e-4 * expected.norm(), name
                size = torch.linalg.svdvals(update) / (0.18 * max(ahead.shape) ** 0.5)
                assert (size - 1).abs().max() < 0.01, name  # SGD's would lie as far apart as the gradient's
            assert sum(part.numel() for part in parts) == old.numel()
        else:
            first, second = after[f"{name}/exp_avg"], after[f"{name}/exp_avg_sq"]
            gradient = (first - 0.9 * before[f"{name}/exp_avg"]) / 0.1
            torch.testing.assert_close(second, 0.95 * before[f"{name}/exp_avg_sq"] + 0.05 * gradient.square())
            size = first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-3)
            decayed = old * (1 - LR * DECAY) if old.ndim == 2 and "position_bias" not in name else old
            torch.testing.assert_close(new, decayed - LR * size, rtol=0, atol=1e-5)
        squares += gradient.square().sum().item()
    assert squares**0.5 == pytest.approx(CLIP, rel=1e-4)


@pytest.mark.parametrize(("ranks", "stage"), ENGINES)
def test_updates_are_those_of_whole_matrices(learner, checkpoint, tmp_path, ranks, stage):
    (rows,) = batches(1)
    ours = learner(ranks, stage, **SETTINGS)
    states = [saved(ours, tmp_path)]
    for seed in (1, 2):
        assert ours.step(rows, random_gradients, seed=seed)["grad_norm"] > CLIP
        states.append(saved(ours, tmp_path))
        assert_steps(*states[-2:], step=seed)
    muons = {name.removesuffix("/momentum") for name in states[0] if name.endswith("/momentum")}
    assert muons == {n for n, p in load(checkpoint).named_parameters() if p.requires_grad and matrices(n, p)}


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 1), (2, 3)])
def test_a_resumed_run_is_bit_equal(learner, tmp_path, ranks, stage):
    data = batches(3)
    straight = learner(ranks, stage, **SETTINGS)
    for i, rows in enumerate(data):
        straight.step(rows, nll, scale=1.0)
        if i == 0:
            straight.save_state(tmp_path)
    expected = sent(straight).manifest
    resumed = learner(ranks, stage, **SETTINGS)
    assert resumed.load_state(tmp_path) == 1
    for rows in data[1:]:
        resumed.step(rows, nll, scale=1.0)
    assert sent(resumed).manifest == expected


def test_a_state_moves_to_other_ranks_and_stages_but_not_to_adamw(learner, tmp_path):
    (rows,) = batches(1)
    before = None
    for step, (ranks, stage) in enumerate([(2, 3), (1, 1), (2, 2), (2, 3)]):
        ours = learner(ranks, stage, **SETTINGS)
        if before is not None:
            assert ours.load_state(tmp_path) == step
        before = saved(ours, tmp_path)
        ours.step(rows, random_gradients, seed=step + 1)
        assert_steps(before, saved(ours, tmp_path), step + 1)
    other = learner(2, 3)
    with pytest.raises(UserError, match=r"must be of the same model and optimizer$"):
        other.load_state(tmp_path)


class Mail:
    """`torch.distributed` among threads, one a rank."""

    def __init__(self, ranks: int):
        self.barrier, self.boxes, self.rank = threading.Barrier(ranks, timeout=60), {}, threading.local()

    def all_to_all_single(self, got: Tensor, sent: Tensor, sizes_in: list[int], sizes_out: list[int]) -> None:
        self.boxes[self.rank.own] = sent.clone().split(sizes_out)
        self.barrier.wait()
        came = [box[self.rank.own] for _, box in sorted(self.boxes.items())]
        assert [len(x) for x in came] == sizes_in
        got.copy_(torch.cat(came))
        self.barrier.wait()


@pytest.mark.parametrize("together", [1 << 28, 1, 60])
@pytest.mark.parametrize("cut_each", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shards(monkeypatch, ranks, cut_each, together):
    """Parameters one after another and cut as a whole (stages 1 and 2), or each by itself (3); some ranks get nothing.

    What stands for an update depends on all of a matrix's elements, and on where each is.
    """
    matrices = [[(4, 6)] * 5, [(7, 3)], [(2, 2), (2, 2), (4, 2)], [(1, 1)], [(30, 4)]]
    wholes = [torch.randn(sum(n * m for n, m in shapes)) for shapes in matrices]
    expected, seen, lock = [x.clone() for x in wholes], [], threading.Lock()

    def updates(found):
        with lock:
            seen.extend(x.shape for x in found)
        for x in found:
            x.copy_(x.mT.flatten().cumsum(0).view(x.shape))

    for x, shapes in zip(expected, matrices, strict=True):
        parts = x.split([n * m for n, m in shapes])
        updates([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])
    seen.clear()
    begins = [0, *torch.tensor([len(x) for x in wholes]).cumsum(0).tolist()]
    share = -(-begins[-1] // ranks)
    owned, places, flats = [], [], []
    for rank in range(ranks):
        runs, offsets, pieces = [], [], []
        for x, begin in zip(wholes, begins, strict=False):
            size = -(-len(x) // ranks)
            first, length = (rank * size, size) if cut_each else (rank * share - begin, share)
            first, last = min(max(first, 0), len(x)), min(max(first + length, 0), len(x))
            runs.append((first, last - first))
            offsets.append(sum(len(piece) for piece in pieces))
            pieces += [x[first:last], torch.zeros(size - last + first if cut_each else 0)]
        owned.append(runs)
        places.append(offsets)
        flats.append(torch.cat(pieces))
    monkeypatch.setattr(shards, "BATCH", together)
    mail = Mail(ranks)
    monkeypatch.setattr(shards, "distributed", mail)

    def run(rank: int) -> None:
        mail.rank.own = rank
        Shards(rank, matrices, torch.tensor(owned), places[rank]).apply(flats[rank], updates)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == sorted(torch.Size(shape) for shapes in matrices for shape in shapes)
    for i, x in enumerate(expected):
        found = [flat[at[i] :][: runs[i][1]] for flat, at, runs in zip(flats, places, owned, strict=True)]
        assert torch.equal(torch.cat(found), x)
