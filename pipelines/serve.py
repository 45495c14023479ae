"""`amalgam serve`: a checkpoint behind OpenAI's HTTP protocol."""

import asyncio
import ipaddress
import logging
import os
import secrets
import signal
import time
from pathlib import Path
from typing import Any

import typer
from aiohttp import web

from ..errors import UserError
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
    engine = speaks.engine  # loads the weights before anyone can ask
    asyncio.run(_serve(speaks, engine, checkpoint, host, port, (token, source), mode, max_waiting, request_seconds))


async def _serve(
    speaks: Speaker,
    engine: Any,
    name: str,
    host: str,
    port: int,
    token: tuple[str, str],
    mode: str,
    max_waiting: int,
    request_seconds: float,
) -> None:
    local = _is_local(host)
    running = Running(engine, max_waiting)
    settings = {"name": name, "token": token[0], "mode": mode, "local": local, "request_seconds": request_seconds}
    server = Server(speaks, running, **settings)
    runner = web.AppRunner(server.app(), handler_cancellation=True, access_log=None, shutdown_timeout=5.0)
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    try:
        await site.start()
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}") from None
    stop = _signals()
    _announce(runner.addresses[0], name, mode, speaks.device, token[1], local)
    await asyncio.wait({running.broken, asyncio.ensure_future(stop.acquire())}, return_when="FIRST_COMPLETED")
    server.stopping = True
    await site.stop()
    if not running.broken.done():
        typer.echo(f"stopping; {running.count} requests have {GRACE_SECONDS:g} s to end, or a second Ctrl-C")
        await _until_idle(running, stop)
    running.abort(ApiError(503, "the server is stopping"))
    await runner.cleanup()
    if running.broken.done():
        await running.broken
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


def _announce(address: Any, name: str, mode: str, device: str, source: str, local: bool) -> None:
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    typer.echo(f"{name}, mode {mode}, on {device}: http://{host}:{address[1]}/v1")
    typer.echo(f"token: {source}")
    if not local:
        typer.echo("others can reach it, and read what goes by: plain HTTP; put a proxy with TLS before it")


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


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
