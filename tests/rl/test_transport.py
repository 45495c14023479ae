"""Weights from one model to another in one process, and their checksums; test_broadcast.py has several processes, and
test_learner.py Ray."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from amalgam.model.precision import set_precision, store_weights
from amalgam.rl import weights
from amalgam.rl.transport import InStore, Place, Receiver, Sender, choose, publish, receive
from amalgam.rl.weights import SyncError, buckets, checksums, describe, padded
from amalgam.settings import Precision

from .. import tiny


class Toy(nn.Module):
    """Odd sizes, a scalar, half precision, NaNs, an integer buffer, an empty one, and one that does not travel."""

    table: torch.Tensor
    derived: torch.Tensor

    def __init__(self, seed: int, width: int = 5):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, width, generator=g))
        self.short = nn.Parameter(torch.randn(7, generator=g).bfloat16())
        self.gain = nn.Parameter(torch.randn((), generator=g))
        self.odd = nn.Parameter(torch.tensor([float("nan"), -0.0, float("inf"), 1e-44, seed]))
        self.long = nn.Parameter(torch.randn(40, 50, generator=g))
        self.turned = nn.Parameter(torch.randn(9, 4, generator=g).T)
        self.register_buffer("table", torch.randint(0, 99, (11, 2), generator=g))
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("derived", torch.full((4,), float(seed)), persistent=False)


def same(one: nn.Module, other: nn.Module) -> bool:
    """To the bit."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(a.contiguous().numpy(force=True).tobytes() == b.contiguous().numpy(force=True).tobytes()
               if a.dtype != torch.bfloat16 else torch.equal(a, b) for a, b in pairs)  # fmt: skip


def places(model: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def through_the_object_store(handle: InStore) -> InStore:
    data = tuple(each.copy() for each in handle.data)
    for each in data:
        each.flags.writeable = False
    return replace(handle, data=data)


def altered(handle: InStore, name: str, byte: int) -> InStore:
    """With one bit of that byte turned."""
    data = [each.copy() for each in handle.data]
    data[[handle.manifest[i].name for i in handle.moved].index(name)][byte] ^= 1
    return replace(handle, data=tuple(data))


def naive(raw: bytes) -> int:
    """The checksum in Python's numbers."""
    golden, second, third = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
    total, raw = 0, raw + bytes(-len(raw) % 512)
    for row in range(len(raw) // 512):
        words = np.frombuffer(raw, np.uint64, 64, row * 512).tolist()
        mixed = sum((word ^ word >> 32) * third ** (i + 1) for i, word in enumerate(words)) + row * golden
        for odd in (golden, second, third):
            mixed = mixed * odd % 2**64
            mixed ^= mixed >> 32
        total += mixed
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("chunk", [512, 1536, 2**20])
def test_checksums_are_the_naive_ones_whatever_the_chunks(monkeypatch, chunk):
    monkeypatch.setitem(weights._CHUNK, "cpu", chunk)
    tensors = list(Toy(3).state_dict().values())
    raw = [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors]
    assert checksums(tensors) == [naive(each) for each in raw]
    assert checksums([]) == []


def test_a_checksum_sees_turned_bits_and_exchanged_words_and_rows():
    """Each bit, and signs of two fp32 numbers: all sums differ."""
    data = torch.randint(-(2**62), 2**62, (256,))
    (before,) = checksums([data])
    cases = [{word: bit} for word in range(0, 256, 5) for bit in (0, 31, 62, 63)]
    cases += [{one: 63, two: 63} for one in (0, 70, 200) for two in (1, 6, 69, 134, 255)]
    found = {before}
    for case in cases:
        other = data.numpy().view(np.uint64).copy()
        for word, bit in case.items():
            other[word] ^= np.uint64(1 << bit)
        found.add(checksums([torch.from_numpy(other.view(np.int64))])[0])
    assert len(found) == 1 + len(cases)
    for one, two in ((0, 1), (3, 200), (slice(0, 64), slice(64, 128))):
        other = data.clone()
        other[one], other[two] = data[two], data[one]
        assert checksums([other]) != [before]


def test_buckets_hold_every_byte_once_and_rows_begin_at_borders():
    sizes = np.random.default_rng(0).integers(0, 5000, 40).tolist()
    for capacity in (512, 2048, 2**20):
        found = {index: bytearray(size) for index, size in enumerate(sizes)}
        for pieces in buckets(sizes, capacity):
            end = 0
            for p in pieces:
                assert p.place == end and p.place % 512 == p.start % 512 == 0
                end = p.place + padded(p.size)
                for i in range(p.start, p.start + p.size):
                    found[p.tensor][i] += 1
            assert end <= capacity
        assert all(each == b"\1" * size for each, size in zip(found.values(), sizes, strict=True))


def test_two_updates_in_a_row_in_place():
    learner, worker = Toy(0), Toy(1)
    before = places(worker)
    for version in (1, 2):
        with torch.no_grad():
            for parameter in learner.parameters():
                parameter.mul_(1.5)
            learner.table.add_(version)
        handle = publish(learner, version)
        assert not same(learner, worker)
        receive(worker, through_the_object_store(handle))
        assert same(learner, worker)
        assert describe(worker) == handle.manifest
        assert handle.version == version
    assert places(worker) == before
    assert worker.derived.tolist() == [1.0] * 4, "a buffer outside the state dict is the receiver's own"


def test_what_never_changed_stays_at_home():
    """What changed travels for good, back to where it was too, and so serves a worker that starts late."""
    learner, early, late = Toy(0), Toy(0), Toy(0)
    sender = Sender(learner, Place("the learner"))
    handle, moved = sender.publish(learner, 0), []
    for version, (name, by) in enumerate([("table", 1), ("table", -1), ("short", 1)]):
        with torch.no_grad():
            learner.state_dict()[name].add_(by)
        handle = sender.publish(learner, version)
        assert isinstance(handle, InStore)
        moved.append({handle.manifest[i].name for i in handle.moved})
        receive(early, through_the_object_store(handle))
        assert same(learner, early)
    assert isinstance(handle, InStore)
    receive(late, through_the_object_store(handle))
    assert same(learner, late)
    assert moved == [{"table"}, {"table"}, {"table", "short"}]
    with torch.no_grad():
        late.weight[1, 1] += 1
    with pytest.raises(SyncError, match="^weight: checksum differs after loading version 2; it was not sent"):
        receive(late, handle)


def test_what_is_stored_in_low_precision_is_rounded_again_in_place():
    learner, worker, same_as = (tiny.model(seed, moe_intermediate_size=32) for seed in (0, 1, 0))
    for each in (learner, worker, same_as):
        set_precision(each, Precision(experts="fp4", linear="fp8"))
    store_weights(worker)
    before = places(worker)
    for version in (1, 2):
        with torch.no_grad():
            for mine, theirs in zip(learner.parameters(), same_as.parameters(), strict=True):
                theirs.copy_(mine.mul_(0.7))
        receive(worker, through_the_object_store(publish(learner, version)))
        if version == 2:
            store_weights(same_as)
            assert same(worker, same_as)
    assert places(worker) == before
    name = "model.layers.1.mlp.experts.down_proj"
    with pytest.raises(SyncError, match=rf"^{name}: checksum differs .*version 3"):
        receive(worker, altered(publish(learner, 3), name, 3))
    assert same(worker, same_as), "no code is made of what is not the learner's"
    learner.model.layers[1].mlp.experts.bfloat16()  # pyright: ignore
    with pytest.raises(SyncError, match=r"experts.*: bfloat16 .* was sent, float32 .* is here"):
        receive(worker, publish(learner, 3))


def test_a_turned_bit_is_found_in_the_tensor_that_has_it():
    handle = publish(Toy(0), 7)
    for entry in handle.manifest:
        if entry.nbytes:
            with pytest.raises(SyncError, match=rf"^{entry.name}: checksum differs .*version 7"):
                receive(Toy(1), altered(handle, entry.name, entry.nbytes - 1))


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
    before = describe(worker)
    with pytest.raises(SyncError, match=message):
        receive(worker, publish(Toy(0), 1))
    assert describe(worker) == before


def test_the_way_follows_from_where_they_are():
    def at(*gpus: str) -> list[Place]:
        return [Place(f"process {i} on {gpu}", gpu) for i, gpu in enumerate(gpus)]

    assert choose(at("A", "B"), at("B", "A")) == "ipc"
    assert choose(at("A"), at("A", "A")) == "ipc"
    assert choose(at("A", "B"), at("C", "D")) == "broadcast"
    for ranks, receivers in [(at("A"), []), (at(""), at("")), (at("A"), at("B", ""))]:
        assert choose(ranks, receivers) == "store"
    assert choose(at("A"), at("A", "B")) == "store", "NCCL wants a GPU for each, IPC one for all"
    assert choose(at("A"), at("B", "B")) == "store"


@pytest.mark.gpu
def test_weights_of_one_gpu_are_lent_in_place():
    """To another process: torch maps nothing of its own."""
    import multiprocessing

    learner, worker = Toy(0).cuda(), Place("the worker", "A")
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        sender = Sender(None, Place("the learner", "A"))
        for version in (1, 2):
            with torch.no_grad():
                learner.weight.mul_(1.5)
            handle = sender.publish(learner, version, "ipc", [worker])
            found = pool.apply_async(_borrow, (worker, handle)).get(120)
            assert found == (handle.manifest, True)


_here: list = []  # the child's receiver and its model


def _borrow(place, handle):
    if not _here:
        _here.extend((Receiver(place), Toy(1).cuda()))
    receiver, model = _here
    before = places(model)
    receiver.receive(model, handle)
    return describe(model), places(model) == before
