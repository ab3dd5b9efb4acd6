// Kernels, and their launches.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "../interface.h"
#include "shared_memory.h"
#include "status.h"

namespace emulated {

struct Kernel {
  std::string source;  // path of the rewritten source, without its suffix
  std::string name;
  std::map<bool, KernelRow> compiled{};  // by whether with checks
  size_t dynamic_shared_limit = STATIC_SHARED_LIMIT;  // which a driver's caller may raise

  const KernelRow *row();  // as settings want it, compiled now if it was not before; null with `error`
};

struct Launch {
  Kernel *kernel;
  Index3 grid, block;
  unsigned blocks_of_cluster;  // along x
  size_t dynamic_shared_bytes;
  std::vector<void *> arguments;

  Status run();
};

}  // namespace emulated
