"""Loading and writing models of transformers' own formats, and refusing those that model/causal_lm.py cannot serve.

A model is refused by its config where that says so (recurrent layers, chunked attention, an encoder, ...), and else by
a probe of the loaded model, which compares packed, decoded and transformers' own results.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from ..errors import UserError
from .causal_lm import CausalLM, attention

_ATTENTION = "amalgam"  # not in the interface of masks too, so transformers makes none
_OFFLINE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_LAYERS = ("full_attention", "sliding_attention")
_ROPE_OF_THE_LONGEST = ("dynamic", "longrope")
_PROBE = (5, 3)  # lengths of the probe's documents
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest logit; other dtypes round more: 0.1
_BESIDE = (".json", ".jinja", ".model", ".txt")  # the tokenizer's files, among others


def load_causal_lm(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> CausalLM:
    """The model of a checkpoint's folder in transformers' names, in `dtype`, on `device`; safetensors only.

    No code of the checkpoint is run, and nothing is fetched. UserError, in one line, for a folder that is not whole and
    for an architecture that cannot be served.
    """
    AttentionInterface.register(_ATTENTION, attention)
    config = config_of(folder)
    with one_line(str(folder)), quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
            **_OFFLINE,
        )
    lm, report = loaded
    for kind, what in (
        ("missing_keys", "missing from the checkpoint"),
        ("unexpected_keys", "not a tensor of this model"),
        ("mismatched_keys", "not of the shape that config.json asks for"),
    ):
        if names := sorted(key if isinstance(key, str) else key[0] for key in report[kind]):
            raise UserError(f"{folder}: {names[0]}: {what} ({len(names)} such)")
    model = CausalLM(lm.to(device)).eval()
    model.origin = folder
    with one_line(f"{folder / 'config.json'}: model_type {config.model_type}: not built"):
        _probe(model)
    return model


def config_of(folder: Path) -> Any:
    """The config of a model that is not V4's. UserError where it is wrong, or asks for what is not built."""
    file = folder / "config.json"
    with one_line(str(file)):
        config = AutoConfig.from_pretrained(folder, **_OFFLINE)
    if problem := config_problem(config):
        raise UserError(f"{file}: model_type {config.model_type}: not built: {problem}")
    return config


def config_problem(config: Any) -> str | None:
    """What a config asks for that is not built, in a few words; None where nothing is."""
    if config.is_encoder_decoder:
        return "an encoder and a decoder; it must be a decoder alone"
    if config.get_text_config() is not config:
        return "more than text"
    if getattr(config, "quantization_config", None):
        return "quantized weights (quantization_config); give the checkpoint in bf16 or fp32"
    if other := set(getattr(config, "layer_types", None) or _LAYERS) - set(_LAYERS):
        return f"layers of the type {min(other)}; they must be {' or '.join(_LAYERS)}"
    if kinds := set(_rope_types(getattr(config, "rope_parameters", None))) & set(_ROPE_OF_THE_LONGEST):
        return f"rope_type {min(kinds)}, by which a token's result depends on the longest document beside it"
    if getattr(config, "final_logit_softcapping", None):
        return "final_logit_softcapping; a log-prob must follow from hidden states and the head's weight"
    return None


def _rope_types(parameters: Any) -> Iterator[str]:
    """The rope_type of a config's rope_parameters, or of each layer type's."""
    if isinstance(parameters, dict):
        if "rope_type" in parameters:
            yield parameters["rope_type"]
        for value in parameters.values():
            yield from _rope_types(value)


@contextmanager
def one_line(where: str) -> Iterator[None]:
    """What goes wrong inside is a UserError: `where`, and the first 300 characters of what was said."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers and its models raise many kinds for what they cannot do
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: {text[:300]}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """transformers draws no progress bars meanwhile."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.no_grad()
def _probe(model: CausalLM) -> None:
    """Turns the model to our attention.

    ValueError unless two short documents give transformers' own logits when they are packed and when decoded.
    """
    if getattr(model.lm_head, "bias", None) is not None:
        raise ValueError("its head has a bias; a log-prob must follow from hidden states and the head's weight")
    device, vocabulary = model.lm_head.weight.device, model.lm_head.weight.shape[0]
    tokens = torch.arange(1, sum(_PROBE) + 1, device=device) * (vocabulary - 1) // (sum(_PROBE) + 1)
    cu_seqlens = torch.tensor([0, _PROBE[0], sum(_PROBE)], device=device)
    own = torch.cat([model.lm(t[None], use_cache=False).logits[0] for t in tokens.split(_PROBE)])
    model.lm.set_attn_implementation(_ATTENTION)
    hidden, layers = model.states(tokens, cu_seqlens, None)
    if sorted(layers) != list(range(model.config.num_hidden_layers)):
        raise ValueError("not every layer attends once, through transformers' attention interface")
    tolerance = _PROBE_TOLERANCE.get(hidden.dtype, 0.1)
    _same(model.logits(hidden), own, tolerance, "packed documents differ from transformers' own results")
    heads = torch.tensor([0, 1, 2, _PROBE[0]], device=device)  # the first three tokens of one, the first of the other
    output, cache = model.prefill(tokens[heads], torch.tensor([0, 3, 4], device=device), max(_PROBE))
    for step in range(2):
        output = model.decode(tokens[[3 + step, _PROBE[0] + 1 + step]], cache)
    last = own[[_PROBE[0] - 1, -1]]
    _same(model.logits(output.hidden), last, tolerance, "it keeps a state that is not keys and values")


def _same(ours: Tensor, own: Tensor, tolerance: float, problem: str) -> None:
    difference = float((ours - own).abs().max() / own.abs().max())
    if not difference <= tolerance:
        raise ValueError(f"{problem} (relative difference {difference:.1g})")


def write_causal_lm(model: CausalLM, folder: Path) -> None:
    """The files of a checkpoint, into an empty folder: what AutoModelForCausalLM loads, and the tokenizer's files."""
    with quiet():
        model.lm.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes it 0600, which a shared folder's readers are not
    for file in sorted(model.origin.iterdir()) if model.origin else []:
        beside = file.suffix in _BESIDE and not file.name.endswith(".index.json")
        if beside and file.is_file() and not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
