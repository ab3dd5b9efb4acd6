// NVIDIA's driver, libcuda.so.1, as far as TVM and the project call it: one device, sm_80 unless it is told otherwise.
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <string>

#include "failure.h"
#include "launch.h"
#include "streams.h"

using namespace emulated;

constexpr char MARK[] = "emulated:";  // begins what stands for machine code; the path of a source follows
constexpr int CAPABILITY_MAJOR = 75;              // of CUdevice_attribute
constexpr int MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;  // of CUfunction_attribute
constexpr int CLUSTER_DIMENSION = 4;              // of CUlaunchAttributeID

struct Module {
  std::string source;
};
struct LaunchAttribute {  // CUlaunchAttribute
  int id, padding;
  union {
    Index3 cluster;  // of blocks
    char bytes[64];
  };
};
struct LaunchConfig {  // CUlaunchConfig
  Index3 grid, block;
  unsigned shared_bytes;
  void *stream;
  const LaunchAttribute *attributes;
  unsigned attribute_count;
};

static int capability_major = 8;

static unsigned blocks_of_cluster(const LaunchConfig &config) {
  for (unsigned i = 0; i < config.attribute_count; ++i)
    if (const LaunchAttribute &attribute = config.attributes[i]; attribute.id == CLUSTER_DIMENSION)
      return attribute.cluster.x;
  return 1;
}

extern "C" {

void emulator_set_capability(int major) { capability_major = major; }

int cuInit(unsigned) { return SUCCESS; }
int cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
int cuDeviceGetCount(int *count) { return *count = 1, SUCCESS; }
int cuDeviceGet(int *device, int index) { return *device = index, SUCCESS; }
int cuDeviceGetName(char *name, int size, int) { return snprintf(name, size, "an emulated GPU"), SUCCESS; }
int cuDeviceGetAttribute(int *value, int attribute, int) {
  return *value = attribute == CAPABILITY_MAJOR ? capability_major : 0, SUCCESS;
}
int cuDeviceTotalMem_v2(size_t *bytes, int) { return *bytes = size_t{16} << 30, SUCCESS; }
int cuGetErrorString(int, const char **text) { return *text = error.empty() ? "no error" : error.c_str(), SUCCESS; }
int cuGetErrorName(int status, const char **text) { return cuGetErrorString(status, text); }
int cuTensorMapEncodeTiled() { return NOT_SUPPORTED; }

int cuModuleLoadData(Module **module, const char *image) {
  if (strncmp(image, MARK, strlen(MARK))) {
    error = "machine code of a GPU, expected a kernel for the emulator";
    return INVALID_IMAGE;
  }
  *module = new Module{image + strlen(MARK)};
  return SUCCESS;
}
int cuModuleUnload(Module *module) { return delete module, SUCCESS; }

int cuModuleGetFunction(Kernel **kernel, Module *module, const char *name) {
  *kernel = new Kernel{module->source, name};  // for ever, as TVM keeps it
  return (*kernel)->row() ? SUCCESS : NOT_FOUND;
}

int cuFuncSetAttribute(Kernel *kernel, int attribute, int value) {
  if (attribute != MAX_DYNAMIC_SHARED_SIZE_BYTES) return SUCCESS;
  const KernelRow *row = kernel->row();
  if (!row || value < 0 || value > static_cast<int>(row->shared_limit)) return INVALID_VALUE;
  kernel->dynamic_shared_limit = value;
  return SUCCESS;
}

int cuLaunchKernelEx(const LaunchConfig *config, Kernel *kernel, void **parameters, void **) {
  const KernelRow *row = kernel->row();
  if (!row) return NOT_FOUND;
  if (config->shared_bytes > kernel->dynamic_shared_limit) {
    error = text("a launch with %u bytes of dynamic shared memory, but the kernel's limit is %zu", config->shared_bytes,
                 kernel->dynamic_shared_limit);
    return INVALID_VALUE;
  }
  Launch launch{kernel, config->grid, config->block, blocks_of_cluster(*config), config->shared_bytes, {}};
  for (unsigned i = 0; i < row->parameters; ++i) launch.arguments.push_back(*static_cast<void **>(parameters[i]));
  return start(config->stream, [launch]() mutable { return launch.run(); });
}
}
