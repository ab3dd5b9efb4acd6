// The threads of a cluster of blocks as fibers, and the order in which they run.
//
// A fiber has a stack of its own and runs until it waits. Then another one that is ready runs: the first, the last, or a
// random one. A random order is, for half of the blocks, one in which a warp runs as far as it can, and for the others
// one in which every step may be another warp's.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulated {

constexpr unsigned WARP = 32, MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / WARP;

extern unsigned current_thread;
extern uint64_t switches;  // how often another fiber has gone on

void run_fibers(unsigned threads, void (*body)());  // returns when all have ended, or one has abandoned them
[[noreturn]] void abandon_fibers();

void make_ready(unsigned warp, uint32_t lanes);  // threads that wait
void make_ready(unsigned thread);
void make_all_ready(unsigned first, unsigned count);  // threads that wait, from the first of a warp on
void wait_for_turn();  // of the current thread, which is not ready unless it was made so

constexpr size_t STACK_BYTES = 256 << 10;
extern uint8_t *const stacks;  // of all threads, one behind the other

inline bool is_on_stacks(const void *address) {
  return static_cast<size_t>(static_cast<const uint8_t *>(address) - stacks) < STACK_BYTES * MAX_THREADS;
}
inline bool is_on_own_stack(const void *address) {
  return static_cast<size_t>(static_cast<const uint8_t *>(address) - stacks) / STACK_BYTES == current_thread;
}

}  // namespace emulated
