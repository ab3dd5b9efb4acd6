// The memory that the threads of a block share.
#pragma once
#include <cstddef>
#include <cstdint>

#include "shadow.h"

namespace emulated {

struct SharedArray {
  uint8_t *begin;
  size_t bytes;
  Shadow shadow;
};

constexpr size_t STATIC_SHARED_LIMIT = 48 << 10;   // of a block, on every architecture
constexpr size_t DYNAMIC_SHARED_LIMIT = 99 << 10;  // of a block, if the launch asks for it, from sm_80 on

void forget_shared_arrays(size_t dynamic_bytes);  // before another kernel's first block
void empty_shared_arrays();   // before a block: they hold no numbers

uint8_t *shared_memory_at(uint32_t address);

constexpr size_t ARENA_BYTES = 2 * (STATIC_SHARED_LIMIT + DYNAMIC_SHARED_LIMIT);
extern uint8_t *const arena;  // in which all arrays lie

inline bool is_shared(const void *address) {
  return static_cast<size_t>(static_cast<const uint8_t *>(address) - arena) < ARENA_BYTES;
}
SharedArray *shared_array_at(const void *address);  // null between arrays

}  // namespace emulated
