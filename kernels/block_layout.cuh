// block_layout: how the Hopper prefill stores K, V and Q in shared memory, and their products.
//
// 8 tokens of a block of K or V are HEAD_DIM / 64 pieces of 8 lines of 128 bytes, swizzled: a tensor map of five
// dimensions (64 numbers, 8 tokens, pieces, groups of 8 tokens, pages and heads) copies a box into that order in one
// operation. A second piece that is not full, as with HEAD_DIM 80, takes a separate operation. wgmma reads K as it is
// stored and V transposed, with the descriptors of hopper.cuh.
#pragma once
#include "hopper.cuh"
#include "mma.cuh"
#include "shared_rows.cuh"
#include "tile_list.cuh"

constexpr bool WIDE = HEAD_DIM > 128;         // O takes so many registers that Q stays in shared memory
constexpr int CHUNKS = HEAD_DIM / 8;          // of 16 bytes in a row
constexpr int PIECES = (HEAD_DIM + 63) / 64;  // lines of 128 bytes that a row of K or V takes
constexpr int BLOCK_BYTES = BLOCK * PIECES * 128;
// A box holds all pieces where all are whole. Else each is a box of its own, filled up with zeros on the right.
constexpr int BOXES = HEAD_DIM % 64 ? PIECES : 1;
constexpr int GROUP_BYTES = PIECES / BOXES * 1024;                    // from 8 tokens to the next 8
constexpr int PIECE_BYTES = BOXES > 1 ? BLOCK_BYTES / PIECES : 1024;  // from 64 columns to the next 64
constexpr int K_STEPS = HEAD_DIM / 16;                                // k-steps of Q K^T
constexpr int V_STEPS = BLOCK / 16;                                   // k-steps of P V

// A tile's Q as a warpgroup reads it. `first_row` is the first of a warp's 16 rows.
#if HEAD_DIM <= 128
struct Queries {
    u32 fragments[K_STEPS * 4];

    // Byte offset in shared memory of a chunk of a row.
    static __device__ __forceinline__ int at(int row, int chunk) { return SharedRows<CHUNKS>::at(row, chunk); }

    // Into registers.
    __device__ __forceinline__ void take(shared_address shared, int first_row) {
        const int lane = threadIdx.x & 31;
        const shared_address matrix = shared + at(first_row + (lane & 15), lane >> 4);
#pragma unroll
        for (int step = 0; step < K_STEPS; ++step) {
            u32 loaded[4];
            load_matrix_x4(loaded, SharedRows<CHUNKS>::advance(matrix, step));
#pragma unroll
            for (int i = 0; i < 4; ++i) fragments[step * 4 + i] = loaded[i];
        }
    }

    __device__ __forceinline__ void fragment(u32 (&a)[4], int step) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = fragments[step * 4 + i];
    }

    // S = Q K^T
    __device__ __forceinline__ void multiply(float (&s)[BLOCK / 2], u64 k) const {
#pragma unroll
        for (int step = 0; step < K_STEPS; ++step)
            wgmma<0>(s, fragments[4 * step], fragments[4 * step + 1], fragments[4 * step + 2], fragments[4 * step + 3],
                     k + (step / 4 * PIECE_BYTES + step % 4 * 32) / 16, step > 0);
    }
};
#else
struct Queries {
    static constexpr int QUARTER_BYTES = TILE_ROWS * 128;  // 64 columns of all rows: lines of 128 bytes, swizzled

    shared_address rows;  // of the warpgroup's 64 rows
    int warp_row;         // the first of the warp's 16 among them

    static __device__ __forceinline__ int at(int row, int chunk) {
        return chunk / 8 * QUARTER_BYTES + row * 128 + (chunk % 8 ^ row % 8) * 16;
    }

    __device__ __forceinline__ void take(shared_address shared, int first_row) {
        warp_row = first_row % 64;
        rows = shared + (first_row - warp_row) * 128;
        fence_shared_for_async();
    }

    __device__ __forceinline__ void fragment(u32 (&a)[4], int step) const {
        const int lane = threadIdx.x & 31;
        load_matrix_x4(a, rows + at(warp_row + (lane & 15), step * 2 + (lane >> 4)));
    }

    __device__ __forceinline__ void multiply(float (&s)[BLOCK / 2], u64 k) const {
        const shared_address q = opaque(rows);
#pragma unroll
        for (int step = 0; step < K_STEPS; ++step)
            wgmma_shared(s, matrix_descriptor(q + step / 4 * QUARTER_BYTES + step % 4 * 32, 0, 1024),
                         k + (step / 4 * PIECE_BYTES + step % 4 * 32) / 16, step > 0);
    }
};
#endif

// O += P V, or O = P V
__device__ __forceinline__ void multiply_p_v(float (&o)[HEAD_DIM / 2], const u32 (&weights)[V_STEPS * 4], u64 v,
                                             bool adds) {
#pragma unroll
    for (int step = 0; step < V_STEPS; ++step)
        wgmma<1>(o, weights[4 * step], weights[4 * step + 1], weights[4 * step + 2], weights[4 * step + 3],
                 v + step * 2 * GROUP_BYTES / 16, step > 0 || adds);
}

// Zeros for the tokens from `used` on in a block of V, as far as a box has brought anything. By one warpgroup.
__device__ __forceinline__ void clear_unused_tokens(unsigned char* block, int used, int box_tokens, int thread) {
    const int end = (used + box_tokens - 1) / box_tokens * box_tokens;
    constexpr int CHUNKS_OF_LINES = PIECES * 8;
    for (int i = used * CHUNKS_OF_LINES + thread; i < end * CHUNKS_OF_LINES; i += 128) {
        const int token = i / CHUNKS_OF_LINES, chunk = i % CHUNKS_OF_LINES;  // whole lines, swizzled or not
        *reinterpret_cast<uint4*>(block + token / 8 * GROUP_BYTES + chunk / 8 * PIECE_BYTES + token % 8 * 128 +
                                  chunk % 8 * 16) = uint4{0, 0, 0, 0};
    }
    fence_shared_for_async();
}
