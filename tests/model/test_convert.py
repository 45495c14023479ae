"""Conversions: untouched tensors keep every bit, a cut-off conversion goes on, what is refused is refused at once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amalgam.errors import UserError
from amalgam.kernels.formats import dequantize_fp4, dequantize_fp8, quantize_fp4, quantize_fp8
from amalgam.model import convert as convert_module
from amalgam.model.checkpoint import cast, load, save
from amalgam.model.config import config_of, weights_of
from amalgam.model.convert import JOURNAL, convert
from amalgam.model.source import Checkpoint

from .. import tiny
from . import official

SHARD = 300_000
INDEX = "model.safetensors.index.json"


def raw(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t.clone() for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Names, dtypes, shapes and every bit."""
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype
        and tensor.shape == other[name].shape
        and tensor.contiguous().view(torch.uint8).equal(other[name].contiguous().view(torch.uint8))
        for name, tensor in one.items()
    )


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official.checkpoint(tmp_path_factory.mktemp("official") / "flash")


# ---- round trips


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_official_to_transformers_and_back_keeps_every_bit(tmp_path: Path, experts):
    """All 256 bytes of codes; of FP4 all 255 scales, of FP8 what its few tiles hold."""
    source = official.checkpoint(tmp_path / "source", experts=experts, wild=True)
    codes = {name: t for name, t in raw(source).items() if name.endswith((".w1.weight", ".w2.weight"))}
    scales = {name: t for name, t in raw(source).items() if name.endswith(".scale")}
    assert len(torch.cat([t.view(torch.uint8).flatten() for t in codes.values()]).unique()) == 256
    kinds = len(torch.cat([t.view(torch.uint8).flatten() for t in scales.values()]).unique())
    assert kinds == 255 if experts == "fp4" else kinds > 100
    there = convert(source, tmp_path / "there", "transformers", experts, shard_bytes=SHARD).folder
    stored = raw(there)
    stack = torch.stack([raw(source)[f"layers.1.ffn.experts.{e}.w3.weight"].view(torch.uint8) for e in range(3)])
    assert stored["model.layers.1.mlp.experts.gate_up_proj"].view(torch.uint8)[:, official.INNER :].equal(stack)
    assert weights_of(there) == experts and config_of(there).to_dict() == config_of(source).to_dict()
    back = convert(there, tmp_path / "back", "official", experts, shard_bytes=SHARD).folder
    assert same(raw(back), raw(source))
    assert config_of(back).to_dict() == config_of(source).to_dict()
    config = official.CONFIG | {"expert_dtype": "fp4"} if experts == "fp4" else official.CONFIG
    written = json.loads((back / "config.json").read_text())
    assert {key: written[key] for key in config} == config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_to_official_and_back(tmp_path: Path, dtype):
    """In BF16 every bit; FP32 is rounded once, but for what V4 keeps in FP32."""
    model = cast(tiny.model(0, compress_rates={tiny.CSA: 4, tiny.HCA: 7}), dtype)
    save(model, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "official", "official", "bf16", shard_bytes=20_000)
    convert(tmp_path / "official", tmp_path / "back", "transformers", "bf16")
    rounded = cast(load(tmp_path / "ours"), torch.bfloat16).state_dict()
    assert same(raw(tmp_path / "back"), rounded)
    assert "layers.2.attn.compressor.ape" in raw(tmp_path / "official")


@pytest.mark.parametrize("format", ["transformers", "official"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8", "fp4"])
def test_all_six_targets_hold_the_same_numbers(tmp_path: Path, flash: Path, format, dtype):
    """FP4 to FP8 to BF16 loses nothing here, so every one of them loads as the source does."""
    done = convert(flash, tmp_path / "there", format, dtype, shard_bytes=SHARD)
    assert done.shards > 2 and weights_of(done.folder) == dtype
    assert same(load(done.folder).state_dict(), load(flash).state_dict())
    assert {name for name in Checkpoint(done.folder).specs if name.startswith("mtp.")}
    kinds = {str(tensor.dtype) for tensor in raw(done.folder).values()} - {"torch.float32", "torch.int64"}
    quantized = {"fp8": {"torch.float8_e4m3fn"}, "fp4": {"torch.float8_e4m3fn", "torch.int8"}}.get(dtype, set())
    assert kinds == quantized | ({"torch.float8_e8m0fnu"} if quantized else set()) | {"torch.bfloat16"}


def test_quantized_only_where_asked_and_by_the_rules(tmp_path: Path):
    save(tiny.model(0, hidden_size=160, moe_intermediate_size=64), tmp_path / "ours")
    stored, rounded = raw(tmp_path / "ours"), 0
    convert(tmp_path / "ours", tmp_path / "fp4", "official", "fp4")
    fp8 = ("q_a_proj", "q_b_proj", "self_attn.kv_proj", "o_a_proj", "o_b_proj", "shared_experts")
    as_stored = ("norm.weight", "sinks", "position_bias", "_hc.", "hc_head", "correction_bias", "tid2eid")
    for name, tensor in load(tmp_path / "fp4").state_dict().items():
        if ".mlp.experts." in name:
            expected = dequantize_fp4(*quantize_fp4(stored[name]))
        elif any(part in name for part in fp8):
            expected = dequantize_fp8(*quantize_fp8(stored[name]))
        elif any(part in name for part in as_stored):
            expected = stored[name]
        else:
            expected = stored[name].bfloat16().float()
            rounded += 1
        assert torch.equal(tensor, expected), name


def test_steps_do_not_show(tmp_path: Path, flash: Path, monkeypatch: pytest.MonkeyPatch):
    """Converted 128 rows at a time: the same files."""
    convert(flash, tmp_path / "whole", "transformers", "bf16")
    convert(tmp_path / "whole", tmp_path / "whole4", "official", "fp4")
    monkeypatch.setattr("amalgam.model.source._STEP", 1)
    monkeypatch.setattr("amalgam.model.shards.PIECE", 1000)
    convert(flash, tmp_path / "steps", "transformers", "bf16")
    convert(tmp_path / "steps", tmp_path / "steps4", "official", "fp4")
    for one, other in (("whole", "steps"), ("whole4", "steps4")):
        assert same(raw(tmp_path / one), raw(tmp_path / other))


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "fp4"])
def test_save_writes_what_convert_writes(tmp_path: Path, dtype):
    model = tiny.model(0, hidden_size=160, moe_intermediate_size=64, compress_rates={tiny.CSA: 4, tiny.HCA: 7})
    save(model, tmp_path / "ours")
    for format in ("transformers", "official"):
        convert(tmp_path / "ours", tmp_path / f"{format} converted", format, dtype, shard_bytes=SHARD)
        save(model, tmp_path / format, format, dtype, shard_bytes=SHARD)
        assert same(raw(tmp_path / format), raw(tmp_path / f"{format} converted"))
        assert (tmp_path / format / "config.json").read_text() == (
            tmp_path / f"{format} converted" / "config.json"
        ).read_text()
        load(tmp_path / format)


def test_tensors_are_aligned(tmp_path: Path, flash: Path):
    for file in convert(flash, tmp_path / "there", "transformers", "fp4").folder.glob("*.safetensors"):
        size = int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8 : 8 + size])
        widths = {"F32": 4, "BF16": 2, "I64": 8}
        for name, info in header.items():
            if name != "__metadata__":
                assert (8 + size + info["data_offsets"][0]) % widths.get(info["dtype"], 1) == 0


def test_tokenizer_and_encoding_travel(tmp_path: Path):
    source = tiny.checkpoint(tmp_path / "source", 0)
    (source / "encoding").mkdir()
    (source / "encoding" / "encoding_dsv4.py").write_text("# as published")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    convert(source, tmp_path / "there", "official", "bf16")
    found = {str(path.relative_to(tmp_path / "there")) for path in (tmp_path / "there").rglob("*") if path.is_file()}
    beside = {"tokenizer.json", "tokenizer_config.json", "encoding.json", "encoding/encoding_dsv4.py"}
    assert found == beside | {"config.json", "model.safetensors", JOURNAL}


# ---- cut off, and again


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", [1, 2, 3, 4, 7, 12])
def test_the_same_command_goes_on(tmp_path: Path, flash: Path, monkeypatch: pytest.MonkeyPatch, call: int):
    """Stopped before any of its renames: finished shards stay as they are, and the result is that of one run."""
    whole = convert(flash, tmp_path / "whole", "transformers", "fp8", shard_bytes=SHARD)
    calls, rename = [], convert_module.os.rename

    def killed(*names):
        calls.append(names)
        if len(calls) == call:
            raise Killed
        rename(*names)

    with monkeypatch.context() as patch:
        patch.setattr(convert_module.os, "rename", killed)
        with pytest.raises(Killed):
            convert(flash, tmp_path / "there", "transformers", "fp8", shard_bytes=SHARD)
    there = tmp_path / "there"
    assert not (there / "config.json").exists()
    with pytest.raises(UserError, match="neither a checkpoint"):
        load(there)
    journal = json.loads((there / JOURNAL).read_text()) if call > 1 else {"shards": {}}
    before = {name: (there / name).stat().st_mtime_ns for name in journal["shards"]}
    done = convert(flash, there, "transformers", "fp8", shard_bytes=SHARD)
    assert (done.kept, done.shards, done.nbytes) == (len(before), whole.shards, whole.nbytes)
    assert before == {name: (there / name).stat().st_mtime_ns for name in before}
    names = {path.name for path in there.iterdir()}
    assert names == {path.name for path in (tmp_path / "whole").iterdir()}
    for name in names - {JOURNAL}:
        assert (there / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    again = convert(flash, there, "transformers", "fp8", shard_bytes=SHARD)
    assert again.kept == again.shards == whole.shards


def test_a_shard_that_was_lost_or_cut_is_written_again(tmp_path: Path, flash: Path):
    done = convert(flash, tmp_path / "there", "official", "bf16", shard_bytes=SHARD)
    first, second, *_ = sorted(done.folder.glob("*.safetensors"))
    whole = raw(done.folder)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    assert convert(flash, done.folder, "official", "bf16", shard_bytes=SHARD).kept == done.shards - 2
    assert same(raw(done.folder), whole)


def test_what_the_disk_gives_back_is_compared(tmp_path: Path, flash: Path, monkeypatch: pytest.MonkeyPatch):
    write_file = convert_module.write_file

    def faulty(file, tensors, data):
        digest = write_file(file, tensors, data)
        with file.open("r+b") as stream:
            stream.seek(-1, 2)
            last = stream.read(1)
            stream.seek(-1, 2)
            stream.write(bytes([last[0] ^ 1]))
        return digest

    monkeypatch.setattr(convert_module, "write_file", faulty)
    with pytest.raises(UserError, match="what was read is not what was written"):
        convert(flash, tmp_path / "there", "official", "fp4")
    assert not list((tmp_path / "there").glob("model*"))


# ---- refused


def touch(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    save_file(load_file(file), file)


OTHER: dict[str, tuple[Callable, str]] = {
    "format": (
        lambda s, t: convert(s, t, "official", "fp8", shard_bytes=SHARD),
        "format was transformers, not official",
    ),
    "dtype": (lambda s, t: convert(s, t, "transformers", "fp4", shard_bytes=SHARD), "dtype was fp8, not fp4"),
    "source": (
        lambda s, t: convert(shutil.copytree(s, s.with_name("c")), t, "transformers", "fp8", shard_bytes=SHARD),
        "source was .*/source, not .*/c",
    ),
    "changed source": (
        lambda s, t: [touch(s), convert(s, t, "transformers", "fp8", shard_bytes=SHARD)],
        "the source's files have changed",
    ),
    "damaged journal": (
        lambda s, t: [(t / JOURNAL).write_text("{}"), convert(s, t, "transformers", "fp8")],
        f"{JOURNAL}: damaged; remove",
    ),
}


@pytest.mark.parametrize("case", list(OTHER))
def test_another_conversion_in_the_same_folder_is_refused(tmp_path: Path, flash: Path, case: str):
    source = Path(shutil.copytree(flash, tmp_path / "source"))
    convert(source, tmp_path / "there", "transformers", "fp8", shard_bytes=SHARD)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "there").glob("*.safetensors")}
    other, message = OTHER[case]
    with pytest.raises(UserError, match=message):
        other(source, tmp_path / "there")
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "there").glob("*.safetensors")}


def test_a_folder_that_holds_something_is_refused(tmp_path: Path, flash: Path):
    with pytest.raises(UserError, match="flash: holds config.json already"):
        convert(flash, flash, "official", "fp4")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: "):
        convert(flash, tmp_path / "file", "official", "fp4")


def test_two_at_once_are_refused(tmp_path: Path, flash: Path):
    class Tried(Exception):
        pass

    def again(done: int, total: int) -> None:
        with pytest.raises(UserError, match="another conversion is writing there"):
            convert(flash, tmp_path / "there", "official", "fp4")
        raise Tried

    with pytest.raises(Tried):
        convert(flash, tmp_path / "there", "official", "fp4", progress=again)
    convert(flash, tmp_path / "there", "official", "fp4")


def spoiled(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            save_file(tensors | {name: change(tensors[name])}, file)
    return folder


def with_code(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(scales: torch.Tensor) -> torch.Tensor:
        codes = scales.clone().view(torch.uint8)
        codes[0, 0] = value
        return codes.view(scales.dtype)

    return change


@pytest.mark.parametrize(
    ("name", "code", "dtype", "message"),
    [
        ("layers.1.attn.wq_a.scale", 255, "fp4", "00003-.*: layers.1.attn.wq_a.scale: a scale is NaN"),
        ("layers.1.attn.wq_a.scale", 255, "bf16", "00003-.*: layers.1.attn.wq_a.weight: rows 0 to 96: .*NaN"),
        ("layers.1.attn.wq_a.scale", 254, "bf16", "00003-.*: layers.1.attn.wq_a.weight: rows 0 to 96: .*too large"),
        ("layers.1.ffn.experts.2.w2.scale", 255, "fp4", "00003-.*: layers.1.ffn.experts.2.w2.scale: a scale is NaN"),
        ("layers.1.ffn.experts.2.w2.scale", 200, "fp8", "00003-.*: layers.1.ffn.experts.2.w2.weight: .*without loss"),
    ],
)
def test_scales_that_cannot_be_converted(tmp_path: Path, name: str, code: int, dtype, message: str):
    """FP4 whose scales spread too far for FP8 is refused, not rounded."""
    source = spoiled(official.checkpoint(tmp_path / "source"), name, with_code(code))
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "there", "transformers", dtype)


def test_numbers_that_cannot_be_quantized(tmp_path: Path):
    source = tiny.checkpoint(tmp_path / "source", 0)
    spoiled(source, "model.layers.0.self_attn.q_a_proj.weight", lambda tensor: tensor.log())
    with pytest.raises(UserError, match="model.safetensors: model.layers.0.self_attn.q_a_proj.weight: .*NaN"):
        convert(source, tmp_path / "fp8", "official", "fp8")
    with pytest.raises(UserError, match="FP4 needs a multiple of 32 columns; this has 16"):
        convert(source, tmp_path / "fp4", "official", "fp4")
    source = tiny.checkpoint(tmp_path / "other", 0, compress_rates={tiny.CSA: 3, tiny.HCA: 7})
    with pytest.raises(UserError, match="the official config.json knows CSA with 4 only"):
        convert(source, tmp_path / "csa", "official", "bf16")
    assert not any((tmp_path / name).exists() for name in ("fp4", "csa"))


def test_no_room_on_the_disk(tmp_path: Path, flash: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 0, 10**6))
    with pytest.raises(UserError, match=r"there: needs 0.0 GB on the disk, 0.0 GB are free"):
        convert(flash, tmp_path / "there", "official", "bf16")
