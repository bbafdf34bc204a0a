// Plain memory traffic: the floor that paged attention is measured against, and the L2 flush before every timed call.
//
//   read_memory:  every thread xors the 16-byte vectors it loads; nothing is stored, unless the xor happens to be KEEP.
//                 In order, or piece after piece (a page of K or V) as `pieces` lists them
//   write_memory: every thread stores 16-byte vectors
//   spin:         one thread keeps the stream busy, without touching memory, while the host enqueues what is timed
//
//   name              shape                  dtype    meaning
//   data              [num_vectors]          uint4    the memory, 16-byte aligned
//   num_vectors       scalar                 int64    vectors to read or write
//   vectors_per_block scalar                 int64    vectors of one block, contiguous
//   pieces            [num_vectors / piece_vectors] int32   which piece of data comes when; null: all in order
//   piece_vectors     scalar                 uint32   vectors of a piece
//   sink              [1]                    uint32   keeps the compiler from dropping the loads
//   cycles            scalar                 int64    clock cycles that spin takes
//
// Block b owns vectors [b * vectors_per_block, (b + 1) * vectors_per_block), neighbouring threads on neighbouring vectors, UNROLL loads a thread and pass.

#ifndef UNROLL
#error "compile with -DUNROLL=n, the number of 16-byte loads of one pass of a thread"
#endif

static_assert(UNROLL >= 1 && UNROLL <= 32, "each load of a pass takes four registers");

constexpr unsigned KEEP = 0x9e3779b9u;

__device__ __forceinline__ const uint4* vector_at(const uint4* data, const int* pieces, unsigned piece_vectors,
                                                  long long vector) {
    if (!pieces) return data + vector;
    const unsigned piece = unsigned(vector) / piece_vectors, within = unsigned(vector) - piece * piece_vectors;
    return data + (long long)__ldg(pieces + piece) * piece_vectors + within;
}

extern "C" __global__ void read_memory(const uint4* data, long long num_vectors, long long vectors_per_block,
                                       const int* pieces, unsigned piece_vectors, unsigned* sink) {
    const long long first = (long long)blockIdx.x * vectors_per_block;
    const long long end = min(first + vectors_per_block, num_vectors);
    const long long step = blockDim.x;
    unsigned seen = 0;
    long long vector = first + threadIdx.x;
    for (; vector + (UNROLL - 1) * step < end; vector += UNROLL * step) {
        uint4 loaded[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) loaded[i] = __ldg(vector_at(data, pieces, piece_vectors, vector + i * step));
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) seen ^= loaded[i].x ^ loaded[i].y ^ loaded[i].z ^ loaded[i].w;
    }
    for (; vector < end; vector += step) {
        const uint4 loaded = __ldg(vector_at(data, pieces, piece_vectors, vector));
        seen ^= loaded.x ^ loaded.y ^ loaded.z ^ loaded.w;
    }
    if (seen == KEEP) *sink = seen;
}

extern "C" __global__ void write_memory(uint4* data, long long num_vectors, long long vectors_per_block) {
    const long long first = (long long)blockIdx.x * vectors_per_block;
    const long long end = min(first + vectors_per_block, num_vectors);
    for (long long vector = first + threadIdx.x; vector < end; vector += blockDim.x) {
        data[vector] = make_uint4(0, 0, 0, 0);
    }
}

extern "C" __global__ void spin(long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {
    }
}
