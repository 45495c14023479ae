"""What the kernels of low precision say in PTX, read as its manual does: Triton's interpreter does not run it."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from amalgam.kernels import formats
from amalgam.kernels.fused import fp8, fp8_experts


def run(assembly: str, outputs: int, *inputs: Tensor) -> list[Tensor]:
    """The registers $0 ... of `outputs` for inputs int32 [n], 32 bits of any kind."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def value(name: str) -> Tensor:
        if name in registers:
            return registers[name]
        bits = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
        return torch.full_like(inputs[0], bits - (bits >> 31 << 32))

    for line in assembly.strip("{}").split(";"):
        words = line.split(None, 1)
        if not words or words[0] == ".reg":
            continue
        to, *names = re.split(r",\s*", words[1].replace("{", "").replace("}", ""))
        registers[to] = OPERATIONS[words[0]](*map(value, names))
    return [registers[f"${i}"] for i in range(outputs)]


def real(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: operation(*(x.view(torch.float32) for x in args)).view(torch.int32)


def halves(high: Tensor, low: Tensor) -> Tensor:
    return high << 16 | low & 0xFFFF


def bf16x2(high: Tensor, low: Tensor) -> Tensor:
    return halves(*(x.view(torch.float32).bfloat16().view(torch.int16).int() for x in (high, low)))


def e4m3x2(high: Tensor, low: Tensor) -> Tensor:
    high, low = (x.view(torch.float32).to(torch.float8_e4m3fn).view(torch.uint8).int() for x in (high, low))
    return high << 8 | low


def prmt(a: Tensor, b: Tensor, which: Tensor) -> Tensor:
    found = torch.zeros_like(a)
    for i in range(4):
        index = which >> 4 * i & 15
        byte = torch.where(index & 4 == 0, a, b) >> (index & 3) * 8 & 255
        found |= torch.where(index & 8 == 0, byte, (byte >> 7) * 255) << 8 * i
    return found


def lop3(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    found = torch.zeros_like(a)
    for i in range(8):
        of_a, of_b, of_c = (x if i & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1)))
        found |= of_a & of_b & of_c & -(table >> i & 1)
    return found


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "mul.f32": real(torch.mul), "add.f32": real(torch.add), "ex2.approx.ftz.f32": real(torch.exp2),
    "rcp.approx.ftz.f32": real(torch.reciprocal), "cvt.rn.bf16x2.f32": bf16x2,
    "cvt.rn.satfinite.e4m3x2.f32": e4m3x2, "mov.b32": lambda low, high: halves(high, low),
    "and.b32": torch.bitwise_and, "shl.b32": lambda x, n: x << n, "shr.u32": lambda x, n: (x.long() & 0xFFFFFFFF) >> n,
    "prmt.b32": prmt, "lop3.b32": lop3,
}  # fmt: skip


def test_fp4_becomes_the_codes_of_its_values():
    """Every byte four times, among random others, in groups whose scales are up to 2^6 and down to 2^-20 of the new."""
    packed = torch.cat([torch.arange(256).repeat(4), torch.randint(256, (1024,))]).to(torch.uint8)
    packed = packed[torch.randperm(2048)].view(-1, 4)
    shift = torch.randint(-20, 7, (512,), dtype=torch.int32)
    low, high = run(fp8_experts.TABLE.value, 2, (shift + 127) << 23)
    # Four bytes are one register, and so are two pairs of codes; each byte brings its group's table.
    found = run(fp8_experts.LOOKUP.value, 2, packed.view(torch.int32).squeeze(1), *[low] * 4, *[high] * 4)
    codes = torch.stack(found, 1).to(torch.int32).view(torch.uint8)
    ones = torch.full((512, 1), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    values = formats.dequantize_fp4(packed.repeat(1, 4).view(torch.int8), ones)[:, :8]
    expected = (values * shift.float().exp2().unsqueeze(1)).to(torch.float8_e4m3fn)
    assert torch.equal(codes, expected.view(torch.uint8))


def test_two_numbers_are_rounded_to_bf16():
    x = torch.randn(2, 1000) * torch.randint(-30, 30, (2, 1000)).float().exp2()
    x[0, :4] = torch.tensor([float("inf"), 0.0, -0.0, 1 + 2**-8])
    found = run(fp8.ROUND.value, 2, *x.view(torch.int32).unbind(0))
    assert torch.equal(torch.stack(found).view(torch.float32), x.bfloat16().float())


def test_the_sigmoid():
    x = torch.linspace(-90, 90, 10_001)
    (found,) = run(fp8.SIGMOID.value, 1, x.view(torch.int32))
    torch.testing.assert_close(found.view(torch.float32).double(), x.double().sigmoid(), rtol=2e-5, atol=1e-38)
