// plan_tiles: the requests of a step in the order in which prefill_hopper.cu works through them, the longest first.
//
//   sorted[r]            = requests[order[r]],  with less work a tile from request to request
//   sorted[r].first_tile = sum_{j < r} ceil(sorted[j].num_queries * group_size / tile_rows)
//
// in    requests  [max_batch_size + 1] Request    as plan_requests makes them (schedule.cu)
// out   sorted    [max_batch_size + 1] Request    the last one holds the totals, as in requests
//
// A launch with many more tiles than SMs ends evenly when long tiles do not come last (longest processing time first).
// A tile costs roughly the number of tokens that it sees; requests are sorted by that to within an eighth, which takes
// one counting sort. Requests of one class come in any order: no result depends on it.
//
// One block. Shared memory: [CLASSES] int, then SCAN_BYTES.
#include "page_table.cuh"
#include "table_rows.cuh"

constexpr int CLASSES = LENGTH_CLASSES;

struct TilesParams {
    const Request* requests;  // [max_batch_size + 1]
    Request* sorted;          // [max_batch_size + 1]
    int max_batch_size;
    int window_left;  // -1: off
    int group_size;
    int tile_rows;
};

// The class of a request, 0 for the most tokens a tile.
__device__ __forceinline__ int class_of(const TilesParams& p, const Request& request) {
    const i64 window = p.window_left < 0 ? INT_LARGEST : i64(p.window_left) + p.tile_rows / p.group_size + 1;
    return CLASSES - 1 - length_class(int(clamp(request.kv_len, 0, window)));
}

extern "C" __global__ void __launch_bounds__(1024) plan_tiles(const __grid_constant__ TilesParams p) {
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    int* const offsets = reinterpret_cast<int*>(shared_memory);
    i64* const warp_totals = reinterpret_cast<i64*>(shared_memory + CLASSES * 4);

    // 1. How many requests each class has, then how many come before it.
    for (int i = threadIdx.x; i < CLASSES; i += blockDim.x) offsets[i] = 0;
    __syncthreads();
    for (int row = threadIdx.x; row < p.max_batch_size; row += blockDim.x)
        atomicAdd(&offsets[class_of(p, p.requests[row])], 1);
    __syncthreads();
    i64 before = 0;
    for (int chunk = 0; chunk < CLASSES; chunk += blockDim.x) {
        const int i = chunk + threadIdx.x;
        const int offset = int(scan_before(i < CLASSES ? offsets[i] : 0, before, warp_totals, Sum()));
        if (i < CLASSES) offsets[i] = offset;
    }
    __syncthreads();

    // 2. Every request to its index in `sorted`.
    for (int row = threadIdx.x; row < p.max_batch_size; row += blockDim.x) {
        const Request request = p.requests[row];
        p.sorted[atomicAdd(&offsets[class_of(p, request)], 1)] = request;
    }
    __syncthreads();

    // 3. Tiles before each, and the totals.
    i64 tiles = 0;
    for (int chunk = 0; chunk < p.max_batch_size; chunk += blockDim.x) {
        const int row = chunk + threadIdx.x;
        const i64 rows = row < p.max_batch_size ? i64(p.sorted[row].num_queries) * p.group_size : 0;
        const i64 first_tile = scan_before((rows + p.tile_rows - 1) / p.tile_rows, tiles, warp_totals, Sum());
        if (row < p.max_batch_size) p.sorted[row].first_tile = int(clamp(first_tile, 0, INT_LARGEST));
    }
    if (threadIdx.x == 0) {
        Request total = p.requests[p.max_batch_size];
        total.first_tile = int(clamp(tiles, 0, INT_LARGEST));
        p.sorted[p.max_batch_size] = total;
    }
}
