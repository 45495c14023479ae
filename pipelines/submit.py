"""Send a run to an existing Ray cluster through Ray's job API and follow its log: see docs/submit.md."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .base_check import PRESETS
from .recipe import Pretrain, load_recipe, resolved_yaml

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

REQUEST_SECONDS = 10
UPLOAD_SECONDS = 120
DETACHED = 130  # what a shell calls the end by Ctrl-C

PACKAGE = Path(__file__).parents[1]


def submit(recipe: str, overrides: list[str], address: str, runs: Path = Path("runs")) -> int:
    """Run `recipe` on the Ray cluster whose dashboard is at `address`; return the run's exit code.

    `runs` must be a folder that the cluster's nodes share, as must a base that is no preset. The job runs
    this very copy of Amalgam, in the cluster's own Python environment. Raises UserError for a bad recipe,
    before anything is sent, and where the cluster cannot be reached or refuses the token.
    """
    resolved = load_recipe(recipe, overrides)
    if resolved.base and not (PRESETS / resolved.base).is_dir():  # a folder, relative to here: the job is not
        resolved = resolved.model_copy(update={"base": str(Path(resolved.base).resolve())})
    for name, stage in resolved.stages.items():
        if isinstance(stage, Pretrain) and stage.corpus is not None:
            stage = stage.model_copy(update={"corpus": str(Path(stage.corpus).resolve())})
            resolved = resolved.model_copy(update={"stages": {**resolved.stages, name: stage}})
    client = connect(address)
    command = ["python", "-m", "amalgam.pipelines.cli", "run", "recipe.yaml", "--runs", str(runs.resolve())]
    with tempfile.TemporaryDirectory(prefix="amalgam-") as folder:
        pack(resolved_yaml(resolved), Path(folder))
        return submit_job(client, shlex.join(command), Path(folder))


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's job API whose every request has a deadline.

    The token is RAY_AUTH_TOKEN, or else in the file RAY_AUTH_TOKEN_PATH, or else in ~/.ray/auth_token: Ray's
    own order.
    """
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address}: not the address of a Ray dashboard; right is http://HOST:8265")
    # Ray's client would follow these in place of the address that it was given.
    os.environ.pop("RAY_API_SERVER_ADDRESS", None)
    os.environ.pop("RAY_ADDRESS", None)
    token, source = _find_token()

    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **kwargs):
            seconds = REQUEST_SECONDS if method == "GET" else UPLOAD_SECONDS
            return super()._do_request(method, endpoint, timeout=(REQUEST_SECONDS, seconds), **kwargs)

    try:
        return Client(address, headers={"Authorization": f"Bearer {token}"} if token else None)
    except AuthenticationError:
        found = f"refused the token from {source}" if token else "asks for a token, and none was found"
        raise UserError(
            f"--address {address}: the cluster {found}; set RAY_AUTH_TOKEN to what `ray get-auth-token` "
            "prints on the head node, or RAY_AUTH_TOKEN_PATH to its file, or write it to ~/.ray/auth_token"
        ) from None
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(
            f"--address {address}: no Ray dashboard answered within {REQUEST_SECONDS} s "
            f"({_one_line(error)}); right is the URL that `ray start --head` prints for the dashboard, http://HOST:8265"
        ) from None


def _find_token() -> tuple[str, str]:
    """The token and where it was found; ("", "") where there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text().strip(), str(path)
    except OSError as error:
        if named:
            raise UserError(
                f"RAY_AUTH_TOKEN_PATH: {path}: {error.strerror}; right is a file that holds the token"
            ) from None
        return "", ""


def pack(recipe: str, folder: Path) -> None:
    """Lay out a job's working directory: `recipe.yaml`, and this package as `amalgam/`."""
    (folder / "recipe.yaml").write_text(recipe)
    target = folder / "amalgam"
    target.mkdir()
    for module in PACKAGE.glob("*.py"):
        shutil.copy(module, target)
    # In a clone the package's folder also holds tests, runs and a virtual environment; none is a package.
    for part in [*(init.parent for init in PACKAGE.glob("*/__init__.py")), PACKAGE / "recipes"]:
        shutil.copytree(part, target / part.name, ignore=shutil.ignore_patterns("__pycache__"))


def submit_job(client: JobSubmissionClient, entrypoint: str, working_dir: Path) -> int:
    """Run the shell command `entrypoint` in a copy of `working_dir` on the cluster and print its log.

    Returns the command's exit code: 0 only if the job succeeded. Ctrl-C detaches: the job goes on (130).
    """
    runtime_env = {"working_dir": str(working_dir), "env_vars": {"PYTHONUNBUFFERED": "1"}}
    job = client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
    how = f"RAY_AUTH_MODE=token ray job {{}} --address {client.get_address()} {job}".format
    commands = f"  {how('logs -f')}\n  {how('stop')}"
    print(f"job {job}; Ctrl-C detaches, the job goes on. To follow or stop it then:\n{commands}", flush=True)
    try:
        return _follow(client, job)
    except KeyboardInterrupt:
        print(f"\ndetached; the job goes on. To follow or stop it:\n{commands}", flush=True)
        return DETACHED
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"lost the cluster at {client.get_address()} ({_one_line(error)}); the job may go on: once the "
            f"dashboard answers again, follow it with `{how('logs -f')}`"
        ) from None


def _follow(client: JobSubmissionClient, job: str) -> int:
    shown = 0
    while True:
        info = client.get_job_info(job)  # before the log, so that a finished job's log is whole
        log = client.get_job_logs(job)
        print(log[shown:], end="", flush=True)
        shown = len(log)
        if info.status.is_terminal():
            break
        time.sleep(1 + shown / 1e6)  # Ray sends the whole log every time: keep it under 1 MB/s
    if info.status == "SUCCEEDED":
        return 0
    code = info.driver_exit_code  # None where the command did not even start
    reason = info.message if code is None else f"exit code {code}"
    print(f"job {job} {info.status}: {reason}", file=sys.stderr, flush=True)
    return code if code and code > 0 else 1


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
