// Twins of the PTX in kernels/convert.cuh.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef BFLOAT16

inline float to_float(u16 x) {
#if BFLOAT16
    return __uint_as_float(u32(x) << 16);
#else
    const u32 sign = u32(x & 0x8000) << 16, exponent = (x >> 10) & 31, mantissa = x & 0x3ff;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(mantissa) * 0x1p-24f;
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
#endif
}

inline u16 from_float(float x) {
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
}

inline u32 pack2(float low, float high) { return from_float(low) | u32(from_float(high)) << 16; }

#endif  // BFLOAT16

inline float exp2_fast(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}

inline float log2_fast(float x) { return log2f(fabsf(x) < 0x1p-126f ? 0.0f : x); }
