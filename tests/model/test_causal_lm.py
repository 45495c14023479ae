"""Models of transformers' own architectures: packed, chunked and decoded as transformers alone, saved and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from amalgam.errors import UserError
from amalgam.model import DeepseekV4, LanguageModel, end_ids, load, save
from amalgam.model.auto import check_config
from amalgam.model.tensors import distinct
from amalgam.rl.engine import Engine
from amalgam.rl.packing import collate
from amalgam.rl.settings import EngineSettings

from .. import other_models, tiny
from ..other_models import END_IDS

LENGTHS = [11, 1, 17, 2, 4]
KINDS = [
    "qwen3", "llama, tied", "mistral, all windows", "gemma 2, windows and a cap", "gemma 3, two kinds of rope",
    "gpt-oss, sinks", "qwen3 moe", "deepseek v3, values of another width", "gpt-2, learned positions and dropout",
    "cohere, a scale on logits", "granite, a scale on logits",
]  # fmt: skip
_SMALL = {"vocab_size": 64, "hidden_size": 32}
_LLAMA = _SMALL | {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
_BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4,
}  # fmt: skip
UNSERVED: list[tuple[Any, dict[str, Any], str]] = [
    (hf.MambaConfig, _SMALL | {"num_hidden_layers": 2}, "layers of the type linear_attention"),
    (hf.LlamaConfig, _LLAMA | {"rope_parameters": _DYNAMIC}, "rope_type dynamic"),
    (hf.Gemma2Config, _LLAMA | {"head_dim": 8}, "final_logit_softcapping"),
    (hf.Llama4TextConfig, _LLAMA, "layers of the type chunked_attention"),
    (hf.BartConfig, _BART, "packed documents differ from transformers' own results"),  # its positions are its own
    (hf.BloomConfig, _SMALL | {"n_layer": 2, "n_head": 4}, "not every layer attends once"),
    (hf.PhiConfig, _LLAMA, "its head has a bias"),
    (hf.StableLmConfig, _LLAMA, "do not pass arguments on to the attention"),
]


def documents(seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(other_models.VOCABULARY, (n,), generator=g) for n in LENGTHS]


def packed(docs: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat(docs), torch.tensor([0, *[len(d) for d in docs]], dtype=torch.int32).cumsum(0).int()


def own_logprobs(folder: Path, docs: list[Tensor]) -> Tensor:
    """transformers alone, one unpadded document at a time."""
    model: Any = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = []
    with torch.no_grad():
        for doc in docs:
            scores = torch.log_softmax(model(doc[None]).logits[0].float(), -1)
            found += [torch.zeros(1), scores[:-1].gather(1, doc[1:, None]).squeeze(1)]
    return torch.cat(found)


@pytest.fixture(scope="module", params=KINDS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LanguageModel]:
    folder = other_models.checkpoint(tmp_path_factory.mktemp("other") / "model", request.param)
    return folder, load(folder)


@torch.no_grad()
def test_packed_logprobs_are_transformers_own(served: tuple[Path, LanguageModel]):
    """Alone, and packed in any order; in training mode too, where gpt-2 would drop out."""
    folder, model = served
    docs = documents()
    expected = own_logprobs(folder, docs)
    model.train()
    torch.testing.assert_close(model.logprobs(*packed(docs)), expected, rtol=0, atol=1e-5)
    backward = model.logprobs(*packed(docs[::-1])).split(LENGTHS[::-1])
    torch.testing.assert_close(torch.cat(backward[::-1]), expected, rtol=0, atol=1e-5)
    for doc, one in zip(docs, expected.split(LENGTHS), strict=True):
        torch.testing.assert_close(model.logprobs(*packed([doc])), one, rtol=0, atol=1e-5)


@torch.no_grad()
def test_chunks_and_steps_from_the_cache_equal_the_forward(served: tuple[Path, LanguageModel]):
    """Requests of different lengths side by side; some get nothing, one is rolled back, the rows are forked."""
    model: Any = served[1]
    docs = documents(1)
    expected = model(*packed(docs)).hidden.split(LENGTHS)
    cache, at = model.new_cache(len(docs), max(LENGTHS)), [0] * len(docs)
    for step in [[4, 1, 0, 2, 1], [1, 0, 9, 0, 0], [1, 0, 1, 0, 1], [5, 0, 7, 0, 2]]:
        new = [doc[i : i + n] for doc, i, n in zip(docs, at, step, strict=True)]
        found = model.extend(*packed(new), cache).hidden.split(step)
        for doc, (i, n) in enumerate(zip(at, step, strict=True)):
            torch.testing.assert_close(found[doc], expected[doc][i : i + n], rtol=0, atol=2e-5)
        at = [i + n for i, n in zip(at, step, strict=True)]
    assert cache.length.tolist() == at == LENGTHS
    cache.rollback(torch.tensor([3, 1, 5, 2, 4]))
    rows = torch.tensor([2, 0, 2])
    fork = cache.select(rows)
    for i in range(4):
        found = model.decode(torch.stack([docs[2][5 + i], docs[0][3 + i], docs[2][5 + i]]), fork).hidden
        wanted = torch.stack([expected[2][5 + i], expected[0][3 + i], expected[2][5 + i]])
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="a request of 4[0-9] tokens does not fit a cache of 17"):
        model.extend(torch.zeros(40, dtype=torch.int64), torch.tensor([0, 40, 40, 40]), fork)
    with pytest.raises(ValueError, match="cannot go back to"):
        fork.rollback(fork.length + 1)


def test_saved_as_it_was_and_transformers_loads_it(served: tuple[Path, LanguageModel], tmp_path: Path):
    folder, model = served
    save(model, tmp_path / "copy")
    back = load(tmp_path / "copy")
    ours, theirs = model.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    docs = documents(2)
    torch.testing.assert_close(own_logprobs(tmp_path / "copy", docs), own_logprobs(folder, docs), rtol=0, atol=0)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()
    assert end_ids(tmp_path / "copy") == END_IDS
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("kind", ["qwen3", "llama, tied"])
def test_sampled_logprobs_are_the_learners_and_either_end_token_ends(kind: str, tmp_path: Path):
    model = load(other_models.checkpoint(tmp_path / "m", kind))
    params = {"temperature": 0.8, "max_new_tokens": 120, "seed": 5}
    requests = tiny.asked(tiny.requests(6, 4, other_models.VOCABULARY), **params)
    found = Engine(model, END_IDS).generate(requests)
    assert {int(t.response_ids[-1]) for t in found if t.finish == "stop"} == set(END_IDS)
    assert not any(set(END_IDS) & set(t.response_ids[:-1].tolist()) for t in found)
    batch = collate([t.row() | {"experts": t.experts} for t in found], "cpu")
    assert batch["experts"].shape[1:] == (0, 0)
    with torch.no_grad():
        replay = batch["experts"].long()
        logprobs = model.logprobs(batch["tokens"], batch["cu_seqlens"], replay=replay, temperature=0.8)
    sampled = torch.cat([torch.from_numpy(t.logprobs) for t in found])
    torch.testing.assert_close(logprobs[batch["response"] > 0], sampled, rtol=0, atol=2e-5)
    alone = Engine(model, END_IDS).generate(requests[5:6])[0]
    assert alone.response_ids.tolist() == found[5].response_ids.tolist()
    streamed = list(Engine(model, END_IDS).stream(requests[5]))
    assert [int(i) for new in streamed for i in new] == alone.response_ids.tolist()


def test_what_only_v4_has_is_refused(tmp_path: Path):
    model = load(other_models.checkpoint(tmp_path / "m"))
    with pytest.raises(ValueError, match=r"^routing replay is DeepSeek-V4's alone; qwen3 has none$"):
        model.logprobs(torch.arange(4), torch.tensor([0, 4]), replay=torch.zeros(4, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^the indexer's loss is DeepSeek-V4's alone; qwen3 has no indexer$"):
        model(torch.arange(4), torch.tensor([0, 4]), index_loss=True)
    with pytest.raises(ValueError, match="^the MTP block is DeepSeek-V4's alone$"):
        Engine(model, END_IDS, settings=EngineSettings(draft="mtp"))
    with pytest.raises(UserError, match="numerics: 'transformers' is DeepSeek-V4's alone"):
        load(tmp_path / "m", numerics="transformers")


def test_v4_is_still_v4():
    assert isinstance(load("tiny"), DeepseekV4)


def test_tied_tensors_are_one(tmp_path: Path):
    model = load(other_models.checkpoint(tmp_path / "m", "llama, tied"))
    names = distinct(model)
    assert "lm.model.embed_tokens.weight" in names
    assert "lm.lm_head.weight" in model.state_dict()
    assert "lm.lm_head.weight" not in names


@pytest.mark.parametrize(("kind", "fields", "message"), UNSERVED, ids=lambda part: getattr(part, "model_type", None))
def test_what_cannot_be_served_is_refused_in_one_line(kind: Any, fields: dict, message: str, tmp_path: Path):
    model: Any = hf.AutoModelForCausalLM.from_config(kind(**fields))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=rf"config.json: model_type {kind.model_type}: not built: .*{message}"
    ) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def drop(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def add(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | {"extra": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})


def shape(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = torch.zeros(5)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: drop(f, "model.norm.weight"), "model.norm.weight: missing from the checkpoint"),
        (lambda f: drop(f, "lm_head.weight"), "lm_head.weight: missing from the checkpoint"),
        (add, "extra: not a tensor of this model"),
        (shape, "model.norm.weight: not of the shape that config.json asks for"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04N."), "."),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: not a JSON object"),
        (lambda f: change_config(f, model_type="no_such_model"), "no_such_model"),
        (lambda f: change_config(f, hidden_size="wide"), "hidden_size"),
        (lambda f: change_config(f, is_encoder_decoder=True), "an encoder and a decoder"),
        (lambda f: change_config(f, quantization_config={"quant_method": "fp8"}), "quantized weights"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(damage, message: str, tmp_path: Path):
    folder = other_models.checkpoint(tmp_path / "m")
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickled_weights_and_code_of_a_checkpoint_are_never_loaded(tmp_path: Path):
    folder = other_models.checkpoint(tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors"):
        load(folder)
    other_models.checkpoint(tmp_path / "code")
    (tmp_path / "code" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    change_config(
        tmp_path / "code", model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    )
    with pytest.raises(UserError):
        load(tmp_path / "code")
    assert not (tmp_path / "ran").exists()


def test_config_and_end_ids(tmp_path: Path):
    folder = other_models.checkpoint(tmp_path / "m")
    assert check_config(folder) == other_models.VOCABULARY
    assert end_ids(folder) == END_IDS
    (folder / "generation_config.json").unlink()
    assert end_ids(folder) == END_IDS[:1]
    change_config(folder, eos_token_id=None)
    with pytest.raises(UserError, match=r"config.json: eos_token_id: None; it must be a token's id, or a list of them"):
        end_ids(folder)
