"""A model from a checkpoint's folder and into one: weights, config.json, and the tokenizer beside them."""

import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import DeepseekV4Config

from ..errors import UserError
from ..settings import FULL, Precision
from .config import PRESETS, Weights, resolve
from .deepseek_v4 import DeepseekV4, check_kernels
from .encoding import Encoding
from .names import Spec
from .numerics import Numerics, with_numerics
from .precision import check_device, problem, set_precision, store_each
from .shards import flush, write_file, write_index
from .source import Checkpoint, read_values, steps
from .wordings import OFFICIAL
from .write import BESIDE, SHARD_BYTES, Format, InMemory, bytes_of, config_json, plan


def load(
    path_or_preset: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    numerics: Numerics = "deepseek",
    precision: Precision = FULL,
    stored: bool = False,
) -> DeepseekV4:
    """The model of a checkpoint's folder or a preset, in `dtype` (V4's fp32 islands stay fp32), on `device`.

    In float64 all of it computes in float64, islands too, and log-probs are float64.
    Transformers' names or the official ones, one file or shards; FP8 and FP4 are dequantized. Every tensor of the files
    is used and every tensor of the model filled, or a UserError names the first that is not. One exception, as in
    transformers: the MTP block's tensors are left out where the model has no such block. Memory: the model's own, and
    some tens of MB.
    `numerics` is the order of operations, DeepSeek's or transformers', which shows in bf16 only (`numerics.py`).
    `precision` says what its forward rounds as deployment stores it. The weights themselves stay as they are, unless
    the model is to hold what is `stored` of them: then each is rounded as it is read, and the model only runs forward.
    """
    folder = resolve(path_or_preset)
    check_weights(folder)
    checkpoint = Checkpoint(folder)
    if wrong := problem(checkpoint.config, precision):
        raise UserError(f"{folder / 'config.json'}: {wrong}")
    if numerics != "deepseek" and precision.rounds:
        raise UserError(f"{folder}: low precision is DeepSeek's; with numerics {numerics!r} it is not built")
    check_kernels(checkpoint.config, torch.device(device))
    check_device(precision, torch.device(device))
    with torch.device("meta"):
        model = cast(DeepseekV4(checkpoint.config), dtype)
    wanted = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    if missing := sorted(wanted.keys() - {spec.stacked for spec in checkpoint.specs.values()}):
        why = "missing; config.json of a model without an MTP block says num_nextn_predict_layers 0"
        raise UserError(f"{checkpoint.listed}: {missing[0]}: {why}")
    set_precision(model, precision)
    tensors = stream(checkpoint, wanted, device=device)
    model.load_state_dict(dict(store_each(model, tensors) if stored else tensors), assign=True)
    model.origin = checkpoint.folder
    return with_numerics(model.to(device), numerics)


def check_weights(folder: Path) -> None:
    """UserError for a preset that has none."""
    if folder.parent == PRESETS and not (folder / "model.safetensors").exists():
        raise UserError(f"{folder.name}: this preset is a configuration without weights; name a checkpoint's folder")


def stream(
    checkpoint: Checkpoint, wanted: Mapping[str, torch.dtype], *, experts: range | None = None, device: str = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a rank owns, one after another: those in `wanted`, by transformers' names, in these dtypes.

    `experts` leaves only those rows of each [E, ...] tensor of experts. Nothing else is read from the files.
    """
    stacks: dict[str, list[Spec]] = {}
    for spec in checkpoint.specs.values():
        if spec.stacked in wanted:
            stacks.setdefault(spec.stacked, []).append(spec)
    for name, parts in stacks.items():
        first = parts[0]
        if first.experts and experts is not None:
            parts = [spec for spec in parts if spec.part * spec.experts // spec.parts in experts]
        tensor = torch.empty(len(parts), *first.shape, dtype=wanted[name], device=device)
        for place, spec in zip(tensor, parts, strict=True):
            for rows in steps(spec):
                place[rows] = read_values(checkpoint, spec, rows, tensor.dtype)
        shape = first.stacked_shape(first.shape)
        yield name, tensor.view(-1, *shape[1:]) if first.experts else tensor[0]


def cast(model: DeepseekV4, dtype: torch.dtype) -> DeepseekV4:
    """Floating-point tensors to `dtype`, in place, but for the fp32 islands."""
    return model.to(dtype)


def save(
    model: DeepseekV4,
    path: str | Path,
    format: Format = "transformers",
    dtype: Weights | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the tensors, config.json and, from the model's origin, tokenizer and encoding; then renames.

    In transformers' names every tensor keeps its dtype unless `dtype` says how to store it (`write.plan`); the official
    format needs one. One file, or shards and their index where `shard_bytes` ask for it. One process at a time saves to
    a `path`. What a save to it that was cut off has left beside it is removed.
    """
    if dtype is None and format == "official":
        raise ValueError("the official format stores bf16, fp8 or fp4: name one")
    path = Path(path)
    beside = folder_beside(path)
    source = InMemory(model, model.config)
    shards = plan(source, format, dtype, shard_bytes)
    for file, tensors in shards.items():
        write_file(beside / file, tensors, bytes_of(source))
    if len(shards) > 1:
        write_index(beside, shards)
    kept = str(model.lm_head.weight.dtype).removeprefix("torch.") if dtype is None else "bfloat16"
    config = config_json(model.config, format, dtype or "bf16", kept)
    (beside / "config.json").write_text(config)
    for name in BESIDE:
        if model.origin is not None and (model.origin / name).is_file():
            shutil.copyfile(model.origin / name, beside / name)
    if model.origin is not None and (model.origin / OFFICIAL).is_file():
        Encoding.from_checkpoint(model.origin).save(beside)
    replace_folder(beside, path)


def folder_beside(path: Path) -> Path:
    """A new folder to write in before it is renamed to `path`; one that was left half written is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}", stale.name):
            shutil.rmtree(stale, ignore_errors=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    beside.mkdir()
    return beside


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
