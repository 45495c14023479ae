"""Small random models of transformers' own architectures, with a byte tokenizer and a chat template beside them."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

ENDS = ["<|end|>", "<|eot|>"]
SPECIALS = ["<|start|>", *ENDS, "<think>", "</think>"]
VOCABULARY = 257 + len(SPECIALS)
END_IDS = (258, 259)
# Reasoning of turns before the last user message is not shown; without reasoning, an empty one is.
REASONING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    "{% endif %}{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
PLAIN = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('begin with a question') }}{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": END_IDS[0],
}  # fmt: skip
_HEADS = _COMMON | {"head_dim": 8}
_WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}


def config(kind: str, **changes: Any) -> Any:
    """The config of an architecture that is served: what its name says is what sets it apart."""
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "qwen3": (hf.Qwen3Config, _HEADS),
        "llama, tied": (hf.LlamaConfig, _HEADS | {"tie_word_embeddings": True}),
        "mistral, all windows": (hf.MistralConfig, _HEADS | {"sliding_window": 5}),
        "gemma 2, windows and a cap": (
            hf.Gemma2Config,
            _HEADS | _WINDOWS | {"final_logit_softcapping": None, "attn_logit_softcapping": 1.5},
        ),
        "gemma 3, two kinds of rope": (hf.Gemma3TextConfig, _HEADS | _WINDOWS),
        "gpt-oss, sinks": (hf.GptOssConfig, _HEADS | {"sliding_window": 5, "num_local_experts": 4}),
        "qwen3 moe": (hf.Qwen3MoeConfig, _HEADS | _MOE | {"num_experts": 4}),
        "deepseek v3, values of another width": (
            hf.DeepseekV3Config,
            _COMMON | _MOE | _LATENT | {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1}
            | {"topk_group": 1, "first_k_dense_replace": 1},
        ),
        "gpt-2, learned positions and dropout": (
            hf.GPT2Config,
            {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
            | {"initializer_range": 0.15, "bos_token_id": 0, "eos_token_id": END_IDS[0]},
        ),
        "cohere, a scale on logits": (hf.CohereConfig, _COMMON | {"logit_scale": 0.25}),
        "granite, a scale on logits": (hf.GraniteConfig, _COMMON | {"logits_scaling": 2.0}),
    }  # fmt: skip
    made, fields = kinds[kind]
    return made(**(fields | changes))


@torch.no_grad()
def checkpoint(folder: Path, kind: str = "qwen3", seed: int = 0, template: str = PLAIN, **changes: Any) -> Path:
    """Saved by transformers. Vectors are random too; two tokens end a response, and are likelier than others."""
    torch.manual_seed(seed)
    model: Any = hf.AutoModelForCausalLM.from_config(config(kind, **changes))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.get_output_embeddings().weight[list(END_IDS)] *= 2
    model.generation_config.eos_token_id = list(END_IDS)
    model.save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder


def tokenizer(template: str = PLAIN) -> Any:
    """Every byte is a token, and so are two line ends in a row and each of SPECIALS."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    vocabulary["ĊĊ"] = len(letters)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS[:3]])
    made.add_tokens([AddedToken(token, normalized=False) for token in SPECIALS[3:]])
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=ENDS[0])
    fast.chat_template = template
    return fast
