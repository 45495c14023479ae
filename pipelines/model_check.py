"""Do a recipe's models fit its domains and each other? Found out before anything starts, by configs and tokenizers."""

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..model.auto import check_config, has_indexer, is_v4
from ..model.config import resolve
from ..model.template import speaker
from ..rewards.data import Problems
from .recipe import BASE, Average, Distill, Pretrain, Recipe


def check_models(recipe: Recipe, domains: dict[str, Problems]) -> None:
    """UserError for a base that is not built or cannot be asked a domain's problems, a teacher of other tokens, an
    indexer to train where there is none, Muon for a model whose matrices are not known, or shards of a narrow one."""
    dtype = recipe.precision.dtype("cuda" if recipe.resources.gpus_per_actor else "cpu")
    for stage in recipe.stages.values():
        if isinstance(stage, Pretrain):
            check_config(resolve(stage.init), recipe.precision)
            speaker(resolve(stage.init))
    if recipe.base is not None:
        folder = resolve(recipe.base)
        check_config(folder, recipe.precision)
        encoding, tokenizer = speaker(folder)
        for name, domain in domains.items():
            try:
                encoding.prompt_ids(tokenizer, domain.messages(domain.problems("heldout", 0, 1)[0]), domain.mode)
            except ValueError as error:
                raise UserError(f"domains.{name}: {recipe.base}: {error}") from None
    for stage, settings in recipe.stages.items():
        if not isinstance(settings, Average) and settings.indexer.weight:
            folder = origin(recipe, stage)
            if not has_indexer(folder):
                raise UserError(
                    f"stages.{stage}.indexer.weight: {folder} has no indexer, which only CSA layers of DeepSeek-V4 "
                    "have; leave the key out"
                )
        if not isinstance(settings, Average) and settings.optimizer.name == "muon":
            folder = origin(recipe, stage)
            if not is_v4(folder):
                raise UserError(
                    f"stages.{stage}.optimizer.name: muon is for DeepSeek-V4, and {folder} is another model; give adamw"
                )
        if not isinstance(settings, Average) and (problem := settings.optimizer.problem(dtype)):
            raise UserError(f"stages.{stage}.optimizer.zero_stage: {problem}")
        if isinstance(settings, Distill):
            student = origin(recipe, settings.from_)
            for domain, name in settings.teachers.items():
                teacher = origin(recipe, name)
                if teacher != student and _vocabulary(teacher) != _vocabulary(student):
                    raise UserError(
                        f"stages.{stage}.teachers.{domain}: {name} has the vocabulary of {teacher}, "
                        f"{settings.from_} that of {student}; distillation needs one vocabulary"
                    )


def origin(recipe: Recipe, model: str) -> Path:
    """The checkpoint from which a model's tokenizer comes: the base, or the preset of a pretraining stage."""
    while model != BASE:
        stage: Any = recipe.stages[model]
        if isinstance(stage, Pretrain):
            return resolve(stage.init)
        model = stage.of[0] if isinstance(stage, Average) else stage.from_
    assert recipe.base is not None
    return resolve(recipe.base)


def _vocabulary(folder: Path) -> tuple[int, dict[str, int]]:
    return check_config(folder), speaker(folder)[1].get_vocab()
