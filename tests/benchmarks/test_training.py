"""The benchmark of a training step: every part on tiny sizes in Triton's interpreter, and how faults show."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from amalgam.kernels.fused import losses as fused
from amalgam.kernels.hyper import expand
from amalgam.model import DeepseekV4

from .. import tiny
from .test_attention import bench  # noqa: F401 - a fixture

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter, on machines without a GPU")


@pytest.fixture
def train(bench, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:  # noqa: F811
    """The benchmark's modules and a tiny setting, in which each run takes 26 ms and 0.25 GiB."""
    import training  # pyright: ignore[reportMissingImports]
    import training_accuracy  # pyright: ignore[reportMissingImports]
    import training_kernels  # pyright: ignore[reportMissingImports]
    import training_layer  # pyright: ignore[reportMissingImports]
    import training_losses  # pyright: ignore[reportMissingImports]
    import training_oracles  # pyright: ignore[reportMissingImports]
    import training_setting  # pyright: ignore[reportMissingImports]
    import training_step  # pyright: ignore[reportMissingImports]
    import training_whole  # pyright: ignore[reportMissingImports]

    shape = training_setting.Experts("E16 H32 I16 K2", 16, 32, 16, 2)
    monkeypatch.setattr(torch, "seed", lambda: 0)
    monkeypatch.setattr(bench.gpu, "milliseconds", lambda run, rep=60: 26.0)
    monkeypatch.setattr(bench.gpu, "extra_bytes", lambda run: 2**28)
    monkeypatch.setattr(bench.gpu, "on_device", lambda run: (run(), 26.0)[1])
    monkeypatch.setattr(bench.gpu, "kernel_times", lambda run: (run(), [("_up", 5.0), ("ampere_sgemm", 10.0)])[1])
    monkeypatch.setattr(training_accuracy, "SIZES", training_accuracy.Sizes((9,), (shape,), shape, 24, (2, 6, 9)))
    monkeypatch.setattr(training_whole, "RUNS", 2)
    monkeypatch.setattr("amalgam.rl.training_graph.GRAIN", 1)
    monkeypatch.setattr(training_whole, "CURVES", dict([*training_whole.CURVES.items()][-1:]))
    monkeypatch.setattr(training_whole.bits, "TAIL", 3)
    config = tiny.config(**tiny.FUSED, vocab_size=80)
    one = {"num_hidden_layers": 1, "layer_types": [tiny.CSA], "mlp_layer_types": ["moe"], "moe_intermediate_size": 32}
    setting = training_setting.Setting(
        bench.floors.Ceilings(798, 3000, 5500), config, tiny.config(**tiny.FUSED | one, vocab_size=80), losses=5,
        experts=(shape,), routed=9, streams=(5,), matrices=(2, 6, 9), steps=(9,), documents=5, eager=(9,), layer=(9,),
        bits=(2, 7), curve=(1, 9), device="cpu",
    )  # fmt: skip
    return SimpleNamespace(
        setting=setting, command=training, accuracy=training_accuracy, kernels=training_kernels, layer=training_layer,
        losses=training_losses, oracles=training_oracles, settings=training_setting, step=training_step,
        whole=training_whole, floors=bench.floors, gpu=bench.gpu, parts=bench.parts,
    )  # fmt: skip


def measure(train: SimpleNamespace, name: str) -> dict[str, dict]:
    """A part's rows by name."""
    part = train.parts.measure(train.command.PARTS[name], train.setting)
    assert "error" not in part and json.dumps(part, allow_nan=False)
    return {row["name"]: row for row in part["rows"]}


def test_every_operation_meets_its_bounds(train):
    rows = measure(train, "accuracy")
    assert {name.split(",")[0].split(":")[0] for name in rows} == {
        "router", "experts", "hyper-connections", "log-prob", "entropy", "divergence", "Newton-Schulz",
        "Muon's first two steps",
    }  # fmt: skip
    assert [name for name, row in rows.items() if not row["met"]] == []


def test_a_wrong_gradient_shows(train, monkeypatch):
    right = fused._multiply_into

    def wrong(out, a, b, beta):
        right(out, a, b, beta)
        out.mul_(1.0 if beta else 1.05)  # the head's

    monkeypatch.setattr(fused, "_multiply_into", wrong)
    row = next(iter(train.accuracy.losses(train.setting)))
    assert not row["met"] and row["errors"]["head"] > 0.03 and row["errors"]["hidden"] < 0.01


def test_wrong_choices_of_experts_are_counted(train):
    scores = torch.tensor([[3.0, 2.0, 1.0, 1.0 - 1e-6]]).expand(4, -1)
    ids = torch.tensor([[0, 1], [1, 0], [0, 0], [0, 2]])
    assert train.accuracy.wrong_choices(ids, scores) == 2
    assert train.accuracy.wrong_choices(torch.tensor([[0, 1, 3]]), scores[:1]) == 0


def test_losses_beside_their_goals(train, capsys):
    rows = measure(train, "losses")
    assert {"torch: cross-entropy", "torch: reverse KL", "forward KL, 1 teacher"} < rows.keys() and len(rows) == 8
    assert [rows[name]["met"] for name in ("log-prob", "reverse KL, 1 teacher")] == [False, True]
    assert rows["reverse KL, 4 teachers"]["over_one"] == 1.0
    assert rows["log-prob"]["extra_gib"] == pytest.approx(0.25, abs=1e-4)
    assert "21 ms, 0.3 GiB MISSED" in capsys.readouterr().out
    one = train.floors.product(4096, 4096, 129_280).floor(train.setting.ceilings)
    assert one == pytest.approx(5.44, abs=0.01)


def test_experts_beside_torch_s(train):
    rows = measure(train, "experts")
    assert len(rows) == 4 and rows["torch._grouped_mm: E16 H32 I16 K2 forward"]["difference"] < 0.03
    ours = rows["E16 H32 I16 K2 forward + backward"]
    assert (
        ours["goal"] == "400 TFLOP/s"
        and ours["met"] is False
        and "goal" not in rows["torch._grouped_mm: E16 H32 I16 K2 forward"]
    )
    assert ours["tflops"] * 26e9 == pytest.approx(9 * 2 * 18 * 32 * 16)


def test_hyper_connections_and_muon(train):
    rows = measure(train, "hyper")
    assert len(rows) == 4 and all(row["goal"] == 1.5 for row in rows.values())
    works = train.kernels.site_works(train.settings.Setting(None, train.settings.config_of("flash"), None), 1, 24)
    assert [work.bytes / 1024 for work in works] == [80, 120]
    row = measure(train, "muon")["Newton-Schulz of 6 x 9"]
    assert row["tflops"] * 26e9 == pytest.approx(2 * 10 * (4 * 36 * 9 + 2 * 216)) and not row["met"]


def test_a_step_and_where_its_time_goes(train):
    rows = measure(train, "step")
    name = "documents of up to 5"
    shares = {row: rows[row]["percent_of_step"] for row in rows if row.startswith("  step")}
    assert shares == pytest.approx(
        {"  step: cuBLAS's products": 38.46, "  step: experts": 19.23, "  step: no kernel": 42.31}, abs=0.01
    )
    assert rows[name]["tokens_a_second"] == 346 and {f"{name}, Muon", "one document"} < rows.keys()
    assert rows["transformers, one document"]["over_ours"] == 1.0


def test_goals_of_a_step(train, monkeypatch):
    for rate, most, met in ((300, 1.0, True), (400, 1.0, False), (300, 0.1, False)):
        monkeypatch.setattr(train.step, "RATES", {9: rate})
        monkeypatch.setattr(train.step, "MEMORY", {9: most})
        monkeypatch.setattr(train.step.Trainer, "step", lambda trainer: None)
        tokens, model = torch.arange(9), train.step.ours(train.setting)
        row = next(train.step._ours(train.setting, "x", model, tokens, [9]))
        assert row["met"] is met, (rate, most)


@pytest.mark.parametrize("muon", [False, True])
def test_a_step_updates_masters_and_copies_them(train, muon):
    model = train.step.ours(train.setting)
    trainer = train.step.Trainer(model, lambda: sum(p.float().square().sum() for p in model.parameters()), muon)
    before = {name: master.clone() for name, master in trainer.masters.by_name.items()}
    trainer.step()
    for name, master in trainer.masters.by_name.items():
        torch.testing.assert_close(trainer.weights[name], master.to(trainer.weights[name].dtype), rtol=0, atol=0)
        assert (master != before[name]).any() or not before[name].any(), name
    if muon:
        momenta = {id(p) for p, state in trainer.optimizer.state.items() if "momentum" in state}
        left = {name for name, p in trainer.masters.by_name.items() if id(p) not in momenta and p.ndim >= 2}
        assert {name.rpartition("layers.0.")[2] for name in left} == {
            "model.embed_tokens.weight", "lm_head.weight", "self_attn.compressor.position_bias",
        }  # fmt: skip


def test_transformers_step_is_of_the_same_loss(train):
    model, tokens = train.step.ours(train.setting), torch.arange(9) * 7 % 80
    theirs = train.step.theirs(train.setting, model)
    expected = theirs(tokens.unsqueeze(0), labels=tokens.unsqueeze(0), use_cache=False).loss
    found = train.step.packed_loss(model, tokens, [9])() * 9 / 8
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_the_layer_beside_ours_is_the_same_layer(train):
    rows = measure(train, "layer")
    assert rows.keys() == {"sliding", "CSA", "HCA"} and all(row["faster"] == 1.0 for row in rows.values())
    config = train.setting.flash
    sizes = train.layer.attention_kernels.Setting(config, train.setting.ceilings, device="cpu")
    block = train.layer.random_block(train.setting, config, tiny.HCA)
    layer = train.layer.eager_layer(train.setting, config, tiny.HCA, block)
    streams = train.setting.random(9, config.hc_mult, config.hidden_size)
    with torch.no_grad():
        new, update, *_ = block(streams, None, torch.zeros(9, dtype=torch.int64), sizes.document(9), None, None)
        found = layer(streams.unsqueeze(0), **train.layer.attention_blocks.eager_inputs(sizes, 9))[0]
    expected = expand(new, *update)
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def test_the_model_of_the_step(train):
    config = train.settings.model_config()
    with torch.device("meta"):
        assert sum(p.numel() for p in DeepseekV4(config).parameters()) == pytest.approx(729e6, rel=1e-3)
    numbers = 12 * (32 * 1024 + 5 * 3 * 1024 * 512 + 2 * 24 * 4096) + 4 * 4096 + 32768 * 1024
    assert train.step.numbers_of(config) == numbers
    without_attention = 6 * 8192 * numbers
    flop = train.step.model_flop(config, [8192])
    assert 1.2 * without_attention < flop < 1.6 * without_attention < 1.01 * 1.6 / 1.2 * flop
    assert train.step.lengths_of(11, 4) == [4, 2, 1, 1, 3] and sum(train.step.lengths_of(8192, 2048)) == 8192


def test_kernels_have_groups(train):
    groups = train.step.kernel_groups()
    assert groups["_rows_times_weights"] == "experts" and groups["_linear"] == "row-invariant products"
    found = [train.step.group_of(name, groups) for name in ("nvjet_tst_64x8", "Memcpy DtoD", "vectorized_mul")]
    assert found == ["cuBLAS's products", "copies, casts, fills", "PyTorch's other kernels"]


def test_what_waits_is_named(train, monkeypatch):
    parts = iter(["forward", "backward", "update"])

    @contextmanager
    def no_waits():
        yield
        if next(parts) == "backward":
            raise RuntimeError("called a synchronizing CUDA operation\nmore")

    monkeypatch.setattr(train.gpu, "no_waits", no_waits)
    rows = measure(train, "waits")
    assert [row["met"] for row in rows.values()] == [True, False, True]
    assert rows["backward"]["waits"] == "called a synchronizing CUDA operation"


def test_bits_and_curves(train):
    rows = measure(train, "bits")
    assert [name for name, row in rows.items() if row["differing"]] == []
    assert rows["alone"]["numbers"] == 8 * 33 and rows["gradients in 2 runs"]["numbers"] > 10_000
    (row,) = measure(train, "curves").values()
    assert row["largest_difference"] < 0.1 and len(row["kernels"]) == len(row["reference"]) == 1


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_trace_is_read(train, monkeypatch):
    """Here without a device: it has no kernels."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert train.gpu.kernel_times(lambda: torch.ones(3) + 1) == []
