"""A real systemd as process 1 of namespaces of its own, which starts services of this machine's files, read-only.

It sees the network of the machine, so that a test can ask what it starts. /etc is a copy, /tmp and /run are empty, and
/opt holds what a test puts there. Needs root.
"""

import contextlib
import os
import shlex
import signal
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.serving import until

SYSTEMD = "/lib/systemd/systemd"
PATIENCE = 60  # seconds
# Process 1 of the namespaces; all that it mounts is seen there alone. $1 is a script that mounts what a test needs.
BEGIN = f"""
set -eu
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/etc
cp -a /etc/. /run/etc
mount --bind /run/etc /etc
mount -t tmpfs -o mode=755 tmpfs /opt
eval "$1"
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=1777 tmpfs /var/tmp
umount -l /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
# nothing that a machine does when it starts: it would change the settings of the kernel, which all share
for wants in /lib/systemd/system/*.target.wants; do mount -t tmpfs tmpfs "$wants"; done
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount -o remount,bind,ro /
mount --make-rshared /  # as systemd does where it starts a machine; the credentials of a service need it
mkdir -p /run/systemd/system
printf '[Unit]\\nAllowIsolate=yes\\n' > /run/systemd/system/empty.target
exec env -i container=nested {SYSTEMD} --system --unit=empty.target --log-target=console --show-status=no
"""
NAMESPACES = ("--fork", "--pid", "--mount-proc", "--mount", "--uts", "--ipc", "--cgroup", "--kill-child")


@dataclass
class Systemd:
    """A running manager; `pid` is its number on this machine."""

    pid: int

    def run(self, *command, check=True):
        """What a command says that runs beside the manager."""
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid), "-m", "-p", "-u", "-i", "-C", "--", *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        assert not check or done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def show(self, unit, name):
        """One property of a unit."""
        return self.run("systemctl", "show", unit, "-P", name).strip()


@contextmanager
def systemd(mounts, log):
    """A manager in namespaces where a shell script has mounted files under /opt and /etc; it writes into `log`."""
    group = _group_folder() / f"test-{os.getpid()}"
    group.mkdir()
    enter = f"echo $$ > {shlex.quote(str(group))}/cgroup.procs; exec unshare {' '.join(NAMESPACES)} bash -c {{}} - {{}}"
    script = enter.format(shlex.quote(BEGIN), shlex.quote(mounts))
    with log.open("w") as output:
        process = subprocess.Popen(["bash", "-c", script], stdout=output, stderr=output)
    try:
        until(lambda: process.poll() is not None or _child(process.pid))
        assert process.poll() is None, log.read_text()
        found = Systemd(_child(process.pid))
        until(lambda: process.poll() is not None or "running" in _state(found))
        assert process.poll() is None, log.read_text()
        yield found
    finally:
        _end(process, group)


def _state(manager):
    return manager.run("systemctl", "is-system-running", check=False)


def _child(pid):
    """The process that a process has started, once it is systemd."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    if not children or not Path(f"/proc/{children[0]}/cmdline").read_bytes().startswith(SYSTEMD.encode()):
        return None
    return int(children[0])


def _end(process, group):
    """End the manager, with which all processes of its namespace end, and remove its control groups."""
    if process.poll() is None:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
    process.wait(PATIENCE)
    folders = [group, *(path for path in group.rglob("*") if path.is_dir())]
    for folder in sorted(folders, reverse=True):
        until(lambda folder=folder: _removed(folder))


def _removed(folder):
    with contextlib.suppress(OSError):  # its processes are not quite gone
        folder.rmdir()
    return not folder.exists()


def _group_folder():
    """Where the control groups of version 2 are mounted, alone or beside those of version 1."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return Path(next(place for _, place, kind, *_ in mounts if kind == "cgroup2"))
