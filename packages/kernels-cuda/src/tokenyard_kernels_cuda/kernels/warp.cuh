// Warp-wide functions. All 32 threads of the warp must call each of those that shuffle or reduce.
#pragma once

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;  // mask of all lanes

__device__ inline int lane_id() { return threadIdx.x % WARP; }
__device__ inline int warp_id() { return threadIdx.x / WARP; }

// Wait until the launch before has ended, and let the launch after this one begin (programmatic
// dependent launch, from compute capability 9.0 on). Every kernel calls it first, before it reads,
// writes or returns: so no launch passes the one before it.
__device__ inline void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Return the sum over the warp to every lane. The order of additions is fixed, so results are
// bit-identical from run to run.
__device__ inline float warp_sum(float x) {
  for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  return x;
}

// Return the maximum over the warp to every lane.
__device__ inline float warp_max(float x) {
  for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
  return x;
}

// Return the sum of x over this lane and all lower lanes.
__device__ inline int warp_inclusive_sum(int x) {
  for (int step = 1; step < WARP; step *= 2) {
    const int lower = __shfl_up_sync(ALL, x, step);
    if (lane_id() >= step) x += lower;
  }
  return x;
}

__device__ inline float minus_infinity() { return __uint_as_float(0xff800000u); }

// Map a float to an unsigned key of the same order; -0 and +0 get the same key. Unsigned keys allow
// the integer warp reductions (redux.sync). No number has key 0.
__device__ inline unsigned sort_key(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Invert sort_key.
__device__ inline float from_sort_key(unsigned key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
