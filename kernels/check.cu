// check: whether a table keeps its rules. The answer is written on the device, into a status word, without a
// synchronisation.
//
//   0 <= indptr[0] <= indptr[1] <= ... <= num_indices          0 <= indices[j] < num_pages for every j of a row
//   1 <= last_page_len[i] <= page_size where row i has a page  page_offset[i] >= 0   total_len[i] >= 0
//   where row i has a page, the position of its last token is below 2^31
//
// in    table    Table               its arrays and sizes (table_rows.cuh)
// out   status   Status              one of the faults, the first that a thread meets
//
// gridDim.x / batch blocks a row; a row's first thread checks what there is one of in a row.
#include "page_table.cuh"
#include "table_rows.cuh"

struct CheckParams {
    Table table;
    Status* status;  // [1]
    int num_pages;   // of the pool
};

extern "C" __global__ void __launch_bounds__(256) check_table(const __grid_constant__ CheckParams p) {
    const RowPart of = row_part(blockIdx.x, gridDim.x, p.table.batch);
    if (of.row >= p.table.batch) return;
    const Table& table = p.table;
    const Range pages = pages_of(table, of.row, p.status);

    // 1. The numbers of the row.
    if (of.part == 0 && threadIdx.x == 0) {
        const int page_offset = table.page_offset ? table.page_offset[of.row] : 0;
        if (page_offset < 0) record_fault(p.status, FAULT_PAGE_OFFSET, of.row, page_offset);
        if (table.total_len && table.total_len[of.row] < 0)
            record_fault(p.status, FAULT_TOTAL_LEN, of.row, table.total_len[of.row]);
        if (pages.end > pages.begin) {
            const int last_page_len = table.last_page_len[of.row];
            if (last_page_len < 1 || last_page_len > table.page_size)
                record_fault(p.status, FAULT_LAST_PAGE_LEN, of.row, last_page_len);
            const i64 end =
                end_position(pages.end - pages.begin, last_page_len, table.page_size, page_offset, table.page_stride);
            if (end > INT_LARGEST)
                record_fault(p.status, table.page_offset ? FAULT_PAGE_OFFSET : FAULT_INDPTR, of.row, end);
        }
    }

    // 2. Its pages.
    for (i64 entry = first_entry(pages, of); entry < pages.end; entry += entry_step(of)) {
        const int page = table.indices[entry];
        if (page < 0 || page >= p.num_pages) record_fault(p.status, FAULT_INDICES, int(entry), page);
    }
}
