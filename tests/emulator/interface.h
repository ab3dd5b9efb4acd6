// What compiled kernels and the emulated device call each other by.
#pragma once
#include <cstddef>
#include <cstdint>

struct Index3 {
  unsigned x, y, z;
};
struct Indices {
  Index3 thread, block, block_size, grid_size;
};

// What a warp computes together, once all lanes of `mask` have come: `lanes[i]` are the operands of lane i. Operands lie
// on the stack of their lane, and the operation writes its results to them.
using WarpOperation = void (*)(void *const *lanes, uint32_t mask);

struct KernelRow {  // a row of the table `emulator_kernels` of a compiled source; the last one has no name
  const char *name;
  void (*run)(void **arguments);  // the addresses of device memory that its parameters are
  unsigned parameters, max_threads;
  unsigned shared_limit;  // bytes of a block, if a launch asks for so much
};

extern "C" {
Indices emulator_indices(void);
void *emulator_shared(size_t bytes, size_t alignment, int line);
void *emulator_dynamic_shared(size_t alignment, int line);  // of as many bytes as the launch has asked for
uint32_t emulator_address_in_shared(const void *place);
void emulator_barrier(int line);
void emulator_cluster_arrive(int line);
void emulator_cluster_wait(int line);
unsigned emulator_block_of_cluster(void);
void emulator_warp(WarpOperation operation, uint32_t mask, void *operands, int line);
void emulator_atomic(void *place, size_t bytes);       // an atomic access is about to be made
float emulator_inexact(float result, unsigned ulps);  // a result that CUDA's manual allows to be off by so much

// cp.async: `to` is an address in shared memory.
void emulator_start_copy(uint32_t to, const void *from, size_t bytes, int line);
void emulator_end_copy_group(void);
void emulator_wait_for_copies(unsigned groups_left);

// mbarriers, by their addresses in shared memory, and copies that count at them: to the address of this name in each
// block of the cluster that `blocks` has a bit for, or in this block if it is 0.
void emulator_mbarrier_init(uint32_t barrier, unsigned arrivals, int line);
void emulator_mbarrier_arrive(uint32_t barrier, uint32_t expected_bytes, int line);
void emulator_mbarrier_wait(uint32_t barrier, unsigned parity, int line);
void emulator_start_bulk_copy(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier, unsigned blocks,
                              int line);

// Of type `WarpOperation`, on the operands below.
void emulator_shuffle(void *const *lanes, uint32_t mask);
void emulator_vote(void *const *lanes, uint32_t mask);
void emulator_mma_m16n8k16(void *const *lanes, uint32_t mask);
void emulator_ldmatrix_x4(void *const *lanes, uint32_t mask);
void emulator_wgmma(void *const *lanes, uint32_t mask);
void emulator_wgmma_fence(void *const *lanes, uint32_t mask);
void emulator_wgmma_commit_group(void *const *lanes, uint32_t mask);
void emulator_wgmma_wait_group(void *const *lanes, uint32_t mask);
}

struct ShuffleOperands {
  uint64_t value;  // becomes that of the lane `source`
  unsigned source;
};
struct VoteOperands {
  bool yes;
  uint32_t ballot;  // becomes the lanes that have said yes
};
struct LdmatrixOperands {
  uint32_t row;  // address in shared memory
  int line;
  uint32_t pairs[4];  // become one pair of float16 of each matrix
};
struct WgmmaSums {  // the registers to which a b is added, N / 2
  static constexpr unsigned MOST = 128;
  float *at[MOST];
};
struct WgmmaOperands {  // a lane's part of wgmma.mma_async.m64nNk16, with a in registers
  WgmmaSums sums;
  const uint32_t *a[4];  // registers
  uint64_t b;  // matrix descriptor
  unsigned columns;  // N
  int line;
};
struct WgmmaWaitOperands {
  unsigned groups_left;
};
struct MmaOperands {  // a lane's fragments of mma.sync.m16n8k16
  uint32_t a[4], b[2];  // pairs of float16
  float sums[4];        // to which a b is added
};
