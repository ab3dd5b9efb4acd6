// The cluster of blocks that runs: their threads, barriers, and what warps compute together. Clusters run one after the
// other; most have one block.
#pragma once
#include <cstdint>
#include <string>

#include "../interface.h"

namespace emulated {

constexpr unsigned MAX_BLOCKS = 8;  // of a cluster

struct Counts {
  uint64_t blocks = 0, barriers = 0, warp_operations = 0;
};
extern Counts counts;

unsigned threads_of(const Index3 &block_size);

void begin_kernel(const KernelRow &kernel, void **arguments, const Index3 &block_size, const Index3 &grid_size,
                  unsigned blocks_of_cluster, size_t dynamic_shared_bytes);
void run_cluster(const Index3 &first_block);  // blocks of a cluster are neighbours along x

unsigned block_of(unsigned thread);  // in its cluster
unsigned current_block();
unsigned blocks_in_cluster();
bool has_ended(unsigned block);

std::string name_of_thread(unsigned thread);
[[noreturn]] void fail_because_all_wait();

}  // namespace emulated
