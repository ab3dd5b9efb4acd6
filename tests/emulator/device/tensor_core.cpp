#include "tensor_core.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "settings.h"

namespace emulated {

constexpr int AT_ONCE = 4;  // products that a tensor core adds at once

float number(uint32_t pair, int which) {
  auto bits = static_cast<short>(pair >> 16 * which);
  using Shorts = short __attribute__((vector_size(16)));
  return __builtin_ia32_vcvtph2ps(Shorts{bits})[0];
}

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

void Matrices::multiply() { settings.adverse ? multiply_cutting_off(*this) : multiply_exactly(*this); }

}  // namespace emulated
