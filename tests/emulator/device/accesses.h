// What kernels that were compiled with checks report: each access, and what C++ does not define.
//
// An access must be aligned and inside of an array in shared memory, of an allocation or of the thread's own stack. Two
// accesses of the same bytes, one of them a write, are a race if they are by two threads of a block with no barrier in
// between, or by two blocks of a launch. Nothing is read that nobody has written.
//
// What an asynchronous copy writes is nobody's from its start until its thread has waited for it, or, if the copy counts
// at an mbarrier, for each thread until that has waited there.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulated {

void begin_launch();
void begin_cluster();
void pass_barrier(unsigned first_thread, unsigned threads);  // of a block
void arrive_at_cluster_barrier(bool first);  // the current thread; `first` of all
void pass_cluster_barrier();

// By the emulator for a thread, in line `line` of the source; if `settings.checked`.
void report_start_of_copy(void *to, const void *from, size_t bytes, int line);
void report_end_of_copy(void *to, const void *from, size_t bytes, int line);
void report_read_by_warp(const void *address, size_t bytes, int line);  // of what all lanes get

// A copy that a thread starts for any who wait at an mbarrier: its number and its phase. It may be to another block.
void report_end_of_bulk_copy(void *to, const void *from, size_t bytes, int line, unsigned barrier, unsigned phase);
void report_wait_at_mbarrier(unsigned barrier, unsigned phase);  // by the current thread, which has seen that phase end

constexpr uint32_t BY_HOST = 1;  // the tick of what the host writes

}  // namespace emulated
