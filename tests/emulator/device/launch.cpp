#include "launch.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <numeric>

#include "block.h"
#include "device_memory.h"
#include "failure.h"
#include "fibers.h"
#include "settings.h"

namespace emulated {

using Clock = std::chrono::steady_clock;
using Compiler = int (*)(const char *source, int checked);

static Compiler compiler;
static uint64_t launches;
static std::map<std::string, double> seconds;  // by kernel

const KernelRow *Kernel::row() {
  auto found = compiled.find(settings.checked);
  if (found != compiled.end()) return &found->second;
  std::string path = source + (settings.checked ? ".checked.so" : ".fast.so");
  if (access(path.c_str(), R_OK) != 0 && compiler(source.c_str(), settings.checked)) {
    error = "g++ cannot compile " + source + ".cpp";
    return nullptr;
  }
  void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    error = dlerror();
    return nullptr;
  }
  for (auto *row = static_cast<KernelRow *>(dlsym(library, "emulator_kernels")); row && row->name; ++row)
    if (name == row->name) return &(compiled[settings.checked] = *row);
  error = path + " has no kernel " + name;
  return nullptr;
}

// The numbers of all clusters, in the order in which they run.
static std::vector<uint64_t> order_of_clusters(uint64_t count) {
  std::vector<uint64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (settings.order == Order::reverse) std::reverse(order.begin(), order.end());
  if (settings.order == Order::random)
    for (uint64_t i = count; i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
  return order;
}

static void run_clusters(const Index3 &grid, unsigned blocks) {
  unsigned columns = grid.x / blocks;
  for (uint64_t i : order_of_clusters(uint64_t{columns} * grid.y * grid.z)) {
    auto column = static_cast<unsigned>(i % columns), rest = static_cast<unsigned>(i / columns);
    run_cluster({column * blocks, rest % grid.y, rest / grid.y});
    if (!error.empty()) return;
  }
  if (const Allocation *found = allocation_written_behind())
    error = text("something was written behind an allocation of %zu bytes", found->bytes);
}

Status Launch::run() {
  const KernelRow *row = kernel->row();
  if (!row) return NOT_FOUND;
  unsigned threads = threads_of(block);
  if (!threads || threads > row->max_threads) {
    error = text("%s: launched with %u threads, but its launch bounds are %u", row->name, threads, row->max_threads);
    return LAUNCH_OUT_OF_RESOURCES;
  }
  if (blocks_of_cluster > MAX_BLOCKS || threads * blocks_of_cluster > MAX_THREADS || grid.x % blocks_of_cluster) {
    error = text("%s: %u blocks along x in clusters of %u", row->name, grid.x, blocks_of_cluster);
    return INVALID_VALUE;
  }
  auto start = Clock::now();
  error.clear();
  seed_random(settings.seed * 0x9E3779B97F4A7C15ull + ++launches);
  begin_kernel(*row, arguments.data(), block, grid, blocks_of_cluster, dynamic_shared_bytes);
  run_clusters(grid, blocks_of_cluster);
  seconds[row->name] += std::chrono::duration<double>(Clock::now() - start).count();
  return error.empty() ? SUCCESS : LAUNCH_FAILED;
}

}  // namespace emulated

using namespace emulated;

extern "C" {

void emulator_set(int order, uint64_t seed, int checked, int adverse, int deferred) {
  settings = {static_cast<Order>(order), seed, checked != 0, adverse != 0, deferred != 0};
  launches = 0;
}

void emulator_set_compiler(Compiler function) { compiler = function; }

const char *emulator_error() { return error.c_str(); }

// Counters and the seconds of each kernel since the last call, a line each: name and number.
const char *emulator_report() {
  static std::string report;
  report = text("launches %lu\nblocks %lu\nbarriers %lu\nwarp_operations %lu\nswitches %lu\n", launches, counts.blocks,
                counts.barriers, counts.warp_operations, switches);
  for (auto &[name, spent] : seconds) report += text("seconds:%s %f\n", name.c_str(), spent);
  launches = 0, counts = {}, switches = 0;
  seconds.clear();
  return report.c_str();
}

// A launch without TVM, of a kernel with one dimension of blocks and threads.
int emulator_launch(const char *source, const char *name, unsigned blocks, unsigned blocks_of_cluster, unsigned threads,
                    void **arguments, unsigned count) {
  Kernel kernel{source, name};
  std::vector values(arguments, arguments + count);
  return Launch{&kernel, {blocks, 1, 1}, {threads, 1, 1}, blocks_of_cluster, 0, values}.run();
}
}
