// The plan: slots sorted by expert, stably, in two launches.
//
// Each block has a stretch of slots, and each of its warps a part of that. The first launch counts how many slots of a
// block go to each expert. In the second, a block adds up what the blocks before it counted, and so knows where its
// slots of each expert begin; its warps then place their slots in order, 32 at a time. The counters in shared memory
// are added to in any order, which makes no difference to whole numbers.
#include "warp.cuh"

// Dropped slots fall into one more bucket, after those of the experts; so do ids below 0, which are large unsigned.
__device__ inline int bucket_of(unsigned id, unsigned experts) { return static_cast<int>(min(id, experts)); }

// counts [gridDim, experts + 1]: how many of each block's slots fall into each bucket.
extern "C" __global__ void count_slots(
    const int* __restrict__ ids, int* __restrict__ counts, int slots, int experts, int slots_of_block) {
  extern __shared__ int own[];  // [buckets]
  const int buckets = experts + 1;
  for (int e = threadIdx.x; e < buckets; e += blockDim.x) own[e] = 0;
  __syncthreads();
  const long long begin = static_cast<long long>(blockIdx.x) * slots_of_block;
  const long long end = min(begin + slots_of_block, static_cast<long long>(slots));
  for (long long slot = begin + threadIdx.x; slot < end; slot += blockDim.x) {
    atomicAdd(&own[bucket_of(ids[slot], experts)], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < buckets; e += blockDim.x) {
    counts[static_cast<long long>(blockIdx.x) * buckets + e] = own[e];
  }
}

// all [buckets]: the slots in each bucket; before [buckets]: those of them that belong to earlier blocks.
__device__ inline void add_up_blocks(const int* counts, int* all, int* before, int buckets) {
  for (int e = threadIdx.x; e < buckets; e += blockDim.x) all[e] = before[e] = 0;
  __syncthreads();
  const int shares = max(1, static_cast<int>(blockDim.x) / buckets);  // threads that share a bucket
  for (int i = threadIdx.x; i < shares * buckets; i += blockDim.x) {
    const int e = i % buckets;
    int total = 0, early = 0;
#pragma unroll 8
    for (int block = i / buckets; block < static_cast<int>(gridDim.x); block += shares) {
      const int count = counts[block * buckets + e];
      total += count;
      early += block < static_cast<int>(blockIdx.x) ? count : 0;
    }
    atomicAdd(&all[e], total);
    atomicAdd(&before[e], early);
  }
  __syncthreads();
}

// Replace each number by the sum of those before it; the first warp does so.
__device__ inline void exclusive_scan(int* numbers, int count) {
  if (warp_id() == 0) {
    int carried = 0;
    for (int first = 0; first < count; first += WARP) {
      const int at = first + lane_id();
      const int own = at < count ? numbers[at] : 0;
      const int sum = carried + warp_inclusive_sum(own);
      if (at < count) numbers[at] = sum - own;
      carried = __shfl_sync(ALL, sum, WARP - 1);
    }
  }
  __syncthreads();
}

// order [rows], inverse [slots], offsets [experts + 1]
extern "C" __global__ void place_slots(
    const int* __restrict__ ids, const int* __restrict__ counts, int* __restrict__ order, int* __restrict__ inverse,
    int* __restrict__ offsets, int slots, int rows, int experts, int slots_of_block) {
  extern __shared__ int shared[];
  const int buckets = experts + 1, warps = blockDim.x / WARP;
  int* first = shared;                                  // [buckets]: the row where this block's slots begin
  int* before = shared + buckets;                       // [buckets]
  int* next = shared + (2 + warp_id()) * buckets;       // [buckets] of each warp: the row of its next slot
  add_up_blocks(counts, first, before, buckets);
  exclusive_scan(first, buckets);
  if (blockIdx.x == 0) {
    for (int e = threadIdx.x; e < buckets; e += blockDim.x) offsets[e] = first[e];
  }

  const int slots_of_warp = slots_of_block / warps;
  const long long begin = static_cast<long long>(blockIdx.x) * slots_of_block + warp_id() * slots_of_warp;
  const long long end = min(begin + slots_of_warp, static_cast<long long>(slots));
  for (int e = lane_id(); e < buckets; e += WARP) next[e] = 0;
  __syncwarp();
  for (long long slot = begin + lane_id(); slot < end; slot += WARP) {
    atomicAdd(&next[bucket_of(ids[slot], experts)], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < buckets; e += blockDim.x) {
    int row = first[e] + before[e];
    for (int warp = 0; warp < warps; ++warp) {
      int* place = shared + (2 + warp) * buckets + e;
      const int count = *place;
      *place = row;
      row += count;
    }
  }
  __syncthreads();

  for (long long together = begin; together < end; together += WARP) {
    const long long slot = together + lane_id();
    const bool there = slot < end;
    const int e = there ? bucket_of(ids[slot], experts) : -1;
    const unsigned peers = __match_any_sync(ALL, e);
    const int rank = __popc(peers & ((1u << lane_id()) - 1));
    const int row = there ? next[e] + rank : 0;
    __syncwarp();
    if (there && rank == 0) next[e] += __popc(peers);
    __syncwarp();
    if (there) {
      inverse[slot] = row;
      if (row < rows) order[row] = static_cast<int>(slot);
    }
  }
}
