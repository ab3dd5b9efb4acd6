#include "shared_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>

#include "../interface.h"
#include "failure.h"
#include "fibers.h"
#include "mbarriers.h"

namespace emulated {

constexpr size_t GAP = 64;  // bytes between arrays, of no array

struct BlockMemory {
  std::deque<SharedArray> arrays;  // in the order of their declarations
  size_t used, array_bytes;
  size_t declared;  // arrays that some thread of the block has come to
};

static BlockMemory of_block[MAX_BLOCKS];
static size_t dynamic_bytes, dynamic_limit;
static unsigned of_thread[MAX_THREADS];  // arrays that each thread has come to

uint8_t *const arena = static_cast<uint8_t *>(aligned_alloc(4096, ARENA_BYTES * MAX_BLOCKS));

void forget_shared_arrays(size_t dynamic, size_t limit) {
  for (BlockMemory &memory : of_block) memory = {};
  dynamic_bytes = dynamic, dynamic_limit = limit;
}

void empty_shared_arrays() {
  for (BlockMemory &memory : of_block) memory.declared = 0;
  std::fill_n(of_thread, MAX_THREADS, 0);
}

uint8_t *shared_memory_at(uint32_t address, unsigned block) {
  if (address >= ARENA_BYTES) fail("%u is no address in shared memory", address);
  return arena + block * ARENA_BYTES + address;
}

SharedArray *shared_array_at(const void *address) {
  for (SharedArray &array : of_block[(static_cast<const uint8_t *>(address) - arena) / ARENA_BYTES].arrays)
    if (static_cast<size_t>(static_cast<const uint8_t *>(address) - array.begin) < array.bytes) return &array;
  return nullptr;
}

static size_t limit() {
  return dynamic_bytes ? dynamic_limit : STATIC_SHARED_LIMIT;
}

static void add_array(BlockMemory &memory, size_t bytes, size_t alignment, int line) {
  memory.array_bytes += bytes;
  if (memory.array_bytes > limit())
    fail("line %d: %zu bytes of shared memory, more than %zu", line, memory.array_bytes, limit());
  size_t at = (memory.used + alignment - 1) / alignment * alignment;
  memory.used = at + bytes + GAP;
  if (memory.used > ARENA_BYTES) fail("line %d: more arrays in shared memory than the emulator has place for", line);
  memory.arrays.push_back({arena + current_block() * ARENA_BYTES + at, bytes, Shadow(bytes)});
}

}  // namespace emulated

using namespace emulated;

extern "C" void *emulator_shared(size_t bytes, size_t alignment, int line) {
  unsigned which = of_thread[current_thread]++;
  BlockMemory &memory = of_block[current_block()];
  if (which == memory.arrays.size()) add_array(memory, bytes, alignment, line);
  SharedArray &array = memory.arrays[which];
  if (array.bytes != bytes) fail("line %d: another array in shared memory than other threads have", line);
  if (which == memory.declared) {
    ++memory.declared;
    if (had_mbarriers()) array.shadow.clear();  // of the marks of their copies
    memset(array.begin, 0xFF, bytes);  // no numbers
  }
  return array.begin;
}

extern "C" void *emulator_dynamic_shared(size_t alignment, int line) {
  return emulator_shared(dynamic_bytes, alignment, line);
}

extern "C" uint32_t emulator_address_in_shared(const void *place) {
  if (!is_shared(place)) fail("converts an address outside of shared memory to one inside");
  return static_cast<uint32_t>((static_cast<const uint8_t *>(place) - arena) % ARENA_BYTES);
}
