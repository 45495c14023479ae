"""The folder of a run of the quickstart's stages, with the outcomes that a test asks for."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from amalgam.pipelines.report_data import Run

DOMAINS = ("arithmetic", "strings")
STAGES: dict[str, dict[str, Any]] = {
    "sft-arithmetic": {"kind": "sft", "from": "base", "domains": ["arithmetic"]},
    "sft-strings": {"kind": "sft", "from": "base", "domains": ["strings"]},
    "grpo-arithmetic": {"kind": "grpo", "from": "sft-arithmetic", "domains": ["arithmetic"]},
    "grpo-strings": {"kind": "grpo", "from": "sft-strings", "domains": ["strings"]},
    "average": {"kind": "average", "of": ["grpo-arithmetic", "grpo-strings"]},
    "start": {"kind": "sft", "from": "base", "domains": list(DOMAINS), "evaluate": False},
    "merged": {
        "kind": "distill", "from": "start", "domains": list(DOMAINS),
        "teachers": {"arithmetic": "grpo-arithmetic", "strings": "grpo-strings"},
    },
}  # fmt: skip
RECIPE = {"name": "quickstart", "seed": 0, "base": "tiny", "domains": dict.fromkeys(DOMAINS, {}), "stages": STAGES}
EVALUATED = ("base", *(name for name, stage in STAGES.items() if stage.get("evaluate", True)))

Outcomes = Mapping[str, Mapping[str, Sequence[bool]]]  # model -> domain -> which of its held-out problems are right


def made_run(folder: Path, outcomes: Outcomes) -> Run:
    (folder / "evaluations").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    for model, domains in outcomes.items():
        rows = {
            domain: [{"task": "chain_sum", "index": i, "correct": right} for i, right in enumerate(found)]
            for domain, found in domains.items()
        }
        (folder / "evaluations" / f"{model}.json").write_text(json.dumps({"model": model, "domains": rows}))
    return Run(folder)
