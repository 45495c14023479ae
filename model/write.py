"""Writing a checkpoint: which tensor goes to which file, in either naming, and its bytes, some at a time."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from ..errors import UserError
from ..kernels.formats import fp4_to_fp8, quantize_fp4, quantize_fp8
from .config import QUANTIZATION, Weights, official_config
from .names import Spec, specs
from .shards import DTYPES, SINGLE, Planned
from .source import QUANTIZED, Source, read_values, steps

Format = Literal["transformers", "official"]
# What travels with the weights: the tokenizer and the chat encoding.
BESIDE = ("tokenizer.json", "tokenizer_config.json", "encoding.json", "generation_config.json")
SHARD_BYTES = 2 * 2**30  # our choice: what an interruption can cost
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Target(Planned):
    """A tensor to write: these official tensors one after another, or their scales."""

    parts: tuple[Spec, ...]
    scales: bool


class InMemory:
    """A model's tensors as a `source.Source`."""

    def __init__(self, model: nn.Module, config: DeepseekV4Config):
        self.config, self._state = config, model.state_dict()
        self.specs = {spec.name: spec for spec in specs(config) if spec.stacked in self._state}
        if unknown := self._state.keys() - {spec.stacked for spec in self.specs.values()}:
            raise ValueError(f"{min(unknown)}: no name is known for this tensor of the model")

    def dtype(self, name: str) -> str:
        return _CODES[self._state[self.specs[name].stacked].dtype]

    def where(self, name: str) -> str:
        return self.specs[name].stacked

    def read(self, name: str, rows: slice) -> Tensor:
        spec = self.specs[name]
        return self._state[spec.stacked].reshape(spec.parts, *spec.shape)[spec.part][rows].cpu()

    def pieces(self, name: str) -> Iterator[Tensor]:
        return (self.read(name, rows) for rows in steps(self.specs[name]))


def plan(
    source: Source, format: Format, dtype: Weights | None, shard_bytes: int = SHARD_BYTES
) -> dict[str, list[Target]]:
    """For each file the tensors that it will hold, in their order. `dtype` None keeps each tensor's own.

    Otherwise `dtype` is what the published checkpoints mean by it: fp8 and fp4 quantize the matrices of attention, of
    the shared experts and of the MTP block's entry to FP8, and the routed experts to FP8 or FP4. All else is stored as
    they store it (`names.Kind`), but norms stay as they are. A matrix and its scales go to one file.
    """
    groups: dict[str, list[Spec]] = {}
    for spec in source.specs.values():
        groups.setdefault(spec.name if format == "official" else spec.stacked, []).append(spec)
    shards: list[list[Target]] = [[]]
    for name, parts in groups.items():
        group = list(_targets(name, tuple(parts), format, _dtype(source, parts[0], dtype)))
        size = sum(target.nbytes for target in group)
        if shards[-1] and sum(target.nbytes for target in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1] += group
    for shard in shards:  # larger dtypes first: `shards.write_file` says why
        shard.sort(key=lambda target: -DTYPES[target.dtype].itemsize)
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors" if count > 1 else SINGLE: s for i, s in enumerate(shards, 1)}


def _dtype(source: Source, spec: Spec, dtype: Weights | None) -> str:
    if dtype is None or spec.kind == "norm":
        return source.dtype(spec.name)
    if spec.kind in ("ids", "fp32"):
        return "I64" if spec.kind == "ids" else "F32"
    if dtype == "bf16" or spec.kind == "wide":
        return "BF16"
    return "I8" if dtype == "fp4" and spec.kind == "expert" else "F8_E4M3"


def _targets(name: str, parts: tuple[Spec, ...], format: Format, dtype: str) -> Iterator[Target]:
    spec = parts[0]
    if dtype == "I8" and spec.shape[1] % 32:
        raise UserError(f"{spec.name}: FP4 needs a multiple of 32 columns; this has {spec.shape[1]}")
    stacked = format == "transformers"
    shape = spec.stored_shape(dtype)
    yield Target(name, dtype, spec.stacked_shape(shape) if stacked else shape, parts, scales=False)
    if dtype in QUANTIZED:
        shape = spec.scale_shape(dtype)
        if stacked:
            yield Target(spec.stacked_scale, "F8_E8M0", spec.stacked_shape(shape), parts, scales=True)
        else:
            yield Target(spec.scale, "F8_E8M0", shape, parts, scales=True)


def bytes_of(source: Source) -> Callable[[Any], Iterator[Tensor]]:
    """What `shards.write_file` asks for. Codes and scales of the wanted dtype are carried as they are."""
    scales: dict[str, Tensor] = {}  # of what was quantized and is not written yet

    def data(target: Target) -> Iterator[Tensor]:
        for spec in target.parts:
            if target.scales:
                yield from [scales.pop(spec.name)] if spec.name in scales else _carried_scales(source, spec)
            elif source.dtype(spec.name) == target.dtype:
                yield from source.pieces(spec.name)
            elif target.dtype in QUANTIZED:
                found = []
                for rows in steps(spec):
                    codes, scale = _quantized(source, spec, rows, target.dtype)
                    found.append(scale)
                    yield codes
                scales[spec.name] = torch.cat([scale.view(torch.uint8) for scale in found])
            else:
                for rows in steps(spec):
                    yield read_values(source, spec, rows, DTYPES[target.dtype])

    return data


def _carried_scales(source: Source, spec: Spec) -> Iterator[Tensor]:
    for piece in source.pieces(spec.scale):
        if bool((piece == 255).any()):
            raise UserError(f"{source.where(spec.scale)}: a scale is NaN (255)")
        yield piece


def _quantized(source: Source, spec: Spec, rows: slice, dtype: str) -> tuple[Tensor, Tensor]:
    """FP4 becomes FP8 without loss; anything else is quantized from its numbers."""
    try:
        if source.dtype(spec.name) == "I8":
            return fp4_to_fp8(source.read(spec.name, rows), source.read(spec.scale, rows))
        values = read_values(source, spec, rows, torch.float32)
        return (quantize_fp4 if dtype == "I8" else quantize_fp8)(values)
    except ValueError as error:
        raise UserError(f"{source.where(spec.name)}: rows {rows.start} to {rows.stop}: {error}") from error


def config_json(config: DeepseekV4Config, format: Format, weights: Weights, dtype: str = "bfloat16") -> str:
    """A checkpoint's config.json; `dtype` is that of what is not quantized. UserError where no official one fits."""
    if format == "official":
        values = official_config(config, weights)
    else:
        values = {**config.to_dict(), "architectures": ["DeepseekV4ForCausalLM"], "dtype": dtype}
        if weights != "bf16":
            values["quantization_config"] = {**QUANTIZATION, "expert_dtype": weights}
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
