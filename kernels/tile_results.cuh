// tile_results: what a warp has at the end of a tile, on its way to memory. Registers as in lazy_softmax.cuh.
//
// A warp has 16 rows. With -DTMA_OUT=1 it lays them where its rows of Q stood, and one TMA operation takes them from
// there; the Q of the tile after next waits until they are gone. Where some rows stand nowhere the warp copies the others
// itself. With -DTMA_OUT=0 (a float32 out, a group that boxes do not fit, other head_dims, short requests) results go from
// registers to memory, 8 bytes at a time. (An H200, by TMA and not: 16 x 1024 250.8 us and 258.8, 64 x 128 on 2048 390.9
// and 395.8, 32 x 512 178.7 and 188.5, but 64 x 128, tiles of one block, 72.3 and 62.3; with HEAD_DIM 64 16 x 1024 204.3
// and 203.7.)
#pragma once
#include "attention_state.cuh"
#include "block_layout.cuh"
#include "convert.cuh"
#include "hopper.cuh"
#include "lazy_softmax.cuh"
#include "mma.cuh"
#include "tile_list.cuh"

static_assert(TMA_OUT == 0 || TMA_OUT == 1 && HEAD_DIM == 128, "TMA_OUT must be 0 or, with HEAD_DIM 128, 1");

struct Output {
    void* out;       // [q_rows, num_qo_heads, HEAD_DIM] fp16/bf16 or, with TMA_OUT=0, float
    float* lse;      // [q_rows, num_qo_heads] or null
    i64 row_stride;  // strides of out in elements
    i64 head_stride;
    int num_qo_heads;
    int is_float32;
};

// Where a row of a tile stands in q, out and lse.
struct RowPlace {
    i64 query;
    int head;
    bool stands;  // or nowhere: it is behind the request's last one
};

__device__ __forceinline__ RowPlace place_of(const TileList& list, const Tile& tile, int row) {
    const int packed = tile.first_row + row, token = divide(packed, list.group_size);
    const int group_size = int(list.group_size.divisor);
    return {tile.request.first_query + token, tile.kv_head * group_size + packed - token * group_size,
            packed < tile.num_rows};
}

// 1 / sum of the thread's row `row`, 0 or 1; stores the log-sum-exp.
__device__ __forceinline__ float end_row(const Output& to, const RowPlace& place, const Softmax& softmax, int row) {
    float total = softmax.sum[row];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (to.lse && (threadIdx.x & 3) == 0 && place.stands)
        to.lse[place.query * to.num_qo_heads + place.head] = log_sum_exp(softmax.max[row], total);
    return total == 0.f ? 0.f : __fdividef(1.f, total);
}

#if TMA_OUT
struct Results {
    // All that needs no O, while the last products are on their way.
    __device__ __forceinline__ void prepare(const Output& to, const TileList& list, const Tile& tile, int first_row,
                                            const Softmax& softmax) {
        const int warp_row = first_row - (threadIdx.x & 31) / 4;
        upper = end_row(to, place_of(list, tile, first_row), softmax, 0);
        lower = end_row(to, place_of(list, tile, first_row + 8), softmax, 1);
        const RowPlace first = place_of(list, tile, warp_row);
        query = int(first.query);
        head = first.head;
        rows_left = tile.num_rows - tile.first_row - warp_row;
    }

    // O / sum. `rows` is where the warp's rows of Q stood: 16 lines for each 64 columns, swizzled. `map` is out in
    // dimensions of 64 columns, heads, rows and pieces of 64 columns; a box of it is a warp's 16 rows.
    __device__ __forceinline__ void take(const Output& to, const TensorMap* map, const TileList& list, const Tile& tile,
                                         int first_row, unsigned char* rows, const float (&o)[HEAD_DIM / 2]) {
        const int lane = threadIdx.x & 31, warp_row = first_row - lane / 4;
        // Lane l gives the address of line l % 8 of matrix l / 8: rows 0-7 and 8-15 of 8 columns, then of the next 8.
        const shared_address source = shared_address_of(rows);
        const shared_address matrix = source + (lane & 15) * 128 + ((lane >> 4) ^ (lane & 7)) * 16;
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 8; i += 2)
            store_matrix_x4((matrix ^ (i % 8 * 16)) + i / 8 * WARP_PIECE_BYTES,
                            pack2(o[4 * i] * upper, o[4 * i + 1] * upper),
                            pack2(o[4 * i + 2] * lower, o[4 * i + 3] * lower),
                            pack2(o[4 * i + 4] * upper, o[4 * i + 5] * upper),
                            pack2(o[4 * i + 6] * lower, o[4 * i + 7] * lower));
        if (rows_left >= 16) {
            fence_shared_for_async();
            __syncwarp();
            if (lane == 0) send_box_4d(map, source, head, query);
        } else {
            __syncwarp();
#pragma unroll 1
            for (int i = lane; i < rows_left * CHUNKS; i += 32) {
                const int row = i / CHUNKS, chunk = i % CHUNKS;
                const RowPlace place = place_of(list, tile, warp_row + row);
                u16* const target = static_cast<u16*>(to.out) + place.query * to.row_stride + place.head * to.head_stride;
                *reinterpret_cast<uint4*>(target + chunk * 8) = *reinterpret_cast<const uint4*>(
                    rows + chunk / 8 * WARP_PIECE_BYTES + row * 128 + (chunk % 8 ^ row % 8) * 16);
            }
        }
        __syncwarp();
    }

    template <int quarter>
    __device__ __forceinline__ void store() const {}

    // Waits until the place in shared memory may be overwritten.
    __device__ __forceinline__ void leave() const {
        if ((threadIdx.x & 31) == 0) wait_sent();
    }

  private:
    static constexpr int WARP_PIECE_BYTES = 16 * 128;

    float upper, lower;  // 1 / sum of the thread's two rows
    int query, head;     // where the warp's first row stands
    int rows_left;       // of the request, from that one on
};
#else
struct Results {
    // All that needs no O, while the last products are on their way. The results before have been stored.
    __device__ __forceinline__ void prepare(const Output& to, const TileList& list, const Tile& tile, int first_row,
                                            const Softmax& softmax) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const RowPlace place = place_of(list, tile, first_row + row * 8);
            weight[row] = end_row(to, place, softmax, row);
            const i64 at = place.query * to.row_stride + place.head * to.head_stride;
            target[row] = place.stands ? static_cast<u16*>(to.out) + (to.is_float32 ? 2 * at : at) : nullptr;
        }
    }

    // O / sum. 16-bit results are kept for later, float32 is written at once.
    __device__ __forceinline__ void take(const Output& to, const TensorMap*, const TileList&, const Tile&, int,
                                         unsigned char*, const float (&o)[HEAD_DIM / 2]) {
        const int pair = threadIdx.x & 3;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            if (!target[row]) continue;
            if (!to.is_float32) {
                target[row] += (pair & 1) * 8 + (pair & 2) * 2;
                continue;
            }
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 8; ++i)
                *reinterpret_cast<float2*>(reinterpret_cast<float*>(target[row]) + i * 8 + pair * 2) =
                    make_float2(o[4 * i + 2 * row] * weight[row], o[4 * i + 2 * row + 1] * weight[row]);
            target[row] = nullptr;
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
                columns[4 * i + 2 * row] = odd ? other : first;
                columns[4 * i + 2 * row + 1] = odd ? second : other;
            }
    }

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

    __device__ __forceinline__ void leave() const {}

  private:
    u32 columns[HEAD_DIM / 4];  // 4 neighbouring columns of every 16, of the thread's two rows
    u16* target[2] = {};        // null: the row stands nowhere, or is written already
    float weight[2];            // 1 / sum
};
#endif
