"""Mistakes in a recipe, and in the base that it names: the one line that each gets."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amalgam.errors import UserError
from amalgam.pipelines.recipe import Grpo, Sft, load_recipe
from amalgam.pipelines.yaml_lines import read, write

from .small_recipe import SMALL, enter, errors, load, stage, values, write_checkpoint


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch)


# Mistakes in the file: (what is written instead of what, the line it gets)

NAME_RULE = "use letters, digits, - and _, at most 64"
MISTAKES = {
    "unknown key": (
        "      lr: 1e-4",
        "      lrr: 1e-4",
        "r.yaml:18: stages.grpo-{domain}.optimizer.lrr: unknown key; did you mean 'lr'?",
    ),
    "a key one level too high": (
        "    steps: 20",
        "    steps: 20\n    temperature: 0.5",
        "r.yaml:17: stages.grpo-{domain}.temperature: unknown key; did you mean 'sampling.temperature'?",
    ),
    "a key like no other": (
        "{wandb: off}",
        "{zzz: off}",
        "r.yaml:24: tracking.zzz: unknown key; choose from wandb, project",
    ),
    "wrong type": (
        "lr: 1e-4",
        "lr: abc",
        'r.yaml:18: stages.grpo-{domain}.optimizer.lr: "abc" is not a number; give a positive number, e.g. 1e-06',
    ),
    "a number in quotes": (
        "steps: 20",
        'steps: "20"',
        'r.yaml:16: stages.grpo-{domain}.steps: "20" is not a whole number; give a positive whole number, e.g. 100',
    ),
    "out of range": (
        "lr: 1e-4",
        "lr: -1",
        "r.yaml:18: stages.grpo-{domain}.optimizer.lr: -1 is out of range; give a positive number, e.g. 1e-06",
    ),
    "infinite": (
        "lr: 1e-4",
        "lr: .inf",
        'r.yaml:18: stages.grpo-{domain}.optimizer.lr: ".inf" is not a number; give a positive number, e.g. 1e-06',
    ),
    "a beta of 1": (
        "lr: 1e-4",
        "betas: [0.9, 1]",
        "r.yaml:18: stages.grpo-{domain}.optimizer.betas.1: 1 is out of range; give a number at least 0 and below 1",
    ),
    "an optimizer that is not built": (
        "    optimizer:\n      lr: 1e-4",
        "    optimizer: sgd",
        'r.yaml:17: stages.grpo-{domain}.optimizer.name: "sgd" is not possible; choose from adamw, muon',
    ),
    "yes for true": (
        "    from: base\n  grpo",
        "    from: base\n    evaluate: yes\n  grpo",
        'r.yaml:13: stages.sft-{domain}.evaluate: "yes" is not true or false; give true or false',
    ),
    "unknown choice": (
        "mode: chat",
        "mode: think",
        'r.yaml:7: domains.strings.mode: "think" is not possible; choose from chat, high',
    ),
    "fewer prompts than domains": (
        "teachers: grpo-{domain}\n",
        "teachers: grpo-{domain}\n    prompts: 1\n",
        "r.yaml:24: stages.merged.prompts: 1 a step leave some of the 2 domains out; give more",
    ),
    "demonstrations in mode high": (
        "mode: chat",
        "mode: high",
        "r.yaml:10: stages.sft-{domain}.domains: the domain 'strings' has the mode high, and its demonstrations hold "
        "no reasoning (not built yet); set the domain's mode to chat",
    ),
    "unknown kind": (
        "kind: sft",
        "kind: sftt",
        "r.yaml:11: stages.sft-{domain}.kind: \"sftt\" is no kind of stage; did you mean 'sft'?",
    ),
    "no kind": (
        "    kind: sft\n",
        "",
        "r.yaml:10: stages.sft-{domain}.kind: missing; choose from sft, grpo, distill, average, pretrain",
    ),
    "no steps": (
        "    steps: 20\n",
        "",
        "r.yaml:13: stages.grpo-{domain}.steps: missing; give a positive whole number, e.g. 100",
    ),
    "parameters left empty": (
        "{spell_backward: {}}",
        "{spell_backward: }",
        "r.yaml:8: domains.strings.tasks.spell_backward: an empty value is not a mapping; "
        "give a mapping ({KEY: VALUE}, or {})",
    ),
    "no tasks": (
        "{spell_backward: {}}",
        "{}",
        "r.yaml:8: domains.strings.tasks: a domain has either tasks, e.g. {chain_sum: {max_terms: 3}}, or data",
    ),
    "tasks and data": (
        "tasks: {spell_backward: {}}",
        "data: {train: a.jsonl, heldout: b.jsonl}\n    rewards: {math: 1}\n    tasks: {spell_backward: {}}",
        "r.yaml:10: domains.strings.tasks: a domain has either tasks, e.g. {chain_sum: {max_terms: 3}}, or data",
    ),
    "data without rewards": (
        "tasks: {spell_backward: {}}",
        "data: {train: a.jsonl, heldout: b.jsonl}",
        "r.yaml:6: domains.strings.rewards: data needs rewards to grade by, e.g. {math: 1}; there are reasoning-gym, "
        "math, code, instruction, choice, json, tool-call, format, length, language, judge",
    ),
    "a reward that is none": (
        "tasks: {spell_backward: {}}",
        "tasks: {spell_backward: {}}\n    rewards: {reasoning-gym: 0.9, lenght: 0.1}",
        "r.yaml:9: domains.strings.rewards.lenght: no reward 'lenght'; did you mean length?",
    ),
    "a reward's parameter that is none": (
        "tasks: {spell_backward: {}}",
        "tasks: {spell_backward: {}}\n    rewards:\n      reasoning-gym: 0.9\n      format: {weight: 0.1, stile: any}",
        "r.yaml:11: domains.strings.rewards.format.stile: no such parameter; did you mean style? it takes style",
    ),
    "a stage that is a number": (
        '{kind: average, of: "grpo-{domain}"}',
        "3",
        "r.yaml:19: stages.average: 3 is not a mapping; give a mapping ({KEY: VALUE}, or {})",
    ),
    "colocated side by side": (
        "tracking: {wandb: off}",
        "stages_at_once: 2\nresources: {placement: colocated, gpus_per_actor: 1}",
        "r.yaml:24: stages_at_once: colocated stages take turns with the GPUs' memory; give 1",
    ),
    "unknown reference": (
        "from: sft-{domain}",
        "from: sftt-strings",
        "r.yaml:15: stages.grpo-{domain}.from: no stage 'sftt-strings'; did you mean 'sft-strings'?",
    ),
    "a pattern where one model belongs": (
        "    from: base\n    teachers",
        "    from: sft-{domain}\n    teachers",
        "r.yaml:22: stages.merged.from: names one model; {domain} in it needs {domain} in the stage's own name",
    ),
    "a domain without a teacher": (
        "teachers: grpo-{domain}",
        "teachers: {arithmetic: grpo-arithmetic}",
        "r.yaml:23: stages.merged.teachers: the domain 'strings' has no teacher; add `strings: STAGE`",
    ),
    "a teacher without a domain": (
        "teachers: grpo-{domain}",
        "teachers: {arithmetic: base, strings: base, string: base}",
        "r.yaml:23: stages.merged.teachers.string: no domain 'string' here; did you mean 'strings'?",
    ),
    "a teacher that no stage makes": (
        "teachers: grpo-{domain}",
        "teachers: {arithmetic: base, strings: gpro-strings}",
        "r.yaml:23: stages.merged.teachers.strings: no stage 'gpro-strings'; did you mean 'grpo-strings'?",
    ),
    "teachers of the wrong type": (
        "teachers: grpo-{domain}",
        "teachers: 5",
        "r.yaml:23: stages.merged.teachers: 5 is not a mapping; "
        'give a mapping, e.g. "grpo-{domain}" or {strings: grpo-strings}',
    ),
    "unknown domain": (
        "teachers: grpo-{domain}",
        "teachers: {strings: base, string: base}\n    domains: [strings, string]",
        "r.yaml:24: stages.merged.domains.1: no domain 'string'; did you mean 'strings'?",
    ),
    "a stage named base": (
        "  average:",
        "  base:",
        "r.yaml:19: stages.base: 'base' is the recipe's base model; give the stage another name",
    ),
    "two stages of one name": (
        "  average:",
        "  grpo-strings:",
        "r.yaml:19: stages.grpo-strings: makes a second 'grpo-strings'; rename one",
    ),
    "a circle": (
        'of: "grpo-{domain}"}\n',
        "of: [base, other]}\n  other: {kind: sft, from: average}\n",
        "r.yaml:19: stages.average: the stages go in a circle: average needs other needs average",
    ),
    "a name that is no folder's": (
        "name: small",
        "name: ../small",
        "r.yaml:1: name: '../small' is no possible name for a folder; " + NAME_RULE,
    ),
    "a domain that is no folder's": (
        "  strings:",
        "  a/b:",
        "r.yaml:6: domains.a/b: 'a/b' is no possible name for a folder; " + NAME_RULE,
    ),
    "unknown preset": (
        "base: tiny",
        "base: tny",
        "r.yaml:2: base: 'tny' is neither a preset nor a folder; did you mean 'tiny'?",
    ),
    "unknown preset to start from": (
        '{kind: average, of: "grpo-{domain}"}',
        "{kind: pretrain, init: tny, steps: 1}",
        "r.yaml:19: stages.average.init: no preset 'tny'; did you mean 'tiny'?",
    ),
    "a corpus that is not there": (
        '{kind: average, of: "grpo-{domain}"}',
        "{kind: pretrain, init: tiny, steps: 1, corpus: x/y}",
        "r.yaml:19: stages.average.corpus: no file 'x/y'; leave the key out, or give the file's path",
    ),
    "a key given twice": (
        "    steps: 20",
        "    steps: 20\n    steps: 30",
        "r.yaml:17: stages.grpo-{domain}.steps: given twice (first on line 16); keep one",
    ),
    "a key that is a number": (
        "      lr: 1e-4",
        "      5: 1",
        'r.yaml:18: stages.grpo-{domain}.optimizer: the key 5 is not text; put it in quotes ("...")',
    ),
    "an alias": (
        "name: small\nbase: tiny",
        "name: &name small\nbase: *name",
        "r.yaml:2: an alias (*name) is not supported; write the value out",
    ),
    "a Python object": (
        "name: small",
        "name: !!python/name:os.system x",
        "r.yaml:1: name: the tag !!python/name:os.system is not supported; write a plain value",
    ),
    "broken indentation": (
        "    kind: grpo",
        "   kind: grpo\n    x: 1",
        "r.yaml:15: mapping values are not allowed here; check indentation, colons, quotes and brackets here",
    ),
    "a second document": (
        "tracking:",
        "---\ntracking:",
        "r.yaml:24: expected a single document in the stream begun on line 1, but found another document",
    ),
    "no stages": (
        SMALL[SMALL.index("stages:") :],
        "",
        "r.yaml:1: stages: missing; give a mapping that is not empty, e.g. {start: {kind: sft, from: base}}",
    ),
    "no domains": (
        SMALL[SMALL.index("domains:") : SMALL.index("stages:")],
        "",
        "r.yaml:1: domains: missing; give a mapping that is not empty, e.g. {strings: {tasks: {spell_backward: {}}}}",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_exact_line(mistake: str):
    right, wrong, message = MISTAKES[mistake]
    assert SMALL.count(right) >= 1
    assert errors(SMALL.replace(right, wrong, 1)) == [message]


def test_colocated_shards_are_refused_where_they_are_asked_for():
    text = SMALL.replace("lr: 1e-4", "{zero_stage: 3, ranks: 2}") + "resources: {placement: colocated}\n"
    problem = "stage 3 keeps shards that a colocated learner cannot offload; give 2"
    assert errors(text) == [f"r.yaml:18: stages.grpo-{{domain}}.optimizer.zero_stage: {problem}"]
    assert load(text.replace("ranks: 2", "ranks: 1")).most_actors() == 1
    assert (
        load(
            text.replace("3, ranks: 2", "2, ranks: 2").replace("steps: 20", "rollout_workers: 3\n    steps: 2")
        ).most_actors()
        == 3
    )


def test_a_base_that_is_named_but_absent():
    message = "the recipe has no base; add `base: tiny`, or another preset or folder"
    assert errors(SMALL.replace("base: tiny\n", "")) == [
        f"r.yaml:11: stages.sft-{{domain}}.from: {message}",
        f"r.yaml:21: stages.merged.from: {message}",
    ]


def test_several_mistakes_get_a_line_each_in_the_files_order_and_five_at_most():
    text = SMALL.replace("lr: 1e-4", "lr: -1").replace("mode: chat", "mod: chat").replace("tiny", "[]")
    assert [line.split(": ")[0] for line in errors(text)] == ["r.yaml:2", "r.yaml:7", "r.yaml:18"]
    many = errors(SMALL.replace("lr: 1e-4", "{a1: 1, b1: 1, c1: 1, d1: 1, e1: 1, f1: 1, g1: 1}"))
    assert len(many) == 6
    assert many[-1] == "... and 2 more"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "r.yaml:1: a recipe is a mapping of keys; the first is `name:`"),
        (b"- a\n- b\n", "r.yaml:1: a recipe is a mapping of keys; the first is `name:`"),
        (
            b"name: x\nseed: \xff\n",
            "r.yaml:2: unacceptable character #x00ff: invalid start byte; a recipe is UTF-8 text",
        ),
        (b"name: " + b"[" * 5000, "r.yaml: nested too deeply for a recipe"),
    ],
)
def test_what_is_no_recipe_at_all(text: bytes, message: str):
    assert errors(text) == [message]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quikstart", "quikstart: no such recipe or file; did you mean 'quickstart'?"),
        ("recipes/tinybase.yaml", "recipes/tinybase.yaml: no such recipe or file; did you mean 'tiny-base'?"),
        ("zzz", "zzz: no such recipe or file; choose from quickstart, tiny-base"),
        (".", ".: Is a directory; give a recipe's name or the path of a YAML file"),
    ],
)
def test_a_recipe_that_is_not_there(name: str, message: str):
    with pytest.raises(UserError) as caught:
        load_recipe(name)
    assert str(caught.value) == message


def places(data: dict, path: tuple = ()) -> list[tuple]:
    """The path of every value in a recipe's mappings."""
    inner = [place for key, value in data.items() if isinstance(value, dict) for place in places(value, (*path, key))]
    return [(*path, key) for key in data] + inner


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(places(read(SMALL.encode(), "").data)), values, st.booleans())
def test_whatever_stands_in_one_place_is_taken_or_refused_with_its_line(path: tuple, value: object, extra: bool):
    data = read(SMALL.encode(), "").data
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1] + "x" * extra] = value
    try:
        load(write(data))
    except UserError as error:
        assert all(re.match(r"r\.yaml:\d+: \S|\.\.\. and \d+ more$", line) for line in str(error).splitlines())


def test_what_needs_the_mtp_block_is_refused_for_a_model_without_one():
    config = Path("../presets/tiny/config.json")
    wanted = ["stages.sft-{domain}.mtp.weight=0.1", "stages.grpo-{domain}.sampling.draft=mtp"]
    without = "the config.json that it starts from has no num_nextn_predict_layers of V4"
    problem = f"the stage's model has no MTP block; {without}"
    config.write_text('{"num_nextn_predict_layers": 0}')
    assert errors(SMALL, *wanted) == [
        f"--set stages.{stage}-{{domain}}.{key}: {problem}; leave the key out"
        for stage, key in (("sft", "mtp.weight"), ("grpo", "sampling.draft"))
    ]
    config.write_text('{"num_nextn_predict_layers": 1}')
    recipe = load(SMALL, *wanted)
    assert stage(recipe, "sft-strings", Sft).mtp.weight == 0.1
    assert stage(recipe, "grpo-strings", Grpo).sampling.draft == "mtp"


def test_sampling_from_sets_is_refused_where_the_loss_would_need_them():
    wanted = {"grpo-{domain}.sampling.top_k": 5, "grpo-{domain}.sampling.min_p": 0.1, "merged.sampling.top_p": 0.9}
    problem = "the loss would need the sets that tokens were drawn from (not built yet); leave the key out"
    found = errors(SMALL, *(f"stages.{key}={value}" for key, value in wanted.items()))
    assert found == [f"--set stages.{key}: {problem}" for key in wanted]
    load(SMALL, "stages.merged.sampling.top_p=1", "stages.merged.sampling.top_k=0")


@pytest.mark.parametrize("kind", ["sft", "grpo", "merged"])
def test_the_weight_of_the_indexers_loss(kind: str):
    name, made = (kind, kind) if kind == "merged" else (f"{kind}-{{domain}}", f"{kind}-strings")
    place = f"stages.{name}.indexer"
    off: Any = load(SMALL).stages[made]
    assert off.indexer.weight == 0 and off.indexer.unfreeze == ()
    on: Any = load(SMALL, f"{place}={{weight: 0.5}}").stages[made]
    assert on.indexer.weight == 0.5 and on.indexer.unfreeze == ("indexer",)
    wanted = "give a number at least 0, e.g. 0.0"
    for value, problem in (("-0.1", f"-0.1 is out of range; {wanted}"), (".nan", f'".nan" is not a number; {wanted}')):
        assert errors(SMALL, f"{place}.weight={value}") == [f"--set {place}.weight: {problem}"]
    assert errors(SMALL, f"{place}.wait=1") == [f"--set {place}.wait: unknown key; did you mean 'weight'?"]


# The base's folder


def test_a_checkpoints_folder_is_a_base():
    write_checkpoint(Path("checkpoint"))
    assert load(SMALL, "base=checkpoint").base == "checkpoint"


def broken(how: str) -> str:
    """The one line for a base that is a checkpoint broken in one way."""
    weights = write_checkpoint(Path("c")) / "model.safetensors"
    whole = weights.read_bytes()
    changes = {
        "cut short": lambda: weights.write_bytes(whole[:-1]),
        "cut inside the header": lambda: weights.write_bytes(whole[:20]),
        "too long": lambda: weights.write_bytes(whole + b"x"),
        "empty": lambda: weights.write_bytes(b""),
        "a pickle": lambda: weights.write_bytes(b"PK\3\4" + bytes(100)),
        "no JSON inside": lambda: weights.write_bytes((4).to_bytes(8, "little") + b"abcd" + bytes(8)),
        "no offsets inside": lambda: weights.write_bytes((8).to_bytes(8, "little") + b'{"w": 1}'),
        "no weights": weights.unlink,
        "no config": Path("c/config.json").unlink,
        "config cut short": lambda: Path("c/config.json").write_text('{"a":'),
        "config is a list": lambda: Path("c/config.json").write_text("[]"),
    }
    changes[how]()
    (line,) = errors(SMALL.replace("base: tiny", "base: c"))
    return line.removeprefix("r.yaml:2: base: ")


NOT_SAFETENSORS = (
    r"c/model\.safetensors: cut short or not safetensors \(Error while .+\); "
    r"copy it again, or save the model with save_pretrained or amalgam\.model\.save"
)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut short", NOT_SAFETENSORS),
        ("too long", NOT_SAFETENSORS),
        ("cut inside the header", NOT_SAFETENSORS),
        ("empty", NOT_SAFETENSORS),
        ("a pickle", NOT_SAFETENSORS),
        ("no JSON inside", NOT_SAFETENSORS),
        ("no offsets inside", NOT_SAFETENSORS),
        (
            "no weights",
            "c/model.safetensors is missing; a checkpoint's folder holds config.json and model.safetensors",
        ),
        (
            "no config",
            "c/config.json is missing; a checkpoint's folder holds config.json and model.safetensors",
        ),
        (
            "config cut short",
            "c/config.json is not JSON; it should be the model's configuration as transformers writes it",
        ),
        ("config is a list", "c/config.json is not a JSON object"),
    ],
)
def test_a_broken_checkpoint_is_refused(how: str, message: str):
    assert re.fullmatch(message, broken(how))


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("model-1.safetensors", None),
        ("model-2.safetensors", "index.json names 'model-2.safetensors', which is no file in that folder"),
        ("../c/model-1.safetensors", "names '../c/model-1.safetensors', which is no file in that folder"),
        ("config.json", "c/config.json: cut short or not safetensors"),
        (None, "c/model.safetensors.index.json is no index of shards"),
    ],
)
def test_shards_are_a_base(shard: str | None, message: str | None):
    folder = write_checkpoint(Path("c"))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"w": shard}} if shard else []
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if message is None:
        assert load(SMALL, "base=c").base == "c"
    else:
        (line,) = errors(SMALL.replace("base: tiny", "base: c"))
        assert message in line
