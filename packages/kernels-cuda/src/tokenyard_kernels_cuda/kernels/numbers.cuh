// Numbers as they lie in memory, alone and 16 bytes of them together; all arithmetic is done in float.
#pragma once

struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };

__device__ inline float widened(float x) { return x; }
__device__ inline float widened(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ inline float widened(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class T> __device__ T rounded(float x);
template <> __device__ inline float rounded<float>(float x) { return x; }
template <> __device__ inline bf16 rounded<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <> __device__ inline f16 rounded<f16>(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// N neighbours in a row, read and written by one instruction if they fill 16 bytes.
template <class T, int N> struct Pack { T at[N]; };

template <class P> __device__ inline P load(const P* from) {
  P pack;
  if constexpr (sizeof(P) == 16) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    memcpy(&pack, &raw, 16);
  } else {
    pack = *from;
  }
  return pack;
}

template <class P> __device__ inline void store(P* to, const P& pack) {
  if constexpr (sizeof(P) == 16) {
    uint4 raw;
    memcpy(&raw, &pack, 16);
    *reinterpret_cast<uint4*>(to) = raw;
  } else {
    *to = pack;
  }
}
