// Router logits of few tokens. A matmul of few rows has few blocks, each with a long sum.
//
// Macros: ELEMENT is the type of the operands (bf16 or f16), EXPERTS the experts of a block.
//
// Shapes: T tokens, E experts, D model width. A row of D elements is `vectors` packs.
#include "numbers.cuh"
#include "warp.cuh"

typedef Pack<ELEMENT, 8> Vector;
constexpr int TOKENS = 8;  // per block

// Write x @ weight.T. Sums are float, in a fixed order.
//
// Grid x: EXPERTS experts. Grid y: TOKENS tokens. Shared memory: EXPERTS * TOKENS floats per warp.
extern "C" __global__ void logits_of_few(
    const ELEMENT* __restrict__ x,       // [T, D]
    const ELEMENT* __restrict__ weight,  // [E, D]
    float* __restrict__ logits,          // [T, E]
    int tokens,
    int experts,
    int vectors) {
  wait_for_launch_before();
  extern __shared__ int shared[];
  float* sums = reinterpret_cast<float*>(shared);  // [warps, EXPERTS, TOKENS]
  const int first_expert = blockIdx.x * EXPERTS;
  const int first = blockIdx.y * TOKENS;
  const Vector* rows = reinterpret_cast<const Vector*>(weight);

  float total[EXPERTS][TOKENS] = {};
  for (int v = threadIdx.x; v < vectors; v += blockDim.x) {
    Vector w[EXPERTS];
#pragma unroll
    for (int e = 0; e < EXPERTS; ++e) {  // past the last expert, its weight again
      const long long expert = min(first_expert + e, experts - 1);
      w[e] = load(rows + expert * vectors + v);
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      if (first + t < tokens) {
        const long long token = first + t;
        const Vector value = load(reinterpret_cast<const Vector*>(x) + token * vectors + v);
#pragma unroll
        for (int e = 0; e < EXPERTS; ++e) {
#pragma unroll
          for (int i = 0; i < 8; ++i) total[e][t] += to_float(value.at[i]) * to_float(w[e].at[i]);
        }
      }
    }
  }

#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    if (first + t < tokens) {
#pragma unroll
      for (int e = 0; e < EXPERTS; ++e) {
        const float sum = warp_sum(total[e][t]);
        if (lane_id() == 0) sums[(warp_id() * EXPERTS + e) * TOKENS + t] = sum;
      }
    }
  }
  __syncthreads();
  const int e = threadIdx.x % EXPERTS;
  const int t = threadIdx.x / EXPERTS;
  if (t < TOKENS && first + t < tokens && first_expert + e < experts) {
    float sum = 0.0f;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / WARP; ++warp) {
      sum += sums[(warp * EXPERTS + e) * TOKENS + t];
    }
    logits[static_cast<long long>(first + t) * experts + first_expert + e] = sum;
  }
}
