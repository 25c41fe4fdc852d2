// A float as the sum of two narrow numbers, ELEMENT (bf16 or f16), so that products of it can run on the matrix units.
#include "numbers.cuh"

// both [rows, 2 * width] from wide [rows, width]: the nearest narrow numbers, and beside them those of what is left.
extern "C" __global__ void split_in_two(
    const float* __restrict__ wide, ELEMENT* __restrict__ both, int rows, int width) {
  const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= static_cast<long long>(rows) * width) return;
  const long long at = i / width * 2 * width + i % width;
  const ELEMENT high = rounded<ELEMENT>(wide[i]);
  both[at] = high;
  both[at + width] = rounded<ELEMENT>(wide[i] - widened(high));
}
