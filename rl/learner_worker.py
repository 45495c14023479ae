"""One rank of the learner: a process around a DeepSpeed engine. `learner.py` has the driver's side.

Below stage 3 DeepSpeed has fp32 masters (`masters.py`), and never sees the model; it runs without its bf16 section,
which would cast V4's fp32 islands. At stage 3 it shards the model itself, which then computes in fp32. Two habits of
DeepSpeed are undone, so that a gradient depends neither on micro-batches nor on ranks:

- It divides by accumulation steps and by ranks. Here a loss divides by a number of the whole optimizer batch.
- It reduces a gradient when a backward pass reaches it. V4's graph depends on the data (a compressor without
  a complete window has no gradient), so ranks would reduce in different orders. Here each rank sums over its
  micro-batches, in fp32, and one reduction in the order of the parameters follows. So stages 2 and 3 hold a whole
  gradient until the step's end.

With one rank, and so at stage 0, a step of one micro-batch reads its gradients where the backward left them.
"""

import gc
import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..settings import Precision
from .balance import Loads, figures
from .cluster import log_to_stderr
from .losses import Loss, add, named
from .masters import Masters
from .memory import Span
from .offload import Offload, tensors_of
from .optimizer import ADAMW, MUON, create_moments, lr_at, new_optimizer
from .packing import Batch, tensors
from .settings import Optimization
from .stage_3 import Objective, detached, let_go
from .state import Shapes, read_state, write_state
from .training_graph import TrainingGraphs, why_not
from .transport import Handle, Place, Sender, Way, from_host, here

_BUCKET_ELEMENTS = 50_000_000  # of one reduction; DeepSpeed's default would allocate 2 GB for it


class LearnerWorker:
    """The actor. Its methods are called on all ranks at once: they meet in collectives."""

    def __init__(self, rank: int, ranks: int, device: str, threads: int):
        # DeepSpeed reads these when it is imported and when an engine is made.
        os.environ.update(DS_ACCELERATOR=device, RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(ranks))
        log_to_stderr()
        torch.set_num_threads(threads)
        self._rank, self._ranks, self._device = rank, ranks, device
        self._engine: Any = None
        self._model: Any = None
        self._masters: Masters | None = None  # below stage 3
        self._graphs: TrainingGraphs | None = None  # of the weights beside masters
        self._trained: dict[str, nn.Parameter] = {}  # that the optimizer steps: masters, or the model's own
        self._moments: dict[str, tuple[str, ...]] = {}
        self._biases: dict[str, Tensor] = {}
        self._loads: Any = None
        self._shared: dict[str, Tensor] = {}
        self._sender: Any = None
        self._handle: Any = None  # that was published last
        self._offloaded: Offload | None = None

    def place(self) -> Place:
        return here(f"the learner's rank {self._rank}", self._device)

    def listen(self, host: str, seconds: float) -> int:
        """Opens the ranks' meeting point on rank 0, and returns its port."""
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        timeout = timedelta(seconds=seconds)
        self._store = TCPStore(host, 0, self._ranks, is_master=True, timeout=timeout, wait_for_workers=False)
        return self._store.port

    def connect(self, host: str, port: int, one_host: bool, seconds: float) -> None:
        from torch.distributed import TCPStore, init_process_group  # pyright: ignore[reportPrivateImportUsage]

        timeout = timedelta(seconds=seconds)
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
        if one_host:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        import deepspeed

        if self._device == "cpu":  # else DeepSpeed compiles its shared-memory collectives for a minute
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        store = TCPStore(host, port, self._ranks, timeout=timeout) if self._rank else self._store
        backend = "nccl" if self._device == "cuda" else "gloo"
        init_process_group(backend, store=store, rank=self._rank, world_size=self._ranks, timeout=timeout)
        deepspeed.init_distributed(dist_init_required=False)

    def load(
        self,
        path: str,
        optimization: Optimization,
        total_steps: int,
        precision: Precision,
        unfreeze: tuple[str, ...],
    ) -> None:
        import deepspeed

        from ..model import load
        from ..model.matrices import matrices

        self._unload()
        self.memory = Span()
        self._optimization, self._total_steps, self._steps = optimization, total_steps, 0
        # One rank has nothing to shard, and is spared DeepSpeed's flat copy of the parameters.
        self._stage = optimization.zero_stage if self._ranks > 1 else 0
        dtype = precision.dtype(self._device)
        if problem := optimization.problem(dtype):
            raise UserError(f"optimizer.zero_stage: {problem}")
        self._model = load(path, device=self._device, precision=precision)
        for part in unfreeze:
            self._model.unfreeze(part)
        self._trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        if self._stage < 3:
            wide = self._model if dtype == "float32" else load(path, torch.float32, self._device, precision=precision)
            self._masters = Masters(self._trained, {n: p.detach() for n, p in wide.named_parameters()})
            self._trained = self._masters.by_name
        muons = matrices(self._model) if optimization.name == "muon" else {}
        self._moments = {name: MUON if name in muons else ADAMW for name in self._trained}
        self._loads = Loads(self._model)
        if self._masters:
            self._graphs = TrainingGraphs(self._model, self._loads, self._ranks)
        self._biases = {}  # that the balance rule changes, and so belong to the state
        if optimization.balance_speed:
            buffers = self._model.named_buffers()
            self._biases = {name: b for name, b in buffers if name.endswith("e_score_correction_bias")}
        if self._stage == 3:  # layers are gathered whole: which of their parameters are used depends on data
            lists = [module for module in self._model.modules() if isinstance(module, nn.ModuleList)]
            kinds = {type(layer) for layers in lists for layer in layers}
            deepspeed.utils.set_z3_leaf_modules(self._model, list(kinds))
        optimizer = new_optimizer(self._trained, muons, optimization, self._device)
        held = self._masters or Objective(self._model)
        self._engine, *_ = deepspeed.initialize(model=held, optimizer=optimizer, config=self._config())
        self._engine.set_gradient_accumulation_boundary(True)
        create_moments(optimizer, self._engine.optimizer, self._stage, self._rank)
        if self._masters:
            self._masters.write()
        with self._gathered():
            self._sender = Sender(self._model, self.place())

    def _unload(self) -> None:
        """Lets go of the engine and its memory."""
        if self._engine is None:
            return
        self._engine.destroy()
        self._engine = self._model = self._masters = self._graphs = None
        self._sender = self._handle = self._offloaded = None
        self._trained, self._moments, self._biases, self._loads, self._shared = {}, {}, {}, None, {}
        if self._stage == 3:
            let_go()
        gc.collect()  # engine, optimizer and hooks refer to each other

    def _config(self) -> dict[str, Any]:
        half = math.ceil(sum(p.numel() for p in self._trained.values()) / 2)
        bucket = min(2 * half, _BUCKET_ELEMENTS)  # DeepSpeed wants an even number
        sizes = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self._optimization.gradient_clipping,
            "zero_optimization": {"stage": self._stage, "overlap_comm": False, **sizes},
            "zero_allow_untested_optimizer": True,  # Muon's class is not of DeepSpeed's list
        }

    def share(self, arrays: dict[str, np.ndarray]) -> None:
        self._shared, self._offloaded = tensors(arrays, self._device), None
        if self._graphs:
            self._graphs.clear()  # which read what was shared before

    def step(
        self,
        batches: list[Batch | None],
        spare: Batch,
        loss: str | Loss,
        settings: dict[str, Any],
    ) -> dict[str, float]:
        """An optimizer step on this rank's micro-batches: the sums of their metrics, "grad_norm" and "lr"."""
        engine, objective = self._engine, named(loss)
        lr = lr_at(self._steps, self._optimization, self._total_steps)
        for group in engine.basic_optimizer.param_groups:
            group["lr"] = lr
        self._loads.start(self._device)
        self._model.train()
        run = self._sharded_gradients if self._masters is None else self._gradients
        totals = run(objective, batches, spare, settings)
        self._loads.counting = False
        norm = self._update(self._alone(batches))
        loads = self._loads.take()
        if self._biases:
            self._loads.balance(loads, self._optimization.balance_speed)
        self._steps += 1
        sums = {name: float(total) for name, total in totals.items()}
        return {**sums, "grad_norm": norm, "lr": lr, **figures(loads)}

    def _gradients(
        self, loss: Loss, batches: list[Batch | None], spare: Batch, settings: dict[str, Any]
    ) -> dict[str, Tensor]:
        """The sums of the micro-batches' metrics. The gradients are the masters' then; one alone still the weights'."""
        assert self._masters is not None
        self._masters.forget()  # of a step that failed
        self._loads.counting = True
        totals: dict[str, Any] = {}
        for batch in filter(None, batches):
            add(totals, self._backward(loss, batch, settings))
            if not self._alone(batches):
                self._masters.collect()
        return totals

    def _alone(self, batches: list[Batch | None]) -> bool:
        """Whether a step's only gradient is that of one micro-batch."""
        return self._ranks == 1 and len(batches) == 1

    def _backward(self, loss: Loss, batch: Batch, settings: dict[str, Any]) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch. Its gradients, times the ranks, are in the weights' `grad`, where no
        other's are left; the metrics."""
        if self._graphs and not why_not(self._model, loss):
            return self._graphs.run(loss, batch, self._shared, settings)
        self._model.zero_grad()
        value, metrics = loss(self._model, tensors(batch, self._device), self._shared, **settings)
        (value * self._ranks).backward()
        return detached(metrics)

    def _sharded_gradients(
        self, loss: Loss, batches: list[Batch | None], spare: Batch, settings: dict[str, Any]
    ) -> dict[str, Tensor]:
        """As `_gradients`, at stage 3, where DeepSpeed holds the gradients."""
        engine, totals = self._engine, {}
        engine.zero_grad()  # of a step that failed
        with engine.coalesce_grad_reduction():
            for batch in batches:
                # A rank without rows takes part with a weight of zero: the others wait for it.
                self._loads.counting = batch is not None
                value = engine(loss, tensors(batch or spare, self._device), self._shared, settings)
                engine.backward(value * (self._ranks if batch else 0.0), scale_wrt_gas=False)
                if batch:
                    add(totals, engine.module.metrics)
        return totals

    def _update(self, alone: bool) -> float:
        """Steps the optimizer; the gradient's norm before clipping. One that is not finite is an error."""
        engine, masters = self._engine, self._masters
        if self._stage == 0:
            assert masters is not None
            if not alone:
                masters.fill()
                engine.allreduce_gradients()
            clip = self._optimization.gradient_clipping
            norm = float(masters.update(engine.basic_optimizer, self._steps + 1, clip, alone))
        else:  # DeepSpeed skips the update by itself
            if masters:
                masters.fill()
                with engine.coalesce_grad_reduction():  # which reduces at its end
                    pass
            engine.step()
            norm = float(engine.get_global_grad_norm())
            if masters:
                masters.write()
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {self._steps}: the gradient is not finite; no weight was changed")
        return norm

    @torch.no_grad()
    def evaluate(
        self,
        batches: list[Batch | None],
        spare: Batch,
        loss: str | Loss,
        settings: dict[str, Any],
    ) -> dict[str, float]:
        """The sums of the metrics of this rank's micro-batches."""
        objective = named(loss)
        totals: dict[str, Any] = {}
        self._model.eval()
        for batch in batches:
            arguments = (tensors(batch or spare, self._device), self._shared)
            if self._stage == 3:  # where a rank without rows has to take part
                self._engine(objective, *arguments, settings)
                found = self._engine.module.metrics
            else:
                found = detached(objective(self._model, *arguments, **settings)[1]) if batch else {}
            add(totals, found if batch else {})
        return {name: float(total) for name, total in totals.items()}

    def weights(self, version: int, way: Way, receivers: list[Place]) -> tuple[None, Handle | None]:
        """Two results, so that the driver can wait for the first without fetching the second."""
        if self._offloaded and self._offloaded.away:
            return None, from_host(self._model, self._handle, self._offloaded) if self._rank == 0 else None
        own = [place for place in receivers if way != "ipc" or place.gpu == self.place().gpu]
        with self._gathered():
            if self._rank and way != "ipc":
                return None, None
            self._handle = self._sender.publish(self._model, version, way, own)
        return None, self._handle

    def send(self) -> None:
        """A broadcast that `weights` published: it ends when all receivers have it."""
        with self._gathered():
            if self._rank == 0:
                self._sender.send(self._model, self._handle)

    def offload(self) -> int:
        """The device memory of weights, masters and moments goes to the host's, and graphs go; the bytes."""
        if self._stage == 3:
            raise UserError("optimizer.zero_stage: 3 keeps shards that are not offloaded; give 0, 1 or 2")
        if self._graphs:
            self._graphs.clear()
        self._model.zero_grad()
        self._sender.take_back()
        if self._offloaded is None:
            optimizer = self._engine.basic_optimizer
            self._offloaded = Offload([*tensors_of(self._masters, self._model, optimizer), *self._shared.values()])
        return self._offloaded.out()

    def reload(self) -> None:
        """What `offload` took is back, in the same tensors."""
        if self._offloaded:
            self._offloaded.back()

    def save_model(self, path: str) -> None:
        from ..model import save

        with self._gathered():
            if self._rank == 0:
                save(self._model, path)

    def save_state(self, folder: str) -> int:
        tensors = self._state()
        if self._rank == 0:
            write_state(Path(folder), self._steps, self._shapes(), tensors)
        else:
            for _ in tensors:  # only to take part in the gathering
                pass
        return self._steps

    def load_state(self, folder: str, step: int | None) -> int:
        self._steps, tensors = read_state(Path(folder), self._shapes(), step)
        with torch.no_grad(), self._gathered(writer=0):
            for name, p in self._trained.items():
                p.copy_(tensors[f"{name}/weight"])
            if self._masters:
                self._masters.write()
        for name, bias in self._biases.items():
            bias.copy_(tensors[name])
        for name, p in self._trained.items():
            for part in ("weight", *self._moments[name]):
                self._set(p, part, tensors[f"{name}/{part}"].to(self._device))
        for state in self._engine.basic_optimizer.state.values():
            if "step" in state:
                state["step"].fill_(self._steps)
        return self._steps

    def _shapes(self) -> Shapes:
        whole = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._trained.items()}
        parts = {f"{name}/{part}": shape for name, shape in whole.items() for part in ("weight", *self._moments[name])}
        return parts | {name: tuple(bias.shape) for name, bias in self._biases.items()}

    def _state(self) -> Iterator[Tensor]:
        """What `_shapes` names, in its order: parameters whole, on all ranks (a collective from stage 1 on)."""
        from deepspeed import utils

        state = self._engine.basic_optimizer.state
        get: Any = utils.safe_get_full_optimizer_state
        for name, p in self._trained.items():
            # Below stage 3 a rank has the whole master, and the optimizer's copy equals it.
            yield get(p, None) if self._stage == 3 else p
            for key in self._moments[name]:
                yield get(p, key) if self._stage else state[p][key]
        yield from self._biases.values()

    def _set(self, p: nn.Parameter, part: str, value: Tensor) -> None:
        """Sets the optimizer's part of a parameter (fp32 copy, moment), or this rank's share of it."""
        from deepspeed import utils

        key = None if part == "weight" else part
        if self._stage == 3:
            # DeepSpeed's setters of whole parameters fail where the ranks do not divide a parameter evenly.
            size = math.ceil(value.numel() / self._ranks)
            shares = nn.functional.pad(value.flatten(), (0, size * self._ranks - value.numel())).split(size)
            utils.safe_set_local_optimizer_state(p, shares[self._rank], key)
        elif self._stage:
            utils.safe_set_full_optimizer_state(p, value, key)
        elif key:
            self._engine.basic_optimizer.state[p][key].copy_(value)

    def _gathered(self, writer: int | None = None) -> Any:
        """Parameters are whole inside, at stage 3 too; what rank `writer` changes there reaches all ranks."""
        if self._stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self._model.parameters()), modifier_rank=writer)
