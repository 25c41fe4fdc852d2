// What the 32 threads of a warp do together. All of them must come to each of these.
#pragma once

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;

__device__ inline int lane_id() { return threadIdx.x % WARP; }
__device__ inline int warp_id() { return threadIdx.x / WARP; }

// In a fixed order, so that results repeat bit by bit.
__device__ inline float warp_sum(float x) {
  for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
  return x;
}

// The sum of this thread's x and those of the lanes before it.
__device__ inline int warp_inclusive_sum(int x) {
  for (int step = 1; step < WARP; step *= 2) {
    const int before = __shfl_up_sync(ALL, x, step);
    if (lane_id() >= step) x += before;
  }
  return x;
}

__device__ inline float minus_infinity() { return __uint_as_float(0xff800000u); }

// Unsigned numbers in the order of floats; zeros of either sign are equal.
__device__ inline unsigned in_order(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float from_order(unsigned rank) {
  return __uint_as_float(rank & 0x80000000u ? rank & 0x7fffffffu : ~rank);
}
