// Shuffles and votes of a warp.
#pragma once
#include "../interface.h"

namespace warp {

constexpr unsigned LANES = 32;

inline unsigned lane() {
  auto [thread, block, size, grid] = emulator_indices();
  return (thread.x + size.x * (thread.y + size.y * thread.z)) % LANES;
}

inline void meet(void *const *, uint32_t) {}

template <typename T>
T shuffle(uint32_t mask, T value, unsigned source, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  ShuffleOperands own{0, source};
  __builtin_memcpy(&own.value, &value, sizeof(T));
  emulator_warp(emulator_shuffle, mask, &own, line);
  __builtin_memcpy(&value, &own.value, sizeof(T));
  return value;
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

inline uint32_t vote(uint32_t mask, bool yes, int line) {
  VoteOperands own{yes, 0};
  emulator_warp(emulator_vote, mask, &own, line);
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
#define __syncwarp() emulator_warp(warp::meet, 0xFFFFFFFF, nullptr, __LINE__)
