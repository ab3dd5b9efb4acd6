"""Stores for tests: an S3 server at a loopback address, artifacts in small pieces, and commands that are killed."""

import logging
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import msgspec
from moto.server import ThreadedMotoServer

from cluster.store.storage import Store
from export.stage import ROOT
from runtime.artifact.consistency import MANIFEST_FILE, WEIGHTS_FILE
from runtime.artifact.folder import read_manifest, write_artifact
from runtime.artifact.signing import SIGNATURE_FILE

PIECE = 2**16  # bytes; instead of 16 MiB, so that tiny weights have many
END_SECONDS = 60
BUCKET = "models"
SMALL_PIECES = (
    f"import runtime.artifact.hashing; runtime.artifact.hashing.BLOCK_BYTES = {PIECE}\n"  # in another process
)
STOPPING = """
import sys, threading, time
import {module}, {command}
changed, whole, begun, ended = threading.Condition(), {module}.{function}, 0, 0

def stopping(*arguments):
    global begun, ended
    with changed:
        begun += 1
        if begun >= {before}:
            changed.wait_for(lambda: ended == {before} - 1)
            print("reached", flush=True)
            changed.wait({seconds})
    result = whole(*arguments)
    with changed:
        ended += 1
        changed.notify_all()
    return result

{module}.{function} = stopping
sys.exit({command}.main())
"""


@contextmanager
def s3_server():
    """The address of an S3 server with one empty bucket."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line for each request otherwise
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    urlopen(Request(f"{address}/{BUCKET}", method="PUT"), timeout=END_SECONDS).close()
    try:
        yield address
    finally:
        server.stop()


def rewritten(source, target, change=lambda folder: None):
    """An artifact like another one, whose files are changed by `change`, in pieces of the present size."""
    manifest = read_manifest(source)

    def fill(folder):
        for path in source.iterdir():
            if path.name not in (MANIFEST_FILE, SIGNATURE_FILE):
                (folder / path.name).write_bytes(path.read_bytes())
        change(folder)

    write_artifact(target, fill, lambda files: msgspec.structs.replace(manifest, files=files))
    return target


def change_last_weight(folder):
    """Another number at the end of the weights."""
    path = folder / WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x7F
    path.write_bytes(data)


def contents(folder):
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def beside(folder):
    """What lies beside a folder, whatever it is called."""
    return sorted(path.name for path in folder.parent.iterdir() if folder.name in path.name and path != folder)


def command(module, *arguments, **variables):
    """A finished command of ours."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=END_SECONDS,
        check=False,
    )


def killed(module, *arguments, function, of, before):
    """Kill a command (-9) at the call number `before` of a module's function, once the calls before have returned."""
    code = SMALL_PIECES + STOPPING.format(
        command=module, module=of, function=function, before=before, seconds=END_SECONDS
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with process:
        reached = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert reached == "reached\n"
    assert process.returncode == -signal.SIGKILL


def counted(monkeypatch, method):
    """The sizes of what a method of `Store` reads or writes below blobs/, as it does so."""
    whole, sizes = getattr(Store, method), []

    def counting(self, path, *arguments):
        result = whole(self, path, *arguments)
        if path.startswith("blobs/"):
            sizes.append(len(result if method == "read" else arguments[0]))
        return result

    monkeypatch.setattr(Store, method, counting)
    return sizes
