"""The baseline of merging without training: the uniform average of the experts' weights."""

import torch

from ..errors import UserError
from ..model import load, save
from ..model.tensors import distinct
from .recipe import Average
from .stage import StageRun


@torch.no_grad()
def average(stage: StageRun, settings: Average) -> None:
    merged = load(stage.run.model(settings.of[0]))
    sums = distinct(merged)
    for name in settings.of[1:]:
        state = distinct(load(stage.run.model(name)))
        if state.keys() != sums.keys():
            raise UserError(f"stages.{stage.name}.of: {name} and {settings.of[0]} do not have the same tensors")
        for key, total in sums.items():
            if total.shape != state[key].shape:
                raise UserError(f"stages.{stage.name}.of: {key}: {name} and {settings.of[0]} differ in shape")
            if total.is_floating_point():
                total += state[key]
            elif not torch.equal(total, state[key]):
                raise UserError(f"stages.{stage.name}.of: {key} differs between {name} and {settings.of[0]}")
    for total in sums.values():
        if total.is_floating_point():
            total /= len(settings.of)
    save(merged, stage.folder / "checkpoint")
    stage.finish(f"mean of {len(settings.of)} models")
