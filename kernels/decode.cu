// decode: attention of a few query tokens per request over that request's pages.
//
//   out[row, head] = sum_x softmax_x(score(row, head, x)) * V[x]        x = the tokens that the row may see
//   score          = sm_scale * q[row, head] . K[x]                     (SOFT_CAP: c * tanh(score / c))
//   lse[row, head] = ln(sum_x exp(score))
//
// in    q            [batch * q_len, num_qo_heads, HEAD_DIM]    row = request * q_len + token
//       k, v         pools of pages; NHD and HND differ in their strides only
//       items        [num_items] DecodeItem                     who does which split of which request (splits.cu)
//       page_ids     [max_pages] int                            clean: every id is inside the pool
// out   out          like q, fp16/bf16 or float32               0 for a row that sees no key
//       lse          [batch * q_len, num_qo_heads] float        natural log, -inf for a row that sees no key; or null
// work  partials     [partials, COLUMNS, HEAD_DIM + 4] float    one a CTA, when a request is split: out, max, sum
//       arrivals     [batch * num_kv_heads * column_blocks] u32 zero before and after every launch
//
// Decode reads every K and V once and does little else, so all that counts is to keep enough loads in flight on every
// SM. The query heads of one KV head (and the q_len tokens of a request) are the *columns* of one small matrix product,
// so any group size runs on tensor cores:
//   S^T [16 tokens x 8 columns] = K [16 x HEAD_DIM] . Q^T         O^T [16 dims x 8 columns] += V^T . P^T
//
// Who owns what
//   grid   one CTA per (item, KV head, block of COLUMNS columns), an item being a split of a request. Blocks of columns
//          vary fastest, which read the same K and V, then KV heads, so that CTAs which run together read neighbouring
//          memory. The hardware hands out CTAs, the longest items first, which evens out SMs of unequal bandwidth better
//          than any equal split; two at a time, where planner.py says so.
//   warp   an independent pipeline over tiles of 16 tokens: tile = (i * WARPS + warp) * num_splits + split.
//          No barrier of the block before the end but that of Q_IN_SHARED.
//   shared memory, per warp: a ring of STAGES places (shared_rows.cuh), for K and V of its first tile, K and V of its
//          second, and so on. What has been read makes room for what comes STAGES later. At the end the same bytes hold
//          the warp's states: O, maximum and sum of each column.
//   Q      in registers, as operands of the products; with Q_IN_SHARED in shared memory, once for all warps, which wait
//          for it before their first tile. Asked for before K and V, or it would come behind all of them.
//   split  the last CTA of a split row to arrive merges all partial states, in an order that their number decides: the
//          same bits on every run. The arrival counter wraps to zero by itself.
#include "attention_state.cuh"
#include "convert.cuh"
#include "load_global.cuh"
#include "mma.cuh"
#include "page_table.cuh"
#include "scores.cuh"
#include "shared_rows.cuh"

static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM >= 16 && HEAD_DIM <= 256, "HEAD_DIM must be a multiple of 16 up to 256");
static_assert(COLUMNS % 8 == 0 && COLUMNS >= 8 && COLUMNS <= 32, "COLUMNS must be 8, 16, 24 or 32");

static_assert(STAGES >= 2 && STAGES <= 4, "STAGES must be 2, 3 or 4");
static_assert(WARPS == 2 || WARPS == 4 || WARPS == 8, "WARPS must be 2, 4 or 8");

constexpr int THREADS = WARPS * 32;
// With 16 columns of 128 dims a thread has 64 registers of O and would have 32 of Q: without these, two CTAs fit an SM
// (a trial on an H100, 64 x 4096, 16/1 heads, each in two splits: 53.5 us, with Q in registers 55.0).
#define Q_IN_SHARED (HEAD_DIM == 128 && COLUMNS == 16)
constexpr int WARPS_PER_SM = HEAD_DIM <= 128 && (COLUMNS == 8 || Q_IN_SHARED) ? 16 : 8;  // at least
constexpr int CTAS_PER_SM = WARPS_PER_SM / WARPS;
constexpr int TILE = 16;                     // tokens
constexpr int N_TILES = COLUMNS / 8;         // n-tiles of the matrix products
constexpr int PARTS = COLUMNS == 8 ? 2 : 1;  // of a score and of a weight, see 4.
constexpr int K_STEPS = HEAD_DIM / 16;       // k-steps of S, and m-tiles of O^T
constexpr int CHUNKS = HEAD_DIM / 8;         // 16-byte pieces of a row
constexpr int LOADS = TILE * CHUNKS / 32;    // pieces that a lane loads of a K or V tile
typedef SharedRows<CHUNKS> Rows;             // of a K or V tile
constexpr int TILE_BYTES = TILE * Rows::BYTES;
// Where K of tile i was read comes, if STAGES is even, K of tile i + AHEAD, and where V was read comes that tile's V. If
// it is odd, V of tile i + AHEAD comes in the place of K, and K of the tile behind it in the place of V.
constexpr int AHEAD = STAGES / 2, ODD = STAGES % 2;
constexpr int FIRST_TILES = AHEAD + ODD + 1;  // whose pages are looked up before the loop
// A column's state: HEAD_DIM floats of out, max, sum, and two that keep the next one's pieces of 16 bytes whole.
constexpr int STATE = HEAD_DIM + 4;
constexpr int OUT_BYTES = COLUMNS * STATE * 4;
constexpr int RING_BYTES = STAGES * TILE_BYTES;
constexpr int WARP_BYTES = RING_BYTES > OUT_BYTES ? RING_BYTES : OUT_BYTES;
static_assert(WARP_BYTES % 128 == 0 && TILE_BYTES % 128 == 0, "tiles begin on lines of 128 bytes");
constexpr int LIMITS_OFFSET = WARPS * WARP_BYTES;                 // [WARPS][COLUMNS] KvLimits
constexpr int ASSIGNMENT_OFFSET = LIMITS_OFFSET + WARPS * COLUMNS * 8;  // Assignment
constexpr int FLAG_OFFSET = ASSIGNMENT_OFFSET + 16;                     // int: this CTA merges
constexpr int Q_OFFSET = (FLAG_OFFSET + 16 + 127) / 128 * 128;     // [COLUMNS] rows
static_assert((Q_IN_SHARED ? Q_OFFSET + COLUMNS * Rows::BYTES : FLAG_OFFSET + 16) == SHARED_BYTES,
              "SHARED_BYTES must be what planner.py says");
// Rows of these begin and end inside of lines of 128 bytes, and the next KV head is read soon (an H200, 64 x 4096,
// 64/8 heads, NHD: 187.2 and 179.5 us, 209.1 and 198.1; HND as before; with HEAD_DIM 112 253 and 276).
constexpr bool WHOLE_LINES = HEAD_DIM == 80 || HEAD_DIM == 96;
// Of the first part of a weight: less than 1 by so much that after rounding something is left, as 0 * inf would be NaN.
// fp16 has few bits below SMALL_WEIGHT: there the parts are halves.
constexpr float FIRST_SHARE = BFLOAT16 ? 1.f - 0x1p-7f : 1.f - 0x1p-10f;
constexpr float SMALL_WEIGHT = BFLOAT16 ? 0.f : 0x1p-13f;
constexpr int PARTIALS_IN_FLIGHT = 8;

struct DecodeParams {
    const u16* q;  // from here to batch: what a run may change
    const u16* k;
    const u16* v;
    void* out;
    float* lse;
    const float* sinks;  // [num_qo_heads] with SINKS, natural logarithms
    i64 q_row_stride;  // strides of q and out in elements
    i64 q_head_stride;
    i64 out_row_stride;
    i64 out_head_stride;
    PoolStrides k_strides;
    PoolStrides v_strides;
    int out_float32;
    int batch;  // requests that q has rows for
    const DecodeItem* items;
    const int* page_ids;  // [num_page_ids]
    float* partials;
    u32* arrivals;
    Positions positions;
    int num_qo_heads;
    FastDivide num_kv_heads;
    FastDivide group_size;
    int q_len;
    FastDivide column_blocks;  // ceil(q_len * group_size / COLUMNS)
    int num_page_ids;
    Scoring scoring;
};

// What the end needs to know of the item: registers are scarce in the loop.
struct Assignment {
    int batch_index;
    int split;
    int num_splits;
    int first_partial;
};

// Four columns of one row's result, written where q stood.
__device__ __forceinline__ void write_row(const DecodeParams& p, int row, int head, int dim, const RowState& state) {
    const RowEnd end = end_row(state.max * score_factors(p.scoring).scale, state.sum, -INF);
    const float scale = end.weight;
    const i64 at = row * p.out_row_stride + head * p.out_head_stride + dim;
    float4 out = state.out;
    out.x *= scale;
    out.y *= scale;
    out.z *= scale;
    out.w *= scale;
    if (p.out_float32) {
        *reinterpret_cast<float4*>(static_cast<float*>(p.out) + at) = out;
    } else {
        uint2 packed;
        packed.x = pack2(out.x, out.y);
        packed.y = pack2(out.z, out.w);
        *reinterpret_cast<uint2*>(static_cast<u16*>(p.out) + at) = packed;
    }
    if (dim == 0 && p.lse) p.lse[i64(row) * p.num_qo_heads + head] = end_row(state.max * score_factors(p.scoring).scale, state.sum, -INF).lse;
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS_PER_SM) decode(const __grid_constant__ DecodeParams p) {
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int quad = lane >> 2, pair = lane & 3;  // an mma fragment: row quad (and quad + 8), columns 2 * pair, + 1

    // 1. Which request, split, columns and KV head this CTA serves, and where its first tiles stand.
    const int num_kv_heads = p.num_kv_heads.divisor, group_size = p.group_size.divisor;
    const int column_blocks = p.column_blocks.divisor, ctas_an_item = num_kv_heads * column_blocks;
    const int item_head = divide(blockIdx.x, p.column_blocks), place = divide(item_head, p.num_kv_heads);
    const int column_block = blockIdx.x - item_head * column_blocks, kv_head = item_head - place * num_kv_heads;
    const int cta = blockIdx.x - place * ctas_an_item;  // of those of the item
    const DecodeItem work = p.items[place];
    // While the item is on its way, so are the plan's page ids, 4 KiB a CTA: a line for each lane of its first warp
    // (the same trial, 1 x 4096, 32/8 heads: 13.73 us, without 14.05).
    const i64 own_id = (i64(blockIdx.x) * 32 + threadIdx.x) * 32;
    if (warp == 0 && own_id < p.num_page_ids) prefetch_to_l2(p.page_ids + own_id);
    const Request& request = work.request;
    if (work.batch_index < 0 || work.batch_index >= p.batch) return;
    Assignment* const assignment = reinterpret_cast<Assignment*>(shared_memory + ASSIGNMENT_OFFSET);
    if (threadIdx.x == 0) *assignment = {work.batch_index, work.split, work.num_splits, work.first_partial};

    // Tiles count from the first visible token on. Lane l asks for the page of token l % 16 of a tile, which is known by
    // how many tokens are left from its first one to the end.
    const int end = work.end, visible = end - work.begin;
    const int warp_first = (warp * work.num_splits + work.split) * TILE, stride = WARPS * work.num_splits * TILE;  // tokens
    auto page_of = [&](int left) -> int {
        const int page = divide(end - left + (lane & 15), p.positions.page_size);
        return (lane & 15) < left ? __ldg(p.page_ids + request.first_page + page) : 0;
    };
    int left = visible - warp_first, pages[FIRST_TILES];
#pragma unroll
    for (int i = 0; i < FIRST_TILES; ++i) pages[i] = page_of(left - i * stride);

    // Lane c speaks for column c: query token c / group_size of the request, head c % group_size of the group. Columns
    // behind the last one are copies of it.
    auto columns_of = [&](int block) -> int {
        const int columns_left = p.q_len * group_size - block * COLUMNS;
        return columns_left < COLUMNS ? columns_left : COLUMNS;
    };
    const int num_columns = columns_of(column_block);
    const int column = column_block * COLUMNS + (lane < num_columns ? lane : num_columns - 1);
    const PackedRow of = packed_row(column, p.group_size);
    const int query = of.token, row = work.batch_index * p.q_len + query, head = kv_head * group_size + of.head;

    // 2. Q^T, whose B fragments for one k-step are q[step]: lane holds dims 2 * pair, + 1 (and + 8) of column quad. (An
    // H200, 1 x 4096, 32/8 heads: 12.7 us, asked for behind K and V 12.9; 16 x 4096 of 4 queries 68.3 and 69.2.)
    u32 q[K_STEPS][N_TILES * 2];
#if Q_IN_SHARED
    static_assert(COLUMNS * CHUNKS % THREADS == 0, "a thread has whole pieces of Q");
    const shared_address q_rows = shared_address_of(shared_memory) + Q_OFFSET;
#pragma unroll
    for (int i = threadIdx.x; i < COLUMNS * CHUNKS; i += THREADS) {
        const int c = i / CHUNKS, chunk = i % CHUNKS;
        const int q_row = __shfl_sync(~0u, row, c), q_head = __shfl_sync(~0u, head, c);
        const u16* from = p.q + q_row * p.q_row_stride + q_head * p.q_head_stride + chunk * 8;
        copy_async_16(q_rows + Rows::at(c, chunk), from, true);
    }
    commit_copies();
#else
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
        const int c = n * 8 + quad;
        const int q_row = __shfl_sync(~0u, row, c), q_head = __shfl_sync(~0u, head, c);
        const u16* from = p.q + q_row * p.q_row_stride + q_head * p.q_head_stride + 2 * pair;
#pragma unroll
        for (int step = 0; step < K_STEPS; ++step) {
            q[step][2 * n] = __ldg(reinterpret_cast<const u32*>(from + step * 16));
            q[step][2 * n + 1] = __ldg(reinterpret_cast<const u32*>(from + step * 16 + 8));
        }
    }
#endif

    // 3. Loads. Lane l knows where token l % 16 of a tile stands; the lanes then fetch it in pieces of 16 bytes.
    const shared_address warp_base = shared_address_of(shared_memory) + warp * WARP_BYTES;
    // K and V must not push results and partial states out of L2 (an H200, as below and not: 256 x 512, 64/8 heads, 126.5
    // us and 129.2, one request of 256k among 255 of 500 354.8 and 367.6), but where neighbours in a line or another block
    // of columns read them too, these would be too late (64 x 4096, 64/8 heads of 80 dims 177 and 221, 64/2 heads 74 and
    // 88). Requests that share pages run together and find them mostly (64 x 4096, of which 3072 in the same pages, 123.0
    // and 122.6; ragged ones 241 and 222).
    const bool is_only_reader = HEAD_DIM * 2 % 128 == 0 && column_blocks == 1;
    const u64 policy = cache_policy(is_only_reader ? Evict::FIRST : Evict::UNCHANGED);

    auto offset_of = [&](int left, int page, const PoolStrides& strides) -> u32 {  // in units of 16 bytes
        const int x = end - left + (lane & 15);
        const int slot = x - divide(x, p.positions.page_size) * int(p.positions.page_size.divisor);
        return x < end ? pool_offset<u32>(page, slot, kv_head, strides) : 0u;
    };
    auto copy_tile = [&](shared_address to, const u16* pool, int left, u32 offset) {
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            // A lane's chunk is the same in all loads where whole rows make up 32 lanes, and so is its place in a load.
            const bool whole_rows = 32 % CHUNKS == 0;
            const int chunk = whole_rows ? lane % CHUNKS : (i * 32 + lane) % CHUNKS;
            const int token = whole_rows ? i * (32 / CHUNKS) + lane / CHUNKS : (i * 32 + lane) / CHUNKS;
            const u64 base = reinterpret_cast<u64>(pool) + chunk * 16;
            const u64 from = base + u64(__shfl_sync(~0u, offset, token)) * 16;
            // What lies behind the end becomes zeros: NaN in an unused slot would survive a weight of 0.
            copy_async_16<WHOLE_LINES>(to + Rows::at(token, chunk), reinterpret_cast<const void*>(from), token < left,
                                       policy);
        }
    };
    // A tile's K or V into the ring. Behind the last tile an empty group of copies takes its place.
    auto load_tile = [&](shared_address to, bool is_v, int left, int page) {
        if (left > 0) copy_tile(to, is_v ? p.v : p.k, left, offset_of(left, page, is_v ? p.v_strides : p.k_strides));
        commit_copies();
    };

#pragma unroll
    for (int i = 0; i < STAGES; ++i)
        load_tile(warp_base + i * TILE_BYTES, i % 2 == 1, left - i / 2 * stride, pages[i / 2]);
    int page = pages[AHEAD], next_page = pages[AHEAD + ODD];  // of what comes into the places of K and of V

    // What the columns see. Limits grow with the query token: the first column's are the smallest, the last one's the
    // largest.
    const KvLimits limits = kv_limits(query, request, p.positions);
    const int last_begin = __shfl_sync(~0u, limits.begin, num_columns - 1);
    const int first_end = __shfl_sync(~0u, limits.end, 0);
    KvLimits* const warp_limits = reinterpret_cast<KvLimits*>(shared_memory + LIMITS_OFFSET) + warp * COLUMNS;
    if (lane < COLUMNS) warp_limits[lane] = limits;
#if Q_IN_SHARED
    wait_copies<STAGES>();
    __syncthreads();
    const shared_address q_matrix = q_rows + Rows::at((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
#endif

    // 4. The loop over this warp's tiles. Scores are kept as they are, see attention_state.cuh.
    // Tensor cores truncate as they add, the less the smaller a sum is, and take weights of 16 bits. With 8 columns they
    // have time to spare: a score is the sum of its even and its odd steps, and a weight that of two 16-bit numbers
    // (an H200: the bench's cases of 8 columns take as long as without; 64 x 4096 with 32/1 heads would take 6% more).
    float out[N_TILES][K_STEPS][4], max[N_TILES][2], sum[N_TILES][2];
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
        max[n][0] = max[n][1] = -INF;
        sum[n][0] = sum[n][1] = 0.f;
#pragma unroll
        for (int step = 0; step < K_STEPS; ++step)
            out[n][step][0] = out[n][step][1] = out[n][step][2] = out[n][step][3] = 0.f;
    }
    // ldmatrix: lane l gives the address of row l % 8 of matrix l / 8. For V the matrices are read transposed.
    const int k_matrix = Rows::at((lane & 7) + ((lane >> 3) & 1) * 8, lane >> 4);
    const int v_matrix = Rows::at((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
    shared_address k_tile = warp_base, v_tile = warp_base + TILE_BYTES;  // in the ring, where they go two places on
    auto turn = [&](shared_address& tile) {
        if (STAGES > 2)
            tile += tile < warp_base + (STAGES - 2) * TILE_BYTES ? 2 * TILE_BYTES : (2 - STAGES) * TILE_BYTES;
    };
    const float scale = score_factors(p.scoring).scale;

#pragma unroll 1
    for (; left > 0; left -= stride) {
        const int next_left = left - AHEAD * stride, page_after_next = page_of(next_left - (1 + ODD) * stride);

        // S^T = K Q^T
        wait_copies<STAGES - 1>();
        __syncwarp();
        float sums[PARTS][N_TILES][4], score[N_TILES][4];
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
#pragma unroll
            for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[part][n][i] = 0.f;
#pragma unroll
        for (int step = 0; step < K_STEPS; ++step) {
            u32 a[4];
            load_matrix_x4(a, Rows::advance(k_tile + k_matrix, step));
#if Q_IN_SHARED
            load_matrix_x4(q[step], Rows::advance(q_matrix, step));
#endif
#pragma unroll
            for (int n = 0; n < N_TILES; ++n)
                mma_m16n8k16(sums[step % PARTS][n], a, q[step][2 * n], q[step][2 * n + 1]);
        }
#pragma unroll
        for (int n = 0; n < N_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                score[n][i] = PARTS == 1 ? sums[0][n][i] : sums[0][n][i] + sums[PARTS - 1][n][i];
        __syncwarp();
        load_tile(k_tile, ODD, next_left, page);
        turn(k_tile);

        if constexpr (SOFT_CAP) {
#pragma unroll
            for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) score[n][i] = score_of<true>(score[n][i], score_factors(p.scoring));
        }
        // Only tiles at an edge of some column's interval need a mask.
        const int first_token = end - left;
        if (first_token < last_begin || first_token + TILE > first_end) {
#pragma unroll
            for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const KvLimits seen = warp_limits[n * 8 + 2 * pair + (i & 1)];
                    mask_score(score[n][i], seen.begin, seen.end, first_token + quad + (i >> 1) * 8);
                }
        }

        // The maximum moves only when a score passes it by more than RESCALE_STEP (base 2): then, and only then, the
        // lanes of a column agree on a new one and rescale what they have.
        bool passed = false;
        float tile_max[N_TILES][2];
#pragma unroll
        for (int n = 0; n < N_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                tile_max[n][i] = fmaxf(score[n][i], score[n][i + 2]);
                passed |= (tile_max[n][i] - max[n][i]) * scale > RESCALE_STEP;  // NaN where both are -INF
            }
        if (__any_sync(~0u, passed)) {
#pragma unroll
            for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float top = tile_max[n][i];
                    top = fmaxf(top, __shfl_xor_sync(~0u, top, 4));
                    top = fmaxf(top, __shfl_xor_sync(~0u, top, 8));
                    top = fmaxf(top, __shfl_xor_sync(~0u, top, 16));
                    top = fmaxf(top, max[n][i]);
                    const float keep = top == -INF ? 1.f : exp2_fast((max[n][i] - top) * scale);
                    max[n][i] = top;
                    sum[n][i] *= keep;
#pragma unroll
                    for (int step = 0; step < K_STEPS; ++step) {
                        out[n][step][i] *= keep;
                        out[n][step][i + 2] *= keep;
                    }
                }
        }

        // P^T: exponentials, rounded to the element type and turned into B fragments; then what is left of them.
        u32 weight[PARTS][N_TILES][2];
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
            float x[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float base = max[n][i & 1] == -INF ? 0.f : max[n][i & 1];
                x[i] = exp2_fast((score[n][i] - base) * scale);
            }
            sum[n][0] += x[0] + x[2];
            sum[n][1] += x[1] + x[3];
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    float& low = x[2 * half];
                    float& high = x[2 * half + 1];
                    const auto share = [&](float weight) {
                        return part + 1 == PARTS ? 1.f : weight < SMALL_WEIGHT ? 0.5f : FIRST_SHARE;
                    };
                    const u32 rounded = pack2(low * share(low), high * share(high));
                    weight[part][n][half] = transpose_8x8(rounded);
                    low -= unpack2(rounded).x;
                    high -= unpack2(rounded).y;
                }
        }

        // O^T += V^T P^T
        wait_copies<STAGES - 1>();
        __syncwarp();
        constexpr int AT_ONCE = PARTS == 1 ? 1 : 4;  // so that no product waits for the one before
#pragma unroll
        for (int first = 0; first < K_STEPS; first += AT_ONCE) {
            u32 a[AT_ONCE][4];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                if (first + i < K_STEPS) load_matrix_x4_transposed(a[i], Rows::advance(v_tile + v_matrix, first + i));
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
                    for (int n = 0; n < N_TILES; ++n)
                        if (first + i < K_STEPS)
                            mma_m16n8k16(out[n][first + i], a[i], weight[part][n][0], weight[part][n][1]);
        }
        __syncwarp();
        load_tile(v_tile, !ODD, next_left - ODD * stride, next_page);
        turn(v_tile);
        page = ODD ? next_page : page_after_next;
        next_page = page_after_next;
    }

    // 5. Every warp lays its state into shared memory, where its tiles were.
    float* const states = reinterpret_cast<float*>(shared_memory);
    float* const warp_states = states + warp * (WARP_BYTES / 4);
    wait_copies<0>();
    __syncwarp();
#pragma unroll
    for (int n = 0; n < N_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float* const column_state = warp_states + (n * 8 + 2 * pair + i) * STATE;
            float total = sum[n][i];
            total += __shfl_xor_sync(~0u, total, 4);
            total += __shfl_xor_sync(~0u, total, 8);
            total += __shfl_xor_sync(~0u, total, 16);
            if (quad == 0) {
                // A column of NaN has no maximum, but is not empty.
                column_state[HEAD_DIM] = max[n][i] == -INF && total != 0.f ? 0.f : max[n][i];
                column_state[HEAD_DIM + 1] = total;
            }
#pragma unroll
            for (int step = 0; step < K_STEPS; ++step) {
                column_state[step * 16 + quad] = out[n][step][i];
                column_state[step * 16 + quad + 8] = out[n][step][i + 2];
            }
        }
    __syncthreads();

    const Assignment own = *assignment;
    const int num_splits = own.num_splits;

    // 6. Threads merge the warps' states, four dims each: the result, or this split's partial state.
    const int own_block = cta - kv_head * column_blocks;  // column_block again: registers are scarce in the loop
    const int num_items = columns_of(own_block) * (HEAD_DIM / 4);
    auto partial_of = [&](int of_split, int c) -> float* {
        const int place = (own.first_partial + of_split) * ctas_an_item + cta;
        return p.partials + i64(place * COLUMNS + c) * STATE;
    };
    auto write_column = [&](int c, int dim, const RowState& state) {
        const PackedRow of = packed_row(own_block * COLUMNS + c, p.group_size);
        write_row(p, own.batch_index * p.q_len + of.token, kv_head * group_size + of.head, dim, state);
    };
    for (int item = threadIdx.x; item < num_items; item += THREADS) {
        const int c = item / (HEAD_DIM / 4), dim = item % (HEAD_DIM / 4) * 4;
        RowState state = empty_state(), of_warps[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float* const from = states + w * (WARP_BYTES / 4) + c * STATE;
            const float2 other = *reinterpret_cast<const float2*>(from + HEAD_DIM);
            of_warps[w] = {other.x, other.y, *reinterpret_cast<const float4*>(from + dim)};
        }
        fold(state, of_warps, scale);
        if (num_splits <= 1) {
            write_column(c, dim, state);
        } else {
            float* const to = partial_of(own.split, c);
            *reinterpret_cast<float4*>(to + dim) = state.out;
            if (dim == 0) *reinterpret_cast<float2*>(to + HEAD_DIM) = {state.max, state.sum};
        }
    }
    if (num_splits <= 1) return;

    // 7. The last split to arrive merges the partial states of all. Few columns leave threads idle, so `shares` lanes
    // take every shares-th split of one item each.
    int* merges = reinterpret_cast<int*>(shared_memory + FLAG_OFFSET);
    __syncthreads();
    if (threadIdx.x == 0) {
        u32* counter = p.arrivals + i64(own.batch_index) * ctas_an_item + cta;
        *merges = atomic_inc_acq_rel(counter, u32(num_splits - 1)) == u32(num_splits - 1);
    }
    int shares = 1, share_bits = 0;
    while (shares < 32 && shares * 2 * num_items <= THREADS && shares * 2 <= num_splits) shares *= 2, ++share_bits;
    const int share = lane & (shares - 1);
    __syncthreads();
    if (!*merges) return;
#pragma unroll 1
    for (int first = warp * 32; first < num_items * shares; first += THREADS) {
        const int item = (first + lane) >> share_bits, valid_item = item < num_items ? item : 0;
        const int c = valid_item / (HEAD_DIM / 4), dim = valid_item % (HEAD_DIM / 4) * 4;
        RowState state = empty_state();
        // The places of one request are less than 2^32 bytes apart.
        const char* const states_from = reinterpret_cast<const char*>(partial_of(0, c) + HEAD_DIM);
        const char* const outs_from = reinterpret_cast<const char*>(partial_of(0, c) + dim);
        const u32 step = ctas_an_item * (COLUMNS * STATE * 4) << share_bits;
        u32 from = ctas_an_item * (COLUMNS * STATE * 4) * share;
#pragma unroll 1
        for (int s = share; s < num_splits; s += shares * PARTIALS_IN_FLIGHT) {
            RowState partials[PARTIALS_IN_FLIGHT];
#pragma unroll
            for (int i = 0; i < PARTIALS_IN_FLIGHT; ++i, from += step) {
                partials[i] = empty_state();
                if (s + i * shares >= num_splits) continue;
                const float2 other = load_global_cg(reinterpret_cast<const float2*>(states_from + from));
                partials[i] = {other.x, other.y, load_global_cg(reinterpret_cast<const float4*>(outs_from + from))};
            }
            fold(state, partials, scale);
        }
#pragma unroll 1
        for (int other = 1; other < shares; other *= 2) {
            RowState of_other[1];
            of_other[0].max = __shfl_xor_sync(~0u, state.max, other);
            of_other[0].sum = __shfl_xor_sync(~0u, state.sum, other);
            of_other[0].out.x = __shfl_xor_sync(~0u, state.out.x, other);
            of_other[0].out.y = __shfl_xor_sync(~0u, state.out.y, other);
            of_other[0].out.z = __shfl_xor_sync(~0u, state.out.z, other);
            of_other[0].out.w = __shfl_xor_sync(~0u, state.out.w, other);
            fold(state, of_other, scale);
        }
        if (item < num_items && share == 0) write_column(c, dim, state);
    }
}
