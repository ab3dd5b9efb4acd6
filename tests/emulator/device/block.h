// The block that runs: its threads, their barrier, and what warps compute together. Blocks run one after the other.
#pragma once
#include <cstdint>
#include <string>

#include "../interface.h"

namespace emulated {

struct Counts {
  uint64_t blocks = 0, barriers = 0, warp_operations = 0;
};
extern Counts counts;

unsigned threads_of(const Index3 &block_size);

void begin_kernel(const KernelRow &kernel, void **arguments, const Index3 &block_size, const Index3 &grid_size,
                  size_t dynamic_shared_bytes);
void run_block(const Index3 &block);

std::string name_of_thread(unsigned thread);
[[noreturn]] void fail_because_all_wait();

}  // namespace emulated
