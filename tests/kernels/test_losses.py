"""Losses over the vocabulary against a naive float64, the definition and, in Triton's interpreter, the kernels."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from amalgam.kernels import losses
from amalgam.kernels.fused import losses as fused
from amalgam.kernels.fused import vocabulary
from amalgam.kernels.sampling import DrawSettings, sample

KINDS: list[losses.Kind] = ["reverse", "forward", "jensen_shannon"]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


WAYS = ["definition", "in pieces", pytest.param("kernels", marks=interpreted)]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return prepared(request.param, monkeypatch)


@pytest.fixture(params=[*WAYS, pytest.param("again", marks=interpreted)])
def any_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return prepared(request.param, monkeypatch)


def prepared(way: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AMALGAM_KERNELS", "triton" if way in ("kernels", "again") else "reference")
    if way == "in pieces":
        monkeypatch.setattr(losses, "_LOGITS_AT_ONCE", 200)
    small(monkeypatch)
    if way == "again":
        monkeypatch.setattr(fused, "rooms", lambda *_: iter([[]] * 99))
    return way


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")
    small(monkeypatch)


def small(monkeypatch: pytest.MonkeyPatch, block: int = 32, piece: int = 0) -> None:
    """Blocks and pieces of which a tiny vocabulary has several; the last one is not whole."""
    monkeypatch.setattr(vocabulary, "BLOCK", block)
    monkeypatch.setattr(vocabulary, "PIECE", piece)


def compare(ours: Callable[..., Tensor], naive: Callable[..., Tensor], *inputs: Tensor, bound: float = 1e-5) -> None:
    """Values and gradients of `ours` on fp32 or bf16 inputs against `naive` on the same numbers in float64."""
    weight, results = None, []
    for function, wide in ((naive, True), (ours, False)):
        leaves = [(x.double() if wide else x.clone()).requires_grad_() for x in inputs]
        out = function(*leaves)
        weight = torch.randn(out.shape) if weight is None else weight
        results.append([out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)])
    for i, (expected, found) in enumerate(zip(*results, strict=True)):
        assert i == 0 or found.dtype == inputs[i - 1].dtype
        error, size = (found.double() - expected).abs().max(), expected.abs().max()
        assert error <= (bound if i else 1e-5) * size, f"{i}: {error:.1e} of {size:.1e}"


def naive_scores(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float) -> Tensor:
    p = torch.softmax(hidden @ head.t() / temperature, 1)
    return torch.stack([p.gather(1, targets[:, None])[:, 0].log(), -(p * p.log()).sum(1)])


def naive_masked(hidden: Tensor, head: Tensor, targets: Tensor, allowed: Tensor) -> Tensor:
    rows = []
    for i, t in enumerate(targets.tolist()):
        p = torch.softmax((hidden[i] @ head.t() / 0.7)[allowed[i]], 0)
        rows.append(torch.stack([p[int(allowed[i, :t].sum())].log(), -(p * p.log()).sum()]))
    return torch.stack(rows, 1)


def naive_divergence(hidden, head, taught: Tensor, heads: dict[int, Tensor], teacher: Tensor, kind: str) -> Tensor:
    p, rows = torch.softmax(hidden @ head.t(), 1), []
    for i, t in enumerate(teacher.tolist()):
        matrix = heads[max(t, 0)].double()
        q = torch.softmax(taught[i, : matrix.shape[1]].double() @ matrix.t(), 0)
        m = (p[i] + q) / 2
        pairs = {"reverse": [(p[i], q, 1)], "forward": [(q, p[i], 1)], "jensen_shannon": [(p[i], m, 0.5), (q, m, 0.5)]}
        rows.append(sum((a * (a / b).log()).sum() * w for a, b, w in pairs[kind]) * (t >= 0))
    return torch.stack(rows)


DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


def inputs(dtypes: tuple[torch.dtype, torch.dtype], tokens: int = 7, vocabulary: int = 80) -> tuple[Tensor, Tensor]:
    """Hidden states, and a head whose numbers bf16 can hold: what a head in fp32 is rounded to is not compared."""
    return torch.randn(tokens, 16).to(dtypes[0]), torch.randn(vocabulary, 16).bfloat16().to(dtypes[1])


@pytest.mark.parametrize("dtypes", DTYPES, ids=["fp32", "bf16", "fp32 head"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_scores(any_way: str, dtypes: tuple[torch.dtype, torch.dtype], temperature: float):
    hidden, head = inputs(dtypes)
    targets = torch.tensor([0, 79, 31, 32, 63, 64, 5])

    def ours(h: Tensor, w: Tensor) -> Tensor:
        found = losses.token_scores(h, w, targets, temperature)
        assert torch.equal(found.logprobs, losses.token_logprobs(h, w, targets, temperature))
        return torch.stack(found)

    bound = 1e-5 if dtypes[0] == torch.float32 else 1e-2
    compare(ours, lambda h, w: naive_scores(h, w, targets, temperature), hidden, head, bound=bound)


@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=["fp32", "bf16"])
def test_only_what_could_be_sampled_takes_part(any_way: str, dtypes: tuple[torch.dtype, torch.dtype]):
    """Blocks of which nothing is allowed, a row with its target alone; others have no gradient."""
    hidden, head = inputs(dtypes)
    targets = torch.tensor([0, 79, 31, 32, 63, 64, 5])
    allowed = torch.rand(7, 80) < 0.4
    allowed[1] = allowed[2, 32:64] = allowed[:, 77] = False
    allowed[torch.arange(7), targets] = True
    mask = losses.packed_mask(allowed)

    def ours(h: Tensor, w: Tensor) -> Tensor:
        found = losses.token_scores(h, w, targets, 0.7, allowed=mask)
        assert torch.equal(found.logprobs, losses.token_logprobs(h, w, targets, 0.7, allowed=mask))
        chosen = losses.chosen_logprobs(losses.logits(h, w).detach(), targets, 0.7, allowed=mask)
        assert torch.equal(found.logprobs, chosen) or any_way in ("definition", "in pieces")
        return torch.stack(found)

    bound = 1e-5 if dtypes[0] == torch.float32 else 1e-2
    compare(ours, lambda h, w: naive_masked(h, w, targets, allowed), hidden, head, bound=bound)
    head.requires_grad_()
    (of_head,) = torch.autograd.grad(ours(hidden, head).sum(), head)
    assert of_head[77].eq(0).all() and of_head[79].ne(0).any()
    outside = losses.token_logprobs(hidden, head, targets.clone().fill_(77), allowed=mask)
    assert outside.eq(-torch.inf).all()


def test_a_mask_of_another_shape_is_refused():
    hidden, head = inputs(DTYPES[0], 3)
    for wrong in (torch.ones(3, 3), torch.ones(3, 2, dtype=torch.int32), torch.ones(4, 3, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"allowed: .*; want torch.int32 \[3, 3\]"):
            losses.token_logprobs(hidden, head, torch.zeros(3, dtype=torch.int64), allowed=wrong)


@interpreted
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("kind", ["tokens", *KINDS])
def test_what_is_not_kept_is_computed_again(kind, monkeypatch: pytest.MonkeyPatch):
    """With more tokens than channels the head's gradient has room for 64 of 80 columns; KEPT for one more piece."""
    monkeypatch.setattr(vocabulary, "KEPT", 4 * 19 * 32)
    hidden, head = inputs(DTYPES[0], 19, 80)
    taught, heads, teacher = torch.randn(19, 16), {0: head.flip(0)}, torch.zeros(19, dtype=torch.int64)

    def ours(h: Tensor, w: Tensor) -> Tensor:
        if kind == "tokens":
            return torch.stack(losses.token_scores(h, w, teacher))
        return losses.divergence(h, w, taught, heads, teacher, kind)

    def naive(h: Tensor, w: Tensor) -> Tensor:
        if kind == "tokens":
            return naive_scores(h, w, teacher, 1.0)
        return naive_divergence(h, w, taught, heads, teacher, kind)

    kept = [len(each) for each in fused.rooms(hidden, head, torch.empty_like(head), 2)]
    assert kept == [2, 1, 0]
    compare(ours, naive, hidden, head)
    leaves = hidden.requires_grad_(), head.requires_grad_()
    value = ours(*leaves).sum()
    first = [x.clone() for x in torch.autograd.grad(value, leaves, retain_graph=True)]
    for one, other in zip(first, torch.autograd.grad(value, leaves), strict=True):  # all is computed again
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtypes", DTYPES, ids=["fp32", "bf16", "fp32 head"])
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_from_several_teachers(any_way: str, kind, dtypes: tuple[torch.dtype, torch.dtype]):
    """In any order, of other widths, one without a token; and tokens without a teacher."""
    hidden, head = inputs(dtypes)
    taught, teacher = torch.randn(7, 32).bfloat16().float(), torch.tensor([4, 0, 4, -1, 0, 4, 4])
    heads = {key: torch.randn(80, width).bfloat16().to(dtypes[1]) for key, width in ((4, 32), (1, 16), (0, 16))}

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return losses.divergence(h, w, taught.to(h.dtype), heads, teacher, kind)

    def naive(h: Tensor, w: Tensor) -> Tensor:
        return naive_divergence(h, w, taught, heads, teacher, kind)

    compare(ours, naive, hidden, head, bound=1e-5 if dtypes[0] == torch.float32 else 1e-2)


def test_a_teacher_like_the_student_is_no_distance_away(way: str):
    hidden, head = inputs(DTYPES[0])
    shifted = torch.cat([hidden, torch.ones(7, 16)], 1), torch.cat([head, torch.full((80, 16), 2.0)], 1)  # by 32
    for kind in KINDS:
        found = losses.divergence(hidden, head, shifted[0], {0: shifted[1]}, torch.zeros(7, dtype=torch.int64), kind)
        assert found.abs().max() < 1e-5


def test_a_number_without_a_head_shows_itself(way: str):
    hidden, head = inputs(DTYPES[0], 3)
    found = losses.divergence(hidden, head, hidden, {1: head}, torch.tensor([1, -1, 2]))
    assert found.isnan().tolist() == [False, False, True] and found[1] == 0


def test_a_head_of_another_shape_is_refused():
    hidden, head = inputs(DTYPES[0], 3)
    for wrong in (head[1:], torch.cat([head, head], 1)):
        with pytest.raises(ValueError, match=r"teacher 1: a head of .*; want \[80, up to 16\]"):
            losses.divergence(hidden, head, hidden, {1: wrong}, torch.ones(3, dtype=torch.int64))


def test_no_rows(way: str):
    hidden, head = (x.requires_grad_() for x in inputs(DTYPES[0], 0))
    targets = torch.zeros(0, dtype=torch.int64)
    value = losses.token_scores(hidden, head, targets).entropy.sum()
    for kind in KINDS:
        value = value + losses.divergence(hidden, head, hidden.detach(), {0: head.detach()}, targets, kind).sum()
    value.backward()
    assert value == 0 and head.grad is not None and head.grad.eq(0).all() and hidden.grad is not None


@pytest.mark.parametrize("kind", ["tokens", *KINDS])
def test_logits_are_never_there_as_a_whole(way: str, kind, monkeypatch: pytest.MonkeyPatch):
    """Nothing has more numbers than a piece, a head or what is known of the blocks."""

    class Largest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.is_floating_point():  # bytes are the interpreter's own
                self.found = max(self.found, out.numel())
            return out

    monkeypatch.setattr(losses, "_LOGITS_AT_ONCE", 2000)
    hidden, head = (x.requires_grad_() for x in inputs(DTYPES[0], 20, 320))
    none = torch.zeros(20, dtype=torch.int64)
    with Largest() as largest:
        if kind == "tokens":
            value = losses.token_logprobs(hidden, head, none)
        else:
            value = losses.divergence(hidden, head, hidden.detach(), {0: head.detach()}, none, kind)
        value.sum().backward()
    assert largest.found <= 320 * 16 < 20 * 320


# ---- equal bits, of the kernels


def losses_of(hidden: Tensor, head: Tensor, rows: Tensor, **more: Tensor) -> list[Tensor]:
    """Each loss of some rows; then gradients by their hidden states, of all losses of tokens and of all divergences."""
    h, heads = hidden[rows].requires_grad_(), {0: head.flip(0), 1: head.flip(1)}
    scores = losses.token_scores(h, head, more["targets"][rows], 0.7)
    found = [losses.divergence(h, head, more["taught"][rows], heads, more["teacher"][rows], kind) for kind in KINDS]
    sums = sum(scores).sum(), sum(found).sum()  # pyright: ignore[reportAttributeAccessIssue]
    return [x.detach() for x in (*scores, *found)] + [torch.autograd.grad(x, h)[0] for x in sums]


@interpreted
@pytest.mark.usefixtures("triton")
def test_a_token_s_bits_are_its_own(monkeypatch: pytest.MonkeyPatch):
    """In a batch, alone, beside tokens of other teachers, whatever the pieces. Sums over pieces are of gradients."""
    hidden, head = inputs(DTYPES[1], 18, 80)
    more = {"targets": torch.randint(80, (18,)), "taught": torch.randn(18, 16).bfloat16()}
    more["teacher"] = torch.arange(18) % 2
    whole = losses_of(hidden, head, torch.arange(18), **more)
    for rows in (torch.tensor([17]), torch.tensor([1, 3, 8])):
        for found, expected in zip(losses_of(hidden, head, rows, **more), whole, strict=True):
            assert torch.equal(found, expected[rows])
    small(monkeypatch, piece=2**20)
    for i, (found, expected) in enumerate(zip(losses_of(hidden, head, torch.arange(18), **more), whole, strict=True)):
        if i < 5:
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-3)


@interpreted
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("cut", [False, True])
def test_sampled_tokens_have_the_sampler_s_bits(temperature: float, cut: bool):
    """Under a mask too, that of what they were drawn from."""
    hidden, head = inputs(DTYPES[1], 9, 144)
    counter = torch.arange(9)
    settings = DrawSettings.alike(5, temperature, 3, hidden.device)
    if cut:
        settings = settings._replace(top_k=torch.tensor([0, 1, 9, 40, 200]).int(), top_p=torch.rand(5))
    drawn = sample(losses.logits(hidden[:5], head), counter[:5], counter[:5], settings, sets=True)
    assert drawn.allowed is not None
    tokens, allowed = (
        torch.cat([x, torch.zeros(4, *x.shape[1:], dtype=x.dtype)]) for x in (drawn.tokens, drawn.allowed)
    )
    allowed[5:, 0] = 1
    scores = losses.token_logprobs(hidden, head, tokens, temperature or 1.0, allowed=allowed if cut else None)
    assert torch.equal(scores[:5], drawn.logprobs)


@pytest.mark.parametrize("way", WAYS)
def test_each_row_s_own_temperature(way: str, monkeypatch: pytest.MonkeyPatch):
    """Bits are those of that temperature as a float."""
    prepared(way, monkeypatch)
    x, tokens = torch.randn(6, 80), torch.randint(80, (6,))
    allowed = torch.rand(6, 80) < 0.5
    allowed[torch.arange(6), tokens] = True
    each = [0.7, 1.0, 0.3, 1.7, 0.9, 1 / 3]
    for mask in (None, losses.packed_mask(allowed)):
        found = losses.chosen_logprobs(x, tokens, torch.tensor(each, dtype=torch.float64), allowed=mask)
        for i, temperature in enumerate(each):
            assert found[i] == losses.chosen_logprobs(x, tokens, temperature, allowed=mask)[i]
    with pytest.raises(ValueError, match="want a float or torch.float64"):
        losses.chosen_logprobs(x, tokens, torch.tensor(each))
