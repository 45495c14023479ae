"""TRL's side of trl_compare.py, in TRL's own environment: one of its trainers, on a job that trl_compare.py wrote.

.venv-trl/bin/python benchmarks/trl_side.py JOB.json
"""

import json
import re
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
import transformers
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from trl import (  # pyright: ignore[reportMissingImports]
    DistillationConfig,
    DistillationTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
)


class Rows(transformers.TrainerCallback):
    """Writes what our metrics.jsonl has: a row for each step, with the time."""

    def __init__(self, path: str):
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            row = {"step": state.global_step, "time": time.time(), **logs}
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")


@cache
def scorer(task: str, parameters: str) -> Any:
    return reasoning_gym.create_dataset(task, size=1, **json.loads(parameters)).score_answer


def reward(
    completions: list[str], completion_ids: list[list[int]], task: list[str], parameters: list[str], entry: list[str],
    end_id: list[int], **_: Any,
) -> list[float]:  # fmt: skip
    """Our reward, in this process: 0.9 * the task's own score + 0.1 * the format."""
    rewards = []
    for text, ids, name, settings, record, end in zip(
        completions, completion_ids, task, parameters, entry, end_id, strict=True
    ):
        answers = re.findall("<answer>(.*?)</answer>", text, re.DOTALL)
        score = scorer(name, settings)(answers[0].strip(), json.loads(record)) if len(answers) == 1 else 0.0
        alone = len(answers) == 1 and re.fullmatch(r"\s*<answer>.*</answer>\s*", text, re.DOTALL) is not None
        rewards.append(0.9 * score + 0.1 * (alone and end in ids))
    return rewards


def trainer(job: dict[str, Any]) -> Any:
    """The job's trainer, with its settings where it has them and TRL's defaults elsewhere."""
    optimizer, sampling = job["optimizer"], job["sampling"]
    common = {
        "output_dir": job["folder"],
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch"],
        "learning_rate": optimizer["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": optimizer["weight_decay"],
        "adam_beta1": optimizer["betas"][0],
        "adam_beta2": optimizer["betas"][1],
        "adam_epsilon": optimizer["eps"],
        "max_grad_norm": optimizer["gradient_clipping"],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,  # TRL's default recomputes the forward; ours does not
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    generation = {"shuffle_dataset": False, **sampling} if sampling else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    for row in job["data"]:
        if "prompt" in row and tokenizer(row["prompt"])["input_ids"] != row["prompt_ids"]:
            raise ValueError(f"transformers' tokenizer gives other ids than ours for {row['prompt']!r}")
    shared = {
        "model": model(job["model"]),
        "processing_class": tokenizer,
        "train_dataset": Dataset.from_list(job["data"]),
        "callbacks": [Rows(job["rows"])],
    }
    if job["kind"] == "sft":
        # Without the 0, TRL adds a load-balancing loss to the model's (in GRPO it would need config.num_experts, which
        # DeepSeek-V4's config does not have).
        return SFTTrainer(args=SFTConfig(**common, router_aux_loss_coef=0.0, completion_only_loss=True), **shared)
    if job["kind"] == "grpo":
        own = {**generation, **job["grpo"], "loss_type": "grpo", "scale_rewards": "none", "beta": 0.0}
        args = GRPOConfig(**common, **own, router_aux_loss_coef=0.0)
        return GRPOTrainer(args=args, reward_funcs=reward, **shared)
    args = DistillationConfig(**common, **generation, beta=1.0)
    return DistillationTrainer(args=args, teacher_model=model(job["teacher"]), **shared)


def model(folder: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer(json.loads(Path(sys.argv[1]).read_text())).train()
