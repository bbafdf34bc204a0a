// lazy_softmax: from scores to weights, on the registers of a warpgroup's 64 rows.
//
// A thread has two rows, 0 and 1: s[4 i + 2 r], s[4 i + 2 r + 1] are columns 8 i + 2 pair, + 1 of row r, where pair is
// the thread's index among the four that share the row.
//
// The softmax is online (Milakov & Gimelshein 2018) and lazy (as FlashAttention-4's conditional rescaling): `max` is
// only a reference that keeps powers of two in range, and any other gives the same out. A block whose rows all see all
// of it is therefore done without looking for its maximum: P = 2^(S - max) with the max of the blocks before. P >= 0,
// so the sum of a row bounds each of its P, and where a thread's share of it is at most MOST_SUM these P are as good as
// any. Otherwise, which is rare, the warp alone does one of two things:
//   all sums below 2^125   every P is known to 24 bits: where one is above 1, the row's largest becomes 1; O and the
//                          sum are scaled down with it, and max goes up
//   one is not             S is lost; the warp computes it again from its Q and the K that it has not released yet
//                          (mma.sync), and takes its maximum
// The first block of a tile and blocks with masked tokens look for the maximum first. A row that sees a block in full
// without a mask has seen a token in a block before (see `edge` in prefill_hopper.cu), so its max is that of a real
// score.
//
// MOST_SUM is far below what 16 bits hold, because a P other than 1 is rounded in its product with V, but not in the
// sum. Many weights average that out; a token that is all of its row does not. Smaller bounds cost more (trial 202).
#pragma once
#include "attention_state.cuh"
#include "convert.cuh"
#include "load_global.cuh"
#include "mma.cuh"
#include "scores.cuh"

constexpr float MOST_SUM = 0x1p8f;       // of a row's P in a block, a thread's share
constexpr float MOST_SCALED = 0x1p125f;  // its inverse is a normal number: one that is not is a zero to the hardware

// Scores of tokens that the two rows do not see become -INF, whatever they are. `first` is the thread's first column.
template <int count>
__device__ __forceinline__ void mask_scores(float (&s)[count], const KvLimits* seen, int first) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const u32 visible = visible_columns(seen[8 * row], first);
#pragma unroll
        for (int i = 0; i < count / 4; ++i) {
            float& low = s[4 * i + 2 * row];
            float& high = s[4 * i + 2 * row + 1];
            low = visible >> (2 * i) & 1 ? low : -INF;
            high = visible >> (2 * i + 1) & 1 ? high : -INF;
        }
    }
}

// The state of a thread's rows: P is 2^(S - max), where max (base 2) is about the largest S; sum adds P of the thread's
// columns only.
struct Softmax {
    float max[2];
    float sum[2];
};

// The maximum moves only when a score passes it by more than RESCALE_STEP: then, and only then, the lanes of a row
// agree on a new one. Returns whether it moves, and in `keep` the factor of earlier results.
template <int count>
__device__ __forceinline__ bool raise_max(const float (&s)[count], Softmax& softmax, float (&keep)[2], float scale) {
    float top[2];
    bool passed = false;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        top[row] = s[2 * row];
#pragma unroll
        for (int i = 0; i < count / 4; ++i)
            top[row] = fmaxf(top[row], fmaxf(s[4 * i + 2 * row], s[4 * i + 2 * row + 1]));
        top[row] *= scale;
        passed |= top[row] > softmax.max[row] + RESCALE_STEP;
    }
    passed = __any_sync(~0u, passed);
    if (passed) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            top[row] = fmaxf(top[row], __shfl_xor_sync(~0u, top[row], 1));
            top[row] = fmaxf(top[row], __shfl_xor_sync(~0u, top[row], 2));
            top[row] = fmaxf(top[row], softmax.max[row]);
            keep[row] = exp2_fast(softmax.max[row] - top[row]);
            softmax.max[row] = top[row];
            softmax.sum[row] *= keep[row];
        }
    }
    return passed;
}

// S becomes P in elements first .. last - 1 of `s`, which are added to `sum`.
template <int first, int last, int count>
__device__ __forceinline__ void exponentials(float (&s)[count], const Softmax& softmax, float (&sum)[2], float scale) {
#pragma unroll
    for (int i = first; i < last; ++i) s[i] = exp2_fast(fmaf(s[i], scale, -softmax.max[i / 2 % 2]));
#pragma unroll
    for (int i = first; i < last; ++i) sum[i / 2 % 2] += s[i];
}

// Scales a row's finite P down, where one is above 1, so that the largest becomes 1 (up to the rounding of max), and
// raises max by as much.
template <int count>
__device__ __forceinline__ void scale_down(float (&s)[count], Softmax& softmax, float (&sum)[2], float (&keep)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float top = 1.f;
#pragma unroll
        for (int i = 0; i < count / 4; ++i) top = fmaxf(top, fmaxf(s[4 * i + 2 * row], s[4 * i + 2 * row + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float raised = softmax.max[row] + log2_fast(top);
        keep[row] = exp2_fast(softmax.max[row] - raised);  // what a large max moves by after rounding
        softmax.max[row] = raised;
        softmax.sum[row] *= keep[row];
        sum[row] *= keep[row];
#pragma unroll
        for (int i = 0; i < count / 4; ++i) {
            s[4 * i + 2 * row] *= keep[row];
            s[4 * i + 2 * row + 1] *= keep[row];
        }
    }
}

// S = Q K^T of the warp's 16 rows, without wgmma. `k_block` is the block of K in shared memory: groups of 8 tokens are
// group_bytes apart, pieces of 64 columns piece_bytes. Eight columns at a time enter at the end of S and move up, since
// registers have no index and a loop keeps the code short.
template <int steps, int group_bytes, int piece_bytes, int count, typename Queries>
__device__ __forceinline__ void repeat_scores(float (&s)[count], const Queries& queries, shared_address k_block) {
    const int lane = threadIdx.x & 31, line = lane % 8;
#pragma unroll 1
    for (int i = 0; i < count / 4; ++i) {
        float scores[4] = {};
#pragma unroll
        for (int step = 0; step < steps; step += 2) {  // two k-steps are four chunks, one for each 8 lanes
            const int chunk = step % 4 * 2 + lane / 8;
            u32 k[4];
            load_matrix_x4(k, k_block + i * group_bytes + step / 4 * piece_bytes + line * 128 + (chunk ^ line) * 16);
#pragma unroll
            for (int half = 0; half < 2 && step + half < steps; ++half) {
                u32 q[4];
                queries.fragment(q, step + half);
                mma_m16n8k16(scores, {q[0], q[1], q[2], q[3]}, k[2 * half], k[2 * half + 1]);
            }
        }
#pragma unroll
        for (int j = 0; j < count - 4; ++j) s[j] = s[j + 4];
#pragma unroll
        for (int j = 0; j < 4; ++j) s[count - 4 + j] = scores[j];
    }
}

// The accumulators of S are the A fragments of P, by rounding alone.
template <int count>
__device__ __forceinline__ void round_weights(u32 (&weights)[count / 2], const float (&s)[count]) {
#pragma unroll
    for (int i = 0; i < count / 2; ++i) weights[i] = pack2(s[2 * i], s[2 * i + 1]);
}
