// plan_splits: how decode divides the requests of a step among CTAs, made on the device once a step.
//
//   items[j] = split s of request i, longest first        num_splits[i] = how many splits request i has
//
// in    requests  [max_batch_size + 1] Request    as plan_requests makes them (schedule.cu)
// out   items     [max_items] DecodeItem          batch_index -1 behind the last one
//
// Decode reads every K and V once, so a launch is over when its last byte is. Of requests of about equal length as
// many are left whole (a split costs a merge) as give each SM the same number of CTAs, or as many as it runs at a time
// if there are more; the others are divided so that all SMs get a part of them (an H200, 32/8 heads, 80 x 2048: 153.8 us,
// divided as if one CTA ran at a time 161.2; 40 x 4096: 155.1, 156.3 and, all whole, 162.5). Ragged ones are cut into
// pieces of `tokens_a_split`, so that nobody waits for the longest. Items are dealt in the order of the tokens they have,
// to within an eighth: what comes last is short.
//
// Rows of the plan behind the batch come last of all: a launch for the batch alone leaves them out.
//
// One block. shared memory: [CLASSES + 1] int, then SCAN_BYTES, then an int.
#include "page_table.cuh"
#include "table_rows.cuh"

constexpr int CLASSES = LENGTH_CLASSES + 1;  // the last one: rows behind the batch
constexpr int TILE = 16;                     // tokens that a warp of decode takes at a time
// The last split to arrive merges all of a request's states, a few at a time: more than CHEAP_SPLITS of them pay only
// where each has TILES_WORTH_A_SPLIT (an H200, one request, one KV head, up to 128 splits against this rule: 3000 tokens
// 16.9 and 9.8 us, 8192 tokens 16.2 and 11.3, 32768 tokens 19.1 and 16.1). Where other CTAs keep the SMs busy anyhow, or
// may do so, a split has to be worth it in any case.
constexpr int CHEAP_SPLITS = 32, TILES_WORTH_A_SPLIT = 32;
// Pieces of ragged requests have as many tokens at least (an H200, 32/8 heads, against a least piece of 256: 64 requests
// of 100 to 1000 tokens 38.2 and 42.7 us, 128 such 73.2 and 80.1, 64 of 128 to 2000 78.9 and 82.5, 24 of 128 to 4000 53.0
// and 56.0); or, so that no SM waits for one long request among few short ones, an SM's share of the step, if that is
// less; but what a merge costs.
constexpr int LEAST_PIECE = 2048, WORTH_A_MERGE = 256;

struct SplitsParams {
    const Request* requests;  // [max_batch_size + 1]
    DecodeItem* items;        // [max_items]
    int batch;
    int max_batch_size;  // >= batch
    int extra_items;     // items that splitting may add; what would pass it stays whole
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

extern "C" __global__ void __launch_bounds__(1024) plan_splits(const __grid_constant__ SplitsParams p) {
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    int* const places = reinterpret_cast<int*>(shared_memory);
    i64* const warp_totals = reinterpret_cast<i64*>(shared_memory + (CLASSES + 1) * 4);
    int* const longest = reinterpret_cast<int*>(warp_totals + 32);

    // 1. What the step reads: tokens in all, requests that have some, the longest.
    if (threadIdx.x == 0) *longest = 0;
    for (int i = threadIdx.x; i < CLASSES; i += blockDim.x) places[i] = 0;
    __syncthreads();
    i64 tokens = 0, busy = 0;
    for (int chunk = 0; chunk < p.max_batch_size; chunk += blockDim.x) {
        const int row = chunk + threadIdx.x;
        const int own = tokens_of(p, row);
        if (own > 0) atomicMax(longest, own);
        scan_before(own, tokens, warp_totals, Sum());
        scan_before(own > 0, busy, warp_totals, Sum());
    }
    __syncthreads();

    // 2. The rule. tokens_a_split is a multiple of what a CTA takes at a time.
    const i64 ctas = busy * p.ctas_an_item;
    const bool ragged = *longest * busy * 4 > tokens * 5;          // the longest is a quarter longer than the mean
    i64 whole = 0, even_splits = 1, tokens_a_split = INT_LARGEST;  // `whole` requests, and splits of the others
    if (p.fixed_splits > 0)
        even_splits = p.fixed_splits;
    else if (ragged) {
        // Rounded up: pieces that were too small would be too many for extra_items.
        const i64 all = tokens * p.ctas_an_item, share = (all + p.num_sms - 1) / p.num_sms;
        const i64 piece = (all + p.ragged_ctas - 1) / p.ragged_ctas, least = clamp(share, WORTH_A_MERGE, LEAST_PIECE);
        tokens_a_split = clamp(((piece > least ? piece : least) + 127) / 128 * 128, 0, INT_LARGEST);
    } else if (busy > 0) {
        const i64 round = ctas > p.ctas_at_a_time ? p.ctas_at_a_time : p.num_sms;
        whole = ctas / round * round / p.ctas_an_item;
        if (whole < busy) even_splits = round / ((busy - whole) * p.ctas_an_item);
    }
    const bool counts = whole > 0 && even_splits > 1;
    // Of a row with `own` tokens, and `number` rows before it that have some, where that counts.
    auto splits_of = [&](int own, i64 number) -> int {
        const i64 tiles = (i64(own) + TILE - 1) / TILE;
        i64 wanted = (own + tokens_a_split - 1) / tokens_a_split;
        if (tokens_a_split == INT_LARGEST) {
            const i64 worth = tiles / TILES_WORTH_A_SPLIT;
            const i64 most = p.fixed_splits > 0 || whole > 0 || worth > CHEAP_SPLITS ? worth : CHEAP_SPLITS;
            wanted = number < whole ? 1 : even_splits < most ? even_splits : most;
        }
        return int(clamp(wanted, 1, tiles > 1 ? tiles : 1));
    };

    // The splits of one row after the other: all threads call it, each with its row of a chunk.
    i64 extra = 0, number = 0;
    auto next_splits = [&](int row, int own) -> int {
        const i64 own_number = counts ? scan_before(own > 0, number, warp_totals, Sum()) : 0;
        const int wanted = row < p.max_batch_size ? splits_of(own, own_number) : 1;
        const i64 before = scan_before(wanted - 1, extra, warp_totals, Sum());
        return before + wanted - 1 <= p.extra_items ? wanted : 1;
    };

    // 3. How many items each class has, then how many come before it.
    i64 items = 0;
    for (int chunk = 0; chunk < p.max_batch_size; chunk += blockDim.x) {
        const int row = chunk + threadIdx.x;
        const int own = tokens_of(p, row);
        const int splits = next_splits(row, own);
        if (row < p.max_batch_size) atomicAdd(&places[class_of(p, row, own / splits)], splits);
    }
    __syncthreads();
    for (int chunk = 0; chunk < CLASSES; chunk += blockDim.x) {
        const int i = chunk + threadIdx.x;
        const int place = int(scan_before(i < CLASSES ? places[i] : 0, items, warp_totals, Sum()));
        if (i < CLASSES) places[i] = place;
    }
    __syncthreads();

    // 4. The items. A request that is split takes places for its partial states, in the order of the requests.
    i64 partials = 0;
    extra = number = 0;
    for (int chunk = 0; chunk < p.max_batch_size; chunk += blockDim.x) {
        const int row = chunk + threadIdx.x;
        const int own = tokens_of(p, row);
        const int splits = next_splits(row, own);
        const int first_partial = int(scan_before(splits > 1 ? splits : 0, partials, warp_totals, Sum()));
        if (row >= p.max_batch_size) continue;
        const int place = atomicAdd(&places[class_of(p, row, own / splits)], splits);
        const Request request = p.requests[row];
        const KvLimits seen = seen_of(p, request);
        for (int split = 0; split < splits && place + split < p.max_items; ++split)
            p.items[place + split] = {request, row, split, splits, first_partial, seen.begin, seen.end};
    }
    for (i64 place = items + threadIdx.x; place < p.max_items; place += blockDim.x) p.items[place].batch_index = -1;
}
