#include "fibers.h"

#include <sys/mman.h>

#include <cstdlib>

#include "block.h"
#include "settings.h"

// Saves the registers that a call preserves on the current stack, whose top goes to *save, and continues on another one.
extern "C" void emulator_switch(void **save, void *load);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch,.-emulator_switch
)");

namespace emulated {

constexpr int SAVED_REGISTERS = 6;

unsigned current_thread;
uint64_t switches;

static unsigned threads, ended;
static void (*body)();
static void *tops[MAX_THREADS], *outside;  // of the stacks of fibers that wait, and of the one that runs all
static uint32_t ready[MAX_WARPS], warps_with_ready;
static bool warp_by_warp;

uint8_t *const stacks = static_cast<uint8_t *>(mmap(nullptr, STACK_BYTES * MAX_THREADS, PROT_READ | PROT_WRITE,
                                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));

void make_ready(unsigned warp, uint32_t lanes) {
  ready[warp] |= lanes;
  warps_with_ready |= 1u << warp;
}

void make_ready(unsigned thread) { make_ready(thread / WARP, 1u << thread % WARP); }

void make_all_ready(unsigned first, unsigned count) {
  for (; count; first += WARP, count -= count < WARP ? count : WARP)
    make_ready(first / WARP, count >= WARP ? ~0u : (1u << count) - 1);
}

static unsigned first_of(uint32_t bits) { return static_cast<unsigned>(__builtin_ctz(bits)); }
static unsigned last_of(uint32_t bits) { return 31u - static_cast<unsigned>(__builtin_clz(bits)); }
static unsigned first_from(uint32_t bits, unsigned start) {  // around the end
  uint32_t above = bits & (~0u << start);
  return first_of(above ? above : bits);
}

static unsigned random_ready_thread() {
  uint64_t random = random_bits();
  unsigned warp = current_thread / WARP;
  if (!warp_by_warp || !(warps_with_ready >> warp & 1)) warp = first_from(warps_with_ready, random % 32);
  return warp * WARP + first_from(ready[warp], random / 32 % 32);
}

static unsigned ready_thread() {
  if (settings.order == Order::random) return random_ready_thread();
  auto choose = settings.order == Order::forward ? first_of : last_of;
  unsigned warp = choose(warps_with_ready);
  return warp * WARP + choose(ready[warp]);
}

// The thread that runs next, which is no longer ready; one must be.
static unsigned next_thread() {
  unsigned next = ready_thread(), warp = next / WARP;
  ready[warp] &= ~(1u << next % WARP);
  if (!ready[warp]) warps_with_ready &= ~(1u << warp);
  return next;
}

void wait_for_turn() {
  if (!warps_with_ready) fail_because_all_wait();
  unsigned self = current_thread, next = next_thread();
  if (next == self) return;
  current_thread = next;
  ++switches;
  emulator_switch(&tops[self], tops[next]);
}

void abandon_fibers() {
  void *dropped;
  emulator_switch(&dropped, outside);
  abort();
}

static void run_fiber() {
  body();
  if (++ended == threads) abandon_fibers();
  wait_for_turn();  // for ever: nobody makes it ready
  abort();
}

// A stack on which `emulator_switch` finds registers and returns to `run_fiber`, as if that had been called: it is then
// 8 bytes off a multiple of 16.
static void *fresh_stack(unsigned thread) {
  auto **top = reinterpret_cast<void **>(stacks + (thread + 1) * STACK_BYTES) - 4;
  *--top = nullptr;
  *--top = reinterpret_cast<void *>(run_fiber);
  for (int i = 0; i < SAVED_REGISTERS; ++i) *--top = nullptr;
  return top;
}

void run_fibers(unsigned count, void (*run)()) {
  threads = count, body = run, ended = 0;
  for (uint32_t &lanes : ready) lanes = 0;
  warps_with_ready = 0;
  warp_by_warp = random_bits() & 1;
  for (unsigned thread = 0; thread < threads; ++thread) tops[thread] = fresh_stack(thread);
  make_all_ready(0, threads);
  current_thread = 0;
  current_thread = next_thread();
  emulator_switch(&outside, tops[current_thread]);
}

}  // namespace emulated
