"""A server in a process of its own, which can be told to end or be killed, whose model says one word again and again.

`python -m tests.helpers.scripted_process --port PORT --word WORD --step-seconds SECONDS [--config FILE]`
"""

import argparse
import asyncio
import itertools
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from runtime.server.process import bound_socket, serve_until_signal
from runtime.server.service import Service
from runtime.server.settings import read_settings
from runtime.text.instruct import InstructEncoder
from tests.helpers.scripted_engine import EOS, PIECES, VOCAB, ScriptedEngine
from tests.helpers.scripted_service import v3_tokenizer
from tests.helpers.serving import NAME, served

ROOT = Path(__file__).parents[2]
LONGEST = 500  # words of a reply
SLOTS = 8
END_SECONDS = 30


def main():
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--word", required=True)
    parser.add_argument("--step-seconds", type=float, required=True)
    parser.add_argument("--config", type=Path)
    args = parser.parse_args()
    asyncio.run(_serve(args, read_settings(args.config, {"snapshot_megabytes": 0})))


async def _serve(args, settings):
    service = Service(NAME, lambda: _model(args.word, args.step_seconds), settings)
    listening = bound_socket(settings.host, args.port)
    await serve_until_signal(service, None, listening, lambda: print("ready", flush=True))


def _model(word, step_seconds):
    reply = [*PIECES.encode(" ".join([word] * LONGEST)), EOS]
    engine = ScriptedEngine(itertools.repeat(reply), slots=SLOTS, on_step=lambda _number: time.sleep(step_seconds))
    engine.manifest = SimpleNamespace(model=SimpleNamespace(generates=True, head="causal_lm", vocab_size=VOCAB))
    return served(engine, v3_tokenizer(), InstructEncoder("v3", v3_tokenizer()))


class ScriptedProcess:
    """Starts the server, and starts it again at the same port."""

    def __init__(self, word, folder, step_seconds=0.01, **settings):
        self.word = word
        self.port = free_port()
        self.log = folder / f"{word}.log"  # of all its processes, one after the other
        config = folder / f"{word}.toml"
        config.write_text("".join(f"{name} = {value}\n" for name, value in settings.items()))
        self._command = [sys.executable, "-m", "tests.helpers.scripted_process"]
        self._command += ["--port", str(self.port), "--word", word, "--step-seconds", str(step_seconds)]
        self._command += ["--config", str(config)]
        self.process = None

    def start(self):
        """Start the process, which is ready some time later."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, cwd=ROOT, stdout=log, stderr=log)

    def end(self):
        """Wait for the end of a process that was told to end; its exit status."""
        return self.process.wait(END_SECONDS)


@contextmanager
def scripted_processes(*processes):
    """The processes, started, and killed in the end."""
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            if process.process is not None:
                process.process.kill()
                process.process.wait()


def free_port():
    """A port that nobody has now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    main()
