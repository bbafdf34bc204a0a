// lengths: whether ranks plan a step with the same lengths. A checksum of them on each rank, and the comparison of those
// that all ranks have exchanged.
//
//   checksum = sum over rows i of mixed(i, total_len[i], first[i])     modulo 2^64
//   first[i] = (rank - page_offset[i]) mod num_ranks                   the rank that holds the first page of sequence i,
//                                                                      0 where total_len[i] is 0
//
// Page j of sequence i belongs to rank (j + first[i]) mod num_ranks, so that ranks with equal checksums hold each page
// once, and count from the same lengths.
//
// table_checksum
// in    total_len    [batch] int        any values
//       page_offset  [batch] int
// out   checksum     [1] u64
// compare_checksums
// in    checksums    [num_ranks, stride] u64, the first of each row
// out   status       [1] u32            0, or 1 + the first rank whose checksum is not that of `rank`
//
// Who owns what: one warp does all of it.
//
// Source: mixed() is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
#include "page_table.cuh"

struct ChecksumParams {
    const int* total_len;    // [batch]
    const int* page_offset;  // [batch]
    u64* checksum;           // [1]
    int batch;
    int rank;
    int num_ranks;
};

__device__ __forceinline__ u64 mixed(u64 x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

extern "C" __global__ void __launch_bounds__(32) table_checksum(const __grid_constant__ ChecksumParams p) {
    u64 sum = 0;
    for (i64 row = threadIdx.x; row < p.batch; row += 32) {
        const int total_len = p.total_len[row];
        const i64 behind = (i64(p.rank) - p.page_offset[row]) % p.num_ranks;
        const i64 first = total_len == 0 ? 0 : behind < 0 ? behind + p.num_ranks : behind;
        sum += mixed(mixed(u64(row) << 32 | u32(total_len)) + u64(first));
    }
    for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(~0u, sum, bit);
    if (threadIdx.x == 0) *p.checksum = sum;
}

struct CompareParams {
    const u64* checksums;  // [num_ranks, stride]
    u32* status;           // [1]
    int stride;            // in elements
    int rank;
    int num_ranks;
};

extern "C" __global__ void __launch_bounds__(32) compare_checksums(const __grid_constant__ CompareParams p) {
    const u64 own = p.checksums[i64(p.rank) * p.stride];
    u32 found = ~0u;  // 1 + the first rank that this lane finds
    for (int other = threadIdx.x; other < p.num_ranks && found == ~0u; other += 32)
        if (p.checksums[i64(other) * p.stride] != own) found = 1 + other;
    for (int bit = 16; bit > 0; bit /= 2) {
        const u32 theirs = __shfl_xor_sync(~0u, found, bit);
        found = theirs < found ? theirs : found;
    }
    if (threadIdx.x == 0) *p.status = found == ~0u ? 0 : found;
}
