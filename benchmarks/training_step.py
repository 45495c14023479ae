"""A whole training step, ours and transformers', and where its time goes; training.py is the command.

Weights take part in bf16, but for those that V4 keeps in fp32. Their fp32 masters and the optimizer are the learner's.
A step is forward, backward, clipping, update, and the weights from their masters; ours has forward and backward as one
CUDA graph. `model FLOP` are those of products and attention, forward and backward, without what is computed again;
`of peak %` is their rate over that of a large product measured in the same run.
"""

import copy
import importlib
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import attention_blocks
import attention_kernels
import gpu
import numpy as np
import torch
from floors import Ceilings
from parts import Row, Rows
from torch import Tensor, nn
from training_setting import Setting
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from triton.runtime.jit import KernelInterface

from amalgam.model import DeepseekV4, initialize
from amalgam.model.matrices import matrices
from amalgam.rl.masters import Masters
from amalgam.rl.optimizer import create_moments, new_optimizer
from amalgam.rl.settings import Optimization
from amalgam.rl.training_graph import TrainingGraphs

RATES = {8_192: 150_000, 32_768: 200_000}  # goals with AdamW, tokens a second by tokens of a step
MEMORY = {8_192: 8.0}  # goal: GiB beyond weights, gradients and optimizer state
OPTIMIZATION = Optimization(lr=1e-4, weight_decay=0.1)
REP = 1000  # milliseconds that steps are timed for
GROUPS = {
    "attention": "attention attention_backward attention_tiles hopper_forward hopper_queries hopper_rows",
    "indexer": "indexer hopper_indexer",
    "compressors": "compress",
    "norms and RoPE": "norm",
    "row-invariant products": "linear hopper_linear",
    "router, sorting": "router moe_rows",
    "experts": "moe moe_backward swiglu fp8_experts",
    "embedding": "embedding",
    "low precision": "fp8 hopper_fp8 storage",
    "hyper-connections": "hyper hyper_backward hopper_hyper",
    "losses over the vocabulary": "losses vocabulary vocabulary_backward hopper_vocabulary hopper_vocabulary_backward",
    "optimizer": "adamw muon symmetric",
}  # by modules of kernels/fused
OTHERS = {
    "cuBLAS's products": "gemm|nvjet|cutlass|cublas|splitk",
    "copies, casts, fills": "memcpy|memset|copy|fill|catarray",
    "PyTorch's other kernels": "",
}  # of what is not ours, by a part of its name, the first that fits


class Trainer:
    """`loss` of a model's weights, and steps of its optimizer: AdamW, or Muon for what is a matrix inside a layer.

    `recorded`, if given, gives the loss and leaves its gradients, as `backward` does otherwise.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[[], Tensor], muon: bool = False, recorded: "Recorded | None" = None
    ):
        self.loss, self.recorded, self.steps = loss, recorded, 0
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = Masters(self.weights, {name: p.detach().float() for name, p in self.weights.items()})
        device = next(model.parameters()).device.type
        muons = matrices(model) if muon else {}
        self.optimizer = new_optimizer(self.masters.by_name, muons, OPTIMIZATION, device)
        create_moments(self.optimizer)

    def backward(self) -> Tensor:
        if self.recorded is not None:
            return self.recorded()
        for p in self.weights.values():
            p.grad = None
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        self.steps += 1
        self.masters.update(self.optimizer, self.steps, OPTIMIZATION.gradient_clipping, alone=True)

    def step(self) -> Tensor:
        loss = self.backward()
        self.update()
        return loss

    def extra_bytes(self) -> int:
        """The most that a step holds beyond weights, gradients, and the optimizer's state."""
        weights = sum(p.nbytes for p in self.weights.values())
        if self.recorded is not None:  # a graph's memory is its own
            return self.recorded.graphs.held_bytes() - weights + gpu.extra_bytes(self.update)
        for p in self.weights.values():
            p.grad = None
        return max(gpu.extra_bytes(self.backward) - weights, gpu.extra_bytes(self.update))


def ours(setting: Setting) -> DeepseekV4:
    """The same weights each time."""
    return copy.deepcopy(_initial(setting.model.to_json_string())).to(setting.device, torch.bfloat16)


@cache
def _initial(config: str) -> DeepseekV4:
    """On the host: drawing them takes seconds."""
    return initialize(DeepseekV4Config(**json.loads(config)), seed=0)


def theirs(setting: Setting, model: DeepseekV4) -> DeepseekV4ForCausalLM:
    """transformers' model with the same weights, all in bf16; its attention is eager, its experts are as it chooses."""
    config = DeepseekV4Config(**setting.model.to_dict())
    config._attn_implementation = "eager"
    with torch.device(setting.device):
        made = DeepseekV4ForCausalLM(config).train()
    made.load_state_dict(model.state_dict())
    for parameter in made.parameters():
        parameter.data = parameter.data.bfloat16()
    return made


def lengths_of(tokens: int, longest: int) -> list[int]:
    """Documents of 1, 1/2, 1/4, 1/8 of `longest` tokens in turn, the last one cut."""
    found: list[int] = []
    while sum(found) < tokens:
        found.append(min(max(longest >> len(found) % 4, 1), tokens - sum(found)))
    return found


def packed_loss(model: DeepseekV4, tokens: Tensor, lengths: list[int]) -> Callable[[], Tensor]:
    """Mean cross-entropy. Documents' borders stay on the host, so that nothing waits for the device."""
    borders = torch.tensor([0, *lengths]).cumsum(0)
    return lambda: -model.logprobs(tokens, borders).sum() / tokens.numel()


class Recorded:
    """`packed_loss` and its gradients as the learner has them: on a GPU, from a CUDA graph."""

    def __init__(self, model: DeepseekV4, tokens: Tensor, lengths: list[int]):
        self.graphs = TrainingGraphs(model)
        weight = np.full(tokens.numel(), 1 / tokens.numel(), np.float32)
        borders = np.cumsum([0, *lengths], dtype=np.int32)
        self.batch = {"tokens": tokens.cpu().numpy(), "weight": weight, "cu_seqlens": borders}

    def __call__(self) -> Tensor:
        return self.graphs.run(weighted_loss, self.batch, {}, {})["loss"]


def weighted_loss(model: DeepseekV4, batch: dict[str, Tensor], shared: dict[str, Tensor]) -> Any:
    loss = -(batch["weight"] * model.logprobs(batch["tokens"], batch["cu_seqlens"])).sum()
    return loss, {"loss": loss}


def model_flop(config: DeepseekV4Config, lengths: list[int], device: str = "cpu") -> float:
    """Of a step's products and attention, forward and backward; the indexers run forward."""
    sizes = attention_kernels.Setting(config, Ceilings(1, 1, 1), device=device)
    names = {kind: name for name, kind in attention_kernels.KINDS.items()}
    each = {(kind, n) for kind in config.layer_types or () for n in set(lengths)}
    flop = {(kind, n): sum(w.flop for w in attention_blocks.block_work(sizes, names[kind], n)) for kind, n in each}
    attention = sum(flop[kind, n] for kind in config.layer_types or () for n in lengths)
    return attention + 6 * sum(lengths) * numbers_of(config)


def numbers_of(config: DeepseekV4Config) -> int:
    """Weights that a token is multiplied with, but for attention's."""
    d, n = config.hidden_size, config.hc_mult
    moe = config.n_routed_experts * d + (config.num_experts_per_tok + 1) * 3 * d * config.moe_intermediate_size
    sites = 2 * (2 + n) * n * n * d
    return config.num_hidden_layers * (moe + sites) + n * n * d + config.vocab_size * d


def step(setting: Setting) -> Rows:
    """Packed documents; then one document, beside transformers' step on the same tokens where it fits."""
    model, name = ours(setting), f"documents of up to {setting.documents:,}"
    for tokens in setting.steps:
        drawn = torch.randint(setting.model.vocab_size, (tokens,), device=setting.device)
        packed = lengths_of(tokens, setting.documents)
        yield from _ours(setting, name, model, drawn, packed, explained=True)
        yield from _ours(setting, f"{name}, Muon", model, drawn, packed, muon=True)
        alone = [*_ours(setting, "one document", model, drawn, [tokens])]
        yield from alone
        if tokens in setting.eager:
            yield _transformers(setting, model, drawn, alone[0].get("ms"))


def _ours(
    setting: Setting, name: str, model: DeepseekV4, drawn: Tensor, lengths: list[int], *,
    muon: bool = False, explained: bool = False,
) -> Rows:  # fmt: skip
    tokens, recorded = drawn.numel(), Recorded(model, drawn, lengths)
    trainer = Trainer(model, packed_loss(model, drawn, lengths), muon, recorded)
    found = gpu.measured(trainer.step, REP)
    if found is None:
        yield {"name": name, "tokens": tokens, "failed": "out of memory"}
        return
    ms, flop = found[0], model_flop(setting.model, lengths)
    row = rated(name, tokens, ms, trainer.extra_bytes(), flop, setting.ceilings)
    if tokens in RATES and not muon:
        rate, most = RATES[tokens], MEMORY.get(tokens)
        row["goal"] = f"{rate:,} tokens/s" + ("" if most is None else f", {most:g} GiB")
        row["met"] = row["tokens_a_second"] >= rate and (most is None or row["extra_gib"] <= most)
    yield row
    for part, run in (("forward", trainer.loss), ("forward and backward", trainer.backward)):
        yield {"name": f"{name}: {part}", "tokens": tokens, "ms": gpu.milliseconds(run, REP)}
    if explained:
        yield from where_time_goes(tokens, trainer, ms)


def rated(name: str, tokens: int, ms: float, extra: int, flop: float, ceilings: Ceilings) -> Row:
    tflops = flop / ms / 1e9
    return {
        "name": name, "tokens": tokens, "ms": ms, "tokens_a_second": round(1000 * tokens / ms), "tflops": tflops,
        "percent_of_peak": 100 * tflops / ceilings.tflops, "extra_gib": extra / 2**30,
    }  # fmt: skip


def _transformers(setting: Setting, model: DeepseekV4, tokens: Tensor, ms: float | None) -> Row:
    made, name, count = theirs(setting, model), "transformers, one document", tokens.numel()
    trainer = Trainer(made, lambda: made(tokens.unsqueeze(0), labels=tokens.unsqueeze(0), use_cache=False).loss)
    found = gpu.measured(trainer.step, REP)
    if found is None:
        return {"name": name, "tokens": count, "failed": "out of memory"}
    flop = model_flop(setting.model, [count])
    row = rated(name, count, found[0], trainer.extra_bytes(), flop, setting.ceilings)
    return row if ms is None else row | {"ours_ms": ms, "over_ours": found[0] / ms}


# --- where the time goes


def where_time_goes(tokens: int, trainer: Trainer, ms: float) -> Iterator[Row]:
    """A step's kernels by group, the most time first; last, the time in which none runs, of `ms`."""
    times: dict[str, float] = {}
    groups = kernel_groups()
    for name, each in gpu.kernel_times(trainer.step):
        group = group_of(name, groups)
        times[group] = times.get(group, 0.0) + each
    idle = {"no kernel": max(ms - sum(times.values()), 0.0)}
    for group, each in [*sorted(times.items(), key=lambda item: -item[1]), *idle.items()]:
        yield {"name": f"  step: {group}", "tokens": tokens, "ms": each, "percent_of_step": 100 * each / ms}


def kernel_groups() -> dict[str, str]:
    """By a kernel's name, its group; or groups, where several have one of that name."""
    found: dict[str, str] = {}
    for group, modules in GROUPS.items():
        for each in modules.split():
            module = importlib.import_module(f"amalgam.kernels.fused.{each}")
            for value in vars(module).values():
                function: Any = getattr(value, "fn", None)
                if isinstance(value, KernelInterface) and function.__module__ == module.__name__:
                    name, before = function.__name__, found.get(function.__name__, group)
                    found[name] = group if before == group else f"{before} or {group}"
    return found


def group_of(kernel: str, groups: dict[str, str]) -> str:
    if kernel in groups:
        return groups[kernel]
    return next(group for group, part in OTHERS.items() if re.search(part, kernel.lower()))
