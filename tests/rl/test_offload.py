"""Tensors' memory that goes and comes back."""

import pytest
import torch

from amalgam.rl.offload import Offload


def test_tensors_are_themselves_again_with_what_shares_their_memory():
    whole = torch.randn(6, 7)
    tensors = [whole, whole[2:4], torch.randint(0, 9, (5,)), torch.randn(()).bfloat16(), torch.empty(0)]
    expected = [t.clone() for t in tensors]
    held = Offload(tensors)
    for _ in range(2):
        assert held.out() == 6 * 7 * 4 + 5 * 8 + 2
        assert [t.untyped_storage().nbytes() for t in tensors] == [0] * 5
        with pytest.raises(RuntimeError, match="offloaded already"):
            held.out()
        held.back()
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
        held.back()  # takes nothing twice
        whole += 1
        expected[0] += 1
        expected[1] += 1
    assert torch.equal(whole[2:4], tensors[1])


def test_what_numpy_holds_stays():
    ours, theirs = torch.randn(6), torch.randn(5)
    part, array, expected = ours[2:], theirs.numpy(), [ours.clone(), theirs.clone()]
    held = Offload([ours, theirs])
    assert held.out() == 44
    assert held.away and array.tolist() == theirs.tolist()
    assert held.host(part).tolist() == expected[0][2:].view(torch.uint8).tolist()
    held.back()
    assert not held.away
    assert all(torch.equal(a, b) for a, b in zip((ours, theirs), expected, strict=True))


@pytest.mark.gpu
def test_a_gpus_memory_is_free_meanwhile():
    torch.cuda.synchronize()
    tensors = [torch.randn(2**24, device="cuda") for _ in range(4)]
    sums = [t.double().sum() for t in tensors]
    held = Offload(tensors)
    before = torch.cuda.mem_get_info()[0]
    held.out()
    assert torch.cuda.mem_get_info()[0] >= before + 4 * 2**26
    held.back()
    assert [float(t.double().sum()) for t in tensors] == [float(s) for s in sums]
