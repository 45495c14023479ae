"""`amalgam serve`: a checkpoint behind OpenAI's HTTP protocol."""

import asyncio
import ipaddress
import logging
import os
import secrets
import signal
import socket
import time
from pathlib import Path
from typing import Any

import typer
from aiohttp import web

from ..errors import UserError
from ..model import load
from ..rl.engine import Engine
from ..rl.settings import EngineSettings
from .serving.protocol import ApiError
from .serving.running import Running
from .serving.server import Server
from .speak import Speaker, check_mode, parse_precision

VARIABLE = "AMALGAM_SERVE_TOKEN"
GRACE_SECONDS = 20.0  # that requests have to end in when the server stops
_LEAST_TOKEN = 16  # characters
_ENGINE_SECONDS = 60.0  # that the engine's last step may take


def serve(
    checkpoint: str,
    host: str,
    port: int,
    token_file: Path | None,
    mode: str,
    max_waiting: int,
    request_seconds: float,
    precision: str = "",
) -> None:
    """Serves until SIGINT or SIGTERM. UserError for what cannot be served; an engine that fails raises."""
    logging.basicConfig(format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    token, source = _token(token_file)
    speaks = Speaker(checkpoint, parse_precision(precision))
    check_mode(speaks, mode)
    with _bound(host, port) as bound:
        engine = start_engine(speaks)  # loads the weights before anyone can ask
        settings = {
            "name": checkpoint,
            "context": engine.context,
            "token": token,
            "mode": mode,
            "local": ipaddress.ip_address(bound.getsockname()[0]).is_loopback,
            "request_seconds": request_seconds,
        }
        asyncio.run(_serve(speaks, engine, bound, max_waiting, settings, source))


def start_engine(speaks: Speaker) -> Engine:
    """With a cache as large as there is memory for, with stop strings, and without a record of experts.

    UserError where the memory has no room for one request.
    """
    model = load(speaks.folder, device=speaks.device, precision=speaks.precision, stored=True)
    settings = EngineSettings(experts=False)
    try:
        return Engine(model, speaks.end_ids, tokenizer=speaks.tokenizer, settings=settings)
    except ValueError as error:
        raise UserError(f"{speaks.folder}: {error}") from None


async def _serve(
    speaks: Speaker, engine: Engine, bound: socket.socket, max_waiting: int, settings: dict[str, Any], source: str
) -> None:
    running = Running(engine, max_waiting)
    server = Server(speaks, running, **settings)
    runner = web.AppRunner(server.app(), handler_cancellation=True, access_log=None, shutdown_timeout=5.0)
    await runner.setup()
    site = web.SockSite(runner, bound)
    await site.start()
    stop = _signals()
    _announce(bound, settings, speaks.device, source)
    await asyncio.wait({running.broken, asyncio.ensure_future(stop.acquire())}, return_when="FIRST_COMPLETED")
    server.stopping = True
    await site.stop()
    if not running.broken.done():
        left = f"; {running.count} requests have {GRACE_SECONDS:g} s to end; a second Ctrl-C ends them"
        typer.echo("stopping" + (left if running.count else ""))
        await _until_idle(running, stop)
    running.abort(ApiError(503, "the server is stopping"))
    await runner.cleanup()
    if running.broken.done():
        await running.broken  # which raises what the engine did
    await asyncio.to_thread(running.close, _ENGINE_SECONDS)


async def _until_idle(running: Running, stop: asyncio.Semaphore) -> None:
    end = time.monotonic() + GRACE_SECONDS
    while running.count and time.monotonic() < end and stop.locked() and not running.broken.done():
        await asyncio.sleep(0.05)


def _signals() -> asyncio.Semaphore:
    """Released once by each SIGINT and SIGTERM."""
    stop = asyncio.Semaphore(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.release)
    return stop


def _announce(bound: socket.socket, settings: dict[str, Any], device: str, source: str) -> None:
    host, port = bound.getsockname()[:2]
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    typer.echo(f"{settings['name']}, mode {settings['mode']}, on {device}: http://{where}/v1")
    typer.echo(f"token: {source}")
    if not settings["local"]:
        typer.echo(
            "other machines reach it, by plain HTTP; put a proxy with TLS before it where they are not all yours"
        )


def _token(file: Path | None) -> tuple[str, str]:
    """The token, and what is printed of it: itself if it was made here, else where it is from."""
    if file is not None:
        try:
            token, source = file.read_text("ascii").strip(), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--token-file {file}: {getattr(error, 'strerror', None) or 'not ASCII'}") from None
    elif VARIABLE in os.environ:
        token, source = os.environ[VARIABLE].strip(), VARIABLE
    else:
        made = secrets.token_urlsafe(24)
        return made, f"{made}   (made for this run; {VARIABLE} or --token-file gives one of your own)"
    if len(token) < _LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"{source}: want a token of at least {_LEAST_TOKEN} ASCII characters without spaces")
    return token, f"that of {source}"


def _bound(host: str, port: int) -> socket.socket:
    """A socket at this address that does not listen yet. UserError where it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except OSError:
            made.close()
            raise
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}") from None
    return made
