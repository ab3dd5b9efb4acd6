#include "shared_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>

#include "../interface.h"
#include "failure.h"
#include "fibers.h"

namespace emulated {

constexpr size_t GAP = 64;  // bytes between arrays, of no array

static std::deque<SharedArray> arrays;  // in the order of their declarations
static size_t used, array_bytes, dynamic_bytes;
static size_t declared;                // arrays that some thread of the block has come to
static unsigned of_thread[MAX_THREADS];  // arrays that each thread has come to

uint8_t *const arena = static_cast<uint8_t *>(aligned_alloc(4096, ARENA_BYTES));

void forget_shared_arrays(size_t dynamic) {
  arrays.clear();
  used = array_bytes = 0;
  dynamic_bytes = dynamic;
}

void empty_shared_arrays() {
  declared = 0;
  std::fill_n(of_thread, MAX_THREADS, 0);
}

uint8_t *shared_memory_at(uint32_t address) {
  if (address >= ARENA_BYTES) fail("%u is no address in shared memory", address);
  return arena + address;
}

SharedArray *shared_array_at(const void *address) {
  for (SharedArray &array : arrays)
    if (static_cast<size_t>(static_cast<const uint8_t *>(address) - array.begin) < array.bytes) return &array;
  return nullptr;
}

static void add_array(size_t bytes, size_t alignment, int line) {
  array_bytes += bytes;
  size_t limit = dynamic_bytes ? DYNAMIC_SHARED_LIMIT : STATIC_SHARED_LIMIT;
  if (array_bytes > limit) fail("line %d: %zu bytes of shared memory, more than %zu", line, array_bytes, limit);
  size_t at = (used + alignment - 1) / alignment * alignment;
  used = at + bytes + GAP;
  if (used > ARENA_BYTES) fail("line %d: more arrays in shared memory than the emulator has place for", line);
  arrays.push_back({arena + at, bytes, Shadow(bytes)});
}

}  // namespace emulated

using namespace emulated;

extern "C" void *emulator_shared(size_t bytes, size_t alignment, int line) {
  unsigned which = of_thread[current_thread]++;
  if (which == arrays.size()) add_array(bytes, alignment, line);
  SharedArray &array = arrays[which];
  if (array.bytes != bytes) fail("line %d: another array in shared memory than other threads have", line);
  if (which == declared) {
    ++declared;
    memset(array.begin, 0xFF, bytes);  // no numbers
  }
  return array.begin;
}

extern "C" void *emulator_dynamic_shared(size_t alignment, int line) {
  return emulator_shared(dynamic_bytes, alignment, line);
}

extern "C" uint32_t emulator_address_in_shared(const void *place) {
  if (!is_shared(place)) fail("converts an address outside of shared memory to one inside");
  return static_cast<uint32_t>(static_cast<const uint8_t *>(place) - arena);
}
