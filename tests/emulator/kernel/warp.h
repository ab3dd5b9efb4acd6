// Shuffles and votes of a warp.
#pragma once
#include "../interface.h"

namespace warp {

constexpr unsigned LANES = 32;

inline unsigned lane() {
  auto [thread, block, size, grid] = emulator_indices();
  return (thread.x + size.x * (thread.y + size.y * thread.z)) % LANES;
}

template <typename T>
struct Shuffled {
  T value, received;
  unsigned source;
};

template <typename T>
void exchange(void *const *lanes, uint32_t mask) {
  for (unsigned i = 0; i < LANES; ++i)
    if (mask >> i & 1) {
      auto *own = static_cast<Shuffled<T> *>(lanes[i]);
      if (!(mask >> own->source & 1)) emulator_fail("a lane shuffles from one that takes no part");
      own->received = static_cast<Shuffled<T> *>(lanes[own->source])->value;
    }
}

template <typename T>
T shuffle(uint32_t mask, T value, unsigned source, int line) {
  Shuffled<T> own{value, {}, source};
  emulator_warp(exchange<T>, mask, &own, line);
  return own.received;
}

// The lanes that shfl.sync reads, by the PTX manual: a lane's own where the other is not in its segment of `width` lanes.
inline unsigned lane_xor(int distance, int width) {
  int own = lane(), other = own ^ distance;
  return other <= (own | (width - 1)) ? other : own;
}
inline unsigned lane_down(int distance, int width) {
  int own = lane(), other = own + distance;
  return other <= (own | (width - 1)) ? other : own;
}
inline unsigned lane_up(int distance, int width) {
  int own = lane(), other = own - distance;
  return other >= (own & ~(width - 1)) ? other : own;
}
inline unsigned lane_at(int index, int width) { return (lane() & ~(width - 1)) | (index & (width - 1)); }

struct Vote {
  bool yes;
  uint32_t ballot;
};

inline void count_votes(void *const *lanes, uint32_t mask) {
  uint32_t ballot = 0;
  for (unsigned i = 0; i < LANES; ++i)
    if (mask >> i & 1 && static_cast<Vote *>(lanes[i])->yes) ballot |= 1u << i;
  for (unsigned i = 0; i < LANES; ++i)
    if (mask >> i & 1) static_cast<Vote *>(lanes[i])->ballot = ballot;
}

inline uint32_t vote(uint32_t mask, bool yes, int line) {
  Vote own{yes, 0};
  emulator_warp(count_votes, mask, &own, line);
  return own.ballot;
}

}  // namespace warp

#define __shfl_xor_sync(mask, value, distance, width) \
  warp::shuffle(mask, value, warp::lane_xor(distance, width), __LINE__)
#define __shfl_down_sync(mask, value, distance, width) \
  warp::shuffle(mask, value, warp::lane_down(distance, width), __LINE__)
#define __shfl_up_sync(mask, value, distance, width) \
  warp::shuffle(mask, value, warp::lane_up(distance, width), __LINE__)
#define __shfl_sync(mask, value, index, width) warp::shuffle(mask, value, warp::lane_at(index, width), __LINE__)
#define __ballot_sync(mask, yes) warp::vote(mask, yes, __LINE__)
