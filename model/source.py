"""A checkpoint in either naming as one table of official tensors: checked against its config.json, read in parts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import DeepseekV4Config

from ..errors import UserError
from ..kernels.formats import dequantize_fp4, dequantize_fp8
from .config import PRESETS, Weights, config_of, resolve, weights_of
from .names import Spec, other_names, specs
from .shards import Stored, shown, tensors_of

QUANTIZED = {"F8_E4M3": "FP8", "I8": "FP4"}
# What a tensor of a kind may be stored as. FP32 is cast to BF16 and back; int32 is what DeepSeek's own code keeps.
_STORED = {
    "wide": ("BF16", "F32"),
    "norm": ("BF16", "F32"),
    "fp32": ("F32", "BF16"),
    "ids": ("I64", "I32"),
    "dense": ("BF16", "F32", "F8_E4M3"),
    "expert": ("BF16", "F32", "F8_E4M3", "I8"),
}
_STEP = 4 * 2**20  # numbers that are converted at once


class Source(Protocol):
    """Where tensors come from, by official names: a checkpoint on disk or a model in memory."""

    config: DeepseekV4Config
    specs: dict[str, Spec]  # of what is there, in the order of `names.specs`; scales are not in it

    def dtype(self, name: str) -> str: ...  # as safetensors calls it

    def where(self, name: str) -> str: ...  # for an error

    def read(self, name: str, rows: slice) -> Tensor: ...

    def pieces(self, name: str) -> Iterator[Tensor]: ...


class Checkpoint:
    """A checkpoint's folder, or a preset. Its files hold every tensor that config.json asks for, and no other.

    The MTP block may be missing as a whole: transformers neither builds nor saves it. UserError names the file and the
    tensor that is unknown, missing, there twice, or of a wrong shape or dtype. No tensor is read yet.
    """

    def __init__(self, path: str | Path):
        self.folder, self.config = resolve(path), config_of(path)
        if self.folder.parent == PRESETS and not any(self.folder.glob("*.safetensors")):
            message = "this preset is a configuration without weights; name a checkpoint's folder"
            raise UserError(f"{self.folder.name}: {message}")
        self.listed, stored = tensors_of(self.folder)
        self._check_count_of_experts(stored)
        self.specs = {spec.name: spec for spec in specs(self.config)}
        self._places = _placed(list(self.specs.values()), stored)
        if not any(name.startswith("mtp.") for name in self._places):
            self.specs = {name: spec for name, spec in self.specs.items() if not name.startswith("mtp.")}
        self._check_complete(official="embed.weight" in stored)
        self._check_claim(weights_of(path))

    def dtype(self, name: str) -> str:
        return self._places[name].dtype

    def where(self, name: str) -> str:
        return str(self._places[name])

    def read(self, name: str, rows: slice) -> Tensor:
        return self._places[name].read(rows)

    def pieces(self, name: str) -> Iterator[Tensor]:
        return self._places[name].pieces()

    def _check_count_of_experts(self, stored: dict[str, Stored]) -> None:
        """First of all: a damaged count in config.json could make the table of names endless."""
        names = ("layers.0.ffn.gate.weight", "model.layers.0.mlp.gate.weight", "model.layers.0.ffn.gate.weight")
        for name in names:
            if name in stored:
                _check_shape(stored[name], (self.config.n_routed_experts, self.config.hidden_size))
                return
        official = "embed.weight" in stored
        raise UserError(f"{self.listed}: {names[0 if official else 1]}: missing")

    def _check_complete(self, official: bool) -> None:
        missing = [spec for name, spec in self.specs.items() if name not in self._places]
        if missing:
            name = missing[0].name if official else missing[0].stacked
            raise UserError(f"{self.listed}: {name}: missing ({len(missing)} tensors of the model are not there)")
        for name, spec in self.specs.items():
            if self.dtype(name) in QUANTIZED and spec.scale not in self._places:
                scale = spec.scale if official else spec.stacked_scale
                raise UserError(f"{self.where(name)}: its scales, {scale}, are missing")

    def _check_claim(self, claim: Weights) -> None:
        quantized = [name for name in self.specs if self.dtype(name) in QUANTIZED]
        file = self.folder / "config.json"
        if quantized and claim == "bf16":
            kind = QUANTIZED[self.dtype(quantized[0])]
            raise UserError(f"{self.where(quantized[0])}: is {kind}, but {file} has no quantization_config")
        if claim != "bf16" and not quantized:
            raise UserError(f"{file}: quantization_config: there, but no tensor is quantized")
        for name, spec in self.specs.items():
            if claim == "fp4" and spec.kind == "expert" and self.dtype(name) != "I8":
                raise UserError(f"{self.where(name)}: dtype {self.dtype(name)}; {file} says that experts are fp4: I8")


def _placed(wanted: list[Spec], stored: dict[str, Stored]) -> dict[str, Stored]:
    """Where each official tensor lies, scales too."""
    matrices, scales = _names(wanted)
    if unknown := [name for name in stored if name not in matrices and name not in scales]:
        more = f"not a tensor of this model ({len(unknown)} such)"
        raise UserError(f"{stored[unknown[0]].file}: {shown(unknown[0])}: {more}")
    places: dict[str, Stored] = {}

    def put(name: str, entry: Stored, spec: Spec, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        if name in places:
            raise UserError(f"{entry}: the same tensor is there as {places[name].name} in {places[name].file.name}")
        if entry.dtype not in dtypes:
            raise UserError(f"{entry}: dtype {entry.dtype}; want {' or '.join(dtypes)}")
        if entry.dtype == "I8" and spec.shape[1] % 32:
            raise UserError(f"{entry}: FP4 needs a multiple of 32 columns, config.json asks for {spec.shape[1]}")
        stacked = entry.name in (spec.stacked, spec.stacked_scale)
        _check_shape(entry, spec.stacked_shape(shape) if stacked else shape)
        places[name] = entry.piece(spec.part, shape) if stacked else entry

    for name in (name for name in stored if name in matrices):
        for spec in matrices[name]:
            put(spec.name, stored[name], spec, spec.stored_shape(stored[name].dtype), _STORED[spec.kind])
    for name in (name for name in stored if name in scales):
        for spec in scales[name]:
            kind = places[spec.name].dtype if spec.name in places else None
            if kind not in QUANTIZED:
                raise UserError(f"{stored[name]}: scales, but {spec.name} is {kind or 'missing'}")
            put(spec.scale, stored[name], spec, spec.scale_shape(kind), ("F8_E8M0",))
    return places


def _names(wanted: list[Spec]) -> tuple[dict[str, list[Spec]], dict[str, list[Spec]]]:
    """For every name that a file may use, the official tensors in it: of tensors, and of scales."""
    matrices: dict[str, list[Spec]] = {}
    scales: dict[str, list[Spec]] = {}
    for spec in wanted:
        for name in (spec.name, *other_names(spec)):
            matrices[name] = [spec]
        if spec.experts:
            matrices.setdefault(spec.stacked, []).append(spec)
            scales.setdefault(spec.stacked_scale, []).append(spec)
        else:
            matrices[spec.stacked] = [spec]
        if spec.kind in ("dense", "expert"):
            scales[spec.scale] = [spec]
            scales.setdefault(spec.stacked_scale, [spec])
    return matrices, scales


def _check_shape(entry: Stored, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise UserError(f"{entry}: shape {list(entry.shape)}, config.json asks for {list(shape)}")


def steps(spec: Spec) -> list[slice]:
    """Rows that are converted at once: whole tiles of FP8, some million numbers."""
    if len(spec.shape) < 2:
        return [slice(None)]
    count = max(_STEP // spec.shape[1] // 128, 1) * 128
    return [slice(start, min(start + count, spec.shape[0])) for start in range(0, spec.shape[0], count)]


def read_values(source: Source, spec: Spec, rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows of a tensor as numbers of `dtype`; FP8 and FP4 are dequantized. UserError for a scale that is NaN."""
    stored = source.dtype(spec.name)
    codes = source.read(spec.name, rows)
    if stored not in QUANTIZED:
        return codes.to(dtype)
    try:
        if stored == "I8":
            return dequantize_fp4(codes, source.read(spec.scale, rows), dtype)
        return dequantize_fp8(codes, source.read(spec.scale, tiles(rows)), dtype)
    except ValueError as error:
        raise UserError(f"{source.where(spec.name)}: rows {rows.start} to {rows.stop}: {error}") from error


def tiles(rows: slice) -> slice:
    """The rows of scales that go with some rows of FP8."""
    return slice(rows.start // 128, -(-rows.stop // 128))
