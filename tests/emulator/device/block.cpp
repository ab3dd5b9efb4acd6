#include "block.h"

#include "accesses.h"
#include "async_copies.h"
#include "failure.h"
#include "fibers.h"
#include "mbarriers.h"
#include "shared_memory.h"
#include "wgmma.h"

namespace emulated {

struct Warp {
  uint32_t arrived, mask;  // lanes that wait for an operation, and all that take part
  WarpOperation operation;
  int line;
  void *operands[WARP];
};

struct Barrier {  // of a block, or of a cluster
  unsigned waiting;  // threads that have come
  int line;
};

struct Block {
  unsigned ended;
  Barrier barrier;
};

struct ClusterThread {  // at the cluster's barrier, where a thread may do other things between arriving and waiting
  unsigned arrivals, waits;
  bool sleeps;
};

Counts counts;

static const KernelRow *kernel;
static void **arguments;
static Indices indices;  // but for the thread's own, and with the first block's
static unsigned threads, blocks;  // of a block, and of a cluster
static Block of_cluster[MAX_BLOCKS];
static Barrier cluster_barrier;
static unsigned cluster_phase;  // how often all have arrived
static ClusterThread cluster_threads[MAX_THREADS];
static Warp warps[MAX_WARPS];

unsigned threads_of(const Index3 &block_size) { return block_size.x * block_size.y * block_size.z; }

unsigned block_of(unsigned thread) { return thread / threads; }
unsigned current_block() { return block_of(current_thread); }
unsigned blocks_in_cluster() { return blocks; }
bool has_ended(unsigned block) { return of_cluster[block].ended == threads; }

void begin_kernel(const KernelRow &row, void **values, const Index3 &block_size, const Index3 &grid_size,
                  unsigned blocks_of_cluster, size_t dynamic_shared_bytes) {
  kernel = &row, arguments = values;
  indices = {{}, {}, block_size, grid_size};
  threads = threads_of(block_size), blocks = blocks_of_cluster;
  begin_launch();
  forget_copies();
  forget_shared_arrays(dynamic_shared_bytes, row.shared_limit);
}

static void run_thread() {
  kernel->run(arguments);
  end_copies();
  Block &own = of_cluster[current_block()];
  ++own.ended;
  if (own.barrier.waiting)
    fail("has ended, but %u threads wait at the barrier in line %d", own.barrier.waiting, own.barrier.line);
  if (cluster_barrier.waiting)
    fail("has ended, but %u threads have come to the cluster's barrier in line %d", cluster_barrier.waiting,
         cluster_barrier.line);
  if (has_ended(current_block())) fail_if_copies_are_left(current_block());
  fail_if_products_are_left();
}

void run_cluster(const Index3 &first_block) {
  indices.block = first_block;
  for (Block &block : of_cluster) block = {};
  cluster_barrier = {}, cluster_phase = 0;
  for (ClusterThread &thread : cluster_threads) thread = {};
  for (Warp &warp : warps) warp.arrived = 0;
  forget_mbarriers();
  forget_products();
  begin_cluster();
  empty_shared_arrays();
  run_fibers(threads * blocks, run_thread);
  counts.blocks += blocks;
}

std::string name_of_thread(unsigned thread) {
  const Index3 &block = indices.block;
  return text("%s: block %u,%u,%u thread %u", kernel->name, block.x + block_of(thread), block.y, block.z,
              thread % threads);
}

static void fail_because_a_warp_waits() {
  for (unsigned i = 0; i * WARP < threads * blocks; ++i)
    if (const Warp &warp = warps[i]; warp.arrived) {
      const Block &own = of_cluster[block_of(i * WARP)];
      fail("warp %u waits in line %d for lanes %08x, of which only %08x come (%u threads have ended, %u wait at a barrier)",
           i, warp.line, warp.mask, warp.arrived, own.ended, own.barrier.waiting);
    }
}

void fail_because_all_wait() {
  fail_because_a_warp_waits();
  fail_if_threads_wait_for_copies();
  if (cluster_barrier.waiting)
    fail("%u threads have come to the cluster's barrier in line %d, which %u others never reach",
         cluster_barrier.waiting, cluster_barrier.line, threads * blocks - cluster_barrier.waiting);
  const Barrier &barrier = of_cluster[current_block()].barrier;
  fail("%u threads wait at the barrier in line %d, which %u others never reach", barrier.waiting, barrier.line,
       threads - barrier.waiting);
}

}  // namespace emulated

using namespace emulated;

extern "C" Indices emulator_indices() {
  Indices found = indices;
  const Index3 &size = indices.block_size;
  unsigned thread = current_thread % threads;
  found.thread = {thread % size.x, thread / size.x % size.y, thread / (size.x * size.y)};
  found.block.x += current_block();
  return found;
}

extern "C" unsigned emulator_block_of_cluster() { return current_block(); }

extern "C" void emulator_barrier(int line) {
  auto &[ended, barrier] = of_cluster[current_block()];
  if (barrier.waiting && line != barrier.line)
    fail("is at the barrier in line %d, while %u threads wait at the one in line %d", line, barrier.waiting,
         barrier.line);
  if (ended) fail("is at the barrier in line %d, after %u threads have ended", line, ended);
  barrier.line = line;
  if (++barrier.waiting == threads) {
    barrier.waiting = 0;
    ++counts.barriers;
    unsigned first = current_block() * threads;
    pass_barrier(first, threads);
    make_all_ready(first, threads);
  }
  wait_for_turn();
}

extern "C" void emulator_cluster_arrive(int line) {
  ClusterThread &own = cluster_threads[current_thread];
  if (own.arrivals != own.waits)
    fail("line %d: arrives at the cluster's barrier again, without a wait in between", line);
  ++own.arrivals;
  arrive_at_cluster_barrier(cluster_barrier.waiting == 0);
  cluster_barrier.line = line;
  if (++cluster_barrier.waiting == threads * blocks) {
    cluster_barrier.waiting = 0;
    ++counts.barriers, ++cluster_phase;
    for (unsigned thread = 0; thread < threads * blocks; ++thread)
      if (cluster_threads[thread].sleeps) make_ready(thread);
  }
  make_ready(current_thread);  // others may go on first
  wait_for_turn();
}

extern "C" void emulator_cluster_wait(int line) {
  ClusterThread &own = cluster_threads[current_thread];
  if (own.arrivals == own.waits) fail("line %d: waits at the cluster's barrier without having arrived", line);
  if (cluster_phase < own.arrivals) {
    own.sleeps = true;
    wait_for_turn();
    own.sleeps = false;
  }
  ++own.waits;
  pass_cluster_barrier();
}

extern "C" void emulator_warp(WarpOperation operation, uint32_t mask, void *operands, int line) {
  unsigned lane = current_thread % WARP;
  Warp &warp = warps[current_thread / WARP];
  if (!(mask >> lane & 1)) fail("line %d: lane %u is not in the mask %08x", line, lane, mask);
  if (warp.arrived && (warp.line != line || warp.operation != operation || warp.mask != mask))
    fail("is in line %d, while lanes %08x of its warp wait in line %d", line, warp.arrived, warp.line);
  warp.line = line, warp.operation = operation, warp.mask = mask;
  warp.operands[lane] = operands;
  warp.arrived |= 1u << lane;
  if (warp.arrived == mask) {
    warp.arrived = 0;
    ++counts.warp_operations;
    operation(warp.operands, mask);
    make_ready(current_thread / WARP, mask);  // itself among them: who goes on first is as open as all else
  }
  wait_for_turn();
}
