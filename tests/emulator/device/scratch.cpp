// What TVM's host code allocates for a kernel that is several launches, in allocations of its exact size, each of which
// begins as no numbers. TVM's own pool deals out whole pages, which keep what was in them.
#include <dlfcn.h>

#include <cstdint>
#include <map>
#include <vector>

#include "device_memory.h"

using namespace emulated;

constexpr int CUDA = 2;  // DLDeviceType

static std::map<uint64_t, std::vector<void *>> unused;  // by size
static std::map<void *, uint64_t> sizes;

extern "C" void *emulator_scratch(int device_type, int device, uint64_t bytes, int code, int bits) {
  if (device_type != CUDA) {
    static auto of_tvm = reinterpret_cast<decltype(emulator_scratch) *>(dlsym(RTLD_DEFAULT, "TVMBackendAllocWorkspace"));
    return of_tvm(device_type, device, bytes, code, bits);
  }
  auto &places = unused[bytes];
  if (places.empty()) {
    void *place = allocate(bytes, false);
    sizes[place] = bytes;
    return place;
  }
  void *place = places.back();
  places.pop_back();
  empty(place);
  return place;
}

extern "C" int emulator_scratch_end(int device_type, int device, void *place) {
  if (device_type != CUDA) {
    static auto of_tvm =
        reinterpret_cast<decltype(emulator_scratch_end) *>(dlsym(RTLD_DEFAULT, "TVMBackendFreeWorkspace"));
    return of_tvm(device_type, device, place);
  }
  unused[sizes.at(place)].push_back(place);
  return 0;
}

// When none is used: those that were allocated without checks have no shadow.
extern "C" void emulator_drop_scratch() {
  for (auto &[bytes, places] : unused)
    for (void *place : places) {
      sizes.erase(place);
      release(place);
    }
  unused.clear();
}
