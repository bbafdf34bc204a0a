// hopper: what sm_90a has beside the rest of CUDA: copies by the tensor memory accelerator (TMA), barriers that count
// bytes, matrix products of four warps that read shared memory by themselves (wgmma), registers that change hands.
//
// All of it is asynchronous, and each kind of wait is for one thing only:
//   mbarrier        something in shared memory is ready, or may be overwritten
//   wgmma_wait      products are done: their accumulators may be read, their A registers and their B may be overwritten
//   named barrier   threads of one CTA have reached the same point
//
// PTX ISA, "Asynchronous warpgroup level matrix instructions" and "Tensors", describes the instructions.
#pragma once
#include "convert.cuh"
#include "load_global.cuh"

// A CUtensorMap, made by the host (paged_attn/tensor_map.py).
struct __align__(64) TensorMap {
    u64 words[16];
};

// Where wgmma (below) finds a matrix in shared memory. All numbers are multiples of 16 bytes; address without its
// swizzle, line 0 of 8 at a multiple of 1024.
__device__ __forceinline__ u64 matrix_descriptor(shared_address address, u32 piece_bytes, u32 group_bytes) {
    const u64 swizzle_128_bytes = 1ull << 62;
    return u64((address >> 4) & 0x3fff) | u64(piece_bytes >> 4) << 16 | u64(group_bytes >> 4) << 32 | swizzle_128_bytes;
}

#ifdef __CUDACC__  // twins: tests/simt/twins/hopper.h

// -- mbarriers: 8 bytes in shared memory ------------------------------------------------------------------------------
//
// A barrier goes from phase to phase: it waits for `arrivals` arrivals and for all bytes that were announced, then the
// next phase begins. Phases are numbered 0, 1, 2, ...; barrier_wait(b, n) returns once phase n is over, and may be
// called while phase n or n + 1 runs, no earlier and no later: the hardware compares only the parity of n. Waiting for
// phase -1 of a new barrier returns at once.

__device__ __forceinline__ void barrier_init(shared_address barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes new barriers known to TMA; __syncthreads makes them known to the threads.
__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(shared_address barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Announces bytes that TMA will write, then arrives.
__device__ __forceinline__ void barrier_arrive_expect(shared_address barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives when all copy_async_16 that this thread has issued are done.
__device__ __forceinline__ void barrier_arrive_after_copies(shared_address barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Whether phase `phase` is over, without waiting for it; the rule of barrier_wait holds.
__device__ __forceinline__ bool barrier_test(shared_address barrier, u32 phase) {
    u32 over;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(over)
        : "r"(barrier), "r"(phase & 1)
        : "memory");
    return over;
}

__device__ __forceinline__ void barrier_wait(shared_address barrier, u32 phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra WAIT_%=;\n"
        "}" ::"r"(barrier),
        "r"(phase & 1)
        : "memory");
}

// -- named barriers and registers -------------------------------------------------------------------------------------

// Waits until `threads` threads, in whole warps, are here or have passed named_barrier_arrive. Barrier 0 is that of
// __syncthreads.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// A warpgroup gives registers back, or waits until it has `count` a thread. The sum over the CTA must not exceed what
// it is launched with, else the warpgroup that asks for more waits for ever.
template <int count>
__device__ __forceinline__ void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
__device__ __forceinline__ void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// -- TMA --------------------------------------------------------------------------------------------------------------

// Copies the box at index `first` of the map's first dimension and `last` of its fifth (0 in the others) to shared
// memory, in the order of the box and swizzled: chunk c of 16 bytes of line r of 128 bytes is stored at chunk
// c ^ (r % 8). Completes its bytes on `barrier`. What is outside the tensor is filled with zeros.
__device__ __forceinline__ void copy_box_5d(shared_address target, const TensorMap* map, int first, int last,
                                            shared_address barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %4, %4, %5}], [%2];" ::"r"(target),
        "l"(map), "r"(barrier), "r"(first), "r"(0), "r"(last)
        : "memory");
}

// The other way, with a map of four dimensions: a box in shared memory, stored as copy_box_5d stores it, goes to index
// `second` of the second dimension and `third` of the third (0 in the others). What is outside the tensor is left out.
__device__ __forceinline__ void send_box_4d(const TensorMap* map, shared_address source, int second, int third) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %2}], [%1];" ::"l"(map),
                 "r"(source), "r"(0), "r"(second), "r"(third)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until shared memory that this thread has sent may be overwritten.
__device__ __forceinline__ void wait_sent() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// The inverse of load_matrix_x4 (mma.cuh).
__device__ __forceinline__ void store_matrix_x4(shared_address row, u32 m0, u32 m1, u32 m2, u32 m3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m0), "r"(m1),
                 "r"(m2), "r"(m3)
                 : "memory");
}

// Makes this thread's writes to shared memory visible to TMA and wgmma that it issues, or that a thread issues after a
// barrier with it.
__device__ __forceinline__ void fence_shared_for_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// -- wgmma ------------------------------------------------------------------------------------------------------------
//
// d[64 x N] += A[64 x 16] B[16 x N], by the four warps of a warpgroup together. A is in registers: warp w has rows 16 w
// .. 16 w + 15, as the A fragment of mma.cuh. d[4 i .. 4 i + 3] is a C fragment (mma.cuh) of columns 8 i .. 8 i + 7. B
// is in shared memory, in 128-byte lines swizzled as TMA does it; a descriptor says where. Byte offset of B[k][n]:
//   TRANSPOSED 0   n / 8 * group_bytes + n % 8 * 128 + 2 k                                  (K: n is a token)
//   TRANSPOSED 1   k / 8 * group_bytes + k % 8 * 128 + n / 64 * piece_bytes + 2 (n % 64)    (V: k is a token)

// Begins a burst of products: they read registers as the program has them here.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a burst.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `pending` of the last bursts are under way.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler, which does not know that products are under way, from moving accesses of d over this point.
template <int count>
__device__ __forceinline__ void hold(float (&d)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Hides a value from the optimiser, so that values derived from it are computed again, not kept in registers.
__device__ __forceinline__ u32 opaque(u32 value) {
    asm volatile("" : "+r"(value));
    return value;
}

// Keeps the assembler from moving sums up over this point: it moves instructions freely, but not over a loop. This loop
// ends at once.
__device__ __forceinline__ void schedule_fence(int not_negative) {
    asm volatile(
        "{\n"
        ".reg .pred passes;\n"
        "LOOP_%=:\n"
        "setp.ge.s32 passes, %0, 0;\n"
        "@passes bra DONE_%=;\n"
        "nanosleep.u32 1;\n"
        "bra LOOP_%=;\n"
        "DONE_%=:\n"
        "}" ::"r"(not_negative)
        : "memory");
}

#define WGMMA_8(d, i)                                                                            \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_32(d) WGMMA_8(d, 0), WGMMA_8(d, 8), WGMMA_8(d, 16), WGMMA_8(d, 24)
#define WGMMA_REGISTERS_32                                                                          \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_REGISTERS_40 WGMMA_REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_REGISTERS_48 WGMMA_REGISTERS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_REGISTERS_56 WGMMA_REGISTERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_REGISTERS_64 WGMMA_REGISTERS_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_REGISTERS_128                                                                                \
    WGMMA_REGISTERS_64                                                                                     \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
    "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "     \
    "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, " \
    "%120, %121, %122, %123, %124, %125, %126, %127"
#if BFLOAT16
#define WGMMA_TYPES ".f32.bf16.bf16 "
#else
#define WGMMA_TYPES ".f32.f16.f16 "
#endif

// Not accumulate: d = A B. One function for each N: the operands of the instruction are numbered, and N decides the
// numbers of a0 .. a3, the descriptor and so on.
#define WGMMA(N, registers, outputs, a, descriptor_number, accumulate_number, transposed_number)                      \
    template <int TRANSPOSED>                                                                                         \
    __device__ __forceinline__ void wgmma(float (&d)[N / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 descriptor,          \
                                          bool accumulate) {                                                          \
        asm volatile("{ .reg .pred accumulate; setp.ne.b32 accumulate, %" #accumulate_number ", 0; "                  \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16" WGMMA_TYPES "{" registers "}, {" a "}, "            \
                     "%" #descriptor_number ", accumulate, 1, 1, %" #transposed_number "; }"                          \
                     : outputs                                                                                        \
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(descriptor), "r"(int(accumulate)), "n"(TRANSPOSED));   \
    }
#define WGMMA_OUTPUTS_80 WGMMA_32(d), WGMMA_8(d, 32)
#define WGMMA_OUTPUTS_96 WGMMA_OUTPUTS_80, WGMMA_8(d, 40)
#define WGMMA_OUTPUTS_112 WGMMA_OUTPUTS_96, WGMMA_8(d, 48)
#define WGMMA_OUTPUTS_128 WGMMA_OUTPUTS_112, WGMMA_8(d, 56)
WGMMA(64, WGMMA_REGISTERS_32, WGMMA_32(d), "%32, %33, %34, %35", 36, 37, 38)
WGMMA(80, WGMMA_REGISTERS_40, WGMMA_OUTPUTS_80, "%40, %41, %42, %43", 44, 45, 46)
WGMMA(96, WGMMA_REGISTERS_48, WGMMA_OUTPUTS_96, "%48, %49, %50, %51", 52, 53, 54)
WGMMA(112, WGMMA_REGISTERS_56, WGMMA_OUTPUTS_112, "%56, %57, %58, %59", 60, 61, 62)
WGMMA(128, WGMMA_REGISTERS_64, WGMMA_OUTPUTS_128, "%64, %65, %66, %67", 68, 69, 70)
#define WGMMA_OUTPUTS_256 \
    WGMMA_OUTPUTS_128, WGMMA_8(d, 64), WGMMA_8(d, 72), WGMMA_8(d, 80), WGMMA_8(d, 88), WGMMA_8(d, 96), \
        WGMMA_8(d, 104), WGMMA_8(d, 112), WGMMA_8(d, 120)
WGMMA(256, WGMMA_REGISTERS_128, WGMMA_OUTPUTS_256, "%128, %129, %130, %131", 132, 133, 134)

// The same with A in shared memory, too: A[r][k] at byte r / 8 * group_bytes + r % 8 * 128 + 2 k. N = 64, not
// transposed.
__device__ __forceinline__ void wgmma_shared(float (&d)[32], u64 a, u64 descriptor, bool accumulate) {
    asm volatile("{ .reg .pred accumulate; setp.ne.b32 accumulate, %34, 0; "
                 "wgmma.mma_async.sync.aligned.m64n64k16" WGMMA_TYPES "{" WGMMA_REGISTERS_32 "}, %32, %33, "
                 "accumulate, 1, 1, 0, 0; }"
                 : WGMMA_32(d)
                 : "l"(a), "l"(descriptor), "r"(int(accumulate)));
}

#endif  // __CUDACC__
