"""Stand-ins for NVIDIA's libraries: a driver that answers queries as a given machine would, and a CUDA runtime."""

import ctypes
import subprocess
from pathlib import Path

SOURCE = """
#include <stddef.h>
#include <string.h>
int cuInit(unsigned flags) {{ return {status}; }}
int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}
int cuDeviceGetCount(int *count) {{ *count = {count}; return 0; }}
int cuDeviceGet(int *device, int index) {{ *device = index; return 0; }}
int cuDeviceGetName(char *name, int size, int device) {{ strncpy(name, "{name}", size); return 0; }}
int cuDeviceGetAttribute(int *value, int attribute, int device) \
{{ *value = attribute == 75 ? {major} : {minor}; return 0; }}
int cuDeviceTotalMem_v2(size_t *bytes, int device) {{ *bytes = {memory}; return 0; }}
int cuGetErrorString(int error, const char **text) {{ *text = "no device"; return 0; }}
"""
H200 = {
    "status": 0,
    "version": 13000,
    "count": 1,
    "name": "NVIDIA H200",
    "major": 9,
    "minor": 0,
    "memory": 150_000_000_000,
}


def stub_driver(folder: Path, **changes: object) -> str:
    """Path of a driver that answers as a machine with one H200 would, except for `changes`."""
    text, library = folder / "driver.c", folder / "libcuda-stub.so"
    text.write_text(SOURCE.format(**(H200 | changes)))
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, text], check=True)
    return str(library)


NVML = """
#include <string.h>
int nvmlInit_v2(void) {{ return 0; }}
int nvmlSystemGetDriverVersion(char *version, unsigned length) {{ return strncpy(version, "{version}", length) == 0; }}
"""


def stub_nvml(folder: Path, version: str) -> str:
    """Path of a management library of a machine whose driver has this version."""
    text, library = folder / "nvml.c", folder / "libnvidia-ml-stub.so"
    text.write_text(NVML.format(version=version))
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, text], check=True)
    return str(library)


RUNTIME = """
#include <stdlib.h>
#include <string.h>
typedef void (*Work)(void);
typedef struct {{ Work work; void *to; const void *from; size_t size; }} Item;  /* work, or a copy */
static Item *items = 0;
static size_t queued = 0, ended = 0, room = 0;
static int running = 0;
int launches = 0, capturing = 0, failing = 0;
void set_failing(int status) {{ failing = status; }}
int count_launches(void) {{ return launches; }}
int is_capturing(void) {{ return capturing; }}
static void run_until(size_t end) {{
    if (running) return;  /* called by an item's own work */
    running = 1;
    while (ended < end) {{
        Item item = items[ended++];
        if (item.work) item.work(); else memcpy(item.to, item.from, item.size);
    }}
    running = 0;
}}
void run_queued(void) {{ run_until(queued); }}
static int add(Item item) {{
    if (queued == room) items = realloc(items, (room = 2 * room + 64) * sizeof(Item));
    items[queued++] = item;
    return 0;
}}
int cudaStreamCreateWithFlags(void **stream, unsigned flags) {{ *stream = (void *)1; return failing; }}
int cudaStreamSynchronize(void *stream) {{ run_queued(); return 0; }}
int cudaMemGetInfo(size_t *free_, size_t *total) {{ *free_ = {free}; *total = {free}; return 0; }}
int cudaMallocHost(void **place, size_t size) \
{{ *place = aligned_alloc(64, (size + 63) / 64 * 64); return *place ? 0 : 2; }}
int cudaFreeHost(void *place) {{ free(place); return 0; }}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) \
{{ return add((Item){{0, to, from, size}}); }}
int cudaEventCreateWithFlags(size_t **event, unsigned flags) {{ *event = calloc(1, sizeof(size_t)); return 0; }}
int cudaEventRecord(size_t *event, void *stream) {{ *event = queued; return 0; }}
int cudaEventSynchronize(size_t *event) {{ run_until(*event); return 0; }}
int cudaEventElapsedTime(float *ms, void *start, void *end) {{ *ms = 3; return 0; }}
int cudaGraphExecDestroy(void *graph) {{ return 0; }}
int cudaEventDestroy(size_t *event) {{ free(event); return 0; }}
int cudaStreamBeginCapture(void *stream, int mode) {{ capturing = 1; return 0; }}
int cudaStreamEndCapture(void *stream, void **graph) {{ capturing = 0; *graph = (void *)3; return 0; }}
int cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags) \
{{ *executable = 0; return 0; }}
int cudaGraphDestroy(void *graph) {{ return 0; }}
int cudaGraphLaunch(Work graph, void *stream) {{ ++launches; return graph ? add((Item){{graph}}) : 0; }}
const char *cudaGetErrorString(int status) {{ return "no device"; }}
"""


def stub_runtime(folder: Path, free: int = 10**10) -> ctypes.CDLL:
    """A CUDA runtime whose device is this machine's own memory, and as late as a device can be.

    Copies and graphs wait in a queue until the host waits for the stream or for a mark behind them, so that whoever
    does not wait finds what was there before. A graph is a function to call, or null, which only counts as a launch.
    Kernels that are called directly run at once: whoever does so first calls `run_queued`.
    """
    text, library = folder / "runtime.c", folder / "libcudart-stub.so"
    text.write_text(RUNTIME.format(free=free))
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, text], check=True)
    return ctypes.CDLL(str(library))
