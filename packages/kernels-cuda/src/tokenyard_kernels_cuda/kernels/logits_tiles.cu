// Router logits of some tokens, on tensor cores. The warps of a block share the sum over D, because
// so few tokens have few tiles.
//
// Macros: ELEMENT is the type of the operands (bf16 or f16), TILES the tiles of a block.
//
// Shapes: T tokens, E experts, D model width. A row of D elements is `vectors` packs. A tile has
// EXPERTS experts and TOKENS tokens.
#include "mma.cuh"
#include "numbers.cuh"
#include "warp.cuh"

typedef Pack<ELEMENT, 8> Vector;
constexpr int EXPERTS = 16;
constexpr int TOKENS = 8;
constexpr int WARPS = 8;  // of a block
constexpr int PACKS = 4;  // of a row, for a step of a warp

// Eight elements as four words of two.
struct Words { unsigned at[4]; };

// Load a pack of a row, or zeros past its end.
__device__ inline Words load_words(const Vector* row, int pack, int vectors) {
  Words words = {};
  if (pack < vectors) {
    const Vector vector = load(row + pack);
    memcpy(&words, &vector, sizeof(words));
  }
  return words;
}

// Write x @ weight.T. Sums are float, in a fixed order.
//
// Grid x: EXPERTS experts. Grid y: TILES * TOKENS tokens. Threads: 32 * WARPS. Shared memory:
// EXPERTS * TILES * TOKENS floats per warp.
extern "C" __global__ void logits_by_tiles(
    const ELEMENT* __restrict__ x,       // [T, D]
    const ELEMENT* __restrict__ weight,  // [E, D]
    float* __restrict__ logits,          // [T, E]
    int tokens,
    int experts,
    int vectors) {
  wait_for_launch_before();
  extern __shared__ int shared[];
  float* sums = reinterpret_cast<float*>(shared);  // [WARPS, TILES * TOKENS, EXPERTS]
  constexpr int SUMS = TILES * TOKENS * EXPERTS;
  const int group = lane_id() / PACKS;
  const int part = lane_id() % PACKS;
  const int first_expert = blockIdx.x * EXPERTS;
  const int first_token = blockIdx.y * TILES * TOKENS;

  // Rows of this lane; past the last one, that again.
  const Vector* upper =
      reinterpret_cast<const Vector*>(weight) +
      static_cast<long long>(min(first_expert + group, experts - 1)) * vectors;
  const Vector* lower =
      reinterpret_cast<const Vector*>(weight) +
      static_cast<long long>(min(first_expert + group + 8, experts - 1)) * vectors;
  const Vector* rows[TILES];
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    const long long token = min(first_token + i * TOKENS + group, tokens - 1);
    rows[i] = reinterpret_cast<const Vector*>(x) + token * vectors;
  }

  // Main loop. A lane has eight adjacent elements of each row, in the same order in both operands.
  float total[TILES][4] = {};
#pragma unroll 4
  for (int first = warp_id() * PACKS; first < vectors; first += WARPS * PACKS) {
    const int pack = first + part;
    const Words a = load_words(upper, pack, vectors);
    const Words b = load_words(lower, pack, vectors);
    const unsigned left[4] = {a.at[0], b.at[0], a.at[1], b.at[1]};
    const unsigned right[4] = {a.at[2], b.at[2], a.at[3], b.at[3]};
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const Words words = load_words(rows[i], pack, vectors);
      const unsigned one[2] = {words.at[0], words.at[1]};
      const unsigned two[2] = {words.at[2], words.at[3]};
      multiply(total[i], left, one, ELEMENT());
      multiply(total[i], right, two, ELEMENT());
    }
  }

  // Epilogue: add up the warps.
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int token = i * TOKENS + part * 2 + j % 2;
      const int expert = group + j / 2 * 8;
      sums[warp_id() * SUMS + token * EXPERTS + expert] = total[i][j];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < SUMS; i += WARPS * WARP) {
    const int token = first_token + i / EXPERTS;
    const int expert = first_expert + i % EXPERTS;
    float sum = 0.0f;
    for (int warp = 0; warp < WARPS; ++warp) sum += sums[warp * SUMS + i];
    if (token < tokens && expert < experts) {
      logits[static_cast<long long>(token) * experts + expert] = sum;
    }
  }
}
