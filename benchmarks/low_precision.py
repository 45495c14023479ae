"""Products and experts in FP8 and FP4 on one GPU: time beside bf16's, errors against float64, and bits.

    python benchmarks/low_precision.py

Products at V4-Flash's sizes, with the quantization of what comes in; experts of 128 x 768 and of Flash, forward with
weights that are quantized already, and in training, quantized on the way, forward and backward. The floor is the longer
of operations at twice the rate of a large product in bf16 and of bytes at a copy's rate, both measured in the same run.
Exit code 1 if FP8's forward of the experts at 16,384 tokens is not 1.5 times as fast as bf16's, an error is larger than
2^-10 of the sum of a product's magnitudes, or a bit differs: between rows alone and in a batch, FP4 and its FP8, a
rollout's forward and training's, two runs' gradients.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import gpu
import torch
from floors import Ceilings, Work
from results import print_table, write_result
from torch import Tensor

from amalgam.kernels import formats, low_precision, moe, project
from amalgam.kernels.dispatch import VARIABLE
from amalgam.kernels.low_precision import Fp4

LIMIT, BOUND, GOAL = 10.0, 2.0**-10, 1.5
PRODUCTS = {"q_a_proj": (1024, 4096), "q_b_proj": (32768, 1024), "o_b_proj": (4096, 8192)}  # out, in
ROWS = (1, 7, 64, 65, 200)


@dataclass(frozen=True)
class Experts:
    name: str
    tokens: int
    experts: int
    hidden: int
    inner: int
    k: int
    training: bool = False


EXPERTS = (
    Experts("128 of 768", 16384, 128, 2048, 768, 8, True),
    Experts("Flash", 16384, 256, 4096, 2048, 6),
    Experts("Flash, decoding", 32, 256, 4096, 2048, 6),
)


@dataclass(frozen=True)
class Setting:
    ceilings: Ceilings
    device: str = "cuda"

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

    def layer(self, e: Experts) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, ids, weights, gate_up, down."""
        scores = torch.rand(e.tokens, e.experts, device=self.device)
        weights, ids = scores.topk(e.k)
        gate_up = self.random(e.experts, 2 * e.inner, e.hidden) * e.hidden**-0.5
        return self.random(e.tokens, e.hidden), ids, weights, gate_up, self.random(e.experts, e.hidden, e.inner)

    def floor(self, flop: float, moved: float) -> float:
        return Work(flop / 2, moved).floor(self.ceilings)


def products(setting: Setting, tokens: int) -> Iterator[dict[str, Any]]:
    for name, (out, depth) in PRODUCTS.items():
        x, weight = setting.random(tokens, depth), setting.random(out, depth)
        quantized, low = low_precision.quantize_activations(x), low_precision.quantize_weight(weight)
        yield {
            "name": f"{name}, {tokens} tokens",
            "bf16": gpu.milliseconds(lambda x=x, w=weight: project.project(x, w)),
            "quantize": gpu.milliseconds(lambda x=x: low_precision.quantize_activations(x)),
            "fp8": gpu.milliseconds(lambda x=quantized, w=low: low_precision.multiply(x, w, torch.bfloat16)),
            "floor": setting.floor(2 * tokens * out * depth, tokens * depth + out * depth + 2 * tokens * out),
        }


def experts(setting: Setting, e: Experts) -> Iterator[dict[str, Any]]:
    x, ids, weights, gate_up, down = setting.layer(e)
    fp8 = [low_precision.quantize_weight(each) for each in (gate_up.unflatten(1, (2, -1)), down)]
    fp4 = [_random_fp4(each.codes) for each in fp8]
    flop = 6 * e.tokens * e.k * e.hidden * e.inner
    with torch.no_grad():
        yield {
            "name": f"experts, {e.name}, {e.tokens} tokens",
            "bf16": gpu.milliseconds(lambda: moe.experts(x, ids, weights, gate_up, down, LIMIT)),
            "fp8": gpu.milliseconds(lambda: low_precision.experts_fp8(x, ids, weights, fp8[0], fp8[1], LIMIT)),
            "fp4": gpu.milliseconds(lambda: low_precision.experts_fp8(x, ids, weights, fp4[0], fp4[1], LIMIT)),
            "floor": setting.floor(flop, sum(each.codes.numel() for each in fp8) * _used(ids, e)),
            "goal": GOAL if e.tokens > 10000 else None,
        }
    if e.training:
        leaves = [a.requires_grad_() for a in (x, weights, gate_up, down)]
        slope = torch.randn(e.tokens, e.hidden, device=setting.device)

        def step(low: bool) -> object:
            if low:
                out = low_precision.experts_qat(x, ids, weights, gate_up, down, LIMIT, fp4=True)
            else:
                out = moe.experts(x, ids, weights, gate_up, down, LIMIT)
            return torch.autograd.grad(out, leaves, slope)

        yield {
            "name": f"experts, {e.name}, {e.tokens} tokens, training",
            "bf16": gpu.milliseconds(lambda: step(False)),
            "fp8": gpu.milliseconds(lambda: step(True)),
            "floor": setting.floor(flop, 0) + setting.floor(4 * flop, 0),  # the backward is bf16's
        }


def _used(ids: Tensor, e: Experts) -> float:
    return ids.unique().numel() / e.experts


def _random_fp4(codes: Tensor) -> Fp4:
    """Of the shape of FP8 codes."""
    *outer, depth = codes.shape
    packed = torch.randint(-128, 128, (*outer, depth // 2), device=codes.device, dtype=torch.int8)
    groups = torch.randint(116, 120, (*outer, depth // 32), device=codes.device, dtype=torch.uint8)
    groups = groups.view(torch.float8_e8m0fnu)
    return Fp4(packed, groups, formats.fp4_blocks(groups))


def errors(setting: Setting, tokens: int) -> Iterator[dict[str, Any]]:
    """Of products of codes, against float64: the largest difference over the sum of magnitudes."""
    for name, (out, depth) in PRODUCTS.items():
        x = low_precision.quantize_activations(setting.random(tokens, depth))
        weight = low_precision.quantize_weight(setting.random(min(out, 4096), depth))
        wide = formats.decode_fp8(*x, torch.float64, (1, 128)), formats.decode_fp8(*weight, torch.float64)
        found = low_precision.multiply(x, weight, torch.float32)
        off = (found - wide[0] @ wide[1].t()).abs() / (wide[0].abs() @ wide[1].abs().t())
        yield {"name": name, "error": float(off.max()), "met": bool(off.max() <= BOUND)}


def bits(setting: Setting, e: Experts) -> Iterator[dict[str, Any]]:
    """How many numbers differ."""
    for name, (out, depth) in PRODUCTS.items():
        x, weight = setting.random(max(ROWS) + 100, depth), low_precision.quantize_weight(setting.random(out, depth))

        def product(rows: Tensor, weight: low_precision.Fp8 = weight) -> Tensor:
            return low_precision.multiply(low_precision.quantize_activations(rows), weight, torch.bfloat16)

        whole = product(x)
        differ = sum(int((product(x[5 : 5 + rows]) != whole[5 : 5 + rows]).sum()) for rows in ROWS)
        yield {"name": f"{name}, rows in smaller batches", "differ": differ}
    x, ids, weights, gate_up, down = setting.layer(e)
    packed = [low_precision.fp4_weight(*formats.quantize_fp4(w)) for w in (gate_up.unflatten(1, (2, -1)), down)]
    low = [low_precision.quantize_weight(w, fp4=True) for w in (gate_up.unflatten(1, (2, -1)), down)]
    whole = low_precision.experts_fp8(x, ids, weights, low[0], low[1], LIMIT)
    differ = sum(
        int((low_precision.experts_fp8(x[:n], ids[:n], weights[:n], low[0], low[1], LIMIT) != whole[:n]).sum())
        for n in ROWS
    )
    yield {"name": "experts, tokens in smaller batches", "differ": differ}
    found = low_precision.experts_fp8(x, ids, weights, packed[0], packed[1], LIMIT)
    yield {"name": "experts, FP4 and its FP8", "differ": int((found != whole).sum())}
    leaves = [a.requires_grad_() for a in (x, weights, gate_up, down)]
    outs = [low_precision.experts_qat(leaves[0], ids, *leaves[1:], LIMIT, fp4=True) for _ in range(2)]  # pyright: ignore
    yield {"name": "experts, training and rollout", "differ": int((outs[0] != whole).sum())}
    first, second = (torch.autograd.grad(out, leaves, torch.ones_like(out)) for out in outs)
    differ = sum(int((a != b).sum()) for a, b in zip(first, second, strict=True))
    yield {"name": "experts, gradients of two runs", "differ": differ}


def show(rows: list[dict[str, Any]]) -> None:
    columns = ("bf16", "quantize", "fp8", "fp4", "floor")
    timed = [row for row in rows if "bf16" in row]
    print_table(
        ["ms", *columns, "bf16 / fp8"],
        [
            [row["name"], *(f"{row[c]:.3f}" if c in row else "-" for c in columns), f"{row['bf16'] / row['fp8']:.2f}"]
            for row in timed
        ],
    )
    print_table(["error of", "magnitudes"], [[row["name"], f"{row['error']:.1e}"] for row in rows if "error" in row])
    print_table(["differing", "numbers"], [[row["name"], str(row["differ"])] for row in rows if "differ" in row])


def missed(row: dict[str, Any]) -> bool:
    goal = row.get("goal")
    slow = goal is not None and row["bf16"] / row["fp8"] < goal
    return slow or not row.get("met", True) or row.get("differ", 0) > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if os.environ.get(VARIABLE):
        parser.error(f"{VARIABLE} is set: the kernels that a GPU runs by itself are measured")
    machine, setting = gpu.where(), Setting(gpu.ceilings())
    rows = [*products(setting, 64), *products(setting, 16384)]
    for each in EXPERTS:
        rows += experts(setting, each)
        torch.cuda.empty_cache()
    rows += [*errors(setting, 4096), *bits(setting, Experts("few", 1024, 8, 4096, 2048, 2))]
    show(rows)
    result = {"machine": machine, "ceilings": asdict(setting.ceilings), "rows": rows}
    print(f"wrote {write_result('low_precision', result)}")
    return int(any(missed(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
