"""Submission to a real cluster: `ray start --head` with token authentication, on ports of its own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from amalgam.errors import UserError
from amalgam.pipelines import submit
from amalgam.pipelines.recipe import load_recipe

TOKEN = "0123456789abcdef0123456789abcdef"


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The dashboard's address of a running cluster."""
    gcs, dashboard, agent, client = free_ports(4)
    folder = tempfile.mkdtemp(prefix="ray")  # short: it holds sockets, whose paths end at 107 characters
    scripts = str(Path(sys.executable).parent)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    options = {
        "--port": gcs, "--dashboard-port": dashboard, "--dashboard-host": "127.0.0.1", "--temp-dir": folder,
        "--dashboard-agent-listen-port": agent, "--ray-client-server-port": client,
        "--num-cpus": 2, "--object-store-memory": 100_000_000,
    }  # fmt: skip
    log = Path(folder, "head.log")
    with log.open("w") as output:
        head = subprocess.Popen(
            [f"{scripts}/ray", "start", "--head", "--block", *(f"{k}={v}" for k, v in options.items())],
            env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(head, dashboard, log, seconds=60)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        head.terminate()
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(head: subprocess.Popen, port: int, log: Path, seconds: float) -> None:
    """Until the dashboard listens: it opens its port when its job API is ready."""
    deadline = time.monotonic() + seconds
    while head.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.2)
    pytest.fail(f"no Ray dashboard after {seconds} s:\n{log.read_text()}")


@pytest.fixture(autouse=True)
def client_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("RAY_AUTH", "RAY_ADDRESS", "RAY_API"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.ray/auth_token of the user's


def test_prints_the_log_and_returns_the_exit_code(cluster, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    work = tmp_path / "job"
    work.mkdir()
    (work / "job.py").write_text("import sys; print('exit', sys.argv[1]); sys.exit(int(sys.argv[1]))")
    client = submit.connect(cluster)
    assert submit.submit_job(client, "python job.py 0", work) == 0
    assert "\nexit 0\n" in capfd.readouterr().out
    assert submit.submit_job(client, "python job.py 7", work) == 7
    printed = capfd.readouterr()
    assert "\nexit 7\n" in printed.out
    assert "FAILED: exit code 7" in printed.err


RECIPE = """
name: submitted
base: tiny
domains:
  strings: {tasks: {spell_backward: {min_word_len: 3, max_word_len: 4}}}
stages:
  average: {kind: average, of: [base]}
evaluate: {problems: 2, max_new_tokens: 4}
tracking: {wandb: "off"}
"""


def test_a_whole_run(cluster, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(RECIPE)
    assert submit.submit("mine.yaml", ["evaluate.problems=3"], cluster, Path("runs")) == 0, capfd.readouterr()
    rows = json.loads(Path("runs/submitted/results.json").read_text())
    assert {(row["model"], row["domain"], row["total"]) for row in rows} == {
        ("base", "strings", 3),
        ("average", "strings", 3),
    }


def test_what_the_job_gets(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("weights").mkdir()
    Path("weights/config.json").write_text("{}")
    save_file({"a": np.zeros(1, np.float32)}, "weights/model.safetensors")
    Path("mine.yaml").write_text(RECIPE.replace("base: tiny", "base: weights"))
    sent = []

    def record(client: str, entrypoint: str, working_dir: Path) -> int:
        sent.append((client, entrypoint, load_recipe(str(working_dir / "recipe.yaml"))))
        return 3

    monkeypatch.setattr(submit, "connect", str)
    monkeypatch.setattr(submit, "submit_job", record)
    assert submit.submit("mine.yaml", ["seed=5"], "http://head:8265", Path("a b")) == 3
    ((client, entrypoint, recipe),) = sent
    assert client == "http://head:8265"
    assert entrypoint == f"python -m amalgam.pipelines.cli run recipe.yaml --runs '{tmp_path}/a b'"
    assert (recipe.seed, recipe.base) == (5, f"{tmp_path}/weights")


def test_a_bad_recipe_is_refused_before_anything_is_sent(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE.replace("evaluate:", "evalaute:"))
    with pytest.raises(UserError, match=r"mine\.yaml:8: evalaute: .*evaluate"):
        submit.submit(str(recipe), [], "http://127.0.0.1:1")


def test_ctrl_c_detaches(cluster, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text(TOKEN + "\n")
    work = tmp_path / "job"
    work.mkdir()
    client = submit.connect(cluster)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(submit.time, "sleep", interrupt)
        assert submit.submit_job(client, "sleep 60", work) == submit.DETACHED
    (job,) = [info for info in client.list_jobs() if info.entrypoint == "sleep 60"]
    assert not job.status.is_terminal()
    assert f"ray job stop --address {cluster} {job.submission_id}" in capfd.readouterr().out
    assert job.submission_id and client.stop_job(job.submission_id)


def test_an_explicit_address_wins_over_the_environment(cluster, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    assert submit.connect(cluster).get_address() == cluster


def test_refused_token(cluster, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 32)
    with pytest.raises(UserError, match="refused the token from RAY_AUTH_TOKEN; set RAY_") as caught:
        submit.connect(cluster)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", [None, "token"])
def test_no_token(cluster, monkeypatch, mode):
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(UserError, match=r"asks for a token, and none was found; .* ~/\.ray/auth_token$"):
        submit.connect(cluster)


def test_missing_token_file(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"RAY_AUTH_TOKEN_PATH: .*/none: No such file"):
        submit.connect("http://127.0.0.1:1")


def test_nobody_listens():
    (port,) = free_ports(1)
    with pytest.raises(UserError, match=f"--address http://127.0.0.1:{port}: no Ray dashboard answered"):
        submit.connect(f"http://127.0.0.1:{port}")


def test_a_server_that_never_answers(monkeypatch):
    monkeypatch.setattr(submit, "REQUEST_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"http://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(UserError, match=r"no Ray dashboard answered within 0\.2 s"):
            submit.connect(address)


@pytest.mark.parametrize("address", ["localhost:8265", "ray://head:10001", "auto", "os://x"])
def test_only_a_url_is_an_address(address):
    with pytest.raises(UserError, match=f"--address {address}: not the address of a Ray dashboard"):
        submit.connect(address)


def test_pack_takes_the_package_and_no_more(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    submit.pack("name: mine\n", work)
    assert sorted(path.name for path in work.iterdir()) == ["amalgam", "recipe.yaml"]
    assert (work / "recipe.yaml").read_text() == "name: mine\n"
    assert (work / "amalgam/pipelines/submit.py").read_text() == Path(submit.__file__).read_text()
    parts = {path.name for path in (work / "amalgam").iterdir() if path.is_dir()}
    assert parts == {"distill", "kernels", "model", "pipelines", "recipes", "rewards", "rl"}
    assert not list(work.rglob("__pycache__"))
