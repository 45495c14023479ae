"""From a GGUF file (quantized, for llama.cpp) to a checkpoint that everything here takes.

transformers reads the file (with the packages of the extra `gguf`): dequantized weights, tokenizer, chat template. It
will not save what it read so; we put the weights into a new model of the same config.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .checkpoint import folder_beside, replace_folder


def convert_gguf(file: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes the model of a GGUF file to a checkpoint's folder, in `dtype`; the folder comes whole or not at all.

    UserError for a file that is not there or not read, a folder that is there, or a package that is not.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .transformers_checkpoint import one_line, quiet

    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if folder.exists():
        raise UserError(f"{folder}: is there already; give another folder")
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise UserError(f"reading GGUF files needs the package {package}: pip install 'amalgam[gguf]'")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed, which else warns of it
    with one_line(str(file)), quiet():
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        read: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        values = {key: _as_written(value) for key, value in read.config.to_dict().items()}
        for key in ("quantization_config", "_model_name_or_path", "dtype"):
            values.pop(key, None)
        made: Any = AutoModelForCausalLM.from_config(type(read.config)(**values))
        made.load_state_dict(read.state_dict(), strict=True)
        beside = folder_beside(folder)
        made.to(dtype).save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    for weights in beside.glob("*.safetensors"):
        weights.chmod(0o644)
    replace_folder(beside, folder)


def _as_written(value: Any) -> Any:
    """GGUF keeps a config's numbers in fp32, where 1e-5 is 9.9999997e-06: seven digits are what was written."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
