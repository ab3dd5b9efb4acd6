#include "failure.h"

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>

#include "block.h"
#include "fibers.h"

namespace emulated {

std::string error;

static std::string formatted(const char *format, va_list arguments) {
  char buffer[1024];
  vsnprintf(buffer, sizeof buffer, format, arguments);
  return buffer;
}

std::string text(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string found = formatted(format, arguments);
  va_end(arguments);
  return found;
}

void fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  error = name_of_thread(current_thread) + ": " + formatted(format, arguments);
  va_end(arguments);
  abandon_fibers();
}

std::string place_of(const void *return_address) {
  Dl_info info;
  if (!dladdr(return_address, &info) || !info.dli_fname) return "an unknown place";
  // one byte back, so that it is in the call and not behind it
  size_t offset = static_cast<const char *>(return_address) - static_cast<const char *>(info.dli_fbase) - 1;
  return text("%s+0x%zx", info.dli_fname, offset);
}

}  // namespace emulated
