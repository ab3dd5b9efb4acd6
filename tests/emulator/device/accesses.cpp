#include "accesses.h"

#include <cstring>

#include "../interface.h"
#include "device_memory.h"
#include "failure.h"
#include "fibers.h"
#include "mbarriers.h"
#include "settings.h"
#include "shared_memory.h"

namespace emulated {

// In the place of a thread's number: several threads, or any whose access is atomic.
constexpr uint16_t SEVERAL = 0xFFFF, ATOMIC = 0xFFFE;

// In the place of a tick: what an asynchronous copy is writing, and, from LANDED on, what one has written that counted
// at an mbarrier, with the barrier's number and phase.
constexpr uint32_t IN_FLIGHT = 0xFFFFFFFF, LANDED = 0xF0000000;
constexpr unsigned PHASE_BITS = 16;

static uint32_t now = BY_HOST, launch_began, cluster_began, cluster_arrives;

// A thread's accesses are of tick `own`. It may rely on those of others that are of an earlier tick than `seen`. Only
// between a thread's arrival at the cluster's barrier and its wait do the two differ.
struct Ticks {
  uint32_t own, seen;
};
static Ticks ticks[MAX_THREADS];

constexpr unsigned MAX_MBARRIERS = 64;
static uint32_t phases_seen[MAX_THREADS][MAX_MBARRIERS];  // at each mbarrier: how many phases a thread has seen end

void begin_launch() { launch_began = ++now; }
void begin_cluster() {
  cluster_began = ++now;
  for (Ticks &thread : ticks) thread = {now, now};
  if (had_mbarriers()) memset(phases_seen, 0, sizeof phases_seen);
}
void pass_barrier(unsigned first, unsigned threads) {
  ++now;
  for (Ticks *thread = ticks + first; thread != ticks + first + threads; ++thread) {
    if (thread->own != thread->seen) fail("comes to a barrier between arriving and waiting at that of the cluster");
    *thread = {now, now};
  }
}
void arrive_at_cluster_barrier(bool first) {
  if (first) cluster_arrives = ++now;
  ticks[current_thread].own = cluster_arrives;
}
void pass_cluster_barrier() { ticks[current_thread].seen = ticks[current_thread].own; }

enum class Kind { read, write };
static const char *word(Kind kind) { return kind == Kind::read ? "read" : "write"; }

struct Access {
  const uint8_t *address;
  size_t size;
  Kind kind;
  uint16_t thread;
  const void *from;  // the address to which the report returns, or null where there is a
  int line;
};

[[noreturn]] static void fail_at(const Access &access, const std::string &what) {
  std::string place = access.from ? place_of(access.from) : text("line %d", access.line);
  fail("a %s of %zu bytes %s at %s", word(access.kind), access.size, what.c_str(), place.c_str());
}

[[noreturn]] static void fail_for_race(const Access &access, Kind other, uint32_t when, uint16_t thread) {
  std::string who = thread == SEVERAL  ? "several threads"
                    : thread == ATOMIC ? "an atomic access"
                                       : text("thread %u", thread);
  if (when < cluster_began) who += " of another block";
  fail_at(access, text("is a race with a %s by %s,", word(other), who.c_str()));
}

// `shared`: by all blocks of a launch, as global memory is.
static bool in_another_cluster(uint32_t when, bool shared) {
  return shared && when >= launch_began && when < cluster_began;
}

static void fail_unless_waited(const Access &access, const Cell &cell) {
  unsigned barrier = (cell.written - LANDED) >> PHASE_BITS, phase = cell.written & ((1u << PHASE_BITS) - 1);
  if (phases_seen[current_thread][barrier] <= phase)
    fail_at(access, "is a race with an asynchronous copy, for which this thread has not waited,");
}

static void visit(Cell &cell, const Access &access, bool global, bool written_by_host) {
  if (cell.written == IN_FLIGHT)
    fail_at(access, text("is a race with an asynchronous copy by thread %u, which has not waited for it,", cell.writer));
  bool both_atomic = access.thread == ATOMIC && cell.writer == ATOMIC, landed = cell.written >= LANDED;
  auto [own, seen] = ticks[current_thread];
  if (landed) {
    if (access.kind == Kind::read) fail_unless_waited(access, cell);
  } else if ((cell.written >= seen && cell.writer != access.thread) ||
             (in_another_cluster(cell.written, global) && !both_atomic)) {
    fail_for_race(access, Kind::write, cell.written, cell.writer);
  }
  if (access.kind == Kind::read) {
    // what is shared in a block is empty when the block begins
    if (cell.written < (global ? BY_HOST : cluster_began) && !written_by_host)
      fail_at(access, text("of %s memory that nobody has written", global ? "global" : "shared"));
    cell.reader = cell.read >= seen && cell.reader != access.thread ? SEVERAL : access.thread;
    cell.read = cell.read > own ? cell.read : own;
    if (cell.first_read < launch_began) cell.first_read = own;
  } else {
    if (cell.read >= seen && cell.reader != access.thread) fail_for_race(access, Kind::read, cell.read, cell.reader);
    if (in_another_cluster(cell.first_read, global)) fail_for_race(access, Kind::read, cell.first_read, SEVERAL);
    cell.written = own, cell.writer = access.thread;
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

static inline void check(const Access &access, bool aligned) {
  if (is_on_stacks(access.address)) {
    if (!is_on_own_stack(access.address)) fail_at(access, "of another thread's stack");
    return;
  }
  if (aligned && reinterpret_cast<uintptr_t>(access.address) % access.size) fail_at(access, "is misaligned");
  is_shared(access.address) ? visit_shared(access) : visit_global(access);
}

static Access own_access(const void *address, size_t size, Kind kind, const void *from, int line = 0) {
  return {static_cast<const uint8_t *>(address), size, kind, static_cast<uint16_t>(current_thread), from, line};
}

// What the calls below report, made by a kernel.
static inline void check(const void *address, size_t size, Kind kind, bool aligned, const void *from) {
  check(own_access(address, size, kind, from), aligned);
}

static void mark_written(const void *address, size_t size, uint32_t when) {
  SharedArray *array = shared_array_at(address);
  size_t offset = static_cast<const uint8_t *>(address) - array->begin;
  Cell *cell = array->shadow.begin(offset, size);
  for (Cell *end = array->shadow.end(offset, size); cell != end; ++cell) cell->written = when;
}

void report_start_of_copy(void *to, const void *from, size_t bytes, int line) {
  check(own_access(from, bytes, Kind::read, nullptr, line), false);
  check(own_access(to, bytes, Kind::write, nullptr, line), false);
  mark_written(to, bytes, IN_FLIGHT);
}

void report_end_of_copy(void *to, const void *from, size_t bytes, int line) {
  check(own_access(from, bytes, Kind::read, nullptr, line), false);
  mark_written(to, bytes, ticks[current_thread].own);
}

void report_end_of_bulk_copy(void *to, const void *from, size_t bytes, int line, unsigned barrier, unsigned phase) {
  check(own_access(from, bytes, Kind::read, nullptr, line), false);
  mark_written(to, bytes, LANDED + (barrier << PHASE_BITS) + (phase & ((1u << PHASE_BITS) - 1)));
}

void report_wait_at_mbarrier(unsigned barrier, unsigned phase) { phases_seen[current_thread][barrier] = phase + 1; }

void report_read_by_warp(const void *address, size_t bytes, int line) {
  check({static_cast<const uint8_t *>(address), bytes, Kind::read, SEVERAL, nullptr, line}, false);
}

}  // namespace emulated

using namespace emulated;

extern "C" {

void emulator_atomic(void *place, size_t bytes) {
  Access access = own_access(place, bytes, Kind::write, __builtin_return_address(0));
  access.thread = ATOMIC;
  if (settings.checked) check(access, true);
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
UNDEFINED(out_of_bounds)
UNDEFINED(divrem_overflow)
UNDEFINED(float_cast_overflow)
}
