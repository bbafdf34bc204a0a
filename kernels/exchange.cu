// exchange: ranks, each a GPU that attended to some of the keys, exchange their attention states over peer memory and
// merge them into the state of all keys.
//
//   out[row, head] = sum_r w_r * v_r[row, head] / sum_r w_r      lse[row, head] = log(sum_r exp(s_r[row, head]))
//   w_r            = exp(s_r - max)                              r: the ranks, in order, whichever of them computes it
//
// One launch a rank and step, n = num_ranks. Either every rank gets all heads (part = heads), or rank r gets its part of
// them, from r * part on (part = heads / n), and is sent no others.
//
// in    v       [rows, heads, HEAD_DIM] V            this rank's states; of those that saw no key s is -inf (or +inf),
//       s       [rows, heads] float                  and v may hold anything
//       sinks   [heads] float                        or null; natural logarithms, each counts once
//       lengths [1] u64                              a checksum of the step's lengths, which all ranks must have alike
// out   out     [rows, part, HEAD_DIM] OUT           0 where no state saw a key, or a rank did not come
//       lse     [rows, part] float                   -inf there
//       status  [2] u32                              [LOST] 1 + a rank that did not come, [DIFFERS] 1 + one whose
//                                                    lengths differ; the first of each stays
// inout epochs  [warps of the grid] u32              steps so far; the grid is the same in every step
// On every rank r, a row of each for every rank that sends, and all of it twice:
//       v_of[r]       [2, n, capacity, HEAD_DIM] V   capacity: of items, rows * part at most
//       s_of[r]       [2, n, capacity] u32           floats, by their bits
//       lengths_of[r] [2, n] u64
// V, OUT: state_lists.cuh. VEC is 16 bytes of V, SINKS is 1.
//
// How a rank knows that data is there. No flag goes behind the data, which would take a fence and a second way through
// the link: each word is its own flag. Memory that waits for data is filled with NOT_YET, a NaN that no arithmetic gives
// (one in a v is sent as another NaN), and whoever waits reads until no word is NOT_YET. Words may come in any order.
//
// When memory is used again. A step uses the half of its epoch's parity, and a lane fills what it has read with NOT_YET
// again. Epochs are counted here, so that a graph is replayed without a reset. A rank ends a step when it has all states
// of it, so that others are one epoch ahead or behind, at most; they write to a half for epoch e + 2 when they have this
// rank's states of e + 1, which its launch for e, and with it the filling, has gone before.
//
// Nothing waits for ever: a word that is not there at the deadline, `timeout` ns behind the launch, leaves LOST in the
// status. From then on launches neither send nor wait, so that all other ranks find out, too, and no rank can go on with
// halves that others use otherwise. The ranks then have to set up memory anew.
//
// Who owns what
//   grid   a block of rank r waits for blocks of the same index on other ranks only. The grid is small enough that blocks
//          which wait keep none of those off a card that ranks share
//   warp   items warp, warp + all warps, ...: an item is (row, place in a part). It sends those of all its items, then
//          merges them: no warp waits before it has sent. Those of the last block have no items; the first of them
//          exchanges the lengths, lane r with rank r
//   lane   of a state that it sends, pieces lane, lane + 32, ... of 16 bytes; of states that it merges: state_lists.cuh
//   No shared memory, no barrier.
//
// Sources: data that is its own flag, of NCCL's LL protocols (a flag in each 8 or 128 bytes) and of the Lamport-style
// one-shot all-reduce of TensorRT-LLM and FlashInfer (a word that no data has); merging, of Flash-Decoding (Dao et al.,
// 2023).
#include "load_global.cuh"
#include "state_lists.cuh"

static_assert(sizeof(V) * VEC == 16 && SINKS, "pieces have 16 bytes, and sinks are known when it runs");

constexpr u32 NOT_YET = ~0u;
constexpr u32 OTHER_NAN = 0x7fffffffu;  // for a float, and for each of two 16-bit numbers
constexpr int PIECES = (CHUNKS + 31) / 32;
constexpr int RANK_TURNS = TURNS * SIDE < 8 ? TURNS : (8 + SIDE - 1) / SIDE;  // all ranks in one batch, where they fit
constexpr int LOST = 0, DIFFERS = 1;

struct ExchangeParams {
    const V* v;          // [rows, heads, HEAD_DIM]
    const float* s;      // [rows, heads]
    Out* out;            // [rows, part, HEAD_DIM]
    float* lse;          // [rows, part]
    const float* sinks;  // [heads] or null
    const u64* lengths;  // [1]
    int rows;
    int heads;
    int part;
    int rank;
    int num_ranks;
    int capacity;
    u64 timeout;         // ns
    u32* epochs;         // [warps of the grid]
    u32* status;         // [2]
    V* v_of[8];          // [2, num_ranks, capacity, HEAD_DIM] of each rank
    u32* s_of[8];        // [2, num_ranks, capacity]
    u64* lengths_of[8];  // [2, num_ranks]
};

__device__ __forceinline__ u32 as_sent(u32 word) { return word == NOT_YET ? OTHER_NAN : word; }

__device__ __forceinline__ bool is_here(const uint4& x) {
    return x.x != NOT_YET && x.y != NOT_YET && x.z != NOT_YET && x.w != NOT_YET;
}

// One step of one rank, as all its functions know it.
struct Step {
    int half;
    u64 deadline;

    // Where the state that rank `from` sends for an item is stored at a rank, in states.
    __device__ __forceinline__ i64 place(const ExchangeParams& p, int from, int item) const {
        return i64(half * p.num_ranks + from) * p.capacity + item;
    }

    // The warp's verdict on a wait: true ends it. missing: a rank whose data this lane has not found, or -1.
    __device__ __forceinline__ bool is_over(const ExchangeParams& p, int missing, bool& is_lost) const {
        if (!__any_sync(~0u, missing >= 0)) return true;
        is_lost = __any_sync(~0u, nanoseconds() >= deadline);
        if (is_lost && missing >= 0) atomicCAS(p.status + LOST, 0u, 1u + missing);
        return is_lost;
    }
};

// The state of an item that rank `of` is to have: one of its own part, where ranks have parts.
__device__ __forceinline__ i64 state_of(const ExchangeParams& p, int item, int of) {
    if (p.part == p.heads) return item;
    const int row = item / p.part;
    return i64(row) * p.heads + of * p.part + (item - row * p.part);
}

// A state on its way to other ranks. That of a rank which saw no key travels as zeros.
struct Message {
    uint4 pieces[PIECES];
    u32 s;

    // All loads at once: none waits for another.
    __device__ __forceinline__ void load(const ExchangeParams& p, i64 state) {
        const int lane = threadIdx.x & 31;
        const uint4* const from = reinterpret_cast<const uint4*>(p.v) + state * CHUNKS + lane;
#pragma unroll
        for (int i = 0; i < PIECES; ++i)
            if (lane + 32 * i < CHUNKS) pieces[i] = load_system(from + 32 * i);
        s = load_system(reinterpret_cast<const u32*>(p.s) + state);
    }

    __device__ __forceinline__ void send(V* to_v, u32* to_s) const {
        const int lane = threadIdx.x & 31;
        const bool saw_keys = (s & 0x7fffffffu) != 0x7f800000u;
        uint4* const to = reinterpret_cast<uint4*>(to_v) + lane;
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const uint4& x = pieces[i];
            if (lane + 32 * i < CHUNKS)
                store_system(to + 32 * i, saw_keys ? uint4{as_sent(x.x), as_sent(x.y), as_sent(x.z), as_sent(x.w)}
                                                   : uint4{0, 0, 0, 0});
        }
        if (lane == 0) store_system(to_s, as_sent(s));
    }
};

// The states of all ranks for one item, in the order of ranks: this rank's where it was computed, the others' where they
// were sent.
struct StatesOfRanks {
    const ExchangeParams& p;
    const Step& step;
    int item;
    i64 own;  // this rank's state
    bool lost;

    template <int turns>
    __device__ __forceinline__ void load(Columns (&loaded)[turns][STEPS], float& lane_s, int first, int num_states) {
        const int lane = threadIdx.x & 31, side = lane / GROUP, column = lane % GROUP;
        const bool has_state = lane < turns * SIDE && first + lane < num_states;
        const bool is_own = first + lane == p.rank;
        u32* const s = p.s_of[p.rank] + step.place(p, has_state ? first + lane : 0, item);
        uint4* const received = reinterpret_cast<uint4*>(p.v_of[p.rank]);
        const uint4* const computed = reinterpret_cast<const uint4*>(p.v) + own * CHUNKS;

        // 1. Read until everything is there: all loads, and then a look at what came, so that none waits for another.
        int missing;
        u32 word = 0;
        do {
#pragma unroll
            for (int turn = 0; turn < turns; ++turn) {
                const int from = first + turn * SIDE + side;
                if (from >= num_states) continue;
                const uint4* const v = from == p.rank ? computed : received + step.place(p, from, item) * CHUNKS;
#pragma unroll
                for (int i = 0; i < STEPS; ++i)
                    if (CHUNKS % GROUP == 0 || i * GROUP + column < CHUNKS)
                        reinterpret_cast<uint4&>(loaded[turn][i]) = load_system(v + i * GROUP + column);
            }
            if (has_state) word = load_system(is_own ? reinterpret_cast<const u32*>(p.s) + own : s);
            missing = has_state && !is_own && word == NOT_YET ? first + lane : -1;
#pragma unroll
            for (int turn = 0; turn < turns; ++turn) {
                const int from = first + turn * SIDE + side;
                if (from >= num_states || from == p.rank) continue;
#pragma unroll
                for (int i = 0; i < STEPS; ++i)
                    if (CHUNKS % GROUP == 0 || i * GROUP + column < CHUNKS)
                        if (!is_here(reinterpret_cast<const uint4&>(loaded[turn][i]))) missing = from;
            }
        } while (!step.is_over(p, missing, lost));
        lane_s = has_state && !lost ? __uint_as_float(word) : -INF;

        // 2. What was read waits for the epoch after the next.
        if (lost) return;
#pragma unroll
        for (int turn = 0; turn < turns; ++turn) {
            const int from = first + turn * SIDE + side;
            if (from >= num_states || from == p.rank) continue;
#pragma unroll
            for (int i = 0; i < STEPS; ++i)
                if (CHUNKS % GROUP == 0 || i * GROUP + column < CHUNKS)
                    store_system(received + step.place(p, from, item) * CHUNKS + i * GROUP + column,
                                 uint4{NOT_YET, NOT_YET, NOT_YET, NOT_YET});
        }
        if (has_state && !is_own) store_system(s, NOT_YET);
    }

    __device__ __forceinline__ bool is_lost() const { return lost; }
};

extern "C" __global__ void __launch_bounds__(256, 2) exchange(const __grid_constant__ ExchangeParams p) {
    const int lane = threadIdx.x & 31, warps = blockDim.x / 32, last_block = gridDim.x - 1;
    const int warp = blockIdx.x * warps + threadIdx.x / 32, num_warps = last_block * warps;
    const int items = warp < num_warps ? p.rows * p.part : 0;
    const bool by_heads = p.part < p.heads;
    const bool has_lengths = warp == num_warps && lane < p.num_ranks && lane != p.rank;  // of rank `lane`
    if (p.rows == 0) return;  // on every rank; nobody would wait, and so it is no epoch
    const auto next_rank = [&](int i) { return p.rank + i < p.num_ranks ? p.rank + i : p.rank + i - p.num_ranks; };

    // 1. In one wait for memory: the first state to send, the epoch, whether a rank was lost before.
    Message message;
    message.load(p, state_of(p, warp < items ? warp : 0, next_rank(1)));
    const u32 epoch = load_system(p.epochs + warp);
    const bool was_lost = load_system(p.status + LOST) != 0;
    const u64 lengths = *p.lengths == ~u64(0) ? 0 : *p.lengths;
    const Step step = {int(epoch & 1), was_lost ? 0 : nanoseconds() + p.timeout};

    // 2. Send: to the next rank first, so that not all send to one.
    for (int item = warp; item < items && !was_lost; item += num_warps)
        for (int i = 1; i < p.num_ranks; ++i) {
            const int to = next_rank(i);
            if (i > 1 ? by_heads : item > warp) message.load(p, state_of(p, item, to));
            const i64 place = step.place(p, p.rank, item);
            message.send(p.v_of[to] + place * HEAD_DIM, p.s_of[to] + place);
        }
    if (has_lengths && !was_lost) store_system(p.lengths_of[lane] + step.half * p.num_ranks + p.rank, lengths);
    __syncwarp();  // all lanes know the epoch
    if (lane == 0) p.epochs[warp] = epoch + 1;

    // 3. Wait, and merge.
    for (int item = warp; item < items; item += num_warps) {
        StatesOfRanks states = {p, step, item, state_of(p, item, p.rank), false};
        const float sink = p.sinks ? __ldg(p.sinks + item % p.part + (by_heads ? p.rank * p.part : 0)) : -INF;
        merge<RANK_TURNS>(states, p.num_ranks, LOG2_E, p.out + i64(item) * HEAD_DIM, p.lse + item, sink);
    }

    // 4. Compare the lengths.
    if (warp != num_warps) return;
    u64* const theirs = p.lengths_of[p.rank] + step.half * p.num_ranks + lane;
    u64 word = 0;
    int missing;
    bool is_lost = false;
    do {
        if (has_lengths) word = load_system(theirs);
        missing = has_lengths && word == ~u64(0) ? lane : -1;
    } while (!step.is_over(p, missing, is_lost));
    if (!has_lengths || missing >= 0) return;
    if (word != lengths) atomicCAS(p.status + DIFFERS, 0u, 1u + lane);
    store_system(theirs, ~u64(0));
}
