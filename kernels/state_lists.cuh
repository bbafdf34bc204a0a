// state_lists: one warp merges the attention states of one (row, head) into the state of their union.
//
//   out = sum_i w_i * v_i / sum_i w_i      lse = log(sum_i exp(s_i))
//   w_i = exp(s_i - max)                   log and exp to base 2 or e
//
// A state is v [HEAD_DIM] of V and s, the log of its sum of exponentials; with s = -inf, or +inf as FlashAttention-2 has
// it, it saw no key and its v is not used. With -DSINKS=1 a sink is one more state, without a v, whose score is a natural
// logarithm whatever the base is.
//
// V is float with -DV_FLOAT32=1, else half or bfloat16 (-DBFLOAT16=0/1); OUT is float with -DOUT_FLOAT32=1, else the
// same 16-bit type. VEC, a power of two, is how many neighbouring columns one load takes: as many as 16 bytes hold,
// fewer where HEAD_DIM, a base or a stride is no multiple of that.
//
// Who owns what
//   warp   SIDE states side by side, GROUP lanes each; a lane holds VEC columns (STEPS times VEC, where a row is wider
//          than a warp). TURNS states of every lane load before the first of them is used: nothing else hides the
//          latency of memory here. Longer lists go by in batches, with the running maximum of an online softmax.
//   The order of additions is fixed: the same bits on every run. No shared memory.
//
// Where states come from is the caller's, a type with
//   load<turns>(loaded, s, first, num_states)   one batch: lane l's s of state first + l (-inf past the end), and
//                                               loaded[turn][step] of state first + turn * SIDE + side, for each of its
//                                               columns
//   is_lost()                                   whether a state did not come: the result is then 0 and -inf
//
// Source: the merge of Flash-Decoding (Dao et al., 2023), with the online softmax of Milakov and Gimelshein (2018).
#pragma once
#include "attention_state.cuh"

static_assert(SINKS == 0 || SINKS == 1, "SINKS must be 0 or 1");
static_assert((VEC & (VEC - 1)) == 0 && HEAD_DIM % VEC == 0, "VEC must be a power of two that divides HEAD_DIM");
static_assert(VEC * (V_FLOAT32 ? 4 : 2) <= 16, "VEC values of v must fit into 16 bytes");

constexpr int CHUNKS = HEAD_DIM / VEC;  // loads of a row
// Lanes of a state.
constexpr int GROUP = CHUNKS > 16 ? 32 : CHUNKS > 8 ? 16 : CHUNKS > 4 ? 8 : CHUNKS > 2 ? 4 : CHUNKS;
constexpr int SIDE = 32 / GROUP;                     // states side by side
constexpr int STEPS = (CHUNKS + GROUP - 1) / GROUP;  // loads of a lane for a state
// Lanes without a column take two registers more, which sm_100 and later cannot spare for 8 loads.
constexpr int LOADS = STEPS == 1 ? (CHUNKS % GROUP ? 6 : 8) : STEPS == 2 ? 4 : 2;
constexpr int TURNS = LOADS < GROUP ? LOADS : GROUP;  // SIDE states each: a batch has at most one a lane

#if V_FLOAT32
typedef float V;
__device__ __forceinline__ float as_float(float x) { return x; }
#else
typedef u16 V;
__device__ __forceinline__ float as_float(u16 x) { return to_float(x); }
#endif
#if OUT_FLOAT32
typedef float Out;
__device__ __forceinline__ float to_out(float x) { return x; }
#else
typedef u16 Out;
__device__ __forceinline__ u16 to_out(float x) { return from_float(x); }
#endif

// Values that are loaded and stored at once.
template <typename T, int count>
struct __align__(sizeof(T) * count) Pack {
    T values[count];
};
typedef Pack<V, VEC> Columns;
constexpr int OUT_VEC = VEC * sizeof(Out) > 16 ? 16 / sizeof(Out) : VEC;

// One warp, one (row, head): its states into out[HEAD_DIM] and *lse, turns * SIDE of them in a batch.
template <int turns, typename States>
__device__ __forceinline__ void merge(States& states, int num_states, float log2_of_base, Out* out, float* lse,
                                      float sink) {
    const int lane = threadIdx.x & 31, side = lane / GROUP, column = lane % GROUP;
    float max = -INF, sum = 0.f;  // max: as s is given; sum: over this side's states
    float total[STEPS][VEC] = {};

    for (int first = 0; first < num_states; first += turns * SIDE) {
        // 1. All loads of the batch.
        Columns loaded[turns][STEPS];
        float lane_s;
        states.template load<turns>(loaded, lane_s, first, num_states);
        if (lane_s == INF) lane_s = -INF;

        // 2. The new maximum; what has been added up so far shrinks to it.
        float new_max = fmaxf(max, lane_s);
#pragma unroll
        for (int bit = 16; bit > 0; bit /= 2) new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, bit));
        if (first > 0) {
            const float keep = max == -INF ? 0.f : exp2_fast((max - new_max) * log2_of_base);
            sum *= keep;
#pragma unroll
            for (int step = 0; step < STEPS; ++step)
#pragma unroll
                for (int i = 0; i < VEC; ++i) total[step][i] *= keep;
        }
        max = new_max;

        // 3. The batch. The v of an empty state is not used: it may hold NaN.
#pragma unroll
        for (int turn = 0; turn < turns; ++turn) {
            if (first + turn * SIDE >= num_states) break;
            const float s = __shfl_sync(~0u, lane_s, turn * SIDE + side);
            if (s == -INF) continue;
            const float weight = exp2_fast((s - max) * log2_of_base);  // exact for states far from 0, too
            sum += weight;
#pragma unroll
            for (int step = 0; step < STEPS; ++step)
#pragma unroll
                for (int i = 0; i < VEC; ++i)
                    total[step][i] = fmaf(weight, as_float(loaded[turn][step].values[i]), total[step][i]);
        }
    }

    // 4. The sides together: every lane gets the sums of its columns.
#pragma unroll
    for (int bit = GROUP; bit < 32; bit *= 2) {
        sum += __shfl_xor_sync(~0u, sum, bit);
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
            for (int i = 0; i < VEC; ++i) total[step][i] += __shfl_xor_sync(~0u, total[step][i], bit);
    }

    // 5. Normalise and write. The sum is 0 where no state saw a key, else at least 1 (or NaN).
    const float sink_in_base = sink * __fdividef(LOG2_E, log2_of_base);
    if constexpr (SINKS) sum = sum_with_sink(sink_in_base, log2_of_base, max, sum);
    if (states.is_lost()) sum = 0.f;
    const float scale = sum == 0.f ? 0.f : __fdividef(1.f, sum);
    const float log_of_sum = max + __fdividef(log2_fast(sum), log2_of_base);
    if (lse && lane == 0) *lse = sum == 0.f ? -INF : SINKS && sum == INF ? sink_in_base : log_of_sum;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int chunk = step * GROUP + column;
        if (side > 0 || chunk >= CHUNKS) continue;
#pragma unroll
        for (int part = 0; part < VEC; part += OUT_VEC) {
            Pack<Out, OUT_VEC> packed;
#pragma unroll
            for (int i = 0; i < OUT_VEC; ++i) packed.values[i] = to_out(total[step][part + i] * scale);
            *reinterpret_cast<Pack<Out, OUT_VEC>*>(out + chunk * VEC + part) = packed;
        }
    }
}
