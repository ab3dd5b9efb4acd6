"""Clusters of blocks, of sm_90 and later, and copies that one block starts to the shared memory of all of them.

A copy is started by one thread and made by the tensor memory accelerator (TMA), which counts its bytes at a barrier in
the shared memory of each block that receives it. Whoever has waited there may read what has come. Before that memory
is copied to again, all blocks that receive the copies have to be done with it, which the barrier of the cluster tells.
No block may end while its copies go on.
"""

from typing import Any

from tvm.script import tirx as T


def blocks_of_cluster(blocks: int) -> Any:
    """Loop around that over a launch's blocks: as many neighbours of them are a cluster."""
    return T.thread_binding(blocks, thread="clusterCtaIdx.x")


@T.inline
def rejoin():
    """The lanes of a warp go on together, as what is "aligned" needs, after some have done what others have not."""
    T.evaluate(T.cuda.warp_sync())


@T.inline
def prepare_barrier(barriers, i):
    """Let barriers[i] expect one arrival, that of the thread which says how many bytes will come; by one thread."""
    T.evaluate(T.ptx["mbarrier.init.shared.b64"](T.address_of(barriers[i]), 1))


@T.inline
def publish_barriers():
    """Behind this, `arrive` and `wait`, copies may count at the barriers that this thread has prepared."""
    T.evaluate(T.ptx["fence.mbarrier_init.release.cluster"]())


@T.inline
def expect(barriers, i, size):
    """Arrive at barriers[i], where `size` bytes will come."""
    T.evaluate(T.ptx["mbarrier.arrive.expect_tx.release.cta.shared::cta.b64"](T.address_of(barriers[i]), size))


@T.inline
def wait_for_copies(barriers, i, turn):
    """Wait until what barriers[i] has expected for the `turn`th time, counted from 0, has come."""
    T.evaluate(T.cuda.mbarrier_wait(T.address_of(barriers[i]), turn % 2))


@T.inline
def copy_to_own(source, target, size, barriers, i):
    """Start a copy of `size` bytes, a multiple of 16, from an address to one in the shared memory of this block."""
    T.evaluate(
        T.ptx["cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"](
            target, source, size, T.address_of(barriers[i])
        )
    )


@T.inline
def copy_to_all(source, target, size, barriers, i, blocks):
    """The same to that address in the memory of each of the cluster's blocks, where it counts at the same barrier."""
    if blocks == 1:
        copy_to_own(source, target, size, barriers, i)
    else:
        T.evaluate(
            T.ptx["cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"](
                target, source, size, T.address_of(barriers[i]), T.uint16((1 << blocks) - 1)
            )
        )


@T.inline
def arrive():
    """This thread has read what all blocks of the cluster may copy over once they have waited.

    The fence orders its reads before such copies, which are made by another unit (PTX manual, "Async proxy"). An
    arrival that also orders its other accesses would wait for them on the whole device.
    """
    T.evaluate(T.ptx["fence.proxy.async.shared::cta"]())
    T.evaluate(T.ptx["barrier.cluster.arrive.relaxed.aligned"]())


@T.inline
def wait():
    """Wait until every thread of the cluster has arrived as often as this one."""
    T.evaluate(T.ptx["barrier.cluster.wait.acquire.aligned"]())
