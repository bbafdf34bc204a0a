// load_global: how kernels read global memory past L1, fetch it ahead, tell L2 what to keep of it, copy it to shared
// memory, count arrivals, and share it with other cards and processes.
//
// A shared_address is the 32-bit address inside the block's shared memory that PTX takes (in the tests on a CPU: the
// byte offset into shared_memory). Numbers can be added to and XORed with both.
#pragma once
#include "convert.cuh"

typedef u32 shared_address;

// When L2 gives a line away: before all others, for data that is read once and must not push out what is used again; or
// as the line came.
enum class Evict { FIRST, UNCHANGED };

#ifdef __CUDACC__  // twins: tests/simt/twins/load_global.h

__device__ __forceinline__ shared_address shared_address_of(const void* pointer) {
    shared_address address;
    asm("{ .reg .u64 wide; cvta.to.shared.u64 wide, %1; cvt.u32.u64 %0, wide; }" : "=r"(address) : "l"(pointer));
    return address;
}

// 16 bytes from source to shared memory, both aligned to 16, visible after wait_copies and a barrier (within one warp:
// __syncwarp). Not valid: 16 bytes of zeros, and source, which must still be a pointer into the array, is not read.
__device__ __forceinline__ void copy_async_16(shared_address target, const void* source, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}

// Evict as copies and loads take it.
__device__ __forceinline__ u64 cache_policy(Evict evict) {
    u64 policy;
    if (evict == Evict::FIRST)
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    else
        asm("createpolicy.fractional.L2::evict_unchanged.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// `whole_line`: L2 fetches all 128 bytes of the line.
template <bool whole_line = false>
__device__ __forceinline__ void copy_async_16(shared_address target, const void* source, bool valid, u64 policy) {
    const int bytes = valid ? 16 : 0;
    if constexpr (whole_line)
        asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(target),
                     "l"(source), "r"(bytes), "l"(policy)
                     : "memory");
    else
        asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(target), "l"(source),
                     "r"(bytes), "l"(policy)
                     : "memory");
}

// Closes the thread's current group of copies; an empty group is allowed and keeps the count even.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of the thread's last groups are under way.
template <int pending>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Asks for the line of 128 bytes around *pointer, an element of an array, to be in L2 when it is read.
__device__ __forceinline__ void prefetch_to_l2(const int* pointer) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}

// Loads that skip L1, for what other blocks of the same launch have written.
__device__ __forceinline__ float2 load_global_cg(const float2* pointer) {
    float2 x;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(pointer) : "memory");
    return x;
}

__device__ __forceinline__ float4 load_global_cg(const float4* pointer) {
    float4 x;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(pointer)
                 : "memory");
    return x;
}

// Loads of up to 16 bytes past L1, under a cache policy. Those of less than 16 bytes are plain ones: only odd shapes
// have them.
template <typename T>
__device__ __forceinline__ T load_global(const T* pointer, u64 policy) {
    if constexpr (sizeof(T) == 16) {
        uint4 x;
        asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                     : "l"(pointer), "l"(policy)
                     : "memory");
        return reinterpret_cast<const T&>(x);
    } else {
        return *pointer;
    }
}

// Returns the counter and sets it to the next of 0, 1, ..., bound, 0, ...: the block that gets `bound` arrives last,
// and the counter is ready for the next launch. A block that comes later sees all that the thread wrote before.
__device__ __forceinline__ u32 atomic_inc_acq_rel(u32* counter, u32 bound) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(bound) : "memory");
    return before;
}

// Loads and stores of 4, 8 or 16 bytes that other cards and processes take part in, in no order with others. Of 16 bytes
// each 32-bit word is one access: a reader may find some of them written and others not yet.
template <typename T>
__device__ __forceinline__ T load_system(const T* pointer) {
    T x;
    if constexpr (sizeof(T) == 16)
        asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                     : "l"(pointer)
                     : "memory");
    else if constexpr (sizeof(T) == 8)
        asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(x) : "l"(pointer) : "memory");
    else
        asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(x) : "l"(pointer) : "memory");
    return x;
}

template <typename T>
__device__ __forceinline__ void store_system(T* pointer, T x) {
    if constexpr (sizeof(T) == 16)
        asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(x.x), "r"(x.y),
                     "r"(x.z), "r"(x.w)
                     : "memory");
    else if constexpr (sizeof(T) == 8)
        asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(pointer), "l"(x) : "memory");
    else
        asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(pointer), "r"(x) : "memory");
}

// A clock that all SMs have in common. It moves in steps of up to a microsecond.
__device__ __forceinline__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

#endif  // __CUDACC__

// The warp copies 32 rows of CHUNKS times 16 bytes: lane i knows where row i begins, in units of 16 bytes, or NOWHERE,
// which gives zeros. target_of(row, chunk) is the address that a chunk goes to. Four lanes share a row, 64 bytes at a
// time: one shuffle tells them where it begins, and each lane stays within one line of a swizzle pattern, so that all
// its targets are a constant apart.
constexpr u32 NOWHERE = ~0u;
template <int CHUNKS, typename TargetOf>
__device__ __forceinline__ void copy_32_rows(const u16* base, u32 begin, TargetOf target_of) {
    const int lane = threadIdx.x & 31, first_row = lane / 4, first_chunk = lane % 4;
    u32 from[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) from[i] = __shfl_sync(~0u, begin, i * 8 + first_row);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u16* const source = base + (from[i] == NOWHERE ? 0 : u64(from[i]) + first_chunk) * 8;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk += 4)
            if (chunk + first_chunk < CHUNKS)
                copy_async_16(target_of(i * 8 + first_row, chunk + first_chunk), source + chunk * 8,
                              from[i] != NOWHERE);
    }
}
