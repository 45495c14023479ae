"""Another model than V4, such as SmolLM2-135M: log-probs beside transformers', ten SFT steps, an answer.

    .venv/bin/python benchmarks/other_model.py FOLDER

FOLDER is a checkpoint of any model that docs/other_models.md allows. The exit code is 1 if fp32 log-probs of packed
documents differ from transformers' of each alone by more than 1e-5, or if SFT does not lower the loss.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processes import AMALGAM, ENVIRONMENT
from results import machine, write_result
from transformers import AutoModelForCausalLM, logging

from amalgam.model import load
from amalgam.model.template import speaker
from amalgam.pipelines.sft import weighted
from amalgam.rewards.domains import Domain
from amalgam.rl.cluster import start_ray
from amalgam.rl.learner import Learner
from amalgam.rl.packing import Row, collate
from amalgam.rl.settings import Optimization

BOUND = 1e-5
STEPS, BATCH = 10, 8
QUESTION = "What is the capital of France? Answer in one sentence."


def demonstrations(folder: Path, count: int) -> list[Row]:
    """Sums of two terms in the checkpoint's own chat format."""
    encoding, tokenizer = speaker(folder)
    task = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}}
    domain = Domain("arithmetic", "chat", task, count, 1, 0)
    rows: list[Row] = []
    for problem in domain.problems("demonstrations", 0, count):
        answer = {"role": "assistant", "content": domain.demonstration(problem)}
        ids, trained = encoding.ids(tokenizer, [*domain.messages(problem), answer], "chat")
        rows.append({"tokens": np.array(ids, np.int32), "trained": np.array(trained, np.float32)})
    return rows


@torch.no_grad()
def difference(folder: Path, rows: list[Row], dtype: torch.dtype) -> dict[str, Any]:
    """|ours, all rows in one pack - transformers', each row alone|, of the rows' own tokens."""
    batch = collate(rows, "cpu")
    ours = load(folder, dtype).logprobs(batch["tokens"], batch["cu_seqlens"]).split(batch["cu_seqlens"].diff().tolist())
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    found: list[torch.Tensor] = []
    for row, packed in zip(rows, ours, strict=True):
        tokens = torch.from_numpy(row["tokens"]).long()
        theirs = torch.log_softmax(model(tokens[None]).logits[0, :-1].float(), -1).gather(1, tokens[1:, None])[:, 0]
        found.append((packed[1:] - theirs).abs())
    all_of_them = torch.cat(found)
    return {"tokens": len(all_of_them), "largest": float(all_of_them.max()), "mean": float(all_of_them.mean())}


def sft(folder: Path, rows: list[Row], out: Path) -> list[float]:
    """The losses of ten steps; the trained model goes to `out`."""
    losses: list[float] = []
    settings = Optimization(lr=2e-5, warmup_steps=0, decay="constant", micro_batch_tokens=2048)
    with Learner(settings, STEPS, folder, threads=2) as learner:
        for step in range(STEPS):
            began = time.monotonic()
            batch = rows[step * BATCH : (step + 1) * BATCH]
            losses.append(learner.step(weighted(batch), "pipelines.sft:loss")["loss"])
            print(f"SFT step {step + 1}: loss {losses[-1]:.4f}, {time.monotonic() - began:.1f} s", flush=True)
        learner.save_model(out)
    return losses


def answer(checkpoint: Path, folder: Path) -> str:
    """What `amalgam generate` gets from it, greedily."""
    prompts, out = folder / "prompts.jsonl", folder / f"{checkpoint.name}.jsonl"
    prompts.write_text(json.dumps({"prompt": QUESTION}) + "\n")
    command = [*AMALGAM, "generate", str(checkpoint), "--prompts", str(prompts), "--out", str(out)]
    subprocess.run([*command, "--temperature", "0"], env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())["response"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.absolute()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    result: dict[str, Any] = {"machine": machine(), "model": folder.name, "logprobs": {}}
    rows = demonstrations(folder, STEPS * BATCH)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        result["logprobs"][name] = found = difference(folder, rows[:BATCH], dtype)
        print(f"log-probs in {name}, {BATCH} documents in one pack: {found['tokens']} tokens, largest difference from")
        print(f"transformers' {found['largest']:.1e}, mean {found['mean']:.1e}", flush=True)
    start_ray()
    with tempfile.TemporaryDirectory() as scratch:
        trained = Path(scratch) / "trained"
        result["losses"] = sft(folder, rows, trained)
        result["answers"] = {"before": answer(folder, Path(scratch)), "after": answer(trained, Path(scratch))}
    print(QUESTION)
    for when, text in result["answers"].items():
        print(f"  {when} SFT: {text}")
    print(f"wrote {write_result('other_model', result)}")
    return int(result["logprobs"]["float32"]["largest"] > BOUND or result["losses"][-1] >= result["losses"][0])


if __name__ == "__main__":
    sys.exit(main())
