"""`make lock`: write the hashes in the lock files again, for the versions that they pin.

A lock file pins versions; the SHA-256 sums below a pin are those of every file that pip may take for it: wheels for
Linux on x86-64 and the Pythons of hosts and boxes, and the source only where a host's Python has no wheel. They come
from wherever pip is set to look on this machine. To change a dependency, change its pin, then run this.

It needs Python's standard library alone, so that it also runs while `.venv` cannot be made.
"""

import argparse
import ast
import base64
import hashlib
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from html.parser import HTMLParser
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from runtime.artifact.durable import write_whole
from runtime.doctor import PYTHONS
from runtime.errors import UserError, run_command

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements.lock"  # everything in .venv
EXTRA_LOCKS = ROOT / "requirements"  # what some set-ups install besides
HOST_PYTHONS = ("3.11", "3.12")  # `requires-python` in pyproject.toml
DEFAULT_INDEX = "https://pypi.org/simple"  # pip's own, where its settings name none
SOURCES = (".tar.gz", ".zip")
JSON_PAGE = "application/vnd.pypi.simple.v1+json"
SECONDS = 60  # that an index has for an answer
CONNECTIONS = 4


@dataclass(frozen=True)
class Pin:
    """One package of a lock file: its exact version, and the SHA-256 of every file that may be installed for it."""

    name: str
    version: str
    sums: tuple[str, ...]


def canonical(name: str) -> str:
    """A package's name in the one spelling by which names are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(path: Path = LOCK) -> dict[str, Pin]:
    """The pins of a lock file by canonical name; raises `UserError` for a line that is neither a pin nor a hash."""
    pins: dict[str, Pin] = {}
    name = ""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.removesuffix("\\").strip()
        if match := re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)", text):
            name = canonical(match[1])
            if name in pins:
                raise UserError(f"{path}:{number} pins {name} a second time, expected one pin; remove one")
            pins[name] = Pin(match[1], match[2], ())
        elif (match := re.fullmatch(r"--hash=sha256:([0-9a-f]{64})", text)) and name:
            pins[name] = replace(pins[name], sums=(*pins[name].sums, match[1]))
        elif text and not text.startswith("#"):
            raise UserError(f"{path}:{number} is {text!r}, expected `NAME==VERSION`, or a hash that `make lock` wrote")
    return pins


def lock_text(comment: str, pins: Sequence[Pin]) -> str:
    """A lock file's text: its comment, then each pin with its sums, in the form that pip reads."""
    return comment + "".join(
        " \\\n".join([f"{pin.name}=={pin.version}", *(f"    --hash=sha256:{each}" for each in pin.sums)]) + "\n"
        for pin in pins
    )


def comment_of(path: Path) -> str:
    """The comment at the top of a lock file."""
    return "".join(takewhile(lambda line: line.startswith("#"), path.read_text().splitlines(keepends=True)))


def fits(wheel: str, python: str) -> bool:
    """Whether a wheel of this name can be installed for CPython `python` on Linux on x86-64 with glibc."""
    tags = wheel.removesuffix(".whl").split("-")[-3:]
    if len(tags) != 3:
        return False
    interpreters, abis, platforms = (tag.split(".") for tag in tags)
    minor = int(python.partition(".")[2])
    if not any(p == "any" or (p.startswith(("manylinux", "linux_")) and p.endswith("_x86_64")) for p in platforms):
        return False
    for interpreter in interpreters:
        match = re.fullmatch(r"(cp|py)3(\d*)", interpreter)
        if match is None:
            continue
        since = int(match[2] or 0)
        if match[1] == "py":
            fitting = {"none"} if since <= minor else set()
        else:
            fitting = ({"abi3"} if since <= minor else set()) | ({"none", f"cp3{minor}"} if since == minor else set())
        if fitting & set(abis):
            return True
    return False


def version_in(file: str, name: str) -> str | None:
    """The version in a file's name; None for another package's file."""
    if file.endswith(".whl"):
        found, _, rest = file.partition("-")
        version = rest.partition("-")[0]
    else:
        suffix = next((suffix for suffix in SOURCES if file.endswith(suffix)), None)
        if suffix is None:
            return None
        found, _, version = file.removesuffix(suffix).rpartition("-")
    return version if canonical(found) == canonical(name) else None


def sums_to_lock(pin: Pin, files: Mapping[str, set[str]]) -> tuple[str, ...]:
    """The sums that a pin's package may have, of the `files` that exist under any version of its name.

    Raises `UserError` if a host could install none of them. A local build (`+cpu`) is served to some machines alone:
    it need not fit every Python, and elsewhere its pin stays as it is.
    """
    ours = {file: sums for file, sums in files.items() if version_in(file, pin.name) == pin.version}
    if "+" in pin.version:
        return tuple(sorted({each for sums in ours.values() for each in sums})) or pin.sums
    wheels = {file for file in ours if file.endswith(".whl") and any(fits(file, python) for python in PYTHONS)}
    missing = [python for python in HOST_PYTHONS if not any(fits(wheel, python) for wheel in wheels)]
    chosen = wheels | ({file for file in ours if file.endswith(SOURCES)} if missing else set())
    if not chosen or (missing and chosen == wheels):
        raise UserError(
            f"there is no file of {pin.name}=={pin.version} for Python {' and '.join(missing)} where pip looks "
            "(`pip config list`), expected a wheel or the source; correct the version in the lock file"
        )
    return tuple(sorted({each for file in chosen for each in ours[file]}))


@dataclass(frozen=True)
class Places:
    """Where pip looks for packages on this machine."""

    indexes: tuple[str, ...]
    folders: tuple[Path, ...]

    @classmethod
    def of_pip(cls) -> "Places":
        """As the settings of this Python's pip say, of which the environment's take precedence."""
        command = [sys.executable, "-m", "pip", "config", "list"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        settings: dict[str, list[str]] = {}
        for line in sorted(lines, key=lambda line: line.startswith(":env:")):
            key, _, value = line.partition("=")
            settings[key.rpartition(".")[2]] = str(ast.literal_eval(value)).split()
        indexes = [*settings.get("index-url", [DEFAULT_INDEX]), *settings.get("extra-index-url", [])]
        folders = [Path(unquote(urlsplit(place).path)) for place in settings.get("find-links", [])]
        return cls(tuple(indexes), tuple(folder for folder in folders if folder.is_dir()))

    def files(self, name: str) -> dict[str, set[str]]:
        """The sums of every file of a package, of any version, by the file's name."""
        found: dict[str, set[str]] = {}
        listed = (each for index in self.indexes for each in _listed(index, canonical(name)))
        for file, digest in [*listed, *self._lying(name)]:
            found.setdefault(file, set()).add(digest)
        return found

    def _lying(self, name: str) -> Iterator[tuple[str, str]]:
        for folder in self.folders:
            for path in folder.iterdir():
                if version_in(path.name, name) is not None:
                    with path.open("rb") as file:
                        yield path.name, hashlib.file_digest(file, "sha256").hexdigest()


def _listed(index: str, name: str) -> Iterator[tuple[str, str]]:
    """Names and sums of the files on an index's page of a package (PEP 503 and PEP 691)."""
    url = f"{index.rstrip('/')}/{name}/"
    if url.startswith("file:"):
        page = Path(unquote(urlsplit(url).path)) / "index.html"
        yield from _links(page.read_text()) if page.is_file() else ()
        return
    url, headers = _without_password(url)
    request = urllib.request.Request(url, headers={"Accept": f"{JSON_PAGE}, text/html;q=0.5", **headers})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            data, kind = answer.read(), answer.headers.get_content_type()
    except OSError as error:
        if getattr(error, "code", None) == 404:  # this index lacks the package; another one may have it
            return
        raise UserError(f"{url} cannot be read: {error}; check this machine's network and `pip config list`") from error
    if kind != JSON_PAGE:
        yield from _links(data.decode())
        return
    for entry in json.loads(data)["files"]:
        if "sha256" in entry["hashes"]:
            yield entry["filename"], entry["hashes"]["sha256"]


def _without_password(url: str) -> tuple[str, dict[str, str]]:
    """The address without the name and password that pip's settings may hold in it, and the header that says both."""
    parts = urlsplit(url)
    account, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    token = base64.b64encode(unquote(account).encode()).decode()
    return urlunsplit(parts._replace(netloc=host)), {"Authorization": f"Basic {token}"}


def _links(page: str) -> list[tuple[str, str]]:
    """Names and sums of the files that an HTML page links to."""
    found = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, Any]]) -> None:
            target = urlsplit(dict(attrs).get("href") or "") if tag == "a" else None
            if target is not None and target.fragment.startswith("sha256="):
                found.append((unquote(target.path.rpartition("/")[2]), target.fragment.removeprefix("sha256=")))

    Links().feed(page)
    return found


def lock_again(path: Path, places: Places) -> int:
    """Write one lock file again, complete or not at all; returns the number of its packages."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        pins = list(pool.map(partial(_locked, places), read_lock(path).values()))
    write_whole(path, lock_text(comment_of(path), pins).encode())
    return len(pins)


def _locked(places: Places, pin: Pin) -> Pin:
    return replace(pin, sums=sums_to_lock(pin, places.files(pin.name)))


def lock_files() -> list[Path]:
    """Every lock file of the project."""
    return [LOCK, *sorted(EXTRA_LOCKS.glob("*.lock"))]


def main() -> int:
    """Write every lock file again; returns the exit status."""
    argparse.ArgumentParser(description="Write the hashes in the lock files again.").parse_args()
    places = Places.of_pip()
    for path in lock_files():
        print(f"{path.relative_to(ROOT)}: {lock_again(path, places)} packages")
    return 0


if __name__ == "__main__":
    run_command(main)
