"""How far attention's operations are from float64, values and gradients; attention.py is the command.

Every tensor that an operation gives is compared with what attention_oracles.py gives for the same inputs in float64:
the largest difference over the largest magnitude. The bounds are 1e-2 for bf16 and 1e-4 for fp32, also for fp32 values
of bf16 operands (wide products, index scores, head mass). Inputs are new in every run, and whatever memory an operation
gets is full of NaN, so that a number which it does not write shows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import attention_oracles as oracles
import torch
from attention_kernels import Setting, products_of, random_choice
from beside_float64 import BOUND, Inputs, alone, by_autograd, compare, poisoned, row, rows, told
from parts import Rows
from torch import Tensor

from amalgam.kernels import attention as op
from amalgam.kernels.compress import Storage, compress, reference_stored
from amalgam.kernels.fused.attention import attend_forward
from amalgam.kernels.fused.attention_backward import attend_backward
from amalgam.kernels.indexer import index_scores, select
from amalgam.kernels.norm import norm_rope, rms_norm
from amalgam.kernels.places import Seen, Windows
from amalgam.kernels.project import project, project_groups, project_wide
from amalgam.kernels.rope import apply_rope
from amalgam.model.cache import Cache, page_tokens
from amalgam.model.chunks import Chunk
from amalgam.model.layout import Packed, packed
from amalgam.model.step import step

NEAR = 1e-5  # of the largest index score: entries whose scores differ by less may be chosen for each other
KINK = 1e-4  # products so near to 0 that rounding decides whether ReLU lets a gradient through
UNLIKE = 1e-3  # share of numbers that fp32 may take to another code of FP8 or FP4 than float64 does


@dataclass(frozen=True)
class Sizes:
    """What the model's config does not say."""

    lengths: tuple[int, ...] = (300, 1, 77, 2200)  # of the pack's documents: more than 1,024 entries at ratio 1
    times: tuple[int, ...] = (1, 2)  # as many heads as the model has: 64 are V4-Flash's, 128 V4-Pro's
    dims: tuple[int, ...] = (64, 128, 256)  # small head dims, ...
    heads: int = 16  # ... with so many heads
    chosen: tuple[int, ...] = (40, 512)
    rows: tuple[int, ...] = (1, 77, 1031)  # of a product


SIZES = Sizes()


def accuracy(setting: Setting) -> Rows:
    """Each operation's errors, a row a shape and dtype."""
    seed = torch.seed()
    for part in (attention, decoding, head_mass, products, passes, compressors, indexer):
        for found in part(setting):
            yield found | {"seed": seed}


# --- attention


def kinds(setting: Setting) -> Iterator[tuple[str, int, int | None]]:
    """What queries may see: name, ratio, how many entries are chosen, if not all."""
    yield "window only", 0, None
    yield "HCA", setting.ratio("HCA"), None
    for topk in SIZES.chosen:
        yield f"CSA, {topk} chosen", setting.ratio("CSA"), topk
    yield "CSA, all visible", setting.ratio("CSA"), None
    yield "an entry a token, all visible", 1, None


def wide_and_small(setting: Setting) -> Iterator[tuple[int, int, torch.dtype]]:
    """Heads, channels and dtype: the model's in bf16, small ones in both."""
    for times in SIZES.times:
        yield times * setting.config.num_attention_heads, setting.config.head_dim, torch.bfloat16
    for dim in SIZES.dims:
        for dtype in BOUND:
            yield SIZES.heads, dim, dtype


def attention(setting: Setting) -> Rows:
    """`attend` on a pack, forward and backward."""
    tokens = sum(SIZES.lengths)
    for heads, dim, dtype in wide_and_small(setting):
        for kind, ratio, topk in kinds(setting):
            place = pack(setting, ratio)
            seen, entries = place.seen(ratio), place.entries[ratio].windows.number.numel() if ratio else 0
            for turned in (False, True) if dim == setting.config.head_dim else (True,):
                where = seen, some_chosen(seen, topk), rotation(place, dim) if turned else None
                given = attention_inputs(setting, tokens, heads, dim, tokens, entries, dtype)
                name = f"attention, {kind}, {heads} x {dim}{', RoPE off' if turned else ''}"
                ways = {"": partial(by_autograd, partial(attend, *where))}
                if topk is not None:
                    ways = {", deterministic": ways[""], ", atomic": partial(attend_atomic, *where)}
                for way, ours in ways.items():
                    errors = compare(given, ours, partial(oracles.attend, *where), dtype)
                    yield from rows(name + way, tokens, dtype, errors)


def decoding(setting: Setting) -> Rows:
    """`attend` of one token of each request, over rings of window rows; it has no gradient."""
    count, window, frequencies = len(SIZES.lengths), setting.config.sliding_window, setting.frequencies()
    for heads, dim, dtype in wide_and_small(setting):
        for kind, ratio, topk in kinds(setting):
            compressors = {(ratio, ratio)} if ratio else set()
            page = page_tokens({ratio} if ratio else set())
            cache = Cache(count, max(SIZES.lengths), 1, page, 1, torch.device(setting.device), None)
            cache.length += torch.tensor(SIZES.lengths, device=setting.device) - 1
            cache.longest = max(SIZES.lengths) - 1
            place = step(None, cache, window=window, compressors=compressors, frequencies=frequencies)
            seen, entries = place.seen(ratio), cache.pages * page // ratio if ratio else 0
            assert seen.slots
            how = seen, some_chosen(seen, topk), rotation(place, dim)
            given = attention_inputs(setting, count, heads, dim, count * seen.slots, entries, dtype)
            ours = partial(alone, partial(attend, *how))
            errors = compare(given, ours, partial(oracles.attend, *how), dtype, gradients=False)
            yield from rows(f"decoding, {kind}, {heads} x {dim}", count, dtype, errors)


def head_mass(setting: Setting) -> Rows:
    tokens, ratio = sum(SIZES.lengths), setting.ratio("CSA")
    place = pack(setting, ratio)
    seen, entries = place.seen(ratio), place.entries[ratio].windows.number.numel()
    for heads, dim, dtype in wide_and_small(setting):
        for topk in SIZES.chosen:
            chosen = random_choice(seen, topk)
            given = attention_inputs(setting, tokens, heads, dim, tokens, entries, dtype)

            def mass(q: Tensor, rows: Tensor, sinks: Tensor, entries: Tensor, chosen: Tensor = chosen) -> Tensor:
                lse = op.attend(q, rows, entries, sinks, seen, chosen)[1]
                return op.head_mass(q, rows, entries, sinks, seen, chosen, lse)

            oracle = partial(oracles.head_mass, seen, chosen)
            errors = compare(given, partial(alone, mass), oracle, torch.float32, gradients=False)
            yield from rows(f"head mass, {topk} chosen, {heads} x {dim}", tokens, dtype, errors, exact=["value"])


def pack(setting: Setting, *ratios: int) -> Packed:
    borders = torch.tensor([0, *accumulate(SIZES.lengths)], device=setting.device)
    return packed(borders, setting.config.sliding_window, {*ratios} - {0}, setting.frequencies())


def some_chosen(seen: Seen, topk: int | None) -> Tensor | None:
    return None if topk is None else random_choice(seen, topk)


def rotation(place: Packed | Chunk, dim: int) -> Tensor:
    return place.rotation["compress"][:, : dim // 2].contiguous()


def attention_inputs(
    setting: Setting, queries: int, heads: int, dim: int, rows: int, entries: int, dtype: torch.dtype
) -> Inputs:
    given = {"q": setting.random(queries, heads, dim, dtype=dtype), "rows": setting.random(rows, dim, dtype=dtype)}
    given["sinks"] = setting.random(heads, dtype=torch.float32)
    return given | ({"entries": setting.random(entries, dim, dtype=dtype)} if entries else {})


def attend(
    seen: Seen,
    chosen: Tensor | None,
    turn: Tensor | None,
    q: Tensor,
    rows: Tensor,
    sinks: Tensor,
    entries: Tensor | None = None,
) -> Tensor:
    return op.attend(q, rows, entries, sinks, seen, chosen, turn)[0]


@torch.no_grad()
def attend_atomic(seen: Seen, chosen: Tensor, turn: Tensor | None, given: Inputs, grad: Tensor) -> list[Tensor]:
    four = given["q"], given["rows"], given["entries"], given["sinks"]
    out, lse = attend_forward(*four, seen, chosen)
    out = out if turn is None else apply_rope(out, turn, inverse=True)
    of_q, of_rows, of_entries, of_sinks = attend_backward(grad, *four, out, lse, seen, chosen, True, turn)
    assert of_entries is not None
    return [out, of_q, of_rows, of_sinks, of_entries]


# --- what surrounds it


def products(setting: Setting) -> Rows:
    """Of operands whose products keep their size, at every projection's widths and odd numbers of rows."""
    for name, (size_in, size_out, groups, out_bytes) in products_of(setting.config).items():
        ours = project_groups if groups > 1 else project_wide if out_bytes == 4 else project
        for dtype in BOUND:
            for count in SIZES.rows:
                shape = (count, groups, size_in) if groups > 1 else (count, size_in)
                weight = setting.random(groups * size_out, size_in, dtype=dtype) * size_in**-0.5
                given = {"x": setting.random(*shape, dtype=dtype), "weight": weight}
                out = torch.float32 if out_bytes == 4 else dtype
                errors = compare(given, partial(by_autograd, ours), product, out)
                widths = f"{groups} x {size_in} to {size_out}" if groups > 1 else f"{size_in} to {size_out}"
                exact = ["value"] if out == torch.float32 else []
                yield from rows(f"{ours.__name__}, {name}, {widths}", count, dtype, errors, exact)


def product(x: Tensor, weight: Tensor) -> Tensor:
    if x.dim() == 2:
        return torch.einsum("ti,oi->to", x, weight)
    return torch.einsum("tgi,goi->tgo", x, weight.unflatten(0, (x.shape[1], -1)))


def passes(setting: Setting) -> Rows:
    """Norms and RoPE."""
    config, tokens, eps = setting.config, sum(SIZES.lengths), setting.config.rms_norm_eps
    heads, dim, latent = config.num_attention_heads, config.head_dim, config.q_lora_rank
    turn = rotation(pack(setting), dim)

    def normed(x: Tensor, weight: Tensor | None = None) -> Tensor:
        return oracles.rope(oracles.norm(x, weight, eps), turn)

    for name, shape, gain, ours, oracle in (
        ("norm_rope, queries", (heads, dim), False, lambda x: norm_rope(x, None, turn, eps), normed),
        ("norm_rope, rows", (dim,), True, lambda x, weight: norm_rope(x, weight, turn, eps), normed),
        (
            "rms_norm, latent", (latent,), True,
            lambda x, weight: rms_norm(x, weight, eps), lambda x, weight: oracles.norm(x, weight, eps),
        ),
        (
            "apply_rope, back", (heads, dim), False,
            lambda x: apply_rope(x, turn, inverse=True), lambda x: oracles.rope(x, turn.conj()),
        ),
        ("apply_rope, rows", (dim,), False, lambda x: apply_rope(x, turn), lambda x: oracles.rope(x, turn)),
    ):  # fmt: skip
        for dtype in BOUND:
            given = {"x": setting.random(tokens, *shape, dtype=dtype)}
            given |= {"weight": torch.rand(shape[-1], device=setting.device) + 0.5} if gain else {}
            errors = compare(given, partial(by_autograd, ours), oracle, dtype)
            yield from rows(f"{name}, {' x '.join(map(str, shape))}", tokens, dtype, errors)


def unlike(found: Tensor, expected: Tensor) -> float:
    """The share of numbers that differ by more than fp32 rounds."""
    return float(((found.double() - expected).abs() > 1e-5 * expected.abs().max()).double().mean())


def compressors(setting: Setting) -> Rows:
    """Entries in both dtypes; and in fp32 as they are stored, beside float64's after the same rounding.

    There a number near the border of two codes may become either: the value's error is the share of such numbers.
    """
    config, tokens, eps = setting.config, sum(SIZES.lengths), setting.config.rms_norm_eps
    dim, index, csa, hca = config.head_dim, config.index_head_dim, setting.ratio("CSA"), setting.ratio("HCA")
    cases: list[tuple[str, int, int, int, Storage]] = [
        ("CSA", csa, dim, 2 * dim, "fp8"), ("HCA", hca, dim, dim, "fp8"), ("indexer", csa, index, 2 * index, "fp4")
    ]  # fmt: skip
    for name, ratio, width, channels, storage in cases:
        windows = pack(setting, ratio).entries[ratio].windows
        form = f"compress, {name}, ratio {ratio}, {channels} to {width}"
        values, scores = (setting.random(tokens, channels, dtype=torch.float32) for _ in range(2))
        given = {"values": values, "scores": scores, "bias": setting.random(ratio, channels, dtype=torch.float32)}
        given["weight"] = torch.rand(width, device=setting.device) + 0.5
        for dtype in BOUND:
            ours = partial(compress, windows=windows, eps=eps, dtype=dtype)
            oracle = partial(oracles.compress, windows, eps)
            yield from rows(form, tokens, dtype, compare(given, partial(by_autograd, ours), oracle, dtype))

        def rounded(windows: Windows = windows, storage: Storage = storage, **given: Tensor) -> Tensor:
            return reference_stored(oracles.compress(windows, eps, **given), windows.rotation, storage)

        ours = partial(by_autograd, partial(compress, windows=windows, eps=eps, dtype=torch.float32, storage=storage))
        errors = compare(given, ours, rounded, torch.float32, value=unlike)
        other = {"value": errors.pop("value")}
        yield row(f"{form}, {storage}, fp32, share of other codes", tokens, other, UNLIKE)
        yield from rows(f"{form}, {storage}", tokens, torch.float32, errors)


def indexer(setting: Setting) -> Rows:
    """The scores of chosen entries with their gradients; how many queries choose wrongly."""
    config, tokens, ratio = setting.config, sum(SIZES.lengths), setting.ratio("CSA")
    heads, dim = config.index_n_heads, config.index_head_dim
    place = pack(setting, ratio)
    seen, count = place.seen(ratio), place.entries[ratio].windows.number.numel()
    for dtype in BOUND:
        for topk in SIZES.chosen:
            given = {
                "q": setting.random(tokens, heads, dim, dtype=dtype),
                "weights": setting.random(tokens, heads, dtype=torch.float32),
                "keys": setting.random(count, dim, dtype=dtype),
            }
            form = f"{topk} of {seen.most} entries, {heads} x {dim}"
            chosen = random_choice(seen, topk)
            dots = oracles.index_products(seen, chosen, given["q"].double(), given["keys"].double())
            smooth = (dots.abs() > KINK).all(2)

            def ours(q: Tensor, weights: Tensor, keys: Tensor, chosen: Tensor = chosen) -> Tensor:
                scores = index_scores(q, weights, keys, seen, chosen)
                return scores.masked_fill((chosen < 0) & (scores == float("-inf")), 0.0)

            oracle = partial(oracles.index_scores, seen, chosen)
            errors = compare(given, partial(by_autograd, ours), oracle, torch.float32, mask=smooth)
            yield from rows(f"index scores, {form}", tokens, dtype, errors, exact=["value"])
            with poisoned():
                found = select(given["q"], given["weights"], given["keys"], seen, topk)
            wrong = wrong_choices(found, seen, topk, **given)
            yield row(f"select, {form}, {told(dtype)}, queries that choose wrongly", tokens, {"value": wrong}, 0)


@torch.no_grad()
def wrong_choices(found: Tensor, seen: Seen, topk: int, q: Tensor, weights: Tensor, keys: Tensor) -> int:
    """How many queries' choice int32 [T, K] is not one of complete entries, as many as there are up to `topk`, in
    rising order, or leaves out an entry whose score in float64 is higher by more than rounding than a chosen one's."""
    scores = oracles.all_index_scores(q.double(), weights.double(), keys.double())
    complete = oracles.marked(*oracles.entries_seen(seen, None), len(keys))
    place, real = oracles.entries_seen(seen, found)
    count = complete.sum(1).clamp(max=topk)
    behind = torch.arange(found.shape[1], device=found.device) >= count.unsqueeze(1)
    rising = (found[:, 1:] > found[:, :-1]) | behind[:, 1:]
    chosen = oracles.marked(place, real & (place < len(keys)), len(keys))
    valid = rising.all(1) & (real != behind).all(1) & (chosen <= complete).all(1) & (chosen.sum(1) == count)
    none = float("inf")
    lowest = scores.masked_fill(~chosen, none).amin(1)
    highest = scores.masked_fill(chosen | ~complete, -none).amax(1)
    return int((~valid | (lowest < highest - NEAR * scores.abs().max())).sum())
