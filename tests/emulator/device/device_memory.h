// Allocations, each between pages that nobody may touch; they begin as no numbers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "shadow.h"

namespace emulated {

struct Allocation {
  uint8_t *begin;
  size_t bytes;
  uint8_t *mapped;  // with the pages around it
  size_t mapped_bytes;
  bool on_host;
  bool written_by_host;  // all of it
  Shadow shadow;         // if accesses were checked when it was made
};

void *allocate(size_t bytes, bool on_host);  // null if there is no place
bool release(void *address);                 // whether it was the beginning of an allocation
void mark_written_by_host(void *to, size_t bytes);
void empty(void *address);  // an allocation holds no numbers again, and nobody has written it

Allocation *allocation_at(const void *address);  // null if there is none
std::string name_of_place(const void *address);  // where it lies in or near an allocation
const Allocation *allocation_written_behind();   // one behind which somebody has written, or null

}  // namespace emulated
