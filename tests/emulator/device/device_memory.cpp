#include "device_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "accesses.h"
#include "failure.h"
#include "settings.h"

namespace emulated {

constexpr size_t PAGE = 4096;
constexpr size_t ALIGNMENT = 256;    // of CUDA's allocations
constexpr uint8_t NO_NUMBER = 0xFF;  // NaN if it is repeated
constexpr uint8_t UNUSED = 0xA5;     // what lies behind an allocation, up to the page that nobody may touch

static std::vector<Allocation> allocations;  // by address

static size_t rounded_up(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }
static size_t placed_bytes(size_t bytes) { return rounded_up(std::max<size_t>(bytes, 1), ALIGNMENT); }

static auto first_behind(const void *address) {
  return std::upper_bound(allocations.begin(), allocations.end(), static_cast<const uint8_t *>(address),
                          [](const uint8_t *place, const Allocation &one) { return place < one.begin; });
}

Allocation *allocation_at(const void *address) {
  auto behind = first_behind(address);
  if (behind == allocations.begin()) return nullptr;
  Allocation &found = *std::prev(behind);
  return address < found.begin + found.bytes ? &found : nullptr;
}

std::string name_of_place(const void *address) {
  for (const Allocation &one : allocations) {
    ptrdiff_t offset = static_cast<const uint8_t *>(address) - one.begin;
    if (offset > -static_cast<ptrdiff_t>(PAGE) && offset < static_cast<ptrdiff_t>(one.bytes + PAGE))
      return text("offset %td of one of %zu bytes%s", offset, one.bytes, one.on_host ? " of the host" : "");
  }
  return "none is near";
}

const Allocation *allocation_written_behind() {
  for (const Allocation &one : allocations) {
    const uint8_t *end = one.begin + one.bytes, *limit = one.begin + placed_bytes(one.bytes);
    if (!std::all_of(end, limit, [](uint8_t byte) { return byte == UNUSED; })) return &one;
  }
  return nullptr;
}

void *allocate(size_t bytes, bool on_host) {
  size_t placed = placed_bytes(bytes), mapped_bytes = rounded_up(placed, PAGE) + 2 * PAGE;
  void *mapped = mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  auto *first_page = static_cast<uint8_t *>(mapped), *last_page = first_page + mapped_bytes - PAGE;
  mprotect(first_page, PAGE, PROT_NONE);
  mprotect(last_page, PAGE, PROT_NONE);
  uint8_t *begin = last_page - placed;
  memset(begin, NO_NUMBER, bytes);
  memset(begin + bytes, UNUSED, placed - bytes);
  Shadow shadow = settings.checked && !on_host ? Shadow(bytes) : Shadow();
  allocations.insert(first_behind(begin), {begin, bytes, first_page, mapped_bytes, on_host, false, std::move(shadow)});
  return begin;
}

bool release(void *address) {
  auto behind = first_behind(address);
  if (behind == allocations.begin() || std::prev(behind)->begin != address) return false;
  auto found = std::prev(behind);
  munmap(found->mapped, found->mapped_bytes);
  allocations.erase(found);
  return true;
}

void mark_written_by_host(void *to, size_t bytes) {
  Allocation *found = allocation_at(to);
  if (!found || !found->shadow) return;
  if (bytes == found->bytes) {
    found->written_by_host = true;
    return;
  }
  size_t offset = static_cast<uint8_t *>(to) - found->begin;
  Cell *cell = found->shadow.begin(offset, bytes);
  for (Cell *end = found->shadow.end(offset, bytes); cell != end; ++cell) cell->written = BY_HOST;
}

void empty(void *address) {
  Allocation *found = allocation_at(address);
  memset(found->begin, NO_NUMBER, found->bytes);
  found->written_by_host = false;
  if (found->shadow) found->shadow.clear();
}

}  // namespace emulated
