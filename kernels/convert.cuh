// convert: the integer names, half and bfloat16 <-> float, and the few functions that softmax needs.
//
// -DBFLOAT16=1 makes the 16-bit type bfloat16, -DBFLOAT16=0 half. A kernel that touches no 16-bit number is compiled
// without it and has no conversions. 16-bit numbers travel as u16, two of them as one u32 with the first in the low
// half. Every PTX wrapper here has a twin in plain C++ beside it, which the tests on a CPU run.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define INF __int_as_float(0x7f800000)

#ifdef BFLOAT16

__device__ __forceinline__ float to_float(u16 x) {
#if BFLOAT16
    return __uint_as_float(u32(x) << 16);  // a bfloat16 is the upper half of a float
#elif defined(__CUDACC__)
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#else
    const u32 sign = u32(x & 0x8000) << 16, exponent = (x >> 10) & 31, mantissa = x & 0x3ff;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(mantissa) * 0x1p-24f;
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
#endif
}

// To the nearest, ties to even; a float beyond the largest half becomes infinity.
__device__ __forceinline__ u16 from_float(float x) {
#ifdef __CUDACC__
    u16 y;
#if BFLOAT16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
#endif
    return y;
#else
    const u32 bits = __float_as_uint(x), magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7fff;  // the NaN that cvt gives
#if BFLOAT16
    return u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#else
    const u32 sign = (bits >> 16) & 0x8000;
    if (magnitude >= 0x47800000) return u16(sign | 0x7c00);  // 65536 and more
    u32 value = magnitude - (112u << 23), drop = 13;         // half's exponent; how many bits it has no room for
    if (magnitude < 0x38800000) {                            // below 2^-14: subnormal in half
        drop = 126 - (magnitude >> 23);
        if (drop > 24) return u16(sign);
        value = (magnitude & 0x7fffff) | 0x800000;
    }
    const u32 half = 1u << (drop - 1), odd = (value >> drop) & 1;
    return u16(sign | ((value + half - 1 + odd) >> drop));
#endif
#endif
}

__device__ __forceinline__ u32 pack2(float low, float high) {
#ifdef __CUDACC__
    u32 packed;
#if BFLOAT16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
    return packed;
#else
    return from_float(low) | u32(from_float(high)) << 16;
#endif
}

__device__ __forceinline__ float2 unpack2(u32 packed) {
    return make_float2(to_float(u16(packed)), to_float(u16(packed >> 16)));
}

#endif  // BFLOAT16

// 2^x within 2 ulp; subnormal results are zero. exp2_fast(-INF) == 0.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
#endif
}

// Binary logarithm within 2^-22. log2_fast(0) == -INF.
__device__ __forceinline__ float log2_fast(float x) {
#ifdef __CUDACC__
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return log2f(fabsf(x) < 0x1p-126f ? 0.0f : x);
#endif
}

// tanh within 1e-6 of its value: (1 - e) / (1 + e) with e = exp(-2 |x|), which cancels near 0, where the
// odd polynomial (fitted on |x| < 0.3, 2e-8) takes over.
__device__ __forceinline__ float tanh_fast(float x) {
    const float magnitude = fabsf(x), square = x * x;
    const float e = exp2_fast(magnitude * -2.885390082f);  // -2 log2(e)
    const float far = copysignf(__fdividef(1.0f - e, 1.0f + e), x);
    const float slope = fmaf(fmaf(-0.05038166f, square, 0.13315011f), square, -0.33333065f);
    return magnitude < 0.28f ? fmaf(slope * square, x, x) : far;
}
