// Element types in memory, conversions to and from float, and 16-byte packs. Arithmetic is float.
#pragma once

struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };

// Convert an element to float; exact.
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ inline float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Round a float to the nearest element, ties to even.
template <class T> __device__ T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bf16 from_float<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <> __device__ inline f16 from_float<f16>(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// N adjacent elements of a row. A pack of 16 bytes is loaded and stored by one instruction.
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
