// attention_state: the running state of one output row, and how several of them become one.
//
// Attention over a set of keys is summed up by (max, sum, out):
//   max = the largest score, or one not far below,  sum = sum of weights,  out = sum of weight * V,
//   weight = 2^((score - max) * scale)
// where a score times `scale` is what softmax takes, in base 2. The states of two disjoint sets merge into the state of
// their union, in any order. The empty set is (-inf, 0, 0) and changes nothing. The result of a row is out / sum, its
// log-sum-exp (max * scale + log2(sum)) * ln 2.
//
// Scores may be large; score * scale is then rounded by more than 1. Decode takes the difference first, because it is
// exact where it matters, and a score that is the maximum has the weight 1 whatever its size. Prefill, which has no
// time to spare, takes 2^(fma(score, scale, -max)) with a max in base 2: the rounding of max is the same in all weights
// of the row and cancels, as long as it is not so large that weights leave the range of 16 bits. Up to 2^24 in base 2
// it is at most 1/2.
//
// Sources: the online softmax of Milakov and Gimelshein (2018); states that merge, of Flash-Decoding (Dao et al.,
// 2023).
#pragma once
#include "convert.cuh"

constexpr float LN_2 = 0.69314718055994530942f;
constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float NO_KEY = -0x1.fffffep127f;  // a maximum before the first key: -INF - NO_KEY is -INF, as it has to be
// A maximum that moves only when a score passes it by more than this (base 2) is rarely moved; weights then stay below
// 2^8, far from overflow in fp16.
constexpr float RESCALE_STEP = 8.f;

// Four neighbouring columns of one row's state.
struct RowState {
    float max;
    float sum;
    float4 out;
};

__device__ __forceinline__ RowState empty_state() {
    RowState state;
    state.max = -INF;
    state.sum = 0.f;
    state.out.x = state.out.y = state.out.z = state.out.w = 0.f;
    return state;
}

__device__ __forceinline__ void multiply(float4& out, float by) {
    out.x *= by;
    out.y *= by;
    out.z *= by;
    out.w *= by;
}

// The state of lane ^ bits.
__device__ __forceinline__ RowState shuffle_xor(const RowState& state, int bits) {
    RowState other;
    other.max = __shfl_xor_sync(~0u, state.max, bits);
    other.sum = __shfl_xor_sync(~0u, state.sum, bits);
    other.out.x = __shfl_xor_sync(~0u, state.out.x, bits);
    other.out.y = __shfl_xor_sync(~0u, state.out.y, bits);
    other.out.z = __shfl_xor_sync(~0u, state.out.z, bits);
    other.out.w = __shfl_xor_sync(~0u, state.out.w, bits);
    return other;
}

// Merges `count` others into the state, all at once: the maximum first, so that no exponential waits for another (trial
// 106). An empty one is skipped, so that its out cannot matter.
template <int count>
__device__ __forceinline__ void fold(RowState& state, const RowState (&others)[count], float scale) {
    float common = state.max;
#pragma unroll
    for (int i = 0; i < count; ++i) common = fmaxf(common, others[i].max);
    const float base = common == -INF ? 0.f : common;
    const float keep = exp2_fast((state.max - base) * scale);
    float weights[count];
#pragma unroll
    for (int i = 0; i < count; ++i) weights[i] = exp2_fast((others[i].max - base) * scale);
    state.max = common;
    state.sum *= keep;
    multiply(state.out, keep);
#pragma unroll
    for (int i = 0; i < count; ++i) {
        if (others[i].max == -INF) continue;
        state.sum += others[i].sum * weights[i];
        state.out.x += others[i].out.x * weights[i];
        state.out.y += others[i].out.y * weights[i];
        state.out.z += others[i].out.z * weights[i];
        state.out.w += others[i].out.w * weights[i];
    }
}

// max: in base 2
__device__ __forceinline__ float log_sum_exp(float max, float sum) {
    return sum == 0.f ? -INF : (max + log2_fast(sum)) * LN_2;
}

// The sum of a row's weights with the weight of its sink, a score without a value. max and sink are scores of which
// `unit` times a score is one in base 2. Infinite where the sink outweighs all keys by 2^128: then their weight is 0 and
// the row's lse is its sink.
__device__ __forceinline__ float sum_with_sink(float sink, float unit, float max, float sum) {
    return sum + (sink == -INF ? 0.f : exp2_fast((sink - max) * unit));
}
