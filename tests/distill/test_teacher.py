"""Teachers: their hidden states and heads, in the caller's order, and never two models at once."""

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import amalgam.model
from amalgam.distill.teacher import Teachers, TeacherWorker
from amalgam.errors import UserError
from amalgam.model import DeepseekV4
from amalgam.model.checkpoint import load

from .. import tiny


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three teachers, one of another width."""
    folder = tmp_path_factory.mktemp("teachers")
    return [tiny.checkpoint(folder / f"{i}", i, hidden_size=width) for i, width in enumerate((32, 48, 32))]


@pytest.fixture(scope="module")
def teachers(ray_session: None, paths: list[Path]) -> Iterator[Teachers]:
    with Teachers(paths, deadline=120.0) as made:
        yield made


def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 512, n).astype(np.int32) for n in (9, 40, 1, 25, 3, 30, 8)]


@torch.no_grad()
def own_states(path: Path, document: np.ndarray) -> np.ndarray:
    tokens = torch.from_numpy(document).long()
    return load(path)(tokens, torch.tensor([0, len(tokens)])).hidden.numpy()


@pytest.mark.parametrize("max_tokens", [1, 50, 10_000])
def test_hidden_states_are_the_models_own_in_the_documents_order(
    teachers: Teachers, paths: list[Path], max_tokens: int
):
    assigned = [2, 0, 1, 0, 2, 0, 1]
    found = teachers.hidden(documents(), assigned, max_tokens)
    for document, teacher, states in zip(documents(), assigned, found, strict=True):
        assert states.dtype == np.float32
        np.testing.assert_allclose(states, own_states(paths[teacher], document), rtol=0, atol=2e-5)


def test_heads_are_fp32_by_index(teachers: Teachers, paths: list[Path]):
    heads = teachers.heads()
    assert list(heads) == ["head.0", "head.1", "head.2"]
    for head, path in zip(heads.values(), paths, strict=True):
        assert head.dtype == np.float32
        np.testing.assert_array_equal(head, load(path).lm_head.weight.detach())


def test_a_teacher_that_fails_stops_the_batch(teachers: Teachers, paths: list[Path], tmp_path: Path):
    teachers.paths.append(str(tmp_path / "none"))
    with pytest.raises(UserError, match="none: neither a checkpoint's folder"):
        teachers.hidden(documents(), [0, 3, 0, 0, 0, 0, 0], 100)
    del teachers.paths[3]
    (states,) = teachers.hidden(documents()[:1], [0], 100)  # the one that was loaded before
    np.testing.assert_allclose(states, own_states(paths[0], documents()[0]), rtol=0, atol=2e-5)


def test_one_teacher_is_in_memory_at_a_time(paths: list[Path], monkeypatch: pytest.MonkeyPatch):
    """In this process. The one before is gone when the next is loaded, and documents come sorted by teacher."""
    loaded: list[str] = []

    def models() -> int:
        gc.collect()
        return sum(type(o) is DeepseekV4 for o in gc.get_objects())

    others = models()

    def watched(path: str, **options) -> DeepseekV4:
        assert models() == others
        loaded.append(path)
        return load(path, **options)

    monkeypatch.setattr(amalgam.model, "load", watched)
    worker = TeacherWorker("cpu", 1)
    for path in (paths[0], paths[1], paths[1], paths[0]):
        worker.hidden(str(path), documents(), 50)
        worker.head(str(path))
    assert loaded == [str(paths[0]), str(paths[1]), str(paths[0])]
