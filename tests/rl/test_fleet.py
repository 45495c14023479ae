"""Lending processes to stages: who gets which, and who ends them. No process is started here."""

import threading
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from amalgam.rl import fleet as fleet_module
from amalgam.rl.fleet import Fleet
from amalgam.rl.settings import Optimization


class Member:
    def __init__(self):
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_an_idle_member_of_the_key_is_lent_again():
    with Fleet() as fleet:
        with fleet.lend("a", Member) as first:
            pass
        with fleet.lend("b", Member) as other, fleet.lend("a", Member) as again, fleet.lend("a", Member) as second:
            assert again is first
            assert len({id(first), id(other), id(second)}) == 3
        assert [m.closed for m in (first, other, second)] == [0, 0, 0]
    assert [m.closed for m in (first, other, second)] == [1, 1, 1]


def test_the_deadline_is_every_process_s(monkeypatch: pytest.MonkeyPatch):
    given = {}
    for name in ("Learner", "Rollouts"):
        made = lambda *_, name=name, **place: given.update({name: place["deadline"]}) or MagicMock()  # noqa: E731
        monkeypatch.setattr(fleet_module, name, made)
    learner = Path(), Optimization(lr=1.0), 1
    with Fleet(deadline=7.0) as fleet, fleet.learner(*learner), fleet.rollouts(Path(), 1, Path()):
        assert given == {"Learner": 7.0, "Rollouts": 7.0}
        assert fleet.place["deadline"] == 7.0


def test_colocated_nobody_idle_holds_memory(monkeypatch: pytest.MonkeyPatch):
    members = {name: MagicMock() for name in ("Learner", "Rollouts")}
    for name, member in members.items():
        monkeypatch.setattr(fleet_module, name, lambda *_, member=member, **__: member)
    for colocated in (0, 3):
        with Fleet(colocated=colocated) as fleet:
            assert (fleet.colocated, fleet.place["group"]) == (colocated > 0, None)
            with fleet.rollouts(Path(), 1, Path()), fleet.learner(Path(), Optimization(lr=1.0), 1):
                assert not any(member.offload.called for member in members.values())
        assert [member.offload.call_count for member in members.values()] == [int(colocated > 0)] * 2


def test_only_what_was_lent_before_is_made_ready_again():
    readied: list[Member] = []
    with Fleet() as fleet:
        with fleet.lend("a", Member, readied.append) as first:
            assert readied == []
        with fleet.lend("a", Member, readied.append) as again:
            assert readied == [first] == [again]


def test_a_member_of_a_stage_that_failed_is_not_lent_again_but_ended():
    with Fleet() as fleet:
        with pytest.raises(KeyError), fleet.lend("a", Member) as broken:
            raise KeyError("a stage")
        with fleet.lend("a", Member) as fresh:
            assert fresh is not broken
    assert (broken.closed, fresh.closed) == (1, 1)


def test_all_members_are_closed_although_one_cannot_be():
    class Stuck(Member):
        def close(self) -> None:
            super().close()
            raise OSError("no such process")

    fleet = Fleet()
    with fleet.lend("a", Member) as one, fleet.lend("a", Stuck) as stuck, fleet.lend("a", Member) as other:
        pass
    with pytest.raises(OSError, match="no such process"), fleet:
        pass
    assert [m.closed for m in (one, stuck, other)] == [1, 1, 1]


def test_a_member_that_cannot_be_made_is_the_stages_error():
    def fail() -> Member:
        raise OSError("no memory")

    with Fleet() as fleet:
        with pytest.raises(OSError, match="no memory"), fleet.lend("a", fail):
            pass
        with fleet.lend("a", Member) as fresh:
            assert fresh.closed == 0


def test_stages_side_by_side_get_different_members():
    meet, lent = threading.Barrier(2, timeout=10), []

    def stage() -> None:
        for _ in range(50):
            with fleet.lend("a", Member) as member:
                meet.wait()
                lent.append(member)
                meet.wait()

    with Fleet() as fleet:
        threads = [threading.Thread(target=stage) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
    assert len(lent) == 100
    assert all(one is not other for one, other in zip(lent[::2], lent[1::2], strict=True))
    assert len({id(m) for m in lent}) == 2
