#include "async_copies.h"

#include <cstdint>
#include <cstring>
#include <deque>

#include "../interface.h"
#include "accesses.h"
#include "fibers.h"
#include "settings.h"
#include "shared_memory.h"

namespace emulated {

struct Copy {
  uint8_t *to;
  const void *from;
  size_t bytes;
  int line;
  bool done;

  void run() {
    memcpy(to, from, bytes);
    done = true;
  }
};

struct Copies {  // of one thread
  std::deque<Copy> started;
  std::deque<size_t> groups;  // sizes of those that were ended, the oldest first
  size_t in_last_group = 0;   // which has not been ended

  void end(size_t count) {
    for (; count; --count) {
      Copy &copy = started.front();
      if (!copy.done) copy.run();
      if (settings.checked) report_end_of_copy(copy.to, copy.from, copy.bytes, copy.line);
      started.pop_front();
    }
  }
};

static Copies of_thread[MAX_THREADS];

void forget_copies() {
  for (Copies &one : of_thread) one = {};
}

void end_copies() {
  Copies &own = of_thread[current_thread];
  if (own.started.empty() && own.groups.empty()) return;
  own.end(own.started.size());
  own = {};
}

static bool happens_at_once() {
  return settings.order == Order::forward || (settings.order == Order::random && random_bits() & 1);
}

}  // namespace emulated

using namespace emulated;

extern "C" void emulator_start_copy(uint32_t to, const void *from, size_t bytes, int line) {
  Copies &own = of_thread[current_thread];
  Copy copy{shared_memory_at(to, current_block()), from, bytes, line, false};
  if (settings.checked) report_start_of_copy(copy.to, from, bytes, line);
  if (happens_at_once()) copy.run();
  own.started.push_back(copy);
  ++own.in_last_group;
}

extern "C" void emulator_end_copy_group() {
  Copies &own = of_thread[current_thread];
  own.groups.push_back(own.in_last_group);
  own.in_last_group = 0;
}

extern "C" void emulator_wait_for_copies(unsigned groups_left) {
  Copies &own = of_thread[current_thread];
  while (own.groups.size() > groups_left) {
    own.end(own.groups.front());
    own.groups.pop_front();
  }
}
