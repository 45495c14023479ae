"""`amalgam convert` on an official checkpoint of several GB: memory, time, and a kill -9 in the middle.

Makes a checkpoint in the official layout with random FP4 and FP8 codes, converts it to transformers' names and back,
and to FP8, each in a process of its own. One conversion is killed and given again. README.md says what is measured.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from processes import AMALGAM, ENVIRONMENT
from results import machine, print_table, write_result
from torch import Tensor
from transformers import DeepseekV4Config

from amalgam.model.config import config_of
from amalgam.model.names import Spec, specs
from amalgam.model.shards import DTYPES, Planned, write_file, write_index
from amalgam.model.source import Checkpoint
from amalgam.model.write import bytes_of, config_json, plan

SMALLER = {"vocab_size": 32768, "hidden_size": 2048, "moe_intermediate_size": 1024, "n_routed_experts": 64}
KINDS = {"wide": "BF16", "norm": "BF16", "fp32": "F32", "ids": "I64", "dense": "F8_E4M3", "expert": "I8"}


class Random:
    """A source of random tensors, official dtypes."""

    def __init__(self, config: DeepseekV4Config):
        self.config, self.specs = config, {spec.name: spec for spec in specs(config)}
        self._generator = torch.Generator().manual_seed(0)

    def dtype(self, name: str) -> str:
        return KINDS[self.specs[name].kind]

    def where(self, name: str) -> str:
        return name

    def read(self, name: str, rows: slice) -> Tensor:
        raise NotImplementedError("nothing is converted here")

    def pieces(self, name: str) -> Iterator[Tensor]:
        spec = self.specs.get(name)
        if spec is None:
            weight = self.specs[name.removesuffix("scale") + "weight"]
            shape = weight.scale_shape(self.dtype(weight.name))
            yield torch.randint(117, 122, shape, dtype=torch.uint8, generator=self._generator)
            return
        tensor = Planned(name, self.dtype(name), spec.stored_shape(self.dtype(name)))
        if tensor.dtype in ("BF16", "F32"):
            yield torch.randn(spec.shape, generator=self._generator).to(DTYPES[tensor.dtype])
        elif tensor.dtype == "I64":
            yield torch.randint(self.config.n_routed_experts, spec.shape, generator=self._generator)
        else:  # FP8's NaN is 127
            high = 127 if tensor.dtype == "F8_E4M3" else 256
            yield torch.randint(0, high, tensor.shape, dtype=torch.uint8, generator=self._generator)


def make(folder: Path, count: int) -> int:
    """The first layers of V4-Flash and its MTP block in smaller widths, a third of a GB each. Their bytes."""
    flash: Any = config_of("flash").to_dict() | SMALLER
    flash |= {key: flash[key][:count] for key in ("layer_types", "mlp_layer_types")} | {"num_hidden_layers": count}
    source = Random(DeepseekV4Config(**flash))
    shards = plan(source, "official", None, 512 * 2**20)
    folder.mkdir()
    for file, tensors in shards.items():
        write_file(folder / file, tensors, bytes_of(source))
    write_index(folder, shards)
    (folder / "config.json").write_text(config_json(source.config, "official", "fp4"))
    return sum(tensor.nbytes for shard in shards.values() for tensor in shard)


def child(*command: str, kill_after: tuple[Path, int] | None = None) -> dict[str, float]:
    """Runs a command. `kill_after` (a folder, n): kill -9 in the middle of the shard after the nth.

    Wall and CPU seconds, and its peak resident size in bytes.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak, finished_at = 0, None
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, _peak(process.pid))
        if kill_after and len(list(kill_after[0].glob("model-*.safetensors"))) >= kill_after[1]:
            finished_at = finished_at or time.monotonic()
            if time.monotonic() > finished_at + 1.0:
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.02)
    code = process.returncode = os.waitstatus_to_exitcode(status)
    if code != (-signal.SIGKILL if kill_after else 0):
        errors = process.stderr.read().decode() if process.stderr else ""
        sys.exit(f"{' '.join(command)}: ended with {code}\n{errors[-2000:]}")
    seconds = time.monotonic() - started
    return {"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime, "peak_bytes": peak}


def _peak(pid: int) -> int:
    """The highest resident size so far. (`ru_maxrss` would count this process, from before the child's exec.)"""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def same(one: Path, other: Path) -> int:
    """Compares all tensors of two checkpoints byte by byte, scales too; how many there are. AssertionError if not."""
    first, second = Checkpoint(one), Checkpoint(other)
    assert first.specs == second.specs
    names = [name for spec in first.specs.values() for name in _stored(first, spec)]
    for name in names:
        assert first.dtype(name) == second.dtype(name), name
        for ours, theirs in zip(first.pieces(name), second.pieces(name), strict=True):
            assert torch.equal(ours, theirs), name
    return len(names)


def _stored(checkpoint: Checkpoint, spec: Spec) -> list[str]:
    return [spec.name, spec.scale] if checkpoint.dtype(spec.name) in ("I8", "F8_E4M3") else [spec.name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=22, help="of the checkpoint (22, which are 7.6 GB)")
    parser.add_argument("--folder", type=Path, help="where to work: four times the checkpoint's size (the system's)")
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(("amalgam", "torch", "safetensors"))}
    work = Path(tempfile.mkdtemp(prefix="convert-", dir=options.folder))
    try:
        result |= measure(work, options.layers)
    finally:
        shutil.rmtree(work)
    rows = [
        (name, f"{run['seconds']:.1f}", f"{run['cpu']:.1f}", f"{run['peak_bytes'] / 2**20:.0f}")
        for name, run in result["runs"].items()
    ]
    print_table(("run", "s", "CPU s", "peak MiB"), rows)
    print(f"source: {result['source_bytes'] / 1e9:.2f} GB, {result['source_shards']} shards")
    print(f"killed: {result['shards_kept']} of {result['shards']} shards were finished and kept")
    print(f"{result['tensors_compared']} tensors compared: resumed = undisturbed, and back = source, bit for bit")
    print(write_result("convert", result))


def measure(work: Path, layers: int) -> dict:
    source, there, again, back = (work / name for name in ("source", "there", "again", "back"))
    size = make(source, layers)
    convert = [*AMALGAM, "convert"]
    to_theirs = ["--format", "transformers", "--dtype", "fp4"]
    runs = {"import alone": child(sys.executable, "-P", "-c", "import amalgam.model.convert")}
    runs["official fp4 -> transformers fp4"] = child(*convert, str(source), str(there), *to_theirs)
    shards = len(list(there.glob("model-*.safetensors")))
    middle = (again, shards // 2)
    runs["the same, killed -9"] = child(*convert, str(source), str(again), *to_theirs, kill_after=middle)
    assert not (again / "config.json").exists()
    kept = len(list(again.glob("model-*.safetensors")))
    stamps = {file: file.stat().st_mtime_ns for file in again.glob("model-*.safetensors")}
    runs["the same command again"] = child(*convert, str(source), str(again), *to_theirs)
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in stamps.items())
    compared = same(there, again)
    shutil.rmtree(again)
    runs["transformers fp4 -> official fp4"] = child(
        *convert, str(there), str(back), "--format", "official", "--dtype", "fp4"
    )
    compared += same(source, back)
    shutil.rmtree(back)
    shutil.rmtree(there)
    runs["official fp4 -> official fp8"] = child(
        *convert, str(source), str(back), "--format", "official", "--dtype", "fp8"
    )
    return {
        "source_bytes": size,
        "source_shards": len(list(source.glob("*.safetensors"))),
        "shards": shards,
        "shards_kept": kept,
        "tensors_compared": compared,
        "runs": runs,
    }


if __name__ == "__main__":
    main()
