// convert: integer names, half and bfloat16 <-> float, and the few functions that softmax needs.
//
// -DBFLOAT16=1 makes the 16-bit type bfloat16, -DBFLOAT16=0 half. A kernel without 16-bit numbers is compiled without
// the constant and has no conversions. 16-bit numbers travel as u16, two of them as one u32 with the first in the low
// half. What is PTX, here and in the other headers, is between #ifdef __CUDACC__ and #endif: the tests on a CPU bring a
// twin of each such function in plain C++ (tests/simt/twins).
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define INF __int_as_float(0x7f800000)

#ifdef __CUDACC__

#ifdef BFLOAT16

__device__ __forceinline__ float to_float(u16 x) {
#if BFLOAT16
    return __uint_as_float(u32(x) << 16);  // a bfloat16 is the upper half of a float
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#endif
}

// To the nearest, ties to even; a float beyond the largest half becomes infinity.
__device__ __forceinline__ u16 from_float(float x) {
    u16 y;
#if BFLOAT16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
#endif
    return y;
}

__device__ __forceinline__ u32 pack2(float low, float high) {
    u32 packed;
#if BFLOAT16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
    return packed;
}

#endif  // BFLOAT16

// 2^x within 2 ulp; subnormal results are zero. exp2_fast(-INF) == 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Binary logarithm within 2^-22. log2_fast(0) == -INF.
__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif  // __CUDACC__

#ifdef BFLOAT16
__device__ __forceinline__ float2 unpack2(u32 packed) {
    return make_float2(to_float(u16(packed)), to_float(u16(packed >> 16)));
}
#endif

// tanh within 1e-6 of its value: (1 - e) / (1 + e) with e = exp(-2 |x|), which cancels near 0, where an odd polynomial
// (fitted on |x| < 0.3, 2e-8) replaces it.
__device__ __forceinline__ float tanh_fast(float x) {
    const float magnitude = fabsf(x), square = x * x;
    const float e = exp2_fast(magnitude * -2.885390082f);  // -2 log2(e)
    const float far = copysignf(__fdividef(1.0f - e, 1.0f + e), x);
    const float slope = fmaf(fmaf(-0.05038166f, square, 0.13315011f), square, -0.33333065f);
    return magnitude < 0.28f ? fmaf(slope * square, x, x) : far;
}
