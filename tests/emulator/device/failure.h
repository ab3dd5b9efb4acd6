// What ends a launch with an error.
#pragma once
#include <string>

namespace emulated {

extern std::string error;  // of the last launch, or of what the driver was asked for; empty if there was none

// Text as printf makes it.
[[gnu::format(printf, 1, 2)]] std::string text(const char *format, ...);

// Ends the launch that runs, from one of its threads.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char *format, ...);

// Where a thread is, from the address to which a call returns; `tests.emulator.gpu` makes a line of it.
std::string place_of(const void *return_address);

}  // namespace emulated
