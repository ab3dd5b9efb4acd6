"""The process that serves: sockets, signals, and a clean end."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import uvicorn

from runtime.errors import UserError
from runtime.server.app import application
from runtime.server.service import Service
from runtime.server.service_manager import READY, STOPPING, ServiceManager
from runtime.server.settings import Keys, ServerSettings

CLOSING_SECONDS = 5  # that connections have to close once every answer is complete
KEEP_ALIVE_SECONDS = 75  # longer than the idle connections of common proxies, so that these close first
BACKLOG = 2048


class _Server(uvicorn.Server):
    """uvicorn without its own reaction to signals, which would end streams."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket; raises `UserError` if the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{host}:{port} cannot be listened to: {reason}; choose another host or port") from error
    return listening


def address_of(settings: ServerSettings, listening: socket.socket) -> str:
    """The address that people open."""
    host, port = listening.getsockname()[:2]
    scheme = "http" if settings.tls_certificate is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class Ending:
    """Whether the server is to end: gently, letting answers go on for a while, or at once."""

    def __init__(self) -> None:
        self.gently, self.at_once = asyncio.Event(), asyncio.Event()

    def ask(self) -> None:
        """Ask the server to end; asked again, it ends at once."""
        (self.at_once if self.gently.is_set() else self.gently).set()


async def serve_until_signal(
    service: Service, keys: Keys | None, listening: socket.socket, told: Callable[[], object]
) -> None:
    """As `serve`, until SIGTERM or SIGINT; systemd, if it started this process, is told how the server is."""
    ending, manager = Ending(), ServiceManager(os.environ)
    loop = asyncio.get_running_loop()

    def ask_to_end() -> None:
        manager.tell(STOPPING)
        ending.ask()

    def tell_ready() -> None:
        told()
        manager.tell(READY)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask_to_end)
    living = asyncio.ensure_future(manager.tell_while(lambda: service.health().status != "failed"))
    try:
        await serve(service, keys, listening, tell_ready, ending)
    finally:
        living.cancel()


async def serve(
    service: Service, keys: Keys | None, listening: socket.socket, told: Callable[[], object], ending: Ending
) -> None:
    """Serve until `ending` says so, then let the answers that have begun go on for a while.

    `told` is called once the model is ready. Raises `UserError` if the model cannot be opened, or the files for HTTPS
    cannot be used.
    """
    config = _config(service, keys)
    _load(config)
    server = _Server(config)
    service.start()
    serving = asyncio.ensure_future(server.serve([listening]))
    try:
        await _first_of(service.wait_until_open(), ending.gently.wait())
        if service.state == "failed":
            raise UserError(service.health().detail)
        if not ending.gently.is_set():
            told()
            await ending.gently.wait()
        await service.drain(ending.at_once)
    finally:
        server.should_exit = True
        server.force_exit = ending.at_once.is_set()
        await serving


def _config(service: Service, keys: Keys | None) -> uvicorn.Config:
    return uvicorn.Config(
        application(service, keys),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSING_SECONDS,
        ssl_certfile=service.settings.tls_certificate,
        ssl_keyfile=service.settings.tls_key,
        ws="none",
    )


def _load(config: uvicorn.Config) -> None:
    """Read the files for HTTPS; uvicorn itself would do that beside a model that is being loaded, unnoticed."""
    try:
        config.load()
    except OSError as error:  # which those of ssl are too
        raise UserError(
            f"{config.ssl_certfile} and {config.ssl_keyfile} cannot be used for HTTPS: {error.strerror or error}; "
            "name a certificate and its key in PEM form (tls_certificate, tls_key)"
        ) from error


async def _first_of(*waits: Coroutine[Any, Any, object]) -> None:
    """Wait until one of them is over; the others are given up."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
