"""Multi-teacher on-policy distillation: the student answers every domain's prompts, each domain's expert teaches.

Teachers give only their last hidden states; the learner turns them into logits with the teacher's head, a piece at a
time. Samples go to the teachers sorted by teacher, so one is in memory at once. The objective is in distill/opd.py.
"""

import time

from ..distill.opd import rows
from ..distill.teacher import Teachers
from .recipe import Distill
from .rollout import (
    draw,
    length_metrics,
    sample,
    sampled_rate,
    sampling,
    sampling_params,
    shown,
    shown_service,
    write_rollouts,
)
from .stage import StageRun, speaker


def distill(stage: StageRun, settings: Distill) -> None:
    run, model = stage.run, stage.run.model(settings.from_)
    encoding, tokenizer = speaker(run, settings.from_)
    domains = [run.domains[name] for name in settings.domains]
    params = sampling_params(settings.sampling, run.seed(stage.name))
    terms = {"indexer_weight": settings.indexer.weight}
    paths = [run.model(settings.teachers[name]) for name in settings.domains]
    with (
        stage.rollouts(model, settings.rollout_workers, settings.rollout, settings.sampling.draft) as rollouts,
        stage.learner(model, settings.optimizer, unfreeze=settings.indexer.unfreeze) as learner,
        Teachers(paths, **run.fleet.place) as teachers,
        stage.metered([teachers.worker]),
    ):
        learner.share(teachers.heads())
        while stage.step < stage.steps:
            began, step = time.monotonic(), stage.step
            problems = draw(domains, "train", step, settings.prompts)
            with sampling(learner, rollouts, step, run.fleet.colocated):
                trajectories = sample(
                    rollouts, encoding, tokenizer, problems,
                    first=step * settings.prompts, group_size=1, params=params,
                )  # fmt: skip
            teacher = [settings.domains.index(t.domain) for t in trajectories]
            documents = [t.row()["tokens"] for t in trajectories]
            hidden = teachers.hidden(documents, teacher, settings.optimizer.micro_batch_tokens)
            metrics = learner.step(rows(trajectories, hidden, teacher), "distill.opd:loss", **terms)
            metrics["kl"] = metrics.pop("loss")
            metrics |= length_metrics(trajectories) | rollouts.metrics()
            write_rollouts(stage.folder / "rollouts", step + 1, trajectories)
            stage.log.samples(step + 1, [shown(t) for t in trajectories[:16]])
            metrics["tokens_per_second"] = sampled_rate(trajectories, began)
            show: dict[str, float | str] = {name: metrics[name] for name in ("kl", "tokens_per_second")}
            show["rollout"] = shown_service(metrics)
            stage.commit(learner, metrics, show)
        learner.save_model(stage.folder / "checkpoint")
    stage.finish(f"reverse KL {stage.facts['metrics']['kl']:.4f}")
