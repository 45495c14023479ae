"""Other people's kernels on the same CSA attention, rows and entries as one list; attention.py is the command."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import attention_floors as floors
import gpu
import torch
from attention_kernels import Inputs, Setting, inputs
from floors import row
from parts import Rows
from torch import Tensor

from amalgam.kernels.attention import attend
from amalgam.kernels.places import Seen


class Case(NamedTuple):
    tokens: int
    ours: Callable[[], Tensor]
    q: Tensor  # [T, H, D]
    keys: Tensor  # [T + N, D]: window rows, then entries
    sinks: Tensor
    numbers: Tensor  # int32 [T, W + K]: the keys that each query sees, -1 for none
    lengths: Tensor  # int32 [T]: behind these all are -1
    leaves: list[Tensor]  # what ours has gradients of


def missing(name: str, setting: Setting) -> str | None:
    """Why a part cannot run, if it cannot."""
    if name == "flashmla" and setting.flashmla is None:
        return "no --flashmla: the library that vLLM ships was not given"
    if name == "veomni" and not (find_spec("tilelang") and find_spec("veomni")):
        return "veomni and tilelang are not installed"
    return None


def listed(seen: Seen, chosen: Tensor) -> Tensor:
    """int32 [T, W + K]: what each query of one document sees, as rows of window rows and entries in a row; -1 none."""
    tokens = seen.position.numel()
    window = seen.position.unsqueeze(1) + torch.arange(1 - seen.window, 1, device=chosen.device)
    return torch.cat([window.clamp(min=-1), chosen.where(chosen < 0, chosen + tokens)], 1).int()


def cases(setting: Setting) -> Iterator[Case]:
    for tokens in setting.sizes[:3]:
        given = inputs(setting, tokens, "CSA")
        q, rows, entries, sinks, seen, chosen = given
        if entries is None or chosen is None:
            continue  # so short that nothing is chosen
        numbers = listed(seen, chosen)
        lengths = (numbers >= 0).sum(1).where(seen.position >= seen.window, numbers.shape[1]).int()

        def ours(given: Inputs = given) -> Tensor:
            return attend(*given)[0]

        keys = torch.cat([rows, entries])
        yield Case(tokens, ours, q, keys, sinks, numbers, lengths, [q, rows, entries, sinks])


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _beside(
    setting: Setting,
    name: str,
    case: Case,
    theirs: Callable[[], object],
    ours: Callable[[], object],
    both: bool,
    **more: Any,
) -> dict[str, Any]:
    ms, beside = gpu.milliseconds(theirs), gpu.milliseconds(ours)
    works = [floors.attention(case.tokens, **setting.shape("CSA"))]
    if both:
        works.append(floors.attention_backward(case.tokens, **setting.shape("CSA")))
    return row(name, case.tokens, ms, works, setting.ceilings, ours_ms=beside, over_ours=ms / beside, **more)


@torch.no_grad()
def flashmla(setting: Setting) -> Rows:
    """FlashMLA's sparse prefill kernel, forward only: vLLM's `_flashmla_C`, for the torch that it was built with."""
    torch.ops.load_library(str(setting.flashmla))
    for case in cases(setting):
        keys, numbers = case.keys.unsqueeze(1), case.numbers.unsqueeze(1)
        dim = case.q.shape[2]

        def theirs(case: Case = case, keys: Tensor = keys, numbers: Tensor = numbers, dim: int = dim) -> Tensor:
            operator = torch.ops._flashmla_C.sparse_prefill_fwd
            return operator(case.q, keys, numbers, dim**-0.5, dim, case.sinks, case.lengths, None)[0]

        difference = _difference(theirs(), case.ours())
        yield _beside(setting, "FlashMLA forward", case, theirs, case.ours, False, difference=difference)


def veomni(setting: Setting) -> Rows:
    """VeOmni's TileLang kernels, forward and backward (which adds up the keys' gradients with atomics)."""
    from veomni.ops.kernels.deepseek_v4 import sparse_attn_tilelang  # pyright: ignore[reportMissingImports]

    for case in cases(setting):
        q, keys, numbers = case.q.unsqueeze(0), case.keys.unsqueeze(0), case.numbers.unsqueeze(0)

        def theirs(q: Tensor = q, keys: Tensor = keys, case: Case = case, numbers: Tensor = numbers) -> Tensor:
            return sparse_attn_tilelang(q, keys, case.sinks, numbers)

        difference = _difference(theirs()[0], case.ours())
        yield _beside(setting, "VeOmni forward", case, theirs, case.ours, False, difference=difference)
        leaves, own = [x.requires_grad_() for x in (q, keys, case.sinks)], [x.requires_grad_() for x in case.leaves]
        grad = torch.randn_like(case.q)
        run = _gradients(theirs, leaves, grad.unsqueeze(0))
        difference = _difference(run()[0][0], _gradients(case.ours, own, grad)()[0])
        ours = _gradients(case.ours, own, grad)
        yield _beside(setting, "VeOmni forward + backward", case, run, ours, True, difference=difference)


def _gradients(function: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(function(), leaves, grad)
