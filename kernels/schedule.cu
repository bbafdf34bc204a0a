// schedule: a caller's table, copied once a step into the plan's own buffers and cleaned on the way.
//
//   requests[i] = where the pages of request i are stored in page_ids, how many tokens they hold, its position, its
//                 query rows, and its first query tile:
//   first_tile[i] = sum_{j < i} ceil(num_queries[j] * group_size / tile_rows)
//
// in    indptr        [batch + 1] int       pages of request i: indices[indptr[i] .. indptr[i + 1])
//       indices       [num_indices] int     page ids
//       last_page_len [batch] int           tokens in a request's last page
//       page_offset   [batch] int or null   position of the first page, in pages; null: 0
//       total_len     [batch] int or null   length of the whole sequence; null: what the pages hold
//       qo_indptr     [batch + 1] int or null   query rows of request i; null: q_len rows each
// out   requests      [max_batch_size + 1] Request    the last one holds the totals: first_query = query rows in all,
//                                                     first_tile = query tiles in all
//       page_ids      [max_pages] int                 indices from indptr[0] on; every id that a request refers to is
//                                                     inside the pool
//       status        Status                          the first fault met
//
// Whatever the arrays hold, the attention kernels can trust requests and page_ids: a row with wrong pages or a wrong
// total_len becomes one of no request (NO_REQUEST), any other wrong value the nearest right one, and the fault is
// recorded. Rows from batch to max_batch_size are of no request; with q_len they still have their query rows (written
// as 0 / -inf), with qo_indptr none.
//
// Who owns what
//   block 0             all requests, in chunks of blockDim.x rows with running sums from chunk to chunk
//   blocks 1 and above  the page ids: (gridDim.x - 1) / batch blocks a request. A request's pages keep their offset
//                       from indptr[0], so these blocks wait for nothing.
//   shared memory       SCAN_BYTES
#include "page_table.cuh"
#include "table_rows.cuh"

// Tokens that a request may hold: an int, with room for the tiles past its end that decode looks ahead to.
constexpr i64 MAX_KV_LEN = INT_LARGEST - 0xfffff;

struct ScheduleParams {
    const int* indptr;         // [batch + 1]; from here to num_indices: what changes from step to step
    const int* indices;        // [num_indices]
    const int* last_page_len;  // [batch]
    const int* page_offset;    // [batch] or null
    const int* total_len;      // [batch] or null
    const int* qo_indptr;      // [batch + 1] or null
    int batch;
    int num_indices;
    Request* requests;   // [max_batch_size + 1]
    int* page_ids;       // [max_pages]
    Status* status;      // [1]
    int max_batch_size;  // >= batch
    int max_pages;
    int page_size;
    int page_stride;
    int num_pages;         // of the pool
    int q_len;             // query rows a request where qo_indptr is null
    int total_rows_limit;  // qo_indptr may not go beyond
    int tile_rows;         // (query row, head of the group) pairs a tile, >= 1
    int group_size;
};

// The entry of indices that is the first one of page_ids: capacity counts from there. 0 where the first row is wrong.
__device__ __forceinline__ int first_entry_of_all(const ScheduleParams& p) {
    const int begin = p.indptr[0], end = p.indptr[1];
    return begin >= 0 && begin <= end && end <= p.num_indices ? begin : 0;
}

// The request's entries of page_ids. In indices they are stored `first` entries further on.
__device__ __forceinline__ Range kept_pages_of(const ScheduleParams& p, int first, int row) {
    const Range pages = checked_range(p.indptr, row, p.num_indices, FAULT_INDPTR, p.status);
    const int begin = pages.begin - first, end = pages.end - first;
    if (begin >= 0 && end <= p.max_pages) return {begin, end, pages.is_wrong};
    if (end > p.max_pages) record_fault(p.status, FAULT_MAX_PAGES, row, end);
    return {0, 0, true};  // before the first: behind a row where indptr decreases, which has the fault
}

// The record of a request but for its queries.
__device__ __forceinline__ Request kv_part_of(const ScheduleParams& p, int row) {
    Request request = {};
    request.page_offset = p.page_offset ? p.page_offset[row] : 0;
    if (request.page_offset < 0) {
        record_fault(p.status, FAULT_PAGE_OFFSET, row, request.page_offset);
        request.page_offset = 0;
    }
    const Range pages = kept_pages_of(p, first_entry_of_all(p), row);
    const int num_pages = p.num_pages > 0 ? pages.end - pages.begin : 0;
    if (num_pages > 0) {
        int last_page_len = p.last_page_len[row];
        if (last_page_len < 1 || last_page_len > p.page_size) {
            record_fault(p.status, FAULT_LAST_PAGE_LEN, row, last_page_len);
            last_page_len = int(clamp(last_page_len, 1, p.page_size));
        }
        const i64 seq_len = seq_len_of(num_pages, last_page_len, p.page_size);
        const i64 end = end_position(num_pages, last_page_len, p.page_size, request.page_offset, p.page_stride);
        if (end > INT_LARGEST || seq_len > MAX_KV_LEN)
            record_fault(p.status, p.page_offset ? FAULT_PAGE_OFFSET : FAULT_INDPTR, row, end);
        request.first_page = pages.begin;
        request.num_pages = num_pages;
        request.kv_len = int(clamp(seq_len, 0, MAX_KV_LEN));
    }
    request.total_len = p.total_len ? p.total_len[row] : request.kv_len;
    if (request.total_len < 0) record_fault(p.status, FAULT_TOTAL_LEN, row, request.total_len);
    const bool lost_pages = pages.is_wrong || num_pages < pages.end - pages.begin;
    if (request.total_len < 0 || lost_pages) request.total_len = NO_REQUEST;
    return request;
}

extern "C" __global__ void __launch_bounds__(1024) plan_requests(const __grid_constant__ ScheduleParams p) {
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    const int batch = p.batch < p.max_batch_size ? p.batch : p.max_batch_size;

    // 1. Page ids, by all blocks but the first. An impossible one becomes page 0, which every pool has.
    if (blockIdx.x > 0) {
        const RowPart of = row_part(blockIdx.x - 1, gridDim.x - 1, p.batch);
        if (of.row >= batch) return;
        const int first = first_entry_of_all(p);
        const Range pages = kept_pages_of(p, first, of.row);
        for (i64 entry = first_entry(pages, of); entry < pages.end; entry += entry_step(of)) {
            int page = p.indices[first + entry];
            if (page < 0 || page >= p.num_pages) {
                record_fault(p.status, FAULT_INDICES, int(first + entry), page);
                page = 0;
            }
            p.page_ids[entry] = page;
        }
        return;
    }

    // 2. Requests, by the first block.
    i64* warp_totals = reinterpret_cast<i64*>(shared_memory);
    i64 queries = 0, tiles = 0;  // of all chunks before
    if (p.qo_indptr && threadIdx.x == 0 && p.qo_indptr[0] != 0)
        record_fault(p.status, FAULT_QO_INDPTR, 0, p.qo_indptr[0]);
    for (int chunk = 0; chunk < p.max_batch_size; chunk += blockDim.x) {
        const int row = chunk + threadIdx.x;
        Request request = {};
        request.total_len = NO_REQUEST;
        if (row < batch) request = kv_part_of(p, row);

        // Query rows begin where the largest end so far was, so they never overlap, whatever qo_indptr holds.
        i64 first_query = i64(row) * p.q_len, num_queries = p.q_len;
        if (p.qo_indptr) {
            i64 end = 0;
            if (row < batch) {
                checked_range(p.qo_indptr, row, p.total_rows_limit, FAULT_QO_INDPTR, p.status);
                end = clamp(p.qo_indptr[row + 1], 0, p.total_rows_limit);
            }
            first_query = scan_before(end, queries, warp_totals, Largest());
            num_queries = end > first_query ? end - first_query : 0;
        }
        request.first_query = int(clamp(first_query, 0, INT_LARGEST));
        request.num_queries = int(num_queries);

        const i64 row_tiles = row < p.max_batch_size ? (num_queries * p.group_size + p.tile_rows - 1) / p.tile_rows : 0;
        request.first_tile = int(clamp(scan_before(row_tiles, tiles, warp_totals, Sum()), 0, INT_LARGEST));
        if (row < p.max_batch_size) p.requests[row] = request;
    }

    // 3. The totals.
    if (threadIdx.x == 0) {
        Request total = {};
        total.total_len = NO_REQUEST;
        total.first_query = int(clamp(p.qo_indptr ? queries : i64(p.max_batch_size) * p.q_len, 0, INT_LARGEST));
        total.first_tile = int(clamp(tiles, 0, INT_LARGEST));
        p.requests[p.max_batch_size] = total;
    }
}
