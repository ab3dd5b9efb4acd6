// Inline PTX, a function for each instruction: `tests.emulator.source` turns an asm statement into a call of the
// function with the instruction's name, "_" for ".", whose arguments are the line and the instruction's operands in
// their order. So a new instruction is a new function here. One of a whole warp goes through `emulator_warp`.
#pragma once
#include "../interface.h"
#include "half.h"

inline unsigned cluster_ctarank() { return emulator_block_of_cluster(); }

namespace ptx {

constexpr uint32_t ALL_LANES = 0xFFFFFFFF;

inline void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(int line, float &d0, float &d1, float &d2, float &d3,
                                                              uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                              uint32_t b0, uint32_t b1, float c0, float c1, float c2,
                                                              float c3) {
  MmaOperands own{{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
  emulator_warp(emulator_mma_m16n8k16, ALL_LANES, &own, line);
  d0 = own.sums[0], d1 = own.sums[1], d2 = own.sums[2], d3 = own.sums[3];
}

inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(int line, uint32_t &d0, uint32_t &d1, uint32_t &d2, uint32_t &d3,
                                                     uint32_t row) {
  LdmatrixOperands own{row, line, {}};
  emulator_warp(emulator_ldmatrix_x4, ALL_LANES, &own, line);
  d0 = own.pairs[0], d1 = own.pairs[1], d2 = own.pairs[2], d3 = own.pairs[3];
}

inline void cp_async_cg_shared_global(int line, uint32_t to, const void *from, size_t bytes) {
  emulator_start_copy(to, from, bytes, line);
}
inline void cp_async_commit_group(int) { emulator_end_copy_group(); }
inline void cp_async_wait_group(int, unsigned groups_left) { emulator_wait_for_copies(groups_left); }

inline void mbarrier_init_shared_b64(int line, uint32_t barrier, unsigned arrivals) {
  emulator_mbarrier_init(barrier, arrivals, line);
}
inline void fence_mbarrier_init_release_cluster(int) {}
inline void fence_proxy_async_shared_cta(int) {}
inline void mbarrier_arrive_expect_tx_release_cta_shared_cta_b64(int line, uint32_t barrier, uint32_t bytes) {
  emulator_mbarrier_arrive(barrier, bytes, line);
}
inline void wait_until_mbarrier_try_wait_parity_acquire_cta_shared_cta_b64(int line, uint32_t barrier, unsigned parity,
                                                                           unsigned) {
  emulator_mbarrier_wait(barrier, parity, line);
}
inline void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes(int line, uint32_t to, const void *from,
                                                                           uint32_t bytes, uint32_t barrier) {
  emulator_start_bulk_copy(to, from, bytes, barrier, 0, line);
}
inline void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes_multicast_cluster(
    int line, uint32_t to, const void *from, uint32_t bytes, uint32_t barrier, uint16_t blocks) {
  emulator_start_bulk_copy(to, from, bytes, barrier, blocks, line);
}

// What is relaxed orders no accesses; of those that the kernels have, none needs it.
inline void barrier_cluster_arrive_release_aligned(int line) { emulator_cluster_arrive(line); }
inline void barrier_cluster_arrive_relaxed_aligned(int line) { emulator_cluster_arrive(line); }
inline void barrier_cluster_wait_acquire_aligned(int line) { emulator_cluster_wait(line); }

inline void wgmma_fence_sync_aligned(int line) { emulator_warp(emulator_wgmma_fence, ALL_LANES, nullptr, line); }
inline void wgmma_commit_group_sync_aligned(int line) {
  emulator_warp(emulator_wgmma_commit_group, ALL_LANES, nullptr, line);
}
inline void wgmma_wait_group_sync_aligned(int line, unsigned groups_left) {
  WgmmaWaitOperands own{groups_left};
  emulator_warp(emulator_wgmma_wait_group, ALL_LANES, &own, line);
}

// wgmma.mma_async.sync.aligned.m64nNk16.f32.f16.f16 with a in registers; `sums` are N / 2 registers. The last operands
// say that a b is added, with which signs, and that b does not lie along N.
inline void wgmma_mma_async_sync_aligned_m64k16_f32_f16_f16(int line, unsigned columns, const WgmmaSums &sums,
                                                            const uint32_t &a0, const uint32_t &a1, const uint32_t &a2,
                                                            const uint32_t &a3, uint64_t b, uint32_t adds, int sign_a,
                                                            int sign_b, int along_columns) {
  WgmmaOperands own{sums, {&a0, &a1, &a2, &a3}, b, columns, line};
  if (!adds || sign_a != 1 || sign_b != 1 || along_columns) __builtin_trap();  // what no kernel uses
  emulator_warp(emulator_wgmma, ALL_LANES, &own, line);
}

inline void mov_u32(int, unsigned &result, unsigned (*special_register)()) { result = special_register(); }

// Bit 4 a + 2 b + c of `table` is the result for bits a, b and c.
inline void lop3_b32(int, uint32_t &result, uint32_t a, uint32_t b, uint32_t c, unsigned table) {
  result = 0;
  for (unsigned i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
}

// Two 8-bit floats, of a sign, 4 bits of exponent with a bias of 7 and 3 of mantissa; all bits set but the sign is NaN.
inline uint16_t half_of_e4m3(unsigned byte) {
  int exponent = byte >> 3 & 15, eighths = byte & 7;
  float size = exponent ? __builtin_ldexpf(8 + eighths, exponent - 10) : __builtin_ldexpf(eighths, -9);
  if ((byte & 0x7F) == 0x7F) size = __builtin_nanf("");
  return half_bits::of(byte & 0x80 ? -size : size);
}
inline void cvt_rn_f16x2_e4m3x2(int, uint32_t &result, uint16_t pair) {
  result = half_of_e4m3(pair & 0xFF) | static_cast<uint32_t>(half_of_e4m3(pair >> 8)) << 16;
}

}  // namespace ptx
