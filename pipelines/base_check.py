"""Is a recipe's base model there and whole? Answered from its files' headers, without torch, which `model` imports.

`amalgam.model.load` checks every tensor, later; this check lets a run stop before anything starts.
"""

import json
import os
from pathlib import Path

from .recipe_errors import suggest

PRESETS = Path(__file__).parent.parent / "model" / "presets"
_INDEX = "model.safetensors.index.json"


def base_problem(base: str) -> str | None:
    """What is wrong with a base, a preset's name or a checkpoint's folder; None where nothing is."""
    folder = _folder(base)
    if not folder.is_dir():
        return f"'{base}' is neither a preset nor a folder; {suggest(base, _presets())}"
    config, weights, index = (folder / name for name in ("config.json", "model.safetensors", _INDEX))
    files = [config] if index.is_file() else [config, weights]
    for file in files:
        if not file.is_file():
            return f"{file} is missing; a checkpoint's folder holds {config.name} and {weights.name}"
    return _config_problem(config) or (_index_problem(index) if index.is_file() else _safetensors_problem(weights))


def preset_problem(name: str) -> str | None:
    """What is wrong with a preset's name; None where nothing is."""
    return None if name in _presets() else f"no preset '{name}'; {suggest(name, _presets())}"


def has_mtp(name: str) -> bool:
    """Whether a preset's or folder's config.json has an MTP block; True where that cannot be told."""
    try:
        config = json.loads((_folder(name) / "config.json").read_bytes())
        return config.get("model_type", "deepseek_v4") == "deepseek_v4" and config["num_nextn_predict_layers"] != 0
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return True


def _folder(name: str) -> Path:
    return PRESETS / name if name in _presets() else Path(name)


def _presets() -> list[str]:
    return sorted(config.parent.name for config in PRESETS.glob("*/config.json"))


def _config_problem(file: Path) -> str | None:
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return f"{file} is not JSON; it should be the model's configuration as transformers writes it"
    return None if isinstance(config, dict) else f"{file} is not a JSON object"


def _index_problem(index: Path) -> str | None:
    """Are all shards there and whole? Which tensor is where, `amalgam.model.load` finds out."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{index} is no index of shards; it should be JSON with a weight_map, as transformers writes it"
    for name in sorted(map(str, names)):
        if Path(name).name != name or not os.path.isfile(index.parent / name):
            return f"{index} names {name!r}, which is no file in that folder"
        if problem := _safetensors_problem(index.parent / name):
            return problem
    return None


def _safetensors_problem(file: Path) -> str | None:
    """Asks the library, which reads the header and compares the file's size with it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            return None
    except (SafetensorError, OSError) as error:
        where = "copy it again, or save the model with save_pretrained or amalgam.model.save"
        return f"{file}: cut short or not safetensors ({error}); {where}"
