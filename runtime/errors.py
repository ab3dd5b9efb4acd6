"""The one exception for errors that the user caused and can fix, and how a command shows it."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130  # the shell's convention: 128 + SIGINT
SENTENCE_LENGTH = 2000  # characters


class UserError(Exception):
    """A user's mistake, in one sentence: what was found, where, what was expected, what to do.

    The sentence may quote a file that is broken or hostile, so what a terminal would not show as it is, line breaks and
    escapes among it, is written as an escape sequence, and the middle of a very long sentence is left out.
    """

    def __init__(self, sentence: str) -> None:
        shown = "".join(map(_shown, sentence))
        if len(shown) > SENTENCE_LENGTH:
            shown = f"{shown[: SENTENCE_LENGTH // 2]} [...] {shown[-SENTENCE_LENGTH // 2 :]}"
        super().__init__(shown)


def _shown(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


REASON_LENGTH = 300  # characters of another library's reason that are shown
REMEDIES = {  # what to do when the system refuses something, by its error number
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some space on that disk",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "fix its permissions, or choose another place",
    errno.EPERM: "fix its permissions, or choose another place",
    errno.EEXIST: "choose another place",
    errno.EISDIR: "choose another place",
    errno.ENOTDIR: "choose another place",
    errno.ENOENT: "check the path",
    errno.ELOOP: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "check the disk",
    errno.EBUSY: "end what uses it",
}


@contextmanager
def refusing(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library raises into a `UserError`: "WHAT: its reason; REMEDY".

    A panic of Rust code is raised as a `BaseException` that is no `Exception`.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise UserError(f"{what}: {one_line(error)}; {remedy}") from error


def one_line(error: BaseException) -> str:
    """Another library's reason in one line of bounded length."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= REASON_LENGTH else f"{said[:REASON_LENGTH]}..."


def run_command(main: Callable[[], int]) -> None:
    """Run a command's `main` and exit with its status.

    A `UserError` becomes one line and status 2, and so does whatever the system refuses: a full disk, a folder that
    cannot be written to, memory that is not there.
    """
    open_streams()
    try:
        if sys.stdout is None:
            raise UserError("standard output is closed; send it to a file or a terminal")
        status = main()
        sys.stdout.flush()
    except UserError as error:
        status = _report(str(error))
    except KeyboardInterrupt:
        status = INTERRUPTED_STATUS
        print("\ninterrupted", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output is gone (`... | head`)
        status = INTERRUPTED_STATUS
    except MemoryError:
        status = _report("there is not enough memory; free some, or choose something smaller")
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        place = f"{error.filename2 or error.filename}: " if error.filename else ""
        status = _report(f"{place}{error.strerror}; {REMEDIES[error.errno]}")
    _flush()
    sys.exit(status)


def open_streams() -> None:
    """Send what is written to standard error nowhere if it is closed, since a result may be right all the same."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)


def _report(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return USER_ERROR_STATUS


def _flush() -> None:
    """Write what is still to be written or, if nothing takes it, drop it, since the interpreter would try once more."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
