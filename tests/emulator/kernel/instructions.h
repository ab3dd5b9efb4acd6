// Inline PTX, a function for each instruction: `tests.emulator.source` turns an asm statement into a call of the
// function with the instruction's name, "_" for ".", whose arguments are the line and the instruction's operands in
// their order. So a new instruction is a new function here. One of a whole warp goes through `emulator_warp`.
#pragma once
#include "../interface.h"
#include "half.h"

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
