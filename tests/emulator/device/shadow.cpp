#include "shadow.h"

#include <sys/mman.h>

#include <utility>

namespace emulated {

// Of zeros, which take no memory until they are written, and one more than asked for, so that there are some and that
// `split` may write two for each wider one.
static Cell *new_cells(size_t count) {
  return static_cast<Cell *>(mmap(nullptr, (count + 1) * sizeof(Cell), PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}
static void free_cells(Cell *cells, size_t count) {
  if (cells) munmap(cells, (count + 1) * sizeof(Cell));
}

Shadow::Shadow(size_t bytes) : bytes_(bytes) { cells_ = new_cells(count()); }

Shadow::Shadow(Shadow &&other) noexcept { *this = std::move(other); }

Shadow &Shadow::operator=(Shadow &&other) noexcept {
  std::swap(cells_, other.cells_), std::swap(bytes_, other.bytes_), std::swap(granule_, other.granule_);
  return *this;
}

Shadow::~Shadow() { free_cells(cells_, count()); }

void Shadow::clear() { *this = Shadow(bytes_); }

void Shadow::split() {
  Cell *wide = cells_;
  size_t wide_count = count();
  granule_ /= 2;
  cells_ = new_cells(count());
  for (size_t i = 0; i < wide_count; ++i)
    if (wide[i].written || wide[i].read) cells_[2 * i] = cells_[2 * i + 1] = wide[i];
  free_cells(wide, wide_count);
}

}  // namespace emulated
