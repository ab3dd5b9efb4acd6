// The memory that the threads of a block share; each block of a cluster has its own.
#pragma once
#include <cstddef>
#include <cstdint>

#include "block.h"
#include "shadow.h"

namespace emulated {

struct SharedArray {
  uint8_t *begin;
  size_t bytes;
  Shadow shadow;
};

constexpr size_t STATIC_SHARED_LIMIT = 48 << 10;   // of a block, on every architecture
constexpr size_t LARGEST_SHARED_LIMIT = 227 << 10;  // if the launch asks for it, on sm_90

// Before another kernel's first block; `limit` is that of all bytes, if any are dynamic.
void forget_shared_arrays(size_t dynamic_bytes, size_t limit);
void empty_shared_arrays();   // before a cluster: they hold no numbers

uint8_t *shared_memory_at(uint32_t address, unsigned block);

constexpr size_t ARENA_BYTES = 2 * (STATIC_SHARED_LIMIT + LARGEST_SHARED_LIMIT);  // of a block
extern uint8_t *const arena;  // in which all arrays lie, block by block

inline bool is_shared(const void *address) {
  return static_cast<size_t>(static_cast<const uint8_t *>(address) - arena) < ARENA_BYTES * MAX_BLOCKS;
}
SharedArray *shared_array_at(const void *address);  // null between arrays

}  // namespace emulated
