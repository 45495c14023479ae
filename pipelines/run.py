"""`amalgam run`: walks a recipe's graph of stages, runs what is not done, side by side where the recipe says so.

A stage is done when its done.json is there, an evaluation when evaluations/MODEL.json is. Both are renamed into place,
so the same command goes on wherever the one before it ended, however it ended.
"""

import fcntl
import json
import os
import platform
import queue
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import UserError
from ..model.shards import write_text
from ..rewards.data import FileDomain, Problems
from ..rewards.domains import Domain
from ..rl.cluster import start_ray
from ..rl.fleet import Fleet
from .average import average
from .console import Console
from .distill import distill
from .evaluate import evaluate, evaluated
from .grpo import grpo
from .model_check import check_models
from .pretrain import pretrain
from .recipe import BASE, Average, Recipe, Sft, resolved_yaml
from .report import write_report
from .reward_check import check_rewards
from .sft import sft
from .stage import Interrupted, Run, StageRun, write_json
from .tracking import Tracker

STAGES: dict[str, Callable[[StageRun, Any], None]] = {
    "sft": sft,
    "grpo": grpo,
    "distill": distill,
    "average": average,
    "pretrain": pretrain,
}
_STOP_SECONDS = 120.0  # how long the stages beside one that failed, or was interrupted, may take for their step
_DEADLINE = re.compile(r"^(resources: \{.*), deadline: [^,}]+(?=\}$)", re.MULTILINE)
_PACKAGES = ("torch", "deepspeed", "ray", "transformers", "tokenizers", "reasoning-gym", "numpy")

Task = tuple[str, str]  # ("stage" | "evaluation", name)


def run_recipe(recipe: Recipe, runs: Path) -> Path:
    """Runs what is not done of `recipe` in runs/NAME, prints the result table and returns the report's path.

    Raises UserError before anything starts if something that the recipe names is not there, or if the folder holds
    another recipe's run; KeyboardInterrupt, after a line that says where each stage stands, if it was interrupted.
    """
    domains = _checked(recipe)
    folder = (runs / recipe.name).absolute()
    with _claimed(folder), Console() as console:
        kept, text = folder / "recipe.yaml", resolved_yaml(recipe)
        _refuse_another(kept, text)
        tracker = Tracker(folder, recipe.name, recipe.tracking.wandb, recipe.tracking.project)
        write_text(kept, text)
        console.print(f"{recipe.name}: {folder}, tracked in {tracker.status}")
        for domain in domains.values():
            if isinstance(domain, FileDomain) and domain.duplicates:
                console.print(f"{domain.name}: {domain.described_duplicates()}")
        write_json(folder / "versions.json", versions())
        start_ray()
        resources = recipe.resources
        place = resources.gpus_per_actor, resources.threads, recipe.precision, resources.deadline
        with Fleet(*place, recipe.most_actors() if resources.placement == "colocated" else 0) as fleet:
            run = Run(recipe, folder, fleet, tracker, console, domains)
            _walk(run)
        tracker.close()
        write_json(folder / "results.json", results(run))
        console.table(results(run))
        console.failures(failures(run))
    return write_report(folder)


def results(run: Run) -> list[dict[str, Any]]:
    """Rows {"model", "domain", "correct", "total"} of every evaluated model."""
    files = [run.folder / "evaluations" / f"{name}.json" for name in evaluated(run)]
    return [row for file in files for row in json.loads(file.read_text())["rows"]]


def failures(run: Run) -> dict[str, dict[str, int]]:
    """Grades that failed, by stage or evaluation and by kind."""
    found = {f.parent.name: json.loads(f.read_text())["failures"] for f in run.folder.glob("stages/*/done.json")}
    for file in run.folder.glob("evaluations/*.json"):
        found[f"evaluation of {file.stem}"] = json.loads(file.read_text())["failures"]
    return {name: counts for name, counts in found.items() if counts}


def _checked(recipe: Recipe) -> dict[str, Problems]:
    """The recipe's domains. UserError for what else would only show in the middle of a stage."""
    domains = {name: _domain(recipe, name) for name in recipe.domains}
    for domain in domains.values():  # may have too few different questions
        domain.problems("heldout", 0, recipe.evaluate.problems)
    for stage in recipe.stages.values():
        if isinstance(stage, Sft):  # and answers that no demonstration can show
            for name in stage.domains:
                domains[name].problems("validation", 0, stage.validation)
    check_models(recipe, domains)
    check_rewards(recipe, domains)
    return domains


def _domain(recipe: Recipe, name: str) -> Problems:
    settings = recipe.domains[name]
    if (data := settings.data) is None:
        common = settings.demonstrations, recipe.evaluate.problems, recipe.seed, settings.rewards
        return Domain(name, settings.mode, settings.tasks, *common)
    files = data.train, data.heldout, data.fields
    return FileDomain(name, settings.mode, *files, settings.rewards, settings.demonstrations, recipe.seed)


def versions() -> dict[str, Any]:
    """What ran: packages, Python, and the machine."""
    found = {"amalgam": __version__, "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in _PACKAGES}
    return found | {"machine": f"{_processor()}, {os.cpu_count()} cores", "system": platform.platform()}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """The run's folder for this process alone."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is running this; wait for it, or set another name") from None
        yield


def _refuse_another(kept: Path, text: str) -> None:
    """UserError if the folder holds the run of another recipe than `text`. A deadline changes no result."""
    old, text = (_DEADLINE.sub(r"\1", each) for each in (kept.read_text() if kept.exists() else text, text))
    if old == text:
        return
    pairs = enumerate(zip_longest(old.splitlines(), text.splitlines()), 1)
    line = next(number for number, (before, now) in pairs if before != now)
    raise UserError(
        f"{kept}:{line}: this folder holds a run of another recipe; "
        "remove the folder, or give this run a name of its own: --set name=NAME"
    )


def _walk(run: Run) -> None:
    """Runs every task that is not done, `stages_at_once` at a time in threads, each as soon as its inputs are there."""
    needs = _needs(run)
    waiting = [task for task in needs if not _is_done(run, task)]
    done = set(needs) - set(waiting)
    running: set[Task] = set()
    ended: queue.Queue[tuple[Task, BaseException | None]] = queue.Queue()
    try:
        while waiting or running:
            ready = [task for task in waiting if needs[task] <= done]
            for task in ready[: run.recipe.stages_at_once - len(running)]:
                waiting.remove(task)
                running.add(task)
                threading.Thread(target=_attempt, args=(run, task, ended), daemon=True).start()
            task, error = _next(ended)
            running.remove(task)
            if error is not None:
                raise error
            done.add(task)
    except BaseException as error:
        run.stop.set()
        if isinstance(error, KeyboardInterrupt):
            run.console.print("interrupted: stages end after their current step (Ctrl-C again: at once)")
        stopped = _drain(running, ended, run.console)
        if isinstance(error, KeyboardInterrupt):
            run.console.print(f"interrupted; the same command goes on from {', '.join(stopped) or 'here'}")
        raise


def _next(ended: "queue.Queue[tuple[Task, BaseException | None]]") -> tuple[Task, BaseException | None]:
    """The next task that ends. Wakes up now and then: Ctrl-C may reach another thread, and then only shows here."""
    while True:
        try:
            return ended.get(timeout=0.5)
        except queue.Empty:
            continue


def _drain(running: set[Task], ended: "queue.Queue[tuple[Task, BaseException | None]]", console: Console) -> list[str]:
    """Waits for the running tasks to stop; where those stand that stopped in the middle."""
    stopped = []
    try:
        while running:
            task, error = ended.get(timeout=_STOP_SECONDS)
            running.remove(task)
            if isinstance(error, Interrupted):
                stopped.append(str(error))
            elif error is not None:
                console.print(f"{task[1]} failed too: {type(error).__name__}: {error}")
    except queue.Empty:
        stopped += [f"{name} (its last saved step)" for _, name in running]
    return stopped


def _needs(run: Run) -> dict[Task, set[Task]]:
    """Every task in the order of preference (stages before evaluations), with the tasks whose results it needs."""
    stages: dict[Task, set[Task]] = {
        ("stage", name): {("stage", model) for model in run.recipe.inputs(name) if model != BASE}
        for name in run.recipe.graph()
    }
    return stages | {("evaluation", m): {("stage", m)} if m != BASE else set() for m in evaluated(run)}


def _is_done(run: Run, task: Task) -> bool:
    kind, name = task
    file = (
        run.folder / "stages" / name / "done.json" if kind == "stage" else run.folder / "evaluations" / f"{name}.json"
    )
    return file.is_file()


def _attempt(run: Run, task: Task, ended: "queue.Queue[tuple[Task, BaseException | None]]") -> None:
    try:
        (_run_stage if task[0] == "stage" else _run_evaluation)(run, task[1])
    except BaseException as error:  # handed to the thread that waits, which raises it
        ended.put((task, error))
    else:
        ended.put((task, None))


def _run_stage(run: Run, name: str) -> None:
    settings = run.recipe.graph()[name]
    (run.folder / "stages" / name).mkdir(parents=True, exist_ok=True)
    steps = _steps(run, settings)
    inputs = {model: run.model(model) for model in run.recipe.inputs(name)}
    with run.tracker.stage(name, settings.kind, settings.model_dump(mode="json", by_alias=True), inputs) as log:
        stage = StageRun(run, name, settings, steps, log)
        stage.start()
        STAGES[settings.kind](stage, settings)


def _steps(run: Run, settings: Any) -> int:
    """Optimizer steps of a stage; for SFT the most there can be."""
    if isinstance(settings, Average):
        return 0
    if isinstance(settings, Sft):
        demonstrations = sum(run.domains[name].demonstrations for name in settings.domains)
        return settings.max_epochs * -(-demonstrations // settings.batch_size)
    return settings.steps


def _run_evaluation(run: Run, model: str) -> None:
    line = run.console.stage(f"{model}", "evaluation", 1)
    rows = evaluate(run, model)
    line.done(", ".join(f"{row['domain']} {row['correct']}/{row['total']}" for row in rows))
