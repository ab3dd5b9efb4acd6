"""Copies from memory to shared memory that go on while the threads compute: `cp.async`, of sm_80 and later.

A thread starts copies and closes them into groups. What a group brings is there for the thread once it has waited for
that group, and for the block's other threads after a barrier behind the wait. In the serial form a copy happens at
once, so that there is nothing to wait for.
"""

from tvm.script import tirx as T

from build.kernels.cuda.binding import Binding
from runtime.artifact.layouts import VECTOR


def copier(on: Binding):
    """Inline `copy(source, i, j, k, target, at)`: start a copy of the 16 bytes source[i, j, k, :] to target[at, :]."""

    @T.inline
    def copy(source, i, j, k, target, at):
        T.evaluate(
            T.ptx["cp.async.cg.shared.global"](T.address_of(target[at, 0]), T.address_of(source[i, j, k, 0]), VECTOR)
        )

    @T.inline
    def copy_serially(source, i, j, k, target, at):
        for v in T.serial(source.shape[-1]):
            target[at, v] = source[i, j, k, v]

    return copy_serially if on.serial else copy


def copy_groups(on: Binding):
    """Inlines `close()` and `wait(open_groups)`.

    `close` makes a group of the copies that a thread has started since the last one. `wait` ends when all but the
    latest `open_groups` groups of every thread have arrived, and all threads have read what they meant to before it.
    """

    @T.inline
    def close():
        if not on.serial:
            T.evaluate(T.ptx["cp.async.commit_group"]())

    @T.inline
    def wait(open_groups):
        if not on.serial:
            T.evaluate(T.ptx["cp.async.wait_group"](open_groups))
            # TVM does not see what copies write, so that it puts no barrier here by itself.
            T.evaluate(T.tvm_storage_sync("shared"))

    return close, wait
