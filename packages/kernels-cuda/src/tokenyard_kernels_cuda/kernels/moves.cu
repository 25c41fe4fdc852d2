// Moving rows by a plan. ELEMENT is what a row is made of (bf16, f16, float), VECTOR how many a thread moves at a time.
//
// A row of D elements is `vectors` packs. *live rows are kept; what stands after them is never read, and written as 0.
#include "numbers.cuh"
#include "warp.cuh"

typedef Pack<ELEMENT, VECTOR> Vector;

__device__ inline Vector zeros() {
  Vector value;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) value.at[i] = rounded<ELEMENT>(0.0f);
  return value;
}

__device__ inline Vector* at(ELEMENT* rows, long long row, int vectors, int v) {
  return reinterpret_cast<Vector*>(rows) + row * vectors + v;
}

__device__ inline const Vector* at(const ELEMENT* rows, long long row, int vectors, int v) {
  return reinterpret_cast<const Vector*>(rows) + row * vectors + v;
}

// The blocks past the first `moving` of the grid clear the tail of rows [bound, D] together.
__device__ inline void clear_tail(ELEMENT* rows, int kept, int bound, int moving, int vectors, int v, int step) {
  for (long long row = kept + static_cast<long long>(blockIdx.x) - moving; row < bound; row += gridDim.x - moving) {
    for (int i = v; i < vectors; i += step) store(at(rows, row, vectors, i), zeros());
  }
}

// rows [bound, D]: each token of x [tokens, D] at its rows. A block of the grid for a token and a part of its columns,
// so that each token is read once.
extern "C" __global__ void to_rows(
    const ELEMENT* __restrict__ x, const int* __restrict__ inverse, const int* __restrict__ live,
    ELEMENT* __restrict__ rows, int tokens, int vectors, int bound, int top_k) {
  const int v = blockIdx.y * blockDim.x + threadIdx.x, kept = min(*live, bound);
  if (static_cast<int>(blockIdx.x) >= tokens) {
    clear_tail(rows, kept, bound, tokens, vectors, v, gridDim.y * blockDim.x);
  } else if (v < vectors) {
    const long long token = blockIdx.x;
    const Vector value = load(at(x, token, vectors, v));
    for (int k = 0; k < top_k; ++k) {
      const int row = inverse[token * top_k + k];
      if (row < kept) store(at(rows, row, vectors, v), value);
    }
  }
}

// y [tokens, D]: the sum of each token's kept rows, times weights [tokens, top_k] unless those are null.
extern "C" __global__ void to_tokens(
    const ELEMENT* __restrict__ rows, const float* __restrict__ weights, const int* __restrict__ inverse,
    const int* __restrict__ live, ELEMENT* __restrict__ y, int vectors, int bound, int top_k) {
  const int v = blockIdx.y * blockDim.x + threadIdx.x, kept = min(*live, bound);
  if (v >= vectors) return;
  const long long token = blockIdx.x;
  float total[VECTOR] = {};
#pragma unroll 4
  for (int k = 0; k < top_k; ++k) {
    const int row = inverse[token * top_k + k];
    if (row < kept) {
      const Vector value = load(at(rows, row, vectors, v));
      const float weight = weights ? weights[token * top_k + k] : 1.0f;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) total[i] += weight * widened(value.at[i]);
    }
  }
  Vector sum;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) sum.at[i] = rounded<ELEMENT>(total[i]);
  store(at(y, token, vectors, v), sum);
}

// drows [bound, D]: dy [tokens, D] of each row's token, times its weight; dweights [slots]: the dot product of the
// row's dy and the row. Either may be null. A warp for a slot; those of one token stand in one block, mostly.
extern "C" __global__ void to_tokens_backward(
    const ELEMENT* __restrict__ dy, const ELEMENT* __restrict__ rows, const float* __restrict__ weights,
    const int* __restrict__ inverse, const int* __restrict__ live, ELEMENT* __restrict__ drows,
    float* __restrict__ dweights, int slots, int vectors, int bound, int top_k) {
  const int warps = blockDim.x / WARP, moving = slots / warps + (slots % warps > 0), kept = min(*live, bound);
  if (static_cast<int>(blockIdx.x) >= moving) {
    if (drows) clear_tail(drows, kept, bound, moving, vectors, threadIdx.x, blockDim.x);
    return;
  }
  const long long slot = static_cast<long long>(blockIdx.x) * warps + warp_id();
  if (slot >= slots) return;
  const int row = inverse[slot];
  float sums[4] = {};  // added to in turn: the shorter a chain of additions, the smaller its error
  if (row < kept) {
    const float weight = weights ? weights[slot] : 1.0f;
#pragma unroll 4
    for (int v = lane_id(); v < vectors; v += WARP) {
      const Vector gradient = load(at(dy, slot / top_k, vectors, v));
      if (dweights) {
        const Vector own = load(at(rows, row, vectors, v));
        float sum = sums[0];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum += widened(gradient.at[i]) * widened(own.at[i]);
        sums[0] = sums[1], sums[1] = sums[2], sums[2] = sums[3], sums[3] = sum;
      }
      if (drows) {
        Vector weighted;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) weighted.at[i] = rounded<ELEMENT>(weight * widened(gradient.at[i]));
        store(at(drows, row, vectors, v), weighted);
      }
    }
  }
  if (dweights) {
    const float total = warp_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (lane_id() == 0) dweights[slot] = total;
  }
}
