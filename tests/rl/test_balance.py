"""Loads of the experts, and the balance rule, against counts made by hand."""

import torch

from amalgam.rl.balance import Loads, figures
from tests.tiny import model


def forward(tiny, seed: int) -> torch.Tensor:
    """Expert ids [T, L, k] of 20 tokens."""
    tokens = torch.randint(2, 512, (20,), generator=torch.Generator().manual_seed(seed))
    return tiny(tokens, torch.tensor([0, 13, 20])).experts


def test_counts_are_what_the_routers_chose_while_counting():
    tiny = model(0)
    loads = Loads(tiny)
    forward(tiny, 0)  # before anything is started
    loads.start("cpu")
    forward(tiny, 1)
    loads.counting = True
    ids = torch.cat([forward(tiny, 2), forward(tiny, 3)])
    loads.counting = False
    forward(tiny, 4)
    expected = [torch.bincount(ids[:, layer].flatten(), minlength=4) for layer in range(3)]
    assert [counts.tolist() for counts in loads.take().values()] == [counts.tolist() for counts in expected]
    loads.start("cpu")
    assert not any(counts.any() for counts in loads.take().values())


def test_biases_move_towards_level_loads_on_learned_layers_alone():
    tiny = model(0)
    loads = Loads(tiny)
    hashed, *learned = loads.routers.values()
    before = [router.e_score_correction_bias.clone() for router in learned]
    counts = torch.tensor([[9, 0, 1, 2], [5, 0, 2, 1], [2, 2, 2, 2]])
    loads.balance(dict(zip(loads.routers, counts, strict=True)), 0.25)
    assert not hasattr(hashed, "e_score_correction_bias")
    moved = [r.e_score_correction_bias - b for r, b in zip(learned, before, strict=True)]
    torch.testing.assert_close(moved[0], torch.tensor([-0.25, 0.25, 0.0, 0.25]))
    torch.testing.assert_close(moved[1], torch.zeros(4))


def test_figures():
    counts = {"a": torch.tensor([4, 0, 2, 2]), "b": torch.tensor([3, 3, 3, 3])}
    assert figures(counts) == {"load_max": 1.5, "load_idle": 0.125}
    assert figures({}) == {}
