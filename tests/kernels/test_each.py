"""Several operations in one launch have the bits of each alone, wherever their rows go; in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from amalgam.kernels.compress import Pooling, Storage, compress, compress_each
from amalgam.kernels.norm import Norm, norm_each, norm_rope, rms_norm
from amalgam.kernels.places import Windows
from amalgam.kernels.project import Into, Product, project, project_each, project_wide
from amalgam.kernels.rope import apply_rope, inverse_frequencies, rotations
from amalgam.kernels.swiglu import gated

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter, on machines without a GPU")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ROWS = pytest.mark.parametrize("rows", [1, 17, 70])


@pytest.fixture(autouse=True, params=["triton", "reference"])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AMALGAM_KERNELS", request.param)
    with torch.no_grad():
        yield


def turns(positions: Tensor) -> Tensor:
    return rotations(positions, inverse_frequencies(8, {"rope_theta": 100.0}))


@DTYPES
@ROWS
def test_products(rows: int, dtype: torch.dtype):
    x = torch.randn(rows, 48).to(dtype)
    weights = [torch.randn(out, 48).to(dtype) for out in (64, 16, 32, 80, 16, 16, 16, 16)]
    ring, at, halves = torch.zeros(200, 32), torch.randperm(200)[:rows], x.new_zeros(rows, 96)
    wanted = [
        Product(weights[0]),
        Product(weights[1], scale=0.3),
        Product(weights[2], wide=True, into=Into(ring, at)),
        Product(weights[3], into=Into(halves[:, 16:])),
        Product(weights[4], into=Into(halves[:, :16])),
    ]
    found = project_each(x, [*wanted, *map(Product, weights[5:])])
    assert torch.equal(found[0], project(x, weights[0]))
    assert torch.equal(found[1], project(x, weights[1]).float() * 0.3)
    assert found[2] is ring and torch.equal(ring[at], project_wide(x, weights[2]))
    assert int(ring.any(1).sum()) == rows
    assert torch.equal(halves[:, 16:], project(x, weights[3]))
    assert torch.equal(halves[:, :16], project(x, weights[4]))
    for y, weight in zip(found[5:], weights[5:], strict=True):
        assert torch.equal(y, project(x, weight))
    assert project_each(x, []) == []


@DTYPES
@ROWS
def test_products_gated(rows: int, dtype: torch.dtype):
    x, gate, up, other = (torch.randn(n, 48).to(dtype) for n in (rows, 32, 32, 16))
    found = project_each(x, [Product(other, wide=True), Product(gate, up=up, limit=5.0)])
    assert torch.equal(found[0], project_wide(x, other))
    assert torch.equal(found[1], gated(project(x, torch.cat([gate, up])), 5.0))


def test_rows_that_a_product_does_not_fit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")
    into = Into(torch.zeros(3, 16))
    with pytest.raises(ValueError, match=r"of 32 numbers in torch.float32 cannot go to rows \[3, 16\]"):
        project_each(torch.randn(3, 48), [Product(torch.randn(32, 48), into=into)])


@DTYPES
@ROWS
def test_norms(rows: int, dtype: torch.dtype):
    x, row, q = (torch.randn(rows, *shape).to(dtype) for shape in ((48,), (32,), (3, 32)))
    rotation, weight, of_row = turns(torch.arange(rows)), torch.randn(48), torch.randn(32)
    ring, at = torch.zeros(200, 32, dtype=dtype), torch.randperm(200)[:rows]
    found = norm_each([Norm(x, weight, None, 1e-6), Norm(row, of_row, rotation, 1e-6, Into(ring, at))])
    assert torch.equal(found[0], rms_norm(x, weight, 1e-6))
    assert found[1] is ring and torch.equal(ring[at], norm_rope(row, of_row, rotation, 1e-6))
    assert int(ring.any(1).sum()) == rows
    found = norm_each([Norm(q, None, rotation, 1e-6), Norm(q[:, :2], None, rotation)])
    assert torch.equal(found[0], norm_rope(q, None, rotation, 1e-6))
    assert torch.equal(found[1], apply_rope(q[:, :2], rotation))


@DTYPES
@pytest.mark.parametrize("overlap", [False, True])
def test_entries(overlap: bool, dtype: torch.dtype):
    """Of two kinds, from rings of 9 rows; the second of three is none."""
    number = torch.tensor([0, -1, 5], dtype=torch.int32)
    windows = Windows(torch.tensor([9, 0, 27], dtype=torch.int32), number, turns(4 * number.long()), 9)
    rows, poolings = torch.tensor([4, 0, 2]), []
    kinds: list[tuple[int, Storage]] = [(64, "fp8"), (32, "fp4")]
    for width, storage in kinds:
        channels = width * (1 + overlap)
        values, scores = torch.randn(2, 36, channels)
        pool = torch.zeros(6, width, dtype=dtype)
        bias = torch.randn(4, channels)
        poolings.append(Pooling(values, scores, bias, torch.rand(width) + 0.5, 1e-6, pool, storage))
    compress_each(poolings, windows, rows)
    for each in poolings:
        given = (each.values, each.scores, each.bias, each.weight)
        alone = compress(*given, windows, each.eps, dtype, each.storage)
        assert torch.equal(each.pool[rows], alone) and alone[0].any() and alone[2].any()
        assert not each.pool[[0, 1, 3, 5]].any()
