"""A GGUF file becomes a checkpoint. The files are written here, with the package gguf."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from amalgam.errors import UserError
from amalgam.model import end_ids, gguf, load
from amalgam.model.template import speaker
from amalgam.pipelines import convert
from amalgam.pipelines.cli import app

from .. import other_models


def write(folder: Path, file: Path) -> None:
    """A tied Llama in fp32, as llama.cpp's converter writes it: rows of query and key heads in another order."""
    writer_of = pytest.importorskip("gguf")
    state = {n: t.numpy() for n, t in AutoModelForCausalLM.from_pretrained(folder).state_dict().items()}
    config = other_models.config("llama, tied")
    writer = writer_of.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = other_models.tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokens, key=tokens.__getitem__))
    writer.add_token_types([1] * 257 + [3] * len(other_models.SPECIALS))
    writer.add_token_merges(["Ċ Ċ"] * 2)  # transformers 5.17 reads a list of one as a string
    writer.add_eos_token_id(other_models.END_IDS[0])
    writer.add_bos_token_id(0)
    writer.add_chat_template(other_models.PLAIN)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers.": "blk."}
    for name, array in state.items():
        if name == "lm_head.weight":
            continue
        for heads, part in ((config.num_attention_heads, "q_proj"), (config.num_key_value_heads, "k_proj")):
            if part in name:
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_becomes_a_checkpoint_that_is_served(tmp_path: Path):
    source = other_models.checkpoint(tmp_path / "source", "llama, tied")
    write(source, tmp_path / "model.gguf")
    gguf.convert_gguf(tmp_path / "model.gguf", tmp_path / "converted", torch.float32)
    ours: Any = load(tmp_path / "converted")
    expected: Any = load(source)
    tokens, cu_seqlens = torch.arange(40) * 7 % 256, torch.tensor([0, 15, 40])
    with torch.no_grad():
        wanted = expected.logprobs(tokens, cu_seqlens)
        torch.testing.assert_close(ours.logprobs(tokens, cu_seqlens), wanted, rtol=0, atol=1e-6)
    assert ours.config.rms_norm_eps == 1e-6
    assert end_ids(tmp_path / "converted") == other_models.END_IDS[:1]
    encoding, tokenizer = speaker(tmp_path / "converted")
    ids = encoding.prompt_ids(tokenizer, [{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|start|>user\nHi<|end|>\n<|start|>assistant\n"
    with pytest.raises(UserError, match="converted: is there already; give another folder"):
        gguf.convert_gguf(tmp_path / "model.gguf", tmp_path / "converted")


def test_what_cannot_be_read_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="no.gguf: no such file"):
        gguf.convert_gguf(tmp_path / "no.gguf", tmp_path / "out")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nothing more")
    with pytest.raises(UserError) as caught:
        gguf.convert_gguf(tmp_path / "bad.gguf", tmp_path / "out")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package gguf: pip install 'amalgam.gguf.'"):
        gguf.convert_gguf(tmp_path / "bad.gguf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]


def test_the_command_line_takes_bf16_in_transformers_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = []
    monkeypatch.setattr(convert, "convert_gguf", lambda file, target: made.append((file, target)))
    command = ["convert", "a.gguf", "b", "--format", "transformers", "--dtype"]
    assert CliRunner().invoke(app, [*command, "bf16"]).stdout == "b: converted\n"
    assert made == [(Path("a.gguf"), Path("b"))]
    refused = CliRunner().invoke(app, [*command, "fp8"])
    assert refused.exit_code == 2
    assert "a.gguf: a GGUF file is converted with --format transformers --dtype bf16" in refused.stderr
