"""Times of the experts, the hyper-connections and Muon's iteration, one by one; training.py is the command."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import gpu
import torch
from floors import Work, row
from parts import Row, Rows
from torch import Tensor
from training_setting import Experts, Setting

from amalgam.kernels.hyper import Update, enter, leave
from amalgam.kernels.moe import experts as routed_experts
from amalgam.kernels.muon import STEPS, newton_schulz
from amalgam.kernels.swiglu import swiglu

FORWARD, BACKWARD = 450.0, 400.0  # goals of the experts, in TFLOP/s: forward, and with its backward
HYPER = 1.5  # goal: at most so many times the floor
PEAK = 65.0  # goal of Muon's iteration, in percent of a large product's rate


# --- experts


def random_routes(setting: Setting, shape: Experts, tokens: int) -> tuple[Tensor, Tensor]:
    """Ids int64 [T, k], all of a token's different, and weights fp32 [T, k]."""
    drawn = torch.rand(tokens, shape.experts, device=setting.device).topk(shape.topk)
    return drawn.indices, drawn.values / drawn.values.sum(1, keepdim=True)


def grouped_mm(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float) -> Tensor:
    """The same by `torch._grouped_mm`, with PyTorch's operations between."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    counts = flat.new_zeros(gate_up.shape[0]).scatter_add_(0, flat, torch.ones_like(flat))  # bincount would wait
    ends = counts.cumsum(0).int()
    multiply = torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage]
    hidden = swiglu(multiply(x[order // ids.shape[1]], gate_up.mT, offs=ends), limit)
    hidden = (hidden * weights.flatten()[order].unsqueeze(1)).to(x.dtype)
    rows = multiply(hidden, down.mT, offs=ends)
    return torch.zeros_like(rows).index_copy(0, order, rows).unflatten(0, ids.shape).sum(1)


def liger(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float) -> Tensor:
    """Liger's, which does not clamp."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction  # pyright: ignore[reportMissingImports]

    return LigerFusedMoEFunction.apply(x, gate_up, down, ids.int(), weights)  # pyright: ignore[reportReturnType]


def experts(setting: Setting) -> Rows:
    """Gather, both products with SwiGLU between them, and the sum by token; beside others', timed as ours: launched one
    by one, as Liger's cannot be a CUDA graph."""
    kinds: dict[str, Callable[..., Tensor]] = {"": routed_experts, "torch._grouped_mm: ": grouped_mm}
    if find_spec("liger_kernel"):
        kinds["Liger: "] = liger
    for shape in setting.experts:
        x = setting.random(setting.routed, shape.hidden)
        ids, weights = random_routes(setting, shape, setting.routed)
        gate_up = setting.weight(shape.experts, 2 * shape.inner, shape.hidden)
        down = setting.weight(shape.experts, shape.hidden, shape.inner)
        leaves = [each.requires_grad_() for each in (x, weights, gate_up, down)]
        expected: Tensor | None = None
        for kind, function in kinds.items():

            def run(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, function=function, ids=ids) -> Tensor:
                return function(x, ids, weights, gate_up, down, setting.flash.swiglu_limit)

            try:
                with torch.no_grad():
                    value = run(*leaves)
                expected = value if expected is None else expected
                off = None if value is expected else float((value - expected).abs().max() / expected.abs().max())
                yield from _experts(setting, kind + shape.name, shape, run, leaves, value, off)
            except Exception as error:
                if not kind:
                    raise
                failed = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:80]}"  # of another's kernel
                yield {"name": kind + shape.name, "tokens": setting.routed, "failed": failed}


def _experts(
    setting: Setting, name: str, shape: Experts, run: Callable[..., Tensor], leaves: list[Tensor], value: Tensor,
    off: float | None,
) -> Rows:  # fmt: skip
    """Each number of what moves is counted once: tokens, results and weights, and their gradients."""
    tokens = setting.routed
    numbers = 2 * (2 * tokens * shape.hidden + 3 * shape.experts * shape.inner * shape.hidden)
    forward = Work(2 * 3 * tokens * shape.topk * shape.hidden * shape.inner, numbers)
    backward = Work(2 * forward.flop, 2 * numbers)
    with torch.no_grad():
        ms = gpu.milliseconds(lambda: run(*leaves))
    yield _rated(row(f"{name} forward", tokens, ms, [forward], setting.ceilings, difference=off), FORWARD, off)
    ms = gpu.milliseconds(gpu.with_backward(run, leaves, torch.randn_like(value)))
    yield _rated(row(f"{name} forward + backward", tokens, ms, [forward, backward], setting.ceilings), BACKWARD, off)


def _rated(found: Row, goal: float, off: float | None) -> Row:
    """With the goal, if it is ours, which differs from nothing."""
    return found | ({} if off is not None else {"goal": f"{goal:g} TFLOP/s", "met": found["tflops"] >= goal})


# --- hyper-connections


def site_inputs(setting: Setting, tokens: int, rows: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Of a site with `rows` mixing logits: the streams, a sublayer's update of them, and the site's weights."""
    n, d = setting.flash.hc_mult, setting.flash.hidden_size

    def wide(*shape: int) -> Tensor:
        return setting.random(*shape, dtype=torch.float32)

    return {
        "streams": setting.random(tokens, n, d, dtype=dtype), "output": setting.random(tokens, d, dtype=dtype),
        "post": 2 * wide(n, tokens).sigmoid(), "comb": wide(n, n, tokens).softmax(1),
        "fn": setting.weight(rows, n * d, dtype=torch.float32), "base": wide(rows),
        "scale": wide(3 if rows > n else 1), "weight": 1 + 0.1 * wide(d),
    }  # fmt: skip


def site(setting: Setting, streams: Tensor, output: Tensor, post: Tensor, comb: Tensor, *weights: Tensor) -> tuple:
    config, update = setting.flash, Update(output, post, comb)
    eps = {"norm_eps": config.rms_norm_eps, "eps": config.hc_eps}
    if weights[0].shape[0] == streams.shape[1]:
        return leave(streams, update, *weights, **eps)
    return enter(streams, update, *weights, iterations=config.hc_sinkhorn_iters, **eps)


def site_works(setting: Setting, tokens: int, rows: int) -> list[Work]:
    """Forward: streams and a sublayer's output in, streams and a sublayer's input out. Backward: the first two and the
    gradients of the last two in, the gradients of the first two out."""
    n, d = setting.flash.hc_mult, setting.flash.hidden_size
    flop, moved = 2 * rows * n * d * tokens, 2 * (2 * n + 2) * d * tokens
    return [Work(flop, moved), Work(2 * flop, moved + moved // 2)]


def sites(setting: Setting) -> Iterator[tuple[str, int]]:
    n = setting.flash.hc_mult
    yield "update, mix, collapse, norm", (2 + n) * n
    yield "update, last collapse, norm", n


def hyper(setting: Setting) -> Rows:
    """What lies between two sublayers, and what follows the last, at Flash's width."""
    for name, rows in sites(setting):
        for tokens in setting.streams:
            leaves = list(site_inputs(setting, tokens, rows).values())
            works = site_works(setting, tokens, rows)
            with torch.no_grad():
                grads = [torch.randn_like(each) for each in site(setting, *leaves)]
                ms = gpu.on_device(lambda: site(setting, *leaves))  # noqa: B023
            yield row(f"{name}, forward", tokens, ms, works[:1], setting.ceilings, HYPER)
            leaves = [each.requires_grad_() for each in leaves]
            ms = gpu.on_device(lambda: torch.autograd.grad(site(setting, *leaves), leaves, grads))  # noqa: B023
            yield row(f"{name}, forward + backward", tokens, ms, works, setting.ceilings, HYPER)


# --- Muon


@torch.no_grad()
def muon(setting: Setting) -> Rows:
    """Newton-Schulz in bf16 of gradients in fp32; `tokens` is the number of matrices."""
    count, n, m = setting.matrices
    least, most = min(n, m), max(n, m)
    work = Work(count * len(STEPS) * (2 * 2 * least**2 * most + 2 * least**3), 2 * 4 * count * n * m)
    x = setting.random(count, n, m, dtype=torch.float32)
    ms = gpu.milliseconds(lambda: newton_schulz(x))
    percent = 100 * work.flop / ms / 1e9 / setting.ceilings.tflops
    met = {"percent_of_peak": percent, "goal": f"{PEAK:g} % of peak", "met": percent >= PEAK}
    yield row(f"Newton-Schulz of {n} x {m}", count, ms, [work], setting.ceilings) | met
