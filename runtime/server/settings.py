"""The settings of a server: a TOML file, and the flags of the command, which come first."""

import math
import tomllib
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import msgspec

from runtime.errors import UserError
from runtime.scheduling.settings import ReuseMode, SchedulerSettings
from runtime.small_files import read_small

LARGEST_FILE = 2**20  # bytes of a file of settings or keys
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
MEGABYTE = 10**6

Count = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=10**6)]
Delay = Annotated[float, msgspec.Meta(ge=0, le=10**6)]


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every setting, by the name that it has in the file. Sizes are in bytes, times in seconds unless the name says.

    host, port: where to listen; only this machine reaches 127.0.0.1.
    model_name: the name that clients use; the artifact's by default.
    keys_file: a file with one API key a line, one of which each request must then carry.
    allow_no_keys: listen beyond this machine without keys.
    allowed_hosts: names under which clients reach the server, beside those of this machine.
    tls_certificate, tls_key: files in PEM form; the server then speaks HTTPS.
    max_body_bytes: largest body of a request.
    max_queued: most sequences that may wait for a slot.
    max_queued_tokens: most prompt tokens of all that wait.
    max_choices: most sequences of one request.
    default_max_tokens: tokens of an answer where a request does not say.
    request_seconds: how long a request may take, from its arrival to its end.
    unready_seconds: how long /ready says that the server is ending before requests are refused, so that whoever
        shares them out hears of it in time.
    drain_seconds: how long requests may go on after that.
    ping_seconds: silence after which a stream sends a comment, so that no proxy closes it.
    stalled_seconds: a call of the model that takes longer counts as hung, and /health fails.
    stall_budget, steps_per_chunk, reuse, snapshot_megabytes, speculate: see docs/slots.md.
    log_prompts: write prompts and answers into the log.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8000
    model_name: str | None = None
    keys_file: str | None = None
    allow_no_keys: bool = False
    allowed_hosts: tuple[str, ...] = ()
    tls_certificate: str | None = None
    tls_key: str | None = None
    max_body_bytes: Count = 8 * MEGABYTE
    max_queued: Count = 64
    max_queued_tokens: Count = 262_144
    max_choices: Count = 16
    default_max_tokens: Count = 4096
    request_seconds: Seconds = 600.0
    unready_seconds: Delay = 0.0
    drain_seconds: Seconds = 30.0
    ping_seconds: Seconds = 15.0
    stalled_seconds: Seconds = 60.0
    stall_budget: float = 0.1
    steps_per_chunk: int = 4
    reuse: ReuseMode | None = None
    snapshot_megabytes: Annotated[int, msgspec.Meta(ge=0)] = 256
    speculate: bool | None = None
    log_prompts: bool = False

    def scheduler(self) -> SchedulerSettings:
        """The part that is the scheduler's; raises `UserError` for values out of range."""
        return SchedulerSettings(
            stall_budget=self.stall_budget,
            steps_per_chunk=self.steps_per_chunk,
            reuse=self.reuse,
            snapshot_bytes=self.snapshot_megabytes * MEGABYTE,
            speculate=self.speculate,
        )

    @property
    def only_this_machine(self) -> bool:
        """Whether no other machine reaches the server."""
        return self.host == "localhost" or _is_loopback(self.host)

    def check(self) -> None:
        """Raise `UserError` for settings that do not fit together."""
        self.scheduler()
        if (self.tls_certificate is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_certificate"
            raise UserError(f"{missing} is missing: HTTPS needs a certificate and its key; name both files")
        if not self.only_this_machine and self.keys_file is None and not self.allow_no_keys:
            raise UserError(
                f"host is {self.host}, which other machines reach, and there are no API keys; name a keys_file, "
                "or set allow_no_keys if everyone who reaches this machine may use the model"
            )
        for name in ("request_seconds", "unready_seconds", "drain_seconds", "ping_seconds", "stalled_seconds"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} is {getattr(self, name)}, expected a number of seconds")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def read_settings(path: Path | None, given: dict[str, object]) -> ServerSettings:
    """The settings of a file, if there is one, with those `given` in place of its own.

    Raises `UserError` for a file that is not TOML, an unknown name, a value of the wrong kind, and settings that do not
    fit together.
    """
    found: dict[str, object] = {} if path is None else _table(path)
    try:
        settings = msgspec.convert({**found, **given}, ServerSettings)
    except msgspec.ValidationError as error:
        place = "the settings" if path is None else str(path)
        raise UserError(f"{place}: {error}; docs/serving.md lists every setting") from error
    settings.check()
    return settings


def _table(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(read_small(path, LARGEST_FILE, "a TOML file of settings").decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not TOML: {error}; expected lines such as port = 8000") from error


@dataclass(frozen=True)
class Keys:
    """The API keys, of which none is ever written anywhere."""

    keys: tuple[bytes, ...]

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """The keys of a file, one a line; empty lines and those that begin with # are skipped.

        Raises `UserError` if there is none, or one with spaces or characters that no header can hold.
        """
        lines = [line.strip() for line in read_small(path, LARGEST_FILE, "a file with one API key a line").splitlines()]
        keys = tuple(line for line in lines if line and not line.startswith(b"#"))
        if not keys:
            raise UserError(f"{path} holds no API key, expected one a line")
        for number, key in enumerate(keys, 1):
            if not all(33 <= byte <= 126 for byte in key):
                raise UserError(
                    f"{path}: key {number} has a character that a header cannot hold; use letters, digits, - and _"
                )
        return cls(keys)
