"""An image built by buildah, and a container of it made of Linux's own parts: `docker run` without docker.

It needs root, buildah, and util-linux, as every Debian machine has it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from export.stage import ROOT
from tests.helpers.base_image import write_base

DOCKERFILE = ROOT / "deploy" / "container" / "Dockerfile"
BASE = "docker.io/library/python:3.12-slim-bookworm"
NO_NETWORK = "RUN --network=none "  # buildah 1.28 of Debian 12 does not know it: here no process has a network
END_SECONDS = 30
# What compose.yaml asks docker for: a root that can only be read, folders in memory, the keys, no new privileges, and
# the image's user, who has no capability. A network and processes of its own come from `unshare` outside.
START = """
set -e
root=$1 keys=$2 user=$3 folder=$4 python=$5; shift 5
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o noexec,nosuid,nodev tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/run"
mkdir "$root/run/secrets"
cp "$keys" "$root/run/secrets/keys"
chown "$user" "$root/run/secrets/keys"
chmod 400 "$root/run/secrets/keys"
mount -o remount,ro "$root/run"
"$python" -c 'import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh22x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP'
exec setpriv --no-new-privs /usr/sbin/chroot --userspec="$user" --groups= "$root" \
    env -i --chdir="$folder" PATH=/usr/local/bin:/usr/bin:/bin "$@"
"""


class Buildah:
    """buildah with a storage of its own, in processes that have no network."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, *arguments: str | Path) -> str:
        """Run a command of buildah; return what it printed."""
        storage = ("--storage-driver", "vfs", "--root", self._folder / "root", "--runroot", self._folder / "runroot")
        result = subprocess.run(
            ["unshare", "--net", "buildah", *storage, *arguments], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout.strip()

    def make_base(self) -> None:
        """An image under the name of the Dockerfile's base, of this machine's Python."""
        with TemporaryDirectory(dir=self._folder) as root:
            write_base(Path(root) / "base")
            container = self("from", "scratch")
            self("copy", "--quiet", container, Path(root) / "base", "/")
            self("commit", "--quiet", "--rm", container, BASE)

    def build(self, context: Path, *options: str | Path) -> str:
        """The id of the image of an unpacked shipped file."""
        dockerfile = self._folder / "Dockerfile"
        dockerfile.write_text(DOCKERFILE.read_text().replace(NO_NETWORK, "RUN "))
        fixed = ("--isolation", "chroot", "--pull-never", "--format", "docker", "--quiet", "--file", dockerfile)
        return self("build", *fixed, "--ignorefile", f"{DOCKERFILE}.dockerignore", *options, context)

    def settings(self, image: str) -> dict[str, Any]:
        """What the image says about its containers: `Entrypoint`, `Cmd`, `User`, `Healthcheck` and so on."""
        found: dict[str, Any] = json.loads(self("inspect", "--type", "image", image))["Docker"]["config"]
        return found

    def files(self, image: str) -> Path:
        """A folder with the image's files."""
        return Path(self("mount", self("from", "--pull-never", image)))


@dataclass
class Container:
    """A container: `unshare` outside, the number of its first process here, and who that runs as."""

    outer: subprocess.Popen[str]
    pid: int
    user: str

    def status(self) -> dict[str, str]:
        """The first process as Linux sees it, from `/proc/PID/status`."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def mounted(self) -> dict[str, set[str]]:
        """The options, such as `ro`, of everything that is mounted, by its path inside."""
        lines = Path(f"/proc/{self.pid}/mountinfo").read_text().splitlines()
        return {fields[4]: set(fields[5].split(",")) for fields in (line.split() for line in lines)}

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command beside the first process, as the same user: `docker exec`.

        It does not join the processes inside, all of whom Linux kills when the first one ends.
        """
        user, group = self.user.split(":")
        inside = ("nsenter", "--target", str(self.pid), "--net", "--mount", "--root", "--wd")
        return subprocess.Popen(
            [*inside, "--setuid", user, "--setgid", group, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command as `start` does, to its end."""
        process = self.start(*command)
        output, errors = process.communicate(timeout=END_SECONDS)
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def stop(self) -> int:
        """Send SIGTERM, as `docker stop` does; return the exit status."""
        subprocess.run(["kill", "-TERM", str(self.pid)], check=True)
        return self.outer.wait(END_SECONDS)


@contextmanager
def container(root: Path, settings: dict[str, Any], keys: Path, *arguments: str):
    """A container of an image's files; with the image's own arguments unless others are given."""
    command = [*settings["Entrypoint"], *(arguments or settings["Cmd"])]
    given = (root, keys, settings["User"], settings["WorkingDir"], sys.executable)
    outer = subprocess.Popen(
        ["unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "sh", "-c", START, "sh", *given, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    first = None
    try:
        first = _first_child(outer)
        yield Container(outer, first, settings["User"])
    finally:
        # `unshare` alone would not take it along: a process that becomes another user no longer dies with its parent
        if outer.poll() is None:
            os.kill(outer.pid if first is None else first, signal.SIGKILL)
        outer.wait(END_SECONDS)


def _first_child(outer: subprocess.Popen[str]) -> int:
    """The process that `unshare` starts, which is number 1 inside."""
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    for _ in range(200):
        if found := children.read_text().split():
            return int(found[0])
        time.sleep(0.05)
    raise AssertionError("unshare has started nothing within ten seconds")
