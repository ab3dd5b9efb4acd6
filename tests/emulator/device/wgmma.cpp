// wgmma.mma_async.m64nNk16 with a in registers. A warp multiplies its 16 rows alone, as late as it may: when it waits.
// Until then, its sums are no numbers.
#include "wgmma.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>

#include "../interface.h"
#include "accesses.h"
#include "block.h"
#include "failure.h"
#include "fibers.h"
#include "settings.h"
#include "shared_memory.h"
#include "tensor_core.h"

namespace emulated {

constexpr unsigned WARPS_OF_GROUP = 4;
constexpr unsigned CORE_ROWS = 8, CORE_BYTES = 128;  // of a core matrix of b: rows of 16 bytes

using Sums = float[WARP][WgmmaSums::MOST];

struct Product {
  WgmmaOperands lanes[WARP];
  uint32_t a[WARP][4];  // what was in the registers when it was started
};

struct Products {  // of one warp
  std::deque<Product> open;
  std::deque<size_t> groups;  // how many of them are in each that was closed, the oldest first
  size_t in_last_group = 0;
  bool hidden = false;  // whether registers are no numbers, in whose place these are
  Sums sums;
  bool fenced = false;       // whether registers that were written may be used
  uint32_t last_a[WARP][4];  // of the product that was started last
  unsigned started = 0;
};

static Products of_warp[MAX_WARPS];

void forget_products() {
  for (Products &warp : of_warp) {
    warp.open.clear(), warp.groups.clear();
    warp.in_last_group = 0, warp.started = 0;
    warp.hidden = warp.fenced = false;
  }
}

void fail_if_products_are_left() {
  const Products &own = of_warp[current_thread / WARP];
  if (!own.open.empty())
    fail("has ended, but has not waited for products that it started in line %d", own.open.front().lanes[0].line);
  unsigned first = current_thread / WARP / WARPS_OF_GROUP * WARPS_OF_GROUP;
  for (unsigned i = first; i < first + WARPS_OF_GROUP && has_ended(current_block()); ++i)
    if (of_warp[i].started != own.started)
      fail("its warp has started %u products of a warpgroup, and another of its warps %u", own.started,
           of_warp[i].started);
}

// Where b has the 8 neighbours from `piece` on along N, and the 8 from `half` on along the depth: a descriptor without
// a swizzle, of a matrix whose neighbours along the depth lie together (PTX manual, "Matrix Descriptor Format" and
// "Strides").
static const uint8_t *core_matrix(uint64_t descriptor, unsigned piece, unsigned half, int line) {
  auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3FFF) << 4; };
  uint32_t start = field(0), along_depth = field(16), along_columns = field(32);
  if (descriptor >> 62 || descriptor >> 49 & 7) fail("line %d: a matrix descriptor with a swizzle", line);
  return shared_memory_at(start + half * along_depth + piece * along_columns, current_block());
}

static void report_reads(const WgmmaOperands &operands) {
  if (!settings.checked) return;
  for (unsigned piece = 0; piece < operands.columns / CORE_ROWS; ++piece)
    for (unsigned half = 0; half < 2; ++half)
      report_read_by_warp(core_matrix(operands.b, piece, half, operands.line), CORE_BYTES, operands.line);
}

static void take_b(Matrices &m, const WgmmaOperands &operands, unsigned piece) {
  for (unsigned half = 0; half < 2; ++half) {
    const uint8_t *core = core_matrix(operands.b, piece, half, operands.line);
    for (unsigned column = 0; column < CORE_ROWS; ++column)
      for (unsigned k = 0; k < 8; ++k) {
        uint16_t bits;
        memcpy(&bits, core + column * 16 + k * 2, sizeof bits);
        m.b[half * 8 + k][column] = number(bits, 0);
      }
  }
}

static void take_a(Matrices &m, const Product &product) {
  for (int lane = 0; lane < static_cast<int>(WARP); ++lane)
    for (int i = 0; i < 8; ++i)
      m.a[row_of_pair(lane, i / 2)][depth_of_pair(lane, i / 2) + i % 2] = number(product.a[lane][i / 2], i % 2);
}

static void multiply_piece(Matrices &m, Sums &sums, unsigned piece) {
  for (int lane = 0; lane < static_cast<int>(WARP); ++lane)
    for (int i = 0; i < 4; ++i)
      m.sums[row_of_pair(lane, i / 2)][column_of_sums(lane) + i % 2] = sums[lane][piece * 4 + i];
  m.multiply();
  for (int lane = 0; lane < static_cast<int>(WARP); ++lane)
    for (int i = 0; i < 4; ++i)
      sums[lane][piece * 4 + i] =
          static_cast<float>(m.sums[row_of_pair(lane, i / 2)][column_of_sums(lane) + i % 2]);
}

static void fail_if_factors_have_changed(const Product &product) {
  for (unsigned lane = 0; lane < WARP; ++lane)
    for (int i = 0; i < 4; ++i)
      if (*product.lanes[lane].a[i] != product.a[lane][i])
        fail("a register of the product in line %d was written before that had ended", product.lanes[lane].line);
}

static void finish_first(Products &warp) {
  const Product &product = warp.open.front();
  const WgmmaOperands &operands = product.lanes[0];
  report_reads(operands);
  fail_if_factors_have_changed(product);
  Matrices m;
  take_a(m, product);
  for (unsigned piece = 0; piece < operands.columns / CORE_ROWS; ++piece) {
    take_b(m, operands, piece);
    multiply_piece(m, warp.sums, piece);
  }
  if (warp.open.size() == 1) {
    for (unsigned lane = 0; lane < WARP; ++lane)
      for (unsigned i = 0; i < operands.columns / 2; ++i) *product.lanes[lane].sums.at[i] = warp.sums[lane][i];
    warp.hidden = false;
  }
  warp.open.pop_front();
}

static void hide_sums(Products &warp, const Product &product) {
  for (unsigned lane = 0; lane < WARP; ++lane)
    for (unsigned i = 0; i < product.lanes[lane].columns / 2; ++i) {
      warp.sums[lane][i] = *product.lanes[lane].sums.at[i];
      *product.lanes[lane].sums.at[i] = NAN;
    }
  warp.hidden = true;
}

static void fail_unless_possible(const Products &warp, const Product &product) {
  const WgmmaOperands &first = product.lanes[0];
  for (unsigned lane = 0; lane < WARP; ++lane) {
    const WgmmaOperands &own = product.lanes[lane];
    if (own.b != first.b) fail("line %d: lanes of a warp have different descriptors", first.line);
    if (warp.hidden && memcmp(&own.sums, &warp.open.front().lanes[lane].sums, sizeof own.sums))
      fail("line %d: products with other sums go on", first.line);
  }
  if (!warp.fenced && !(warp.started && !memcmp(product.a, warp.last_a, sizeof product.a)))
    fail("line %d: registers of a product were written, with no wgmma.fence since", first.line);
}

}  // namespace emulated

using namespace emulated;

static Products &own_products() { return of_warp[current_thread / WARP]; }

extern "C" {

void emulator_wgmma(void *const *lanes, uint32_t) {
  Products &warp = own_products();
  Product product;
  for (unsigned lane = 0; lane < WARP; ++lane) {
    product.lanes[lane] = *static_cast<const WgmmaOperands *>(lanes[lane]);
    for (int i = 0; i < 4; ++i) product.a[lane][i] = *product.lanes[lane].a[i];
  }
  fail_unless_possible(warp, product);
  report_reads(product.lanes[0]);
  if (!warp.hidden) hide_sums(warp, product);
  memcpy(warp.last_a, product.a, sizeof product.a);
  warp.open.push_back(product);
  ++warp.in_last_group, ++warp.started;
}

void emulator_wgmma_fence(void *const *, uint32_t) { own_products().fenced = true; }

void emulator_wgmma_commit_group(void *const *, uint32_t) {
  Products &warp = own_products();
  warp.groups.push_back(warp.in_last_group);
  warp.in_last_group = 0;
  warp.fenced = false;
}

void emulator_wgmma_wait_group(void *const *lanes, uint32_t) {
  Products &warp = own_products();
  unsigned groups_left = static_cast<const WgmmaWaitOperands *>(lanes[0])->groups_left;
  while (warp.groups.size() > groups_left) {
    for (size_t i = warp.groups.front(); i; --i) finish_first(warp);
    warp.groups.pop_front();
  }
}
}
