// Matrix products of a warp on tensor cores (mma.sync m16n8k16).
//
// Lane l holds, of a [16, 16], rows l / 4 and l / 4 + 8; of b [16, 8], column l / 4; and of c
// [16, 8], rows l / 4 and l / 4 + 8, columns l % 4 * 2 and the next. A word has two elements.
#pragma once

#include "numbers.cuh"

// Add a @ b to c.
__device__ inline void multiply(
    float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void multiply(
    float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], f16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
