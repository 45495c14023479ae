"""The recipe that the tests of recipes load, whole, changed or broken, in an empty folder."""

import json
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import strategies as st

from amalgam.errors import UserError
from amalgam.pipelines import base_check
from amalgam.pipelines.recipe import Recipe, load_recipe

Kind = TypeVar("Kind")
SMALL = """\
name: small
base: tiny
domains:
  arithmetic:
    tasks: {chain_sum: {max_terms: 3}}
  strings:
    mode: chat
    tasks: {spell_backward: {}}
stages:
  sft-{domain}:
    kind: sft
    from: base
  grpo-{domain}:
    kind: grpo
    from: sft-{domain}
    steps: 20
    optimizer:
      lr: 1e-4
  average: {kind: average, of: "grpo-{domain}"}
  merged:
    kind: distill
    from: base
    teachers: grpo-{domain}
tracking: {wandb: off}
"""

# Whatever YAML can say:
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def write_checkpoint(folder: Path) -> Path:
    """A folder that looks like a checkpoint: a config and a safetensors file of one tensor, 2 floats."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return folder


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go to an empty folder, with presets of the tests' own."""
    write_checkpoint(folder / "presets" / "tiny")
    monkeypatch.setattr(base_check, "PRESETS", folder / "presets")
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")


def load(text: str | bytes, *overrides: str) -> Recipe:
    Path("r.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    return load_recipe("r.yaml", overrides)


def errors(text: str | bytes, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


def stage(recipe: Recipe, name: str, kind: type[Kind]) -> Kind:
    found = recipe.stages[name]
    assert isinstance(found, kind)
    return found
