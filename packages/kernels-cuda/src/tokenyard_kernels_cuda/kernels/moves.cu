// Move rows between token order and expert order.
//
// Macros: ELEMENT is the element type of a row (bf16, f16 or float); VECTOR is the number of
// elements that a thread moves at a time.
//
// Shapes: T tokens, K experts per token, N = T * K slots, D model width, R rows of the plan
// (`bound`). A row of D elements is `vectors` packs. The first *live rows hold slots. The rest is
// the tail: never read, and written as zero.
#include "numbers.cuh"
#include "warp.cuh"

typedef Pack<ELEMENT, VECTOR> Vector;

__device__ inline Vector zeros() {
  Vector value;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) value.at[i] = from_float<ELEMENT>(0.0f);
  return value;
}

// Return the address of pack v of a row.
__device__ inline Vector* pack_of(ELEMENT* rows, long long row, int vectors, int v) {
  return reinterpret_cast<Vector*>(rows) + row * vectors + v;
}

__device__ inline const Vector* pack_of(const ELEMENT* rows, long long row, int vectors, int v) {
  return reinterpret_cast<const Vector*>(rows) + row * vectors + v;
}

// Write zeros to rows [live_rows, bound). The blocks from `move_blocks` on share these rows; each
// thread clears packs v, v + step, v + 2 * step, ...
__device__ inline void clear_tail(
    ELEMENT* rows,  // [R, D]
    int live_rows,
    int bound,
    int move_blocks,
    int vectors,
    int v,
    int step) {
  const unsigned tail_blocks = gridDim.x - move_blocks;
  long long row = live_rows + static_cast<long long>(blockIdx.x) - move_blocks;
  for (; row < bound; row += tail_blocks) {
    for (int i = v; i < vectors; i += step) store(pack_of(rows, row, vectors, i), zeros());
  }
}

// Copy each token to its rows, and clear the tail.
//
// Grid x: one block per token, then the blocks that clear the tail. Grid y: the columns of a row. A
// block reads its columns of the token once and writes them up to K times.
extern "C" __global__ void to_rows(
    const ELEMENT* __restrict__ x,    // [T, D]
    const int* __restrict__ inverse,  // [N]
    const int* __restrict__ live,     // [1]
    ELEMENT* __restrict__ rows,       // [R, D]
    int tokens,
    int vectors,
    int bound,
    int top_k) {
  wait_for_launch_before();
  const int v = blockIdx.y * blockDim.x + threadIdx.x;
  const int live_rows = min(*live, bound);
  if (static_cast<int>(blockIdx.x) >= tokens) {
    clear_tail(rows, live_rows, bound, tokens, vectors, v, gridDim.y * blockDim.x);
  } else if (v < vectors) {
    const long long token = blockIdx.x;
    const Vector value = load(pack_of(x, token, vectors, v));
    for (int k = 0; k < top_k; ++k) {
      const int row = inverse[token * top_k + k];
      if (row < live_rows) store(pack_of(rows, row, vectors, v), value);
    }
  }
}

// Sum each token's live rows, weighted unless `weights` is null.
//
// Grid x: one block per token. Grid y: the columns of a row.
extern "C" __global__ void to_tokens(
    const ELEMENT* __restrict__ rows,   // [R, D]
    const float* __restrict__ weights,  // [T, K] or null
    const int* __restrict__ inverse,    // [N]
    const int* __restrict__ live,       // [1]
    ELEMENT* __restrict__ y,            // [T, D]
    int vectors,
    int bound,
    int top_k) {
  wait_for_launch_before();
  const int v = blockIdx.y * blockDim.x + threadIdx.x;
  const int live_rows = min(*live, bound);
  if (v >= vectors) return;
  const long long token = blockIdx.x;

  // Main loop: accumulate in float, k ascending.
  float total[VECTOR] = {};
#pragma unroll 4
  for (int k = 0; k < top_k; ++k) {
    const int row = inverse[token * top_k + k];
    if (row < live_rows) {
      const Vector value = load(pack_of(rows, row, vectors, v));
      const float weight = weights ? weights[token * top_k + k] : 1.0f;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) total[i] += weight * to_float(value.at[i]);
    }
  }

  // Epilogue: round once.
  Vector sum;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) sum.at[i] = from_float<ELEMENT>(total[i]);
  store(pack_of(y, token, vectors, v), sum);
}

// Backward of to_tokens: drows[row] = weight * dy[token], dweights[slot] = <dy[token], rows[row]>.
//
// One warp per slot, then the blocks that clear the tail. A block has adjacent slots, so that most
// tokens have all their slots in one block. A dropped slot gets dweights 0.
extern "C" __global__ void to_tokens_backward(
    const ELEMENT* __restrict__ dy,     // [T, D]
    const ELEMENT* __restrict__ rows,   // [R, D]; null if dweights is
    const float* __restrict__ weights,  // [T, K] or null
    const int* __restrict__ inverse,    // [N]
    const int* __restrict__ live,       // [1]
    ELEMENT* __restrict__ drows,        // [R, D] or null
    float* __restrict__ dweights,       // [T, K] or null
    int slots,
    int vectors,
    int bound,
    int top_k) {
  wait_for_launch_before();
  const int warps = blockDim.x / WARP;
  const int move_blocks = slots / warps + (slots % warps > 0);
  const int live_rows = min(*live, bound);
  if (static_cast<int>(blockIdx.x) >= move_blocks) {
    if (drows) clear_tail(drows, live_rows, bound, move_blocks, vectors, threadIdx.x, blockDim.x);
    return;
  }
  const long long slot = static_cast<long long>(blockIdx.x) * warps + warp_id();
  if (slot >= slots) return;
  const int row = inverse[slot];

  // Main loop over the packs of the row. Four partial sums take turns: a shorter chain of additions
  // has a smaller rounding error.
  float sums[4] = {};
  if (row < live_rows) {
    const float weight = weights ? weights[slot] : 1.0f;
#pragma unroll 4
    for (int v = lane_id(); v < vectors; v += WARP) {
      const Vector gradient = load(pack_of(dy, slot / top_k, vectors, v));
      if (dweights) {
        const Vector value = load(pack_of(rows, row, vectors, v));
        float sum = sums[0];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum += to_float(gradient.at[i]) * to_float(value.at[i]);
        // Rotate the sums, not an index: registers cannot be indexed at run time.
        sums[0] = sums[1];
        sums[1] = sums[2];
        sums[2] = sums[3];
        sums[3] = sum;
      }
      if (drows) {
        Vector weighted;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
          weighted.at[i] = from_float<ELEMENT>(weight * to_float(gradient.at[i]));
        }
        store(pack_of(drows, row, vectors, v), weighted);
      }
    }
  }

  // Epilogue: reduce the dot product over the warp.
  if (dweights) {
    const float total = warp_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (lane_id() == 0) dweights[slot] = total;
  }
}
