"""Low precision, the definition and the Triton kernels in the interpreter, against float64 and formats.py's rules."""

import pytest
import torch
from torch import Tensor

from amalgam.kernels import compress, fake_quantize, formats, low_precision, moe
from amalgam.kernels.fused import fp8, fp8_experts, limits

from .test_fused_moe import chosen, layer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter, on machines without a GPU")

ROW = (1, 128)
LIMIT = 3.0


@pytest.fixture(params=["reference", "triton"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AMALGAM_KERNELS", request.param)
    return request.param


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")


def assert_same(found: low_precision.Fp8, expected: tuple[Tensor, Tensor]) -> None:
    """Byte for byte, but for the sign of NaN."""
    for ours, theirs in zip(found, expected, strict=True):
        nan = theirs.float().isnan()
        assert ours.dtype == theirs.dtype and torch.equal(ours.float().isnan(), nan)
        assert torch.equal(ours.view(torch.uint8)[~nan], theirs.view(torch.uint8)[~nan])


def uneven(*shape: int) -> Tensor:
    """Numbers whose groups of 32 differ by up to 2^8, with zeros, ties, and the largest of both formats."""
    x = torch.randn(*shape).unflatten(-1, (-1, 32))
    x = (x * torch.randint(9, x.shape[:-1]).exp2().unsqueeze(-1)).flatten(-2)
    x[..., 3, :], x[..., 7, :128], x[..., 7, 128:] = 0, 448, -6
    x[..., 5, :32] = torch.tensor([6, 5, -5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -0.25, -0.1, 448, 0.5, 17, 19, 1e-9] * 2)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("triton")
def test_codes_and_scales_are_the_definition_s(dtype: torch.dtype):
    """Several programs each way, tiles that end early, values that are not finite."""
    x, weight = uneven(70, 288).to(dtype), uneven(2, 200, 288).to(dtype)
    assert_same(low_precision.quantize_weight(weight, fp4=True), formats.fp4_to_fp8(*formats.quantize_fp4(weight)))
    x[4, 200], x[6, 10], weight[1, 0, 270] = float("nan"), float("-inf"), float("inf")
    rows, tiles, fp4 = formats.encode_fp8(x, ROW), formats.encode_fp8(weight), formats.encode_fp4_as_fp8(weight)
    assert_same(low_precision.quantize_activations(x), rows)
    assert_same(low_precision.quantize_weight(weight), tiles)
    assert_same(low_precision.quantize_weight(weight, fp4=True), fp4)
    assert [found[1].float().isnan().sum() for found in (rows, tiles, fp4)] == [2, 1, 1]
    for (codes, scales), tile in ((rows, ROW), (tiles, formats.FP8_TILE)):
        found = fp8.dequantize(codes, scales, dtype, tile == ROW)
        torch.testing.assert_close(
            found, formats.decode_fp8(codes, scales, dtype, tile), rtol=0, atol=0, equal_nan=True
        )


def test_encoding_is_quantization():
    weight = uneven(2, 200, 288)
    assert_same(low_precision.Fp8(*formats.encode_fp8(weight)), formats.quantize_fp8(weight))
    packed, groups = formats.quantize_fp4(weight)
    expected = formats.fp4_to_fp8(packed, groups)
    assert_same(low_precision.Fp8(*formats.encode_fp4_as_fp8(weight)), expected)
    assert torch.equal(formats.fp4_blocks(groups).float(), expected[1].float())


def test_a_product(how: str):
    """Of several blocks of channels, the last one short, and several tiles."""
    x, weight = uneven(130, 288), uneven(320, 288)
    found = low_precision.multiply(
        low_precision.quantize_activations(x), low_precision.quantize_weight(weight), torch.float32
    )
    expected = formats.round_fp8(x, ROW).double() @ formats.round_fp8(weight).double().t()
    sizes = formats.round_fp8(x, ROW).double().abs() @ formats.round_fp8(weight).double().t().abs()
    assert ((found - expected).abs() <= 1e-6 * sizes).all()


def test_a_product_s_row_is_its_own(how: str):
    """In tiles of 64 and of 128 rows."""
    x, weight = uneven(130, 288).bfloat16(), low_precision.quantize_weight(uneven(48, 288))

    def product(rows: Tensor) -> Tensor:
        return low_precision.multiply(low_precision.quantize_activations(rows), weight, torch.bfloat16)

    whole = product(x)
    for rows in (slice(0, 1), slice(5, 69), slice(60, 129)):
        assert torch.equal(product(x[rows]), whole[rows])


def quantized(gate_up: Tensor, down: Tensor, fp4: bool) -> tuple[low_precision.Fp8, low_precision.Fp8]:
    halves = gate_up.unflatten(1, (2, -1))
    return low_precision.quantize_weight(halves, fp4), low_precision.quantize_weight(down, fp4)


def simulated(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, fp4: bool) -> Tensor:
    """In x's dtype, token by token, with each operand rounded by what only simulates."""
    store = fake_quantize.fake_fp4 if fp4 else fake_quantize.fake_fp8
    gate_up, down = store(gate_up.unflatten(1, (2, -1))).flatten(1, 2), store(down)
    x, sums = fake_quantize.fake_fp8(x, ROW), []
    for row, own, weight in zip(x, ids, weights, strict=True):
        hidden = moe.swiglu(torch.einsum("kij,j->ki", gate_up[own], row), LIMIT) * weight.unsqueeze(1)
        sums.append(torch.einsum("kij,kj->i", down[own], fake_quantize.fake_fp8(hidden, ROW)))
    return torch.stack(sums)


@pytest.mark.parametrize("fp4", [False, True], ids=["FP8", "FP4"])
@pytest.mark.parametrize(
    "tokens, k, experts, hidden, inner", [(40, 3, 5, 160, 32), (9, 2, 4, 288, 160)], ids=["rows", "tiles"]
)
def test_experts(tokens: int, k: int, experts: int, hidden: int, inner: int, fp4: bool, how: str):
    """Values and every gradient of quantization-aware training; its forward is that of the quantized weights. What an
    expert holds that nobody chose, behind the others' last tiles, does not matter."""
    ids, (x, weights, *masters) = chosen(tokens, k, experts), layer(tokens, k, experts, hidden, inner)
    masters = [weight * 0.1 for weight in masters]
    for weight in masters:
        weight[-1] = float("nan")
    results = []
    for kind in (torch.float64, torch.float32):
        leaves = [a.to(kind).requires_grad_() for a in (x, weights, *masters)]
        if kind == torch.float64:
            out = simulated(leaves[0], ids, *leaves[1:], fp4)  # pyright: ignore
        else:
            out = low_precision.experts_qat(leaves[0], ids, *leaves[1:], LIMIT, fp4=fp4)  # pyright: ignore
            rollout = low_precision.experts_fp8(x, ids, weights, *quantized(*masters, fp4), LIMIT)  # pyright: ignore
            assert torch.equal(out, rollout)
        slope = torch.arange(out.numel()).view(out.shape).cos().to(out.dtype)
        results.append([out.detach(), *torch.autograd.grad((out * slope).sum(), leaves)])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == torch.float32 and (found - expected).abs().max() <= 3e-6 * expected.abs().max()


@torch.no_grad()
def test_packed_fp4_gives_the_bits_of_its_fp8(how: str):
    """Of any codes and scales, of which several mean the same number."""
    ids, (x, weights, _, down) = chosen(30, 2, 4), layer(30, 2, 4, 288, 160)
    packed, groups = torch.randint(-128, 128, (4, 2, 160, 144)), torch.randint(108, 118, (4, 2, 160, 9))
    stored = [(packed.to(torch.int8), groups.to(torch.uint8).view(torch.float8_e8m0fnu)), formats.quantize_fp4(down)]
    up, lower = (low_precision.fp4_weight(*each) for each in stored)
    fp8_up, fp8_lower = (low_precision.Fp8(*formats.fp4_to_fp8(*each)) for each in stored)
    expected = low_precision.experts_fp8(x, ids, weights, fp8_up, fp8_lower, LIMIT)
    assert expected.isfinite().all() and expected.ne(0).all()
    assert torch.equal(low_precision.experts_fp8(x, ids, weights, up, lower, LIMIT), expected)


@torch.no_grad()
@pytest.mark.usefixtures("triton")
def test_a_token_is_its_own(monkeypatch: pytest.MonkeyPatch):
    """Alone, in a batch, among others of its experts and in tiles of another height."""
    x, weights, gate_up, down = layer(60, 2, 4, 160, 32)
    x, ids, low = x.bfloat16(), chosen(60, 2, 4), quantized(gate_up * 0.1, down, False)
    monkeypatch.setattr(fp8_experts, "height_of", lambda slots, _: 64 if slots < 80 else 128)
    whole = low_precision.experts_fp8(x, ids, weights, *low, LIMIT)
    for rows in (slice(0, 1), slice(7, 12), torch.randperm(60)[:45]):
        assert torch.equal(low_precision.experts_fp8(x[rows], ids[rows], weights[rows], *low, LIMIT), whole[rows])


def test_the_linear_layer_of_training(how: str):
    x, weight = uneven(2, 35, 160) / 256, uneven(48, 160) / 256
    wide = [a.double().requires_grad_() for a in (x, weight)]
    expected = fake_quantize.fake_fp8(wide[0], ROW) @ fake_quantize.fake_fp8(wide[1]).t()
    own = [a.clone().requires_grad_() for a in (x, weight)]
    out = low_precision.linear_qat(own[0], own[1])
    slope = torch.randn_like(out)
    results = [out, *torch.autograd.grad(out, own, slope)]
    for found, right in zip(results, [expected, *torch.autograd.grad(expected, wide, slope.double())], strict=True):
        assert (found - right).abs().max() <= 2e-6 * right.abs().max()


def test_masters_in_fp32_beside_bf16_get_gradients_of_their_dtype(how: str):
    ids, (x, weights, gate_up, down) = chosen(6, 2, 4), layer(6, 2, 4, 160, 32)
    leaves = [x.bfloat16().requires_grad_(), gate_up.requires_grad_(), down.requires_grad_()]
    out = low_precision.experts_qat(leaves[0], ids, weights, leaves[1], leaves[2], LIMIT, fp4=True)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(grad.isfinite().all() and grad.ne(0).any() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage, shape", [("fp8", (9, 128)), ("fp8", (130, 32)), ("fp4", (11, 3, 64))], ids=str)
def test_rows_and_queries_are_stored_as_the_definition_says(
    storage: compress.Storage, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Values to the bit, in several programs; the rotation's gradient, to its dtype's last place."""
    x = (torch.randn(shape) * torch.randint(9, (shape[0],) + (1,) * (len(shape) - 1)).exp2()).to(dtype)
    rotation, slope, results = torch.empty(shape[0], 4, dtype=torch.complex64), torch.randn(shape).to(dtype), []
    for how in ("reference", "triton"):
        monkeypatch.setenv("AMALGAM_KERNELS", how)
        leaf = x.clone().requires_grad_()
        out = compress.stored(leaf, rotation, storage)
        results.append((out.detach(), *torch.autograd.grad(out, leaf, slope)))
    (expected, right), (found, gradient) = results
    assert torch.equal(found, expected) and not torch.equal(found, x)
    torch.testing.assert_close(gradient, right)


@pytest.mark.usefixtures("triton")
def test_no_tokens():
    x, weights, gate_up, down = leaves = [a.requires_grad_() for a in layer(0, 2, 4, 32, 32)]
    ids = torch.zeros(0, 2, dtype=torch.int64)
    out = low_precision.experts_qat(x, ids, weights, gate_up, down, LIMIT, fp4=True)
    assert out.shape == (0, 32) and out.dtype == torch.float32
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(grad.shape == a.shape and grad.eq(0).all() for grad, a in zip(grads, leaves, strict=True))
    with torch.no_grad():
        assert low_precision.experts_fp8(x, ids, weights, *quantized(gate_up, down, False), LIMIT).shape == (0, 32)
    assert low_precision.linear_qat(x, gate_up[0]).shape == (0, 64)


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "is_hopper", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ValueError, match="precision: products in FP8 run on Hopper, not on A100"):
        limits.check_fp8(torch.device("cuda"))
    limits.check_fp8(torch.device("cpu"))


@pytest.mark.usefixtures("triton")
def test_what_is_refused():
    x, weight = torch.randn(3, 24), torch.randn(8, 32)
    with pytest.raises(ValueError, match="channels: 24; the Triton kernels take multiples of 16"):
        low_precision.quantize_activations(x)
    with pytest.raises(ValueError, match="float64; the Triton kernels quantize bfloat16 or float32"):
        low_precision.quantize_weight(weight.double())
    with pytest.raises(ValueError, match="out_features: 8; the Triton kernels take multiples of 16"):
        low_precision.linear_qat(weight, weight)
    with pytest.raises(ValueError, match="FP4 needs rows of a multiple of 32 columns"):
        low_precision.quantize_weight(x, fp4=True)
    weight[0] *= 2.0**16
    with pytest.raises(ValueError, match=r"1 of 1 blocks of 128 x 128 do not fit FP8 .*\(0, 0\), whose scales spread"):
        low_precision.fp4_weight(*formats.quantize_fp4(weight))
