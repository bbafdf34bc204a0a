// hopper: what sm_90a has beside the rest of CUDA: copies by the tensor memory accelerator (TMA), barriers that count
// bytes, matrix products of four warps that read shared memory by themselves (wgmma), registers that change hands.
//
// All of it is asynchronous, and each kind of wait is for one thing only:
//   mbarrier        something in shared memory is ready, or may be overwritten
//   wgmma_wait      products are done: their accumulators may be read, their A registers and their B may be overwritten
//   named barrier   threads of one CTA have come to a place
#pragma once
#include "convert.cuh"
#include "load_global.cuh"

// -- mbarriers: 8 bytes in shared memory -------------------------------------------------------------------------------
//
// A barrier goes from phase to phase: it waits for `arrivals` arrivals and for all bytes that were announced, then the
// next phase begins. Phases are numbered 0, 1, 2, ...; barrier_wait(b, n) returns once phase n is over, and may be
// called while phase n or n + 1 runs, no earlier and no later: only the parity of n is looked at. Waiting for phase -1
// of a new barrier returns at once.

#ifndef __CUDACC__
struct HostBarrier {
    unsigned char arrivals, pending, phase, unused;
    int bytes;
    void turn() {
        simt::num_polls = 0;
        if (pending == 0 && bytes == 0) ++phase, pending = arrivals;
    }
};
static int num_boxes_to_bring;  // of TMA, below
static void bring_boxes(shared_address barrier);
#endif

__device__ __forceinline__ void barrier_init(shared_address barrier, u32 arrivals) {
#ifdef __CUDACC__
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#else
    num_boxes_to_bring = 0;  // those of a launch that failed
    *simt::shared_at<HostBarrier>(barrier) = {(unsigned char)arrivals, (unsigned char)arrivals, 0, 0, 0};
#endif
}

// Makes new barriers known to TMA; __syncthreads makes them known to the threads.
__device__ __forceinline__ void barrier_init_done() {
#ifdef __CUDACC__
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(shared_address barrier) {
#ifdef __CUDACC__
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#else
    HostBarrier* here = simt::shared_at<HostBarrier>(barrier);
    --here->pending;
    here->turn();
#endif
}

// Announces bytes that TMA will write, then arrives.
__device__ __forceinline__ void barrier_arrive_expect(shared_address barrier, u32 bytes) {
#ifdef __CUDACC__
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#else
    HostBarrier* here = simt::shared_at<HostBarrier>(barrier);
    here->bytes += bytes;
    --here->pending;
    here->turn();
#endif
}

// Arrives when all copy_async_16 that this thread has issued are done.
__device__ __forceinline__ void barrier_arrive_after_copies(shared_address barrier) {
#ifdef __CUDACC__
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
#else
    simt::finish_copies(0, true);
    barrier_arrive(barrier);
#endif
}

// Whether phase `phase` is over, without waiting for it; the rule of barrier_wait holds. (On the CPU TMA is as late as it
// may be, but has come when every second warp asks.)
__device__ __forceinline__ bool barrier_test(shared_address barrier, u32 phase) {
#ifdef __CUDACC__
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
#else
    static u32 questions;
    if (questions++ / 32 % 2) bring_boxes(barrier);
    return (simt::shared_at<HostBarrier>(barrier)->phase & 1) != (phase & 1);
#endif
}

__device__ __forceinline__ void barrier_wait(shared_address barrier, u32 phase) {
#ifdef __CUDACC__
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra WAIT_%=;\n"
        "}" ::"r"(barrier),
        "r"(phase & 1)
        : "memory");
#else
    bring_boxes(barrier);
    while ((simt::shared_at<HostBarrier>(barrier)->phase & 1) == (phase & 1)) {
        simt::poll("barrier_wait");
        bring_boxes(barrier);
    }
#endif
}

// -- named barriers and registers --------------------------------------------------------------------------------------

// Waits until `threads` threads, whole warps, have come here or passed named_barrier_arrive. Barrier 0 is __syncthreads.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
#ifdef __CUDACC__
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#else
    simt::barrier("named_barrier", barrier, threads);
#endif
}

__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
#ifdef __CUDACC__
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#else
    simt::barrier("named_barrier", barrier, threads, 0, false);
#endif
}

// A warpgroup gives registers back, or waits until it has this many a thread. The sum over the CTA must not exceed what
// it was launched with, else the one that asks for more waits for ever.
template <int count>
__device__ __forceinline__ void shrink_registers() {
#ifdef __CUDACC__
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

template <int count>
__device__ __forceinline__ void grow_registers() {
#ifdef __CUDACC__
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

// -- TMA ---------------------------------------------------------------------------------------------------------------

// A CUtensorMap, made by the host (paged_attn/tensor_map.py).
struct __align__(64) TensorMap {
    u64 words[16];
};

#ifndef __CUDACC__
// What tensor_map.py's stand-in for a CPU puts into the words.
struct HostTensorMap {
    const unsigned char* data;
    u64 strides[4];  // bytes, of the dimensions behind the first
    u64 dims[5];
    u64 box[5];
};

// A box on its way to shared memory, until somebody waits for it.
struct BoxToBring {
    const TensorMap* map;
    shared_address target;
    int first, last;
    shared_address barrier;

    void bring() const {
        const HostTensorMap& from = *reinterpret_cast<const HostTensorMap*>(map->words);
        u32 line = 0;
        for (u64 d = 0; d < from.box[3]; ++d)
            for (u64 c = 0; c < from.box[2]; ++c)
                for (u64 b = 0; b < from.box[1]; ++b, ++line)
                    for (u32 chunk = 0; chunk < 8; ++chunk) {
                        const shared_address to = target + line * 128;
                        const unsigned char* source = from.data + b * from.strides[0] + c * from.strides[1] +
                                                      d * from.strides[2] + last * from.strides[3] + first * 2 + chunk * 16;
                        const bool inside = last >= 0 && u64(last) < from.dims[4] && first + chunk * 8 < from.dims[0];
                        *simt::shared_at<uint4>(to + ((chunk ^ (to >> 7 & 7)) << 4)) =
                            inside ? *simt::aligned<uint4>(source) : uint4{0, 0, 0, 0};
                    }
        HostBarrier* here = simt::shared_at<HostBarrier>(barrier);
        here->bytes -= line * 128;
        here->turn();
    }
};
static BoxToBring boxes_to_bring[256];

static void bring_boxes(shared_address barrier) {
    int left = 0;
    for (int i = 0; i < num_boxes_to_bring; ++i) {
        const BoxToBring box = boxes_to_bring[i];
        if (box.barrier == barrier)
            box.bring();
        else
            boxes_to_bring[left++] = box;
    }
    num_boxes_to_bring = left;
}
#endif

// Copies the box at index `first` of the map's first dimension and `last` of its fifth (0 in the others) to shared
// memory, in the order of the box and swizzled: chunk c of 16 bytes of line r of 128 bytes stands at chunk c ^ (r % 8).
// Completes its bytes on `barrier`. What is outside the tensor is filled with zeros.
__device__ __forceinline__ void copy_box_5d(shared_address target, const TensorMap* map, int first, int last,
                                            shared_address barrier) {
#ifdef __CUDACC__
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %4, %4, %5}], [%2];" ::"r"(target),
        "l"(map), "r"(barrier), "r"(first), "r"(0), "r"(last)
        : "memory");
#else
    if (num_boxes_to_bring == 256) simt::fail("more boxes under way than have room");
    boxes_to_bring[num_boxes_to_bring++] = {map, target, first, last, barrier};
#endif
}

#ifndef __CUDACC__
struct Sent {
    const TensorMap* map;
    shared_address source;
    int second, third;
};
static Sent sent[1024];  // the last one of each thread
#endif

// The other way, a map of four dimensions: a box from shared memory, where it stands as copy_box_5d would have laid it, to
// index `second` of the second dimension and `third` of the third (0 in the others). What would be outside is left out.
__device__ __forceinline__ void send_box_4d(const TensorMap* map, shared_address source, int second, int third) {
#ifdef __CUDACC__
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %2}], [%1];" ::"l"(map),
                 "r"(source), "r"(0), "r"(second), "r"(third)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
    sent[threadIdx.x] = {map, source, second, third};  // as late as wait_sent allows
#endif
}

// Waits until all that this thread has sent may be overwritten in shared memory.
__device__ __forceinline__ void wait_sent() {
#ifdef __CUDACC__
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#else
    const Sent box = sent[threadIdx.x];
    if (!box.map) return;
    sent[threadIdx.x].map = nullptr;
    const HostTensorMap& to = *reinterpret_cast<const HostTensorMap*>(box.map->words);
    u32 line = 0;
    for (u64 c = 0; c < to.box[3]; ++c)
        for (u64 b = 0; b < to.box[2]; ++b)
            for (u64 a = 0; a < to.box[1]; ++a, ++line) {
                const u64 second = box.second + a, third = box.third + b;
                for (u32 chunk = 0; chunk < 8 && second < to.dims[1] && third < to.dims[2]; ++chunk) {
                    const shared_address from = box.source + line * 128;
                    const unsigned char* target =
                        to.data + second * to.strides[0] + third * to.strides[1] + c * to.strides[2] + chunk * 16;
                    *simt::aligned<uint4>(const_cast<unsigned char*>(target)) =
                        *simt::shared_at<uint4>(from + ((chunk ^ (from >> 7 & 7)) << 4));
                }
            }
#endif
}

// The way back of load_matrix_x4 (mma.cuh).
__device__ __forceinline__ void store_matrix_x4(shared_address row, u32 m0, u32 m1, u32 m2, u32 m3) {
#ifdef __CUDACC__
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m0), "r"(m1), "r"(m2),
                 "r"(m3)
                 : "memory");
#else
    uint4* data = simt::shared_at<uint4>(row);
    uint4* const* rows = simt::gather("store_matrix_x4", data);
    const u32 matrix[4] = {m0, m1, m2, m3};
    const int group = simt::lane() / 4, pair = simt::lane() % 4;
    for (int m = 0; m < 4; ++m) (&rows[m * 8 + group]->x)[pair] = matrix[m];
#endif
}

// What this thread wrote to shared memory is seen by TMA and wgmma that it, or whoever it meets next, issues.
__device__ __forceinline__ void fence_shared_for_async() {
#ifdef __CUDACC__
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// -- wgmma -------------------------------------------------------------------------------------------------------------
//
// d[64 x N] += A[64 x 16] B[16 x N], by the four warps of a warpgroup together. A is in registers: warp w has rows 16 w
// .. 16 w + 15, as the A fragment of mma.cuh. d[4 i .. 4 i + 3] is a C fragment (mma.cuh) of columns 8 i .. 8 i + 7. B
// is in shared memory, 128-byte lines swizzled as TMA does it, and a descriptor says where:
//   TRANSPOSED 0   B[k][n] stands at  n / 8 * group_bytes + n % 8 * 128 + 2 k                                 (K: n is a token)
//   TRANSPOSED 1   B[k][n] stands at  k / 8 * group_bytes + k % 8 * 128 + n / 64 * piece_bytes + 2 (n % 64)    (V: k is a token)

// All numbers are multiples of 16 bytes; address without its swizzle, line 0 of 8 at a multiple of 1024.
__device__ __forceinline__ u64 matrix_descriptor(shared_address address, u32 piece_bytes, u32 group_bytes) {
    const u64 swizzle_128_bytes = 1ull << 62;
    return u64((address >> 4) & 0x3fff) | u64(piece_bytes >> 4) << 16 | u64(group_bytes >> 4) << 32 | swizzle_128_bytes;
}

// Before a burst of products: registers that they read or write are as the program has them.
__device__ __forceinline__ void wgmma_fence() {
#ifdef __CUDACC__
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Ends a burst.
__device__ __forceinline__ void wgmma_commit() {
#ifdef __CUDACC__
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most `pending` of the last bursts are under way.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
#ifdef __CUDACC__
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#endif
}

// Accumulators are touched neither earlier nor later than here: the compiler does not know that products are under way.
template <int count>
__device__ __forceinline__ void hold(float (&d)[count]) {
#ifdef __CUDACC__
#pragma unroll
    for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// A value of which the compiler does not know that it was the same before: what is made of it is made again, which costs
// less than registers that keep it.
__device__ __forceinline__ u32 opaque(u32 value) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(value));
#endif
    return value;
}

// What stands behind it stays there: the assembler moves instructions as it likes, but does not bring sums forward over a
// loop. This one ends at once.
__device__ __forceinline__ void schedule_fence(int not_negative) {
#ifdef __CUDACC__
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
#endif
}

#define WGMMA_8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
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

#ifndef __CUDACC__
template <int TRANSPOSED, int count>
void wgmma_on_host(float (&d)[count], u32 a0, u32 a1, u32 a2, u32 a3, u64 descriptor, bool accumulate) {
    const uint4* const lanes = simt::gather("wgmma", uint4{a0, a1, a2, a3});
    const u32 address = u32(descriptor & 0x3fff) << 4, piece = u32(descriptor >> 16 & 0x3fff) << 4;
    const u32 group = u32(descriptor >> 32 & 0x3fff) << 4;
    for (int i = 0; i < count; ++i) {
        const int lane = simt::lane(), n = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = accumulate ? d[i] : 0.f;
        for (int k = 0; k < 16; ++k) {
            const u32 pair = (&lanes[lane / 4 * 4 + k % 8 / 2].x)[i % 4 / 2 + k / 8 * 2];
            const u32 at = TRANSPOSED ? address + k / 8 * group + k % 8 * 128 + n / 64 * piece + n % 64 * 2
                                      : address + n / 8 * group + n % 8 * 128 + k * 2;
            sum += to_float(u16(k % 2 ? pair >> 16 : pair)) * to_float(*simt::shared_at<u16>(at ^ (at >> 7 & 7) << 4));
        }
        d[i] = sum;
    }
}
#endif

// Not accumulate: d = A B. One function for each N; the operands of the instruction are numbered, so N tells a0 .. a3,
// the descriptor and so on from each other.
#ifdef __CUDACC__
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
#else
template <int TRANSPOSED, int count>
void wgmma(float (&d)[count], u32 a0, u32 a1, u32 a2, u32 a3, u64 descriptor, bool accumulate) {
    wgmma_on_host<TRANSPOSED>(d, a0, a1, a2, a3, descriptor, accumulate);
}
#endif

// The same with A in shared memory too, row r of its 64 at  r / 8 * group_bytes + r % 8 * 128 + 2 k. N = 64, not transposed.
__device__ __forceinline__ void wgmma_shared(float (&d)[32], u64 a, u64 descriptor, bool accumulate) {
#ifdef __CUDACC__
    asm volatile("{ .reg .pred accumulate; setp.ne.b32 accumulate, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16" WGMMA_TYPES
                 "{" WGMMA_REGISTERS_32 "}, %32, %33, accumulate, 1, 1, 0, 0; }"
                 : WGMMA_32(d)
                 : "l"(a), "l"(descriptor), "r"(int(accumulate)));
#else
    u32 fragment[4];
    const u32 address = u32(a & 0x3fff) << 4, group = u32(a >> 32 & 0x3fff) << 4;
    for (int i = 0; i < 4; ++i) {
        const int row = threadIdx.x / 32 % 4 * 16 + simt::lane() / 4 + i % 2 * 8, k = simt::lane() % 4 * 2 + i / 2 * 8;
        const u32 at = address + row / 8 * group + row % 8 * 128 + k * 2;
        fragment[i] = *simt::shared_at<u32>(at ^ (at >> 7 & 7) << 4);
    }
    wgmma_on_host<0>(d, fragment[0], fragment[1], fragment[2], fragment[3], descriptor, accumulate);
#endif
}
