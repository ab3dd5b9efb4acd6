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

void forget_shared_arrays();  // before another kernel's first block
void empty_shared_arrays();   // before a block: they hold no numbers

bool is_shared(const void *address);
SharedArray *shared_array_at(const void *address);  // null between arrays

}  // namespace emulated
