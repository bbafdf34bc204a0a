// table_rows: the rows of a caller's table made safe, the blocks that share a row, and running sums over rows.
#pragma once
#include "page_table.cuh"

constexpr i64 INT_LARGEST = 0x7fffffff;

__device__ __forceinline__ i64 clamp(i64 value, i64 low, i64 high) {
    return value < low ? low : value > high ? high : value;
}

// A number's class for sorting by size to within an eighth: 0 for none, and 8 classes between a power of two and the
// next, which are the upper bits of the number as a float.
constexpr int LENGTH_CLASSES = 256;

__device__ __forceinline__ int length_class(int length) {
    const int smallest = 127 << 3;  // of 1.0f
    return length > 0 ? int(__float_as_uint(float(length)) >> 20) - smallest + 1 : 0;
}

// Entries [begin, end) of a list.
struct Range {
    int begin;
    int end;
    bool is_wrong;  // of a row with a fault, which has no entries
};

// Row `row` of a compressed list (indptr and the like): [indptr[row], indptr[row + 1]) where that lies in order inside
// [0, limit], else nothing. A wrong entry is reported once, by the row that it ends; the first entry by row 0.
__device__ __forceinline__ Range checked_range(const int* indptr, int row, int limit, FaultField field,
                                               Status* status) {
    const int begin = indptr[row], end = indptr[row + 1];
    const bool begins = begin >= 0 && begin <= limit;
    if (begins && end >= begin && end <= limit) return {begin, end};
    if (begins)
        record_fault(status, field, row + 1, end);
    else if (row == 0)
        record_fault(status, field, 0, begin);
    return {0, 0, true};
}

// A page table: request i has the pages indices[indptr[i] .. indptr[i + 1]), full but for the last one.
struct Table {
    const int* indptr;         // [batch + 1]
    const int* indices;        // [num_indices]
    const int* last_page_len;  // [batch]
    const int* page_offset;    // [batch] or null: 0
    const int* total_len;      // [batch] or null: seq_len
    int batch;
    int num_indices;
    int page_size;
    int page_stride;
};

__device__ __forceinline__ Range pages_of(const Table& table, int row, Status* status) {
    return checked_range(table.indptr, row, table.num_indices, FAULT_INDPTR, status);
}

// A table that is written; page_offset and total_len by split alone.
struct OutTable {
    int* indptr;         // [rows + 1]
    int* indices;        // [num_indices]
    int* last_page_len;  // [rows]
    int* page_offset;    // [rows]
    int* total_len;      // [rows]
    int num_indices;
};

// The position after the last token of a request with pages; it must fit into an int, beyond which it is not exact.
__device__ __forceinline__ i64 end_position(i64 num_pages, int last_page_len, int page_size, int page_offset,
                                            int page_stride) {
    return clamp(page_offset + (num_pages - 1) * page_stride, 0, INT_LARGEST) * page_size + last_page_len;
}

// Where a row's entries go after `before` others in a list of `limit`: what does not fit is cut off.
__device__ __forceinline__ Range placed(int row, i64 before, i64 count, int limit, Status* status) {
    if (before + count > limit && count > 0) record_fault(status, FAULT_MAX_PAGES, row, before + count);
    return {int(clamp(before, 0, limit)), int(clamp(before + count, 0, limit))};
}

// A grid gives every row the same number of blocks: which row a block serves, and which of the row's blocks it is.
struct RowPart {
    int row;
    int part;
    int parts;
};

__device__ __forceinline__ RowPart row_part(int block, int num_blocks, int num_rows) {
    const int parts = num_blocks / num_rows;
    return {block / parts, block % parts, parts};
}

// The thread's first entry of `range` and its step to the next, when the blocks of a row share the range.
__device__ __forceinline__ i64 first_entry(const Range& range, const RowPart& of) {
    return range.begin + i64(of.part) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ i64 entry_step(const RowPart& of) { return i64(of.parts) * blockDim.x; }

struct Sum {
    __device__ __forceinline__ i64 operator()(i64 a, i64 b) const { return a + b; }
};

struct Largest {
    __device__ __forceinline__ i64 operator()(i64 a, i64 b) const { return a > b ? a : b; }
};

constexpr int SCAN_BYTES = 32 * 8;  // shared memory of scan_before: one total a warp

// What `combine` makes of carry and of the values (>= 0) of all threads of the block before this one; carry then takes
// in the values of the whole block, so that a loop over chunks of blockDim.x rows runs through any number of rows.
// Every thread of the block calls it; blockDim.x is a multiple of 32 up to 1024.
template <typename Combine>
__device__ __forceinline__ i64 scan_before(i64 value, i64& carry, i64* warp_totals, Combine combine) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    // 1. Within the warp.
    i64 through = value;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const i64 other = __shfl_up_sync(~0u, through, distance);
        if (lane >= distance) through = combine(other, through);
    }
    if (lane == 31) warp_totals[warp] = through;
    __syncthreads();
    // 2. Over the totals of the warps: each warp does it, which saves a barrier.
    i64 totals = lane < warps ? warp_totals[lane] : 0;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const i64 other = __shfl_up_sync(~0u, totals, distance);
        if (lane >= distance) totals = combine(other, totals);
    }
    const i64 warps_before = __shfl_sync(~0u, totals, warp > 0 ? warp - 1 : 0);
    const i64 lanes_before = __shfl_up_sync(~0u, through, 1);
    const i64 block_total = __shfl_sync(~0u, totals, 31);
    // 3. Together.
    i64 before = carry;
    if (warp > 0) before = combine(before, warps_before);
    if (lane > 0) before = combine(before, lanes_before);
    carry = combine(carry, block_total);
    __syncthreads();  // warp_totals is free for the next call
    return before;
}
