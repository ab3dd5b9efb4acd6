#include "streams.h"

#include <deque>
#include <map>
#include <utility>

#include "settings.h"

namespace emulated {

static std::map<void *, std::deque<Step>> waiting;  // by stream
static void *captured_stream;
static Graph *captured;

int start(void *stream, Step step) {
  if (is_captured(stream)) {
    captured->push_back(std::move(step));
    return 0;
  }
  if (!settings.deferred) return step();
  waiting[stream].push_back(std::move(step));
  return 0;
}

int run_next(void *stream) {
  auto &steps = waiting[stream];
  if (steps.empty()) return NOTHING_LEFT;
  Step step = std::move(steps.front());
  steps.pop_front();
  return step();
}

int finish(void *stream) {
  int status = 0;
  for (int now; (now = run_next(stream)) != NOTHING_LEFT;)
    if (now) status = now;
  return status;
}

int finish_all() {
  int status = 0;
  for (auto &[stream, steps] : waiting)
    if (int now = finish(stream)) status = now;
  return status;
}

void capture(void *stream, Graph *graph) { captured_stream = stream, captured = graph; }

bool is_captured(void *stream) { return captured && stream == captured_stream; }

}  // namespace emulated

extern "C" int emulator_finish_all() { return emulated::finish_all(); }
