#include "settings.h"

#include <bit>
#include <cmath>

#include "../interface.h"

namespace emulated {

Settings settings;
static uint64_t state = 1;

void seed_random(uint64_t seed) {
  state = seed | 1;
  for (int i = 0; i < 8; ++i) random_bits();
}

uint64_t random_bits() {  // xorshift64*
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state * 0x2545F4914F6CDD1Dull >> 11;
}

}  // namespace emulated

extern "C" float emulator_inexact(float result, unsigned ulps) {
  if (!emulated::settings.adverse || !std::isfinite(result) || result == 0) return result;
  unsigned moved = static_cast<unsigned>(emulated::random_bits() % (2 * ulps + 1)) - ulps;
  float found = std::bit_cast<float>(std::bit_cast<unsigned>(result) + moved);
  return std::isfinite(found) ? found : result;
}
