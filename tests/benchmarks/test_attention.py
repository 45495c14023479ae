"""The benchmark of attention: floors by hand, every part on tiny shapes in Triton's interpreter, its table and file."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from .. import tiny
from ..kernels import naive

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FLASH = {"heads": 64, "dim": 512, "window": 128}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The benchmark's modules, with times and bytes that need no GPU."""
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import attention  # pyright: ignore[reportMissingImports]
    import attention_blocks  # pyright: ignore[reportMissingImports]
    import attention_floors  # pyright: ignore[reportMissingImports]
    import attention_kernels  # pyright: ignore[reportMissingImports]
    import attention_peers  # pyright: ignore[reportMissingImports]
    import floors  # pyright: ignore[reportMissingImports]
    import gpu  # pyright: ignore[reportMissingImports]
    import parts  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(gpu, "milliseconds", lambda run, rep=60: (run(), 2.0)[1])
    monkeypatch.setattr(gpu, "extra_bytes", lambda run: 2**20)
    monkeypatch.setattr(gpu, "captured", lambda run: run)
    return SimpleNamespace(
        command=attention, blocks=attention_blocks, floors=floors, attention=attention_floors,
        kernels=attention_kernels, peers=attention_peers, gpu=gpu, parts=parts,
        measure=lambda name, setting: parts.measure(attention.PARTS[name], setting),
    )  # fmt: skip


@pytest.fixture
def setting(bench: SimpleNamespace):
    """CSA chooses 3 entries of up to 5."""
    rates = {tiny.CSA: 4, tiny.HCA: 7}
    config = tiny.config(**tiny.FUSED, hidden_size=32, sliding_window=6, index_topk=3, compress_rates=rates)
    return bench.kernels.Setting(
        config, bench.floors.Ceilings(798, 3000, 5500), sizes=(17,), rows=(1, 3), passes=17, eager=(17,), context=32,
        device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "ratio", "topk", "mean", "forward", "times", "backward", "back_times"),
    [  # mean keys, GFLOP, ms by compute, memory, gather; each worked out by hand from the formulas at V4-Flash's sizes
        (4096, 0, None, 126, 68, (0.085, 0.180, 0.096), 169, (0.21, 0.36)),
        (4096, 4, 512, 510, 274, (0.343, 0.181, 0.389), 684, (0.86, 0.36)),
        (4096, 128, None, 142, 76, (0.095, 0.180, 0.108), 190, (0.24, 0.36)),
        (16384, 4, 512, 607, 1305, (1.64, 0.72, 1.85), 3261, (4.09, 1.45)),
        (65536, 4, 512, 632, 5428, (6.80, 2.89, 7.71), 13569, (17.0, 5.78)),
        (65536, 128, None, 383, 3293, (4.13, 2.89, 4.68), 8233, (10.3, 5.77)),
    ],
)
def test_floors_of_attention(bench, tokens, ratio, topk, mean, forward, times, backward, back_times):
    ceilings = bench.floors.Ceilings(798, 3000, 5500)
    assert round(bench.attention.keys_seen(tokens, 128, ratio, topk) / tokens) == mean
    work = bench.attention.attention(tokens, **FLASH, ratio=ratio, topk=topk)
    back = bench.attention.attention_backward(tokens, **FLASH, ratio=ratio, topk=topk)
    assert (round(work.flop / 1e9), round(back.flop / 1e9)) == (forward, backward)
    assert list(work.times(ceilings).values()) == pytest.approx(times, rel=0.01)
    assert work.floor(ceilings) == pytest.approx(max(times), rel=0.01)
    assert list(back.times(ceilings).values())[:2] == pytest.approx(back_times, rel=0.01)


def test_floors_of_the_indexer_and_of_products(bench):
    floors, ceilings = bench.floors, bench.floors.Ceilings(798, 3000, 5500)
    for tokens, gflop, ms in ((4096, 34, 0.043), (16384, 550, 0.69), (65536, 8796, 11.0)):
        work = bench.attention.indexer(tokens, 64, 128, 4, 512)
        assert round(work.flop / 1e9) == gflop and work.floor(ceilings) == pytest.approx(ms, rel=0.01)
    assert floors.product(4096, 1024, 32768).floor(ceilings) == pytest.approx(0.344, rel=0.01)
    assert floors.product(4096, 4096, 1024, groups=8).floor(ceilings) == pytest.approx(0.344, rel=0.01)
    one = floors.product(1, 8192, 4096)  # the weight has to be read
    assert one.bytes == 2 * (8192 + 8192 * 4096 + 4096) and one.floor(ceilings) == one.times(ceilings)["memory"]
    assert floors.product(64, 16, 32, out_bytes=4, passes=3) == floors.Work(3 * 2**16, 3 * (2 * 1536 + 4 * 2048))


def test_a_row_says_rates_and_whether_its_goal_is_met(bench):
    floors = bench.floors
    works, ceilings = [floors.Work(8e9, 4e6, 0), floors.Work(0, 30e6, 0)], floors.Ceilings(800, 3000, 5500)
    found = floors.row("x", 5, 0.04, works, ceilings, 1.9)
    assert [found[key] for key in ("tflops", "gbs", "floor_ms", "ratio")] == pytest.approx([200, 850, 0.02, 2.0])
    assert (found["met"], floors.row("x", 5, 0.04, works, ceilings, 2.1)["met"]) == (False, True)
    assert floors.row("x", 5, 1.0, works[:1], ceilings)["bound"] == "compute"
    assert floors.row("x", 5, 1.0, works[1:], ceilings)["tflops"] is None and "ratio_without_gather" not in found
    gathers = floors.row("x", 5, 0.04, [floors.Work(8e9, 4e6, 110e6)], ceilings)
    assert [gathers[key] for key in ("ratio", "ratio_without_gather")] == pytest.approx([2.0, 4.0])
    assert gathers["bound"] == "gather"


def test_ceilings_are_rates(bench, monkeypatch):
    found = bench.gpu.ceilings("cpu", side=64, copied=2**12, programs=2)
    assert found == bench.floors.Ceilings(2 * 64**3 / 2e9, 2**13 / 2e6, 2 * 64 * 32 * 1024 / 2e6)
    pool, index = torch.randn(9, 16).bfloat16(), torch.randint(9, (3 * 2 * 4,), dtype=torch.int32)
    expected = pool[index.long()].float().view(3, 8, 16).sum(1)
    torch.testing.assert_close(bench.gpu.gather(pool, index, 3, rows=4), expected)


def test_the_choice_is_of_complete_entries_and_rises(bench):
    seen = naive.layout([21], 6, 4).seen(4)
    for row, position in zip(bench.kernels.random_choice(seen, 3, chunk=4).tolist(), range(21), strict=True):
        count = min((position + 1) // 4, 3)
        assert row[:count] == sorted(set(row[:count])) and row[count:] == [-1] * (3 - count)
        assert all(0 <= n < (position + 1) // 4 for n in row[:count])


def test_every_part_measures_what_it_says(bench, setting, capsys):
    found = {
        name: bench.measure(name, setting)
        for name in bench.command.PARTS
        if name != "accuracy" and not hasattr(bench.peers, name)  # test_attention_accuracy.py, and below
    }
    assert not any("error" in part for part in found.values())
    rows = {name: part["rows"] for name, part in found.items()}
    assert {name: len(some) for name, some in rows.items()} == {
        "attention": 7, "indexer": 2, "projections": 30, "passes": 14, "blocks": 3, "decode": 6,
    }  # fmt: skip
    assert {row["name"] for row in rows["attention"]} >= {"CSA forward + backward, atomic", "HCA forward"}
    for row in rows["blocks"]:
        assert row["eager_ms"] == 2.0 and row["extra_gib"] == 2**-10
    assert json.dumps(found, allow_nan=False)
    out = capsys.readouterr().out
    assert "over cuBLAS" not in out and "x cuBLAS" in out


@pytest.mark.parametrize("kind", ["sliding", "CSA", "HCA"])
def test_the_block_beside_ours_is_the_same_block(bench, setting, kind):
    """Equal outputs: the weights, mask, positions and rotations that transformers' block gets are ours."""
    ours = bench.blocks.block(setting, kind)
    theirs = bench.blocks.eager(setting, kind, ours)
    x = setting.random(13, setting.config.hidden_size)  # so short that CSA sees all, whatever the indexer's rounding
    expected = ours(x, setting.document(13))[0]
    found = theirs(x.unsqueeze(0), **bench.blocks.eager_inputs(setting, 13))[0][0]
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def test_what_does_not_fit_is_said(bench, setting, monkeypatch):
    def full(run):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench.gpu, "extra_bytes", full)
    monkeypatch.setattr(bench.blocks, "KINDS", {"sliding": tiny.SWA})
    rows = bench.measure("blocks", setting)["rows"]
    assert rows[0] == {"name": "sliding", "tokens": 17, "failed": "out of memory"} and len(rows) == 1
    assert bench.parts.told(rows[0], "ms") == "out of memory"
    assert bench.parts.told({"eager": "out of memory"}, "eager_ms") == "out of memory"


def test_ten_times_faster_is_a_goal_at_8192_tokens(bench):
    assert bench.blocks.beside(2.0, 8192, (19.0, 2**30)) == {
        "eager_ms": 19.0, "eager_gib": 1.0, "faster": 9.5, "goal": 10.0, "met": False,
    }  # fmt: skip
    assert "goal" not in bench.blocks.beside(2.0, 4096, (19.0, 2**30))


def test_a_decoding_step_reads_its_weights_and_cache(bench, setting):
    """At 32 tokens: HCA reads its 4 entries, CSA 3 chosen of 8 and all 8 index keys; tails are fp32."""
    for kind, cached in (
        ("sliding", 6 * 16 * 2),
        ("HCA", 6 * 16 * 2 + 4 * 16 * 2 + 2 * 7 * 16 * 4),
        ("CSA", 6 * 16 * 2 + 3 * 16 * 2 + 8 * 16 * 2 + 2 * 8 * (32 + 32) * 4),
    ):
        made = bench.blocks.block(setting, kind)
        cache, step = bench.blocks.filled_cache(setting, made)
        weights = sum(p.numel() * p.element_size() for p in made.parameters())
        assert bench.blocks.decode_bytes(setting, kind, made, cache) == weights + cached
        assert step().shape == (1, 32) and all(bool(t[-1, :-1].any(-1).all()) for t in cache.values())


def test_memory_that_grows_too_fast_shows(bench):
    rows = [{"name": "CSA", "tokens": n, "extra_gib": n**1.5} for n in (4, 8, 64)]
    assert bench.blocks.growth([*rows, {"name": "HCA", "tokens": 4, "failed": "x"}]) == pytest.approx({"CSA": 1.5})


def sparse(q, keys, sinks, numbers):
    """q [T, H, D], keys [N, D], numbers [T, K]; what is below 0 counts as none."""
    rows = []
    for t in range(len(q)):
        values = keys[numbers[t][numbers[t] >= 0].long()].float()
        scores = torch.cat([q[t].float() @ values.t() * q.shape[2] ** -0.5, sinks.unsqueeze(1)], 1)
        rows.append(scores.softmax(1)[:, :-1] @ values)
    return torch.stack(rows).to(q.dtype)


@pytest.mark.parametrize("wrong", [False, True])
def test_flashmla_gets_the_same_attention(bench, setting, monkeypatch, wrong):
    """Its operator, written here from its documentation, gives what ours gives."""
    with torch.library._scoped_library("_flashmla_C", "DEF") as library:
        arguments = "Tensor q, Tensor kv, Tensor i, float s, int d, Tensor? a, Tensor? n, Tensor? o"
        library.define(f"sparse_prefill_fwd({arguments}) -> Tensor[]")

        def operator(q, keys, numbers, scale, dim, sinks, lengths, out):
            assert (scale, dim, out) == (0.25, 16, None)
            past = torch.arange(numbers.shape[2]) >= lengths.unsqueeze(1) - int(wrong)
            return [sparse(q, keys[:, 0], sinks, numbers[:, 0].masked_fill(past, -1))]

        library.impl("sparse_prefill_fwd", operator, "CPU")
        monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
        rows = bench.measure("flashmla", setting)["rows"]
    assert [row["tokens"] for row in rows] == [17] and all((row["difference"] < 0.02) != wrong for row in rows)


def test_veomni_gets_the_same_attention(bench, setting, monkeypatch):
    """Values, and the queries' gradients."""

    def attention(q, keys, sinks, numbers):
        return sparse(q[0], keys[0], sinks, numbers[0]).unsqueeze(0)

    monkeypatch.setitem(sys.modules, "veomni", SimpleNamespace())
    for name in ("veomni.ops", "veomni.ops.kernels"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    kernels = SimpleNamespace(sparse_attn_tilelang=attention)
    monkeypatch.setitem(sys.modules, "veomni.ops.kernels.deepseek_v4", kernels)
    rows = bench.measure("veomni", setting)["rows"]
    assert [row["tokens"] for row in rows] == [17, 17] and all(row["difference"] < 0.02 for row in rows)


def test_peers_that_are_not_there_are_named(bench, setting, monkeypatch):
    assert bench.peers.missing("attention", setting) is None
    assert bench.peers.missing("flashmla", setting) == "no --flashmla: the library that vLLM ships was not given"
    monkeypatch.setattr(bench.peers, "find_spec", lambda name: name == "veomni" or None)
    assert bench.peers.missing("veomni", setting) == "veomni and tilelang are not installed"
    monkeypatch.setattr(bench.peers, "find_spec", lambda name: name)
    assert bench.peers.missing("veomni", setting) is None


MACHINE = {"source": "0a", "gpu": "H100", "cuda": "13.0", "versions": {"torch": "2.11"}, "date": "1"}


@pytest.fixture
def results(bench, monkeypatch, tmp_path) -> Path:
    """The command with two parts of its own, on a machine with a GPU."""
    import results  # pyright: ignore[reportMissingImports]

    def broken(setting):
        yield {"name": "first", "tokens": 1, "ms": 3.0}
        raise ValueError("no such kernel")

    for module in (results, bench.parts):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    good = {"name": "x", "tokens": 8, "ms": 1.0, "ratio": 1.5, "goal": 1.6, "met": True}
    monkeypatch.setattr(bench.command, "PARTS", {"a": lambda s: iter([good]), "b": broken, "flashmla": broken})
    monkeypatch.setattr(bench.gpu, "where", lambda: dict(MACHINE))
    monkeypatch.setattr(bench.gpu, "ceilings", lambda: bench.floors.Ceilings(1, 2, 3))
    monkeypatch.delenv("AMALGAM_KERNELS")
    return tmp_path / "attention.json"


def run(bench, monkeypatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["attention.py", *options])
    return bench.command.main()


def test_parts_of_one_source_and_machine_share_a_file(bench, monkeypatch, results, capsys):
    assert run(bench, monkeypatch, "--only", "a") == 0
    assert run(bench, monkeypatch, "--only", "b,flashmla") == 1
    out = capsys.readouterr().out
    assert "flashmla: not run: no --flashmla" in out and "failed: b: ValueError: no such kernel" in out
    file = json.loads(results.read_bytes())
    assert list(file["parts"]) == ["a", "b", "flashmla"]
    assert file["parts"]["flashmla"]["not_run"].startswith("no --flashmla")
    assert file["parts"]["a"]["ceilings"] == {"tflops": 1, "copy_gbs": 2, "gather_gbs": 3}
    assert [row["name"] for row in file["parts"]["b"]["rows"]] == ["first"]
    monkeypatch.setattr(bench.gpu, "where", lambda: MACHINE | {"source": "0b", "date": "2"})
    assert run(bench, monkeypatch, "--only", "a") == 0
    assert list(json.loads(results.read_bytes())["parts"]) == ["a"] and "are dropped" in capsys.readouterr().out


def test_wrong_options_are_refused(bench, monkeypatch, results, capsys):
    with pytest.raises(SystemExit):
        run(bench, monkeypatch, "--only", "a,c")
    monkeypatch.setenv("AMALGAM_KERNELS", "reference")
    with pytest.raises(SystemExit):
        run(bench, monkeypatch)
    err = capsys.readouterr().err
    assert "--only: c: want some of a, b, flashmla" in err and "AMALGAM_KERNELS is set" in err


def test_cells(bench):
    told = bench.parts.told
    assert [told({"ms": ms}, "ms") for ms in (1234.5, 123.45, 1.23456, 1e-5)] == ["1,234", "123.5", "1.235", "1.0e-05"]
    assert [told({"goal": 1.6, "met": met}, "goal") for met in (True, False)] == ["1.6 met", "1.6 MISSED"]
    assert (told({"tokens": 4096}, "tokens"), told({"bound": "gather"}, "bound"), told({}, "ratio")) == (
        "4,096", "gather", "-",
    )  # fmt: skip


def test_the_source_s_digest_follows_the_source(bench, monkeypatch, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("1")
    monkeypatch.setattr(bench.gpu, "ROOT", tmp_path)
    first = bench.gpu.source()
    (tmp_path / "kernels" / "a.py").write_text("2")
    assert bench.gpu.source() != first and len(first) == 12
