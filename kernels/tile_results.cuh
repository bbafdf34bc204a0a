// tile_results: the way of a warp's results at the end of a tile to memory. Registers as in lazy_softmax.cuh.
//
// A warp has 16 rows. With -DTMA_OUT=1 it stores them over its rows of Q, and one TMA operation takes them from there;
// the Q of the tile after next waits until they are gone. Where some of the 16 are padding the warp copies the others
// itself. With -DTMA_OUT=0 (a float32 out, a group that boxes do not fit, other head_dims, short requests) results go
// from registers to memory, 8 bytes at a time. Long tiles gain by TMA, tiles of one block lose (trial 203).
#pragma once
#include "attention_state.cuh"
#include "block_layout.cuh"
#include "convert.cuh"
#include "hopper.cuh"
#include "lazy_softmax.cuh"
#include "mma.cuh"
#include "scores.cuh"
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

// A row of a tile in q, out and lse.
struct TileRow {
    i64 query;
    int head;
    bool is_valid;  // false for padding, behind the request's last row
};

__device__ __forceinline__ TileRow tile_row(const TileList& list, const Tile& tile, int row) {
    const int packed = tile.first_row + row, token = divide(packed, list.group_size);  // see packed_row
    const int group_size = int(list.group_size.divisor);
    return {tile.request.first_query + token, tile.kv_head * group_size + packed - token * group_size,
            packed < tile.num_rows};
}

// The sinks of a thread's two rows. To be asked for some time before the rows end.
struct Sinks {
    float row[2];
};

__device__ __forceinline__ Sinks tile_sinks(const Scoring& scoring, const TileList& list, const Tile& tile,
                                            int first_row) {
    Sinks sinks = {{-INF, -INF}};
    if constexpr (SINKS) {
#pragma unroll
        for (int row = 0; row < 2; ++row)
            sinks.row[row] =
                sink_of(scoring, tile_row(list, tile, first_row + 8 * row).head, is_request(tile.request));
    }
    return sinks;
}

// Ends the thread's row `row`, 0 or 1: stores its log-sum-exp, and returns what O is to be multiplied by.
__device__ __forceinline__ float end_tile_row(const Output& to, const TileRow& at, const Softmax& softmax,
                                              const Sinks& sinks, int row) {
    float total = softmax.sum[row];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    // Computed where it is used, as it keeps fewer registers.
    auto end = [&] { return end_row<true>(softmax.max[row], total, sinks.row[row]); };
    if (to.lse && (threadIdx.x & 3) == 0 && at.is_valid) to.lse[at.query * to.num_qo_heads + at.head] = end().lse();
    return end().weight;
}

#if TMA_OUT
struct Results {
    // What needs no O, while the last products are under way.
    __device__ __forceinline__ void prepare(const Output& to, const TileList& list, const Tile& tile, int first_row,
                                            const Softmax& softmax, const Sinks& sinks) {
        const int warp_row = first_row - (threadIdx.x & 31) / 4;
        upper = end_tile_row(to, tile_row(list, tile, first_row), softmax, sinks, 0);
        lower = end_tile_row(to, tile_row(list, tile, first_row + 8), softmax, sinks, 1);
        const TileRow first = tile_row(list, tile, warp_row);
        query = int(first.query);
        head = first.head;
        rows_left = tile.num_rows - tile.first_row - warp_row;
    }

    // Stores O / sum. `rows` is the memory of the warp's rows of Q: 16 lines for each 64 columns, swizzled. `map` is
    // out in dimensions of 64 columns, heads, rows and pieces of 64 columns; a box of it is a warp's 16 rows.
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
                const TileRow at = tile_row(list, tile, warp_row + row);
                u16* const target = static_cast<u16*>(to.out) + at.query * to.row_stride + at.head * to.head_stride;
                *reinterpret_cast<uint4*>(target + chunk * 8) = *reinterpret_cast<const uint4*>(
                    rows + chunk / 8 * WARP_PIECE_BYTES + row * 128 + (chunk % 8 ^ row % 8) * 16);
            }
        }
        __syncwarp();
    }

    template <int quarter>
    __device__ __forceinline__ void store() const {}

    // Waits until the rows in shared memory may be overwritten.
    __device__ __forceinline__ void leave() const {
        if ((threadIdx.x & 31) == 0) wait_sent();
    }

  private:
    static constexpr int WARP_PIECE_BYTES = 16 * 128;

    float upper, lower;  // 1 / sum of the thread's two rows
    int query, head;     // of the warp's first row
    int rows_left;       // of the request, from that row on
};
#else
struct Results {
    // What needs no O, while the last products are under way. The results of the tile before are stored by now.
    __device__ __forceinline__ void prepare(const Output& to, const TileList& list, const Tile& tile, int first_row,
                                            const Softmax& softmax, const Sinks& sinks) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const TileRow at = tile_row(list, tile, first_row + row * 8);
            weight[row] = end_tile_row(to, at, softmax, sinks, row);
            const i64 offset = at.query * to.row_stride + at.head * to.head_stride;
            target[row] = at.is_valid ? static_cast<u16*>(to.out) + (to.is_float32 ? 2 * offset : offset) : nullptr;
        }
    }

    // Takes O / sum. 16-bit results are kept for later, float32 is stored at once.
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
        // Of two neighbouring fragments an even lane takes the first, an odd lane the second: stores of 8 bytes, not 4.
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
    u16* target[2] = {};        // null: the row is padding, or is stored already
    float weight[2];            // 1 / sum
};
#endif
