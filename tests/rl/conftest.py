"""The learners' processes, which cost seconds to start, serve the tests of all files here."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from amalgam.model import initialize, save
from amalgam.rl.learner import Learner
from amalgam.settings import FULL, Precision

from .small_learner import STEPS, optimization, small_config


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("learner") / "checkpoint"
    save(initialize(small_config(), seed=0), path)
    return path


@pytest.fixture(scope="package")
def learner(ray_session: None, checkpoint: Path) -> Iterator[Callable[..., Learner]]:
    """learner(ranks, stage), at the checkpoint's weights and step 0; each number of ranks has its processes.

    Computes in fp32 unless a `precision` is given.
    """
    made: dict[int, Learner] = {}

    def at_start(ranks: int, stage: int, precision: Precision = FULL, **more) -> Learner:
        settings = optimization(ranks, stage, **more)
        if ranks in made:
            made[ranks]._precision = precision
            made[ranks].load(checkpoint, settings, STEPS)
        else:
            made[ranks] = Learner(settings, STEPS, checkpoint, precision=precision, deadline=120)
        return made[ranks]

    yield at_start
    for each in made.values():
        each.close()
