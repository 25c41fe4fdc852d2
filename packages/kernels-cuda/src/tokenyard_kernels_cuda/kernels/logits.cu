// Router logits of few tokens. A matmul of few rows has few blocks, each with a long sum.
//
// Macro: ELEMENT is the type of the operands (bf16 or f16).
//
// Shapes: T tokens, E experts, D model width. A row of D elements is `vectors` packs.
#include "numbers.cuh"
#include "warp.cuh"

typedef Pack<ELEMENT, 8> Vector;
constexpr int TOKENS = 8;  // per block

// Write x @ weight.T. Sums are float, in a fixed order.
//
// Grid x: one block per expert. Grid y: TOKENS tokens. Shared memory: TOKENS floats per warp.
extern "C" __global__ void logits_of_few(
    const ELEMENT* __restrict__ x,       // [T, D]
    const ELEMENT* __restrict__ weight,  // [E, D]
    float* __restrict__ logits,          // [T, E]
    int tokens,
    int experts,
    int vectors) {
  wait_for_launch_before();
  extern __shared__ int shared[];
  float* sums = reinterpret_cast<float*>(shared);  // [warps, TOKENS]
  const long long expert = blockIdx.x;
  const int first = blockIdx.y * TOKENS;
  const Vector* weights = reinterpret_cast<const Vector*>(weight) + expert * vectors;

  float total[TOKENS];
  for (int t = 0; t < TOKENS; ++t) total[t] = 0.0f;
  for (int v = threadIdx.x; v < vectors; v += blockDim.x) {
    const Vector w = load(weights + v);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      if (first + t < tokens) {
        const long long token = first + t;
        const Vector value = load(reinterpret_cast<const Vector*>(x) + token * vectors + v);
#pragma unroll
        for (int i = 0; i < 8; ++i) total[t] += to_float(value.at[i]) * to_float(w.at[i]);
      }
    }
  }

#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    const float sum = warp_sum(total[t]);
    if (lane_id() == 0) sums[warp_id() * TOKENS + t] = sum;
  }
  __syncthreads();
  const int t = threadIdx.x;
  if (t < TOKENS && first + t < tokens) {
    float sum = 0.0f;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / WARP; ++warp) {
      sum += sums[warp * TOKENS + t];
    }
    logits[static_cast<long long>(first + t) * experts + expert] = sum;
  }
}
