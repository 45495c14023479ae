"""States saved beside the journal: found by request, length and version, and by nothing else; torn ones are named."""

import numpy as np
import pytest
import torch

from amalgam.rl.journal import JournalError, drop_snapshots, load_snapshot, save_snapshot


def tensors() -> dict[str, torch.Tensor]:
    return {
        "rows": torch.randn(3, 5).to(torch.bfloat16),
        "codes": torch.randn(4, 2).to(torch.float8_e4m3fn),
        "length": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "turned": torch.randn(4, 3).T,
    }


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = tensors()
    save_snapshot(tmp_path, 2**40, 17, 3, state, {"position": 17, "name": "ä"})
    found, meta = load_snapshot(tmp_path, 2**40, 17, 3) or ({}, {})
    assert meta == {"position": 17, "name": "ä"} and found.keys() == state.keys()
    for name, tensor in state.items():
        same = found[name].contiguous().view(torch.uint8) if tensor.dim() else found[name]
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(same, tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor)


def test_another_state_is_not_found(tmp_path):
    save_snapshot(tmp_path, 1, 17, 3, tensors())
    for key in ((11, 17, 3), (1, 16, 3), (1, 17, 4)):
        assert load_snapshot(tmp_path, *key) is None


def test_the_newest_of_a_request_stays(tmp_path):
    for request in (1, 11):
        for fed in (3, 9):
            save_snapshot(tmp_path, request, fed, 0, tensors())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1-9-0.snapshot", "11-9-0.snapshot"]
    drop_snapshots(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["11-9-0.snapshot"]


def test_a_torn_one_is_named(tmp_path):
    save_snapshot(tmp_path, 1, 9, 0, tensors(), {"x": 1})
    (path,) = tmp_path.iterdir()
    content, rng = path.read_bytes(), np.random.default_rng(0)
    data = 8 + int.from_bytes(content[:8], "little")
    for size in rng.integers(0, len(content), 20).tolist():
        path.write_bytes(content[:size])
        with pytest.raises(JournalError, match=r"1-9-0\.snapshot: torn"):
            load_snapshot(tmp_path, 1, 9, 0)
    for at in range(data, len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
        with pytest.raises(JournalError, match=r"1-9-0\.snapshot: torn"):
            load_snapshot(tmp_path, 1, 9, 0)


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(JournalError, match=r"gone/1-9-0\.snapshot"):
        save_snapshot(tmp_path / "gone", 1, 9, 0, tensors())
