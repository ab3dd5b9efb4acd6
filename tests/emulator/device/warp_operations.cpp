// Shuffles and votes: what the lanes of a warp exchange.
#include <cstdint>

#include "../interface.h"
#include "failure.h"
#include "fibers.h"

using namespace emulated;

template <typename Operands>
static Operands &of(void *const *lanes, unsigned lane) {
  return *static_cast<Operands *>(lanes[lane]);
}

extern "C" void emulator_shuffle(void *const *lanes, uint32_t mask) {
  uint64_t values[WARP];
  for (unsigned lane = 0; lane < WARP; ++lane)
    if (mask >> lane & 1) {
      unsigned source = of<ShuffleOperands>(lanes, lane).source;
      if (!(mask >> source & 1)) fail("lane %u shuffles from lane %u, which takes no part", lane, source);
      values[lane] = of<ShuffleOperands>(lanes, source).value;
    }
  for (unsigned lane = 0; lane < WARP; ++lane)
    if (mask >> lane & 1) of<ShuffleOperands>(lanes, lane).value = values[lane];
}

extern "C" void emulator_vote(void *const *lanes, uint32_t mask) {
  uint32_t ballot = 0;
  for (unsigned lane = 0; lane < WARP; ++lane)
    if (mask >> lane & 1 && of<VoteOperands>(lanes, lane).yes) ballot |= 1u << lane;
  for (unsigned lane = 0; lane < WARP; ++lane)
    if (mask >> lane & 1) of<VoteOperands>(lanes, lane).ballot = ballot;
}
