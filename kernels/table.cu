// table: operations on page tables and on whole pages, one small kernel each.
//
// A table that is read is a Table, one that is written an OutTable (table_rows.cuh).
//
//   seq_lens            tokens of each request
//   split_rows, _pages  row c * batch + i = pages [c * n / num_chunks, (c + 1) * n / num_chunks) of request i, n = its
//                       pages
//   block_table_rows, _pages   a padded block table [batch, width] and lengths -> a table
//   to_block_table      a table -> a padded block table, -1 where there is no page
//   table_slots         (request, position) -> slot = page * page_size + offset, -1 where the table lacks the page
//   update_page_lists   entries of the cache's page lists that have changed
//   build_table         page lists of some sequences -> a table
//   copy_pages          whole pages of all layers
//
// Tables come from callers and may hold anything: a row outside its arrays counts as empty, a row that does not fit
// into the output is cut, and both are recorded in the status word.
//
// Who owns what
//   *_rows        one block, chunks of blockDim.x rows with a running sum; SCAN_BYTES of shared memory
//   *_pages, build_table, copy_pages    gridDim.x / rows blocks a row (a pair of pages, for copy_pages)
//   the others    one thread an entry
#include "page_table.cuh"
#include "table_rows.cuh"

// ---- seq_lens -------------------------------------------------------------------------------------------------------

struct SeqLensParams {
    Table table;
    int* seq_lens;  // [batch], out
};

extern "C" __global__ void __launch_bounds__(256) seq_lens(const __grid_constant__ SeqLensParams p) {
    const i64 row = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= p.table.batch) return;
    const int num_pages = int(clamp(i64(p.table.indptr[row + 1]) - p.table.indptr[row], 0, INT_LARGEST));
    const i64 seq_len = seq_len_of(num_pages, p.table.last_page_len[row], p.table.page_size);
    p.seq_lens[row] = int(clamp(seq_len, 0, INT_LARGEST));
}

// ---- split ----------------------------------------------------------------------------------------------------------

struct SplitParams {
    Table table;
    OutTable out;    // num_chunks * batch rows
    Status* status;  // [1]
    int num_chunks;
};

// Row `row` of the split table: a chunk of the pages of a request.
struct Chunk {
    int request;
    Range all;   // the request's entries of indices
    Range used;  // the chunk's entries of indices
};

__device__ __forceinline__ Chunk chunk_of(const SplitParams& p, int row) {
    const int index = row / p.table.batch;
    Chunk chunk;
    chunk.request = row % p.table.batch;
    chunk.all = pages_of(p.table, chunk.request, p.status);
    const i64 num_pages = chunk.all.end - chunk.all.begin;
    chunk.used.begin = chunk.all.begin + int(index * num_pages / p.num_chunks);
    chunk.used.end = chunk.all.begin + int((index + 1) * num_pages / p.num_chunks);
    return chunk;
}

extern "C" __global__ void __launch_bounds__(1024) split_rows(const __grid_constant__ SplitParams p) {
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    i64* warp_totals = reinterpret_cast<i64*>(shared_memory);
    const Table& table = p.table;
    const int rows = p.num_chunks * table.batch;
    i64 pages = 0;  // of all rows before
    for (int first = 0; first < rows; first += blockDim.x) {
        const int row = first + threadIdx.x;
        Chunk chunk = {};
        if (row < rows) chunk = chunk_of(p, row);
        const int num_pages = chunk.used.end - chunk.used.begin;
        const i64 before = scan_before(num_pages, pages, warp_totals, Sum());
        if (row >= rows) continue;

        const Range out = placed(row, before, num_pages, p.out.num_indices, p.status);
        const bool whole = out.end - out.begin == num_pages;
        const int last_page_len = table.last_page_len[chunk.request];
        const i64 seq_len = seq_len_of(chunk.all.end - chunk.all.begin, last_page_len, table.page_size);
        const i64 skipped = i64(chunk.used.begin - chunk.all.begin) * table.page_stride;
        p.out.indptr[row] = out.begin;
        p.out.last_page_len[row] = out.end == out.begin                       ? 0
                                   : whole && chunk.used.end == chunk.all.end ? last_page_len
                                                                              : table.page_size;
        p.out.page_offset[row] =
            int(clamp((table.page_offset ? table.page_offset[chunk.request] : 0) + skipped, -INT_LARGEST, INT_LARGEST));
        p.out.total_len[row] = table.total_len ? table.total_len[chunk.request] : int(clamp(seq_len, 0, INT_LARGEST));
    }
    if (threadIdx.x == 0) p.out.indptr[rows] = int(clamp(pages, 0, p.out.num_indices));
}

extern "C" __global__ void __launch_bounds__(256) split_pages(const __grid_constant__ SplitParams p) {
    const int rows = p.num_chunks * p.table.batch;
    const RowPart of = row_part(blockIdx.x, gridDim.x, rows);
    if (of.row >= rows) return;
    const Range out = {p.out.indptr[of.row], p.out.indptr[of.row + 1]};
    const i64 from = i64(chunk_of(p, of.row).used.begin) - out.begin;
    for (i64 entry = first_entry(out, of); entry < out.end; entry += entry_step(of))
        p.out.indices[entry] = p.table.indices[from + entry];
}

// ---- from and to a block table --------------------------------------------------------------------------------------

struct FromBlockTableParams {
    const int* block_table;  // [batch, width]
    const int* seq_lens;     // [batch]
    OutTable out;            // batch rows
    Status* status;          // [1]
    i64 row_stride;          // of block_table, in elements
    i64 column_stride;
    int batch;
    int width;
    int page_size;
};

extern "C" __global__ void __launch_bounds__(1024) block_table_rows(const __grid_constant__ FromBlockTableParams p) {
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    i64* warp_totals = reinterpret_cast<i64*>(shared_memory);
    i64 pages = 0;  // of all rows before
    for (int first = 0; first < p.batch; first += blockDim.x) {
        const int row = first + threadIdx.x;
        i64 seq_len = 0;
        if (row < p.batch) {
            const int given = p.seq_lens[row];
            seq_len = clamp(given, 0, i64(p.width) * p.page_size);
            if (seq_len != given) record_fault(p.status, FAULT_SEQ_LENS, row, given);
        }
        const i64 num_pages = (seq_len + p.page_size - 1) / p.page_size;
        const i64 before = scan_before(num_pages, pages, warp_totals, Sum());
        if (row >= p.batch) continue;

        const Range out = placed(row, before, num_pages, p.out.num_indices, p.status);
        p.out.indptr[row] = out.begin;
        p.out.last_page_len[row] = out.end == out.begin              ? 0
                                   : out.end - out.begin < num_pages ? p.page_size
                                                                     : int(seq_len - (num_pages - 1) * p.page_size);
    }
    if (threadIdx.x == 0) p.out.indptr[p.batch] = int(clamp(pages, 0, p.out.num_indices));
}

extern "C" __global__ void __launch_bounds__(256) block_table_pages(const __grid_constant__ FromBlockTableParams p) {
    const RowPart of = row_part(blockIdx.x, gridDim.x, p.batch);
    if (of.row >= p.batch) return;
    const Range out = {p.out.indptr[of.row], p.out.indptr[of.row + 1]};
    for (i64 entry = first_entry(out, of); entry < out.end; entry += entry_step(of)) {
        const i64 column = entry - out.begin;
        const int page = p.block_table[of.row * p.row_stride + column * p.column_stride];
        if (page < 0)
            record_fault(p.status, FAULT_BLOCK_TABLE, int(clamp(of.row * i64(p.width) + column, 0, INT_LARGEST)), page);
        p.out.indices[entry] = page;
    }
}

struct ToBlockTableParams {
    Table table;
    int* block_table;  // [batch, width], out
    Status* status;    // [1]
    int width;
};

extern "C" __global__ void __launch_bounds__(256) to_block_table(const __grid_constant__ ToBlockTableParams p) {
    const i64 at = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= i64(p.table.batch) * p.width) return;
    const int row = int(at / p.width), column = int(at % p.width);
    const Range pages = pages_of(p.table, row, p.status);
    const int num_pages = pages.end - pages.begin;
    if (column == 0 && num_pages > p.width) record_fault(p.status, FAULT_MAX_PAGES, row, num_pages);
    p.block_table[at] = column < num_pages ? p.table.indices[pages.begin + column] : -1;
}

// ---- slots ----------------------------------------------------------------------------------------------------------

struct TableSlotsParams {
    Table table;
    const int* batch_indices;  // [tokens]
    const int* positions;      // [tokens], in the whole sequence
    i64* slots;                // [tokens], out
    Status* status;            // [1]
    FastDivide page_size;
    int tokens;
};

extern "C" __global__ void __launch_bounds__(256) table_slots(const __grid_constant__ TableSlotsParams p) {
    const i64 token = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (token >= p.tokens) return;
    p.slots[token] = -1;

    // 1. The page of the whole sequence, and its number among the pages of this table: every page_stride-th is here.
    const int request = p.batch_indices[token], position = p.positions[token];
    const Table& table = p.table;
    if (request < 0 || request >= table.batch) return record_fault(p.status, FAULT_BATCH_INDICES, int(token), request);
    if (position < 0) return record_fault(p.status, FAULT_POSITIONS, int(token), position);
    const Range pages = pages_of(table, request, p.status);
    const int page_in_sequence = divide(position, p.page_size);
    const i64 behind = i64(page_in_sequence) - (table.page_offset ? table.page_offset[request] : 0);
    if (behind < 0 || behind % table.page_stride) return;
    const i64 entry = pages.begin + behind / table.page_stride;
    if (entry >= pages.end) return;

    // 2. That page in the pool.
    const int page = table.indices[entry];
    if (page < 0) return record_fault(p.status, FAULT_INDICES, int(entry), page);
    const int page_size = int(p.page_size.divisor);
    p.slots[token] = i64(page) * page_size + (position - page_in_sequence * page_size);
}

// ---- the table of a cache -------------------------------------------------------------------------------------------

struct UpdatePageListsParams {
    int* page_lists;          // [num_entries], in and out
    const int* update_index;  // [num_updates], no entry twice
    const int* update_value;  // [num_updates]
    Status* status;           // [1]
    int num_entries;
    int num_updates;
};

extern "C" __global__ void __launch_bounds__(256) update_page_lists(const __grid_constant__ UpdatePageListsParams p) {
    const i64 update = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (update >= p.num_updates) return;
    const int entry = p.update_index[update];
    if (entry < 0 || entry >= p.num_entries) return record_fault(p.status, FAULT_INDICES, int(update), entry);
    p.page_lists[entry] = p.update_value[update];
}

struct BuildTableParams {
    const int* page_lists;     // [num_entries]
    const int* starts;         // [batch], where a sequence's pages begin in page_lists
    const int* indptr;         // [batch + 1]
    const int* last_page_len;  // [batch]
    const int* page_offset;    // [batch], or null like all positions
    const int* total_len;      // [batch]
    OutTable out;              // capacity rows; those past batch have no pages, and positions 0
    Status* status;            // [1]
    int num_entries;
    int batch;
    int capacity;  // >= batch
    int page_stride;  // between entries of page_lists that a sequence takes
};

extern "C" __global__ void __launch_bounds__(256) build_table(const __grid_constant__ BuildTableParams p) {
    // 1. What there is of each sequence, all blocks together.
    const i64 step = i64(gridDim.x) * blockDim.x;
#pragma unroll 1  // these loads are few, and would take registers from those of pages
    for (i64 row = i64(blockIdx.x) * blockDim.x + threadIdx.x; row <= p.capacity; row += step) {
        p.out.indptr[row] = p.indptr[row < p.batch ? int(row) : p.batch];
        if (row >= p.capacity) continue;
        const bool is_given = row < p.batch;
        p.out.last_page_len[row] = is_given ? p.last_page_len[row] : 0;
        if (!p.page_offset) continue;
        p.out.page_offset[row] = is_given ? p.page_offset[row] : 0;
        p.out.total_len[row] = is_given ? p.total_len[row] : 0;
    }
    if (p.batch <= 0) return;

    // 2. The pages of the block's sequence.
    const RowPart of = row_part(blockIdx.x, gridDim.x, p.batch);
    if (of.row >= p.batch) return;
    const Range out = checked_range(p.indptr, of.row, p.out.num_indices, FAULT_INDPTR, p.status);
    const int start = p.starts[of.row];
    const i64 last = start + i64(out.end - out.begin - 1) * p.page_stride;
    if (start < 0 || last >= p.num_entries) return record_fault(p.status, FAULT_INDICES, of.row, start);
    for (i64 entry = first_entry(out, of); entry < out.end; entry += entry_step(of))
        p.out.indices[entry] = p.page_lists[start + (entry - out.begin) * p.page_stride];
}

// ---- whole pages ----------------------------------------------------------------------------------------------------

struct CopyPagesParams {
    uint4* storage;     // [num_layers, num_pages, page_units], in and out: K and V of a page, in units of 16 bytes
    const int* source;  // [num_pairs]
    const int* target;  // [num_pairs], no page that is also a source or a second target
    Status* status;     // [1]
    i64 layer_units;    // from layer to layer
    i64 page_units;     // of one page, K and V together
    int num_pages;
    int num_pairs;
};

// blockIdx.y is the layer.
extern "C" __global__ void __launch_bounds__(256) copy_pages(const __grid_constant__ CopyPagesParams p) {
    const RowPart of = row_part(blockIdx.x, gridDim.x, p.num_pairs);
    if (of.row >= p.num_pairs) return;
    const int source = p.source[of.row], target = p.target[of.row];
    if (source < 0 || source >= p.num_pages) return record_fault(p.status, FAULT_INDICES, of.row, source);
    if (target < 0 || target >= p.num_pages) return record_fault(p.status, FAULT_INDICES, of.row, target);
    uint4* layer = p.storage + blockIdx.y * p.layer_units;
    const uint4* from = layer + source * p.page_units;
    uint4* to = layer + target * p.page_units;
    for (i64 unit = first_entry({0, 0}, of); unit < p.page_units; unit += entry_step(of)) to[unit] = from[unit];
}
