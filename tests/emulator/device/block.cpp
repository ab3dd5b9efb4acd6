#include "block.h"

#include "accesses.h"
#include "async_copies.h"
#include "failure.h"
#include "fibers.h"
#include "shared_memory.h"

namespace emulated {

struct Warp {
  uint32_t arrived, mask;  // lanes that wait for an operation, and all that take part
  WarpOperation operation;
  int line;
  void *operands[WARP];
};

Counts counts;

static const KernelRow *kernel;
static void **arguments;
static Indices indices;  // but for the thread's own
static unsigned threads, ended, at_barrier;
static int barrier_line;
static Warp warps[MAX_WARPS];

unsigned threads_of(const Index3 &block_size) { return block_size.x * block_size.y * block_size.z; }

void begin_kernel(const KernelRow &row, void **values, const Index3 &block_size, const Index3 &grid_size,
                  size_t dynamic_shared_bytes) {
  kernel = &row, arguments = values;
  indices = {{}, {}, block_size, grid_size};
  threads = threads_of(block_size);
  begin_launch();
  forget_copies();
  forget_shared_arrays(dynamic_shared_bytes);
}

static void run_thread() {
  kernel->run(arguments);
  end_copies();
  ++ended;
  if (at_barrier) fail("has ended, but %u threads wait at the barrier in line %d", at_barrier, barrier_line);
}

void run_block(const Index3 &block) {
  indices.block = block;
  ended = at_barrier = 0;
  for (Warp &warp : warps) warp.arrived = 0;
  begin_block();
  empty_shared_arrays();
  run_fibers(threads, run_thread);
  ++counts.blocks;
}

std::string name_of_thread(unsigned thread) {
  const Index3 &block = indices.block;
  return text("%s: block %u,%u,%u thread %u", kernel->name, block.x, block.y, block.z, thread);
}

void fail_because_all_wait() {
  for (unsigned i = 0; i * WARP < threads; ++i)
    if (const Warp &warp = warps[i]; warp.arrived)
      fail("warp %u waits in line %d for lanes %08x, of which only %08x come (%u threads have ended, %u wait at a barrier)",
           i, warp.line, warp.mask, warp.arrived, ended, at_barrier);
  fail("%u threads wait at the barrier in line %d, which %u others never reach", at_barrier, barrier_line,
       threads - at_barrier);
}

}  // namespace emulated

using namespace emulated;

extern "C" Indices emulator_indices() {
  Indices found = indices;
  const Index3 &size = indices.block_size;
  found.thread = {current_thread % size.x, current_thread / size.x % size.y, current_thread / (size.x * size.y)};
  return found;
}

extern "C" void emulator_barrier(int line) {
  if (at_barrier && line != barrier_line)
    fail("is at the barrier in line %d, while %u threads wait at the one in line %d", line, at_barrier, barrier_line);
  if (ended) fail("is at the barrier in line %d, after %u threads have ended", line, ended);
  barrier_line = line;
  if (++at_barrier == threads) {
    at_barrier = 0;
    ++counts.barriers;
    pass_barrier();
    make_all_ready();
  }
  wait_for_turn();
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
