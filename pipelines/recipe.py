"""Recipes: the typed tree, the one place for its defaults, and the graph of stages.

Left out on purpose: recipes that inherit from recipes, environment variables, and whatever needs torch.

A stage's name is its model's name. `{domain}` in it makes one stage per domain, and in `from`, `of` and
`teachers` it refers to the stages so made. A loaded recipe holds none of that shorthand: every stage and
every reference is written out, which is also what `--print` shows and what the run's folder keeps.
"""

import re
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Strict,
    ValidationError,
)

from ..errors import UserError
from ..rewards.registry import REWARDS, mix
from ..rl.settings import DEADLINE, EngineRoom, IndexerLoss, MtpLoss, Optimization, Sampling
from ..settings import FULL, Precision, Settings
from .base_check import base_problem, has_mtp, preset_problem
from .recipe_errors import explain, message, suggest
from .shorthand import DOMAIN, apply
from .yaml_lines import Path as Keys
from .yaml_lines import read, write

RECIPES = Path(__file__).parent.parent / "recipes"
BASE = "base"
"""The recipe's base model among the names of stages; no stage may take it."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

_NO_MTP = "the config.json that it starts from has no num_nextn_predict_layers of V4; leave the key out"

Names = Annotated[tuple[str, ...], Strict(False)]
Source = Annotated[str | dict[str, Any], Field(examples=["train.jsonl"])]


class DataSettings(Settings):
    """Problems from files: .jsonl or .parquet, or `datasets.load_dataset`'s arguments ({path: ..., split: ...})."""

    train: Source
    """What stages learn from. A row whose question is held out is left out, and counted."""
    heldout: Source
    """What evaluation asks."""
    fields: dict[str, str] = {}
    """A field that rewards know (question, answer, tests ...) -> its name in the files; dots lead into objects."""


class DomainSettings(Settings):
    """A field that gets an expert of its own: problems whose answers can be verified, generated or from files."""

    mode: Literal["chat", "high"] = "chat"
    """How the model answers: `chat` at once, `high` after reasoning."""
    tasks: dict[str, dict[str, Any]] = Field(default={}, examples=["{chain_sum: {max_terms: 3}}"])
    """reasoning-gym's tasks, each with its generator's parameters ({} for the generator's defaults)."""
    data: DataSettings | None = None
    """Files, in place of tasks."""
    rewards: dict[str, float | dict[str, Any]] = Field(default={}, examples=["{math: 0.9, format: 0.1}"])
    """What answers are graded by: name -> weight, or {weight, reward, parameters ...}; docs/rewards.md lists them.
    Where it is absent, tasks are graded by their own scorers, and the format."""
    demonstrations: PositiveInt = 1024
    """Solved problems to train on in SFT, the same ones in every epoch."""


class Stage(Settings):
    """What every stage has."""

    evaluate: bool = True
    """Whether the stage's model is evaluated on every domain."""

    def references(self) -> dict[Keys, str]:
        """Key inside the stage -> the model it names."""
        raise NotImplementedError


class Successor(Stage):
    """A stage that goes on training one model."""

    from_: str = Field(alias="from", examples=["base"])
    """The model to start from: `base`, or a stage."""

    def references(self) -> dict[Keys, str]:
        return {("from",): self.from_}


class SftOptimization(Optimization):
    lr: PositiveFloat = 1e-5


class Sft(Successor):
    """Supervised fine-tuning: next-token loss on the answers of a fixed set of demonstrations.

    V4 publishes no settings of it; these are our choice.
    """

    kind: Literal["sft"]
    domains: Names = ()
    """The domains whose demonstrations are learned; all of the recipe's where the key is absent."""
    batch_size: PositiveInt = 32
    """Demonstrations a step, packed without padding."""
    max_epochs: PositiveInt = 20
    """Most passes over the demonstrations."""
    patience: PositiveInt = 2
    """Epochs without a lower held-out loss after which the stage ends. The checkpoint is the best epoch's."""
    validation: PositiveInt = 128
    """Held-out demonstrations per domain, none of them trained on."""
    mtp: MtpLoss = MtpLoss()
    indexer: IndexerLoss = IndexerLoss()
    optimizer: SftOptimization = SftOptimization()


class GrpoOptimization(Optimization):
    lr: PositiveFloat = 1e-6


class Grpo(Successor):
    """GRPO: samples in groups, advantage = reward minus the group's mean, clipped importance ratio.

    The objective is DeepSeek-V3.2's, which V4 says it follows closely; neither gives these numbers. Group
    size and temperature are DeepSeek-R1's, the rest is our choice.
    """

    kind: Literal["grpo"]
    domains: Names = ()
    """The domains that prompts are drawn from, evenly; all of the recipe's where the key is absent."""
    steps: PositiveInt = Field(examples=[100])
    """Rollout batches, each followed by `updates` optimizer steps."""
    prompts: PositiveInt = 16
    """Prompts a step."""
    group_size: int = Field(default=16, ge=2)
    """Samples per prompt; a group whose rewards are all equal teaches nothing, is dropped and counted."""
    sampling: Sampling = Sampling()
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """The importance ratio counts down to 1 - clip_low."""
    clip_high: PositiveFloat = 0.28
    """The importance ratio counts up to 1 + clip_high; above clip_low, so that rare tokens can grow."""
    updates: PositiveInt = 1
    """Optimizer steps per rollout batch; 1 is on-policy."""
    rollout_workers: PositiveInt = 1
    """Processes that sample."""
    rollout: EngineRoom = EngineRoom()
    indexer: IndexerLoss = IndexerLoss()
    optimizer: GrpoOptimization = GrpoOptimization()


class DistillOptimization(Optimization):
    lr: PositiveFloat = 1e-6


class Distill(Successor):
    """Multi-teacher on-policy distillation: the student's samples, each taught by its domain's teacher.

    Reverse KL over the whole vocabulary (DeepSeek-V4, section 5). The numbers, and the same weight for every
    domain, are our choice.
    """

    kind: Literal["distill"]
    domains: Names = ()
    """The domains that prompts are drawn from, evenly; all of the recipe's where the key is absent."""
    teachers: dict[str, str] = Field(examples=['"grpo-{domain}" or {strings: grpo-strings}'])
    """Domain -> its teacher, `base` or a stage. A pattern such as "grpo-{domain}" stands for the mapping."""
    steps: PositiveInt = 150
    """Rollout batches, each followed by one optimizer step."""
    prompts: PositiveInt = 64
    """Prompts a step, one sample of the student for each."""
    sampling: Sampling = Sampling()
    rollout_workers: PositiveInt = 1
    """Processes that sample."""
    rollout: EngineRoom = EngineRoom()
    indexer: IndexerLoss = IndexerLoss()
    optimizer: DistillOptimization = DistillOptimization()

    def references(self) -> dict[Keys, str]:
        return super().references() | {("teachers", domain): name for domain, name in self.teachers.items()}


class Average(Stage):
    """The baseline to distillation: the uniform average of several models' weights."""

    kind: Literal["average"]
    of: Names = Field(min_length=1, examples=['"grpo-{domain}" or [grpo-a, grpo-b]'])
    """The models to average: a list, or a pattern such as "grpo-{domain}"."""

    def references(self) -> dict[Keys, str]:
        return {("of", index): name for index, name in enumerate(self.of)}


class PretrainOptimization(Optimization):
    lr: PositiveFloat = 2.7e-4
    decay: Literal["constant", "linear", "cosine"] = "cosine"


class Pretrain(Stage):
    """Next-token training of a base model on the corpus of `pipelines/corpus.py`, from random weights.

    The learning rate's peak and its cosine are DeepSeek-V4-Flash's; the rest is our choice.
    """

    kind: Literal["pretrain"]
    init: str = Field(examples=["tiny"])
    """The preset whose config and tokenizer are used; its weights are not."""
    steps: PositiveInt = Field(examples=[2000])
    """Optimizer steps."""
    batch_tokens: PositiveInt = 16384
    """Tokens a step."""
    document_tokens: PositiveInt = 512
    """Longest document in tokens; longer ones are cut."""
    documents: PositiveInt = 400_000
    """Documents of the corpus; a longer run sees them again, in another order."""
    corpus: str | None = None
    """A file written by `python -m amalgam.pipelines.corpus`; where absent, the stage first writes one."""
    mtp: MtpLoss = MtpLoss()
    indexer: IndexerLoss = IndexerLoss()
    optimizer: PretrainOptimization = PretrainOptimization()

    def references(self) -> dict[Keys, str]:
        return {}


AnyStage = Annotated[Sft | Grpo | Distill | Average | Pretrain, Field(discriminator="kind")]


class EvaluationSettings(Settings):
    """How a model is evaluated: greedily, on held-out problems, on every domain."""

    problems: PositiveInt = 1024
    """Held-out problems per domain, the same ones for every model."""
    max_new_tokens: PositiveInt = 1024
    """Longest response in tokens; a longer one is cut and counts as wrong."""


class TrackingSettings(Settings):
    """Weights & Biases. metrics.jsonl and the report are written in any case."""

    wandb: Literal["auto", "offline", "online", "off"] = "auto"
    """`offline` keeps the runs in the run's folder (`wandb sync` uploads them), `online` needs a login, and
    `auto` is online for a user who is logged in and offline otherwise."""
    project: str = "amalgam"
    """The project's name there."""


class ResourceSettings(Settings):
    """What each Ray actor (learner rank, rollout worker) asks for."""

    gpus_per_actor: NonNegativeFloat = 0.0
    """GPUs; 0.5 lets two actors share one, 0 runs on the CPU. Colocated, any number above 0 means whole GPUs."""
    placement: Literal["separate", "colocated"] = "separate"
    """`separate`: learner ranks and rollout workers have GPUs of their own, and all keep their memory. `colocated`: a
    rank and a worker share a GPU, with a teacher on the first, and take turns with its memory: the learner's goes to
    the host while the workers sample, theirs while it learns. No result depends on it."""
    threads: PositiveInt = 1
    """CPU threads."""
    deadline: PositiveFloat = DEADLINE
    """Seconds that one call of an actor may take (starting it, a step), or one step of a rollout worker's engine. Then
    the run stops, but for a rollout worker, which is replaced. It may be another when the run goes on."""


class Recipe(Settings):
    """One run: domains, stages, and how to run, evaluate and track them."""

    name: str = Field(examples=["my-run"])
    """The run's name and its folder's: runs/NAME."""
    seed: NonNegativeInt = 0
    """Every random choice follows from it: the same recipe on the same machine gives the same models."""
    base: str | None = None
    """A preset shipped with amalgam, or a checkpoint's folder (relative to where the command is run)."""
    domains: dict[str, DomainSettings] = Field(min_length=1, examples=["{strings: {tasks: {spell_backward: {}}}}"])
    """Domain's name -> its settings."""
    stages: dict[str, AnyStage] = Field(min_length=1, examples=["{start: {kind: sft, from: base}}"])
    """Stage's name, which is its model's name -> its settings."""
    precision: Precision = FULL
    evaluate: EvaluationSettings = EvaluationSettings()
    stages_at_once: PositiveInt = 1
    """Stages that may run side by side where neither needs the other."""
    checkpoint_every: PositiveInt = 1
    """Optimizer steps between two saved states; an interrupted stage goes on from the last one."""
    tracking: TrackingSettings = TrackingSettings()
    resources: ResourceSettings = ResourceSettings()

    def most_actors(self) -> int:
        """Ranks or rollout workers of a stage, or the one worker of an evaluation."""
        ranks = [s.optimizer.ranks for s in self.stages.values() if not isinstance(s, Average)]
        return max(1, *ranks, *(s.rollout_workers for s in self.stages.values() if isinstance(s, Grpo | Distill)))

    def inputs(self, stage: str) -> list[str]:
        """The models that a stage needs, each once: names of stages, or "base"."""
        return list(dict.fromkeys(self.stages[stage].references().values()))

    def graph(self) -> dict[str, Sft | Grpo | Distill | Average | Pretrain]:
        """Name -> stage, in the recipe's order except that a stage comes after all of its inputs."""
        ordered = {}

        def visit(name: str) -> None:
            if name != BASE and name not in ordered:
                for needed in self.inputs(name):
                    visit(needed)
                ordered[name] = self.stages[name]

        for name in self.stages:
            visit(name)
        return ordered

    def problems(self) -> Iterator[tuple[Keys, str]]:
        """(key, what is wrong) for what the types cannot say. None for every recipe from load_recipe."""
        yield from self._name_problems()
        if self.base is not None and (problem := base_problem(self.base)):
            yield ("base",), problem
        colocated = self.resources.placement == "colocated"
        if colocated and self.resources.gpus_per_actor and self.stages_at_once > 1:
            yield ("stages_at_once",), "colocated stages take turns with the GPUs' memory; give 1"
        for name, stage in self.stages.items():
            if colocated and not isinstance(stage, Average) and stage.optimizer.keeps_shards:
                problem = "stage 3 keeps shards that a colocated learner cannot offload; give 2"
                yield ("stages", name, "optimizer", "zero_stage"), problem
            for keys, problem in self._stage_problems(stage):
                yield ("stages", name, *keys), problem
        try:
            needs = {name: [i for i in self.inputs(name) if i != BASE] for name in self.stages}
            TopologicalSorter(needs).prepare()
        except CycleError as error:
            cycle = error.args[1][::-1]
            yield ("stages", cycle[0]), f"the stages go in a circle: {' needs '.join(cycle)}"

    def _name_problems(self) -> Iterator[tuple[Keys, str]]:
        rule = "use letters, digits, - and _, at most 64"
        named = {("name",): self.name} | {("domains", domain): domain for domain in self.domains}
        bad = [(keys, name) for keys, name in named.items() if not _NAME.fullmatch(name)]
        # A stage's name may come from its domain's: a bad one is reported where it was written.
        bad = bad or [(("stages", name), name) for name in self.stages if not _NAME.fullmatch(name)]
        yield from ((keys, f"'{name}' is no possible name for a folder; {rule}") for keys, name in bad)
        for name, domain in self.domains.items():
            yield from _domain_problems(name, domain)
        if BASE in self.stages:
            yield ("stages", BASE), "'base' is the recipe's base model; give the stage another name"

    def _stage_problems(self, stage: Stage) -> Iterator[tuple[Keys, str]]:
        for keys, name in stage.references().items():
            if DOMAIN in name:
                yield keys, f"names one model; {DOMAIN} in it needs {DOMAIN} in the stage's own name"
            elif name == BASE and self.base is None:
                yield keys, "the recipe has no base; add `base: tiny`, or another preset or folder"
            elif name != BASE and name not in self.stages:
                yield keys, f"no stage '{name}'; {suggest(name, [BASE, *self.stages])}"
        if isinstance(stage, Sft | Grpo | Distill):
            for index, domain in enumerate(stage.domains):
                if domain not in self.domains:
                    yield ("domains", index), f"no domain '{domain}'; {suggest(domain, self.domains)}"
        if isinstance(stage, Grpo | Distill) and stage.prompts < len(stage.domains):
            yield ("prompts",), f"{stage.prompts} a step leave some of the {len(stage.domains)} domains out; give more"
        if isinstance(stage, Sft):
            for domain in stage.domains:
                if domain in self.domains and self.domains[domain].mode == "high":
                    problem = "its demonstrations hold no reasoning (not built yet); set the domain's mode to chat"
                    yield ("domains",), f"the domain '{domain}' has the mode high, and {problem}"
        if isinstance(stage, Sft | Pretrain) and stage.mtp.weight and not self._has_mtp(stage):
            yield ("mtp", "weight"), f"the stage's model has no MTP block; {_NO_MTP}"
        if isinstance(stage, Grpo | Distill) and stage.sampling.draft == "mtp" and not self._has_mtp(stage):
            yield ("sampling", "draft"), f"the stage's model has no MTP block; {_NO_MTP}"
        if isinstance(stage, Grpo | Distill):
            for key in ("top_k", "top_p", "min_p"):
                if getattr(stage.sampling, key) != Sampling.model_fields[key].default:
                    problem = "the loss would need the sets that tokens were drawn from (not built yet)"
                    yield ("sampling", key), f"{problem}; leave the key out"
        if isinstance(stage, Distill):
            for domain in stage.domains:
                if domain not in stage.teachers:
                    yield ("teachers",), f"the domain '{domain}' has no teacher; add `{domain}: STAGE`"
            for domain in stage.teachers:
                if domain not in stage.domains:
                    yield ("teachers", domain), f"no domain '{domain}' here; {suggest(domain, stage.domains)}"
        if isinstance(stage, Pretrain):
            if problem := preset_problem(stage.init):
                yield ("init",), problem
            if stage.corpus is not None and not Path(stage.corpus).is_file():
                yield ("corpus",), f"no file '{stage.corpus}'; leave the key out, or give the file's path"

    def _has_mtp(self, stage: Stage, seen: tuple[str, ...] = ()) -> bool:
        """Whether the stage's model has an MTP block; True where that cannot be told, as another check will say."""
        if isinstance(stage, Pretrain):
            return has_mtp(stage.init)
        names = [stage.from_] if isinstance(stage, Successor) else list(stage.references().values())
        name = next(iter(names), BASE)
        if name == BASE:
            return self.base is None or has_mtp(self.base)
        return name in seen or name not in self.stages or self._has_mtp(self.stages[name], (*seen, name))


def _domain_problems(name: str, domain: DomainSettings) -> Iterator[tuple[Keys, str]]:
    keys: Keys = ("domains", name)
    if bool(domain.tasks) == (domain.data is not None):
        yield (*keys, "tasks"), "a domain has either tasks, e.g. {chain_sum: {max_terms: 3}}, or data"
    if domain.data is not None and not domain.rewards:
        yield (*keys, "rewards"), f"data needs rewards to grade by, e.g. {{math: 1}}; there are {', '.join(REWARDS)}"
    for label, given in domain.rewards.items():
        try:
            mix({label: given}, "rewards")
        except UserError as error:
            place, _, problem = str(error).partition(": ")
            yield (*keys, "rewards", label, *place.split(".")[2:]), problem


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by its shipped name or its path, with overrides such as "stages.start.batch_size=16".

    An override may name a stage as the recipe writes it (`grpo-{domain}`: all that are made of it) or as it
    is made (`grpo-strings`: that one); the last one wins. Raises UserError: a line for each mistake, at most
    five.
    """
    file = recipe_file(name_or_path)
    try:
        text = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give a recipe's name or the path of a YAML file") from None
    document = read(text, _shown(file))
    apply(document, overrides)
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        found = explain(error, Recipe)
        # Without domains the stages are not written out, and what is refused about them may be right.
        about_domains = [problem for problem in found if problem[0][0] == "domains" and len(problem[0]) == 1]
        raise UserError(message(about_domains or found, document)) from None
    if problems := list(recipe.problems()):
        raise UserError(message(problems, document))
    return recipe


def resolved_yaml(recipe: Recipe) -> str:
    """Every setting of the recipe, defaults too; load_recipe makes the same recipe of it."""
    data = recipe.model_dump(mode="json", by_alias=True)
    data["stages"] = {name: {"kind": stage["kind"]} | stage for name, stage in data["stages"].items()}
    return write(data)


def recipe_file(name_or_path: str) -> Path:
    """The file of a shipped recipe's name or of a path. Raises UserError with the nearest shipped name."""
    shipped = {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}
    path = Path(name_or_path)
    if name_or_path in shipped or path.exists():
        return shipped.get(name_or_path, path)
    raise UserError(f"{name_or_path}: no such recipe or file; {suggest(path.stem, shipped)}")


def _shown(file: Path) -> str:
    """A path as the user would type it here."""
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)
