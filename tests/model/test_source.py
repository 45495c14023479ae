"""Reading checkpoints of both formats: right numbers, only what is asked for, and one clear line for what is wrong."""

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from amalgam.errors import UserError
from amalgam.model import DeepseekV4, shards
from amalgam.model.checkpoint import cast, load, save, stream
from amalgam.model.source import Checkpoint, read_values

from .. import tiny
from . import official

INDEX = "model.safetensors.index.json"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official.checkpoint(tmp_path_factory.mktemp("official") / "flash")


def raw(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def without_mtp(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What transformers builds."""
    return {name: tensor for name, tensor in state.items() if not name.startswith("model.mtp.")}


def numbers(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """By definition, one element after another: float64."""
    if scale is None:
        return weight.double()
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in weight.shape), indexing="ij")
    if weight.dtype == torch.int8:
        codes = weight.view(torch.uint8)
        values = torch.stack([E2M1[(codes & 15).int()], E2M1[(codes >> 4).int()]], -1).flatten(1).double()
        return values * scale.double().repeat_interleave(32, 1)
    return weight.double() * scale.double()[rows // 128, columns // 128]


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_official_numbers(tmp_path: Path, experts: str):
    """Every tensor, tiles that are cut off and the MTP block's too."""
    folder = official.checkpoint(tmp_path / "model", seed=1, experts=experts)
    stored, checkpoint = raw(folder), Checkpoint(folder)
    for name, spec in checkpoint.specs.items():
        dtype = torch.int64 if spec.kind == "ids" else torch.float32
        ours = read_values(checkpoint, spec, slice(0, spec.shape[0]), dtype)
        assert torch.equal(ours.double(), numbers(stored[name], stored.get(spec.scale))), name
    seen = set(checkpoint.specs) | {spec.scale for spec in checkpoint.specs.values()}
    assert stored.keys() <= seen


def test_official_agrees_with_transformers(flash: Path):
    """All but what transformers cannot: FP8 whose last tile is cut off (it spreads the tiles evenly)."""
    theirs = AutoModelForCausalLM.from_pretrained(
        flash, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    ).float()
    ours = load(flash)
    state, mine = theirs.state_dict(), without_mtp(ours.state_dict())
    assert state.keys() == mine.keys()
    cut = {
        n
        for n, t in state.items()
        if t.dim() == 2 and any(s > 128 and s % 128 for s in t.shape) and "mlp.gate" not in n
    }
    for name, tensor in mine.items():
        assert torch.equal(tensor, state[name]) or name in cut, name
    theirs.load_state_dict(mine)
    tokens = torch.arange(150) * 37 % 512
    with torch.no_grad():
        expected = torch.log_softmax(theirs(tokens.unsqueeze(0)).logits[0], -1)
        found = torch.log_softmax(ours.logits(ours(tokens, torch.tensor([0, 150])).hidden), -1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_load_in_bf16_keeps_the_islands(flash: Path):
    model, full = load(flash, dtype=torch.bfloat16), load(flash)
    state = cast(full, torch.bfloat16).state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    made = {name: parameter.requires_grad for name, parameter in DeepseekV4(model.config).named_parameters()}
    assert made == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("shard_bytes", [50_000, 10**9])
def test_saved_shards_load_here_and_in_transformers(tmp_path: Path, shard_bytes: int):
    model = tiny.model(0)
    save(model, tmp_path / "model", shard_bytes=shard_bytes)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert (len(files) > 3) == (tmp_path / "model" / INDEX).exists() == (shard_bytes < 10**9)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).state_dict()
    ours = load(tmp_path / "model").state_dict()
    assert ours.keys() == theirs.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, ours[name]) and torch.equal(tensor, theirs[name])


@pytest.mark.parametrize(("made", "name"), [("in memory", "attn.norm"), ("loaded", "self_attn.compressor.norm")])
def test_what_transformers_saves_is_read(tmp_path: Path, made: str, name: str):
    """Its `save_pretrained` turns some names back into official ones, but not all; which ones depends."""
    save(tiny.model(0), tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    if made == "in memory":
        state = theirs.state_dict()
        theirs = AutoModelForCausalLM.from_config(theirs.config)
        theirs.load_state_dict(state)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert f"model.layers.1.{name}.weight" in raw(tmp_path / "theirs")
    ours = load(tmp_path / "theirs").state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours[name]), name


# ---- a rank's share


def test_a_rank_reads_only_what_it_owns(flash: Path, monkeypatch: pytest.MonkeyPatch):
    whole, checkpoint = load(flash).state_dict(), Checkpoint(flash)
    reads = []
    pread = os.preadv

    def counted(descriptor, buffers, offset):
        reads.append(sum(len(buffer) for buffer in buffers))
        return pread(descriptor, buffers, offset)

    monkeypatch.setattr(shards.os, "preadv", counted)
    wanted = {spec.stacked: torch.float32 for spec in checkpoint.specs.values() if spec.kind == "expert"}
    owned = dict(stream(checkpoint, wanted, experts=range(1, 3)))
    assert {name.rpartition(".")[2] for name in owned} == {"gate_up_proj", "down_proj"}
    for name, tensor in owned.items():
        if not name.startswith("model.mtp."):
            assert torch.equal(tensor, whole[name][1:3]), name
    mine = [spec for spec in checkpoint.specs.values() if spec.kind == "expert" and ".experts.0." not in spec.name]
    expected = sum(spec.shape[0] * (spec.shape[1] // 2 + spec.shape[1] // 32) for spec in mine)
    assert sum(reads) == expected


def test_loading_reads_each_byte_once_and_little_at_a_time(flash: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("amalgam.model.source._STEP", 128 * 160)
    sizes: dict[tuple[Path, int], int] = {}
    read = shards.Stored._bytes

    def counted(self, start, size):
        assert (self.file, self.offset + start) not in sizes
        sizes[self.file, self.offset + start] = size
        return read(self, start, size)

    monkeypatch.setattr(shards.Stored, "_bytes", counted)
    built = load(flash).state_dict().keys()
    names = {name for name, spec in Checkpoint(flash).specs.items() if spec.stacked in built}
    stored = raw(flash)
    wanted = sum(t.nbytes for n, t in stored.items() if n in names or n.removesuffix("scale") + "weight" in names)
    assert sum(sizes.values()) == wanted
    assert max(sizes.values()) <= 128 * 160 * 4


# ---- bad input


def edit(shard: int, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Changes a shard's tensors; the index follows."""

    def spoil(folder: Path) -> None:
        file = folder / f"model-{shard:05}-of-00006.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        index = json.loads((folder / INDEX).read_text())
        names = {name: f for name, f in index["weight_map"].items() if f != file.name}
        index["weight_map"] = names | dict.fromkeys(tensors, file.name)
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


def edit_json(name: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return spoil


def replace(name: str, tensor: torch.Tensor) -> Callable[[Path], object]:
    return edit(2, lambda tensors: tensors.update({name: tensor}))


def nan_scale(tensors: dict[str, torch.Tensor]) -> None:
    scales = tensors["layers.0.ffn.experts.1.w2.scale"].view(torch.uint8)
    scales[3, 1] = 255


def index_of(**changes: object) -> Callable[[Path], object]:
    return edit_json(INDEX, lambda index: index["weight_map"].update(changes))


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - size)


LAYER, SECOND = "layers.0", "model-00002-of-00006.safetensors"
WQ_A, W1 = f"{LAYER}.attn.wq_a", f"{LAYER}.ffn.experts.0.w1"
BAD = {
    "unknown tensor": (replace("layers.0.extra", torch.zeros(1)), rf"{SECOND}: layers.0.extra: not a tensor of this"),
    "missing tensor": (edit(2, lambda t: t.pop(f"{LAYER}.attn.attn_sink")), f"{INDEX}: layers.0.attn.attn_sink: mi"),
    "missing scales": (edit(2, lambda t: t.pop(f"{W1}.scale")), f"{W1}.weight: its scales, {W1}.scale, are missing"),
    "scales of nothing": (
        replace(f"{WQ_A}.weight", torch.zeros(96, 160, dtype=torch.bfloat16)),
        rf"{WQ_A}.scale: scales, but {WQ_A}.weight is BF16",
    ),
    "missing half of the MTP block": (edit(5, lambda t: t.pop("mtp.0.enorm.weight")), "mtp.0.enorm.weight: missing"),
    "missing router": (edit(2, lambda t: t.pop(f"{LAYER}.ffn.gate.weight")), f"{LAYER}.ffn.gate.weight: missing"),
    "twice": (
        replace("model.layers.0.input_layernorm.weight", torch.ones(160)),
        r"layers.0.\S+: the same tensor is there as \S+ in model-00002",
    ),
    "wrong shape": (replace(f"{LAYER}.attn.attn_sink", torch.zeros(5)), r"attn_sink: shape \[5\], .* asks for \[4\]"),
    "wrong shape of codes": (
        replace(f"{W1}.weight", torch.zeros(64, 160, dtype=torch.int8)),
        rf"{W1}.weight: shape \[64, 160\], config.json asks for \[64, 80\]",
    ),
    "wrong shape of scales": (
        replace(f"{WQ_A}.scale", torch.ones(2, 1).to(torch.float8_e8m0fnu)),
        rf"{WQ_A}.scale: shape \[2, 1\], config.json asks for \[1, 2\]",
    ),
    "wrong dtype": (replace(f"{LAYER}.ffn.gate.tid2eid", torch.zeros(512, 2)), "tid2eid: dtype F32; want I64 or I32"),
    "wrong dtype of scales": (replace(f"{WQ_A}.scale", torch.ones(1, 2)), f"{WQ_A}.scale: dtype F32; want F8_E8M0"),
    "unheard-of dtype": (replace(f"{LAYER}.attn.attn_sink", torch.zeros(4).double()), "attn_sink: dtype F64; want one"),
    "NaN scale": (edit(2, nan_scale), rf"{SECOND}: layers.0.ffn.experts.1.w2.weight: .*NaN"),
    "missing shard": (lambda f: (f / SECOND).unlink(), rf"{SECOND}: missing; {INDEX} places layers.0\S+ there"),
    "truncated shard": (cut(SECOND, 1), f"{SECOND}: cut short or not safetensors"),
    "no index": (lambda f: (f / INDEX).unlink(), "model.safetensors: missing; .* or shards and"),
    "index and single file": (lambda f: (f / "model.safetensors").write_bytes(b""), "holds model.safetensors and "),
    "index is cut": (cut(INDEX, 1), f"{INDEX}: not JSON"),
    "index is a list": (lambda f: (f / INDEX).write_text("[]"), f"{INDEX}: weight_map: missing"),
    "index without a map": (lambda f: (f / INDEX).write_text('{"weight_map": 3}'), f"{INDEX}: weight_map: missing"),
    "index of numbers": (index_of(**{"norm.weight": 3}), f"{INDEX}: weight_map: norm.weight: 3; want"),
    "index out of the folder": (index_of(**{"norm.weight": "../x.safetensors"}), f"{INDEX}: norm.weight: '../x.sa"),
    "index to the root": (index_of(**{"norm.weight": "/x.safetensors"}), f"{INDEX}: norm.weight: '/x.sa"),
    "index to no safetensors": (index_of(**{"norm.weight": "config.json"}), f"{INDEX}: norm.weight: 'config.json' is"),
    "index with a null": (index_of(**{"norm.weight": "\0.safetensors"}), "missing; "),
    "index names another file": (index_of(**{"norm.weight": SECOND}), f"{SECOND}: norm.weight: missing, but"),
    "index forgets a tensor": (
        edit_json(INDEX, lambda index: index["weight_map"].pop("norm.weight")),
        f"00006.safetensors: norm.weight: {INDEX} does not name it",
    ),
    "other count of experts": (
        edit_json("config.json", lambda c: c.update(n_routed_experts=10**12)),
        r"layers.0.ffn.gate.weight: shape \[3, 160\], config.json asks for \[1000000000000, 160\]",
    ),
    "other width": (edit_json("config.json", lambda c: c.update(q_lora_rank=9)), r"\[96\], config.json asks for \[9\]"),
    "other layers": (
        edit_json("config.json", lambda c: c.update(compress_ratios=[0, 4, 4, 0])),
        r"layers.2.attn.compressor.ape: shape \[128, 32\], config.json asks for \[4, 64\]",
    ),
    "one layer more": (
        edit_json("config.json", lambda c: c.update(compress_ratios=[0, 4, 128, 0, 0], num_hidden_layers=4)),
        rf"{INDEX}: layers.3.attn.wq_a.weight: missing",
    ),
    "no MTP block": (
        edit_json("config.json", lambda c: c.update(compress_ratios=[0, 4, 128], num_nextn_predict_layers=0)),
        r"mtp.0.\S+: not a tensor of this model",
    ),
    "claims FP4 only": (edit_json("config.json", lambda c: c.pop("quantization_config")), "quantization_config: m"),
    "claims no quantization": (
        edit_json("config.json", lambda c: [c.pop("quantization_config"), c.pop("expert_dtype")]),
        "is FP8, but .*config.json has no quantization_config",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_what_is_wrong_is_one_line_that_names_it(tmp_path: Path, case: str):
    spoil, message = BAD[case]
    folder = official.checkpoint(tmp_path / "model")
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("experts", ["fp8", "fp4"])
def test_claimed_and_stored_experts_differ(tmp_path: Path, experts: str):
    """A config.json without `expert_dtype` claims nothing: the first published ones were so."""
    folder = official.checkpoint(tmp_path / "model", experts=experts)
    edit_json("config.json", lambda c: c.update(expert_dtype="fp4"))(folder)
    if experts == "fp8":
        with pytest.raises(UserError, match="experts.0.w1.weight: dtype F8_E4M3; .*config.json says .* fp4: I8"):
            load(folder)
    edit_json("config.json", lambda c: c.pop("expert_dtype"))(folder)
    load(folder)


def test_presets_without_weights_say_so():
    with pytest.raises(UserError, match="^flash: this preset is a configuration without weights"):
        load("flash")


# ---- damaged files: nothing but UserError, and little memory

FILES = ("config.json", INDEX, SECOND)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official.checkpoint(tmp_path_factory.mktemp("damaged") / "model")


# What is changed in a file, and where: a byte replaced, some removed, one inserted, the rest cut off.
changes = st.tuples(
    st.sampled_from(["flip", "remove", "insert", "cut"]), st.floats(0, 1, exclude_max=True), st.integers(0, 255)
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), damage=st.lists(changes, min_size=1, max_size=3))
def test_damaged_files(flash: Path, victim: Path, name: str, damage: list[tuple[str, float, int]]):
    content = bytearray((flash / name).read_bytes())
    # of a shard, its header: its numbers may be anything
    size = 8 + int.from_bytes(content[:8], "little") if name == SECOND else len(content)
    for kind, where, byte in damage:
        at = int(where * min(size, len(content)))
        if kind == "flip":
            content[at : at + 1] = bytes([byte])
        elif kind == "insert":
            content[at:at] = bytes([byte])
        else:
            del content[at : at + byte if kind == "remove" else None]
    (victim / name).write_bytes(content)
    most = 2 * sum(path.stat().st_size for path in victim.iterdir())
    try:
        # Twice if need be: what Python loads and remembers at a first use counts once.
        assert peak_of_reading(victim) < most or peak_of_reading(victim) < most
    finally:
        shutil.copyfile(flash / name, victim / name)


def peak_of_reading(folder: Path) -> int:
    """Bytes that Python allocates while all of a checkpoint is read, or refused."""
    tracemalloc.start()
    try:
        checkpoint = Checkpoint(folder)
        for spec in checkpoint.specs.values():
            read_values(checkpoint, spec, slice(0, spec.shape[0]), torch.int64 if spec.kind == "ids" else torch.float32)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak
