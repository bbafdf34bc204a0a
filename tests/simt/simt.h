// simt: runs a CUDA kernel on a CPU, to test its arithmetic without a GPU. Force-included in front of a kernel's text,
// with a twin in plain C++ of every function that a kernel writes in PTX (twins/).
//
// Every CUDA thread is a fiber with its own stack; the blocks run one after the other. A thread runs until it reaches a
// collective (barrier, shuffle, ...), where it waits in a Meeting until all the threads that the collective names have
// come. If nobody can run on, a collective was reached by only a part of them: launch() reports who waits where. Two
// collectives that meet under one mask are an error at once. Races, missing fences and speed are not seen, but
// launch(..., reversed) runs the threads in the opposite order, shared memory holds 0xff (NaN) when a block starts, and
// of asynchronous copies one half is done at once, the other as late as the waits of its threads allow.
#pragma once
#include <sched.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint3 { unsigned x, y, z; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static uint3 threadIdx, blockIdx, blockDim, gridDim;
unsigned char shared_memory[232448] __align__(1024);

namespace simt {

constexpr unsigned max_threads = 1024, max_warps = max_threads / 32, stack_bytes = 128 << 10, value_bytes = 64;

// One collective of a warp: who has come and what they brought, kept until every lane has read it.
struct Meeting {
    const char* what;
    unsigned mask, arrived, readers;
    alignas(64) unsigned char values[32 * value_bytes];
};

struct Warp {
    uint64_t used, open;    // bits of meetings
    Meeting meetings[64];  // a lane holds at most one that it may still read and one that it waits in
};

struct Barrier {
    const char* what;
    unsigned expected, arrived, num_waiting;
    int sum, result;
    unsigned waiting[max_threads];
};

// An asynchronous copy that is still to be done.
struct Copy {
    unsigned target, group;
    uint4 value;
};

struct Fiber {
    jmp_buf context;
    ucontext_t entry;
    bool entered;
    uint3 index;
    const char* waits_in;  // null: can run
    Meeting* meeting;
    std::vector<Copy> copies;
    unsigned num_groups;  // of copies, that are closed
};

static Fiber fibers[max_threads + 1];  // the last one is launch() itself
static Warp warps[max_warps];
static Barrier barriers[16];
static unsigned ready[max_threads], ready_begin, num_ready, current, num_threads, num_returned, shared_bytes;
static bool reverse;
static unsigned num_polls;  // of threads that wait for shared memory to change, since it last did
static void (*body)(const void*);
static const void* body_params;
static jmp_buf home;
static char message[1024];

inline unsigned lane() { return current % 32; }

// Gives up the whole launch.
template <typename... Args>
[[noreturn]] inline void fail(const char* format, Args... args) {
    const uint3 thread = fibers[current].index;
    const int length = snprintf(message, sizeof message, "block (%u, %u, %u) thread (%u, %u, %u): ", blockIdx.x,
                                blockIdx.y, blockIdx.z, thread.x, thread.y, thread.z);
    snprintf(message + length, sizeof message - length, format, args...);
    _longjmp(home, 1);
}

// Nobody can run: says what the first thread that waits is missing.
[[noreturn]] inline void fail_stuck() {
    unsigned num_waiting = 0;
    for (unsigned i = num_threads; i-- > 0;)
        if (fibers[i].waits_in) current = i, ++num_waiting;
    const Meeting* meeting = fibers[current].meeting;
    const unsigned missing = meeting ? meeting->mask & ~meeting->arrived : 0;
    char lanes[48] = "";
    if (missing) snprintf(lanes, sizeof lanes, " for lanes 0x%x", missing);
    fail("deadlock: it waits in %s%s; %u of %u threads wait and %u have returned", fibers[current].waits_in, lanes,
         num_waiting, num_threads, num_returned);
}

inline void make_ready(unsigned thread) {
    fibers[thread].waits_in = nullptr;
    ready[(ready_begin + num_ready++) % max_threads] = thread;
}

// Runs whoever is next; comes back when it is this thread's turn again.
__attribute__((noinline, unused)) static void switch_away() {
    if (_setjmp(fibers[current].context)) return;
    if (num_returned == num_threads) _longjmp(home, 2);
    if (num_ready == 0) fail_stuck();
    current = ready[ready_begin];
    ready_begin = (ready_begin + 1) % max_threads, --num_ready;
    threadIdx = fibers[current].index;
    if (fibers[current].entered) _longjmp(fibers[current].context, 1);
    fibers[current].entered = true;
    setcontext(&fibers[current].entry);
}

// Lets the others run, while this thread waits for something in shared memory.
inline void poll(const char* what) {
    if (++num_polls > 1000 * num_threads) {
        fibers[current].waits_in = what;
        fail_stuck();
    }
    make_ready(current);
    fibers[current].waits_in = what;
    switch_away();
    fibers[current].waits_in = nullptr;
}

inline void stop_reading() {
    Meeting*& meeting = fibers[current].meeting;
    if (meeting && --meeting->readers == 0) {
        Warp& warp = warps[current / 32];
        warp.used &= ~(uint64_t(1) << (meeting - warp.meetings));
    }
    meeting = nullptr;
}

// What every lane of the mask brought: values[lane], to be read before this lane's next collective.
template <typename T>
inline const T* gather(const char* what, const T& value, unsigned mask = ~0u) {
    static_assert(sizeof(T) <= value_bytes && std::is_trivially_copyable<T>::value, "a lane brings one small value");
    Warp& warp = warps[current / 32];
    const unsigned in_block = num_threads - current / 32 * 32, own = 1u << lane();
    if (in_block < 32) mask &= (1u << in_block) - 1;
    if (!(mask & own)) fail("%s with mask 0x%x, in which its own lane %u is missing", what, mask, lane());
    stop_reading();
    Meeting* meeting = nullptr;
    for (uint64_t open = warp.open; open; open &= open - 1) {
        Meeting& other = warp.meetings[__builtin_ctzll(open)];
        if (!(other.mask & mask)) continue;
        if (other.mask != mask || (other.what != what && strcmp(other.what, what)))
            fail("%s with mask 0x%x meets %s with mask 0x%x", what, mask, other.what, other.mask);
        meeting = &other;
        break;
    }
    if (!meeting) {
        const unsigned slot = __builtin_ctzll(~warp.used);
        warp.used |= uint64_t(1) << slot, warp.open |= uint64_t(1) << slot;
        meeting = &warp.meetings[slot];
        meeting->what = what, meeting->mask = mask, meeting->arrived = meeting->readers = 0;
    }
    T* values = (T*)meeting->values;
    memcpy(&values[lane()], &value, sizeof(T));
    meeting->arrived |= own, ++meeting->readers;
    fibers[current].meeting = meeting;
    if (meeting->arrived == mask) {
        warp.open &= ~(uint64_t(1) << (meeting - warp.meetings));
        for (unsigned i = 0; i < 32; ++i) {
            const unsigned other = reverse ? 31 - i : i;
            if ((mask & ~own) >> other & 1) make_ready(current / 32 * 32 + other);
        }
    } else {
        fibers[current].waits_in = what;
        switch_away();
    }
    return values;
}

// Waits (if `waits`) until `expected` threads have come to barrier `id`; returns the sum of what they brought.
inline int barrier(const char* what, unsigned id, unsigned expected, int value = 0, bool waits = true) {
    Barrier& here = barriers[id];
    if (here.arrived == 0) here.what = what, here.expected = expected, here.sum = 0, here.num_waiting = 0;
    if (here.expected != expected || strcmp(here.what, what))
        fail("%s of %u threads meets %s of %u threads", what, expected, here.what, here.expected);
    here.sum += value;
    if (++here.arrived == expected) {
        here.arrived = 0, here.result = here.sum;
        for (unsigned i = 0; i < here.num_waiting; ++i)
            make_ready(here.waiting[reverse ? here.num_waiting - 1 - i : i]);
    } else if (waits) {
        here.waiting[here.num_waiting++] = current;
        fibers[current].waits_in = what;
        switch_away();
    }
    return here.result;
}

template <typename T>
inline T* aligned(const void* pointer) {
    if (uintptr_t(pointer) % alignof(T)) fail("address %p is not a multiple of %u", pointer, unsigned(alignof(T)));
    return (T*)pointer;
}

// Shared memory by its 32-bit address, inside what the launch asked for.
template <typename T>
inline T* shared_at(unsigned address) {
    if (address % alignof(T) || address > shared_bytes || shared_bytes - address < sizeof(T))
        fail("%u bytes at shared address %u, of %u bytes", unsigned(sizeof(T)), address, shared_bytes);
    return (T*)(shared_memory + address);
}

inline unsigned shared_offset(const void* pointer) {
    const uintptr_t offset = uintptr_t(pointer) - uintptr_t(shared_memory);
    if (offset > shared_bytes) fail("pointer %p is not into the launch's shared memory", pointer);
    return unsigned(offset);
}

// Copies of every other thread wait for finish_copies, those of the others do not: what is read too early shows, and what
// is overwritten too early.
inline void copy_async(unsigned target, const uint4& value) {
    uint4* const place = shared_at<uint4>(target);
    Fiber& fiber = fibers[current];
    if (current % 2 == reverse)
        *place = value;
    else
        fiber.copies.push_back({target, fiber.num_groups, value});
}

inline void close_group() { ++fibers[current].num_groups; }

// The thread's copies, those of its last `pending` groups left out; open: and those of no group yet.
inline void finish_copies(unsigned pending, bool open = false) {
    Fiber& fiber = fibers[current];
    std::vector<Copy> left;
    for (const Copy& copy : fiber.copies)
        if (open || copy.group + pending < fiber.num_groups)
            *shared_at<uint4>(copy.target) = copy.value;
        else
            left.push_back(copy);
    fiber.copies = left;
}

// A fiber's life: the kernel once a block.
__attribute__((unused)) static void live() {
    for (;;) {
        body(body_params);
        stop_reading();
        ++num_returned;
        switch_away();
    }
}

// 0, or 1 with what went wrong in message.
__attribute__((unused)) static int launch(void (*kernel)(const void*), const void* params, const unsigned* grid,
                                          const unsigned* block, unsigned bytes, int reversed) {
    body = kernel, body_params = params, shared_bytes = bytes, reverse = reversed;
    gridDim = {grid[0], grid[1], grid[2]}, blockDim = {block[0], block[1], block[2]};
    num_threads = block[0] * block[1] * block[2];
    void* stacks = mmap(nullptr, size_t(num_threads) * stack_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (unsigned i = 0; i < num_threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.entered = false;
        fiber.index = {i % block[0], i / block[0] % block[1], i / block[0] / block[1]};
        getcontext(&fiber.entry);
        fiber.entry.uc_stack.ss_sp = (char*)stacks + size_t(i) * stack_bytes;
        fiber.entry.uc_stack.ss_size = stack_bytes;
        makecontext(&fiber.entry, live, 0);
    }
    const uint64_t num_blocks = uint64_t(grid[0]) * grid[1] * grid[2];
    static volatile uint64_t index;
    static volatile int error;
    error = 0;
    for (index = 0; index < num_blocks && !error; index = index + 1) {
        const uint64_t row = index / grid[0];
        blockIdx = {unsigned(index % grid[0]), unsigned(row % grid[1]), unsigned(row / grid[1])};
        memset(shared_memory, 0xff, sizeof shared_memory);
        memset(barriers, 0, sizeof barriers);
        for (Warp& warp : warps) warp.used = warp.open = 0;
        ready_begin = num_ready = num_returned = 0;
        for (unsigned i = 0; i < num_threads; ++i) {
            const unsigned thread = reverse ? num_threads - 1 - i : i;
            fibers[thread].meeting = nullptr;
            fibers[thread].copies.clear();
            fibers[thread].num_groups = 0;
            make_ready(thread);
        }
        const int how = _setjmp(home);
        if (how == 0) {
            current = max_threads;
            switch_away();
        }
        error = how == 1;
        for (unsigned i = bytes; i < sizeof shared_memory && !error; ++i)
            if (shared_memory[i] != 0xff) {
                snprintf(message, sizeof message,
                         "block (%u, %u, %u) wrote to byte %u of its %u bytes of shared memory", blockIdx.x,
                         blockIdx.y, blockIdx.z, i, bytes);
                error = 1;
            }
    }
    munmap(stacks, size_t(num_threads) * stack_bytes);
    return error;
}

template <typename T>
inline T shuffle(const char* what, unsigned mask, T value, unsigned source) {
    const T* values = gather(what, value, mask);
    if (!(mask >> source & 1)) fail("%s with mask 0x%x reads lane %u", what, mask, source);
    return values[source];
}

inline unsigned ballot(const char* what, unsigned mask, bool predicate) {
    const unsigned char own = predicate;
    const unsigned char* values = gather(what, own, mask);
    unsigned bits = 0;
    for (unsigned i = 0; i < 32 && current / 32 * 32 + i < num_threads; ++i)
        if (mask >> i & 1) bits |= unsigned(values[i]) << i;
    return bits;
}

template <typename T>
inline T atomic(T* address, T value) {
    const T before = *address;
    *address = value;
    return before;
}

template <typename To, typename From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

}  // namespace simt

// The part of CUDA's vocabulary that the kernels use.
inline void __syncthreads() { simt::barrier("__syncthreads", 0, simt::num_threads); }
inline int __syncthreads_count(int x) { return simt::barrier("__syncthreads_count", 0, simt::num_threads, x != 0); }
inline int __syncthreads_or(int x) { return simt::barrier("__syncthreads_or", 0, simt::num_threads, x != 0) != 0; }
inline int __syncthreads_and(int x) { return simt::barrier("__syncthreads_and", 0, simt::num_threads, x == 0) == 0; }
inline void __syncwarp(unsigned mask = ~0u) { simt::gather("__syncwarp", 0, mask); }
inline unsigned __ballot_sync(unsigned mask, bool x) { return simt::ballot("__ballot_sync", mask, x); }
inline int __any_sync(unsigned mask, bool x) { return simt::ballot("__any_sync", mask, x) != 0; }
inline int __all_sync(unsigned mask, bool x) { return simt::ballot("__all_sync", mask, !x) == 0; }
template <typename T> inline T __shfl_sync(unsigned mask, T x, int source, int width = 32) {
    return simt::shuffle("__shfl_sync", mask, x, (simt::lane() & -width) | (source & (width - 1)));
}
template <typename T> inline T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32) {
    const int own = simt::lane(), source = own ^ bits;
    return simt::shuffle("__shfl_xor_sync", mask, x, source < (own & -width) + width ? source : own);
}
template <typename T> inline T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32) {
    const int own = simt::lane(), source = own - int(delta);
    return simt::shuffle("__shfl_up_sync", mask, x, source >= (own & -width) ? source : own);
}
template <typename T> inline T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32) {
    const int own = simt::lane(), source = own + int(delta);
    return simt::shuffle("__shfl_down_sync", mask, x, source < (own & -width) + width ? source : own);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T> inline T atomicExch(T* p, std::common_type_t<T> x) { return simt::atomic<T>(p, x); }
template <typename T> inline T atomicAdd(T* p, std::common_type_t<T> x) { return simt::atomic<T>(p, *p + x); }
inline unsigned atomicInc(unsigned* p, unsigned bound) { return simt::atomic(p, *p >= bound ? 0u : *p + 1); }
template <typename T> inline T atomicMax(T* p, std::common_type_t<T> x) { return simt::atomic<T>(p, x > *p ? x : *p); }
template <typename T> inline T atomicMin(T* p, std::common_type_t<T> x) { return simt::atomic<T>(p, x < *p ? x : *p); }
template <typename T> inline T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> x) {
    return simt::atomic<T>(p, *p == expected ? x : *p);
}

template <typename A, typename B> inline std::common_type_t<A, B> min(A a, B b) {
    const std::common_type_t<A, B> x = a, y = b;
    return y < x ? y : x;
}
template <typename A, typename B> inline std::common_type_t<A, B> max(A a, B b) {
    const std::common_type_t<A, B> x = a, y = b;
    return x < y ? y : x;
}
template <typename T> inline T __ldg(const T* p) { return *simt::aligned<T>(p); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
inline int __float_as_int(float x) { return simt::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return simt::bits<unsigned>(x); }
inline float __int_as_float(int x) { return simt::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return simt::bits<float>(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }

#include "twins/convert.h"
#include "twins/load_global.h"
#include "twins/mma.h"
#include "twins/hopper.h"
