// Shuffles, votes and loads of matrices: what the lanes of a warp exchange.
#include <cstdint>
#include <cstring>

#include "../interface.h"
#include "accesses.h"
#include "failure.h"
#include "fibers.h"
#include "settings.h"
#include "shared_memory.h"

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

// Each lane brings the address of a row, 16 bytes: lane 8 j + i that of row i of matrix j. A lane gets pair lane % 4 of
// row lane / 4 of each matrix (PTX manual, "ldmatrix").
extern "C" void emulator_ldmatrix_x4(void *const *lanes, uint32_t) {
  constexpr unsigned MATRICES = 4, ROWS = 8, PAIRS = 4, ROW_BYTES = 16;
  const uint8_t *rows[WARP];
  for (unsigned lane = 0; lane < WARP; ++lane) {
    const auto &own = of<LdmatrixOperands>(lanes, lane);
    rows[lane] = shared_memory_at(own.row, current_block());
    if (own.row % ROW_BYTES) fail("line %d: ldmatrix of a row that is not aligned", own.line);
    if (settings.checked) report_read_by_warp(rows[lane], ROW_BYTES, own.line);
  }
  for (unsigned lane = 0; lane < WARP; ++lane)
    for (unsigned matrix = 0; matrix < MATRICES; ++matrix)
      memcpy(&of<LdmatrixOperands>(lanes, lane).pairs[matrix],
             rows[matrix * ROWS + lane / PAIRS] + lane % PAIRS * sizeof(uint32_t), sizeof(uint32_t));
}
