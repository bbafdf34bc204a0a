// prefill_hopper: what prefill.cu computes, at the speed of Hopper's tensor cores (sm_90a).
//
//   out[row, head] = sum_x exp(score(row, head, x)) * V[x] / D          x = the tokens that the row may see
//   lse[row, head] = ln(D)                                              score and D: scores.cuh
//
// in    q         [q_rows, num_qo_heads, HEAD_DIM]    rows first_query .. first_query + num_queries are a request's
//       k, v      pools of pages                      by tensor maps (tensor_map.py) where page_size is a multiple of
//                                                     8; else, with -DGATHER=1, threads copy tokens by 16 bytes
//       list      the requests, cut into tiles of 128 rows (a token and a head of the group each) and their tokens into
//                 blocks of 128, which are taken from the last one down (tile_list.cuh)
//       page_ids  [max_pages] int                     clean: every id is inside the pool
//       sinks     [num_qo_heads] float                with SINKS
// out   out       like q, fp16/bf16 or float32        0 for a row that sees no key
//       lse       [q_rows, num_qo_heads] float        natural log; its sink, or -inf, for a row that sees no key;
//                                                     or null
// both  claims    [1] u32                             0 between launches: tiles claimed beyond the first of each CTA
//                 [3] u32 with -DCOUNT_FALLBACKS      then how often a warp has scaled and repeated a block (below)
//
// Specialised warps, products of two warpgroups by turns (ping-pong) and of two blocks at a time: FlashAttention-3.
// Rescaling only where it is needed: FlashAttention-4. One CTA an SM that claims tiles: the persistent kernels of
// CUTLASS. Pages by TMA: a tensor map of the whole pool. The CTA's 12 warps never meet at one barrier after the start:
//
//   warp 0    deals tiles: claims one and describes it in `tiles`
//   warp 1    loads K from the pool, block after block, a TMA operation a box of 16 or 8 tokens, or gathers it
//   warp 2    loads V likewise
//   warp 3    gathers a tile's rows of q, and works out which tokens each of them sees
//   warps 4-7 and 8-11, two warpgroups of 64 rows each, compute. Most registers are theirs: they hold Q, S, P and O.
//
//        claims ---> warp 0 ==== tiles[4] ====> warps 1, 2, 3     ==== >  data, <----  "may be overwritten"
//                                                  |                (each pair is a pair of mbarriers full, empty)
//                      +------- cp.async ----------+---- TMA ---+
//                      v                           v            v
//                   Q (32 KB), limits      K (3 x 32 KB)  V (3 x 32 KB)
//                      |                           |            |
//                      v                           v            v
//                  registers       S = Q K^T -> P = 2^(S - max) -> O += P V -> out
//
// K and V are two rings of three blocks, which run through the tiles without a break: both are being filled for the
// next tile while this one ends. A warpgroup's work in time (wgmma above, the rest below):
//
//   | Q K(n)     P(n+1) V(n+1)    | Q K(n-1)    P(n) V(n)       |  ...  | P(0) V(0)     Q' K'(last)    |
//   | softmax(n+1) ...            | softmax(n)  ...             |       | O / sum          softmax ... |
//
// While one burst runs, the softmax of the block before is done; the two warpgroups take turns at the tensor cores
// (named barriers ORDER + 0, 1), so that one computes exponentials while the other multiplies. The last product of a
// tile runs together with the first of the next, and a tile's results leave during the next one's first softmax: from
// the memory of Q, or from registers (tile_results.cuh). To issue a burst takes nearly as long as it runs, but in its
// middle a warp is free for a while: there it releases a K, asks for the next one, and prepares a tile's results.
//
// The softmax of a block that all rows see in full does not look for its maximum (lazy_softmax.cuh).
//
// Tokens of a last page that no row sees may be NaN: S is masked by selection, V is overwritten with zeros before it is
// used. block_layout.cuh is the layout of shared memory.
//
// With HEAD_DIM 256 (WIDE) O alone takes 128 registers. Then Q stays in shared memory, until the last scores of the
// tile are done; blocks have 64 tokens, and rings two blocks.
#include "block_layout.cuh"
#include "convert.cuh"
#include "hopper.cuh"
#include "lazy_softmax.cuh"
#include "load_global.cuh"
#include "page_table.cuh"
#include "scores.cuh"
#include "tile_list.cuh"
#include "tile_results.cuh"

static_assert(HEAD_DIM == 256 || HEAD_DIM % 16 == 0 && HEAD_DIM >= 64 && HEAD_DIM <= 128, "64, 80, ... 128 or 256");
static_assert(V_HEAD_DIM == HEAD_DIM, "prefill.cu has other dims of V");
static_assert(GATHER == 0 || GATHER == 1, "GATHER must be 0 or 1");

constexpr int STAGES = WIDE ? 2 : 3;  // blocks of K, and of V, in shared memory
constexpr int THREADS = 384;
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
static_assert(128 * PRODUCER_REGISTERS + 256 * CONSUMER_REGISTERS <= 168 * THREADS, "168 a thread at launch");
constexpr int CONSUMER_WARPS = 8;

constexpr int K_OFFSET = TILE_ROWS * HEAD_DIM * 2;  // Q is stored at 0
constexpr int V_OFFSET = K_OFFSET + STAGES * BLOCK_BYTES;
constexpr int LIMITS_OFFSET = V_OFFSET + STAGES * BLOCK_BYTES;   // [2] KvLimits of TILE_ROWS rows
constexpr int TILES_OFFSET = LIMITS_OFFSET + 2 * TILE_ROWS * 8;  // [TILE_SLOTS] Tile
constexpr int TILE_SLOTS = 4;
constexpr int TILE_FULL = TILES_OFFSET + TILE_SLOTS * 64;  // [TILE_SLOTS], from here on mbarriers
constexpr int TILE_EMPTY = TILE_FULL + TILE_SLOTS * 8;
constexpr int TILE_WANTED = TILE_EMPTY + TILE_SLOTS * 8;
constexpr int Q_FULL = TILE_WANTED + 8, Q_EMPTY = Q_FULL + 8;
constexpr int K_FULL = Q_EMPTY + 8, K_EMPTY = K_FULL + STAGES * 8;
constexpr int V_FULL = K_EMPTY + STAGES * 8, V_EMPTY = V_FULL + STAGES * 8;
static_assert(SHARED_BYTES >= V_EMPTY + STAGES * 8, "SHARED_BYTES must be what recipes.py says");
static_assert(SHARED_BYTES <= 227 * 1024, "the shared memory of a CTA");

constexpr int ORDER = 1, WARPGROUP = 3;  // named barriers, two of each

// Exponentials are most of what a warpgroup does between two bursts of products, and are slower while those of the
// other one run, so nothing may wait for them: so many of a thread's BLOCK / 2 come before the first is added to the
// sum (trial 204) ...
constexpr int FIRST_PART = HEAD_DIM == 128 && !GATHER ? 28 : 0;
// ... and P is rounded between the last ones, before the sum is looked at. That needs P V to be over by then: not all
// dims gain (trial 205).
constexpr bool ROUNDS_FIRST = HEAD_DIM == 64 || HEAD_DIM == 128;

// A pool as TMA sees it. Box (page, row, head) has index page * page_step + row / 8 * rows_step + head * head_step.
struct Pool {
    TensorMap map;
    int page_step;
    int rows_step;
    int head_step;
    int outside;       // an index past the last box: reads as zeros
    const u16* pages;  // GATHER: the pool's address
    PoolStrides strides;
};

struct PrefillHopperParams {
    Pool k;
    Pool v;
    const u16* q;      // [q_rows, num_qo_heads, HEAD_DIM]
    u32 q_row_stride;  // strides of q in units of 16 bytes
    u32 q_head_stride;
    Output to;
    Scoring scoring;
    TileList list;
    const int* page_ids;  // [max_pages]
    u32* claims;          // [1], with -DCOUNT_FALLBACKS [3]
    int box_tokens;       // tokens of a box: 16 or 8, as divides page_size; else GATHER
    TensorMap out_map;  // TMA_OUT: of `to.out`
};

// The next tile is claimed when so many blocks of this one are not asked for yet: late, so that the long tiles at the
// head of the list go to CTAs that are free, but early enough to find the tile meanwhile.
__device__ __forceinline__ int claims_with(const Tile& tile) { return tile.num_blocks > 8 ? 5 : 3; }

// The state of a ring: the next slot, and how often that slot has been used.
struct Ring {
    u32 slot;
    u32 turn;
    __device__ __forceinline__ void advance() {
        if (++slot == STAGES) slot = 0, ++turn;
    }
};

// -- warp 0 -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void deal_tiles(const PrefillHopperParams& p, Tile* tiles, shared_address shared) {
    const int lane = threadIdx.x & 31;
    const int num_work = count_work(p.list);
    int work = blockIdx.x;
    u32 num_long = 0;
    for (u32 number = 0;; ++number) {
        const Tile tile = find_tile(p.list, work, num_work);
        barrier_wait(shared + TILE_EMPTY + number % TILE_SLOTS * 8, number / TILE_SLOTS - 1);
        if (lane == 0) {
            tiles[number % TILE_SLOTS] = tile;
            barrier_arrive(shared + TILE_FULL + number % TILE_SLOTS * 8);
        }
        if (tile.num_blocks == 0) return;

        // Every tile makes one claim, so the counter ends at 0, where it began.
        if (tile.num_blocks > claims_with(tile)) barrier_wait(shared + TILE_WANTED, num_long++);
        u32 claim = 0;
        if (lane == 0) claim = atomicInc(p.claims, num_work - 1);
        work = int(gridDim.x + __shfl_sync(~0u, claim, 0));
    }
}

// -- warps 1 and 2 ----------------------------------------------------------------------------------------------------

// Keeps the ring at `ring_offset` filled with blocks of one pool. A block comes in parts, boxes or, with GATHER, single
// tokens; a lane asks for some of them. A part of which no row sees a token becomes zeros. The warp that `asks` tells
// warp 0 when to claim the next tile.
__device__ __forceinline__ void load_blocks(const PrefillHopperParams& p, const Pool& pool, const Tile* tiles,
                                             shared_address shared, int ring_offset, int full, int empty, bool asks) {
    constexpr int PARTS = GATHER ? BLOCK / 32 : 1;  // of a lane: numbers lane, lane + 32, ...
    const int lane = threadIdx.x & 31, tokens = GATHER ? 1 : p.box_tokens;
    const FastDivide& page_size = p.list.positions.page_size;
    const bool has_part = lane * tokens < BLOCK;
    Ring ring = {};
    for (u32 number = 0;; ++number) {
        barrier_wait(shared + TILE_FULL + number % TILE_SLOTS * 8, number / TILE_SLOTS);
        const Tile tile = tiles[number % TILE_SLOTS];
        if (tile.num_blocks == 0) return;

        // The page ids of the next block are read while this one waits for its slot.
        int block = (tile.first_block + tile.num_blocks - 1) * BLOCK, pages[PARTS];
        auto find_pages = [&](int block) {
#pragma unroll
            for (int i = 0; i < PARTS; ++i) {
                const int token = block + (i * 32 + lane) * tokens;
                const bool seen = has_part && token < tile.end && token + tokens > tile.begin;
                pages[i] = seen ? __ldg(p.page_ids + tile.request.first_page + divide(token, page_size)) : -1;
            }
        };
        find_pages(block);
        for (int left = tile.num_blocks; left > 0; --left, block -= BLOCK) {
            u32 offsets[PARTS];  // of the parts, in the unit of their copies
#pragma unroll
            for (int i = 0; i < PARTS; ++i) {
                const int token = block + (i * 32 + lane) * tokens;
                const int slot = token - divide(token, page_size) * int(page_size.divisor);
#if GATHER
                offsets[i] = pool_offset<u32>(pages[i], slot, tile.kv_head, pool.strides);
                if (pages[i] < 0) offsets[i] = NOWHERE;
#else
                offsets[i] = pages[i] * pool.page_step + slot / 8 * pool.rows_step + tile.kv_head * pool.head_step;
                if (pages[i] < 0) offsets[i] = pool.outside;
#endif
            }
            if (left > 1) find_pages(block - BLOCK);
            const shared_address target = shared + ring_offset + ring.slot * BLOCK_BYTES;
            const shared_address ready = shared + full + ring.slot * 8;
            barrier_wait(shared + empty + ring.slot * 8, ring.turn - 1);
#if GATHER
#pragma unroll
            for (int i = 0; i < PARTS; ++i)
                copy_32_rows<CHUNKS>(pool.pages, offsets[i], [&](int row, int chunk) {
                    return target + (i * 4 + row / 8) * GROUP_BYTES + chunk / 8 * PIECE_BYTES + row % 8 * 128 +
                           (chunk % 8 ^ row % 8) * 16;
                });
            barrier_arrive_after_copies(ready);
#else
            if (lane == 0) barrier_arrive_expect(ready, BLOCK_BYTES);
            __syncwarp();
            if (has_part)
#pragma unroll
                for (int box = 0; box < BOXES; ++box)
                    copy_box_5d(target + lane * tokens / 8 * GROUP_BYTES + box * PIECE_BYTES, &pool.map, box * 64,
                                offsets[0], ready);
            __syncwarp();
#endif
            ring.advance();
            if (asks && lane == 0 && left == claims_with(tile) + 1) barrier_arrive(shared + TILE_WANTED);
        }
    }
}

// -- warp 3 -----------------------------------------------------------------------------------------------------------

// Rows past the last one are copies of it; zeros where q has none.
__device__ __forceinline__ void gather_queries(const PrefillHopperParams& p, const Tile* tiles, shared_address shared,
                                               KvLimits* limits) {
    const int lane = threadIdx.x & 31;
    for (u32 number = 0;; ++number) {
        barrier_wait(shared + TILE_FULL + number % TILE_SLOTS * 8, number / TILE_SLOTS);
        const Tile& tile = tiles[number % TILE_SLOTS];
        if (tile.num_blocks == 0) return;

        u32 from[TILE_ROWS / 32];  // of rows lane, lane + 32, ...
        KvLimits seen[TILE_ROWS / 32];
#pragma unroll
        for (int i = 0; i < TILE_ROWS / 32; ++i) {
            const int row = i * 32 + lane, token = token_of(tile, row, p.list.group_size);
            const int packed = tile.first_row + row < tile.num_rows ? tile.first_row + row : tile.num_rows - 1;
            const int group_size = int(p.list.group_size.divisor);
            const int head = tile.kv_head * group_size + packed - token * group_size;  // see packed_row
            from[i] = u32(tile.request.first_query + token) * p.q_row_stride + u32(head) * p.q_head_stride;
            if (tile.num_rows == 0) from[i] = NOWHERE;
            seen[i] = kv_limits(token, tile.request, p.list.positions);
        }
        barrier_wait(shared + Q_EMPTY, number - 1);
#pragma unroll
        for (int i = 0; i < TILE_ROWS / 32; ++i) {
            limits[number % 2 * TILE_ROWS + i * 32 + lane] = seen[i];
            copy_32_rows<CHUNKS>(p.q, from[i],
                                 [&](int row, int chunk) { return shared + Queries::at(i * 32 + row, chunk); });
        }
        barrier_arrive_after_copies(shared + Q_FULL);
        barrier_arrive(shared + Q_FULL);  // and after the limits
    }
}

// -- warps 4 to 11 ----------------------------------------------------------------------------------------------------
// A thread has two rows of its tile, 0 and 1: S[4 i + 2 r], S[4 i + 2 r + 1] are columns 8 i + 2 pair, + 1 of row r.

// Counts the fallbacks that the lazy softmax of a warp takes, for tests.
__device__ __forceinline__ void count_fallback(const PrefillHopperParams& p, int which) {
#ifdef COUNT_FALLBACKS
    if ((threadIdx.x & 31) == 0) atomicAdd(p.claims + which, 1u);
#endif
}

// Waits for a block of K or V.
__device__ __forceinline__ void wait_for(shared_address full, u32 turn) {
    barrier_wait(full, turn);
#if GATHER
    fence_shared_for_async();
#endif
}

__device__ __forceinline__ void attend_tiles(const PrefillHopperParams& p, const Tile* tiles, shared_address shared,
                                             unsigned char* shared_memory, int warpgroup) {
    const int thread = threadIdx.x & 127, lane = thread & 31, pair = lane & 3;
    const int first_row =
        warpgroup * 64 + thread / 32 * 16 + lane / 4;  // the thread's rows: this one and first_row + 8
    auto k_matrix = [&](u32 slot) { return matrix_descriptor(shared + K_OFFSET + slot * BLOCK_BYTES, 0, GROUP_BYTES); };
    auto v_matrix = [&](u32 slot) {
        return matrix_descriptor(shared + V_OFFSET + slot * BLOCK_BYTES, PIECE_BYTES, GROUP_BYTES);
    };
    const ScoreFactors factors = score_factors(p.scoring);
    const float scale = factors.scale;
    float s[BLOCK / 2], o[HEAD_DIM / 2], keep[2], added[2];
    Queries queries;
    u32 weights[V_STEPS * 4];
    Softmax softmax;
    const KvLimits* seen;  // of the thread's rows, 0 and 8
    int first_end, last_begin;
    Results results;
    unsigned char* const warp_rows = shared_memory + (first_row - lane / 4) * HEAD_DIM * 2;  // the warp's rows of Q
    Ring k_ring = {}, v_ring = {};
    bool k_ready = false;  // whether K of the next burst is known to be there
    auto release = [&](int empty, u32 slot) {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared + empty + slot * 8);
    };
    auto wait_for_k = [&] {
        if (!k_ready) wait_for(shared + K_FULL + k_ring.slot * 8, k_ring.turn);
    };
    // Releases the K of the burst before, whose scores cannot be repeated any more, and looks whether the next one has
    // come: between two bursts of products, where it costs no time. A ring of two blocks needs the release earlier.
    auto recycle_k = [&] {
        if (!WIDE) release(K_EMPTY, v_ring.slot);
        Ring next = k_ring;
        next.advance();
        k_ready = !GATHER && barrier_test(shared + K_FULL + next.slot * 8, next.turn);
    };
    // Q of a tile, and what the thread's rows see: limits grow with the row.
    auto take_q = [&](u32 number) {
        barrier_wait(shared + Q_FULL, number);
        queries.take(shared, first_row - lane / 4);
        seen = reinterpret_cast<const KvLimits*>(shared_memory + LIMITS_OFFSET) + number % 2 * TILE_ROWS + first_row;
        first_end = __shfl_sync(~0u, seen[0].end, 0);
        last_begin = __shfl_sync(~0u, seen[8].begin, 31);
        if (!WIDE && !TMA_OUT) release(Q_EMPTY, 0);
    };
    auto prepare_scores = [&](const Tile& tile, int block, bool edge) {
#pragma unroll
        for (int i = 0; i < BLOCK / 2; ++i) {
            const TileRow row = tile_row(p.list, tile, first_row + i / 2 % 2 * 8);
            const int query = int(row.query) - tile.request.first_query, x = block + 2 * pair + i / 4 * 8 + i % 2;
            s[i] = score_of(s[i], factors, {tile.request, p.list.positions, query, row.head, x});
        }
        if (edge) mask_scores(s, seen, block + 2 * pair);
    };
    // P of a block, with the sums `added`, that is too large is scaled down, or made again from its scores.
    auto shrink_weights = [&](const Tile& tile, int block, float(&added)[2]) {
        if (__all_sync(~0u, added[0] < MOST_SCALED && added[1] < MOST_SCALED)) {
            scale_down(s, softmax, added, keep);
            count_fallback(p, 1);
        } else {
            const shared_address k_block = shared + K_OFFSET + k_ring.slot * BLOCK_BYTES;
            repeat_scores<K_STEPS, GROUP_BYTES, PIECE_BYTES>(s, queries, k_block);
            prepare_scores(tile, block, false);
            keep[0] = keep[1] = 1.f;
            raise_max(s, softmax, keep, scale);
            added[0] = added[1] = 0.f;
            exponentials<0, BLOCK / 2>(s, softmax, added, scale);
            count_fallback(p, 2);
        }
    };

    // 1. The first scores of the first tile.
    if (warpgroup == 1) named_barrier_arrive(ORDER + 0, 256);  // warpgroup 0 begins
    barrier_wait(shared + TILE_FULL, 0);
    if (tiles[0].num_blocks == 0) return;
    take_q(0);
    wait_for(shared + K_FULL, 0);
    hold(s);
    wgmma_fence();
    queries.multiply(s, k_matrix(0));
    wgmma_commit();
    wgmma_wait<0>();
    hold(s);
    if (WIDE) release(K_EMPTY, 0);
    k_ring.advance();

    for (u32 number = 0;; ++number) {
        const Tile& tile = tiles[number % TILE_SLOTS];

        // 2. The last block, whose scores are there already. Meanwhile the results of the tile before are stored.
        const int first_block = tile.first_block * BLOCK;
        int block = first_block + (tile.num_blocks - 1) * BLOCK;
        softmax.max[0] = softmax.max[1] = NO_KEY;
        softmax.sum[0] = softmax.sum[1] = 0.f;
        if (WIDE && block == first_block) release(Q_EMPTY, 0);
        results.store<0>();
        prepare_scores(tile, block, true);
        results.store<1>();
        raise_max(s, softmax, keep, scale);
        if (TMA_OUT) {  // here the results have left, and nothing waits for them (trial 206)
            results.leave();
            release(Q_EMPTY, 0);
        }
        Sinks sinks = tile_sinks(p.scoring, p.list, tile, first_row);  // early: nothing must wait at the end (trial 208)
        if constexpr (SINKS) hold(sinks.row);
        exponentials<0, BLOCK / 2>(s, softmax, softmax.sum, scale);
        results.store<2>();
        round_weights(weights, s);
        results.store<3>();
        bool begun = WIDE;  // whether O counts. Zeros take time, but a flag takes a register
        if (WIDE) {
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] = 0.f;
        }
        const int used = tile.end - block;
        if (!GATHER && used > 0 && used < BLOCK && (used & (p.box_tokens - 1))) {
            wait_for(shared + V_FULL + v_ring.slot * 8, v_ring.turn);
            clear_unused_tokens(shared_memory + V_OFFSET + v_ring.slot * BLOCK_BYTES, used, p.box_tokens, thread);
            named_barrier_sync(WARPGROUP + warpgroup, 128);
        }

        // 3. The other blocks: scores of this one and results of the one before, in one burst.
#pragma unroll 1
        while (block > first_block) {
            block -= BLOCK;
            wait_for_k();
            named_barrier_sync(ORDER + warpgroup, 256);
            hold(s);
            wgmma_fence();
            queries.multiply(s, k_matrix(k_ring.slot));
            wgmma_commit();
            recycle_k();
            wait_for(shared + V_FULL + v_ring.slot * 8, v_ring.turn);
            hold(o);
            wgmma_fence();
            multiply_p_v(o, weights, v_matrix(v_ring.slot), begun);
            begun = true;
            wgmma_commit();
            named_barrier_arrive(ORDER + 1 - warpgroup, 256);

            // At an edge of what the warp's rows see some tokens are masked. >=: a row whose last token is the block's
            // last has seen no token before.
            const bool edge = block + BLOCK >= first_end || block < last_begin;
            wgmma_wait<1>();
            hold(s);
            prepare_scores(tile, block, edge);
            bool moved = edge && raise_max(s, softmax, keep, scale);
            added[0] = added[1] = 0.f;
            exponentials<0, FIRST_PART>(s, softmax, added, scale);
            if (FIRST_PART > 0) {
                hold(s);
                hold(added);
                schedule_fence(block);
            }
            exponentials<FIRST_PART, BLOCK / 2>(s, softmax, added, scale);
            auto end_products = [&] {
                wgmma_wait<0>();
                hold(o);
                release(V_EMPTY, v_ring.slot);
                round_weights(weights, s);
            };
            if (ROUNDS_FIRST) end_products();
            // At an edge the maximum is known, and only a NaN of Q, K or V can be too large, which stays.
            if (!edge && __any_sync(~0u, !(added[0] <= MOST_SUM) || !(added[1] <= MOST_SUM))) {
                moved = true;
                shrink_weights(tile, block, added);
                if (ROUNDS_FIRST) round_weights(weights, s);
            }
            softmax.sum[0] += added[0];
            softmax.sum[1] += added[1];
            if (WIDE) {
                release(K_EMPTY, k_ring.slot);
                if (block == first_block) release(Q_EMPTY, 0);
            }
            if (!ROUNDS_FIRST) end_products();
            k_ring.advance();
            v_ring.advance();
            if (moved) {
#pragma unroll
                for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] *= keep[i / 2 % 2];
            }
        }

        // 4. The last results of this tile with the first scores of the next one. Where no tile follows, those are of
        // whatever is in shared memory, and are not used: a wgmma under a condition would serialise all of them.
        const Tile& next = tiles[(number + 1) % TILE_SLOTS];
        barrier_wait(shared + TILE_FULL + (number + 1) % TILE_SLOTS * 8, (number + 1) / TILE_SLOTS);
        const bool more = next.num_blocks > 0;
        auto prepare_next = [&] {
            if (!more) return;
            take_q(number + 1);
            wait_for_k();
        };
        if (!WIDE) prepare_next();
        wait_for(shared + V_FULL + v_ring.slot * 8, v_ring.turn);
        named_barrier_sync(ORDER + warpgroup, 256);
        hold(o);
        hold(s);
        wgmma_fence();
        multiply_p_v(o, weights, v_matrix(v_ring.slot), begun);
        wgmma_commit();
        if (WIDE) {  // Q cannot be loaded before the last scores are done
            prepare_next();
            wgmma_fence();
        }
        recycle_k();
        results.prepare(p.to, p.list, tile, first_row, softmax, sinks);
        queries.multiply(s, k_matrix(k_ring.slot));
        wgmma_commit();
        named_barrier_arrive(ORDER + 1 - warpgroup, 256);
        wgmma_wait<1>();
        hold(o);
        release(V_EMPTY, v_ring.slot);
        v_ring.advance();
        results.take(p.to, &p.out_map, p.list, tile, first_row, warp_rows, o);
        release(TILE_EMPTY, number % TILE_SLOTS);
        wgmma_wait<0>();
        hold(s);
        if (!more) break;
        if (WIDE) release(K_EMPTY, k_ring.slot);
        k_ring.advance();
    }
    results.store<0>();
    results.store<1>();
    results.store<2>();
    results.store<3>();
    results.leave();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) prefill_hopper(const __grid_constant__ PrefillHopperParams p) {
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    Tile* const tiles = reinterpret_cast<Tile*>(shared_memory + TILES_OFFSET);
    const shared_address shared = shared_address_of(shared_memory);
    const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0);

    // 1. The barriers, with the arrivals that end a phase. TMA counts the bytes that it is told to expect.
    if (threadIdx.x == 0) {
        for (int i = 0; i < TILE_SLOTS; ++i) {
            barrier_init(shared + TILE_FULL + i * 8, 1);
            barrier_init(shared + TILE_EMPTY + i * 8, CONSUMER_WARPS);
        }
        barrier_init(shared + TILE_WANTED, 1);
        barrier_init(shared + Q_FULL, 64);
        barrier_init(shared + Q_EMPTY, CONSUMER_WARPS);
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared + K_FULL + i * 8, GATHER ? 32 : 1);
            barrier_init(shared + K_EMPTY + i * 8, CONSUMER_WARPS);
            barrier_init(shared + V_FULL + i * 8, GATHER ? 32 : 1);
            barrier_init(shared + V_EMPTY + i * 8, CONSUMER_WARPS);
        }
        barrier_init_done();
    }
    __syncthreads();

    // 2. The work of each warp.
    if (warp < 4) {
        shrink_registers<PRODUCER_REGISTERS>();
        if (warp == 0) deal_tiles(p, tiles, shared);
        if (warp == 3) gather_queries(p, tiles, shared, reinterpret_cast<KvLimits*>(shared_memory + LIMITS_OFFSET));
        if (warp == 1 || warp == 2)
            load_blocks(p, warp == 1 ? p.k : p.v, tiles, shared, warp == 1 ? K_OFFSET : V_OFFSET,
                         warp == 1 ? K_FULL : V_FULL, warp == 1 ? K_EMPTY : V_EMPTY, warp == 1);
    } else {
        grow_registers<CONSUMER_REGISTERS>();
        attend_tiles(p, tiles, shared, shared_memory, warp / 4 - 1);
    }
}
