// attention_state: the running state of one output row, and how two of them become one.
//
// Attention over a set of keys is summed up by (max, sum, out):
//   max = the largest score (base 2: score * log2(e)),  sum = sum of 2^(score - max),  out = sum of 2^(score - max) * V
// The states of two disjoint sets merge into the state of their union, in any order. The empty set is (-inf, 0, 0) and
// changes nothing. The result of a row is out / sum, its log-sum-exp (max + log2(sum)) * ln 2.
#pragma once
#include "convert.cuh"

constexpr float LN_2 = 0.69314718055994530942f;

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

// Merges (max, sum, out) into the state. An empty one is skipped, so that whatever stands in its out cannot matter.
__device__ __forceinline__ void fold(RowState& state, float max, float sum, const float4& out) {
    if (max == -INF) return;
    const float common = fmaxf(state.max, max);
    const float keep = exp2_fast(state.max - common), weight = exp2_fast(max - common);
    state.max = common;
    state.sum = state.sum * keep + sum * weight;
    state.out.x = state.out.x * keep + out.x * weight;
    state.out.y = state.out.y * keep + out.y * weight;
    state.out.z = state.out.z * keep + out.z * weight;
    state.out.w = state.out.w * keep + out.w * weight;
}

__device__ __forceinline__ float log_sum_exp(float max, float sum) {
    return sum == 0.f ? -INF : (max + log2_fast(sum)) * LN_2;
}
