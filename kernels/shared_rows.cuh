// shared_rows: rows of CHUNKS pieces of 16 bytes in shared memory, which ldmatrix reads without bank conflicts.
//
// An ldmatrix reads the same chunk of 8 neighbouring rows. Their offsets must differ modulo 128 (the banks), so the
// index of a chunk is XORed with a number that runs with the row. Rows are not padded: cp.async fills whole lines of
// 128 bytes, and rows that straddle them cost bandwidth (trial 200).
#pragma once
#include "load_global.cuh"

template <int CHUNKS>
struct SharedRows {
    static_assert(CHUNKS % 2 == 0, "a row is a multiple of 32 bytes");
    static constexpr int BYTES = CHUNKS * 16;
    // Chunks are permuted within groups of this many; 8 / GROUP neighbouring rows fill 128 bytes and share a
    // permutation.
    static constexpr int GROUP = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : 2;

    // Byte offset of a chunk of a row.
    static __device__ __forceinline__ int at(int row, int chunk) {
        return row * BYTES + (chunk ^ (row / (8 / GROUP) % GROUP)) * 16;
    }

    // From the address of chunk 0 or 1 of a row to that of the chunk 2 * step after it.
    static __device__ __forceinline__ shared_address advance(shared_address address, int step) {
        const int within = 2 * step % GROUP;
        return (address ^ (within * 16)) + (2 * step - within) * 16;
    }
};
