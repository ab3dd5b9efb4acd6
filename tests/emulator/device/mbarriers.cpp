#include "mbarriers.h"

#include <cstdint>
#include <cstring>
#include <vector>

#include "../interface.h"
#include "accesses.h"
#include "block.h"
#include "failure.h"
#include "fibers.h"
#include "settings.h"
#include "shared_memory.h"

namespace emulated {

struct BulkCopy {
  uint8_t *to;
  const void *from;
  uint32_t bytes;
  unsigned from_block;
  int line;
};

// A phase ends when no arrival and no byte is pending. Bytes may come before somebody expects them.
struct MBarrier {
  unsigned block;
  uint32_t address;
  unsigned arrivals;  // of each phase
  unsigned pending;
  int64_t bytes = 0;
  unsigned phase = 0;  // phases that have ended
  std::vector<BulkCopy> in_flight;
  std::vector<unsigned> waiting;  // threads
  int line = 0;                   // where the last of them waits
};

static std::vector<MBarrier> barriers;
static bool any_before;

void forget_mbarriers() {
  any_before = !barriers.empty();
  barriers.clear();
}

bool had_mbarriers() { return any_before; }

static MBarrier *find(uint32_t address, unsigned block) {
  for (MBarrier &barrier : barriers)
    if (barrier.address == address && barrier.block == block) return &barrier;
  return nullptr;
}

static MBarrier &barrier_at(uint32_t address, unsigned block, int line) {
  MBarrier *found = find(address, block);
  if (!found) fail("line %d: there is no mbarrier at %u in block %u of the cluster", line, address, block);
  return *found;
}

static unsigned number_of(const MBarrier &barrier) { return static_cast<unsigned>(&barrier - barriers.data()); }

static void end_phase_if_complete(MBarrier &barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
  for (unsigned thread : barrier.waiting) make_ready(thread);
  barrier.waiting.clear();
}

static void land(MBarrier &barrier, const BulkCopy &copy) {
  memcpy(copy.to, copy.from, copy.bytes);
  if (settings.checked)
    report_end_of_bulk_copy(copy.to, copy.from, copy.bytes, copy.line, number_of(barrier), barrier.phase);
  barrier.bytes -= copy.bytes;
  end_phase_if_complete(barrier);
}

static void land_all(MBarrier &barrier) {
  std::vector<BulkCopy> copies;
  copies.swap(barrier.in_flight);
  for (const BulkCopy &copy : copies) land(barrier, copy);
}

// Now, or when somebody waits for it.
static bool lands_at_once(const MBarrier &barrier) {
  return !barrier.waiting.empty() || settings.order == Order::forward ||
         (settings.order == Order::random && random_bits() & 1);
}

static void start_copy_to(unsigned block, uint32_t to, const void *from, uint32_t bytes, uint32_t address, int line) {
  if (block >= blocks_in_cluster())
    fail("line %d: a copy to block %u of a cluster of %u", line, block, blocks_in_cluster());
  if (has_ended(block)) fail("line %d: a copy to block %u of the cluster, which has ended", line, block);
  MBarrier &barrier = barrier_at(address, block, line);
  BulkCopy copy{shared_memory_at(to, block), from, bytes, current_block(), line};
  if (settings.checked) report_start_of_copy(copy.to, from, bytes, line);
  if (lands_at_once(barrier)) return land(barrier, copy);
  barrier.in_flight.push_back(copy);
}

void fail_if_copies_are_left(unsigned block) {
  for (const MBarrier &barrier : barriers) {
    if (barrier.block == block && (!barrier.in_flight.empty() || barrier.bytes))
      fail("has ended, but nobody has waited for copies to its block");
    for (const BulkCopy &copy : barrier.in_flight)
      if (copy.from_block == block)
        fail("has ended, while its block's copy in line %d, to another block, goes on", copy.line);
  }
}

void fail_if_threads_wait_for_copies() {
  for (const MBarrier &barrier : barriers)
    if (!barrier.waiting.empty())
      fail("%zu threads wait at an mbarrier in line %d, where %u arrivals and %lld bytes are missing",
           barrier.waiting.size(), barrier.line, barrier.pending, static_cast<long long>(barrier.bytes));
}

}  // namespace emulated

using namespace emulated;

extern "C" {

void emulator_mbarrier_init(uint32_t address, unsigned arrivals, int line) {
  if (find(address, current_block())) fail("line %d: the mbarrier at %u is there already", line, address);
  if (address % 8) fail("line %d: an mbarrier that is misaligned", line);
  barriers.push_back({current_block(), address, arrivals, arrivals});
}

void emulator_mbarrier_arrive(uint32_t address, uint32_t expected_bytes, int line) {
  MBarrier &barrier = barrier_at(address, current_block(), line);
  if (!barrier.pending) fail("line %d: one arrival at an mbarrier too many", line);
  --barrier.pending;
  barrier.bytes += expected_bytes;
  end_phase_if_complete(barrier);
}

void emulator_mbarrier_wait(uint32_t address, unsigned parity, int line) {
  unsigned block = current_block();
  while ((barrier_at(address, block, line).phase & 1) == parity) {
    MBarrier &barrier = barrier_at(address, block, line);
    unsigned before = barrier.phase;
    land_all(barrier);
    if (barrier.phase != before) continue;
    barrier.waiting.push_back(current_thread);
    barrier.line = line;
    wait_for_turn();
  }
  MBarrier &barrier = barrier_at(address, block, line);
  report_wait_at_mbarrier(number_of(barrier), barrier.phase - 1);
}

void emulator_start_bulk_copy(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier, unsigned blocks,
                              int line) {
  constexpr unsigned UNIT = 16;  // of bytes and of both addresses
  if (bytes % UNIT || to % UNIT || reinterpret_cast<uintptr_t>(from) % UNIT)
    fail("line %d: a copy of %u bytes or of addresses that are no multiples of %u", line, bytes, UNIT);
  if (!blocks) return start_copy_to(current_block(), to, from, bytes, barrier, line);
  for (unsigned block = 0; blocks >> block; ++block)
    if (blocks >> block & 1) start_copy_to(block, to, from, bytes, barrier, line);
}
}
