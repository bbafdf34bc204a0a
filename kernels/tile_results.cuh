// tile_results: what a warpgroup has at the end of a tile, on its way to memory. Registers as in lazy_softmax.cuh.
//
// Results go from registers to memory, 8 bytes at a time. By way of shared memory, where Q had stood, they were no faster
// (an H200, 16 x 1024: 258 us; whole rows sent on by the warp itself 259, by the fourth producer 347, by TMA, an
// operation a row, 286; 1 x 8192: 709, 726, 718, 717).
#pragma once
#include "attention_state.cuh"
#include "convert.cuh"
#include "lazy_softmax.cuh"
#include "tile_list.cuh"

struct Output {
    void* out;       // [q_rows, num_qo_heads, HEAD_DIM] fp16/bf16 or float
    float* lse;      // [q_rows, num_qo_heads] or null
    i64 row_stride;  // strides of out in elements
    i64 head_stride;
    int num_qo_heads;
    int is_float32;
};

// 16-bit results of a tile on their way to memory: 4 neighbouring columns of every 16, of the thread's two rows.
struct Results {
    u32 columns[HEAD_DIM / 4];
    u16* target[2];  // null: the row stands nowhere

    // A quarter of the stores.
    template <int quarter>
    __device__ __forceinline__ void store() const {
        constexpr int COUNT = HEAD_DIM / 16;
#pragma unroll
        for (int i = quarter * COUNT / 4; i < (quarter + 1) * COUNT / 4; ++i)
#pragma unroll
            for (int row = 0; row < 2; ++row)
                if (target[row])
                    *reinterpret_cast<uint2*>(target[row] + i * 16) =
                        make_uint2(columns[4 * i + 2 * row], columns[4 * i + 2 * row + 1]);
    }
};

// O / sum, and the log-sum-exp. 16-bit results are kept for later, float32 is written at once.
__device__ __forceinline__ void finish(const Output& to, const TileList& list, const Tile& tile, int first_row,
                                       const float (&o)[HEAD_DIM / 2], const Softmax& softmax, Results& results) {
    const int pair = threadIdx.x & 3;
    float weight[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float total = softmax.sum[row];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        weight[row] = total == 0.f ? 0.f : __fdividef(1.f, total);
        const int packed = tile.first_row + first_row + row * 8, token = divide(packed, list.group_size);
        const i64 query = tile.request.first_query + token;
        const int head = tile.kv_head * list.group_size.divisor + packed - token * list.group_size.divisor;
        const bool stands = packed < tile.num_rows;
        if (to.lse && pair == 0 && stands)
            to.lse[query * to.num_qo_heads + head] = log_sum_exp(softmax.max[row], total);
        const i64 at = query * to.row_stride + head * to.head_stride;
        results.target[row] = nullptr;
        if (!stands) continue;
        if (!to.is_float32) {
            results.target[row] = static_cast<u16*>(to.out) + at + (pair & 1) * 8 + (pair & 2) * 2;
            continue;
        }
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 8; ++i)
            *reinterpret_cast<float2*>(static_cast<float*>(to.out) + at + i * 8 + pair * 2) =
                make_float2(o[4 * i + 2 * row] * weight[row], o[4 * i + 2 * row + 1] * weight[row]);
    }
    // Of two fragments side by side an even lane takes the first, an odd lane the second: 8 bytes each instead of 4.
    const bool odd = pair & 1;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 16; ++i)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const u32 first = pack2(o[8 * i + 2 * row] * weight[row], o[8 * i + 2 * row + 1] * weight[row]);
            const u32 second = pack2(o[8 * i + 4 + 2 * row] * weight[row], o[8 * i + 5 + 2 * row] * weight[row]);
            const u32 other = __shfl_xor_sync(~0u, odd ? first : second, 1);
            results.columns[4 * i + 2 * row] = odd ? other : first;
            results.columns[4 * i + 2 * row + 1] = odd ? second : other;
        }
}
