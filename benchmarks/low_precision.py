"""FP8 and FP4 on one GPU: products and experts beside bf16's, a whole model, errors against float64, and bits.

    python benchmarks/low_precision.py [--only products,experts,...]

Parts, each with the ceilings measured as the command starts; FP8's floor takes twice the rate of a product in bf16:

    products    at V4-Flash's sizes, with weights that are quantized already; and what comes in, quantized
    experts     of 128 x 768 and of Flash, of weights in FP8 and in FP4; quantized on the way, forward and backward
    model       729 million parameters: bytes of weights, a step of decoding, forward and backward of training
    errors      of products of codes: the largest, over the sum of the magnitudes; at most 2^-10
    bits        that differ between rows alone and in a batch, FP4 and its FP8, a rollout's forward and training's, two
                runs' gradients. Of whole models: training.py's part `bits`

A goal is FP8's forward of the experts at 16,384 tokens in 1.5 times less than bf16's. The result is one file
(parts.py). Exit code 1 if a part failed or a goal was missed.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import gpu
import parts
import torch
from floors import Ceilings, Work
from parts import Row, Rows
from torch import Tensor
from training_setting import Experts, whole
from training_setting import Setting as Whole
from training_step import Trainer, lengths_of, ours, packed_loss
from training_whole import LOW, random_tokens

from amalgam.kernels import formats, low_precision, moe, project
from amalgam.kernels.low_precision import Fp4, Fp8
from amalgam.model import DeepseekV4
from amalgam.model.precision import set_precision, store_weights
from amalgam.settings import FULL

LIMIT, BOUND, GOAL = 10.0, 2.0**-10, 1.5
PRODUCTS = {"q_a_proj": (1024, 4096), "q_b_proj": (32768, 1024), "o_b_proj": (4096, 8192)}  # out, in
ROWS = (1, 7, 64, 65, 200)  # of batches whose bits have to be the same


@dataclass(frozen=True)
class Setting:
    whole: Whole  # of the model
    rows: tuple[int, ...] = (64, 16_384)
    experts: tuple[Experts, ...] = (
        Experts("E128 H2048 I768 K8", 128, 2048, 768, 8),
        Experts("Flash", 256, 4096, 2048, 6),
    )
    few: Experts = Experts("few", 8, 4096, 2048, 2)  # whose bits are compared
    routed: tuple[int, ...] = (32, 16_384)  # tokens
    requests: int = 32

    @property
    def ceilings(self) -> Ceilings:
        return self.whole.ceilings

    @property
    def device(self) -> str:
        return self.whole.device

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

    def layer(self, e: Experts, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, ids, weights, gate_up, down."""
        weights, ids = torch.rand(tokens, e.experts, device=self.device).topk(e.topk)
        gate_up = self.random(e.experts, 2 * e.inner, e.hidden).mul_(e.hidden**-0.5)
        return self.random(tokens, e.hidden), ids, weights, gate_up, self.random(e.experts, e.hidden, e.inner)


def timed(setting: Setting, name: str, tokens: int, run: Callable[[], object], flop: float, moved: float) -> Row:
    """Of FP8's, as a CUDA graph."""
    ms, floor = gpu.on_device(run), Work(flop / 2, moved).floor(setting.ceilings)
    row: Row = {"name": name, "tokens": tokens, "ms": ms, "tflops": flop / ms / 1e9, "gbs": moved / ms / 1e6}
    return row | {"floor_ms": floor, "ratio": ms / floor}


def beside(row: Row, bf16: Callable[[], object]) -> Row:
    ms = gpu.on_device(bf16)
    return row | {"bf16_ms": ms, "faster": ms / row["ms"]}


def products(setting: Setting) -> Rows:
    for tokens in setting.rows:
        for name, (out, depth) in PRODUCTS.items():
            yield from _product(setting, name, tokens, out, depth)


def _product(setting: Setting, name: str, tokens: int, out: int, depth: int) -> Rows:
    x, weight = setting.random(tokens, depth), setting.random(out, depth)
    codes, low = low_precision.quantize_activations(x), low_precision.quantize_weight(weight)
    flop, moved = 2.0 * tokens * out * depth, tokens * depth + out * depth + 2 * tokens * out
    run = partial(low_precision.multiply, codes, low, torch.bfloat16)
    yield beside(timed(setting, name, tokens, run, flop, moved), partial(project.project, x, weight))
    run = partial(low_precision.quantize_activations, x)
    yield timed(setting, f"{name}: activations quantized", tokens, run, 0.0, 3 * tokens * depth)


@torch.no_grad()
def experts(setting: Setting) -> Rows:
    for e in setting.experts:
        for tokens in setting.routed:
            yield from _experts(setting, e, tokens)
            torch.cuda.empty_cache()
    yield from _training(setting, setting.experts[0], setting.routed[-1])


def _experts(setting: Setting, e: Experts, tokens: int) -> Rows:
    *routed, gate_up, down = setting.layer(e, tokens)
    flop, used = 6.0 * tokens * e.topk * e.hidden * e.inner, routed[1].unique().numel()
    bf16 = partial(moe.experts, *routed, gate_up, down, LIMIT)
    fp8 = tuple(low_precision.quantize_weight(each) for each in (gate_up.unflatten(1, (2, -1)), down))
    fp4 = tuple(_random_fp4(each.codes) for each in fp8)
    for kind, low, size in (("FP8", fp8, 1.0), ("FP4", fp4, 17 / 32)):
        run, moved = partial(low_precision.experts_fp8, *routed, *low, LIMIT), used * 3 * e.hidden * e.inner * size
        row = beside(timed(setting, f"{e.name}: {kind}", tokens, run, flop, moved), bf16)
        if kind == "FP8" and tokens > 10_000:
            row |= {"goal": f"{GOAL} x faster", "met": row["faster"] >= GOAL}
        yield row


def _training(setting: Setting, e: Experts, tokens: int) -> Rows:
    """With weights that are rounded to FP4 on the way; the backward is bf16's."""
    x, ids, weights, gate_up, down = setting.layer(e, tokens)
    slope, flop = torch.randn(tokens, e.hidden, device=setting.device), 6.0 * tokens * e.topk * e.hidden * e.inner
    leaves = [a.requires_grad_() for a in (x, weights, gate_up, down)]

    @torch.enable_grad()
    def step(operation: Callable[..., Tensor]) -> object:
        return torch.autograd.grad(operation(x, ids, weights, gate_up, down, LIMIT), leaves, slope)

    ms = gpu.milliseconds(lambda: step(partial(low_precision.experts_qat, fp4=True)))
    bf16 = gpu.milliseconds(lambda: step(moe.experts))
    row: Row = {"name": f"{e.name}: forward and backward of training, FP4", "tokens": tokens, "ms": ms}
    yield row | {"tflops": 3 * flop / ms / 1e9, "bf16_ms": bf16, "faster": bf16 / ms}


def _random_fp4(codes: Tensor) -> Fp4:
    """Of the shape of FP8 codes."""
    *outer, depth = codes.shape
    packed = torch.randint(-128, 128, (*outer, depth // 2), device=codes.device, dtype=torch.int8)
    groups = torch.randint(116, 120, (*outer, depth // 32), device=codes.device, dtype=torch.uint8)
    groups = groups.view(torch.float8_e8m0fnu)
    return Fp4(packed, groups, formats.fp4_blocks(groups))


def model(setting: Setting) -> Rows:
    for name, precision in (("bf16", FULL), ("FP4, FP8", LOW)):
        made = ours(setting.whole)
        set_precision(made, precision)
        for tokens in setting.whole.steps:
            drawn = random_tokens(setting.whole, tokens)
            trainer = Trainer(made, packed_loss(made, drawn, lengths_of(tokens, setting.whole.documents)))
            for part, run in (("forward", trainer.loss), ("forward and backward", trainer.backward)):
                yield {"name": f"{name}: {part}", "tokens": tokens, "ms": gpu.milliseconds(run)}
            del trainer
        store_weights(made)
        yield _decoding(setting, name, made)


def _decoding(setting: Setting, name: str, made: DeepseekV4) -> Row:
    """A token of each request, from a graph that serves all lengths; and what the weights take."""
    tokens = random_tokens(setting.whole, setting.requests)
    borders = torch.arange(setting.requests + 1, device=setting.device)
    cache = made.prefill(tokens, borders, 2 * setting.whole.documents)[1]

    def decode() -> Tensor:
        cache.longest = cache.capacity - 1
        return made.decode(tokens, cache).hidden

    size = sum(tensor.nbytes for tensor in made.state_dict().values())
    ms = gpu.on_device(decode)
    return {"name": f"{name}: a token decoded", "tokens": setting.requests, "ms": ms, "weights_gib": size / 2**30}


def errors(setting: Setting) -> Rows:
    for name, (out, depth) in PRODUCTS.items():
        tokens = min(setting.rows[-1], 4096)
        x = low_precision.quantize_activations(setting.random(tokens, depth))
        weight = low_precision.quantize_weight(setting.random(min(out, 4096), depth))
        wide = formats.decode_fp8(*x, torch.float64, (1, 128)), formats.decode_fp8(*weight, torch.float64)
        found = low_precision.multiply(x, weight, torch.float32)
        off = float(((found - wide[0] @ wide[1].t()).abs() / (wide[0].abs() @ wide[1].abs().t())).max())
        row: Row = {"name": f"{name}: against float64", "tokens": tokens, "errors": {"largest": off}}
        yield row | {"goal": BOUND, "met": off <= BOUND}


def bits(setting: Setting) -> Rows:
    for name, (out, depth) in PRODUCTS.items():
        x, weight = setting.random(max(ROWS) + 100, depth), low_precision.quantize_weight(setting.random(out, depth))
        all_rows = low_precision.linear_fp8(x, weight)
        found = ((low_precision.linear_fp8(x[5 : 5 + n], weight), all_rows[5 : 5 + n]) for n in ROWS)
        differ = sum(_differ(*pair) for pair in found)
        yield _counted(f"{name}: rows in smaller batches", len(x), differ)
    yield from _bits_of_experts(setting, setting.few, min(setting.rows[-1], 1024))


def _bits_of_experts(setting: Setting, e: Experts, tokens: int) -> Rows:
    x, ids, weights, gate_up, down = setting.layer(e, tokens)
    masters = gate_up.unflatten(1, (2, -1)), down
    packed = tuple(low_precision.fp4_weight(*formats.quantize_fp4(w)) for w in masters)
    low = tuple(low_precision.quantize_weight(w, fp4=True) for w in masters)

    def rollout(n: int, up: Fp4 | Fp8, lower: Fp4 | Fp8) -> Tensor:
        return low_precision.experts_fp8(x[:n], ids[:n], weights[:n], up, lower, LIMIT)

    expected = rollout(tokens, *low)
    differ = sum(_differ(rollout(n, *low), expected[:n]) for n in ROWS)
    yield _counted("experts: tokens in smaller batches", tokens, differ)
    yield _counted("experts: FP4 and its FP8", tokens, _differ(rollout(tokens, *packed), expected))
    leaves = [a.requires_grad_() for a in (x, weights, gate_up, down)]
    outs = [low_precision.experts_qat(x, ids, weights, gate_up, down, LIMIT, fp4=True) for _ in range(2)]
    yield _counted("experts: training and rollout", tokens, _differ(outs[0], expected))
    first, second = (torch.autograd.grad(out, leaves, torch.ones_like(out)) for out in outs)
    differ = sum(_differ(a, b) for a, b in zip(first, second, strict=True))
    yield _counted("experts: gradients of two runs", tokens, differ)


def _differ(a: Tensor, b: Tensor) -> int:
    return int((a != b).sum())


def _counted(name: str, tokens: int, differing: int) -> Row:
    return {"name": name, "tokens": tokens, "differing": differing, "goal": "0", "met": differing == 0}


PARTS: dict[str, Callable[[Setting], Rows]] = {
    "products": products, "experts": experts, "model": model, "errors": errors, "bits": bits,
}  # fmt: skip


def main() -> int:
    _, names = parts.asked(parts.parser_of(__doc__, PARTS), PARTS)
    return parts.run("low_precision", PARTS, names, lambda ceilings: Setting(whole(ceilings)))


if __name__ == "__main__":
    sys.exit(main())
