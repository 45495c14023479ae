"""Checkpoints on disk: safetensors in transformers' names, config.json, and the tokenizer beside them."""

import json
import os
import re
import shutil
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import DeepseekV4Config

from ..errors import UserError
from .config import PRESETS, config_of, resolve
from .deepseek_v4 import DeepseekV4

_BESIDE = ("tokenizer.json", "tokenizer_config.json", "encoding.json")
# What V4 computes in fp32 whatever the model's dtype (transformers keeps the same list).
_FP32 = ("_hc.", "hc_head.", ".sinks", "position_bias", "e_score_correction_bias", "norm.weight", "_frequencies")


def load(path_or_preset: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> DeepseekV4:
    """The model of a checkpoint's folder or a preset, in `dtype` (V4's fp32 islands stay fp32), on `device`.

    Every tensor of the file is used and every tensor of the model filled, or a UserError names the first that is not.
    """
    folder = resolve(path_or_preset)
    file = folder / "model.safetensors"
    if folder.parent == PRESETS and not file.exists():
        raise UserError(f"{folder.name}: this preset is a configuration without weights; name a checkpoint's folder")
    model = DeepseekV4(config_of(folder))
    state = model.state_dict()
    try:
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            if missing := sorted(state.keys() - names):
                raise UserError(f"{file}: {missing[0]}: missing ({len(missing)} tensors of the model are not there)")
            if unknown := sorted(names - state.keys()):
                raise UserError(f"{file}: {unknown[0]}: not a tensor of this model ({len(unknown)} such)")
            for name, target in state.items():
                tensor = tensors.get_tensor(name)
                if tensor.shape != target.shape:
                    shapes = f"{list(tensor.shape)}, config.json asks for {list(target.shape)}"
                    raise UserError(f"{file}: {name}: shape {shapes}")
                target.copy_(tensor)
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing; a checkpoint's folder holds model.safetensors") from error
    except SafetensorError as error:
        raise UserError(f"{file}: cut short or not safetensors: {error}") from error
    model.origin = folder
    return cast(model, dtype).to(device)


def cast(model: DeepseekV4, dtype: torch.dtype) -> DeepseekV4:
    """Floating-point tensors to `dtype`, in place, but for the fp32 islands."""
    for module_name, module in model.named_modules():
        for name, tensor in [*module.named_parameters(module_name, False), *module.named_buffers(module_name, False)]:
            if tensor.is_floating_point() and not any(part in name for part in _FP32):
                tensor.data = tensor.data.to(dtype)
    return model


def save(model: DeepseekV4, path: str | Path) -> None:
    """Writes model.safetensors, config.json and, from the model's origin, the tokenizer; then renames the folder.

    One process at a time saves to a `path`. What a save to it that was cut off has left beside it is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}", stale.name):
            shutil.rmtree(stale, ignore_errors=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    beside.mkdir()
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, beside / "model.safetensors", metadata={"format": "pt"})
    (beside / "model.safetensors").chmod(0o644)  # safetensors makes it 0600, which a shared folder's readers are not
    config = {**model.config.to_dict(), "architectures": ["DeepseekV4ForCausalLM"]}
    config["dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in _BESIDE:
        if model.origin is not None and (model.origin / name).is_file():
            shutil.copyfile(model.origin / name, beside / name)
    replace_folder(beside, path)


def replace_folder(new: Path, path: Path) -> None:
    """Renames folder `new`, once its files are on the disk, to `path`; a folder there is moved aside, then removed."""
    for file in new.iterdir():
        flush(file)
    flush(new)
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)
    flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk: a power cut undoes what is not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@torch.no_grad()
def initialize(config: DeepseekV4Config, seed: int) -> DeepseekV4:
    """A new model. Normal(0, initializer_range) for matrices, ones for norms, zeros for biases and sinks.

    Where V4 publishes nothing, our choice: hyper-connections start near a plain residual (dynamic parts gated by 0.01
    as in the mHC paper, static mixing leaning to the identity), and a hash layer's table gives each token `k` distinct
    experts, spread evenly by a seeded permutation.
    """
    generator = torch.Generator().manual_seed(seed)
    model = DeepseekV4(config)
    n, std = config.hc_mult, config.initializer_range
    for name, parameter in model.named_parameters():
        if name.endswith(("_hc.scale", "hc_scale")):
            parameter.fill_(0.01)
        elif name.endswith("_hc.base"):
            parameter[2 * n :] = (2.0 * torch.eye(n)).flatten()
        elif parameter.dim() >= 2 and not name.endswith("position_bias"):
            parameter.normal_(0.0, std, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            buffer.copy_(_hash_table(config, generator))
    return model


def _hash_table(config: DeepseekV4Config, generator: torch.Generator) -> torch.Tensor:
    """int64 [V, k]: token t takes k experts in a row of a permuted circle, so ids differ and loads are level."""
    count, k = config.n_routed_experts, config.num_experts_per_tok
    tokens = torch.randperm(config.vocab_size, generator=generator)
    circle = torch.randperm(count, generator=generator)
    return circle[(tokens.unsqueeze(1) * k + torch.arange(k)) % count]
