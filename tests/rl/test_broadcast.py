"""Weights by broadcast between real processes: a learner and two workers, on the CPU through Gloo."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle
from ray.exceptions import RayActorError

from amalgam.model.precision import set_precision, store_weights
from amalgam.rl import transport
from amalgam.rl.broadcast import Group
from amalgam.rl.cluster import wait
from amalgam.rl.transport import Place, Receiver, Sender
from amalgam.rl.weights import Intake, SyncError, describe
from amalgam.settings import Precision

from .. import tiny

# The workers' processes cannot import this file: what they run of it travels by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Worker:
    """An actor that receives, and can be made to do it badly."""

    def prepare(self, model: Any, seconds: float) -> Place:
        self.place = Place(f"a worker of pid {os.getpid()}")
        self.receiver, self.model = Receiver(self.place, seconds), model
        return self.place

    def receive(self, handle: Any) -> tuple[Any, bool]:
        """The model's manifest then, and whether it has stayed in place."""
        before = self._places()
        self.receiver.receive(self.model, handle)
        return describe(self.model), self._places() == before

    def receive_altered(self, handle: Any, name: str) -> Any:
        """One bit turns on the way, in what is this tensor's."""
        take = Intake.take

        def altered(intake, index, start, data):
            if handle.manifest[index].name == name and not start:
                data = data.clone()
                data[-1] ^= 64
            take(intake, index, start, data)

        return self._with(Intake, "take", altered, handle)

    def receive_two_buckets_and_die(self, handle: Any) -> Any:
        return self._with(Group, "_finish", _before_the_third(lambda group: os._exit(9)), handle)

    def receive_two_buckets_and_wait(self, handle: Any) -> Any:
        """Until the sender has lost its patience."""

        def until_it_failed(group):
            while not group._keys.check(["failed"]):
                time.sleep(1e-3)

        return self._with(Group, "_finish", _before_the_third(until_it_failed), handle)

    def _with(self, owner: Any, name: str, function: Callable, handle: Any) -> Any:
        real = getattr(owner, name)
        setattr(owner, name, function)
        try:
            return self.receive(handle)
        finally:
            setattr(owner, name, real)

    def _places(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self.model.state_dict().values()]


def _before_the_third(act: Callable[[Any], None]) -> Callable:
    finish = Group._finish

    def late(group, work, i, count):
        if i == 2:
            act(group)
        finish(group, work, i, count)

    return late


def mixed(seed: int = 1) -> Any:
    """fp32, bf16, and integer buffers."""
    model = tiny.model(seed, moe_intermediate_size=32)
    model.lm_head.bfloat16()
    model.model.layers[1].mlp.experts.bfloat16()  # pyright: ignore
    return model


def stored() -> Any:
    model = mixed()
    set_precision(model, Precision(experts="fp4", linear="fp8"))
    store_weights(model)
    return model


@pytest.fixture(scope="module")
def workers(ray_session: None) -> Iterator[list[Any]]:
    """The last one dies in a test."""
    started: list[Any] = [ray.remote(Worker).options(num_cpus=0).remote() for _ in range(3)]
    yield started
    for worker in started:
        ray.kill(worker)


def prepared(workers: list[Any], make: Callable = mixed, seconds: float = 30) -> list[Place]:
    return wait([worker.prepare.remote(make(), seconds) for worker in workers], "workers to start", 240)


def send(
    sender: Sender, model: Any, handle: Any, workers: list[Any], how: str = "receive", *arguments: Any, seconds=30.0
) -> list[Any]:
    """What sender and workers say; an error as a value. The last worker receives by `how`."""
    *others, last = workers
    calls = [worker.receive.remote(handle) for worker in others] + [getattr(last, how).remote(handle, *arguments)]
    found: list[Any] = []
    for step in (lambda: sender.send(model, handle, seconds), *(lambda c=call: wait(c, "it", 60) for call in calls)):
        try:
            found.append(step())
        except (SyncError, TimeoutError, RayActorError) as error:
            found.append(error)
    return found


def test_two_updates_of_every_dtype_reach_two_workers_in_place(workers: list[Worker]):
    """In buckets smaller than a tensor and larger than several, by one group."""
    two = workers[:2]
    learner, sender, to = mixed(0), Sender(None, Place("the learner")), prepared(two)
    assert {entry.dtype for entry in describe(learner)} >= {"float32", "bfloat16", "int64"}
    groups = []
    for version, capacity in enumerate((1024, 2**16, 2**28)):
        with torch.no_grad():
            for p in learner.parameters():
                p.mul_(1.5)
            learner.lm_head.weight[0, :2] = torch.tensor([float("nan"), -0.0])
        handle = sender.publish(learner, version, "broadcast", to, capacity)
        assert send(sender, learner, handle, two) == [None, (describe(learner), True), (describe(learner), True)]
        groups.append(sender._group)
    assert len(set(map(id, groups))) == 1


def test_what_has_not_changed_does_not_travel(workers: list[Worker]):
    two, learner = workers[:2], mixed()
    sender, to = Sender(learner, Place("the learner")), prepared(two)
    for version, moved in enumerate([[], ["model.norm.weight"]]):
        with torch.no_grad():
            learner.model.norm.weight.add_(version)
        handle = sender.publish(learner, version, "broadcast", to)
        assert [handle.manifest[i].name for i in handle.moved] == moved
        assert send(sender, learner, handle, two) == [None, (describe(learner), True), (describe(learner), True)]


def test_codes_are_made_of_a_tensor_that_came_in_several_buckets(workers: list[Worker]):
    two, learner, twin = workers[:2], mixed(0), stored()
    sender, to = Sender(None, Place("the learner")), prepared(two, stored)
    transport.receive(twin, transport.publish(learner, 1))
    handle = sender.publish(learner, 1, "broadcast", to, 1024)
    assert send(sender, learner, handle, two) == [None, (describe(twin), True), (describe(twin), True)]


def test_a_bit_that_turns_on_the_way_is_named_by_all_and_the_next_update_is_well(workers: list[Worker]):
    two, learner = workers[:2], mixed(0)
    sender, to = Sender(None, Place("the learner")), prepared(two)
    for version, name in enumerate(("lm_head.weight", "model.layers.0.mlp.gate.tid2eid")):
        handle = sender.publish(learner, version, "broadcast", to, 2048)
        mine, _, theirs = send(sender, learner, handle, two, "receive_altered", name)
        assert str(theirs) == f"{name}: checksum differs after loading version {version}"
        assert isinstance(mine, SyncError)
        assert str(mine) == f"{to[1].name}: {theirs}"
        handle = sender.publish(learner, version, "broadcast", to)
        assert send(sender, learner, handle, two) == [None, (describe(learner), True), (describe(learner), True)]


def test_another_model_is_refused_and_the_sender_told(workers: list[Worker]):
    learner = tiny.model(0)
    sender, to = Sender(None, Place("the learner")), prepared(workers[:1])
    mine, theirs = send(sender, learner, sender.publish(learner, 1, "broadcast", to), workers[:1])
    assert re.search(r": float32 \(.*\) was sent, \S+ \(.*\) is here$", str(theirs))
    assert str(mine) == f"{to[0].name}: {theirs}"


def test_who_is_late_or_not_there_is_named(workers: list[Worker]):
    two, learner = workers[:2], mixed(0)
    sender, to = Sender(None, Place("the learner")), prepared(two, seconds=2)
    send(sender, learner, sender.publish(learner, 0, "broadcast", to), two, seconds=2)
    assert sender._group
    sender._group._seconds = 0.2
    handle = sender.publish(learner, 1, "broadcast", to, 2048)
    mine, _, theirs = send(sender, learner, handle, two, "receive_two_buckets_and_wait")
    assert isinstance(mine, TimeoutError)
    assert re.match(r".*not done after 0\.2 s; without it .*", str(mine))
    assert str(mine).endswith(to[1].name)
    assert str(theirs) == f"the learner: {mine}"
    with pytest.raises(TimeoutError, match=r"the members of .* to meet: not done after 0\.1 s; without it worker 7, w"):
        never: Any = sender.publish(learner, 2, "broadcast", [Place("worker 7"), Place("worker 8")])
        sender.send(learner, never, 0.1)
    with pytest.raises(SyncError, match="version 3 goes to worker 7; this is .* of pid"):
        _asked(two[0], sender.publish(learner, 3, "broadcast", [Place("worker 7")]))


def test_one_that_dies_is_named_and_another_takes_its_place(workers: list[Worker]):
    learner, sender = mixed(0), Sender(None, Place("the learner"))
    first, second, last = prepared(workers, seconds=2)
    send(sender, learner, sender.publish(learner, 0, "broadcast", [first, last]), [workers[0], workers[2]], seconds=2)
    assert sender._group
    sender._group._seconds = 0.2
    handle = sender.publish(learner, 1, "broadcast", [first, last], 2048)
    mine, _, theirs = send(sender, learner, handle, [workers[0], workers[2]], "receive_two_buckets_and_die")
    assert isinstance(theirs, RayActorError)
    assert isinstance(mine, TimeoutError | SyncError)
    assert str(mine).endswith(last.name)
    handle = sender.publish(learner, 1, "broadcast", [first, second])
    assert send(sender, learner, handle, workers[:2]) == [None, (describe(learner), True), (describe(learner), True)]


def test_a_sender_that_is_gone_is_named(workers: list[Worker]):
    learner, sender = mixed(0), Sender(None, Place("the learner"))
    to = prepared(workers[:1], seconds=0.2)
    handle = sender.publish(learner, 1, "broadcast", to)
    with pytest.raises(TimeoutError, match=r"to meet: not done after 0\.2 s; without it the learner$"):
        _asked(workers[0], handle)
    del sender
    with pytest.raises(SyncError, match=r"the sender of the weights does not answer at 127\.0\.0\.1:\d+$"):
        _asked(workers[0], handle)


def _asked(worker: Any, handle: Any) -> Any:
    return wait(worker.receive.remote(handle), "a worker to refuse", 60)
