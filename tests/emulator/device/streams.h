// Streams: what was started on each and is not yet done, and the graph that one of them is captured into.
#pragma once
#include <functional>
#include <vector>

namespace emulated {

using Step = std::function<int()>;  // a status of CUDA's
using Graph = std::vector<Step>;

constexpr int NOTHING_LEFT = -1;

int start(void *stream, Step step);  // at once, unless work is deferred or the stream is captured
int run_next(void *stream);          // what was started first and is not done, or NOTHING_LEFT
int finish(void *stream);
int finish_all();

void capture(void *stream, Graph *graph);  // what is started from now on; null ends it
bool is_captured(void *stream);

}  // namespace emulated
