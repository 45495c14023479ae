"""The experts' and the router's Triton kernels against the reference in float64, in Triton's interpreter on a CPU."""

import pytest
import torch
from torch import Tensor

from amalgam.kernels import moe, swiglu
from amalgam.kernels.fused import moe as fused_moe
from amalgam.kernels.fused import moe_rows
from amalgam.kernels.fused.moe_rows import sort_rows
from amalgam.kernels.project import project_wide

from .test_fused import compare

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter, on machines without a GPU")


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swiglu(dtype: torch.dtype):
    """On both sides of the limits; a width and a number of rows that tiles do not divide."""
    compare(lambda x: swiglu.gated(x, 1.5), dtype, 2 * torch.randn(7, 2 * 528))
    assert swiglu.gated(torch.zeros(0, 8), 1.0).shape == (0, 4)


def chosen(tokens: int, k: int, experts: int) -> Tensor:
    """Different experts of a token, at random, but not the last one."""
    return torch.rand(tokens, experts - 1).argsort(1)[:, :k]


def layer(tokens: int, k: int, experts: int, hidden: int, inner: int) -> list[Tensor]:
    """x, weights, gate_up, down."""
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, k)
    return [x, weights, torch.randn(experts, 2 * inner, hidden), torch.randn(experts, hidden, inner)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "tokens, k, experts, hidden, inner, height",
    [(40, 3, 5, 48, 32, 16), (7, 2, 16, 16, 48, 16), (90, 2, 3, 32, 16, 32)],
    ids=["several tiles", "few rows", "higher tiles"],
)
def test_experts(
    tokens: int, k: int, experts: int, hidden: int, inner: int, height: int, dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fused_moe, "height_of", lambda *_: height)
    monkeypatch.setattr(fused_moe, "BAND", 2)
    monkeypatch.setattr(fused_moe, "CHANNELS", 32)
    ids = chosen(tokens, k, experts)
    limit = 3.0 if dtype == torch.float32 else 1e3  # near the limit, rounding to bf16 decides whether there is gradient

    def ours(x, weights, gate_up, down, shared=None):
        return moe.experts(x, ids, weights, gate_up, down, limit, shared)

    inputs = layer(tokens, k, experts, hidden, inner)
    compare(ours, dtype, *inputs, *([torch.randn(tokens, hidden)] if height == 16 else []), fp32=(1,))


@pytest.mark.parametrize("tokens, experts", [(1, 7), (70, 7)], ids=["one token", "all to one"])
def test_experts_without_tokens(tokens: int, experts: int):
    ids = torch.full((tokens, 2), 3)
    x, weights, gate_up, down = layer(tokens, 2, experts, 32, 16)

    def ours(x, weights, gate_up, down):
        return moe.experts(x, ids, weights, gate_up, down, 3.0)

    compare(ours, torch.float32, x, weights, gate_up, down)
    leaves = [gate_up.requires_grad_(), down.requires_grad_()]
    for grad in torch.autograd.grad(ours(x, weights, *leaves).sum(), leaves):
        assert grad[3].ne(0).any() and grad[:3].eq(0).all() and grad[4:].eq(0).all()


def test_no_tokens():
    x, weights, gate_up, down = (a.requires_grad_() for a in layer(0, 2, 4, 16, 16))
    out = moe.experts(x, torch.zeros(0, 2, dtype=torch.int64), weights, gate_up, down, 3.0)
    assert out.shape == (0, 16) and out.dtype == torch.float32
    grads = torch.autograd.grad(out.sum(), (x, weights, gate_up, down))
    assert [grad.shape for grad in grads] == [a.shape for a in (x, weights, gate_up, down)]
    assert grads[2].eq(0).all() and grads[3].eq(0).all()
    ids, weights = moe.route(project_wide(torch.randn(0, 16), torch.randn(16, 16)), topk=2, scaling=1.0)
    assert ids.shape == weights.shape == (0, 2)


@torch.no_grad()
def test_a_token_is_its_own():
    """Alone, in a batch, among others of its experts and in tiles of another height."""
    x, weights, gate_up, down = (a.bfloat16() for a in layer(60, 2, 3, 48, 32))
    ids, weights = chosen(60, 2, 3), weights.float()
    whole = moe.experts(x, ids, weights, gate_up, down, 3.0)
    assert fused_moe.height_of(120, 3, x.dtype) == 64 and fused_moe.height_of(10, 3, x.dtype) == 16
    for rows in (slice(0, 1), slice(7, 12), torch.randperm(60)[:40]):
        assert torch.equal(moe.experts(x[rows], ids[rows], weights[rows], gate_up, down, 3.0), whole[rows])


def test_every_run_s_gradients_are_equal():
    ids = chosen(50, 3, 6)
    x, weights, gate_up, down = leaves = [a.requires_grad_() for a in layer(50, 3, 6, 32, 16)]
    runs = [moe.experts(x, ids, weights, gate_up, down, 3.0).sum() for _ in range(2)]
    first, second = (torch.autograd.grad(run, leaves) for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_backward_is_refused():
    """The first has put gradients where the forward had kept its product."""
    leaves = [a.requires_grad_() for a in layer(9, 2, 3, 16, 16)]
    x, weights, gate_up, down = leaves
    total = moe.experts(x, chosen(9, 2, 3), weights, gate_up, down, 3.0).sum()
    torch.autograd.grad(total, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("few", [0, 65_536], ids=["several launches", "one launch"])
@pytest.mark.parametrize("tokens, k, experts, height", [(700, 3, 5, 16), (1, 2, 300, 16), (90, 2, 7, 128)])
def test_rows_are_sorted_stably(tokens: int, k: int, experts: int, height: int, few: int, monkeypatch):
    """Several blocks of slots, more experts than a step of counts, and more rows than tiles."""
    monkeypatch.setattr(moe_rows, "FEW", few)
    ids = torch.randint(experts - 1, (tokens, k))
    rows = sort_rows(ids, experts, height)
    assert rows.expert.numel() == min((tokens * k + experts * (height - 1)) // height, tokens * k)
    assert rows.counts.tolist() == torch.bincount(ids.flatten(), minlength=experts).tolist()
    slots, owners = [], []
    for e in range(experts):
        own = (ids.flatten() == e).nonzero().flatten().tolist()
        assert int(rows.first[e]) == len(slots)
        slots += own + [-1] * (-len(own) % height)
        owners += [e] * -(-len(own) // height)
    assert rows.slot.tolist() == slots + [-1] * (rows.slot.numel() - len(slots))
    assert rows.total.tolist() == [len(owners)]
    assert rows.expert.tolist() == owners + [-1] * (rows.expert.numel() - len(owners))
    assert rows.slot[rows.row.long()].tolist() == list(range(tokens * k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("learned", [True, False])
def test_router(learned: bool, dtype: torch.dtype):
    experts, k, tokens = 48, 3, 90  # of 64 in a tile; two programs
    x, gate, bias = torch.randn(tokens, 32), torch.randn(experts, 32), torch.randn(experts)
    given = None if learned else torch.randint(experts, (tokens, k))  # some twice
    if given is not None:
        given[4], given[7, 1] = -1, -1

    def both(x, gate):
        return moe.route(project_wide(x, gate), topk=k, scaling=1.5, bias=bias, chosen=given)

    compare(lambda x, gate: both(x, gate)[1], dtype, x, gate)
    found = both(x.to(dtype), gate.to(dtype))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMALGAM_KERNELS", "reference")
        expected = both(x.to(dtype).double(), gate.to(dtype).double())[0]
    assert found.dtype == torch.int64 and torch.equal(found, expected)


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_a_table_s_rows(kernels: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AMALGAM_KERNELS", kernels)
    logits, table, tokens = torch.randn(90, 48), torch.randint(48, (7, 3)), torch.randint(7, (90,))
    found = moe.route(logits, topk=3, scaling=1.5, chosen=table, tokens=tokens)
    expected = moe.route(logits, topk=3, scaling=1.5, chosen=table[tokens])
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_ties_go_to_the_lowest_expert_and_nan_to_some():
    x, gate = torch.randn(5, 16), torch.randn(4, 16).repeat(4, 1)
    ids, _ = moe.route(project_wide(x, gate), topk=6, scaling=1.0)
    scores = x @ gate[:4].t()
    for row, found in zip(scores, ids.tolist(), strict=True):
        order = row.argsort(descending=True).tolist()
        assert found == [order[0] + 4 * i for i in range(4)] + [order[1], order[1] + 4]
    ids, weights = moe.route(project_wide(x.fill_(float("nan")), gate), topk=6, scaling=1.0)
    assert ids.tolist() == [list(range(6))] * 5 and weights.isnan().all()


def test_affinities_and_their_gradients_for_any_logit():
    from amalgam.kernels.fused.router import Route

    logits = torch.tensor([[-200.0, -86.0, -20.0, -3.0, -1e-3, 0.0, 0.5, 2.0, 19.0, 21.0, 90.0, 300.0] + [0.0] * 4])
    every = torch.arange(16).unsqueeze(0)
    leaf = logits.clone().requires_grad_()
    _, weights = Route.apply(leaf, None, every, None, 16, 1.0)  # pyright: ignore
    slope = torch.randn(1, 16)
    (grad,) = torch.autograd.grad((weights * slope).sum(), leaf)
    wide = logits.double().requires_grad_()
    affinities = torch.nn.functional.softplus(wide).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    expected = affinities / affinities.sum()
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=0)
    (of_wide,) = torch.autograd.grad((expected * slope).sum(), wide)
    torch.testing.assert_close(grad.double(), of_wide, rtol=1e-4, atol=1e-12)


def test_a_token_s_route_is_its_own():
    x, gate, bias = torch.randn(300, 32).bfloat16(), torch.randn(16, 32).bfloat16(), torch.randn(16)
    ids, weights = moe.route(project_wide(x, gate), topk=4, scaling=1.5, bias=bias)
    for rows in (slice(0, 1), slice(250, 270)):
        own, own_weights = moe.route(project_wide(x[rows], gate), topk=4, scaling=1.5, bias=bias)
        assert torch.equal(own, ids[rows]) and torch.equal(own_weights, weights[rows])


def test_what_the_kernels_do_not_take():
    x, weights, gate_up, down = layer(3, 2, 4, 24, 16)
    ids = chosen(3, 2, 4)
    with pytest.raises(ValueError, match="hidden size: 24; the Triton kernels take multiples of 16"):
        moe.experts(x, ids, weights, gate_up, down, 3.0)
    with pytest.raises(ValueError, match="weights: torch.float64; the Triton kernels take float32"):
        moe.experts(x, ids, weights.double(), gate_up, down, 3.0)
    with pytest.raises(ValueError, match="33 of 48 experts; the Triton kernels take 1 to 32 of up to 1024"):
        moe.route(project_wide(torch.randn(2, 16), torch.randn(48, 16)), topk=33, scaling=1.0)
