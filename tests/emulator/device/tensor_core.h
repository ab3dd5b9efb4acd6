// What a warp multiplies on a tensor core: a (16 x 16) times b (16 x 8), float16, added to float32 sums (16 x 8).
#pragma once
#include <cstdint>

namespace emulated {

constexpr int ROWS = 16, COLUMNS = 8, DEPTH = 16;

struct Matrices {
  double a[ROWS][DEPTH], b[DEPTH][COLUMNS], sums[ROWS][COLUMNS];

  void multiply();  // exactly, or as inexactly as NVIDIA's tensor cores do at their worst
};

float number(uint32_t pair, int which);  // of a pair of float16

// Where a lane's pair i of a, and its sums 2 i and 2 i + 1, have their numbers: PTX manual, "Matrix Fragments for
// mma.m16n8k16 with floating point type"; those of a warp of wgmma are the same.
inline int row_of_pair(int lane, int i) { return (lane >> 2) + (i % 2 ? 8 : 0); }
inline int depth_of_pair(int lane, int i) { return (lane & 3) * 2 + (i < 2 ? 0 : 8); }
inline int column_of_sums(int lane) { return (lane & 3) * 2; }

}  // namespace emulated
