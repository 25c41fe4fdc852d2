// Make a plan: a stable sort of the slots by expert, in two launches, or in one of few slots.
//
// Shapes: N slots, E experts, R rows of the plan, G blocks. Each expert has a bucket. One more
// bucket, the last, holds the dropped slots: `buckets` = E + 1.
//
// A block has `slots_of_block` adjacent slots; each of its warps has an equal part of them.
// 1. count_slots counts the slots of each block in each bucket. Few slots are one block, and 2.
//    counts them itself.
// 2. place_slots sums the counts of all blocks. The sums over all blocks give the first row of each
//    bucket; the sums over the earlier blocks give the block's own offset in the bucket. Each warp
//    then assigns rows to its slots in order, 32 slots at a time.
// Shared counters are incremented atomically, in any order: integer sums do not depend on it.
#include "warp.cuh"

// Return the bucket of an id. An id of E or more is dropped; so is a negative id, which is large as
// unsigned.
__device__ inline int bucket_of(unsigned id, unsigned experts) {
  return static_cast<int>(min(id, experts));
}

// Count each block's slots in each bucket.
//
// Shared memory: buckets ints.
extern "C" __global__ void count_slots(
    const int* __restrict__ ids,  // [N]
    int* __restrict__ counts,     // [G, E + 1]
    int slots,
    int experts,
    int slots_of_block) {
  wait_for_launch_before();
  extern __shared__ int shared[];
  int* block_counts = shared;  // [E + 1]
  const int buckets = experts + 1;
  for (int e = threadIdx.x; e < buckets; e += blockDim.x) block_counts[e] = 0;
  __syncthreads();

  const long long begin = static_cast<long long>(blockIdx.x) * slots_of_block;
  const long long end = min(begin + slots_of_block, static_cast<long long>(slots));
  for (long long slot = begin + threadIdx.x; slot < end; slot += blockDim.x) {
    atomicAdd(&block_counts[bucket_of(ids[slot], experts)], 1);
  }
  __syncthreads();

  for (int e = threadIdx.x; e < buckets; e += blockDim.x) {
    counts[static_cast<long long>(blockIdx.x) * buckets + e] = block_counts[e];
  }
}

// Sum `counts` over all blocks into `total`, and over the blocks before this one into `earlier`.
__device__ inline void sum_block_counts(
    const int* counts,  // [G, buckets]
    int* total,         // [buckets], shared
    int* earlier,       // [buckets], shared
    int buckets) {
  for (int e = threadIdx.x; e < buckets; e += blockDim.x) total[e] = earlier[e] = 0;
  __syncthreads();
  // With few buckets, several threads split the blocks of one bucket.
  const int shares = max(1, static_cast<int>(blockDim.x) / buckets);
  for (int i = threadIdx.x; i < shares * buckets; i += blockDim.x) {
    const int e = i % buckets;
    int thread_total = 0;
    int thread_earlier = 0;
#pragma unroll 8
    for (int block = i / buckets; block < static_cast<int>(gridDim.x); block += shares) {
      const int count = counts[block * buckets + e];
      thread_total += count;
      thread_earlier += block < static_cast<int>(blockIdx.x) ? count : 0;
    }
    atomicAdd(&total[e], thread_total);
    atomicAdd(&earlier[e], thread_earlier);
  }
  __syncthreads();
}

// Count all slots into `total`, and set `earlier` to zero, in a launch of one block.
__device__ inline void count_own_slots(
    const int* ids,  // [slots]
    int* total,      // [buckets], shared
    int* earlier,    // [buckets], shared
    int slots,
    int experts) {
  for (int e = threadIdx.x; e <= experts; e += blockDim.x) total[e] = earlier[e] = 0;
  __syncthreads();
  for (int slot = threadIdx.x; slot < slots; slot += blockDim.x) {
    atomicAdd(&total[bucket_of(ids[slot], experts)], 1);
  }
  __syncthreads();
}

// Replace each number by the sum of the numbers before it. Only the first warp works.
__device__ inline void exclusive_scan(int* numbers, int count) {
  if (warp_id() == 0) {
    int carry = 0;
    for (int first = 0; first < count; first += WARP) {
      const int at = first + lane_id();
      const int number = at < count ? numbers[at] : 0;
      const int sum = carry + warp_inclusive_sum(number);
      if (at < count) numbers[at] = sum - number;
      carry = __shfl_sync(ALL, sum, WARP - 1);
    }
  }
  __syncthreads();
}

// Assign a row to each slot.
//
// Shared memory: (2 + warps) * buckets ints.
extern "C" __global__ void place_slots(
    const int* __restrict__ ids,     // [N]
    const int* __restrict__ counts,  // [G, E + 1], from count_slots; null if G is 1
    int* __restrict__ order,         // [R]
    int* __restrict__ inverse,       // [N]
    int* __restrict__ offsets,       // [E + 1]
    int slots,
    int rows,
    int experts,
    int slots_of_block) {
  wait_for_launch_before();
  extern __shared__ int shared[];
  const int buckets = experts + 1;
  const int warps = blockDim.x / WARP;
  int* first_row = shared;                             // [buckets]: first row of each bucket
  int* earlier = shared + buckets;                     // [buckets]: slots of earlier blocks
  int* next_row = shared + (2 + warp_id()) * buckets;  // [buckets] per warp: row of its next slot

  // Phase 1: find the first row of each bucket. Block 0 writes the offsets.
  if (counts == nullptr) {
    count_own_slots(ids, first_row, earlier, slots, experts);
  } else {
    sum_block_counts(counts, first_row, earlier, buckets);
  }
  exclusive_scan(first_row, buckets);
  if (blockIdx.x == 0) {
    for (int e = threadIdx.x; e < buckets; e += blockDim.x) offsets[e] = first_row[e];
  }

  // Phase 2: each warp counts its slots in each bucket.
  const int slots_of_warp = slots_of_block / warps;
  const long long begin =
      static_cast<long long>(blockIdx.x) * slots_of_block + warp_id() * slots_of_warp;
  const long long end = min(begin + slots_of_warp, static_cast<long long>(slots));
  for (int e = lane_id(); e < buckets; e += WARP) next_row[e] = 0;
  __syncwarp();
  for (long long slot = begin + lane_id(); slot < end; slot += WARP) {
    atomicAdd(&next_row[bucket_of(ids[slot], experts)], 1);
  }
  __syncthreads();

  // Phase 3: turn the warps' counts into the first row of each warp in each bucket.
  for (int e = threadIdx.x; e < buckets; e += blockDim.x) {
    int row = first_row[e] + earlier[e];
    for (int warp = 0; warp < warps; ++warp) {
      int* warp_row = shared + (2 + warp) * buckets + e;
      const int count = *warp_row;
      *warp_row = row;
      row += count;
    }
  }
  __syncthreads();

  // Phase 4: assign rows, 32 slots at a time. Lanes with the same bucket are peers; the lowest peer
  // advances the bucket's next row. Rows at or past R are written to `inverse` only.
  for (long long chunk = begin; chunk < end; chunk += WARP) {
    const long long slot = chunk + lane_id();
    const bool valid = slot < end;
    const int e = valid ? bucket_of(ids[slot], experts) : -1;
    const unsigned peers = __match_any_sync(ALL, e);
    const int lower_peers = __popc(peers & ((1u << lane_id()) - 1));
    const int row = valid ? next_row[e] + lower_peers : 0;
    __syncwarp();
    if (valid && lower_peers == 0) next_row[e] += __popc(peers);
    __syncwarp();
    if (valid) {
      inverse[slot] = row;
      if (row < rows) order[row] = static_cast<int>(slot);
    }
  }
}
