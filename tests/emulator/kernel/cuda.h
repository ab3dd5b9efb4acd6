// CUDA C++ for g++: what the source of a kernel needs of CUDA, in place of its headers.
//
// The standard library is left out as far as possible: parsing it would take several times as long as a kernel does.
#pragma once

#define __device__
#define __host__
#define __global__ __attribute__((noinline, noclone, visibility("hidden")))
#define __forceinline__ inline
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0

#include "../interface.h"
#include "threads.h"
#include "warp.h"
#include "vectors.h"
#include "mathematics.h"
#include "half.h"
#include "instructions.h"
