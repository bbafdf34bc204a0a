// page_table: from a request and a token to an offset in the pool, and which tokens a query sees.
//
// The attention kernels know a request by one 32-byte record, made once a step from the caller's table (schedule.cu).
// The record is already clean: its pages lie inside the plan's copy of the table, every page id is inside the pool. So
// kernels that trust it need no checks and can neither loop nor read out of bounds.
//
// Tokens that a table holds are counted by their *local index* x = 0, 1, 2, ... in page order. Their *position* in the
// whole sequence is  (page_offset + (x / page_size) * page_stride) * page_size + x % page_size : a chunk of a split
// sequence has an offset, a rank that owns every n-th page has a stride. Positions grow with x, so every mask (causal,
// window, length) is an interval of local indices, and kv_limits() is the only place that knows about positions.
#pragma once
#include "convert.cuh"

// n / divisor for 0 <= n < 2^31 by one multiplication; the host computes multiplier and shift (compile.py).
struct FastDivide {
    u32 divisor;
    u32 multiplier;  // 0: the divisor is a power of two and only the shift counts
    u32 shift;
};

__device__ __forceinline__ int divide(int n, const FastDivide& by) {
    return by.multiplier ? int(u32((u64(u32(n)) * by.multiplier) >> 32) >> by.shift) : int(u32(n) >> by.shift);
}

// Strides of a pool in units of 16 bytes, whatever its layout: NHD and HND differ in these numbers only.
struct PoolStrides {
    u32 page;
    u32 slot;
    u32 head;
};

// Where a token's row of one KV head begins in the pool, in units of 16 bytes. T is u32 where the host keeps pools
// below 2^32 such units (attention), else i64 (append).
template <typename T>
__device__ __forceinline__ T pool_offset(T page, T slot, T head, const PoolStrides& strides) {
    return page * strides.page + slot * strides.slot + head * strides.head;
}

// The first fault that any kernel met: field is a FaultField, index the request or entry, value what the array holds.
struct Status {
    int field;
    int index;
    i64 value;
};

// The same order as FAULT_FIELDS in paged_attn/errors.py (a test holds them together).
enum FaultField {
    FAULT_NONE,
    FAULT_INDPTR,
    FAULT_INDICES,
    FAULT_LAST_PAGE_LEN,
    FAULT_PAGE_OFFSET,
    FAULT_TOTAL_LEN,
    FAULT_QO_INDPTR,
    FAULT_SLOTS,
    FAULT_BATCH_INDICES,
    FAULT_POSITIONS,
    FAULT_MAX_PAGES,
    FAULT_MAX_BATCH_SIZE,
    FAULT_SEQ_LENS,
    FAULT_BLOCK_TABLE,
};

__device__ __forceinline__ void record_fault(Status* status, FaultField field, int index, i64 value) {
    if (atomicCAS(&status->field, int(FAULT_NONE), int(field)) == FAULT_NONE) {
        status->index = index;
        status->value = value;
    }
}

// What the attention kernels know of a request: two 16-byte loads.
struct __align__(16) Request {
    int first_page;   // its pages are page_ids[first_page .. first_page + num_pages)
    int num_pages;
    int kv_len;       // tokens that these pages hold
    int total_len;    // length of the whole sequence, from which masks count; or NO_REQUEST
    int page_offset;  // position of its first page, in pages
    int first_query;  // its query rows are first_query .. first_query + num_queries
    int num_queries;
    int first_tile;   // prefill: its first query tile in the grid
};

// The total_len of records without a request: of rows past the batch, of rows whose pages or length are wrong, and of
// the sentinel. They have no keys, and their rows of q give 0 / -INF, with sinks too.
constexpr int NO_REQUEST = -1;

__device__ __forceinline__ bool is_request(const Request& request) { return request.total_len >= 0; }

// The request of a query tile, the same in all lanes: the last of requests [num_requests + 1] whose first_tile is not
// greater. The warp probes 32 at a time.
__device__ __forceinline__ int find_request(const Request* requests, int num_requests, int tile) {
    const int lane = threadIdx.x & 31;
    int index = 0;
    for (int span = num_requests + 1; span > 1;) {
        const int step = (span + 31) / 32, probe = lane * step;
        const bool reached = probe < span && requests[index + probe].first_tile <= tile;
        const int count = __popc(__ballot_sync(~0u, reached)), skipped = count > 1 ? (count - 1) * step : 0;
        index += skipped;
        span = span - skipped < step ? span - skipped : step;
    }
    return index;
}

// A request's share of a decode launch (splits.cu): split `split` of `num_splits` of one request, with all that the
// kernel needs to know of it in four 16-byte loads side by side.
struct __align__(16) DecodeItem {
    Request request;
    int batch_index;  // -1: nothing to do
    int split;
    int num_splits;
    int first_partial;  // the partial state of split s of the request has index first_partial + s
    int begin;          // tokens [begin, end) are seen by some query of the request
    int end;
};

// How one launch reads tables: the same for all requests.
struct Positions {
    FastDivide page_size;
    int page_stride;
    int causal;       // 1: query i of n sees positions <= total_len - n + i
    int window_left;  // w: and only the last w + 1 of them; -1: off
};

// Number of tokens by the table's own rule: a request without pages has none.
__device__ __forceinline__ i64 seq_len_of(int num_pages, int last_page_len, int page_size) {
    return num_pages > 0 ? i64(num_pages - 1) * page_size + last_page_len : 0;
}

// How many of the request's tokens come before `position` in the whole sequence.
__device__ __forceinline__ int tokens_before(i64 position, const Request& request, const Positions& positions) {
    if (position <= 0) return 0;
    const int page_size = int(positions.page_size.divisor);
    if (position > 0x7fffffff) position = 0x7fffffff;
    const int page = divide(int(position), positions.page_size), slot = int(position) - page * page_size;
    // Local pages that lie wholly before page number `page`, and whether that page itself is a local one.
    const int behind = page - request.page_offset;
    if (behind < 0) return 0;
    const int stride = positions.page_stride;  // up to 2^31 - 1: nothing may be added to it
    const int whole = stride == 1 ? behind : behind / stride + (behind % stride != 0);
    const i64 tokens = i64(whole) * page_size + (whole * i64(stride) == behind ? slot : 0);
    return tokens < request.kv_len ? int(tokens) : request.kv_len;
}

// The local tokens [begin, end) that query `query` of the request sees.
struct KvLimits {
    int begin;
    int end;
};

__device__ __forceinline__ KvLimits kv_limits(int query, const Request& request, const Positions& positions) {
    const i64 position = i64(request.total_len) - request.num_queries + query;  // of the query itself
    KvLimits limits;
    limits.end = tokens_before(positions.causal ? position + 1 : request.total_len, request, positions);
    limits.begin = positions.window_left < 0 ? 0 : tokens_before(position - positions.window_left, request, positions);
    if (limits.begin > limits.end) limits.begin = limits.end;
    return limits;
}

// The query heads of one KV head and the tokens of a request are packed into one axis of rows, so that any group size
// fills a tile: packed row r is token r / group_size of the request, head r % group_size of the KV head's group.
struct PackedRow {
    int token;
    int head;  // of the group
};

__device__ __forceinline__ PackedRow packed_row(int row, const FastDivide& group_size) {
    const int token = divide(row, group_size);
    return {token, row - token * int(group_size.divisor)};
}
