"""Ray: starting or joining a cluster, and waiting with a deadline. Ray is imported on first use (0.7 s)."""

import logging
import os
import re
import secrets
import sys
import time
from contextlib import chdir
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError

# Several actors share the cores: a thread pool in each would only make them wait for each other.
_WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# Weights, rollouts and batches of models that fit a CPU run; Ray spills to disk what goes beyond.
_CPU_OBJECT_STORE_BYTES = 200_000_000
_SHARE = 0.01  # of a GPU, by Ray's books: who has its memory is settled by turns, and idle ones have none
_LAST_LINES = 20  # of a dead actor's log
_session: dict[str, str] = {}  # of the Ray that was started or joined: "session_dir", "node_ip_address", ...


def start_ray(address: str | None = None) -> None:
    """Starts a private Ray on this machine, or joins the one at `address` or RAY_ADDRESS.

    An address is "auto" (one that runs here) or "HOST:PORT". Does nothing if this process has joined one
    already. A cluster of several machines needs amalgam and the run's folder at the same paths on each.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    _authenticate(private=address is None)
    import ray

    if ray.is_initialized():
        return
    private = {} if address else {"include_dashboard": False, "object_store_memory": _object_store_bytes()}
    # Ray puts the driver's working directory on every worker's sys.path: from a clone's root, our `kernels`
    # would then shadow Hugging Face's. `sys.prefix` holds no module.
    with chdir(sys.prefix):
        context = ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": _WORKER_ENVIRONMENT},
            **private,
        )
    _session.update(getattr(context, "address_info", {}))  # not there where Ray goes through its client


def log_to_stderr() -> None:
    """For an actor: what Amalgam logs (such as which kernels run) goes to its stderr, of which Ray keeps a file."""
    logging.basicConfig(format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("amalgam").setLevel(logging.INFO)


def _authenticate(private: bool) -> None:
    """Turns token authentication on, as Ray 2.60 does by default, unless RAY_AUTH_MODE says otherwise.

    An existing cluster's token is taken from where Ray looks for it (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH,
    ~/.ray/auth_token); if there is none, the cluster is taken to be open. A private cluster without one gets
    its own in the environment, so that nothing is written to the user's home.
    """
    has_token = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    has_token = has_token or (Path.home() / ".ray" / "auth_token").is_file()
    if "RAY_AUTH_MODE" in os.environ or not (has_token or private):
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    if not has_token:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    from ray._raylet import Config  # pyright: ignore[reportAttributeAccessIssue]

    Config.initialize("")  # Ray has read its environment when it was imported, which may have been long ago


def gpu_group(gpus: int, deadline: float) -> Any:
    """A placement group of whole GPUs, on as few machines as can be. UserError for more than the cluster has."""
    import ray
    from ray.util import placement_group

    have = int(ray.cluster_resources().get("GPU", 0))
    if gpus > have:
        raise UserError(f"resources.placement: colocated takes {gpus} GPUs, and there are {have}")
    group = placement_group([{"GPU": 1}] * gpus)
    wait(group.ready(), f"{gpus} GPUs to be free", deadline)
    return group


def resources(gpus: float, group: Any, index: int) -> dict[str, Any]:
    """An actor's options: so many GPUs to itself, or that GPU of the group, shared with all that are put there."""
    if group is None:
        return {"num_cpus": 0, "num_gpus": gpus}
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return {"num_cpus": 0, "num_gpus": _SHARE, "scheduling_strategy": place}


def wait(refs: Any, what: str, deadline: float) -> Any:
    """`ray.get(refs)` within `deadline` seconds.

    An actor's exception is raised as itself, its remote traceback as the cause. Raises TimeoutError, which
    says `what` was waited for and for how long. A dead actor's error carries `what` as a note, and the last
    lines of its log if it ran on this machine.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

    try:
        return ray.get(refs, timeout=deadline)
    except GetTimeoutError:
        raise TimeoutError(f"{what}: not done after {deadline:g} s") from None
    except RayTaskError as error:
        raise error.cause from error
    except RayActorError as error:
        error.add_note(f"while waiting for {what}")
        if words := last_words(error):
            error.add_note(words)
        raise


def last_words(death: Exception) -> str:
    """The last lines that a dead actor wrote to stderr, and their file, found by the pid in Ray's text.

    Empty for one that wrote none (as one that was killed), or that ran on another machine.
    """
    place = dict(re.findall(r"^\t(pid|ip): (\S+)$", str(death), re.MULTILINE))
    if "pid" not in place or not _session or place.get("ip") != _session["node_ip_address"]:
        return ""
    for file in Path(_session["session_dir"], "logs").glob(f"worker-*-{place['pid']}.err"):
        lines = file.read_text(errors="replace").splitlines()
        own = [line for line in lines if not re.match(r":(job_id|actor_name|task_name):", line)]  # the others are Ray's
        if own:
            return "\n".join([f"its log, {file}, ended with:", *own[-_LAST_LINES:]])
    return ""


def _object_store_bytes() -> int | None:
    """None is Ray's own choice, a share of the memory."""
    return None if Path("/dev/nvidiactl").exists() else _CPU_OBJECT_STORE_BYTES


class Usage(NamedTuple):
    cpu_seconds: float = 0.0  # so far
    peak_rss_bytes: int = 0  # since the actor loaded its model
    since_start: bool = False  # or, where Linux lets the mark not be set back, in the process's whole life


def usage(workers: list[Any]) -> list[Usage]:
    """What each actor's process used; `workers` have a `memory.Span` as `memory`. Zeros for one that died."""
    from ray.exceptions import RayActorError

    calls = [worker.__ray_call__.remote(_own_usage) for worker in workers]
    found = []
    for call in calls:
        try:
            found.append(wait(call, "an actor's resource usage", 60.0))
        except RayActorError:  # whoever needs it next finds out, and replaces it where that can be done
            found.append(Usage())
    return found


def _own_usage(actor: Any) -> Usage:
    return Usage(time.process_time(), actor.memory.peak(), actor.memory.since_start)
