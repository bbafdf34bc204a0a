// mma: the warp's tensor-core vocabulary. All 32 lanes call every function here together.
//
// Fragments, with group = lane / 4 and pair = lane % 4; each u32 holds two 16-bit numbers of neighbouring columns
// (of B: rows), the first in the low half:
//   8 x 8 matrix   row group, columns 2 pair, 2 pair + 1
//   A [16 x 16]    a[0]: rows 0-7, k 0-7;  a[1]: rows 8-15, k 0-7;  a[2]: rows 0-7, k 8-15;  a[3]: rows 8-15, k 8-15
//   B [16 x 8]     b0: k 2 pair, 2 pair + 1 of column group;  b1: the same + 8
//   C [16 x 8]     c[0], c[1]: row group, columns 2 pair, 2 pair + 1;  c[2], c[3]: row group + 8
#pragma once
#include "convert.cuh"
#include "load_global.cuh"

#ifndef BFLOAT16
#error "compile with -DBFLOAT16=0 (half) or -DBFLOAT16=1 (bfloat16)"
#endif

#ifdef __CUDACC__  // twins: tests/simt/twins/mma.h

// Four 8 x 8 matrices. Lanes 8 m .. 8 m + 7 give the addresses of the eight 16-byte rows of matrix m, which comes in
// matrix[m].
__device__ __forceinline__ void load_matrix_x4(u32 (&matrix)[4], shared_address row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                 : "r"(row)
                 : "memory");
}

// The same with every 8 x 8 matrix transposed: column group, rows 2 pair, 2 pair + 1.
__device__ __forceinline__ void load_matrix_x4_transposed(u32 (&matrix)[4], shared_address row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                 : "r"(row)
                 : "memory");
}

// The transpose of one 8 x 8 matrix in registers.
__device__ __forceinline__ u32 transpose_8x8(u32 matrix) {
    u32 transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
    return transposed;
}

// c += A B in float32.
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
#if BFLOAT16
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif  // __CUDACC__
