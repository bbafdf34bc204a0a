// prefill: attention of many query tokens per request over that request's pages, on any GPU from sm_80 on.
//
//   out[row, head] = sum_x exp(score(row, head, x)) * V[x] / D          x = the tokens that the row may see
//   lse[row, head] = ln(D)                                              score and D: scores.cuh
//
// in    q         [q_rows, num_qo_heads, HEAD_DIM]    rows first_query .. first_query + num_queries are a request's
//       k, v      pools of pages of HEAD_DIM and V_HEAD_DIM numbers; NHD and HND differ in their strides only
//       requests  [num_requests + 1] Request          their pages and lengths (page_table.cuh); first_tile ascends.
//                                                     The last record is a sentinel without keys: first_tile counts
//                                                     the tiles of all requests, first_query their rows
//       page_ids  [max_pages] int                     clean: every id is inside the pool
//       sinks     [num_qo_heads] float                with SINKS
// out   out       [q_rows, num_qo_heads, V_HEAD_DIM]  fp16/bf16 or float32; 0 for a row that sees no key
//       lse       [q_rows, num_qo_heads] float        natural log; its sink, or -inf, for a row that sees no key;
//                                                     or null
//
// The query heads of one KV head and the tokens of a request are packed into one axis of rows, so any group size fills
// the tensor cores: packed row r is token r / group_size, head r % group_size of the group. S = Q K^T lives in
// registers, is turned into P = 2^(S - max) there, and O += P V never leaves them (FlashAttention-2, with the online
// softmax of Milakov & Gimelshein 2018).
//
// Who owns what
//   grid   one CTA per (tile of TILE_ROWS packed rows, KV head); KV heads vary fastest, so that CTAs which run together
//          read neighbouring memory; tiles come in reverse, since the last ones of a causal request are the longest.
//          The host knows only an upper bound of the tiles: a CTA finds its request by a search in `requests`. Tiles
//          from the sentinel on serve the rows of q past the planned ones, as a request without keys.
//   warp   TILE_ROWS / WARPS rows and all tokens: no exchange between warps, and every fragment of K and V that a warp
//          reads from shared memory serves all of its M_TILES row tiles.
//   shared memory: Q, one block of K, one block of V (shared_rows.cuh); the offsets of the tokens of two blocks in the
//          pools; what each row sees.
//          V of block j loads during the scores of block j, K of block j + 1 during P V of block j; page ids are read
//          two blocks ahead. At the end a warp's part of Q holds its output on the way to memory.
//   No atomics, so every run gives the same bits.
#include "attention_state.cuh"
#include "convert.cuh"
#include "load_global.cuh"
#include "mma.cuh"
#include "page_table.cuh"
#include "scores.cuh"
#include "shared_rows.cuh"

static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM >= 16 && HEAD_DIM <= 256, "HEAD_DIM must be a multiple of 16 up to 256");
static_assert(V_HEAD_DIM % 16 == 0 && V_HEAD_DIM >= 16 && V_HEAD_DIM <= 256, "V_HEAD_DIM must be likewise");

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * 32;
constexpr int CTAS_PER_SM = HEAD_DIM < 64 && V_HEAD_DIM < 64 ? 3 : 2;
// O takes M_TILES * V_HEAD_DIM / 2 registers, Q and K TILE_ROWS + BLOCK rows of shared memory.
constexpr bool WIDE = V_HEAD_DIM > 128 || HEAD_DIM > 192;
constexpr bool MIXED = HEAD_DIM != V_HEAD_DIM;
constexpr int M_TILES = WIDE ? 1 : 2;  // m16 tiles a warp
constexpr int WARP_ROWS = M_TILES * 16;
static_assert(TILE_ROWS == WARPS * WARP_ROWS, "TILE_ROWS must be what recipes.py says");
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int BLOCK = V_HEAD_DIM > 112 || WIDE ? 32 : 64;  // tokens; 64 of them would spill registers
#else
constexpr int BLOCK = V_HEAD_DIM > 112 && MIXED || WIDE ? 32 : 64;
#endif
constexpr int K_STEPS = HEAD_DIM / 16;    // k-steps of Q K^T
constexpr int O_STEPS = V_HEAD_DIM / 16;  // pairs of n-tiles of P V
constexpr int BLOCK_STEPS = BLOCK / 16;   // pairs of n-tiles of Q K^T, and k-steps of P V
constexpr int K_CHUNKS = HEAD_DIM / 8;    // 16-byte pieces of a row of Q and K
constexpr int V_CHUNKS = V_HEAD_DIM / 8;  // of V and out
typedef SharedRows<K_CHUNKS> KRows;       // of Q and K
typedef SharedRows<V_CHUNKS> VRows;       // of V and, over Q, of out

// Threads that share a row of so many chunks, a chunk each: few enough that each thread has a row of a block.
constexpr int lanes_of_row(int chunks) {
    return chunks <= 2 && BLOCK == 64 ? 2 : chunks <= 4 ? 4 : chunks <= 8 ? 8 : chunks <= 16 ? 16 : 32;
}
constexpr int K_LANES = lanes_of_row(K_CHUNKS), V_LANES = lanes_of_row(V_CHUNKS);
static_assert(BLOCK % (THREADS / K_LANES) == 0 && TILE_ROWS % (THREADS / K_LANES) == 0, "equally many rows a thread");
static_assert(BLOCK % (THREADS / V_LANES) == 0, "equally many rows a thread");

constexpr int K_OFFSET = TILE_ROWS * (KRows::BYTES > VRows::BYTES ? KRows::BYTES : VRows::BYTES);  // Q, then out, at 0
constexpr int V_OFFSET = K_OFFSET + BLOCK * KRows::BYTES;
constexpr int TOKENS_OFFSET = V_OFFSET + BLOCK * VRows::BYTES;  // [2] TokenOffsets
constexpr int ROWS_OFFSET = TOKENS_OFFSET + 4 * BLOCK * 4;      // [TILE_ROWS] Row
static_assert(SHARED_BYTES >= ROWS_OFFSET + TILE_ROWS * 16, "SHARED_BYTES must be what recipes.py says");
static_assert(SHARED_BYTES <= 99 * 1024, "the smallest shared memory of a CTA from sm_80 on");

struct PrefillParams {
    const u16* k;  // from here to num_tiles: what a run may change
    const u16* v;
    const u16* q;
    void* out;
    float* lse;
    Scoring scoring;
    i64 q_row_stride;  // strides of q and out in elements
    i64 q_head_stride;
    i64 out_row_stride;
    i64 out_head_stride;
    PoolStrides k_strides;
    PoolStrides v_strides;
    int out_float32;
    int q_rows;
    int num_tiles;  // upper bound; the grid is num_tiles * num_kv_heads
    const Request* requests;
    const int* page_ids;
    Positions positions;
    int num_requests;  // capacity: requests beside the sentinel
    int num_qo_heads;
    int num_kv_heads;
    FastDivide group_size;
};

// Offsets of the tokens of one block in the two pools, in units of 16 bytes.
struct TokenOffsets {
    u32 k[BLOCK];
    u32 v[BLOCK];
};

// One packed row: the tokens that it sees (end -1: it belongs to no request), and its indices in q and out (query -1:
// padding).
struct __align__(16) Row {
    KvLimits limits;
    int query;
    int head;
};

// The CTA copies a block of rows of CHUNKS chunks to shared memory, and closes the group of its copies.
// The thread has chunk `chunk` of the rows from COUNT * row on.
template <int CHUNKS>
__device__ __forceinline__ void load_block(shared_address to, const u16* pool, const u32 (&offsets)[BLOCK], int chunk,
                                           int row) {
    constexpr int LANES = lanes_of_row(CHUNKS), COUNT = BLOCK / (THREADS / LANES);
    const int first = row * COUNT;
    const u64 base = reinterpret_cast<u64>(pool) + chunk * 16;
    if (chunk < CHUNKS) {
        u32 from[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) from[i] = offsets[first + i];
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            copy_async_16(to + SharedRows<CHUNKS>::at(first + i, chunk),
                          reinterpret_cast<const void*>(base + u64(from[i]) * 16), true);
    }
    commit_copies();
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS_PER_SM) prefill(const __grid_constant__ PrefillParams p) {
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    TokenOffsets* const token_offsets = reinterpret_cast<TokenOffsets*>(shared_memory + TOKENS_OFFSET);
    Row* const rows = reinterpret_cast<Row*>(shared_memory + ROWS_OFFSET);
    const shared_address shared = shared_address_of(shared_memory);
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int quad = lane >> 2, pair = lane & 3;  // an mma fragment: row quad (and quad + 8), columns 2 * pair, + 1

    const int k_chunk = thread % K_LANES, k_row = thread / K_LANES, v_chunk = thread % V_LANES, v_row = thread / V_LANES;

    // 1. The request of this tile.
    const int kv_head = blockIdx.x % p.num_kv_heads, tile = p.num_tiles - 1 - int(blockIdx.x) / p.num_kv_heads;
    const int index = find_request(p.requests, p.num_requests, tile);
    Request request = p.requests[index];
    if (index == p.num_requests) request.num_queries = p.q_rows - request.first_query;
    const i64 first_row = i64(tile - request.first_tile) * TILE_ROWS;
    if (first_row >= request.num_queries * i64(p.group_size.divisor)) return;

    // 2. What each row sees. Padding behind the last row sees what the last token sees.
    if (thread < TILE_ROWS) {
        const PackedRow packed = packed_row(int(first_row) + thread, p.group_size);
        const int last = request.num_queries - 1;
        const u32 query = u32(request.first_query) + u32(packed.token);
        Row row;
        row.limits = kv_limits(packed.token < last ? packed.token : last, request, p.positions);
        if (!is_request(request)) row.limits.end = -1;
        row.query = packed.token <= last && query < u32(p.q_rows) ? int(query) : -1;
        row.head = kv_head * int(p.group_size.divisor) + packed.head;
        rows[thread] = row;
    }
    __syncthreads();
    // Limits grow with the token: the first row has the smallest, the last one the largest.
    const int begin = rows[0].limits.begin, end = rows[TILE_ROWS - 1].limits.end;
    const int last_begin = rows[warp * WARP_ROWS + WARP_ROWS - 1].limits.begin;
    const int first_end = rows[warp * WARP_ROWS].limits.end;

    // 3. Loads. Thread i computes the offsets of token i of a block. Tokens from `end` on get those of the last one
    // before it: unused slots, whose NaN would survive a weight of 0, are not read, and no address leaves the pools.
    auto token_of = [&](int block) -> int { return block + thread < end ? block + thread : end - 1; };
    auto page_of = [&](int block) -> int {
        return __ldg(p.page_ids + request.first_page + divide(token_of(block), p.positions.page_size));
    };
    auto locate_tokens = [&](TokenOffsets& offsets, int block, int page) {
        const int token = token_of(block);
        const u32 slot = token - divide(token, p.positions.page_size) * p.positions.page_size.divisor;
        offsets.k[thread] = pool_offset<u32>(page, slot, kv_head, p.k_strides);
        offsets.v[thread] = pool_offset<u32>(page, slot, kv_head, p.v_strides);
    };
    auto load_k = [&](const TokenOffsets& offsets) {
        load_block<K_CHUNKS>(shared + K_OFFSET, p.k, offsets.k, k_chunk, k_row);
    };
    auto load_v = [&](const TokenOffsets& offsets) {
        load_block<V_CHUNKS>(shared + V_OFFSET, p.v, offsets.v, v_chunk, v_row);
    };
    int next_page = 0;
    if (begin < end) {
        if (thread < BLOCK) {
            locate_tokens(token_offsets[0], begin, page_of(begin));
            next_page = page_of(begin + BLOCK);
        }
        if (k_chunk < K_CHUNKS) {
#pragma unroll 4
            for (int i = k_row; i < TILE_ROWS; i += THREADS / K_LANES) {
                const Row row = rows[i];
                const i64 from = row.query < 0 ? 0 : row.query * p.q_row_stride + row.head * p.q_head_stride;
                copy_async_16(shared + KRows::at(i, k_chunk), p.q + from + k_chunk * 8, row.query >= 0);
            }
        }
        __syncthreads();
        load_k(token_offsets[0]);
    }

    // 4. The loop over blocks of tokens. Scores are kept in base 2.
    float out[M_TILES][O_STEPS * 2][4], max[M_TILES][2], sum[M_TILES][2];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
        max[m][0] = max[m][1] = NO_KEY;
        sum[m][0] = sum[m][1] = 0.f;
#pragma unroll
        for (int n = 0; n < O_STEPS * 2; ++n) out[m][n][0] = out[m][n][1] = out[m][n][2] = out[m][n][3] = 0.f;
    }
    // ldmatrix: lane l gives the address of row l % 8 of matrix l / 8. For V the matrices are read transposed.
    const shared_address q_matrix = shared + KRows::at(warp * WARP_ROWS + (lane & 15), lane >> 4);
    const shared_address k_matrix = shared + K_OFFSET + KRows::at((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
    const shared_address v_matrix = shared + V_OFFSET + VRows::at(lane & 15, lane >> 4);
    const float scale = score_factors(p.scoring).scale;
    int parity = 0;

#pragma unroll 1
    for (int block = begin; block < end; block += BLOCK) {
        const int next_block = block + BLOCK;

        // K has come, and every warp is done with V of the block before.
        wait_copies<0>();
        __syncthreads();
        load_v(token_offsets[parity]);
        parity ^= 1;
        if (thread < BLOCK && next_block < end) {
            locate_tokens(token_offsets[parity], next_block, next_page);
            next_page = page_of(next_block + BLOCK);
        }

        // S = Q K^T
        float score[M_TILES][BLOCK_STEPS * 2][4];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int n = 0; n < BLOCK_STEPS * 2; ++n)
                score[m][n][0] = score[m][n][1] = score[m][n][2] = score[m][n][3] = 0.f;
#pragma unroll
        for (int step = 0; step < K_STEPS; ++step) {
            u32 a[M_TILES][4];
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
                load_matrix_x4(a[m], KRows::advance(q_matrix, step) + m * 16 * KRows::BYTES);
#pragma unroll
            for (int n = 0; n < BLOCK_STEPS; ++n) {
                u32 b[4];
                load_matrix_x4(b, KRows::advance(k_matrix, step) + n * 16 * KRows::BYTES);
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    mma_m16n8k16(score[m][2 * n], a[m], b[0], b[1]);
                    mma_m16n8k16(score[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }

#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int n = 0; n < BLOCK_STEPS * 2; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const Row& row = rows[warp * WARP_ROWS + m * 16 + i / 2 * 8 + quad];
                    const int query = row.query - request.first_query, x = block + n * 8 + 2 * pair + i % 2;
                    score[m][n][i] = score_of(score[m][n][i], score_factors(p.scoring),
                                              {request, p.positions, query, row.head, x});
                }

        // Only blocks at the edge of what a row of this warp sees need a mask.
        if (block < last_begin || next_block > first_end) {
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const KvLimits seen = rows[warp * WARP_ROWS + m * 16 + half * 8 + quad].limits;
#pragma unroll
                    for (int n = 0; n < BLOCK_STEPS * 2; ++n)
#pragma unroll
                        for (int i = 0; i < 2; ++i)
                            mask_score(score[m][n][half * 2 + i], seen.begin, seen.end, block + n * 8 + 2 * pair + i);
                }
        }

        // Where a score passes the maximum the lanes of a row agree on a new one and rescale what they have. The
        // maximum is not lazy: the largest P would be other than 1, and P is rounded for its product with V but not in
        // the sum, which shows in a row that is mostly one token (trial 201).
        float block_max[M_TILES][2];
        bool passed = false;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float top = score[m][0][half * 2];
#pragma unroll
                for (int n = 0; n < BLOCK_STEPS * 2; ++n)
                    top = fmaxf(top, fmaxf(score[m][n][half * 2], score[m][n][half * 2 + 1]));
                block_max[m][half] = top * scale;
                passed |= block_max[m][half] > max[m][half];
            }
        if (__any_sync(~0u, passed)) {
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float top = block_max[m][half];
                    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
                    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
                    top = fmaxf(top, max[m][half]);
                    const float keep = exp2_fast(max[m][half] - top);
                    max[m][half] = top;
                    sum[m][half] *= keep;
#pragma unroll
                    for (int n = 0; n < O_STEPS * 2; ++n) {
                        out[m][n][half * 2] *= keep;
                        out[m][n][half * 2 + 1] *= keep;
                    }
                }
        }

        // V has come, and every warp is done with K.
        wait_copies<0>();
        __syncthreads();
        if (next_block < end) load_k(token_offsets[parity]);

        // O += P V. The accumulators of S become A fragments by rounding alone.
#pragma unroll
        for (int step = 0; step < BLOCK_STEPS; ++step) {
            u32 a[M_TILES][4];
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) {  // rows quad, quad + 8 of n-tile 2 * step, then of the next one
                    const int n = step * 2 + i / 2, half = i % 2;
                    const float low = exp2_fast(fmaf(score[m][n][half * 2], scale, -max[m][half]));
                    const float high = exp2_fast(fmaf(score[m][n][half * 2 + 1], scale, -max[m][half]));
                    sum[m][half] += low + high;
                    a[m][i] = pack2(low, high);
                }
#pragma unroll
            for (int n = 0; n < O_STEPS; ++n) {
                u32 b[4];
                load_matrix_x4_transposed(b, VRows::advance(v_matrix, n) + step * 16 * VRows::BYTES);
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    mma_m16n8k16(out[m][2 * n], a[m], b[0], b[1]);
                    mma_m16n8k16(out[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
    }

    // 5. Normalise and store. 16-bit results go through shared memory, over Q, so that whole rows are stored.
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float total = sum[m][half];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            const int r = warp * WARP_ROWS + m * 16 + half * 8 + quad;
            const Row row = rows[r];
            const RowEnd end = end_row(max[m][half], total, sink_of(p.scoring, row.head, row.limits.end >= 0));
            if (p.lse && pair == 0 && row.query >= 0) p.lse[i64(row.query) * p.num_qo_heads + row.head] = end.lse();
            const i64 at = row.query * p.out_row_stride + row.head * p.out_head_stride + 2 * pair;
#pragma unroll
            for (int n = 0; n < O_STEPS * 2; ++n) {
                const float low = out[m][n][half * 2] * end.weight, high = out[m][n][half * 2 + 1] * end.weight;
                if (!p.out_float32)
                    *reinterpret_cast<u32*>(shared_memory + VRows::at(r, n) + pair * 4) = pack2(low, high);
                else if (row.query >= 0)
                    *reinterpret_cast<float2*>(static_cast<float*>(p.out) + at + n * 8) = make_float2(low, high);
            }
        }
    if (p.out_float32) return;
    __syncwarp();
    const int column = lane % V_LANES;
#pragma unroll 4
    for (int i = lane / V_LANES; i < WARP_ROWS; i += 32 / V_LANES) {
        const int r = warp * WARP_ROWS + i;
        const Row row = rows[r];
        if (column < V_CHUNKS && row.query >= 0)
            *reinterpret_cast<uint4*>(static_cast<u16*>(p.out) + row.query * p.out_row_stride +
                                      row.head * p.out_head_stride + column * 8) =
                *reinterpret_cast<const uint4*>(shared_memory + VRows::at(r, column));
    }
}
