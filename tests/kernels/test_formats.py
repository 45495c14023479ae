"""FP8 and FP4 against a slow reference in exact fractions: every code with every scale, ties, edges, damaged input."""

import bisect
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amalgam.kernels import cache_formats, fake_quantize, formats
from amalgam.kernels.hadamard import hadamard

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
LARGEST = Fraction(float(torch.finfo(torch.float32).max))


def minifloat(code: int, exponent_bits: int, mantissa_bits: int) -> Fraction:
    """The value of a small floating-point code, by its definition; bias 2^(exponent_bits - 1) - 1."""
    bias = 2 ** (exponent_bits - 1) - 1
    mantissa = code & (2**mantissa_bits - 1)
    exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
    if exponent:
        size = Fraction(2) ** (exponent - bias) * (1 + Fraction(mantissa, 2**mantissa_bits))
    else:
        size = Fraction(2) ** (1 - bias) * Fraction(mantissa, 2**mantissa_bits)
    return -size if code >> (exponent_bits + mantissa_bits) else size


FP4 = [minifloat(code, 2, 1) for code in range(16)]
FP8 = [minifloat(code, 4, 3) if code & 127 != 127 else None for code in range(256)]
SIZES = {4: FP4[:8], 8: FP8[:127]}
FLOOR = {4: 6 * Fraction(2) ** -126, 8: Fraction(float(torch.tensor(1e-4)))}


def nearest(sizes: list[Fraction], x: Fraction) -> int:
    """The code of the nearest size, the even one of two."""
    above = bisect.bisect_left(sizes, x)
    near = [code for code in (above - 1, above) if 0 <= code < len(sizes)]
    return min(near, key=lambda code: (abs(sizes[code] - x), code % 2))


def naive(tile: list[float], bits: int) -> tuple[int, list[int]]:
    """The scale's byte and the codes of one tile: nearest, ties to the even code."""
    sizes, exact = SIZES[bits], [Fraction(x) for x in tile]
    amax = max(FLOOR[bits], *(abs(x) for x in exact))
    exponent = -127
    while sizes[-1] * Fraction(2) ** exponent < amax:
        exponent += 1
    codes = []
    for x, value in zip(exact, tile, strict=True):
        code = nearest(sizes, abs(x) / Fraction(2) ** exponent)
        negative = str(value).startswith("-")
        codes.append(code | negative << (bits - 1))
    return exponent + 127, codes


def scales_of(codes) -> Tensor:
    return torch.as_tensor(codes, dtype=torch.uint8).view(E8M0)


def nibbles(packed: Tensor) -> Tensor:
    low, high = packed.view(torch.uint8) & 15, packed.view(torch.uint8) >> 4
    return torch.stack([low, high], -1).flatten(-2)


def test_every_fp4_byte_with_every_scale():
    bytes_ = torch.arange(256, dtype=torch.uint8)
    for scale in range(255):
        unit = Fraction(2) ** (scale - 127)
        want = [FP4[n] * unit for byte in range(256) for n in (byte & 15, byte >> 4)]
        fits = torch.tensor([abs(w) <= LARGEST for w in want]).view(256, 2).all(1)
        packed = torch.where(fits, bytes_, 0).view(torch.int8).unsqueeze(0)
        found = formats.dequantize_fp4(packed, scales_of([[scale] * 16]))[0]
        for pair, ok in enumerate(fits.tolist()):
            if ok:
                assert [Fraction(float(x)) for x in found[2 * pair : 2 * pair + 2]] == want[2 * pair : 2 * pair + 2]
        for byte in (~fits).nonzero().flatten().tolist():
            one = torch.zeros(1, 16, dtype=torch.uint8)
            one[0, 3] = byte
            with pytest.raises(ValueError, match="too large for torch.float32"):
                formats.dequantize_fp4(one.view(torch.int8), scales_of([[scale]]))
    with pytest.raises(ValueError, match=r"scale of tile \(0, 1\) of 1 x 32 is NaN"):
        formats.dequantize_fp4(torch.zeros(1, 32, dtype=torch.int8), scales_of([[9, 255]]))


def test_every_fp8_code_with_every_scale():
    for scale in range(255):
        unit = Fraction(2) ** (scale - 127)
        want = [None if v is None or abs(v * unit) > LARGEST else v * unit for v in FP8]
        fits = torch.tensor([w is not None for w in want])
        codes = torch.where(fits, torch.arange(256, dtype=torch.uint8), 0).view(E4M3).unsqueeze(0)
        found = formats.dequantize_rows(codes, scales_of([[scale, scale]]))[0].tolist()
        assert all(w is None or Fraction(x) == w for x, w in zip(found, want, strict=True))
    for code, scale, message in [(127, 3, "is NaN"), (255, 130, "is NaN"), (126, 254, "too large"), (1, 255, "NaN")]:
        with pytest.raises(ValueError, match=message):
            formats.dequantize_fp8(torch.tensor([[code]], dtype=torch.uint8).view(E4M3), scales_of([[scale]]))


def test_fp4_stored_values_requantize_to_themselves():
    """Every byte with every scale that quantization makes: to the same values, and the same bytes beside a 4 or a 6."""
    scale = torch.arange(1, 253, dtype=torch.uint8)
    for other in (0x00, 0x06, 0xF7):  # the group's remaining bytes: zeros; 4 and 0; 6 and -6
        packed = torch.full((256, 16), other, dtype=torch.uint8)
        packed[:, 0] = torch.arange(256)
        for s in scale.tolist():
            values = formats.dequantize_fp4(packed.view(torch.int8), scales_of([[s]] * 256))
            again, scales = formats.quantize_fp4(values)
            assert torch.equal(formats.dequantize_fp4(again, scales), values)
            assert torch.equal(formats.round_fp4(values), values)
            if other:
                assert torch.equal(again.view(torch.uint8), packed) and scales.view(torch.uint8).unique().tolist() == [
                    s
                ]


def test_fp8_stored_values_requantize_to_themselves():
    finite = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)
    for s in range(127 - 22, 127 + 119):  # the smallest scale of the rule is 2^-22
        for other in (0, 126):
            codes = torch.full((254, 128), other, dtype=torch.uint8)
            codes[:, 0] = finite
            values = formats.dequantize_rows(codes.view(E4M3), scales_of([[s]] * 254))
            again, scales = formats.quantize_rows(values)
            assert torch.equal(formats.dequantize_rows(again, scales), values)
            if other:
                assert torch.equal(again.view(torch.uint8), codes) and scales.view(torch.uint8).unique().tolist() == [s]


def ties(bits: int) -> list[float]:
    """Every value of the format, every midpoint between two, and the fp32 numbers next to each midpoint."""
    values = [float(v) for v in SIZES[bits]]
    middles = torch.tensor([(a + b) / 2 for a, b in zip(values, values[1:], strict=False)])
    around = [middles, torch.nextafter(middles, middles + 1), torch.nextafter(middles, middles - 1)]
    return values + torch.cat(around).tolist()


@pytest.mark.parametrize("bits, width", [(4, 32), (8, 128)])
@pytest.mark.parametrize("exponent", [-19, 0, 40])
def test_rounding_to_nearest_even(bits: int, width: int, exponent: int):
    """Each tie in a tile of its own kind, whose largest value fixes the scale."""
    cases = [sign * x for x in ties(bits) for sign in (1, -1)]
    rows = [[float(SIZES[bits][-1]), *cases[i : i + width - 1]] for i in range(0, len(cases), width - 1)]
    rows[-1] += [0.0] * (width - len(rows[-1]))
    x = torch.tensor(rows) * 2.0**exponent
    if bits == 4:
        packed, scales = formats.quantize_fp4(x)
        codes = nibbles(packed)
    else:
        codes, scales = formats.quantize_rows(x)
        codes = codes.view(torch.uint8)
    for row, values in enumerate(x.tolist()):
        scale, want = naive(values, bits)
        assert scales.view(torch.uint8)[row].tolist() == [scale] == [exponent + 127]
        assert codes[row].tolist() == want


@pytest.mark.parametrize("bits, largest", [(4, 6.0), (8, 448.0)])
def test_the_scale_is_the_smallest_power_of_two_that_fits(bits: int, largest: float):
    """Around every border between two scales, at the floor, and near the ends of fp32."""
    borders = torch.tensor([largest * 2.0**e for e in (-125, -60, -23, -22, -21, -1, 0, 1, 50, 118)])
    floor = torch.tensor([float(FLOOR[bits])])
    amax = torch.cat([borders, floor, torch.tensor([0.0, -0.0, 1e-45, 1e-39, 3e38])])
    amax = torch.cat([amax, torch.nextafter(amax, amax * 2 + 1e-45), torch.nextafter(amax, amax * 0)])
    x = torch.zeros(len(amax), 32)
    x[:, 5] = -amax
    scales = (formats.quantize_fp4(x) if bits == 4 else formats.quantize_rows(x))[1].view(torch.uint8).flatten()
    for row, scale in zip(x.tolist(), scales.tolist(), strict=True):
        assert scale == naive(row, bits)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_tiles_match_the_reference(dtype: torch.dtype):
    x = (torch.randn(40, 64) * torch.exp(4 * torch.randn(40, 1))).to(dtype)
    packed, scales = formats.quantize_fp4(x)
    codes4, codes8 = nibbles(packed), formats.quantize_rows(x)
    for row, values in enumerate(x.tolist()):
        for group in range(2):
            scale, codes = naive(values[32 * group : 32 * group + 32], 4)
            assert int(scales.view(torch.uint8)[row, group]) == scale
            assert codes4[row, 32 * group : 32 * group + 32].tolist() == codes
        scale, codes = naive(values, 8)
        assert int(codes8[1].view(torch.uint8)[row, 0]) == scale and codes8[0].view(torch.uint8)[row].tolist() == codes


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (129, 127), (2, 130, 260), (2, 3, 5, 300)])
def test_weights_have_a_scale_for_each_block(shape: tuple[int, ...]):
    weight = torch.randn(shape) * torch.exp(2 * torch.randn(shape[-2], 1))
    codes, scales = formats.quantize_fp8(weight)
    assert codes.shape == weight.shape and codes.dtype == E4M3 and scales.dtype == E8M0
    blocks = [*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128)]
    assert list(scales.shape) == blocks
    back = formats.dequantize_fp8(codes, scales)
    flat, out, s = (x.reshape(-1, *x.shape[-2:]) for x in (weight, back, scales.float()))
    for index in torch.cartesian_prod(*(torch.arange(n) for n in s.shape)).tolist():
        e, i, j = index
        block = flat[e, 128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
        scale = s[e, i, j]
        assert scale / 2 < block.abs().max() / 448 <= scale or float(scale) == 2.0**-22
        cast = (block / scale).to(E4M3).float() * scale
        assert torch.equal(out[e, 128 * i : 128 * i + 128, 128 * j : 128 * j + 128], cast)
    assert torch.equal(formats.round_fp8(weight), back)
    assert torch.equal(formats.dequantize_fp8(codes, scales, torch.bfloat16), back.to(torch.bfloat16))


def test_bad_tensors_are_named():
    x = torch.zeros(3, 256)
    x[1, 200] = float("inf")
    for quantize, place in [(formats.quantize_fp4, r"\(1, 6\) of 1 x 32"), (formats.quantize_rows, r"\(1, 1\) of 1 x")]:
        with pytest.raises(ValueError, match=f"tile {place}.* holds a NaN or an infinity"):
            quantize(x)
        with pytest.raises(ValueError, match=f"tile {place}"):
            quantize(torch.where(x.isinf(), torch.nan, x))
    with pytest.raises(ValueError, match=r"\(0, 1\) of 128 x 128 holds a NaN"):
        formats.quantize_fp8(x)
    with pytest.raises(ValueError, match=r"multiple of 32 columns, got shape \[3, 40\]"):
        formats.quantize_fp4(torch.zeros(3, 40))
    vector = torch.zeros(32)
    for call in (
        lambda: formats.quantize_fp8(vector),
        lambda: formats.quantize_fp4(vector),
        lambda: formats.dequantize_fp8(vector.to(E4M3), vector[:1].to(E8M0)),
        lambda: formats.dequantize_fp4(vector.to(torch.int8), vector[:1].to(E8M0)),
    ):
        with pytest.raises(ValueError, match=r"only matrices have tiles, got shape \[(32|64)\]"):
            call()
    codes, scales = formats.quantize_fp8(torch.zeros(3, 256))
    with pytest.raises(ValueError, match=r"scales of shape \[1, 2\], got \[2, 1\]"):
        formats.dequantize_fp8(codes, scales.t())
    with pytest.raises(ValueError, match="codes must be float8_e4m3fn"):
        formats.dequantize_fp8(codes.view(torch.uint8), scales)
    with pytest.raises(ValueError, match="scales must be float8_e8m0fnu"):
        formats.dequantize_fp8(codes, scales.float())
    with pytest.raises(ValueError, match="packed FP4 must be int8"):
        formats.dequantize_fp4(torch.zeros(3, 16), scales_of([[1]] * 3))


def fp4_tensor(n: int, k: int, spread: int, seed: int, top: int = 140) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8).view(torch.int8)
    scales = top - torch.randint(0, spread + 1, (n, k // 32), generator=generator, dtype=torch.uint8)
    return packed, scales.view(E8M0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 140), st.integers(1, 9), st.integers(0, 20), st.integers(20, 246), st.integers(0, 2**31))
def test_fp4_becomes_fp8_without_loss_or_is_refused(n: int, groups: int, spread: int, top: int, seed: int):
    packed, scales = fp4_tensor(n, 32 * groups, spread, seed, top)
    values = formats.dequantize_fp4(packed, scales)
    fit = formats.fp8_fit(packed, scales)
    assert fit.blocks == -(-n // 128) * -(-groups // 4) and fit.worst_spread <= spread
    try:
        codes, new = formats.fp4_to_fp8(packed, scales)
    except ValueError:
        assert fit.worst_spread > 14 and fit.fitting < fit.blocks
        return
    assert fit.fitting == fit.blocks
    assert torch.equal(formats.dequantize_fp8(codes, new), values)
    largest = scales.view(torch.uint8)[:128, :4].max()
    assert int(new.view(torch.uint8)[0, 0]) == max(int(largest) - 6, 0)


def test_every_fp4_byte_and_scale_becomes_fp8():
    """One group a block, so that it always fits; at the smallest scales the new one stops at 2^-127."""
    bytes_ = torch.arange(256, dtype=torch.uint8).view(16, 16).view(torch.int8)
    for scale in range(255):
        scales = scales_of([[scale]] * 16)
        codes, new = formats.fp4_to_fp8(bytes_, scales)
        assert new.view(torch.uint8).tolist() == [[max(scale - 6, 0)]]
        want = [float(FP4[n] * Fraction(2) ** (scale - 127)) for b in range(256) for n in (b & 15, b >> 4)]
        found = codes.double() * 2.0 ** (max(scale - 6, 0) - 127)
        assert found.flatten().tolist() == want


def test_a_block_that_does_not_fit_is_named():
    packed, scales = torch.full((256, 128), 0x22, dtype=torch.int8), torch.full((256, 8), 120, dtype=torch.uint8)
    packed[200, 64:80] = 0x11  # a group of 0.5 in block (1, 1)
    scales[200, 4] = 120 - 14
    codes, new = formats.fp4_to_fp8(packed, scales.view(E8M0))
    assert torch.equal(formats.dequantize_fp8(codes, new), formats.dequantize_fp4(packed, scales.view(E8M0)))
    assert formats.fp8_fit(packed, scales.view(E8M0)) == (4, 4, 14, (1, 1))
    scales[200, 4] -= 1
    with pytest.raises(ValueError, match=r"block \(1, 1\) of 128 x 128 .* over 2\^15, .*\(1 of 4 blocks"):
        formats.fp4_to_fp8(packed, scales.view(E8M0))
    assert formats.fp8_fit(packed, scales.view(E8M0)) == (4, 3, 15, (1, 1))
    packed[200, 64:80] = -128  # zeros, one of them negative: their scale does not matter
    assert formats.fp8_fit(packed, scales.view(E8M0)) == (4, 4, 0, (0, 0))
    with pytest.raises(ValueError, match="is NaN"):
        formats.fp8_fit(packed, torch.full((256, 8), 255, dtype=torch.uint8).view(E8M0))


def test_cache_entries_are_584_bytes_in_order():
    rows = torch.randn(5, 512) * 3
    entries = cache_formats.pack_cache_entries(rows)
    assert entries.shape == (5, 584) and entries.dtype == torch.uint8
    scales = 2.0 ** (entries[:, 576:583].double() - 127)
    values = entries[:, :448].view(E4M3).double().view(5, 7, 64) * scales.unsqueeze(-1)
    back = cache_formats.unpack_cache_entries(entries, dtype=torch.float32)
    assert torch.equal(back[:, :448].double(), values.flatten(1))
    assert torch.equal(back[:, 448:], rows[:, 448:].to(torch.bfloat16).float())
    assert torch.equal(entries[:, 448:576].view(torch.bfloat16), rows[:, 448:].to(torch.bfloat16))
    assert not entries[:, 583].any()
    assert float((back - rows).abs().max() / rows.abs().max()) < 2**-4
    again = cache_formats.pack_cache_entries(back)  # a tile whose largest value became 224 takes half the scale
    assert torch.equal(cache_formats.unpack_cache_entries(again, dtype=torch.float32), back)
    assert torch.equal(fake_quantize.fake_fp8(rows[:, :448], (1, 64)), back[:, :448])


def test_index_keys_are_68_bytes_in_order():
    keys = torch.randn(4, 128)
    packed = cache_formats.pack_index_keys(keys)
    assert packed.shape == (4, 68) and packed.dtype == torch.uint8
    back = cache_formats.unpack_index_keys(packed, dtype=torch.float32)
    want = [[float(FP4[n]) for n in row] for row in nibbles(packed[:, :64]).tolist()]
    scales = 2.0 ** (packed[:, 64:].float() - 127)
    assert torch.equal(back, torch.tensor(want) * scales.repeat_interleave(32, 1))
    assert torch.equal(back, fake_quantize.fake_fp4(keys))
    assert torch.equal(cache_formats.unpack_index_keys(packed), back.to(torch.bfloat16))


def test_other_widths_of_the_cache_follow_the_same_rules():
    for dim, rope, size in [(512, 64, 584), (32, 16, 56), (16, 8, 32), (192, 64, 264), (200, 64, 272), (15, 4, 24)]:
        assert cache_formats.cache_entry_bytes(dim, rope) == size
        rows = torch.randn(3, dim)
        entries = cache_formats.pack_cache_entries(rows, rope)
        back = cache_formats.unpack_cache_entries(entries, dim, rope, torch.float32)
        assert entries.shape == (3, size)
        assert torch.equal(back[:, :-rope], formats.round_fp8(rows[:, :-rope], (1, 64)))
        alone = cache_formats.unpack_cache_entries(entries[1:2], dim, rope, torch.float32)
        assert torch.equal(alone, back[1:2])
    for dim, size in [(128, 68), (64, 34), (32, 17), (16, 9), (2, 2)]:
        assert cache_formats.index_key_bytes(dim) == size
        keys = torch.randn(3, dim)
        packed = cache_formats.pack_index_keys(keys)
        assert packed.shape == (3, size)
        assert torch.equal(cache_formats.unpack_index_keys(packed, dim, torch.float32), formats.round_fp4(keys))
    for call in (
        lambda: cache_formats.pack_index_keys(torch.zeros(2, 48)),
        lambda: cache_formats.pack_index_keys(torch.zeros(2, 15)),
        lambda: cache_formats.unpack_index_keys(torch.zeros(2, 132, dtype=torch.uint8)),
        lambda: cache_formats.unpack_cache_entries(torch.zeros(2, 576, dtype=torch.uint8)),
        lambda: cache_formats.pack_cache_entries(torch.zeros(2, 64)),
        lambda: cache_formats.pack_cache_entries(torch.full((2, 512), torch.nan)),
        lambda: cache_formats.pack_cache_entries(torch.full((2, 512), 3.4e38)),  # no bf16
        lambda: cache_formats.unpack_cache_entries(torch.full((2, 584), 255, dtype=torch.uint8)),
    ):
        with pytest.raises(ValueError, match="32 channels|uint8|rope channels|NaN"):
            call()


def test_hadamard_is_sylvesters_and_its_own_inverse():
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for n in (1, 2, 4, 8, 16, 32, 64, 128):
        x = torch.randn(3, 2, n)
        torch.testing.assert_close(hadamard(x).double(), x.double() @ matrix * n**-0.5, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(hadamard(hadamard(x)), x)
        assert torch.equal(hadamard(x[1:2, :1]), hadamard(x)[1:2, :1])
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    assert hadamard(torch.randn(2, 4).to(torch.bfloat16)).dtype == torch.bfloat16
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    (gradient,) = torch.autograd.grad((hadamard(x) * weight).sum(), x)
    torch.testing.assert_close(gradient, hadamard(weight))
    for n in (0, 3, 96):
        with pytest.raises(ValueError, match="power of two"):
            hadamard(torch.zeros(2, n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fakes_round_as_storage_does_and_pass_the_gradient_on(dtype: torch.dtype):
    x = (torch.randn(2, 130, 160) * 5).to(dtype).requires_grad_()
    weight = torch.randn(2, 130, 160).to(dtype)
    stored8 = formats.dequantize_fp8(*formats.quantize_fp8(x), dtype)
    stored4 = formats.dequantize_fp4(*formats.quantize_fp4(x), dtype)
    for ours, stored in [(fake_quantize.fake_fp8(x), stored8), (fake_quantize.fake_fp4(x), stored4)]:
        assert torch.equal(ours, stored) and ours.dtype == dtype
        (gradient,) = torch.autograd.grad((ours * weight).sum(), x)
        assert torch.equal(gradient, weight)
    through_fp8 = formats.dequantize_fp8(*formats.fp4_to_fp8(*formats.quantize_fp4(x)), dtype)
    assert torch.equal(through_fp8, stored4)
    with torch.no_grad():
        x[1, 5, 40] = float("inf")
    bad = fake_quantize.fake_fp4(x).isnan()
    assert bad[1, 5, 32:64].all() and int(bad.sum()) == 32
    assert int(fake_quantize.fake_fp8(x).isnan().sum()) == 128 * 128
