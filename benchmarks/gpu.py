"""What the benchmarks on a GPU share: time, memory, ceilings, and which GPU and which source it was."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from floors import Ceilings
from results import machine
from torch import Tensor
from triton.testing import do_bench

ROOT = Path(__file__).parents[1]


def milliseconds(run: Callable[[], object], rep: int = 60) -> float:
    """The median of as many runs as fit into `rep` ms, at least one, each from a cold L2."""
    return do_bench(run, warmup=20, rep=rep, return_mode="median")  # pyright: ignore[reportReturnType]


def measured(run: Callable[[], object], rep: int = 60) -> tuple[float, int] | None:
    """Milliseconds and extra bytes of `run`, whose gradients are there before; None where memory does not suffice."""
    try:
        run()
        return milliseconds(run, rep), extra_bytes(run)
    except torch.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()  # only here has the exception let go of what was allocated
    return None


def extra_bytes(run: Callable[[], object]) -> int:
    """The most memory that `run` holds at once beyond what is allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The same as one CUDA graph: what it takes without the time that a CPU needs to launch each kernel."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.empty_cache()  # the graph has memory of its own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def on_device(run: Callable[[], object]) -> float:
    """Milliseconds of one CUDA graph: a few tens of microseconds of launching would hide what a short kernel takes."""
    return milliseconds(captured(run))


def with_backward(function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


@contextmanager
def no_waits() -> Iterator[None]:
    """RuntimeError where PyTorch would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernel_times(run: Callable[[], object]) -> list[tuple[str, float]]:
    """Of one run: each kernel, copy and fill that the device did, by name, and its milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        found.export_chrome_trace(str(file))
        events = json.loads(file.read_bytes())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return [(event["name"], event["dur"] / 1000) for event in events if event.get("cat") in kinds]


@triton.jit
def _gather(pool, index, out, steps, D: tl.constexpr, ROWS: tl.constexpr):
    """A program adds up `steps` times `ROWS` rows of the pool."""
    program, d = tl.program_id(0), tl.arange(0, D)
    sums = tl.zeros([ROWS, D], tl.float32)
    for i in range(0, steps):
        number = tl.load(index + (program * steps + i) * ROWS + tl.arange(0, ROWS))
        sums += tl.load(pool + number[:, None] * D + d[None, :]).to(tl.float32)
    tl.store(out + program * D + d, tl.sum(sums, 0))


def gather(pool: Tensor, index: Tensor, programs: int, rows: int = 32) -> Tensor:
    """fp32 [programs, D]: sums of rows `index` int32 [programs * steps * rows] of pool [N, D]."""
    out = pool.new_empty(programs, pool.shape[1], dtype=torch.float32)
    steps = index.numel() // programs // rows
    _gather[(programs,)](pool, index, out, steps, D=pool.shape[1], ROWS=rows, num_warps=8)  # pyright: ignore[reportCallIssue]
    return out


def ceilings(device: str = "cuda", side: int = 8192, copied: int = 2**30, programs: int = 1056) -> Ceilings:
    """Products of [side, side], a copy of `copied` bytes, rows of 1 KB from a pool of 8 MB; bf16, random numbers."""
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    products = 2 * side**3 / milliseconds(lambda: a @ b) / 1e9
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * copied / milliseconds(lambda: target.copy_(source)) / 1e6
    pool = torch.randn(8192, 512, device=device).bfloat16()
    steps = 64 if programs > 1 else 1
    index = torch.randint(8192, (programs * steps * 32,), device=device, dtype=torch.int32)
    gathered = index.numel() * 1024 / milliseconds(lambda: gather(pool, index, programs)) / 1e6
    return Ceilings(products, copy, gathered)


def where() -> dict[str, Any]:
    """The machine, its GPU, and the source: a digest, as a copy of the tree on a GPU machine may have no git."""
    if not torch.cuda.is_available():
        raise SystemExit("a CUDA device is needed")
    return machine(("torch", "triton", "transformers")) | {
        "gpu": torch.cuda.get_device_name(),
        "gpu_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "source": source(),
    }


def source() -> str:
    """12 digits of the SHA-256 of the Python files of kernels/, model/ and benchmarks/: other source, other digits."""
    digest = hashlib.sha256()
    for folder in ("kernels", "model", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT)}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
