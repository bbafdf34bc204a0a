// append: new keys and values into their slots of the pool.
//
//   k_pool[slots[t]][head] = k[t, head]      v_pool[slots[t]][head] = v[t, head]      slot = page * page_size + offset
//
// in    k, v    [tokens, heads, HEAD_DIM] u16    any (token, head) strides, last axis contiguous, 16-byte aligned;
//                                                of v and its pool V_HEAD_DIM
//       slots   [tokens] i64 or int              -1 skips the token
// out   k_pool, v_pool                           pages of a pool; NHD and HND differ in their strides only
//       status  Status                           a slot outside the pool is skipped and recorded
//
// A thread moves 16 bytes of K and 16 of V. threadIdx.y is a token of the block, threadIdx.x runs over the pieces of
// its heads; blocks step through the tokens. Where two tokens have one slot, each piece comes from either.
#include "convert.cuh"
#include "page_table.cuh"

static_assert(HEAD_DIM % 8 == 0 && V_HEAD_DIM % 8 == 0, "dims must be multiples of 8: rows move in pieces of 16 bytes");
constexpr int K_CHUNKS = HEAD_DIM / 8, V_CHUNKS = V_HEAD_DIM / 8;  // 16-byte pieces of a row
constexpr int CHUNKS = K_CHUNKS > V_CHUNKS ? K_CHUNKS : V_CHUNKS;

struct AppendParams {
    const uint4* k;    // [tokens, heads, K_CHUNKS]
    const uint4* v;    // [tokens, heads, V_CHUNKS]
    uint4* k_pool;     // [num_pages, page_size, heads, K_CHUNKS] in the order of its strides
    uint4* v_pool;     // [num_pages, page_size, heads, V_CHUNKS] in the order of its strides
    const i64* slots;  // [tokens]; int where slots_are_int
    Status* status;    // [1]
    PoolStrides k_pool_strides;
    PoolStrides v_pool_strides;
    FastDivide page_size;
    i64 k_token_stride;  // in units of 16 bytes, like all strides here
    i64 k_head_stride;
    i64 v_token_stride;
    i64 v_head_stride;
    int tokens;
    int heads;
    int num_pages;
    int slots_are_int;
};

extern "C" __global__ void __launch_bounds__(256) append(const __grid_constant__ AppendParams p) {
    const i64 num_slots = i64(p.num_pages) * p.page_size.divisor;
    const i64 step = i64(gridDim.x) * blockDim.y;
    for (i64 token = i64(blockIdx.x) * blockDim.y + threadIdx.y; token < p.tokens; token += step) {
        // 1. The token's page, and its slot in the page.
        const i64 slot = p.slots_are_int ? reinterpret_cast<const int*>(p.slots)[token] : p.slots[token];
        if (slot < 0 || slot >= num_slots) {
            if (slot != -1 && threadIdx.x == 0) record_fault(p.status, FAULT_SLOTS, int(token), slot);
            continue;
        }
        // 32 bits are enough for all but enormous pools.
        const i64 page = slot <= 0x7fffffff ? divide(int(slot), p.page_size) : slot / p.page_size.divisor;
        const i64 offset = slot - page * p.page_size.divisor;

        // 2. Its heads, piece by piece.
        for (int piece = threadIdx.x; piece < p.heads * CHUNKS; piece += blockDim.x) {
            const int head = piece / CHUNKS, chunk = piece % CHUNKS;
            uint4 k, v;
            if (chunk < K_CHUNKS) k = p.k[token * p.k_token_stride + head * p.k_head_stride + chunk];
            if (chunk < V_CHUNKS) v = p.v[token * p.v_token_stride + head * p.v_head_stride + chunk];
            if (chunk < K_CHUNKS) p.k_pool[pool_offset<i64>(page, offset, head, p.k_pool_strides) + chunk] = k;
            if (chunk < V_CHUNKS) p.v_pool[pool_offset<i64>(page, offset, head, p.v_pool_strides) + chunk] = v;
        }
    }
}
