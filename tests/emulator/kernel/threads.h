// The threads of a block: who they are, the memory that they share, barriers and atomics.
#pragma once
#include "../interface.h"

// Begins the body of a kernel.
#define ENTER_KERNEL() [[maybe_unused]] const auto [threadIdx, blockIdx, blockDim, gridDim] = emulator_indices()

// `__shared__ type name[count]`: all threads of a block get the same array.
#define SHARED_ARRAY(type, name, count, alignment) \
  type(&name)[count] = *reinterpret_cast<type(*)[count]>(emulator_shared(sizeof(type) * (count), alignment, __LINE__))

// `extern __shared__ type name[]`
#define DYNAMIC_SHARED_ARRAY(type, name, alignment) \
  type *name = static_cast<type *>(emulator_dynamic_shared(alignment, __LINE__))

#define __cvta_generic_to_shared(place) emulator_address_in_shared(place)

#define __syncthreads() emulator_barrier(__LINE__)

template <typename T, typename Change>
T atomic_change(T *place, Change change) {
  emulator_atomic(place, sizeof(T));
  T before = __atomic_load_n(place, __ATOMIC_RELAXED);
  __atomic_store_n(place, change(before), __ATOMIC_RELAXED);  // no other thread runs in between
  return before;
}
#define atomicAdd(place, value) atomic_change(place, [&](auto before) { return before + (value); })
