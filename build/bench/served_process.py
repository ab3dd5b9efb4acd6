"""A server in a process of its own: `python -m runtime.serve`, or llama.cpp's `llama-server`."""

import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

from runtime.errors import UserError

ADDRESS = re.compile(rb"served at http://[^:]+:(?P<port>\d+)/")
START_SECONDS, END_SECONDS = 120.0, 60.0
LLAMA_SERVER = "llama-server"


@dataclass(frozen=True)
class Served:
    """A server that takes requests."""

    port: int
    model: str
    pid: int


@contextmanager
def our_server(artifact: Path, model: str, settings: Mapping[str, object], threads: int) -> Iterator[Served]:
    """Serve an artifact on a free port; its log is dropped. Raises `UserError` if it does not start."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "serving.toml"
        config.write_text("".join(f"{name} = {_toml(value)}\n" for name, value in settings.items()))
        flags = ["--port", "0", "--model-name", model, "--threads", str(threads), "--config", str(config)]
        command = [sys.executable, "-m", "runtime.serve", str(artifact), *flags]
        with served_by(command, model) as served:
            yield served


@contextmanager
def served_by(command: Sequence[str], model: str) -> Iterator[Served]:
    """The server that a command starts, which prints its address; its log is dropped.

    Raises `UserError` if it does not start.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        found = ADDRESS.search(process.stdout.readline())
        if found is None:
            raise UserError(f"the server of {model} has not started; run {' '.join(command[1:])} to see why")
        yield Served(int(found["port"]), model, process.pid)
    finally:
        _end(process)


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool | int | float) else f'"{value}"'


def llama_command(gguf: Path, port: int, sequences: int, columns: int, threads: int) -> Sequence[str]:
    """`llama-server` with room for so many sequences of so many tokens (its --ctx-size is that of all together)."""
    sizes = {"--parallel": sequences, "--ctx-size": sequences * columns, "--threads": threads, "--port": port}
    return (LLAMA_SERVER, "--model", str(gguf), *(str(part) for pair in sizes.items() for part in pair))


def reason_without_llama(gguf: Path | None) -> str | None:
    """Why `llama-server` takes no part; None if it can."""
    if gguf is None or gguf.suffix != ".gguf":
        return "the weights are no GGUF file"
    return None if shutil.which(LLAMA_SERVER) else f"{LLAMA_SERVER} is not installed"


@contextmanager
def llama_server(gguf: Path, sequences: int, columns: int, threads: int) -> Iterator[Served]:
    """Serve a GGUF file with llama.cpp; raises `UserError` if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = llama_command(gguf, port, sequences, columns, threads)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_healthy(process, port)
        yield Served(port, "default", process.pid)
    finally:
        _end(process)


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            connection = HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise UserError(f"{LLAMA_SERVER} has not started")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
