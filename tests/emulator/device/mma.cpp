// mma.sync.m16n8k16.
#include <cstdint>

#include "../interface.h"
#include "fibers.h"
#include "tensor_core.h"

using namespace emulated;

static Matrices matrices_of(void *const *lanes) {
  Matrices m;
  for (int lane = 0; lane < static_cast<int>(WARP); ++lane) {
    const auto &own = *static_cast<const MmaOperands *>(lanes[lane]);
    for (int i = 0; i < 8; ++i)
      m.a[row_of_pair(lane, i / 2)][depth_of_pair(lane, i / 2) + i % 2] = number(own.a[i / 2], i % 2);
    for (int i = 0; i < 4; ++i) m.b[(lane & 3) * 2 + i % 2 + (i < 2 ? 0 : 8)][lane >> 2] = number(own.b[i / 2], i % 2);
    for (int i = 0; i < 4; ++i) m.sums[row_of_pair(lane, i / 2)][column_of_sums(lane) + i % 2] = own.sums[i];
  }
  return m;
}

extern "C" void emulator_mma_m16n8k16(void *const *lanes, uint32_t) {
  Matrices m = matrices_of(lanes);
  m.multiply();
  for (int lane = 0; lane < static_cast<int>(WARP); ++lane)
    for (int i = 0; i < 4; ++i)
      static_cast<MmaOperands *>(lanes[lane])->sums[i] =
          static_cast<float>(m.sums[row_of_pair(lane, i / 2)][column_of_sums(lane) + i % 2]);
}
