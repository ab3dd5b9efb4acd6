// NVIDIA's runtime library, libcudart.so.13, as far as TVM and the project call it.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <utility>

#include "device_memory.h"
#include "failure.h"
#include "status.h"
#include "streams.h"

using namespace emulated;
using Clock = std::chrono::steady_clock;

enum : int { TO_DEVICE = 1, TO_HOST = 2, ON_DEVICE = 3 };  // of cudaMemcpyKind

struct Event {
  Clock::time_point time;
  void *stream = nullptr;
  int pending = 0;  // records that were started and are not done
};

static int last_error;
static Graph *being_captured;

static int keep(int status) {
  if (status) last_error = status;
  return status;
}

static int wait_for(const Event *event) {
  while (event->pending)
    if (int status = run_next(event->stream)) return status;
  return SUCCESS;
}

static bool is_pageable(const void *address) {
  const Allocation *found = allocation_at(address);
  return !found || !found->on_host;
}

extern "C" {

int cudaGetDeviceCount(int *count) { return *count = 1, SUCCESS; }
int cudaSetDevice(int) { return SUCCESS; }
int cudaGetDevice(int *device) { return *device = 0, SUCCESS; }
int cudaDeviceGetAttribute(int *value, int attribute, int) {
  switch (attribute) {  // of cudaDeviceAttr, those that TVM's list of a device's properties holds
    case 8: return *value = 48 << 10, SUCCESS;  // shared memory of a block
    case 10: return *value = 32, SUCCESS;       // threads of a warp
    case 16: return *value = 132, SUCCESS;      // multiprocessors
    case 75: return *value = 8, SUCCESS;        // capability, major
    case 76: return *value = 0, SUCCESS;        // and minor
    default: return *value = 1024, SUCCESS;     // such as threads of a block
  }
}
int cudaGetDeviceProperties(void *, int) { return NOT_SUPPORTED; }
const char *cudaGetErrorName(int) { return "cudaError"; }
const char *cudaGetErrorString(int status) {
  return status == LAUNCH_FAILED ? error.c_str() : status ? "an error of the emulator" : "no error";
}
int cudaGetLastError() { return std::exchange(last_error, SUCCESS); }
int cudaPeekAtLastError() { return last_error; }

int cudaMemGetInfo(size_t *free, size_t *total) { return *free = *total = size_t{16} << 30, SUCCESS; }
int cudaMalloc(void **place, size_t bytes) { return keep((*place = allocate(bytes, false)) ? SUCCESS : OUT_OF_MEMORY); }
int cudaMallocHost(void **place, size_t bytes) {
  return keep((*place = allocate(bytes, true)) ? SUCCESS : OUT_OF_MEMORY);
}
int cudaFree(void *place) {
  finish_all();
  return keep(!place || release(place) ? SUCCESS : INVALID_VALUE);
}
int cudaFreeHost(void *place) { return cudaFree(place); }

int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
  Step copy = [=] { return memcpy(to, from, bytes), mark_written_by_host(to, bytes), SUCCESS; };
  if ((kind != TO_DEVICE || !is_pageable(from)) && (kind != TO_HOST || !is_pageable(to))) return keep(start(stream, copy));
  if (is_captured(stream)) return keep(CAPTURE_UNSUPPORTED);
  finish(stream);  // memory that is not pinned is copied before the call returns
  return keep(copy());
}
int cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t bytes, void *stream) {
  return cudaMemcpyAsync(to, from, bytes, ON_DEVICE, stream);
}

int cudaStreamCreate(void **stream) {
  static intptr_t last = 0x100;
  return *stream = reinterpret_cast<void *>(++last), SUCCESS;
}
int cudaStreamCreateWithFlags(void **stream, unsigned) { return cudaStreamCreate(stream); }
int cudaStreamDestroy(void *stream) { return keep(finish(stream)); }
int cudaStreamSynchronize(void *stream) {
  if (is_captured(stream)) return keep(CAPTURE_UNSUPPORTED);
  keep(finish(stream));
  return last_error == LAUNCH_FAILED ? LAUNCH_FAILED : SUCCESS;
}
int cudaStreamWaitEvent(void *stream, void *event, unsigned) {
  return start(stream, [event] { return wait_for(static_cast<Event *>(event)); });
}

int cudaEventCreate(void **event) { return *event = new Event, SUCCESS; }
int cudaEventCreateWithFlags(void **event, unsigned) { return cudaEventCreate(event); }
int cudaEventDestroy(void *event) {
  wait_for(static_cast<Event *>(event));
  return delete static_cast<Event *>(event), SUCCESS;
}
int cudaEventRecord(void *handle, void *stream) {
  auto *event = static_cast<Event *>(handle);
  event->stream = stream;
  ++event->pending;
  return start(stream, [event] { return event->time = Clock::now(), --event->pending, SUCCESS; });
}
int cudaEventSynchronize(void *event) { return keep(wait_for(static_cast<Event *>(event))); }
int cudaEventElapsedTime(float *milliseconds, void *from, void *to) {
  auto took = static_cast<Event *>(to)->time - static_cast<Event *>(from)->time;
  return *milliseconds = std::max(1e-3f, std::chrono::duration<float, std::milli>(took).count()), SUCCESS;
}

int cudaStreamBeginCapture(void *stream, int) { return capture(stream, being_captured = new Graph), SUCCESS; }
int cudaStreamEndCapture(void *, void **graph) { return capture(nullptr, nullptr), *graph = being_captured, SUCCESS; }
int cudaGraphInstantiate(void **executable, void *graph, unsigned long long) {
  return *executable = new Graph(*static_cast<Graph *>(graph)), SUCCESS;
}
int cudaGraphDestroy(void *graph) { return delete static_cast<Graph *>(graph), SUCCESS; }
int cudaGraphExecDestroy(void *graph) { return finish_all(), delete static_cast<Graph *>(graph), SUCCESS; }
int cudaGraphLaunch(void *graph, void *stream) {
  for (auto &step : *static_cast<Graph *>(graph))
    if (int status = start(stream, step)) return keep(status);
  return SUCCESS;
}
}
