"""Weight sync between two models in one process; test_learner.py has it through Ray."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from amalgam.model.precision import set_precision, store_weights
from amalgam.rl import sync
from amalgam.settings import Precision

from .. import tiny


class Toy(nn.Module):
    """Odd sizes, a scalar, half precision, an integer buffer, and a buffer that does not travel."""

    table: torch.Tensor
    derived: torch.Tensor

    def __init__(self, seed: int, width: int = 5):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, width, generator=g))
        self.short = nn.Parameter(torch.randn(7, generator=g).bfloat16())
        self.gain = nn.Parameter(torch.randn((), generator=g))
        self.register_buffer("table", torch.randint(0, 99, (11, 2), generator=g))
        self.register_buffer("derived", torch.full((4,), float(seed)), persistent=False)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def through_the_object_store(bundle: sync.Bundle) -> sync.Bundle:
    data = bundle.data.copy()
    data.flags.writeable = False
    return replace(bundle, data=data)


def test_two_updates_in_a_row_in_place():
    learner, worker = Toy(0), Toy(1)
    places = {name: tensor.data_ptr() for name, tensor in worker.state_dict().items()}
    for version in (1, 2):
        with torch.no_grad():
            for parameter in learner.parameters():
                parameter.mul_(1.5)
            learner.table.add_(version)
        bundle = sync.pack(learner, version)
        assert not same(learner, worker)
        sync.load(worker, through_the_object_store(bundle))
        assert same(learner, worker)
        assert sync.pack(worker, version).manifest == bundle.manifest
        assert bundle.version == version
    assert places == {name: tensor.data_ptr() for name, tensor in worker.state_dict().items()}
    assert worker.derived.tolist() == [1.0] * 4, "a buffer outside the state dict is the receiver's own"


def test_what_is_stored_in_low_precision_is_rounded_again_in_place():
    learner, worker, same_as = (tiny.model(seed, moe_intermediate_size=32) for seed in (0, 1, 0))
    for each in (learner, worker, same_as):
        set_precision(each, Precision(experts="fp4", linear="fp8"))
    store_weights(worker)
    places = {name: tensor.data_ptr() for name, tensor in worker.state_dict().items()}
    for version in (1, 2):
        with torch.no_grad():
            for mine, theirs in zip(learner.parameters(), same_as.parameters(), strict=True):
                theirs.copy_(mine.mul_(0.7))
        sync.load(worker, through_the_object_store(sync.pack(learner, version)))
        if version == 2:
            store_weights(same_as)
            assert same(worker, same_as)
    assert places == {name: tensor.data_ptr() for name, tensor in worker.state_dict().items()}
    bundle = sync.pack(learner, 3)
    (entry,) = [e for e in bundle.manifest if e.name == "model.layers.1.mlp.experts.down_proj"]
    data = bundle.data.copy()
    data[entry.offset + 3] ^= 1
    with pytest.raises(sync.SyncError, match=rf"^{entry.name}: checksum differs .*version 3"):
        sync.load(worker, replace(bundle, data=data))
    learner.model.layers[1].mlp.experts.bfloat16()  # pyright: ignore
    with pytest.raises(sync.SyncError, match=r"experts.*: bfloat16 .* was sent, float32 .* is here"):
        sync.load(worker, sync.pack(learner, 3))


def test_checksum_sees_a_flipped_bit():
    bundle = sync.pack(Toy(0), 7)
    for entry in bundle.manifest:
        data = bundle.data.copy()
        data[entry.offset] ^= 1
        with pytest.raises(sync.SyncError, match=rf"^{entry.name}: checksum differs .*version 7"):
            sync.load(Toy(1), replace(bundle, data=data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.register_buffer("more", torch.zeros(2)), "more: the sender's model has no such tensor"),
        (lambda m: m.__delattr__("gain"), "gain: the receiver's model has no such tensor"),
        (lambda m: setattr(m, "short", nn.Parameter(m.short.float())), "short: bfloat16 .* sent, float32"),
        (lambda m: setattr(m, "table", m.table[:10]), r"table: int64 \(11, 2\) was sent, int64 \(10, 2\)"),
    ],
)
def test_another_model_is_refused_untouched(change, message):
    worker = Toy(1)
    change(worker)
    before = sync.pack(worker, 0).manifest
    with pytest.raises(sync.SyncError, match=message):
        sync.load(worker, sync.pack(Toy(0), 1))
    assert sync.pack(worker, 0).manifest == before
