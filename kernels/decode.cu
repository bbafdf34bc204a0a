// decode: attention of a few query tokens per request over that request's pages.
//
//   out[row, head] = sum_x softmax_x(score(row, head, x)) * V[x]        x = the tokens that the row may see
//   score          = sm_scale * q[row, head] . K[x]                     (SOFT_CAP, SINKS: scores.cuh)
//   lse[row, head] = ln(sum_x exp(score))
//
// in    q            [batch * q_len, num_qo_heads, HEAD_DIM]    row = request * q_len + token
//       k, v         pools of pages, of HEAD_DIM and V_HEAD_DIM; NHD and HND differ in their strides only
//       sinks        [num_qo_heads] float                       read with SINKS
//       items        [num_items] DecodeItem                     which split of which request an item is (splits.cu)
//       page_ids     [max_pages] int                            clean: every id is inside the pool
// out   out          [batch * q_len, num_qo_heads, V_HEAD_DIM]  fp16/bf16 or float32; 0 for a row that sees no key
//       lse          [batch * q_len, num_qo_heads] float        natural log, -inf for a row that sees no key; or null
// work  partials     [partials, COLUMNS, V_HEAD_DIM + 4] float  one a CTA, when a request is split: out, max, sum
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
//          memory. The hardware hands out CTAs, the longest items first, which evens out SMs of unequal bandwidth
//          better than any equal split; two at a time, where recipes.py says so.
//   warp   an independent pipeline over tiles of 16 tokens: tile = (i * WARPS + warp) * num_splits + split.
//          The block has no barrier before its end, except with Q_IN_SHARED.
//   shared memory, per warp: a ring of STAGES slots for tiles of K and V (chapter 1). At the end the same bytes hold
//          the warp's states: O, maximum and sum of each column.
//   Q      in registers, as operands of the products; with Q_IN_SHARED in shared memory, once for all warps, which wait
//          for it before their first tile. It is asked for before K and V, or it would come after all of them.
//   split  the last CTA of a split row to arrive merges all partial states, in an order that their number decides: the
//          same bits on every run. The arrival counter wraps to zero by itself.
//
// Sources: the online softmax of Milakov and Gimelshein (2018), in registers as in FlashAttention-2 (Dao, 2023); splits
// of a request as in Flash-Decoding (Dao et al., 2023), merged by the last to arrive as in CUDA's threadFenceReduction
// sample; a maximum that rarely moves as in FlashAttention-4; keys as the rows of a product, so that few queries waste
// little of it, as in XQA.
//
// The chapters below follow a CTA: 1 constants, 2 parameters, 3 tiles from the pool into the ring, 4 scores, 5 online
// softmax, 6 weights and values, 7 states of warps and splits, 8 the kernel.
#include "attention_state.cuh"
#include "convert.cuh"
#include "load_global.cuh"
#include "mma.cuh"
#include "page_table.cuh"
#include "scores.cuh"
#include "shared_rows.cuh"

// -- 1. constants -----------------------------------------------------------------------------------------------------

static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM >= 16 && HEAD_DIM <= 256, "HEAD_DIM must be a multiple of 16 up to 256");
static_assert(V_HEAD_DIM % 16 == 0 && V_HEAD_DIM >= 16 && V_HEAD_DIM <= 256,
              "V_HEAD_DIM must be a multiple of 16 up to 256");
static_assert(COLUMNS % 8 == 0 && COLUMNS >= 8 && COLUMNS <= 32, "COLUMNS must be 8, 16, 24 or 32");
static_assert(STAGES >= 2 && STAGES <= 4, "STAGES must be 2, 3 or 4");
static_assert(WARPS == 2 || WARPS == 4 || WARPS == 8, "WARPS must be 2, 4 or 8");

constexpr int THREADS = WARPS * 32;
constexpr int WIDEST = HEAD_DIM > V_HEAD_DIM ? HEAD_DIM : V_HEAD_DIM;
// With 16 columns of 128 dims a thread has 64 registers of O and would have 32 of Q: without these, two CTAs fit an SM
// (trial 100).
constexpr bool Q_IN_SHARED = HEAD_DIM == 128 && V_HEAD_DIM == 128 && COLUMNS == 16;
constexpr int WARPS_PER_SM = WIDEST <= 128 && (COLUMNS == 8 || Q_IN_SHARED) ? 16 : 8;  // at least
constexpr int CTAS_PER_SM = WARPS_PER_SM / WARPS;
constexpr int TILE = 16;                   // tokens
constexpr int N_TILES = COLUMNS / 8;       // n-tiles of the matrix products
constexpr int K_STEPS = HEAD_DIM / 16;     // k-steps of S
constexpr int M_TILES = V_HEAD_DIM / 16;   // m-tiles of O^T
typedef SharedRows<HEAD_DIM / 8> KRows;    // of a tile of K, and of Q
typedef SharedRows<V_HEAD_DIM / 8> VRows;  // of a tile of V
constexpr int K_TILE_BYTES = TILE * KRows::BYTES;
constexpr int V_TILE_BYTES = TILE * VRows::BYTES;
static_assert(K_TILE_BYTES % 128 == 0 && V_TILE_BYTES % 128 == 0, "tiles begin on lines of 128 bytes");

// Tensor cores truncate as they add, the less the smaller a sum is, and take weights of 16 bits. With 8 columns they
// have time to spare (trial 105): a score is the sum of its even and its odd steps, and a weight that of two 16-bit
// numbers.
constexpr int PARTS = COLUMNS == 8 ? 2 : 1;  // of a score and of a weight
// The share of a weight that its first part takes. It is less than 1, so that rounding leaves something for the second
// part: a part of 0 times an infinite V would be NaN. fp16 has few bits below SMALL_WEIGHT: there the parts are halves.
constexpr float FIRST_SHARE = BFLOAT16 ? 1.f - 0x1p-7f : 1.f - 0x1p-10f;
constexpr float SMALL_WEIGHT = BFLOAT16 ? 0.f : 0x1p-13f;

// A column's state: V_HEAD_DIM floats of out, max, sum, and two that keep the next one's pieces of 16 bytes whole.
constexpr int STATE = V_HEAD_DIM + 4;
constexpr int COLUMN_QUARTETS = V_HEAD_DIM / 4;  // dims of a column that a thread merges at a time
constexpr int PARTIALS_IN_FLIGHT = 8;            // partial states that a thread loads before it merges them

// The ring of a warp. Its copies n = 0, 1, 2, ... are K (n even) and V (n odd) of its tile n / 2. Copy n is stored at
// slot n % STAGES, where copy n + STAGES replaces it as soon as it has been read:
//
//   STAGES   slot 0             slot 1             slot 2             slot 3
//   2        K0 K1 K2 K3 ...    V0 V1 V2 V3 ...
//   3        K0 V1 K3 V4 ...    V0 K2 V3 K5 ...    K1 V2 K4 V5 ...
//   4        K0 K2 K4 K6 ...    V0 V2 V4 V6 ...    K1 K3 K5 K7 ...    V1 V3 V5 V7 ...
namespace ring {
constexpr bool MIXES = STAGES % 2 == 1;          // a slot holds K and V by turns
constexpr int TILES_AFTER_K = STAGES / 2;        // from a tile to the one that replaces its K
constexpr int TILES_AFTER_V = (STAGES + 1) / 2;  // from a tile to the one that replaces its V
constexpr int LARGER_TILE = K_TILE_BYTES > V_TILE_BYTES ? K_TILE_BYTES : V_TILE_BYTES;

// The offset of a slot; for STAGES, the end of the ring.
constexpr int offset(int slot) {
    return MIXES ? slot * LARGER_TILE : slot / 2 * (K_TILE_BYTES + V_TILE_BYTES) + slot % 2 * K_TILE_BYTES;
}

// The slot of K or V of the warp's next tile: two slots on.
__device__ __forceinline__ void advance(shared_address& slot, shared_address begin) {
    if (STAGES > 2) slot += slot < begin + offset(STAGES - 2) ? offset(2) : -offset(STAGES - 2);
}
}  // namespace ring

constexpr int OUT_BYTES = COLUMNS * STATE * 4;
constexpr int WARP_BYTES = ring::offset(STAGES) > OUT_BYTES ? ring::offset(STAGES) : OUT_BYTES;
static_assert(WARP_BYTES % 128 == 0, "rings begin on lines of 128 bytes");
constexpr int LIMITS_OFFSET = WARPS * WARP_BYTES;                       // [WARPS][COLUMNS] KvLimits
constexpr int ASSIGNMENT_OFFSET = LIMITS_OFFSET + WARPS * COLUMNS * 8;  // Assignment
constexpr int ASSIGNMENT_END = ASSIGNMENT_OFFSET + 32;
constexpr int Q_OFFSET = (ASSIGNMENT_END + 127) / 128 * 128;            // [COLUMNS] rows
static_assert((Q_IN_SHARED ? Q_OFFSET + COLUMNS * KRows::BYTES : ASSIGNMENT_END) == SHARED_BYTES,
              "SHARED_BYTES must be what recipes.py says");

// -- 2. parameters ----------------------------------------------------------------------------------------------------

struct DecodeParams {
    const u16* k;  // from here to batch: what a run may change
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
};

// What the end needs to know of the item. It waits in shared memory: registers are scarce in the loop.
struct Assignment {
    int batch_index;
    int split;
    int num_splits;
    int first_partial;
    int has_request;  // read with SINKS only
    int merges;       // this CTA merges the splits of its request
};
static_assert(sizeof(Assignment) <= ASSIGNMENT_END - ASSIGNMENT_OFFSET, "as shared memory has room for");

// How many columns a block has; the last one may have fewer than COLUMNS.
__device__ __forceinline__ int columns_of(const DecodeParams& p, int block) {
    const int columns_left = p.q_len * int(p.group_size.divisor) - block * COLUMNS;
    return columns_left < COLUMNS ? columns_left : COLUMNS;
}

// -- 3. tiles from the pool into the ring -----------------------------------------------------------------------------

// A tile is known by how many tokens are left from its first one to the end of the item: token i of the tile is there
// if i < left, and the warp's next tile has `left` less its stride.
struct TileLoader {
    const DecodeParams& p;
    int first_page;  // of the request, in page_ids
    int kv_head;
    int end;  // of the item's tokens
    u64 policy;
    int lane;

    // Lane l knows the page of token l % 16 of a tile ...
    __device__ __forceinline__ int page_of(int left) const {
        const int token = lane & 15, page = divide(end - left + token, p.positions.page_size);
        return token < left ? __ldg(p.page_ids + first_page + page) : 0;
    }

    // ... and from that where the token begins in the pool, in units of 16 bytes. The lanes then fetch the tile in such
    // pieces. What is past the end becomes zeros: NaN in an unused slot would survive a weight of 0.
    template <int DIM>
    __device__ __forceinline__ void copy(shared_address to, const u16* pool, const PoolStrides& strides, int left,
                                         int page) const {
        const int x = end - left + (lane & 15);
        const int slot = x - divide(x, p.positions.page_size) * int(p.positions.page_size.divisor);
        const u32 offset = x < end ? pool_offset<u32>(page, slot, kv_head, strides) : 0u;
        constexpr int CHUNKS = DIM / 8;  // pieces of a row
        // A lane's chunk is the same in all loads where whole rows make up 32 lanes, and so is its token in a load.
        constexpr bool WHOLE_ROWS = 32 % CHUNKS == 0;
        // Such rows begin and end inside of lines of 128 bytes, and the next KV head is read soon (trial 101).
        constexpr bool WHOLE_LINES = DIM == 80 || DIM == 96;
#pragma unroll
        for (int i = 0; i < TILE * CHUNKS / 32; ++i) {
            const int chunk = WHOLE_ROWS ? lane % CHUNKS : (i * 32 + lane) % CHUNKS;
            const int token = WHOLE_ROWS ? i * (32 / CHUNKS) + lane / CHUNKS : (i * 32 + lane) / CHUNKS;
            const u64 base = reinterpret_cast<u64>(pool) + chunk * 16;
            const u64 from = base + u64(__shfl_sync(~0u, offset, token)) * 16;
            copy_async_16<WHOLE_LINES>(to + SharedRows<CHUNKS>::at(token, chunk), reinterpret_cast<const void*>(from),
                                       token < left, policy);
        }
    }

    // A tile's K or V into a slot of the ring. Past the last tile an empty group of copies keeps the count.
    __device__ __forceinline__ void load(shared_address to, bool is_v, int left, int page) const {
        if (left > 0) {
            if (is_v)
                copy<V_HEAD_DIM>(to, p.v, p.v_strides, left, page);
            else
                copy<HEAD_DIM>(to, p.k, p.k_strides, left, page);
        }
        commit_copies();
    }
};

// K and V must not push results and partial states out of L2. But where neighbours in a line or another block of
// columns read them too, evicting them first would be too early (trial 104). Requests that share pages run together and
// mostly find them.
__device__ __forceinline__ u64 pool_policy(const DecodeParams& p) {
    const bool is_only_reader = HEAD_DIM * 2 % 128 == 0 && V_HEAD_DIM * 2 % 128 == 0 && p.column_blocks.divisor == 1;
    return cache_policy(is_only_reader ? Evict::FIRST : Evict::UNCHANGED);
}

// -- 4. scores --------------------------------------------------------------------------------------------------------

// Q^T. Its B fragments for one k-step are values[step]: a lane holds dims 2 * pair, + 1 (and + 8) of column quad. q is
// asked for before K and V, by row and head of column c, which lane c knows (trial 103).
template <bool in_shared>
struct Queries;

// In registers.
template <>
struct Queries<false> {
    u32 values[K_STEPS][N_TILES * 2];

    __device__ __forceinline__ void ask(const DecodeParams& p, int row, int head, const unsigned char*) {
        const int quad = (threadIdx.x & 31) >> 2, pair = threadIdx.x & 3;
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
            const int c = n * 8 + quad;
            const int q_row = __shfl_sync(~0u, row, c), q_head = __shfl_sync(~0u, head, c);
            const u16* from = p.q + q_row * p.q_row_stride + q_head * p.q_head_stride + 2 * pair;
#pragma unroll
            for (int step = 0; step < K_STEPS; ++step) {
                values[step][2 * n] = __ldg(reinterpret_cast<const u32*>(from + step * 16));
                values[step][2 * n + 1] = __ldg(reinterpret_cast<const u32*>(from + step * 16 + 8));
            }
        }
    }

    __device__ __forceinline__ void wait() {}
    __device__ __forceinline__ void load(int) {}
};

// In shared memory, from where a step's fragments come each time.
template <>
struct Queries<true> {
    u32 values[K_STEPS][4];
    shared_address matrix;  // where the lane's row begins for ldmatrix

    __device__ __forceinline__ void ask(const DecodeParams& p, int row, int head, const unsigned char* shared_memory) {
        constexpr int CHUNKS = HEAD_DIM / 8;
        const shared_address rows = shared_address_of(shared_memory) + Q_OFFSET;
#pragma unroll
        for (int i = threadIdx.x; i < COLUMNS * CHUNKS; i += THREADS) {
            const int c = i / CHUNKS, chunk = i % CHUNKS;
            const int q_row = __shfl_sync(~0u, row, c), q_head = __shfl_sync(~0u, head, c);
            const u16* from = p.q + q_row * p.q_row_stride + q_head * p.q_head_stride + chunk * 8;
            copy_async_16(rows + KRows::at(c, chunk), from, true);
        }
        commit_copies();
        const int lane = threadIdx.x & 31;
        matrix = rows + KRows::at((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
    }

    // Behind the group of Q the STAGES groups of the ring's first copies have been committed.
    __device__ __forceinline__ void wait() {
        wait_copies<STAGES>();
        __syncthreads();
    }

    __device__ __forceinline__ void load(int step) { load_matrix_x4(values[step], KRows::advance(matrix, step)); }
};
static_assert(!Q_IN_SHARED || COLUMNS * (HEAD_DIM / 8) % THREADS == 0, "a thread copies whole pieces of Q");

// S^T = K Q^T of one tile. k_matrix: where the lane's row of the tile begins for ldmatrix.
__device__ __forceinline__ void multiply_k_q(float (&score)[N_TILES][4], Queries<Q_IN_SHARED>& q,
                                             shared_address k_matrix) {
    float sums[PARTS][N_TILES][4] = {};
#pragma unroll
    for (int step = 0; step < K_STEPS; ++step) {
        u32 a[4];
        load_matrix_x4(a, KRows::advance(k_matrix, step));
        q.load(step);
#pragma unroll
        for (int n = 0; n < N_TILES; ++n)
            mma_m16n8k16(sums[step % PARTS][n], a, q.values[step][2 * n], q.values[step][2 * n + 1]);
    }
#pragma unroll
    for (int n = 0; n < N_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            score[n][i] = PARTS == 1 ? sums[0][n][i] : sums[0][n][i] + sums[PARTS - 1][n][i];
}

// Tokens that a column does not see. score[n][i] is that of token quad + (i / 2) * 8 of the tile and of column
// n * 8 + 2 * pair + i % 2.
__device__ __forceinline__ void mask(float (&score)[N_TILES][4], const KvLimits* limits, int first_token) {
    const int quad = (threadIdx.x & 31) >> 2, pair = threadIdx.x & 3;
#pragma unroll
    for (int n = 0; n < N_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const KvLimits seen = limits[n * 8 + 2 * pair + (i & 1)];
            mask_score(score[n][i], seen.begin, seen.end, first_token + quad + (i >> 1) * 8);
        }
}

// -- 5. online softmax ------------------------------------------------------------------------------------------------

// The states of a warp's columns: a lane has columns n * 8 + 2 * pair, + 1, of these dims m * 16 + quad (and + 8) of
// O^T and the sum over its own tokens. Scores are kept as they are (attention_state.cuh).
struct WarpState {
    float out[N_TILES][M_TILES][4] = {};
    float max[N_TILES][2];
    float sum[N_TILES][2] = {};

    __device__ __forceinline__ WarpState() {
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) max[n][0] = max[n][1] = -INF;
    }

    // The maximum moves only when a score passes it by more than RESCALE_STEP: then, and only then, the lanes of a
    // column agree on a new one and rescale what they have.
    __device__ __forceinline__ void raise_max(const float (&score)[N_TILES][4], float scale) {
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
                    for (int m = 0; m < M_TILES; ++m) {
                        out[n][m][i] *= keep;
                        out[n][m][i + 2] *= keep;
                    }
                }
        }
    }

    // -- 6. weights and values ----------------------------------------------------------------------------------------

    // P^T: exponentials, rounded to the element type and turned into B fragments; then what rounding has left of them.
    __device__ __forceinline__ void take_weights(u32 (&weight)[PARTS][N_TILES][2], const float (&score)[N_TILES][4],
                                                 float scale) {
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
    }

    // O^T += V^T P^T. v_matrix: where the lane's row of the tile begins for a transposing ldmatrix.
    __device__ __forceinline__ void multiply_v_p(const u32 (&weight)[PARTS][N_TILES][2], shared_address v_matrix) {
        constexpr int AT_ONCE = PARTS == 1 ? 1 : 4;  // so that no product waits for the one before
#pragma unroll
        for (int first = 0; first < M_TILES; first += AT_ONCE) {
            u32 a[AT_ONCE][4];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                if (first + i < M_TILES) load_matrix_x4_transposed(a[i], VRows::advance(v_matrix, first + i));
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
                    for (int n = 0; n < N_TILES; ++n)
                        if (first + i < M_TILES)
                            mma_m16n8k16(out[n][first + i], a[i], weight[part][n][0], weight[part][n][1]);
        }
    }

    // -- 7. states of warps and splits --------------------------------------------------------------------------------

    // Into shared memory, where the warp's tiles were: [COLUMNS][STATE] floats.
    __device__ __forceinline__ void store(float* states) const {
        const int quad = (threadIdx.x & 31) >> 2, pair = threadIdx.x & 3;
#pragma unroll
        for (int n = 0; n < N_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float* const column_state = states + (n * 8 + 2 * pair + i) * STATE;
                float total = sum[n][i];
                total += __shfl_xor_sync(~0u, total, 4);
                total += __shfl_xor_sync(~0u, total, 8);
                total += __shfl_xor_sync(~0u, total, 16);
                if (quad == 0) {
                    // A column of NaN has no maximum, but is not empty.
                    column_state[V_HEAD_DIM] = max[n][i] == -INF && total != 0.f ? 0.f : max[n][i];
                    column_state[V_HEAD_DIM + 1] = total;
                }
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    column_state[m * 16 + quad] = out[n][m][i];
                    column_state[m * 16 + quad + 8] = out[n][m][i + 2];
                }
            }
    }
};

// The results of a CTA: of which rows they are, and where they are written. All threads of the CTA share the work; one
// takes four neighbouring dims of a column.
struct Results {
    const DecodeParams& p;
    Assignment assignment;
    int kv_head;
    int block;  // of columns
    int cta;    // of those of the item
    int ctas_an_item;

    __device__ __forceinline__ float sink_of_column(int c) const {
        const PackedRow of = packed_row(block * COLUMNS + c, p.group_size);
        return sink_of(p.scoring, kv_head * int(p.group_size.divisor) + of.head, assignment.has_request);
    }

    __device__ __forceinline__ void write(int c, int dim, const RowState& state, float sink) const {
        const PackedRow of = packed_row(block * COLUMNS + c, p.group_size);
        const int row = assignment.batch_index * p.q_len + of.token;
        const int head = kv_head * int(p.group_size.divisor) + of.head;
        const RowEnd end = end_row(state.max * score_factors(p.scoring).scale, state.sum, sink);
        const i64 at = row * p.out_row_stride + head * p.out_head_stride + dim;
        float4 out = state.out;
        multiply(out, end.weight);
        if (p.out_float32) {
            *reinterpret_cast<float4*>(static_cast<float*>(p.out) + at) = out;
        } else {
            uint2 packed;
            packed.x = pack2(out.x, out.y);
            packed.y = pack2(out.z, out.w);
            *reinterpret_cast<uint2*>(static_cast<u16*>(p.out) + at) = packed;
        }
        if (dim == 0 && p.lse) p.lse[i64(row) * p.num_qo_heads + head] = end.lse();
    }

    // The partial state that a split of the request leaves of column c.
    __device__ __forceinline__ float* partial_of(int split, int c) const {
        const int index = (assignment.first_partial + split) * ctas_an_item + cta;
        return p.partials + i64(index * COLUMNS + c) * STATE;
    }

    // From the states of the warps to the result or, where the request is split, to the partial state.
    __device__ __forceinline__ void merge_warps(const float* states, float scale) const {
        const int num_items = columns_of(p, block) * COLUMN_QUARTETS;
        for (int item = threadIdx.x; item < num_items; item += THREADS) {
            const int c = item / COLUMN_QUARTETS, dim = item % COLUMN_QUARTETS * 4;
            const float sink = sink_of_column(c);  // asked for before it is needed
            RowState state = empty_state(), of_warps[WARPS];
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float* const from = states + w * (WARP_BYTES / 4) + c * STATE;
                const float2 other = *reinterpret_cast<const float2*>(from + V_HEAD_DIM);
                of_warps[w] = {other.x, other.y, *reinterpret_cast<const float4*>(from + dim)};
            }
            fold(state, of_warps, scale);
            if (assignment.num_splits <= 1) {
                write(c, dim, state, sink);
            } else {
                float* const to = partial_of(assignment.split, c);
                *reinterpret_cast<float4*>(to + dim) = state.out;
                if (dim == 0) *reinterpret_cast<float2*>(to + V_HEAD_DIM) = {state.max, state.sum};
            }
        }
    }

    // One thread arrives. Whether this CTA is the last of its request's: then all partial states can be read.
    __device__ __forceinline__ bool is_last() const {
        const u32 last = u32(assignment.num_splits - 1);
        u32* counter = p.arrivals + i64(assignment.batch_index) * ctas_an_item + cta;
        return atomic_inc_acq_rel(counter, last) == last;
    }

    // From the partial states of all splits to the result. Few columns leave threads idle, so `shares` neighbouring
    // lanes take every shares-th split each of one item, and then fold what they have pair by pair.
    __device__ __forceinline__ void merge_splits(int shares, int share_bits, float scale) const {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, share = lane & (shares - 1);
        const int num_items = columns_of(p, block) * COLUMN_QUARTETS;
#pragma unroll 1
        for (int first = warp * 32; first < num_items * shares; first += THREADS) {
            const int item = (first + lane) >> share_bits, valid_item = item < num_items ? item : 0;
            const int c = valid_item / COLUMN_QUARTETS, dim = valid_item % COLUMN_QUARTETS * 4;
            const float sink = sink_of_column(c);
            RowState state = empty_state();
            // The partial states of one request are less than 2^32 bytes apart.
            const char* const states_from = reinterpret_cast<const char*>(partial_of(0, c) + V_HEAD_DIM);
            const char* const outs_from = reinterpret_cast<const char*>(partial_of(0, c) + dim);
            const u32 step = ctas_an_item * (COLUMNS * STATE * 4) << share_bits;
            u32 from = ctas_an_item * (COLUMNS * STATE * 4) * share;
#pragma unroll 1
            for (int s = share; s < assignment.num_splits; s += shares * PARTIALS_IN_FLIGHT) {
                RowState partials[PARTIALS_IN_FLIGHT];
#pragma unroll
                for (int i = 0; i < PARTIALS_IN_FLIGHT; ++i, from += step) {
                    partials[i] = empty_state();
                    if (s + i * shares >= assignment.num_splits) continue;
                    const float2 other = load_global_cg(reinterpret_cast<const float2*>(states_from + from));
                    partials[i] = {other.x, other.y, load_global_cg(reinterpret_cast<const float4*>(outs_from + from))};
                }
                fold(state, partials, scale);
            }
#pragma unroll 1
            for (int other = 1; other < shares; other *= 2) {
                const RowState of_other[1] = {shuffle_xor(state, other)};
                fold(state, of_other, scale);
            }
            if (item < num_items && share == 0) write(c, dim, state, sink);
        }
    }
};

// -- 8. the kernel ----------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, CTAS_PER_SM) decode(const __grid_constant__ DecodeParams p) {
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    Assignment* const assignment = reinterpret_cast<Assignment*>(shared_memory + ASSIGNMENT_OFFSET);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;

    // 1. Which request, split, columns and KV head this CTA serves.
    const int num_kv_heads = p.num_kv_heads.divisor, group_size = p.group_size.divisor;
    const int column_blocks = p.column_blocks.divisor, ctas_an_item = num_kv_heads * column_blocks;
    const int item_head = divide(blockIdx.x, p.column_blocks), item_index = divide(item_head, p.num_kv_heads);
    const int column_block = blockIdx.x - item_head * column_blocks, kv_head = item_head - item_index * num_kv_heads;
    const int cta = blockIdx.x - item_index * ctas_an_item;  // of those of the item
    const DecodeItem item = p.items[item_index];
    // While the item is on its way, so are the plan's page ids, 4 KiB a CTA: a line for each lane of its first warp
    // (trial 102).
    const i64 page_line = (i64(blockIdx.x) * 32 + threadIdx.x) * 32;
    if (warp == 0 && page_line < p.num_page_ids) prefetch_to_l2(p.page_ids + page_line);
    if (item.batch_index < 0 || item.batch_index >= p.batch) return;
    if (threadIdx.x == 0)
        *assignment = {item.batch_index, item.split, item.num_splits, item.first_partial, is_request(item.request)};

    // 2. The pages of the warp's first tiles. Tiles count from the first token that some column sees.
    const int visible = item.end - item.begin, stride = WARPS * item.num_splits * TILE;  // tokens
    int left = visible - (warp * item.num_splits + item.split) * TILE;
    const TileLoader tiles = {p, item.request.first_page, kv_head, item.end, pool_policy(p), lane};
    int pages[ring::TILES_AFTER_V + 1];
#pragma unroll
    for (int i = 0; i <= ring::TILES_AFTER_V; ++i) pages[i] = tiles.page_of(left - i * stride);

    // 3. Q. Lane c speaks for column c; columns past the last one are copies of it.
    const int num_columns = columns_of(p, column_block);
    const int column = column_block * COLUMNS + (lane < num_columns ? lane : num_columns - 1);
    const PackedRow of = packed_row(column, p.group_size);
    const int row = item.batch_index * p.q_len + of.token, head = kv_head * group_size + of.head;
    if (SINKS && warp == 0) prefetch_to_l2(reinterpret_cast<const int*>(p.scoring.sinks + head));
    Queries<Q_IN_SHARED> q;
    q.ask(p, row, head, shared_memory);

    // 4. The first copies, which fill the ring.
    const shared_address warp_base = shared_address_of(shared_memory) + warp * WARP_BYTES;
#pragma unroll
    for (int n = 0; n < STAGES; ++n)
        tiles.load(warp_base + ring::offset(n), n % 2 == 1, left - n / 2 * stride, pages[n / 2]);
    int after_k_page = pages[ring::TILES_AFTER_K], after_v_page = pages[ring::TILES_AFTER_V];

    // 5. What the columns see. Limits grow with the query token: the first column's are the smallest, the last one's
    // the largest.
    const KvLimits limits = kv_limits(of.token, item.request, p.positions);
    const int last_begin = __shfl_sync(~0u, limits.begin, num_columns - 1);
    const int first_end = __shfl_sync(~0u, limits.end, 0);
    KvLimits* const warp_limits = reinterpret_cast<KvLimits*>(shared_memory + LIMITS_OFFSET) + warp * COLUMNS;
    if (lane < COLUMNS) warp_limits[lane] = limits;
    q.wait();

    // 6. The loop over this warp's tiles. ldmatrix: lane l gives the address of row l % 8 of matrix l / 8; for V the
    // matrices are read transposed.
    WarpState state;
    const int k_matrix = KRows::at((lane & 7) + ((lane >> 3) & 1) * 8, lane >> 4);
    const int v_matrix = VRows::at((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
    shared_address k_slot = warp_base, v_slot = warp_base + ring::offset(1);
    const float scale = score_factors(p.scoring).scale;
#pragma unroll 1
    for (; left > 0; left -= stride) {
        // Of the tiles that replace this one's K and V.
        const int after_k_left = left - ring::TILES_AFTER_K * stride;
        const int after_v_left = left - ring::TILES_AFTER_V * stride;
        const int next_page = tiles.page_of(after_v_left - stride);

        // Scores of the tile. When all lanes have read K, its slot is free.
        float score[N_TILES][4];
        wait_copies<STAGES - 1>();
        __syncwarp();
        multiply_k_q(score, q, k_slot + k_matrix);
        __syncwarp();
        tiles.load(k_slot, ring::MIXES, after_k_left, after_k_page);
        ring::advance(k_slot, warp_base);

        // Weights. Only tiles at an edge of some column's interval need a mask.
        const int first_token = item.end - left;
#pragma unroll
        for (int n = 0; n < N_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int c = n * 8 + (lane & 3) * 2 + (i & 1), x = first_token + (lane >> 2) + (i >> 1) * 8;
                const PackedRow at = packed_row(column_block * COLUMNS + c, p.group_size);
                score[n][i] = score_of<true>(score[n][i], score_factors(p.scoring),
                                             {item.request, p.positions, at.token, kv_head * group_size + at.head, x});
            }
        if (first_token < last_begin || first_token + TILE > first_end) mask(score, warp_limits, first_token);
        state.raise_max(score, scale);
        u32 weight[PARTS][N_TILES][2];
        state.take_weights(weight, score, scale);

        // Values, and the free slot of V.
        wait_copies<STAGES - 1>();
        __syncwarp();
        state.multiply_v_p(weight, v_slot + v_matrix);
        __syncwarp();
        tiles.load(v_slot, !ring::MIXES, after_v_left, after_v_page);
        ring::advance(v_slot, warp_base);
        after_k_page = ring::MIXES ? after_v_page : next_page;
        after_v_page = next_page;
    }

    // 7. The states of all warps become the result, or this split's partial state.
    float* const states = reinterpret_cast<float*>(shared_memory);
    wait_copies<0>();
    __syncwarp();
    state.store(states + warp * (WARP_BYTES / 4));
    __syncthreads();
    const Results results = {p, *assignment, kv_head, cta - kv_head * column_blocks, cta, ctas_an_item};
    const int num_splits = results.assignment.num_splits;
    results.merge_warps(states, scale);
    if (num_splits <= 1) return;

    // 8. The last split to arrive merges the partial states of all.
    __syncthreads();
    if (threadIdx.x == 0) assignment->merges = results.is_last();
    const int num_items = columns_of(p, results.block) * COLUMN_QUARTETS;
    int shares = 1, share_bits = 0;
    while (shares < 32 && shares * 2 * num_items <= THREADS && shares * 2 <= num_splits) shares *= 2, ++share_bits;
    __syncthreads();
    if (assignment->merges) results.merge_splits(shares, share_bits, scale);
}
