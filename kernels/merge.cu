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
// V, OUT, VEC, SINKS: state_lists.cuh, as what a warp does.
//
// Who owns what
//   grid   x = row, y = group of heads; one warp per (row, head). merge_states, row_major: x = group, y and z = row, so
//          that the blocks which run at one time read whole rows
//
// Source: the merge of Flash-Decoding (Dao et al., 2023).
#include "load_global.cuh"
#include "state_lists.cuh"

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

// The states of one (row, head) in one list. Two in arrays of their own are a list too: its stride leads from one to the
// other. Streamed: v, read once, leaves L2 first.
template <bool streamed>
struct StateList {
    const V* v;
    const float* s;
    i64 v_stride;
    i64 s_stride;

    template <int turns>
    __device__ __forceinline__ void load(Columns (&loaded)[turns][STEPS], float& lane_s, int first,
                                         int num_states) const {
        const int lane = threadIdx.x & 31, side = lane / GROUP, column = lane % GROUP;
        const V* from = v + (first + side) * v_stride + column * VEC;
#pragma unroll
        for (int turn = 0; turn < turns; ++turn, from += SIDE * v_stride) {
            if (first + turn * SIDE + side >= num_states) continue;
#pragma unroll
            for (int step = 0; step < STEPS; ++step)
                if (CHUNKS % GROUP == 0 || step * GROUP + column < CHUNKS) {
                    const Columns* columns = reinterpret_cast<const Columns*>(from + step * GROUP * VEC);
                    loaded[turn][step] = streamed ? load_global(columns, cache_policy(Evict::FIRST)) : *columns;
                }
        }
        const bool has_state = lane < turns * SIDE && first + lane < num_states;
        lane_s = has_state ? s[(first + lane) * s_stride] : -INF;
    }

    __device__ __forceinline__ bool is_lost() const { return false; }
};

// Many states: row-major, and v leaves L2 first (trial 110).
extern "C" __global__ void __launch_bounds__(256, 4) merge_states(const __grid_constant__ MergeStatesParams p) {
    // By way of int: without it, and with a division in place of y and z, sm_100 and later spill registers.
    const i64 row = int(p.row_major ? blockIdx.z * gridDim.y + blockIdx.y : blockIdx.x);
    const int group = p.row_major ? blockIdx.x : blockIdx.y;
    const int head = group * (blockDim.x / 32) + threadIdx.x / 32;
    if (u64(row) >= p.rows || head >= p.heads) return;
    const StateList<true> states = {p.v + row * p.v_row_stride + head * p.v_head_stride,
                                    p.s + row * p.s_row_stride + head * p.s_head_stride, p.v_state_stride,
                                    p.s_state_stride};
    const i64 at = row * p.heads + head;
    merge<TURNS>(states, p.num_states, p.log2_of_base, p.out + at * HEAD_DIM, p.lse ? p.lse + at : nullptr,
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
    const StateList<false> states = {v_a, s_a, distance(v_a, v_b), distance(s_a, s_b)};
    merge<SIDE == 1 ? 2 : 1>(states, 2, p.log2_of_base, p.out + at * HEAD_DIM, p.lse ? p.lse + at : nullptr, -INF);
}
