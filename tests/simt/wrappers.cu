// Every wrapper of convert.cuh, load_global.cuh and mma.cuh once, with what it gives written out: run by the shim and
// compared with NumPy (test_simt_shim.py), run on a GPU and compared with the shim (gpu/test_wrappers.py). mma.cuh
// stands in front of this text.
//
//   warp_wrappers     one warp:  C = A B with copy_async_16 -> load_matrix -> mma
//   number_wrappers   grid of 256 threads a block, thread i has number i
struct WarpParams {
    const u16* a;       // [16, 16], rows from valid_rows on are read as zeros
    const u16* b;       // [16, 8]
    u32* fragment;      // [32, 4]  A as load_matrix_x4 gives it
    u32* transposed;    // [32, 4]  B, twice, as load_matrix_x4_transposed gives it
    u32* turned;        // [32]     transpose_8x8 of A's upper left matrix
    float* c;           // [16, 8]
    u32* counter;       // [1]      bound 4
    u32* tickets;       // [32]     what atomic_inc_acq_rel gave each lane
    const float4* sums; // [1]
    float* loaded;      // [6]      sums by load_global_cg of float4, float2
    float* moved;       // [6]      sums by load_global of float4, float2
    uint4* places;      // [3]      to be written by store_system of 16, 8 and 4 bytes
    u32* shared;        // [8]      what load_system finds there, and whether time goes on
    int valid_rows;
};

struct NumberParams {
    const u16* bits;    // [count]
    const float* x;     // [count]
    float* widened;     // [count]  to_float(bits)
    u16* narrowed;      // [count]  from_float(x)
    u32* packed;        // [count]  pack2(x, -x)
    float* exp2;        // [count]
    float* log2;        // [count]
    float* tanh;        // [count]
    int count;
};

extern __shared__ __align__(1024) unsigned char shared_memory[];

extern "C" __global__ void warp_wrappers(const __grid_constant__ WarpParams p) {
    const int lane = threadIdx.x;
    const shared_address a = shared_address_of(shared_memory), b = a + 16 * 32;

    copy_async_16(a + lane * 16, p.a + lane * 8, lane / 2 < p.valid_rows);
    if (lane < 16) copy_async_16(b + lane * 16, p.b + lane * 8, true, cache_policy(Evict::FIRST));
    commit_copies();
    wait_copies<0>();
    __syncwarp();

    u32 fragment[4], transposed[4];
    load_matrix_x4(fragment, a + (lane % 16) * 32 + lane / 16 * 16);
    load_matrix_x4_transposed(transposed, b + (lane % 16) * 16);
    for (int i = 0; i < 4; ++i) {
        p.fragment[lane * 4 + i] = fragment[i];
        p.transposed[lane * 4 + i] = transposed[i];
    }
    p.turned[lane] = transpose_8x8(fragment[0]);

    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    mma_m16n8k16(c, fragment, transposed[0], transposed[1]);
    for (int i = 0; i < 4; ++i) p.c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];

    p.tickets[lane] = atomic_inc_acq_rel(p.counter, 4);
    if (lane == 0) {
        const float4 four = load_global_cg(p.sums);
        const float2 two = load_global_cg((const float2*)p.sums);
        const float loaded[6] = {four.x, four.y, four.z, four.w, two.x, two.y};
        for (int i = 0; i < 6; ++i) p.loaded[i] = loaded[i];
        const u64 first = cache_policy(Evict::FIRST);
        *(float4*)p.moved = load_global(p.sums, first);
        *((float2*)p.moved + 2) = load_global((const float2*)p.sums, first);

        const u64 begin = nanoseconds();
        store_system(p.places, uint4{1, 2, 3, 4});
        store_system((u64*)(p.places + 1), u64(5) << 32 | 6);
        store_system((u32*)(p.places + 2), 7u);
        const uint4 words = load_system(p.places);
        const u64 wide = load_system((const u64*)(p.places + 1));
        const u32 word = load_system((const u32*)(p.places + 2));
        const u32 shared[8] = {words.x, words.y, words.z, words.w, u32(wide >> 32), u32(wide), word,
                               begin > 0 && nanoseconds() >= begin};
        for (int i = 0; i < 8; ++i) p.shared[i] = shared[i];
    }
}

extern "C" __global__ void number_wrappers(const __grid_constant__ NumberParams p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    p.widened[i] = to_float(p.bits[i]);
    p.narrowed[i] = from_float(p.x[i]);
    p.packed[i] = pack2(p.x[i], __int_as_float(__float_as_int(p.x[i]) ^ 0x80000000));  // minus would flush subnormals
    p.exp2[i] = exp2_fast(p.x[i]);
    p.log2[i] = log2_fast(p.x[i]);
    p.tanh[i] = tanh_fast(p.x[i]);
}
