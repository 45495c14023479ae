"""How fast a learner's weights reach its workers: seconds and GB/s of each part, by each way there is.

.venv/bin/python benchmarks/weights.py --way store                         # on the CPU
.venv/bin/python benchmarks/weights.py --way broadcast --device cuda --workers 1   # a GPU each
.venv/bin/python benchmarks/weights.py --way ipc --device cuda             # all on one GPU
"""

import argparse
import statistics
import time
from typing import Any

import ray
import torch
from results import machine, print_table, write_result
from torch import nn

from amalgam.rl.cluster import log_to_stderr, wait
from amalgam.rl.transport import Receiver, Sender, here
from amalgam.rl.weights import checksums

DEADLINE = 600.0


class Weights(nn.Module):
    """As many bf16 numbers as asked for, in layers of V4's shapes: a few large tensors, and many small ones in fp32."""

    def __init__(self, parameters: int, device: str, layers: int = 12):
        super().__init__()
        experts = parameters // layers // 3 // 2048 * 2048
        for layer in range(layers):
            for i in range(3):
                self._add(f"experts_{layer}_{i}", (experts // 2048, 2048), torch.bfloat16, device)
            for i in range(40):
                self._add(f"small_{layer}_{i}", (64 * i + 1,), torch.float32, device)

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
        self.register_parameter(name, nn.Parameter(torch.randn(shape, device=device).to(dtype), requires_grad=False))


class Side:
    """The learner or a worker."""

    def __init__(self, role: str, device: str, parameters: int, threads: int):
        log_to_stderr()
        torch.set_num_threads(threads)
        self.model, self.device = Weights(parameters, device), device
        self.at = here(role, device)
        self.handle: Any = None
        self.sender, self.receiver = Sender(None, self.at), Receiver(self.at, DEADLINE)

    def place(self) -> Any:
        return self.at

    def checksum(self) -> float:
        return self._timed(lambda: checksums(list(self.model.parameters())))

    def publish(self, version: int, way: Any, to: list[Any]) -> tuple[float, Any]:
        def run() -> None:
            self.handle = self.sender.publish(self.model, version, way, to)

        seconds = self._timed(run)
        return seconds, self.handle

    def send(self) -> float:
        return self._timed(lambda: self.sender.send(self.model, self.handle, DEADLINE))

    def receive(self, handle: Any) -> float:
        return self._timed(lambda: self.receiver.receive(self.model, handle))

    def plain(self, size: int) -> float:
        """One broadcast of one flat tensor, by the same group."""
        group: Any = self.sender._group or self.receiver._group
        flat = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self._timed(lambda: group._finish(group._start(flat), 0, 1))

    def _timed(self, run: Any) -> float:
        self._wait()
        began = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", choices=("store", "broadcast", "ipc"), default="store")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--parameters", type=int, default=729_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    before = machine()
    store = 5 * options.parameters + 10**9 if options.way == "store" else None
    ray.init(
        include_dashboard=False, log_to_driver=False, object_store_memory=store,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(options.threads)}},
    )  # fmt: skip
    shared = options.workers + 1 if options.way == "ipc" else 1
    actor: Any = ray.remote(Side).options(num_cpus=0, num_gpus=1 / shared if options.device == "cuda" else 0)
    arguments = (options.device, options.parameters, options.threads)
    actors: list[Any] = [actor.remote(role, *arguments) for role in ("learner", *["worker"] * options.workers)]
    learner, *workers = actors
    to = wait([worker.place.remote() for worker in workers], "the workers to start", DEADLINE)
    size = 2 * options.parameters
    rows, results = [], []
    for version in range(options.rounds):
        found = one_update(learner, workers, version, options.way, to, size)
        results.append(found)
        rows.append([str(version), *(f"{seconds:.4f}" for seconds in found.values())])
    print(f"{options.way}, {options.device}, {options.workers} workers, {size / 1e9:.2f} GB; seconds")
    print_table(["update", *results[0]], rows)
    medians = {key: statistics.median(each[key] for each in results[1:]) for key in results[0]}
    print_table(["median but the first", *medians], [["GB/s", *(f"{size / s / 1e9:.2f}" for s in medians.values())]])
    name = f"weights_{options.way}_{options.device}"
    print(
        write_result(name, {"machine": before, "bytes": size, **vars(options), "updates": results, "median": medians})
    )


def one_update(learner: Any, workers: list[Any], version: int, way: str, to: list[Any], size: int) -> dict[str, float]:
    """Seconds: of the checksums of all, of packing, from the first call until all workers have checked, and of those
    in `receive` (the slowest)."""
    checksum = wait(learner.checksum.remote(), "checksums", DEADLINE)
    began = time.perf_counter()
    published, handle = learner.publish.options(num_returns=2).remote(version, way, to)
    published = wait(published, "the learner to publish", DEADLINE)
    calls = [worker.receive.remote(handle) for worker in workers]
    sending = [learner.send.remote()] if way == "broadcast" else []
    received = max(wait([*calls, *sending], "the workers to receive", DEADLINE)[: len(calls)])
    found = {
        "checksums": checksum, "publish": published, "receive": received, "whole": time.perf_counter() - began
    }  # fmt: skip
    if way == "broadcast":
        everyone = [side.plain.remote(size) for side in (learner, *workers)]
        found["plain broadcast"] = max(wait(everyone, "a plain broadcast", DEADLINE))
    return found


if __name__ == "__main__":
    main()
