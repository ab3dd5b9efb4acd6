"""The one exception for errors that the user caused and can fix, and how a command shows it."""

import sys
from collections.abc import Callable

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130  # the shell's convention: 128 + SIGINT


class UserError(Exception):
    """A user's mistake, in one sentence: what was found, where, what was expected, what to do."""


def run_command(main: Callable[[], int]) -> None:
    """Run a command's `main` and exit with its status; a `UserError` becomes one line and status 2."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = USER_ERROR_STATUS
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        status = INTERRUPTED_STATUS
    except BrokenPipeError:  # the reader of our output is gone (`... | head`)
        sys.stderr.close()
        status = INTERRUPTED_STATUS
    sys.exit(status)
