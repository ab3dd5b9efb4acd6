// What kernels that were compiled with checks report: each access, and what C++ does not define.
//
// An access must be aligned and inside of an array in shared memory, of an allocation or of the thread's own stack. Two
// accesses of the same bytes, one of them a write, are a race if they are by two threads of a block with no barrier in
// between, or by two blocks of a launch. Nothing is read that nobody has written.
#pragma once
#include <cstdint>

namespace emulated {

void begin_launch();
void begin_block();
void pass_barrier();

constexpr uint32_t BY_HOST = 1;  // the tick of what the host writes

}  // namespace emulated
