#include "accesses.h"

#include "../interface.h"
#include "device_memory.h"
#include "failure.h"
#include "fibers.h"
#include "settings.h"
#include "shared_memory.h"

namespace emulated {

// In the place of a thread's number: several threads, or any whose access is atomic.
constexpr uint16_t SEVERAL = 0xFFFF, ATOMIC = 0xFFFE;

static uint32_t now = BY_HOST, launch_began, block_began;

void begin_launch() { launch_began = ++now; }
void begin_block() { block_began = ++now; }
void pass_barrier() { ++now; }

enum class Kind { read, write };
static const char *word(Kind kind) { return kind == Kind::read ? "read" : "write"; }

struct Access {
  const uint8_t *address;
  size_t size;
  Kind kind;
  uint16_t thread;
  const void *from;  // the address to which the report returns
};

[[noreturn]] static void fail_at(const Access &access, const std::string &what) {
  fail("a %s of %zu bytes %s at %s", word(access.kind), access.size, what.c_str(), place_of(access.from).c_str());
}

[[noreturn]] static void fail_for_race(const Access &access, Kind other, uint32_t when, uint16_t thread) {
  std::string who = thread == SEVERAL  ? "several threads"
                    : thread == ATOMIC ? "an atomic access"
                                       : text("thread %u", thread);
  if (when < block_began) who += " of another block";
  fail_at(access, text("is a race with a %s by %s,", word(other), who.c_str()));
}

// `shared`: by all blocks of a launch, as global memory is.
static bool in_another_block(uint32_t when, bool shared) {
  return shared && when >= launch_began && when < block_began;
}

static void visit(Cell &cell, const Access &access, bool global, bool written_by_host) {
  bool both_atomic = access.thread == ATOMIC && cell.writer == ATOMIC;
  if ((cell.written == now && cell.writer != access.thread) ||
      (in_another_block(cell.written, global) && !both_atomic))
    fail_for_race(access, Kind::write, cell.written, cell.writer);
  if (access.kind == Kind::read) {
    // what is shared in a block is empty when the block begins
    if (cell.written < (global ? BY_HOST : block_began) && !written_by_host)
      fail_at(access, text("of %s memory that nobody has written", global ? "global" : "shared"));
    cell.reader = cell.read == now && cell.reader != access.thread ? SEVERAL : access.thread;
    cell.read = now;
    if (cell.first_read < launch_began) cell.first_read = now;
  } else {
    if (cell.read == now && cell.reader != access.thread) fail_for_race(access, Kind::read, cell.read, cell.reader);
    if (in_another_block(cell.first_read, global)) fail_for_race(access, Kind::read, cell.first_read, SEVERAL);
    cell.written = now, cell.writer = access.thread;
  }
}

static void visit_all(Shadow &shadow, size_t offset, const Access &access, bool global, bool written_by_host) {
  Cell *cell = shadow.begin(offset, access.size);
  for (Cell *end = shadow.end(offset, access.size); cell != end; ++cell) visit(*cell, access, global, written_by_host);
}

static void visit_shared(const Access &access) {
  SharedArray *array = shared_array_at(access.address);
  if (!array || access.address + access.size > array->begin + array->bytes)
    fail_at(access, "of shared memory outside of every array");
  visit_all(array->shadow, access.address - array->begin, access, false, false);
}

static void visit_global(const Access &access) {
  Allocation *allocation = allocation_at(access.address);
  if (!allocation || access.address + access.size > allocation->begin + allocation->bytes || allocation->on_host)
    fail_at(access, text("outside of every allocation (%s)", name_of_place(access.address).c_str()));
  visit_all(allocation->shadow, access.address - allocation->begin, access, true, allocation->written_by_host);
}

static inline void check(const void *address, size_t size, Kind kind, bool aligned, const void *from, bool atomic = false) {
  Access access{static_cast<const uint8_t *>(address), size, kind,
                atomic ? ATOMIC : static_cast<uint16_t>(current_thread), from};
  if (is_on_stacks(address)) {
    if (!is_on_own_stack(address)) fail_at(access, "of another thread's stack");
    return;
  }
  if (aligned && reinterpret_cast<uintptr_t>(address) % size) fail_at(access, "is misaligned");
  is_shared(address) ? visit_shared(access) : visit_global(access);
}

}  // namespace emulated

using namespace emulated;

extern "C" {

void emulator_atomic(void *place, size_t bytes) {
  if (settings.checked) check(place, bytes, Kind::write, true, __builtin_return_address(0), true);
}

// The calls that g++ makes of -fsanitize=thread, ahead of every access.
#define REPORTS(size)                                                                                            \
  void __tsan_read##size(void *p) { check(p, size, Kind::read, true, __builtin_return_address(0)); }             \
  void __tsan_write##size(void *p) { check(p, size, Kind::write, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##size(void *p) { check(p, size, Kind::read, false, __builtin_return_address(0)); }  \
  void __tsan_unaligned_write##size(void *p) { check(p, size, Kind::write, false, __builtin_return_address(0)); } \
  void __tsan_volatile_read##size(void *p) { check(p, size, Kind::read, true, __builtin_return_address(0)); }    \
  void __tsan_volatile_write##size(void *p) { check(p, size, Kind::write, true, __builtin_return_address(0)); }
REPORTS(1)
REPORTS(2)
REPORTS(4)
REPORTS(8)
REPORTS(16)
void __tsan_read_range(void *p, size_t n) { check(p, n, Kind::read, false, __builtin_return_address(0)); }
void __tsan_write_range(void *p, size_t n) { check(p, n, Kind::write, false, __builtin_return_address(0)); }
void __tsan_init(void) {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void) {}
// of `atomic_change`, which has reported itself
uint32_t __tsan_atomic32_load(const uint32_t *p, int) { return *p; }
void __tsan_atomic32_store(uint32_t *p, uint32_t value, int) { *p = value; }

// The calls of -fsanitize=undefined.
struct SourceLocation {
  const char *file;
  uint32_t line, column;
};
#define UNDEFINED(name) \
  void __ubsan_handle_##name(SourceLocation *at, ...) { fail("undefined in line %u: %s", at->line, #name); }
UNDEFINED(type_mismatch_v1)
UNDEFINED(add_overflow)
UNDEFINED(sub_overflow)
UNDEFINED(mul_overflow)
UNDEFINED(negate_overflow)
UNDEFINED(divrem_overflow)
UNDEFINED(shift_out_of_bounds)
UNDEFINED(out_of_bounds)
UNDEFINED(float_cast_overflow)
UNDEFINED(load_invalid_value)
}
