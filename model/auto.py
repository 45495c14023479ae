"""Checkpoints of every kind: DeepSeek-V4's are model/checkpoint.py's, all others model/transformers_checkpoint.py's."""

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..settings import FULL, Precision
from . import checkpoint
from .config import CSA, config_of, resolve
from .deepseek_v4 import DeepseekV4
from .language_model import LanguageModel
from .numerics import Numerics
from .precision import problem


def load(
    path_or_preset: str | Path,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    numerics: Numerics = "deepseek",
    precision: Precision = FULL,
    stored: bool = False,
) -> LanguageModel:
    """The model of a checkpoint's folder or a preset, in `dtype` (what has to stay fp32 does), on `device`.

    `dtype` None is what `precision` computes in there: bf16 on a GPU, fp32 on a CPU, unless it says otherwise.
    V4 in float64 computes everything in float64; in other models what transformers' code casts to fp32 stays fp32.
    `numerics` and what `precision` rounds are V4's: see model/numerics.py and `settings.Precision`; for another model
    any but the defaults is a UserError. `stored`: a model that only runs forward, which holds the codes of weights in
    low precision.
    Every tensor of the file is used and every tensor of the model filled, or a UserError names the first that is not.
    """
    folder = resolve(path_or_preset)
    chosen: torch.dtype = dtype or getattr(torch, precision.dtype(device))
    if is_v4(folder):
        return checkpoint.load(folder, chosen, device, numerics, precision, stored)
    from .transformers_checkpoint import load_causal_lm  # takes seconds to import

    if numerics != "deepseek":
        raise UserError(f"{folder}: numerics: {numerics!r} is DeepSeek-V4's alone")
    check_config(folder, precision)
    return load_causal_lm(folder, chosen, device)


def save(model: LanguageModel, path: str | Path) -> None:
    """Writes the checkpoint and, from the model's origin, the tokenizer's files; then renames the folder.

    One process at a time saves to a `path`. What a save to it that was cut off has left beside it is removed.
    """
    if isinstance(model, DeepseekV4):
        return checkpoint.save(model, path)
    from .causal_lm import CausalLM
    from .transformers_checkpoint import write_causal_lm

    assert isinstance(model, CausalLM)
    beside = checkpoint.folder_beside(Path(path))
    write_causal_lm(model, beside)
    checkpoint.replace_folder(beside, Path(path))


def is_v4(folder: Path) -> bool:
    return read_object(folder / "config.json").get("model_type") == "deepseek_v4"


def check_config(folder: Path, precision: Precision = FULL) -> int:
    """The model's vocabulary size. UserError for a config.json that is wrong, or asks for what is not built."""
    if is_v4(folder):
        config = config_of(folder)
        if wrong := problem(config, precision):
            raise UserError(f"{folder / 'config.json'}: {wrong}")
        return config.vocab_size
    from .transformers_checkpoint import config_of as other_config_of

    if precision.rounds:
        raise UserError(f"{folder}: precision: low precision is DeepSeek-V4's alone; leave it out for this model")
    return other_config_of(folder).vocab_size


def has_indexer(folder: Path) -> bool:
    """Whether the model has CSA layers, which alone have an indexer. UserError as `check_config`."""
    return is_v4(folder) and CSA in (config_of(folder).layer_types or ())


def context_length(folder: Path) -> int | None:
    """The most tokens of a prompt and its answer, max_position_embeddings; None where config.json has no such limit."""
    if is_v4(folder):
        return config_of(folder).max_position_embeddings
    from .transformers_checkpoint import config_of as other_config_of

    return getattr(other_config_of(folder), "max_position_embeddings", None)


def end_ids(folder: Path) -> tuple[int, ...]:
    """The tokens that end a response: eos_token_id of generation_config.json, or where it has none, of config.json."""
    name = "generation_config.json"
    found: Any = read_object(folder / name).get("eos_token_id") if (folder / name).is_file() else None
    if found is None:
        name = "config.json"
        found = read_object(folder / name).get("eos_token_id")
    ids = tuple(found) if isinstance(found, list) else (found,)
    if not ids or not all(type(i) is int for i in ids):
        raise UserError(f"{folder / name}: eos_token_id: {found!r}; it must be a token's id, or a list of them")
    return ids


def read_object(file: Path) -> dict[str, Any]:
    """What a JSON file holds. UserError if that is no object."""
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a JSON object")
    return values
