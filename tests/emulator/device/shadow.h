// When each part of some memory was last read and written, and by whom.
//
// A cell tells it of `granule` bytes. Every access covers whole cells: where one does not, all cells are split, which
// loses nothing, because those before it did.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulated {

// In ticks of `now`: one for each launch, block and barrier. Never is 0.
struct Cell {
  uint32_t written, read;
  uint32_t first_read;  // in the last launch that has read it
  uint16_t writer, reader;
};

class Shadow {
 public:
  Shadow() = default;
  explicit Shadow(size_t bytes);
  Shadow(Shadow &&other) noexcept;
  Shadow &operator=(Shadow &&other) noexcept;
  ~Shadow();

  explicit operator bool() const { return cells_; }
  void clear();

  // The cells of an access, first and behind the last.
  Cell *begin(size_t offset, size_t size) {
    while ((offset | size) & (granule_ - 1)) split();
    return cells_ + offset / granule_;
  }
  Cell *end(size_t offset, size_t size) { return cells_ + (offset + size) / granule_; }

 private:
  void split();
  size_t count() const { return (bytes_ + granule_ - 1) / granule_; }

  Cell *cells_ = nullptr;
  size_t bytes_ = 0, granule_ = 16;
};

}  // namespace emulated
