"""A pack laid out by its sizes, filled up, against the pack as it is; that a graph may hold it; what is refused.

On a GPU, recorded steps against the same steps without a graph, bit for bit."""

from typing import Any

import numpy as np
import pytest
import torch

from amalgam.distill import opd
from amalgam.model import DeepseekV4
from amalgam.pipelines import sft
from amalgam.rl import grpo, learner_worker, training_graph
from amalgam.rl.balance import Loads
from amalgam.rl.learner_worker import LearnerWorker
from amalgam.rl.packing import Batch, stack, tensors
from amalgam.rl.training_graph import Sizes, TrainingGraphs, filled, sizes_of, why_not
from tests import tiny
from tests.model.test_graph import Asked, Trace

LENGTHS = [5, 1, 13, 2, 21]  # HCA's ratio is 7, CSA's 4


def rows(lengths: list[int], experts: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """What all three losses read."""
    rng = np.random.default_rng(seed)
    return [
        {
            "tokens": rng.integers(2, 512, n).astype(np.int32),
            "weight": np.concatenate([[0], rng.random(n - 1)]).astype(np.float32),
            "advantage": rng.standard_normal(n).astype(np.float32),
            "old_logprobs": -6 - rng.random(n).astype(np.float32),
            "experts": rng.random((n, 3, experts)).argsort(-1)[..., :2].astype(np.int16),
            "teacher": rng.integers(0, 2, n),
            "teacher_hidden": rng.standard_normal((n, 32)).astype(np.float32),
        }
        for n in lengths
    ]


def cases() -> dict[str, tuple[Any, dict[str, Any]]]:
    return {
        "sft": (sft.loss, {"mtp_weight": 0.3, "indexer_weight": 0.2}),
        "grpo": (grpo.loss, {"clip_low": 0.2, "clip_high": 0.3, "temperature": 0.9, "indexer_weight": 0.2}),
        "opd": (opd.loss, {"indexer_weight": 0.2}),
    }


def made(**changes: Any) -> DeepseekV4:
    model = tiny.model(0, **(tiny.FUSED | {"num_nextn_predict_layers": 1} | changes))
    for part in ("indexer", "mtp"):
        model.unfreeze(part)
    return model


def shared(device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {f"head.{i}": torch.randn(512, 32, generator=generator).to(device) for i in range(2)}


def plain(model: DeepseekV4, loss: Any, batch: Batch, settings: dict[str, Any]) -> tuple[dict, list]:
    value, metrics = loss(model, tensors(batch, "cpu"), shared(), **settings)
    weights = [p for p in model.parameters() if p.requires_grad]
    return metrics, list(torch.autograd.grad(value, weights, allow_unused=True))


def test_sizes():
    def of(*lengths: int) -> Sizes:
        return sizes_of(np.cumsum([0, *lengths]))

    assert of(1) == (128, 128) and of(129) == (256, 256) and of(100, 28) == (128, 128)
    assert of(4096) == (4096, 4096) and of(4000, 97) == (4608, 4096) and of(*[511] * 16) == (8192, 512)


def test_what_fills_a_pack_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training_graph, "GRAIN", 4)
    batch = stack(rows([3, 2], 2))
    longer = filled(batch, 16)
    assert longer["cu_seqlens"].tolist() == [0, 3, 5, 9, 13] + [16] * 12
    assert longer["real"].tolist() == [1] * 5 + [0] * 11
    for name in batch.keys() - {"cu_seqlens"}:
        assert np.array_equal(longer[name][:5], batch[name]) and not longer[name][5:].any()
    assert filled(batch, 5)["cu_seqlens"].tolist() == [0, 3, 5, 5, 5, 5]


@pytest.mark.parametrize("name", ["sft", "grpo", "opd"])
def test_a_filled_pack_is_the_pack(name: str, monkeypatch: pytest.MonkeyPatch):
    """Metrics, gradients and loads; of a second batch of the same sizes, too, and of one without work for indexers."""
    monkeypatch.setattr(training_graph, "GRAIN", 8)
    model, (loss, settings) = made(), cases()[name]
    loads = Loads(model)
    graphs = TrainingGraphs(model, loads)
    loads.start("cpu")
    weights = [p for p in model.parameters() if p.requires_grad]
    for seed, lengths in enumerate((LENGTHS, [9, 1, 16], [2, 3])):
        batch = stack(rows(lengths, 16, seed))
        loads.counting = True
        found = graphs.run(loss, batch, shared(), settings)
        loads.counting = False
        expected, gradients = plain(model, loss, batch, settings)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == torch.float64
            torch.testing.assert_close(found[key], value.double(), rtol=1e-5, atol=1e-7)
        for p, gradient in zip(weights, gradients, strict=True):
            if gradient is None:
                assert p.grad is None or not p.grad.any()
            else:
                assert p.grad is not None
                torch.testing.assert_close(p.grad, gradient, rtol=0, atol=2e-6 * max(float(gradient.abs().max()), 1))
    assert [int(counts.sum()) for counts in loads.take().values()][:3] == [(sum(LENGTHS) + 26 + 5) * 2] * 3


@torch.no_grad()
def test_a_token_s_bits_are_those_of_its_document():
    model = made()
    cu = np.cumsum([0, *LENGTHS])
    tokens = torch.randint(512, (int(cu[-1]),))
    longer = filled({"tokens": tokens.numpy(), "cu_seqlens": cu}, 64)
    expected = model(tokens, torch.tensor(cu), index_loss=True)
    model.longest = 64
    found = model(torch.tensor(longer["tokens"]), torch.tensor(longer["cu_seqlens"]), index_loss=True)
    for ours, theirs in zip(found[:4], expected[:4], strict=True):  # a pack has no picks
        assert torch.equal(ours[: len(tokens)], theirs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter, on machines without a GPU")
@pytest.mark.parametrize("name, packs", [("sft", 1), ("grpo", 2), ("opd", 1)])
def test_a_filled_pack_asks_the_host_for_nothing(name: str, packs: int, monkeypatch: pytest.MonkeyPatch):
    """With the Triton kernels; and whatever the documents, the operations are the same."""
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")
    monkeypatch.setattr(training_graph, "GRAIN", 4)
    model, (loss, settings) = made(), cases()[name]
    graphs, traces = TrainingGraphs(model), []
    for lengths in ([5, 1], [2, 3, 2])[:packs]:
        batch = {n: torch.tensor(v) for n, v in filled(stack(rows(lengths, 16)), 8).items()}
        with Trace() as trace:
            found = graphs._compute(loss, batch, 8, shared(), settings)
        assert all(x is None or x.isfinite().all() for x in (found.metrics, *found.gradients))
        traces.append(trace.operations)
    assert len(traces[0]) > 300 and traces[0] == traces[-1]


def test_a_loss_that_asks_is_seen():
    model = made()
    batch = {n: torch.tensor(v) for n, v in filled(stack(rows([5], 16)), 8).items()}

    def asks(model, batch, shared):
        value = model.logprobs(batch["tokens"], batch["cu_seqlens"]).sum()
        return value * float(value), {}

    with Trace(), pytest.raises(Asked):
        TrainingGraphs(model)._compute(asks, batch, 8, {}, {})


def test_where_there_are_no_graphs(caplog: pytest.LogCaptureFixture):
    """Said once."""
    caplog.set_level("INFO", training_graph.__name__)
    for _ in range(2):
        assert why_not(made(), sft.loss) == "there are none on cpu"
    assert caplog.messages == ["amalgam.pipelines.sft:loss runs without CUDA graphs: there are none on cpu"]


def test_the_learner_takes_them_where_it_can(monkeypatch: pytest.MonkeyPatch):
    """As on a GPU: for a loss that is marked; the other way leaves the same gradients, times the ranks."""
    monkeypatch.setattr(training_graph, "GRAIN", 8)
    worker, batch, (loss, settings) = LearnerWorker(0, 2, "cpu", 1), stack(rows(LENGTHS, 16)), cases()["sft"]
    worker._model = model = made()
    found = []
    for why in ("there are none on cpu", ""):
        monkeypatch.setattr(learner_worker, "why_not", lambda *_, why=why: why)
        worker._graphs = TrainingGraphs(model, times=2)
        metrics = worker._backward(loss, batch, settings)
        assert len(worker._graphs._recordings) == (not why)
        found.append([*metrics.values(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for eager, recorded in zip(*found, strict=True):
        torch.testing.assert_close(recorded, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sft", "grpo", "opd"])
def test_recorded_steps_have_the_bits_of_steps(name: str):
    """Of two sizes in turn, which share memory, and after the weights have changed in place."""
    model, (loss, settings) = made().bfloat16().cuda(), cases()[name]
    loads, heads = Loads(model), shared("cuda")
    recorded = TrainingGraphs(model, loads)
    weights = [p for p in model.parameters() if p.requires_grad]

    def run(graphs: TrainingGraphs, batch: Batch) -> list[torch.Tensor | None]:
        loads.start("cuda")
        loads.counting = True
        metrics = graphs.run(loss, batch, heads, settings)
        loads.counting = False
        gradients = [None if p.grad is None else p.grad.clone() for p in weights]
        return [*metrics.values(), *(counts.clone() for counts in loads.take().values()), *gradients]

    for seed in range(4):  # run, record, replay, replay with other weights
        if seed == 3:
            torch._foreach_mul_([p.detach() for p in weights], 1.5)  # pyright: ignore[reportPrivateImportUsage]
        for lengths in (LENGTHS, [150, 3, 40]):
            batch = stack(rows(lengths, 16, seed))
            expected = run(TrainingGraphs(model, loads), batch)
            for a, b in zip(run(recorded, batch), expected, strict=True):
                assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


@pytest.mark.gpu
def test_a_wrong_promise_is_an_error():
    @training_graph.recordable
    def asks(model, batch, shared):
        value = (batch["weight"] * model.logprobs(batch["tokens"], batch["cu_seqlens"])).sum()
        return value * float(value), {"loss": value}

    model, batch = made().bfloat16().cuda(), stack(rows(LENGTHS, 16))
    graphs = TrainingGraphs(model)
    graphs.run(asks, batch, {}, {})
    with pytest.raises(RuntimeError, match="asks cannot be recorded in a CUDA graph: it asks the host"):
        graphs.run(asks, batch, {}, {})
    values = [float(graphs.run(sft.loss, batch, {}, {})["loss"]) for _ in range(3)]
    assert values == [values[0]] * 3
