// Twins of the PTX in kernels/hopper.cuh.
//
// TMA is as late as it may be: a box comes when a thread waits for it, or when every second warp asks. With
// -DLATE_BOXES=1 boxes come one at a time, in any order, while threads wait.
#pragma once

#ifndef LATE_BOXES
#define LATE_BOXES 0
#endif

struct TensorMap;

// What the words of a TensorMap hold in the tests.
struct HostTensorMap {
    const unsigned char* data;
    u64 strides[4];  // bytes, of the dimensions behind the first
    u64 dims[5];
    u64 box[5];
};

inline const HostTensorMap& on_host(const TensorMap* map) { return *reinterpret_cast<const HostTensorMap*>(map); }

struct HostBarrier {
    unsigned char arrivals, pending, phase, unused;
    int bytes;
    void turn() {
        simt::num_polls = 0;
        if (pending == 0 && bytes == 0) ++phase, pending = arrivals;
    }
};

// A box on its way to shared memory.
struct Box {
    const TensorMap* map;
    shared_address target;
    int first, last;
    shared_address barrier;

    void bring() const {
        const HostTensorMap& from = on_host(map);
        u32 line = 0;
        for (u64 d = 0; d < from.box[3]; ++d)
            for (u64 c = 0; c < from.box[2]; ++c)
                for (u64 b = 0; b < from.box[1]; ++b, ++line)
                    for (u32 chunk = 0; chunk < 8; ++chunk) {
                        const shared_address to = target + line * 128;
                        const unsigned char* source = from.data + b * from.strides[0] + c * from.strides[1] +
                                                      d * from.strides[2] + last * from.strides[3] + first * 2 +
                                                      chunk * 16;
                        const bool inside = last >= 0 && u64(last) < from.dims[4] && first + chunk * 8 < from.dims[0];
                        *simt::shared_at<uint4>(to + ((chunk ^ (to >> 7 & 7)) << 4)) =
                            inside ? *simt::aligned<uint4>(source) : uint4{0, 0, 0, 0};
                    }
        HostBarrier* here = simt::shared_at<HostBarrier>(barrier);
        here->bytes -= line * 128;
        here->turn();
    }
};

static Box boxes[256];
static int num_boxes;

// Those that the barrier waits for; late: one or none, whichever it is.
inline void bring_boxes(shared_address barrier) {
    if (LATE_BOXES) {
        static u32 random = 1;
        random = random * 1664525u + 1013904223u;
        simt::num_polls = 0;
        if (num_boxes == 0 || (random >> 16) % 3) return;
        const u32 i = (random >> 8) % num_boxes;
        const Box box = boxes[i];
        boxes[i] = boxes[--num_boxes];
        return box.bring();
    }
    int left = 0;
    for (int i = 0; i < num_boxes; ++i) {
        const Box box = boxes[i];
        if (box.barrier == barrier)
            box.bring();
        else
            boxes[left++] = box;
    }
    num_boxes = left;
}

// -- mbarriers, named barriers and registers --------------------------------------------------------------------------

inline void barrier_init(shared_address barrier, u32 arrivals) {
    num_boxes = 0;  // those of a launch that failed
    *simt::shared_at<HostBarrier>(barrier) = {(unsigned char)arrivals, (unsigned char)arrivals, 0, 0, 0};
}

inline void barrier_init_done() {}

inline void barrier_arrive_expect(shared_address barrier, u32 bytes) {
    HostBarrier* here = simt::shared_at<HostBarrier>(barrier);
    here->bytes += bytes;
    --here->pending;
    here->turn();
}

inline void barrier_arrive(shared_address barrier) { barrier_arrive_expect(barrier, 0); }

inline void barrier_arrive_after_copies(shared_address barrier) {
    simt::finish_copies(0, true);
    barrier_arrive(barrier);
}

inline bool is_over(shared_address barrier, u32 phase) {
    return (simt::shared_at<HostBarrier>(barrier)->phase & 1) != (phase & 1);
}

inline bool barrier_test(shared_address barrier, u32 phase) {
    static u32 questions;
    if (questions++ / 32 % 2) bring_boxes(barrier);
    return is_over(barrier, phase);
}

inline void barrier_wait(shared_address barrier, u32 phase) {
    bring_boxes(barrier);
    while (!is_over(barrier, phase)) {
        simt::poll("barrier_wait");
        bring_boxes(barrier);
    }
}

inline void named_barrier_sync(int barrier, int threads) { simt::barrier("named_barrier", barrier, threads); }

inline void named_barrier_arrive(int barrier, int threads) {
    simt::barrier("named_barrier", barrier, threads, 0, false);
}

template <int count>
inline void shrink_registers() {}

template <int count>
inline void grow_registers() {}

// -- TMA --------------------------------------------------------------------------------------------------------------

inline void copy_box_5d(shared_address target, const TensorMap* map, int first, int last, shared_address barrier) {
    if (num_boxes == 256) simt::fail("more boxes under way than have room");
    boxes[num_boxes++] = {map, target, first, last, barrier};
}

struct SentBox {
    const TensorMap* map;
    shared_address source;
    int second, third;
};
static SentBox sent[1024];  // the last one of each thread

inline void send_box_4d(const TensorMap* map, shared_address source, int second, int third) {
    sent[threadIdx.x] = {map, source, second, third};  // it goes as late as wait_sent allows
}

inline void wait_sent() {
    const SentBox box = sent[threadIdx.x];
    if (!box.map) return;
    sent[threadIdx.x].map = nullptr;
    const HostTensorMap& to = on_host(box.map);
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
}

inline void store_matrix_x4(shared_address row, u32 m0, u32 m1, u32 m2, u32 m3) {
    uint4* data = simt::shared_at<uint4>(row);
    uint4* const* rows = simt::gather("store_matrix_x4", data);
    const u32 matrix[4] = {m0, m1, m2, m3};
    const int group = simt::lane() / 4, pair = simt::lane() % 4;
    for (int m = 0; m < 4; ++m) (&rows[m * 8 + group]->x)[pair] = matrix[m];
}

inline void fence_shared_for_async() {}

// -- wgmma ------------------------------------------------------------------------------------------------------------

inline void wgmma_fence() {}
inline void wgmma_commit() {}

template <int pending>
inline void wgmma_wait() {}

template <int count>
inline void hold(float (&)[count]) {}

inline u32 opaque(u32 value) { return value; }
inline void schedule_fence(int) {}

#ifdef BFLOAT16
template <int TRANSPOSED, int count>
void wgmma(float (&d)[count], u32 a0, u32 a1, u32 a2, u32 a3, u64 descriptor, bool accumulate) {
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

inline void wgmma_shared(float (&d)[32], u64 a, u64 descriptor, bool accumulate) {
    u32 fragment[4];
    const u32 address = u32(a & 0x3fff) << 4, group = u32(a >> 32 & 0x3fff) << 4;
    for (int i = 0; i < 4; ++i) {
        const int row = threadIdx.x / 32 % 4 * 16 + simt::lane() / 4 + i % 2 * 8, k = simt::lane() % 4 * 2 + i / 2 * 8;
        const u32 at = address + row / 8 * group + row % 8 * 128 + k * 2;
        fragment[i] = *simt::shared_at<u32>(at ^ (at >> 7 & 7) << 4);
    }
    wgmma<0>(d, fragment[0], fragment[1], fragment[2], fragment[3], descriptor, accumulate);
}
#endif
