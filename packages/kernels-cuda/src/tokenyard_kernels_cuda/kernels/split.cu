// Split float32 into two narrow numbers whose sum approximates it, so that matmuls of the result
// can run on tensor cores.
//
// Macro: ELEMENT is the narrow type (bf16 or f16).
#include "numbers.cuh"
#include "warp.cuh"

// Write to each row of `both` the rounded row of `wide`, then its rounding errors. One thread per
// number.
extern "C" __global__ void split_in_two(
    const float* __restrict__ wide,  // [rows, width]
    ELEMENT* __restrict__ both,      // [rows, 2 * width]
    int rows,
    int width) {
  wait_for_launch_before();
  const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= static_cast<long long>(rows) * width) return;
  const long long at = i / width * 2 * width + i % width;
  const ELEMENT high = from_float<ELEMENT>(wide[i]);
  both[at] = high;
  both[at + width] = from_float<ELEMENT>(wide[i] - to_float(high));
}
