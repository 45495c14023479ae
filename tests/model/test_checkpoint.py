"""Checkpoints: what is saved is loaded, what is wrong gets one clear line, and a save is whole or not there."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from amalgam.errors import UserError
from amalgam.model import DeepseekV4
from amalgam.model import checkpoint as checkpoint_module
from amalgam.model.checkpoint import cast, load, save
from amalgam.model.config import PRESETS, config_of, resolve
from amalgam.model.encoding import Encoding

from .. import tiny

BESIDE = ("tokenizer.json", "tokenizer_config.json", "encoding.json")


def same(one: DeepseekV4, other: DeepseekV4) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        t.dtype == theirs[name].dtype and torch.equal(t, theirs[name]) for name, t in ours.items()
    )


def logprobs(model: DeepseekV4) -> torch.Tensor:
    tokens = torch.arange(40) * 37 % 512
    with torch.no_grad():
        return model.logprobs(tokens, torch.tensor([0, 15, 40]))


def test_round_trip_with_buffers_config_and_tokenizer(tmp_path: Path):
    model = tiny.model(0)
    save(model, tmp_path / "a" / "model")
    back = load(tmp_path / "a" / "model")
    assert same(back, model)
    assert any(name.endswith("tid2eid") for name in back.state_dict())
    assert any(name.endswith("e_score_correction_bias") for name in back.state_dict())
    torch.testing.assert_close(logprobs(back), logprobs(model), rtol=0, atol=0)
    assert back.config.to_dict() == {**model.config.to_dict(), "dtype": "float32"}
    for name in BESIDE:
        assert (tmp_path / "a" / "model" / name).read_bytes() == (PRESETS / "tiny" / name).read_bytes()
    save(back, tmp_path / "again")  # its origin is the first copy
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == sorted(
        ["config.json", "model.safetensors", *BESIDE]
    )
    for name in ("model.safetensors", *BESIDE):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "a" / "model" / name).read_bytes()
    first, second = (json.loads((tmp_path / at / "config.json").read_text()) for at in ("a/model", "again"))
    assert first == second


def test_round_trip_in_bf16(tmp_path: Path):
    """On disk too, with the fp32 islands in fp32; loading in fp32 changes no number."""
    model = cast(tiny.model(0), torch.bfloat16)
    save(model, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    assert stored["model.layers.1.self_attn.sinks"].dtype == torch.float32
    assert stored["model.layers.0.mlp.gate.tid2eid"].dtype == torch.int64
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert same(load(tmp_path / "model", dtype=torch.bfloat16), model)
    assert same(load(tmp_path / "model"), cast(model, torch.float32))


def test_each_checkpoint_loads_with_transformers(tmp_path: Path):
    """A fresh one, one over an older one, and one in bf16: same numbers, same tokenizer."""
    saved = {
        "fresh": tiny.model(0),
        "over": tiny.model(1),
        "bf16": cast(cast(tiny.model(2), torch.bfloat16), torch.float32),
    }
    save(tiny.model(3), tmp_path / "over")
    save(saved["fresh"], tmp_path / "fresh")
    save(saved["over"], tmp_path / "over")
    save(cast(load_copy(saved["bf16"], tmp_path), torch.bfloat16), tmp_path / "bf16")
    for name, model in saved.items():
        oracle = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        tokens = torch.arange(30) * 37 % 512
        with torch.no_grad():
            theirs = torch.log_softmax(oracle(tokens.unsqueeze(0)).logits[0], -1)
            ours = torch.log_softmax(model.logits(model(tokens, torch.tensor([0, 30])).hidden), -1)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        text = Encoding.from_checkpoint(tmp_path / name).encode([{"role": "user", "content": "1 + 2?"}])
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def load_copy(model: DeepseekV4, folder: Path) -> DeepseekV4:
    save(model, folder / "copy")
    return load(folder / "copy")


# ---- bad input


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def edit_config(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(share: float) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        os.truncate(file, int(file.stat().st_size * share))

    return edit


SINKS = "model.layers.1.self_attn.sinks"
BAD = {
    "missing tensor": (edit_tensors(lambda t: t.pop(SINKS)), rf"model.safetensors: {SINKS}: missing \(1 "),
    "missing buffer": (
        edit_tensors(lambda t: t.pop("model.layers.0.mlp.gate.tid2eid")),
        "model.safetensors: model.layers.0.mlp.gate.tid2eid: missing",
    ),
    "unknown tensor": (
        edit_tensors(lambda t: t.update(extra=torch.zeros(1))),
        r"model.safetensors: extra: not a tensor of this model \(1 such\)",
    ),
    "wrong shape": (
        edit_tensors(lambda t: t.update({SINKS: torch.zeros(5)})),
        rf"model.safetensors: {SINKS}: shape \[5\], config.json asks for \[2\]",
    ),
    "cut in the tensors": (cut(0.9), "model.safetensors: cut short or not safetensors"),
    "cut in the header": (cut(0.01), "model.safetensors: cut short or not safetensors"),
    "empty file": (cut(0.0), "model.safetensors: cut short or not safetensors"),
    "a pickle": (write("model.safetensors", b"\x80\x04K\x01."), "model.safetensors: cut short or not safetensors"),
    "no file": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: missing; .* holds model.safetensors"),
    "bad JSON": (write("config.json", b'{\n"a": 1,\n'), r"config.json:3: not JSON"),
    "not text": (write("config.json", b'{"model_type": "\xe9"}'), "config.json: not JSON"),
    "not an object": (write("config.json", b"[1]"), "config.json: model_type: 'not an object' is not built"),
    "other model": (
        edit_config(lambda c: c.update(model_type="llama")),
        "config.json: model_type: 'llama' is not built; it must be 'deepseek_v4'",
    ),
    "no model type": (edit_config(lambda c: c.pop("model_type")), "config.json: model_type: None is not built"),
    "wrong type": (edit_config(lambda c: c.update(hidden_size="big")), "config.json: .*hidden_size"),
    "unknown layer": (edit_config(lambda c: c.update(layer_types=["mamba"] * 3)), "config.json: .*layer_types"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_is_wrong_is_one_line_that_names_it(tmp_path: Path, case: str):
    spoil, message = BAD[case]
    tiny.checkpoint(tmp_path / "model", 0)
    spoil(tmp_path / "model")
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "model") in str(caught.value)


def test_neither_folder_nor_preset(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", tmp_path / "none", "tinny"):
        with pytest.raises(UserError, match=rf"^{name}: neither .* \(no config.json\) nor a preset; presets: .*tiny"):
            load(name)


def test_presets_are_found_by_name():
    assert resolve("tiny") == PRESETS / "tiny"
    assert config_of("tiny").num_hidden_layers == 4


# ---- atomic


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("owner", "function", "call"),
    [
        (checkpoint_module, "write_file", 1),
        (checkpoint_module.shutil, "copyfile", 2),
        (checkpoint_module.os, "rename", 2),
    ],
)
def test_a_save_that_is_cut_off_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner, function: str, call: int
):
    """Stopped in the middle: the folder holds the old model, or is not there; never a part of the new one."""
    old, new = tiny.model(0), tiny.model(1)
    save(old, tmp_path / "model")
    calls = []

    def killed(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            raise Killed
        return original(*arguments, **options)

    original = getattr(owner, function)
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, killed)
        with pytest.raises(Killed):
            save(new, tmp_path / "model")
    if (tmp_path / "model").exists():
        assert function != "rename"
        assert same(load(tmp_path / "model"), old)
    else:
        assert function == "rename"
        assert same(load(tmp_path / ".model.old"), old)
    others = [tmp_path / name for name in (".model", ".other.01234567", ".model.0123456", ".model.012345678", "x")]
    for other in others:
        other.mkdir()
    save(new, tmp_path / "model")
    assert same(load(tmp_path / "model"), new)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "model", *others])


def test_a_save_that_ends_leaves_nothing_beside(tmp_path: Path):
    for seed in range(2):
        save(tiny.model(seed), tmp_path / "model")
        assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert same(load(tmp_path / "model"), tiny.model(1))
