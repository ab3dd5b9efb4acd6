"""Checks that a machine can run an artifact of each target: host memory, or a driver, a GPU and its memory."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from runtime.artifact.manifest import Manifest
from runtime.artifact.targets import TARGETS
from runtime.engines.cuda_driver import OLDEST_DRIVER, check_driver, read_driver, version_text
from runtime.engines.finding import AS_IT_SAYS, Finding, answer
from runtime.engines.loaded_artifact import SMALLER, device_bytes
from runtime.engines.tvm_runtime import find_library
from runtime.errors import UserError


def examine_host(manifest: Manifest) -> Iterator[Finding]:
    """The host's memory.

    Weights are mapped files, which the kernel may drop and read again: too little memory makes decoding slow, and a
    process whose caches do not fit is killed.
    """
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    needed = device_bytes(manifest)
    remedy = "" if available >= needed else f"free memory, or {SMALLER}"
    yield Finding(
        "memory", f"{available / 1e9:,.1f} GB available", f"{needed / 1e9:,.1f} GB: weights, caches, workspace", remedy
    )


def examine_cuda(manifest: Manifest) -> Iterator[Finding]:
    """The driver, the libraries that a GPU needs, the GPU itself and its memory."""
    try:
        driver = read_driver()
        device = check_driver(driver, manifest.target.arch)
    except UserError as error:
        yield Finding("CUDA", str(error), f"a driver and a GPU of {', '.join(manifest.target.arch)}", AS_IT_SAYS)
        return
    for name in TARGETS[manifest.target.kind].libraries:
        yield answer(name, "found", partial(_place, name), "copy the shipped runtime folder again")
    yield Finding("CUDA driver", f"CUDA {version_text(driver.version)}", f"CUDA {version_text(OLDEST_DRIVER)} or newer")
    yield Finding("GPU", "{}, sm_{}{}".format(device.name, *device.capability), ", ".join(manifest.target.arch))
    needed = device_bytes(manifest)
    remedy = "" if device.memory >= needed else f"use a larger GPU, or {SMALLER}"
    yield Finding(
        "GPU memory", f"{device.memory / 1e9:,.1f} GB", f"{needed / 1e9:,.1f} GB: weights, caches, workspace", remedy
    )


def _place(library: str) -> str:
    return str(find_library(library))
