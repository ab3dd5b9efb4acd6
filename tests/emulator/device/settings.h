// How launches run, as `tests.emulator.gpu` sets it.
#pragma once
#include <cstdint>

namespace emulated {

enum class Order : int { forward, reverse, random };

struct Settings {
  Order order = Order::random;
  uint64_t seed = 1;
  bool checked = false;   // kernels are compiled so that they report their accesses
  bool adverse = false;   // arithmetic is as inexact as NVIDIA allows
  bool deferred = false;  // a stream works as late as a device may, when somebody waits for it; otherwise at once
};
extern Settings settings;

void seed_random(uint64_t seed);
uint64_t random_bits();  // 53 of them

}  // namespace emulated
