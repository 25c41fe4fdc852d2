// Gradients of the operands of router logits, for few tokens: both matmuls in one launch.
//
//   dx [T, D]      = dlogits @ weight
//   dweight [E, D] = dlogits transposed @ x
//
// Macro: ELEMENT is the type of the operands (bf16 or f16).
//
// Shapes: T tokens, E experts, D model width. A row of D elements is `vectors` packs. The legend of
// a tile: M rows of the output (tokens or experts), K the other one of both, N columns of D.
#include "numbers.cuh"
#include "warp.cuh"

typedef Pack<ELEMENT, 8> Vector;
typedef Pack<ELEMENT, 2> Pair;
constexpr int M = 32;                 // of a block
constexpr int N = 64;                 // of a block, two per lane
constexpr int K = 32;                 // per step of the main loop
constexpr int THREADS = 256;          // of a block
constexpr int WARP_ROWS = M / (THREADS / WARP);
constexpr int PACKS = N / 8;          // THREADS == K * PACKS: a thread loads one pack per step
constexpr int NUMBERS = M * K / THREADS;

// What a thread loads for one step.
struct Slice {
  float left[NUMBERS];
  Vector right;
};

// The left operand: dlogits, or its transpose if `by_experts`, whose rows are experts.
struct Left {
  const float* dlogits;  // [T, E]
  int rows;              // of the output
  int depth;             // of the sum
  bool by_experts;
};

// Load this thread's part of the step from `k` on; zeros past the ends.
__device__ inline Slice load_slice(
    const Left& left, const Vector* right, int m, int k, int pack, int vectors) {
  Slice slice;
#pragma unroll
  for (int i = 0; i < NUMBERS; ++i) {
    const int at = i * THREADS + threadIdx.x;
    // neighbours in memory go to neighbouring threads
    const int row = m + (left.by_experts ? at % M : at / K);
    const int depth = k + (left.by_experts ? at / M : at % K);
    const bool inside = row < left.rows && depth < left.depth;
    const int offset = left.by_experts ? depth * left.rows + row : row * left.depth + depth;
    slice.left[i] = inside ? left.dlogits[offset] : 0.0f;
  }
  const int depth = k + static_cast<int>(threadIdx.x) / PACKS;
  if (depth < left.depth && pack < vectors) {
    slice.right = load(right + static_cast<long long>(depth) * vectors + pack);
  } else {
    for (int i = 0; i < 8; ++i) slice.right.at[i] = from_float<ELEMENT>(0.0f);
  }
  return slice;
}

// Write a slice to shared memory: left [K, M], right [K, N].
__device__ inline void store_slice(const Slice& slice, float* left, float* right, bool by_experts) {
#pragma unroll
  for (int i = 0; i < NUMBERS; ++i) {
    const int at = i * THREADS + threadIdx.x;
    left[by_experts ? at : at % K * M + at / K] = slice.left[i];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) right[threadIdx.x * 8 + i] = to_float(slice.right.at[i]);
}

// Write dx and dweight, each unless null. Sums are float, in a fixed order.
//
// Grid x: N columns. Grid y: M experts of dweight, then M tokens of dx. Threads: THREADS. Shared
// memory: K * (M + N) floats.
extern "C" __global__ void logits_backward_of_few(
    const float* __restrict__ dlogits,   // [T, E]
    const ELEMENT* __restrict__ x,       // [T, D]
    const ELEMENT* __restrict__ weight,  // [E, D]
    ELEMENT* __restrict__ dx,            // [T, D] or null
    ELEMENT* __restrict__ dweight,       // [E, D] or null
    int tokens,
    int experts,
    int vectors) {
  wait_for_launch_before();
  extern __shared__ int shared[];
  float* left = reinterpret_cast<float*>(shared);  // [K, M]
  float* right = left + K * M;                     // [K, N]
  const int of_weight = dweight ? (experts + M - 1) / M : 0;
  const bool by_experts = static_cast<int>(blockIdx.y) < of_weight;
  const Left operand = by_experts ? Left{dlogits, experts, tokens, true}
                                  : Left{dlogits, tokens, experts, false};
  const Vector* other = reinterpret_cast<const Vector*>(by_experts ? x : weight);
  const int m = (static_cast<int>(blockIdx.y) - (by_experts ? 0 : of_weight)) * M;
  const int pack = blockIdx.x * PACKS + threadIdx.x % PACKS;

  // Main loop: load the next slice while this one is multiplied. A warp has WARP_ROWS rows.
  float total[WARP_ROWS][2] = {};
  Slice slice = load_slice(operand, other, m, 0, pack, vectors);
  for (int k = 0; k < operand.depth; k += K) {
    __syncthreads();
    store_slice(slice, left, right, by_experts);
    __syncthreads();
    if (k + K < operand.depth) slice = load_slice(operand, other, m, k + K, pack, vectors);
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const float* columns = right + i * N + 2 * lane_id();
#pragma unroll
      for (int r = 0; r < WARP_ROWS; ++r) {
        const float number = left[i * M + warp_id() * WARP_ROWS + r];
        total[r][0] += number * columns[0];
        total[r][1] += number * columns[1];
      }
    }
  }

  // Epilogue.
  ELEMENT* out = by_experts ? dweight : dx;
  const int column = blockIdx.x * N + 2 * lane_id();
#pragma unroll
  for (int r = 0; r < WARP_ROWS; ++r) {
    const int row = m + warp_id() * WARP_ROWS + r;
    if (row < operand.rows && column < 8 * vectors) {
      Pair pair;
      for (int i = 0; i < 2; ++i) pair.at[i] = from_float<ELEMENT>(total[r][i]);
      store(reinterpret_cast<Pair*>(out + static_cast<long long>(row) * 8 * vectors + column), pair);
    }
  }
}
