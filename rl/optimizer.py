"""The learner's optimizer: AdamW, or Muon for a model's matrices and AdamW for all else.

Where a rank has everything, `update` takes a step from the gradients on: norm, clipping, masters, weights. From ZeRO's
stage 1 on DeepSpeed clips, calls `step` on flat fp32 shards, and hands out masters. (DeepSpeed's own Muon is not used:
it has other Newton-Schulz coefficients and updates of another size.)
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..kernels.adamw import MOMENTS, adamw_step, gradient_norm
from ..kernels.muon import muon_step, runs_of, step_with, to_updates
from ..model.matrices import Matrices
from .settings import Optimization
from .shards import Shards

Trained = dict[str, nn.Parameter]

ADAMW = MOMENTS
MUON = ("momentum",)


def lr_at(step: int, optimization: Optimization, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0): a linear warm-up, and a decay over the others."""
    o = optimization
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    progress = min((step - o.warmup_steps) / max(total_steps - o.warmup_steps, 1), 1.0)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    left = {"constant": 1.0, "linear": 1 - progress, "cosine": cosine}[o.decay]
    return o.lr * (o.min_lr_ratio + (1 - o.min_lr_ratio) * left)


class AdamW(torch.optim.AdamW):
    """torch's, with `update`."""

    @torch.no_grad()
    def update(
        self, gradients: dict[Tensor, Tensor], weights: dict[Tensor, Tensor | None], step: int, clip: float
    ) -> Tensor:
        """Step number `step` (from 1) of all parameters, fp32 masters, in place; the gradient's norm fp32 [] before it.

        `gradients` in bf16 or fp32, and `weights` that become what their masters are (`adamw.adamw_step`), by master.
        Nothing changes where the norm is not finite, and nothing waits for a GPU.
        """
        norm = gradient_norm(list(gradients.values()))
        for group in self.param_groups:
            held = group["params"]
            self._take(group, [gradients[p] for p in held], [weights[p] for p in held], norm, step, clip)
        return norm

    def _take(
        self,
        group: dict[str, Any],
        gradients: list[Tensor],
        weights: list[Tensor | None],
        norm: Tensor,
        step: int,
        clip: float,
    ) -> None:
        held = group["params"]
        firsts, seconds = ([self.state[p][key] for p in held] for key in ADAMW)
        settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        adamw_step(held, gradients, firsts, seconds, weights, norm, step=step, clip=clip, **settings)


class Muon(AdamW):
    """Groups that have a "momentum" take Muon's step, all others AdamW's.

    `matrices`: those of each of Muon's parameters. Newton-Schulz runs in `dtype`. Without ZeRO, or at its stage 0, a
    group holds whole parameters; from stage 1 on DeepSpeed puts one flat tensor into it, which `shard` must know.
    `step` overwrites Muon's gradients, and is a collective.
    """

    def __init__(self, groups: list[dict], matrices: dict[Tensor, Matrices], dtype: torch.dtype, **adamw: Any):
        super().__init__(groups, **adamw)
        self._matrices, self._dtype = matrices, dtype
        self._runs = {p: runs_of(each) for p, each in matrices.items()}
        self._shards: dict[Tensor, Shards] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        groups = self.param_groups
        for group in groups:
            if "momentum" in group and group["params"]:
                (flat,) = group["params"]
                settings = {key: group[key] for key in ("lr", "momentum", "weight_decay")}
                step_with(partial(self._update, flat), [flat], [flat.grad], [self.state[flat]["momentum"]], **settings)
        self.param_groups = [group for group in groups if "momentum" not in group]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _update(self, flat: Tensor, tensors: Sequence[Tensor]) -> None:
        self._shards[flat].apply(tensors[0], partial(to_updates, dtype=self._dtype))

    def _take(
        self,
        group: dict[str, Any],
        gradients: list[Tensor],
        weights: list[Tensor | None],
        norm: Tensor,
        step: int,
        clip: float,
    ) -> None:
        if "momentum" not in group:
            return super()._take(group, gradients, weights, norm, step, clip)
        held = group["params"]
        momenta = [self.state[p]["momentum"] for p in held]
        settings = {key: group[key] for key in ("lr", "momentum", "weight_decay")}
        more = {"runs": [self._runs[p] for p in held], "dtype": self._dtype, "clip": clip}
        return muon_step(held, gradients, momenta, weights, norm, **settings, **more)

    def shard(self, zero: Any, stage: int, rank: int) -> None:
        """Reads from DeepSpeed's optimizer of stage 1 to 3 which rank holds what (a collective)."""
        if stage == 3:
            lists, flats = zero.fp16_groups, zero.fp32_partitioned_groups_flat
        else:
            lists, flats = zero.bit16_groups, zero.single_partition_of_fp32_groups
        for parameters, flat in zip(lists, flats, strict=True):
            if parameters[0] in self._matrices:
                runs = [_run_3(zero, p, rank) if stage == 3 else _run(p) for p in parameters]
                own = torch.tensor([run[:2] for run in runs], device=flat.device)
                owned = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
                distributed.all_gather(owned, own)
                places = [place for *_, place in runs]
                self._shards[flat] = Shards(rank, [self._matrices[p] for p in parameters], torch.stack(owned), places)


def new_optimizer(trained: Trained, matrices: dict[str, Matrices], o: Optimization, device: str) -> AdamW:
    """Muon for the `matrices` of trained parameters, where there are any, and AdamW.

    Weight decay is for matrices and tables only (our choice): a norm's gain or a bias has no reason to shrink.
    """
    ours = {name: p for name, p in trained.items() if name in matrices}
    others = {name: p for name, p in trained.items() if name not in matrices}
    decayed = {name: p.ndim >= 2 and not name.endswith("position_bias") for name, p in others.items()}
    groups = [
        {"params": [p for name, p in others.items() if decayed[name]], "weight_decay": o.weight_decay},
        {"params": [p for name, p in others.items() if not decayed[name]], "weight_decay": 0.0},
    ]
    adamw = {"lr": o.lr, "betas": o.betas, "eps": o.eps, "fused": device == "cuda"}
    if not ours:
        return AdamW([group for group in groups if group["params"]], **adamw)
    muon = {"params": list(ours.values()), "weight_decay": o.weight_decay, "momentum": o.momentum}
    # On a CPU products in bf16 are not faster than in fp32.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    groups = [group for group in (muon, *groups) if group["params"]]
    return Muon(groups, {p: matrices[name] for name, p in ours.items()}, dtype, **adamw)


def create_moments(optimizer: AdamW, zero: Any = None, stage: int = 0, rank: int = 0) -> None:
    """The optimizer's state as its first step would create it, so that it can be saved and loaded before that.

    `zero`: DeepSpeed's optimizer around it, from stage 1 on. (It links parameters to moments after the first group's
    first step: too early for the second.)
    """
    groups = optimizer.param_groups
    if stage == 3:
        held = [(groups[zero.sub_group_to_group_id[i]], p) for i, p in enumerate(zero.fp32_partitioned_groups_flat)]
    else:
        held = [(group, p) for group in groups for p in group["params"]]
    for group, p in held:
        muon = "momentum" in group
        moments = {key: torch.zeros_like(p) for key in (MUON if muon else ADAMW)}
        optimizer.state[p] = moments
        if stage and not muon:
            moments["step"] = torch.zeros((), device=p.device if group["fused"] else "cpu")
    if stage in (1, 2):
        zero._lazy_init_hp_params_optimizer_state()
    if stage and isinstance(optimizer, Muon):
        optimizer.shard(zero, stage, rank)


def _run(p: Any) -> tuple[int, int, int]:
    """Where this rank's elements of a parameter begin in it, how many they are, where they begin in the flat tensor."""
    if p._hp_mapping is None:
        return 0, 0, 0
    own = p._hp_mapping.lp_fragment_address
    return own.start, own.numel, p._hp_mapping.hp_fragment_address.start


def _run_3(zero: Any, p: Any, rank: int) -> tuple[int, int, int]:
    """The same at stage 3, where every parameter is cut into shares of one size; the last ones may be padded."""
    _, place, size = zero.grad_position[zero.get_param_id(p)]
    begin = min(rank * size, p.ds_numel)
    return begin, min(size, p.ds_numel - begin), place
