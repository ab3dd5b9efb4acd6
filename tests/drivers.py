"""Stand-ins for NVIDIA's driver: libraries that answer the driver's questions as a given machine would."""

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
int cuDeviceGetAttribute(int *value, int attribute, int device) {{ *value = attribute == 75 ? {major} : {minor}; return 0; }}
int cuDeviceTotalMem_v2(size_t *bytes, int device) {{ *bytes = {memory}; return 0; }}
int cuGetErrorString(int error, const char **text) {{ *text = "no device"; return 0; }}
"""
H200 = {"status": 0, "version": 13000, "count": 1, "name": "NVIDIA H200", "major": 9, "minor": 0, "memory": 150_000_000_000}


def stub_driver(folder: Path, **changes: object) -> str:
    """The path of a driver that answers as one H200 would, but for `changes`."""
    text, library = folder / "driver.c", folder / "libcuda-stub.so"
    text.write_text(SOURCE.format(**(H200 | changes)))
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, text], check=True)
    return str(library)
