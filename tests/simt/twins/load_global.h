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

// Word by word, as another rank's thread may be writing.
template <typename T>
inline T load_system(const T* pointer) {
    T x;
    const volatile u32* const from = reinterpret_cast<const volatile u32*>(simt::aligned<T>(pointer));
    if constexpr (sizeof(T) == 8) return *reinterpret_cast<const volatile T*>(from);
    for (unsigned i = 0; i < sizeof(T) / 4; ++i) reinterpret_cast<u32*>(&x)[i] = from[i];
    return x;
}

template <typename T>
inline void store_system(T* pointer, T x) {
    volatile u32* const to = reinterpret_cast<volatile u32*>(simt::aligned<T>(pointer));
    if constexpr (sizeof(T) == 8) *reinterpret_cast<volatile T*>(to) = x;
    else for (unsigned i = 0; i < sizeof(T) / 4; ++i) to[i] = reinterpret_cast<const u32*>(&x)[i];
}

// Who asks waits for something: another rank's thread may run meanwhile.
inline u64 nanoseconds() {
    sched_yield();
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return u64(now.tv_sec) * 1000000000u + u64(now.tv_nsec);
}
