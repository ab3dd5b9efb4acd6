// CUDA's functions of numbers, and `max` and `min` as it overloads them.
#pragma once
#include "../interface.h"

// As far off as CUDA's manual allows (CUDA C++ Programming Guide, "Mathematical Functions": at most 2 ulp), but exact
// where the result is 0 or 1.
inline float cuda_expf(float x) { return x == 0 ? 1 : emulator_inexact(__builtin_expf(x), 2); }
inline float cuda_exp2f(float x) { return x == 0 ? 1 : emulator_inexact(__builtin_exp2f(x), 2); }
inline float cuda_cosf(float x) { return x == 0 ? 1 : emulator_inexact(__builtin_cosf(x), 2); }
inline float cuda_sinf(float x) { return x == 0 ? x : emulator_inexact(__builtin_sinf(x), 2); }
inline float cuda_logf(float x) { return x == 1 ? 0 : emulator_inexact(__builtin_logf(x), 1); }
#define expf cuda_expf
#define logf cuda_logf
#define exp2f cuda_exp2f
#define cosf cuda_cosf
#define sinf cuda_sinf
// rounded correctly
#define sqrtf __builtin_sqrtf
#define nearbyintf __builtin_nearbyintf
#define fabsf __builtin_fabsf

#define LARGER_AND_SMALLER(T)                      \
  inline T max(T a, T b) { return a > b ? a : b; } \
  inline T min(T a, T b) { return a < b ? a : b; }
LARGER_AND_SMALLER(int)
LARGER_AND_SMALLER(unsigned)
LARGER_AND_SMALLER(long)
LARGER_AND_SMALLER(unsigned long)
LARGER_AND_SMALLER(long long)
LARGER_AND_SMALLER(unsigned long long)
#undef LARGER_AND_SMALLER
// of a number and NaN, the number
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline float min(float a, float b) { return __builtin_fminf(a, b); }

// Byte i of the result is the one that digit i of the selector says, of the eight bytes of y and x.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= (bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return result;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
