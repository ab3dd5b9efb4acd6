"""What a service manager such as systemd is told: that the server is ready, that it lives, that it ends.

The protocol is that of sd_notify(3): datagrams of `NAME=VALUE` to the Unix socket that NOTIFY_SOCKET names.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Mapping

READY, STOPPING, ALIVE = "READY=1", "STOPPING=1", "WATCHDOG=1"
MICROSECOND = 1e-6
SIGNALS_PER_WATCHDOG = 3  # signs of life in the time after which the manager counts the server as hung


class ServiceManager:
    """Tells the manager that started this process; without one, nothing.

    environment: the process' own, as the manager has set it.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        self._watchdog = _watchdog_seconds(environment) if self._address else None

    def tell(self, state: str) -> None:
        """Send one state; a manager that does not listen, or no longer, is no reason to stop serving."""
        if not self._address:
            return
        # a first @ stands for the zero byte of an abstract address (unix(7))
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sending:
                sending.sendto(state.encode(), address)
        except OSError:
            return

    async def tell_while(self, healthy: Callable[[], bool]) -> None:
        """Tell, until cancelled, that the server lives, as long as it does; at once if nobody waits for that."""
        if self._watchdog is None:
            return
        while True:
            if healthy():
                self.tell(ALIVE)
            await asyncio.sleep(self._watchdog / SIGNALS_PER_WATCHDOG)


def _watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    """How long this process may be silent (sd_watchdog_enabled(3)); None for ever."""
    microseconds = environment.get("WATCHDOG_USEC", "")
    process = environment.get("WATCHDOG_PID", str(os.getpid()))  # another's, where a wrapper was started in between
    if not microseconds.isdecimal() or int(microseconds) == 0 or process != str(os.getpid()):
        return None
    return int(microseconds) * MICROSECOND
