// Twins of the PTX in kernels/load_global.cuh.
#pragma once

typedef u32 shared_address;
enum class Evict;

inline shared_address shared_address_of(const void* pointer) { return simt::shared_offset(pointer); }

inline void copy_async_16(shared_address target, const void* source, bool valid) {
    simt::copy_async(target, valid ? *simt::aligned<uint4>(source) : uint4{0, 0, 0, 0});
}

inline u64 cache_policy(Evict) { return 0; }

template <bool whole_line = false>
inline void copy_async_16(shared_address target, const void* source, bool valid, u64) {
    copy_async_16(target, source, valid);
}

inline void commit_copies() { simt::close_group(); }

template <int pending>
inline void wait_copies() {
    simt::finish_copies(pending);
}

inline void prefetch_to_l2(const int* pointer) {
    (void)*const_cast<const volatile int*>(simt::aligned<int>(pointer));
}

inline float2 load_global_cg(const float2* pointer) { return *simt::aligned<float2>(pointer); }

inline float4 load_global_cg(const float4* pointer) { return *simt::aligned<float4>(pointer); }

template <typename T>
inline T load_global(const T* pointer, u64) {
    return *simt::aligned<const T>(pointer);
}

inline u32 atomic_inc_acq_rel(u32* counter, u32 bound) {
    const u32 before = *counter;
    *counter = before >= bound ? 0 : before + 1;
    return before;
}
