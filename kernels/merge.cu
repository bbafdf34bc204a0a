// merge: attention states of disjoint sets of keys, merged into the state of their union.
//
//   out[row, head] = sum_i w_i * v_i[row, head] / sum_i w_i      lse[row, head] = log(sum_i exp(s_i[row, head]))
//   w_i            = exp(s_i - max)                              log and exp to base 2 or e
//
// merge_states
// in    v    [rows, num_states, heads, HEAD_DIM] V      any strides, last axis contiguous
//       s    [rows, num_states, heads] float            any strides; -inf, or +inf as FlashAttention-2 has it: the
//                                                       state saw no key, its v is not used
//       sinks [heads] float                             with -DSINKS=1: one more state of every row, without a v, whose
//                                                       score is a natural logarithm whatever the base is
// merge_state: the same for two states in arrays of their own
// in    v_a, v_b  [rows, heads, HEAD_DIM] V             s_a, s_b  [rows, heads] float
// out   out  [rows, heads, HEAD_DIM] OUT                contiguous; 0 where no state saw a key; may be v_a
//       lse  [rows, heads] float                        or null; contiguous, -inf where no state saw a key; may be s_a
//
// V is float with -DV_FLOAT32=1, else half or bfloat16 (-DBFLOAT16=0/1); OUT is float with -DOUT_FLOAT32=1, else the
// same 16-bit type. VEC, a power of two, is how many neighbouring columns one load takes: as many as 16 bytes hold,
// fewer where HEAD_DIM, a base or a stride is no multiple of that.
//
// Who owns what
//   grid   x = row, y = group of heads; one warp per (row, head). merge_states, row_major: x = group, y and z = row, so
//          that the blocks which run at one time read whole rows
//   warp   SIDE states side by side, GROUP lanes each; a lane holds VEC columns (STEPS times VEC, where a row is wider
//          than a warp). TURNS states of every lane load before the first of them is used: nothing else hides the
//          latency of memory here. Longer lists go by in batches, with the running maximum of an online softmax.
//   The order of additions is fixed: the same bits on every run. No shared memory.
//
// Source: the merge of Flash-Decoding (Dao et al., 2023), with the online softmax of Milakov and Gimelshein (2018).
#include "attention_state.cuh"
#include "load_global.cuh"

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

struct MergeStatesParams {
    const V* v;        // [rows, num_states, heads, HEAD_DIM]
    const float* s;    // [rows, num_states, heads]
    Out* out;          // [rows, heads, HEAD_DIM]
    float* lse;        // [rows, heads] or null
    i64 v_row_stride;  // strides in elements
    i64 v_state_stride;
    i64 v_head_stride;
    i64 s_row_stride;
    i64 s_state_stride;
    i64 s_head_stride;
    int rows;
    int num_states;
    int heads;
    int row_major;       // which grid
    float log2_of_base;  // s * log2_of_base is a log to base 2
    const float* sinks;  // [heads] with SINKS
};

struct MergeStateParams {
    const V* v_a;        // [rows, heads, HEAD_DIM]
    const V* v_b;        // [rows, heads, HEAD_DIM]
    const float* s_a;    // [rows, heads]
    const float* s_b;    // [rows, heads]
    Out* out;            // [rows, heads, HEAD_DIM]
    float* lse;          // [rows, heads] or null
    i64 v_a_row_stride;  // strides in elements
    i64 v_a_head_stride;
    i64 v_b_row_stride;
    i64 v_b_head_stride;
    i64 s_a_row_stride;
    i64 s_a_head_stride;
    i64 s_b_row_stride;
    i64 s_b_head_stride;
    int rows;
    int heads;
    float log2_of_base;  // s * log2_of_base is a log to base 2
};

// The states of one (row, head). Two in arrays of their own are a list too: its stride leads from one to the other.
struct StateList {
    const V* v;
    const float* s;
    i64 v_stride;
    i64 s_stride;
};

// One warp, one (row, head): its states into out[HEAD_DIM] and *lse, turns * SIDE of them in a batch. Streamed: v, read
// once, leaves L2 first.
template <int turns, bool streamed>
__device__ __forceinline__ void merge(const StateList& states, int num_states, float log2_of_base, Out* out,
                                      float* lse, float sink) {
    const int lane = threadIdx.x & 31, side = lane / GROUP, column = lane % GROUP;
    float max = -INF, sum = 0.f;  // max: as s is given; sum: over this side's states
    float total[STEPS][VEC] = {};

    for (int first = 0; first < num_states; first += turns * SIDE) {
        // 1. All loads of the batch: lane l has the s of state first + l, side i the v of states first + i, + SIDE, ...
        Columns loaded[turns][STEPS];
        const V* v = states.v + (first + side) * states.v_stride + column * VEC;
#pragma unroll
        for (int turn = 0; turn < turns; ++turn, v += SIDE * states.v_stride) {
            if (first + turn * SIDE + side >= num_states) continue;
#pragma unroll
            for (int step = 0; step < STEPS; ++step)
                if (CHUNKS % GROUP == 0 || step * GROUP + column < CHUNKS) {
                    const Columns* columns = reinterpret_cast<const Columns*>(v + step * GROUP * VEC);
                    loaded[turn][step] = streamed ? load_global(columns, cache_policy(Evict::FIRST)) : *columns;
                }
        }
        const bool has_state = lane < turns * SIDE && first + lane < num_states;
        float lane_s = has_state ? states.s[(first + lane) * states.s_stride] : -INF;
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

// Many states: row-major, and v leaves L2 first (trial 110).
extern "C" __global__ void __launch_bounds__(256, 4) merge_states(const __grid_constant__ MergeStatesParams p) {
    // By way of int: without it, and with a division in place of y and z, sm_100 and later spill registers.
    const i64 row = int(p.row_major ? blockIdx.z * gridDim.y + blockIdx.y : blockIdx.x);
    const int group = p.row_major ? blockIdx.x : blockIdx.y;
    const int head = group * (blockDim.x / 32) + threadIdx.x / 32;
    if (u64(row) >= p.rows || head >= p.heads) return;
    const StateList states = {p.v + row * p.v_row_stride + head * p.v_head_stride,
                              p.s + row * p.s_row_stride + head * p.s_head_stride, p.v_state_stride, p.s_state_stride};
    const i64 at = row * p.heads + head;
    merge<TURNS, true>(states, p.num_states, p.log2_of_base, p.out + at * HEAD_DIM, p.lse ? p.lse + at : nullptr,
                       SINKS ? __ldg(p.sinks + head) : -INF);
}

// How many elements lie between two pointers, in one array or not.
template <typename T>
__device__ __forceinline__ i64 distance(const T* from, const T* to) {
    return (reinterpret_cast<i64>(to) - reinterpret_cast<i64>(from)) / i64(sizeof(T));
}

// Two states: x = row and plain loads (trial 111).
extern "C" __global__ void __launch_bounds__(256) merge_state(const __grid_constant__ MergeStateParams p) {
    const i64 row = blockIdx.x;
    const int head = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= p.rows || head >= p.heads) return;
    const V* v_a = p.v_a + row * p.v_a_row_stride + head * p.v_a_head_stride;
    const V* v_b = p.v_b + row * p.v_b_row_stride + head * p.v_b_head_stride;
    const float* s_a = p.s_a + row * p.s_a_row_stride + head * p.s_a_head_stride;
    const float* s_b = p.s_b + row * p.s_b_row_stride + head * p.s_b_head_stride;
    const i64 at = row * p.heads + head;
    merge<SIDE == 1 ? 2 : 1, false>({v_a, s_a, distance(v_a, v_b), distance(s_a, s_b)}, 2, p.log2_of_base,
                                    p.out + at * HEAD_DIM, p.lse ? p.lse + at : nullptr, -INF);
}
