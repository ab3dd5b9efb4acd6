// Copies from global to shared memory that go on while their thread does: cp.async.
//
// When one happens is open, between its start and the wait for it: at once in the order `forward`, when it is waited for
// in the order `reverse`, and in a random order either.
#pragma once

namespace emulated {

void forget_copies();  // before a launch: those of one that failed
void end_copies();  // of the current thread, which has ended

}  // namespace emulated
