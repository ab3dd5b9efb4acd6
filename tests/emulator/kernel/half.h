// float16. Conversions are the processor's (F16C), rounded to nearest, ties to even.
#pragma once
#include "mathematics.h"

namespace half_bits {

using Shorts = short __attribute__((vector_size(16)));
using Floats = float __attribute__((vector_size(16)));

inline unsigned short of(float x) {
  return static_cast<unsigned short>(__builtin_ia32_vcvtps2ph(Floats{x}, /* to nearest */ 0)[0]);
}
inline float number(unsigned short bits) { return __builtin_ia32_vcvtph2ps(Shorts{static_cast<short>(bits)})[0]; }

}  // namespace half_bits

// No arithmetic, which would round as CUDA's does only by chance: a source that needs it does not compile.
struct __half {
  unsigned short bits;
  __half() = default;
  explicit __half(float x) : bits(half_bits::of(x)) {}
  explicit __half(int x) : __half(static_cast<float>(x)) {}
  explicit __half(double x) = delete;  // would be rounded twice
  explicit operator float() const { return half_bits::number(bits); }
};
using half = __half;

inline float __half2float(__half x) { return float(x); }
inline __half __float2half(float x) { return __half(x); }
inline bool __hgt(__half a, __half b) { return float(a) > float(b); }
inline bool __hlt(__half a, __half b) { return float(a) < float(b); }

namespace half_arithmetic {

// Sums and products of two float16 may be rounded to float32 first: with 2 x 11 + 2 bits, rounding twice is rounding
// once (Figueroa 1995, "When is double rounding innocuous?").
inline __half difference(__half a, __half b) { return __half(float(a) - float(b)); }
inline __half product(__half a, __half b) { return __half(float(a) * float(b)); }

// a b + c, rounded once. a b is exact in float32. The sum with c is rounded to odd there: to whichever neighbour has an
// odd last bit, which rounding to float16 cannot take for a tie (Boldo and Melquiond 2008, "Emulation of FMA and
// correctly rounded sums").
inline __half product_and_sum(__half a, __half b, __half c) {
  float exact = float(a) * float(b), addend = float(c), sum = exact + addend;
  float part = sum - exact, lost = (exact - (sum - part)) + (addend - part);  // Knuth's two-sum
  unsigned bits = __builtin_bit_cast(unsigned, sum);
  if (__builtin_isfinite(sum) && lost != 0 && !(bits & 1))
    bits += (lost > 0) == (sum > 0) ? 1 : -1;  // away from zero, or towards it
  return __half(__builtin_bit_cast(float, bits));
}

}  // namespace half_arithmetic

struct alignas(4) __half2 {
  __half x, y;
};
using half2 = __half2;

inline __half2 __hsub2(__half2 a, __half2 b) {
  return {half_arithmetic::difference(a.x, b.x), half_arithmetic::difference(a.y, b.y)};
}
inline __half2 __hmul2(__half2 a, __half2 b) {
  return {half_arithmetic::product(a.x, b.x), half_arithmetic::product(a.y, b.y)};
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {half_arithmetic::product_and_sum(a.x, b.x, c.x), half_arithmetic::product_and_sum(a.y, b.y, c.y)};
}
