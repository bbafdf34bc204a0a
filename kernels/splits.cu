// plan_splits: how decode divides the requests of a step among CTAs, decided on the device once a step.
//
//   items[j] = split s of request i, longest first        num_splits[i] = how many splits request i has
//
// in    requests  [max_batch_size + 1] Request    as plan_requests makes them (schedule.cu)
// out   items     [max_items] DecodeItem          batch_index -1 after the last one
//
// Decode reads every K and V once, so a launch is over when its last byte is. One rule serves all requests of a step
// (choose_rule):
//   FIXED    batch-invariant plans: by a request's own length alone
//   EVEN     requests of about equal length: as many stay whole (a split costs a merge) as give each SM the same number
//            of CTAs, or as many as it runs at a time if there are more; the others are divided so that all SMs get a
//            part of them (trial 107)
//   RAGGED   requests of unequal length are cut into pieces of equal length, so that no SM waits for the longest
// Items are dealt in the order of the tokens they have, to within an eighth: what comes last is short. Rows past the
// batch come last of all: a launch for the batch alone leaves them out.
//
// One block. shared memory: [CLASSES + 1] int, then SCAN_BYTES, then an int.
//
// Sources: splits of a request as in Flash-Decoding (Dao et al., 2023); equal pieces of unequal work as in Stream-K
// (Osama et al., 2023); the longest item first is Graham's rule for list scheduling (1969).
#include "page_table.cuh"
#include "table_rows.cuh"

constexpr int CLASSES = LENGTH_CLASSES + 1;  // the last one: rows past the batch
constexpr int TILE = 16;                     // tokens that a warp of decode takes at a time
// The last split to arrive merges all of a request's states, a few at a time: more than CHEAP_SPLITS of them pay only
// where each has TILES_WORTH_A_SPLIT (trial 108).
constexpr int CHEAP_SPLITS = 32, TILES_WORTH_A_SPLIT = 32;
// A piece of a ragged request has at least LEAST_PIECE tokens (trial 109), or one SM's share of the step if that is
// less, so that no SM waits for one long request among few short ones; but never less than is WORTH_A_MERGE.
constexpr int LEAST_PIECE = 2048, WORTH_A_MERGE = 256;
constexpr int PIECE_STEP = 128;  // tokens: pieces are multiples of what a CTA takes at a time

struct SplitsParams {
    const Request* requests;  // [max_batch_size + 1]
    DecodeItem* items;        // [max_items]
    int batch;
    int max_batch_size;  // >= batch
    int extra_items;     // items that splitting may add; a request that would pass it stays whole
    int max_items;       // >= max_batch_size + extra_items
    Positions positions;
    int ctas_an_item;  // KV heads * blocks of columns
    int num_sms;
    int ctas_at_a_time;  // that run on all SMs together
    int ragged_ctas;     // ragged requests are cut into pieces, about so many CTAs in all
    int fixed_splits;    // > 0: requests have so many splits, or fewer, by their own length alone
};

// The tokens that decode reads of a request: those that some query sees. Limits grow with the query.
__device__ __forceinline__ KvLimits seen_of(const SplitsParams& p, const Request& request) {
    return {kv_limits(0, request, p.positions).begin, kv_limits(request.num_queries - 1, request, p.positions).end};
}

__device__ __forceinline__ int tokens_of(const SplitsParams& p, int row) {
    if (row >= p.max_batch_size) return 0;
    const KvLimits seen = seen_of(p, p.requests[row]);
    return seen.end - seen.begin;
}

// The class of a row's items, 0 for the most tokens.
__device__ __forceinline__ int class_of(const SplitsParams& p, int row, int tokens) {
    return row < p.batch ? LENGTH_CLASSES - 1 - length_class(tokens) : CLASSES - 1;
}

// What a step reads. A request that has tokens is busy.
struct Load {
    i64 tokens;
    i64 busy_requests;
    int longest;  // tokens of a request
};

enum class Kind { FIXED, EVEN, RAGGED };

struct Rule {
    Kind kind;
    i64 splits;          // FIXED, EVEN: of a request that is divided, if it has the tokens for them
    i64 free_splits;     // so many splits pay however few tokens they have, because SMs are idle without them
    i64 whole_requests;  // EVEN: the first busy requests, which stay whole
    i64 piece;           // RAGGED: tokens
};

__device__ __forceinline__ Rule choose_rule(const SplitsParams& p, const Load& load) {
    if (p.fixed_splits > 0) return {Kind::FIXED, p.fixed_splits, 0, 0, 0};
    const bool is_ragged = load.longest * load.busy_requests * 4 > load.tokens * 5;  // a quarter longer than the mean
    if (is_ragged) {
        // Rounded up: pieces that were too small would be too many for extra_items.
        const i64 all = load.tokens * p.ctas_an_item, share = (all + p.num_sms - 1) / p.num_sms;
        const i64 wanted = (all + p.ragged_ctas - 1) / p.ragged_ctas, least = clamp(share, WORTH_A_MERGE, LEAST_PIECE);
        const i64 piece = ((wanted > least ? wanted : least) + PIECE_STEP - 1) / PIECE_STEP * PIECE_STEP;
        return {Kind::RAGGED, 0, 0, 0, clamp(piece, 0, INT_LARGEST)};
    }
    const i64 ctas = load.busy_requests * p.ctas_an_item;
    const i64 round = ctas > p.ctas_at_a_time ? p.ctas_at_a_time : p.num_sms;
    const i64 whole = ctas / round * round / p.ctas_an_item;
    const i64 splits = whole < load.busy_requests ? round / ((load.busy_requests - whole) * p.ctas_an_item) : 1;
    return {Kind::EVEN, splits, whole > 0 ? 0 : CHEAP_SPLITS, whole, 0};
}

// The splits of a request of `tokens` tokens, before which `busy_before` busy ones come.
__device__ __forceinline__ int splits_of(const Rule& rule, int tokens, i64 busy_before) {
    const i64 tiles = (i64(tokens) + TILE - 1) / TILE, worth = tiles / TILES_WORTH_A_SPLIT;
    const i64 most = worth > rule.free_splits ? worth : rule.free_splits;
    i64 wanted = rule.splits < most ? rule.splits : most;
    if (rule.kind == Kind::RAGGED) wanted = (tokens + rule.piece - 1) / rule.piece;
    if (rule.kind == Kind::EVEN && busy_before < rule.whole_requests) wanted = 1;
    return int(clamp(wanted, 1, tiles > 1 ? tiles : 1));
}

extern "C" __global__ void __launch_bounds__(1024) plan_splits(const __grid_constant__ SplitsParams p) {
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    int* const class_begin = reinterpret_cast<int*>(shared_memory);  // first a class's number of items
    i64* const warp_totals = reinterpret_cast<i64*>(shared_memory + (CLASSES + 1) * 4);
    int* const longest = reinterpret_cast<int*>(warp_totals + 32);

    // 1. What the step reads.
    if (threadIdx.x == 0) *longest = 0;
    for (int i = threadIdx.x; i < CLASSES; i += blockDim.x) class_begin[i] = 0;
    __syncthreads();
    Load load = {};
    for (int chunk = 0; chunk < p.max_batch_size; chunk += blockDim.x) {
        const int tokens = tokens_of(p, chunk + threadIdx.x);
        if (tokens > 0) atomicMax(longest, tokens);
        scan_before(tokens, load.tokens, warp_totals, Sum());
        scan_before(tokens > 0, load.busy_requests, warp_totals, Sum());
    }
    __syncthreads();
    load.longest = *longest;

    // 2. The rule, and by it the splits of one row after the other: all threads call next_splits, each with its row of
    // a chunk. Busy requests are counted only where that decides something.
    const Rule rule = choose_rule(p, load);
    const bool counts = rule.whole_requests > 0 && rule.splits > 1;
    i64 extra = 0, busy = 0;
    auto next_splits = [&](int row, int tokens) -> int {
        const i64 busy_before = counts ? scan_before(tokens > 0, busy, warp_totals, Sum()) : 0;
        const int wanted = row < p.max_batch_size ? splits_of(rule, tokens, busy_before) : 1;
        const i64 before = scan_before(wanted - 1, extra, warp_totals, Sum());
        return before + wanted - 1 <= p.extra_items ? wanted : 1;
    };

    // 3. How many items each class has, then how many come before it.
    i64 items = 0;
    for (int chunk = 0; chunk < p.max_batch_size; chunk += blockDim.x) {
        const int row = chunk + threadIdx.x, tokens = tokens_of(p, row);
        const int splits = next_splits(row, tokens);
        if (row < p.max_batch_size) atomicAdd(&class_begin[class_of(p, row, tokens / splits)], splits);
    }
    __syncthreads();
    for (int chunk = 0; chunk < CLASSES; chunk += blockDim.x) {
        const int i = chunk + threadIdx.x;
        const int begin = int(scan_before(i < CLASSES ? class_begin[i] : 0, items, warp_totals, Sum()));
        if (i < CLASSES) class_begin[i] = begin;
    }
    __syncthreads();

    // 4. The items. The partial states of a request that is split are stored side by side, in the order of the
    // requests.
    i64 partials = 0;
    extra = busy = 0;
    for (int chunk = 0; chunk < p.max_batch_size; chunk += blockDim.x) {
        const int row = chunk + threadIdx.x, tokens = tokens_of(p, row);
        const int splits = next_splits(row, tokens);
        const int first_partial = int(scan_before(splits > 1 ? splits : 0, partials, warp_totals, Sum()));
        if (row >= p.max_batch_size) continue;
        const int first = atomicAdd(&class_begin[class_of(p, row, tokens / splits)], splits);
        const Request request = p.requests[row];
        const KvLimits seen = seen_of(p, request);
        for (int split = 0; split < splits && first + split < p.max_items; ++split)
            p.items[first + split] = {request, row, split, splits, first_partial, seen.begin, seen.end};
    }
    for (i64 idle = items + threadIdx.x; idle < p.max_items; idle += blockDim.x) p.items[idle].batch_index = -1;
}
