// mma.sync.m16n8k16: a (16 x 16) times b (16 x 8), float16, added to float32 sums (16 x 8).
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "../interface.h"
#include "fibers.h"
#include "settings.h"

namespace emulated {

constexpr int ROWS = 16, COLUMNS = 8, DEPTH = 16;
constexpr int AT_ONCE = 4;  // products that a tensor core adds at once

static float number(uint32_t pair, int which) {
  auto bits = static_cast<short>(pair >> 16 * which);
  using Shorts = short __attribute__((vector_size(16)));
  return __builtin_ia32_vcvtph2ps(Shorts{bits})[0];
}

// Numbers of all lanes, where the PTX manual has them ("Matrix Fragments for mma.m16n8k16 with floating point type").
struct Matrices {
  double a[ROWS][DEPTH], b[DEPTH][COLUMNS], sums[ROWS][COLUMNS];

  explicit Matrices(void *const *lanes) {
    for (int lane = 0; lane < static_cast<int>(WARP); ++lane) {
      const auto &own = *static_cast<const MmaOperands *>(lanes[lane]);
      int group = lane >> 2, member = lane & 3;
      for (int i = 0; i < 8; ++i)
        a[group + (i / 2 % 2 ? 8 : 0)][member * 2 + i % 2 + (i < 4 ? 0 : 8)] = number(own.a[i / 2], i % 2);
      for (int i = 0; i < 4; ++i) b[member * 2 + i % 2 + (i < 2 ? 0 : 8)][group] = number(own.b[i / 2], i % 2);
      for (int i = 0; i < 4; ++i) sums[group + (i < 2 ? 0 : 8)][member * 2 + i % 2] = own.sums[i];
    }
  }
  void give_sums(void *const *lanes) const {
    for (int lane = 0; lane < static_cast<int>(WARP); ++lane)
      for (int i = 0; i < 4; ++i)
        static_cast<MmaOperands *>(lanes[lane])->sums[i] =
            static_cast<float>(sums[(lane >> 2) + (i < 2 ? 0 : 8)][(lane & 3) * 2 + i % 2]);
  }
};

// Sums of 53 bits, rounded to float32 once.
static void multiply_exactly(Matrices &m) {
  for (int row = 0; row < ROWS; ++row)
    for (int k = 0; k < DEPTH; ++k)
      for (int column = 0; column < COLUMNS; ++column) m.sums[row][column] += m.a[row][k] * m.b[k][column];
}

// x without the bits below 24.
static double cut(double x) {
  return std::bit_cast<double>(std::bit_cast<uint64_t>(x) & ~((uint64_t{1} << 29) - 1));
}

static double sum_cutting_off(const double (&addends)[AT_ONCE + 1]) {
  double largest = 0, total = 0;
  for (double addend : addends) largest = std::max(largest, std::fabs(addend)), total += addend;
  if (largest == 0 || !std::isfinite(total)) return total;
  double last_bit = std::ldexp(1.0, std::ilogb(largest) - 23);
  total = 0;
  for (double addend : addends) total += std::trunc(addend / last_bit);
  return cut(total * last_bit);
}

// As tensor cores add at their worst (Fasi, Higham, Mikaitis and Pranesh 2021, "Numerical behavior of NVIDIA tensor
// cores"): some products at once, all addends cut off at the last of the largest one's 24 bits, and the sum too.
static void multiply_cutting_off(Matrices &m) {
  for (int row = 0; row < ROWS; ++row)
    for (int step = 0; step < DEPTH; step += AT_ONCE)
      for (int column = 0; column < COLUMNS; ++column) {
        double addends[AT_ONCE + 1];
        for (int k = 0; k < AT_ONCE; ++k) addends[k] = m.a[row][step + k] * m.b[step + k][column];
        addends[AT_ONCE] = m.sums[row][column];
        m.sums[row][column] = sum_cutting_off(addends);
      }
}

}  // namespace emulated

using namespace emulated;

extern "C" void emulator_mma_m16n8k16(void *const *lanes, uint32_t) {
  Matrices matrices(lanes);
  settings.adverse ? multiply_cutting_off(matrices) : multiply_exactly(matrices);
  matrices.give_sums(lanes);
}
