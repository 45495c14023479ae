"""metrics.jsonl row by row, and what an offline wandb run really holds."""

import json
import os
import struct
import threading
from types import SimpleNamespace

import pytest

from amalgam.errors import UserError
from amalgam.pipelines.tracking import Tracker


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def tracker(tmp_path):
    tracker = Tracker(tmp_path / "run", "tiny", "off", "amalgam")
    yield tracker
    tracker.close()


def test_a_step_is_one_row(tracker):
    with tracker.stage("sft-a", "sft", {}, {}) as log:
        log.step(1, {"loss": 2})
        log.step(2, {"loss": float("nan"), "kl": float("-inf")})
        log.samples(2, [{"prompt": "x"}])
    first, second = rows(tracker.run_dir)
    assert first.pop("time") > 1.7e9 and second.pop("time") > 1.7e9
    assert first == {"stage": "sft-a", "kind": "sft", "step": 1, "loss": 2.0}
    assert second == {"stage": "sft-a", "kind": "sft", "step": 2, "loss": None, "kl": None}


def test_a_metric_cannot_hide_the_rows_own_keys(tracker):
    with tracker.stage("sft-a", "sft", {}, {}) as log, pytest.raises(ValueError, match="called step"):
        log.step(1, {"step": 7})


def test_threads_never_tear_or_lose_a_row(tracker):
    def work(name):
        with tracker.stage(name, "grpo", {}, {}) as log:
            for step in range(300):
                log.step(step, {"reward": 0.5})
                if step % 100 == 50:
                    log.rewind(step)  # rewrites the file under the other thread's feet

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for name in ("a", "b", "c"):
        assert [row["step"] for row in rows(tracker.run_dir) if row["stage"] == name] == list(range(300))


def test_resume_cuts_a_torn_row_and_the_steps_to_run_again(tmp_path):
    run = tmp_path / "run"
    tracker = Tracker(run, "tiny", "off", "amalgam")
    with tracker.stage("a", "sft", {}, {}) as a, tracker.stage("b", "sft", {}, {}) as b:
        for step in (1, 2, 3, 4):
            a.step(step, {"loss": step})
            b.step(step, {"loss": step})
    tracker.close()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"stage": "a", "kind": "sft", "st')
    again = Tracker(run, "tiny", "off", "amalgam")
    assert again.id == tracker.id
    with again.stage("a", "sft", {}, {}) as a:
        a.rewind(2)
        a.step(3, {"loss": 30})
    again.close()
    assert [(r["stage"], r["step"], r["loss"]) for r in rows(run)] == [
        ("a", 1, 1), ("b", 1, 1), ("a", 2, 2), ("b", 2, 2), ("b", 3, 3), ("b", 4, 4), ("a", 3, 30)
    ]  # fmt: skip
    assert not (run / "metrics.jsonl.new").exists()


@pytest.mark.parametrize("line", ["{]\n", '{"step": 3}\n', "7\n"])
def test_a_spoilt_row_is_named(tmp_path, line):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"stage": "a", "step": 1}\n' + line)
    tracker = Tracker(run, "tiny", "off", "amalgam")
    with tracker.stage("a", "sft", {}, {}) as log, pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
        log.rewind(1)
    tracker.close()


def test_a_spoilt_run_id_is_named(tmp_path):
    (tmp_path / "run_id").write_text("")
    with pytest.raises(UserError, match="run_id: '' is no run id"):
        Tracker(tmp_path, "tiny", "off", "amalgam")


# Weights & Biases


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """wandb as a user has it who never logged in; its service is stopped afterwards."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_SILENT", "WANDB_ERROR_REPORTING", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that what the tracker sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    import wandb

    yield wandb
    wandb.teardown()


def read_wandb(path):
    """Records of a .wandb file: a header of 7 bytes, then LevelDB's blocks of pieces (crc, length, type)."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # a header never crosses a block's end
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def history(records):
    """One dict a row. A key is given as text or, where nested, as a path."""
    for record in records:
        if record.HasField("history"):
            items = record.history.item
            yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_two_stages_at_once_leave_two_offline_runs_in_one_group(tmp_path, wandb, capfd):
    run = tmp_path / "run"
    checkpoint = run / "stages" / "sft-a" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    tracker = Tracker(run, "tiny", "auto", "our-project")
    assert tracker.status == "metrics.jsonl and wandb, offline"
    meet = threading.Barrier(2, timeout=60)

    def work(name):
        with tracker.stage(name, "sft", {"lr": 0.5}, {"base": checkpoint}) as log:
            meet.wait()  # both are open now
            for step in (1, 2, 3):
                log.step(step, {"loss": 1 / step})
            log.samples(3, [{"prompt": "1 + 1", "value": 1.0}, {"prompt": "ab", "note": "timeout"}])
            log.artifact(checkpoint)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("sft-a", "sft-b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    tracker.close()
    wandb.teardown()  # its service writes the last records behind finish()

    written = capfd.readouterr()
    assert written.out == written.err == ""
    assert not (tmp_path / "home").exists()  # nothing outside the run's folder
    for name in ("sft-a", "sft-b"):
        (file,) = run.glob(f"wandb/offline-run-*/run-{tracker.id}-{name}.wandb")
        records = list(read_wandb(file))
        (start,) = (record.run for record in records if record.HasField("run"))
        assert (start.project, start.run_group) == ("our-project", f"tiny-{tracker.id}")
        assert (start.job_type, start.display_name) == ("sft", name)
        assert {item.key: json.loads(item.value_json) for item in start.config.update}["inputs"] == ["base"]
        logged = {row["_step"]: row for row in history(records)}
        assert {step: row["loss"] for step, row in logged.items()} == {
            1: 1.0,
            2: 0.5,
            3: pytest.approx(1 / 3),
        }
        assert (logged[3]["samples.nrows"], logged[3]["samples.ncols"]) == (2, 3)
        (artifact,) = [r.artifact for r in records if r.HasField("artifact") and r.artifact.type == "model"] or [None]
        assert artifact is not None and artifact.name == f"{tracker.id}-{name}"
        assert json.loads(artifact.metadata)["inputs"] == {"base": str(checkpoint)}
        (entry,) = artifact.manifest.contents
        assert entry.ref == (checkpoint / "model.safetensors").as_uri()
    assert len(rows(run)) == 6


def test_online_without_a_login_stops_before_anything_starts(tmp_path, wandb):
    with pytest.raises(UserError, match="online without a login; run `wandb login`"):
        Tracker(tmp_path, "tiny", "online", "amalgam")


class FakeRun(SimpleNamespace):
    """What an online run is asked to do, in order."""

    def __init__(self):
        super().__init__(offline=False, calls=[])

    def __getattr__(self, method):
        return lambda *args, **kwargs: self.calls.append((method, args, kwargs))


def test_online_lineage_meets_by_name_and_content(tmp_path, wandb, monkeypatch):
    runs = []
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", lambda **given: runs.append((given, FakeRun())) or runs[-1][1])
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    tracker = Tracker(tmp_path / "run", "tiny", "auto", "amalgam")
    with tracker.stage("sft-a", "sft", {}, {}) as log:
        log.artifact(tmp_path)
    with pytest.raises(KeyError), tracker.stage("grpo-a", "grpo", {}, {"sft-a": tmp_path}):
        raise KeyError("a failing stage")
    tracker.close()
    (sft, sft_run), (grpo, grpo_run) = runs
    assert (sft["mode"], sft["id"], sft["resume"]) == ("online", f"{tracker.id}-sft-a", "allow")
    assert (grpo["group"], grpo["config"]) == (sft["group"], {"inputs": ["sft-a"]})
    (logged, made, _), (_, _, ended) = sft_run.calls
    (used, taken, _), (_, _, failed) = grpo_run.calls
    assert (logged, used) == ("log_artifact", "use_artifact")
    assert (made[0].name, made[0].digest) == (taken[0].name, taken[0].digest)
    assert (ended, failed) == ({"exit_code": 0}, {"exit_code": 1})


def test_a_failing_start_says_what_to_do(tmp_path, wandb, monkeypatch):
    def fail(**_):
        raise wandb.errors.CommError("no route\nto host")

    monkeypatch.setattr(wandb, "init", fail)
    tracker = Tracker(tmp_path, "tiny", "offline", "amalgam")
    with pytest.raises(
        UserError, match=r"did not start \(no route to host\); .* set tracking\.wandb to offline or off"
    ):
        tracker.stage("sft-a", "sft", {}, {}).__enter__()
    tracker.close()


def test_without_wandb_metrics_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tracker = Tracker(tmp_path, "tiny", "offline", "amalgam")
    assert tracker.status == "metrics.jsonl (wandb is not installed)"
    with tracker.stage("a", "sft", {}, {}) as log:
        log.step(1, {"loss": 1.0})
    tracker.close()
    assert len(rows(tmp_path)) == 1
    with pytest.raises(UserError, match="pip install wandb"):
        Tracker(tmp_path, "tiny", "online", "amalgam")
