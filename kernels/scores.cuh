// scores: from a product q . k to a score, and from a row's (maximum, sum) to its result. All attention kernels
// (decode.cu, prefill.cu, prefill_hopper.cu) take what a score means from here.
//
//   score[x] = sm_scale * q . k[x]                  SOFT_CAP: c * tanh(sm_scale * q . k[x] / c)    c = logits_soft_cap
//   out      = sum_x exp(score[x]) * v[x] / D       D = sum_x exp(score[x])                        SINKS: + exp(sink)
//   lse      = ln(D)
//
// What is constant in a build is a -D constant of 0 or 1 and costs nothing where it is 0:
//   SOFT_CAP   a bound on scores (Gemma 2)
//   SINKS      a learned score a head which every row sees and which has no value (gpt-oss; the name is
//              StreamingLLM's). A row has one sink, so it is added once, where the row ends, never to the state of a
//              part of its keys.
//
// Where a new variant of a score goes (spec.py says what is to do in Python):
//   a bias by position (ALiBi)   score_of(), with the array of slopes as a pointer of Scoring that score_factors() hands
//                                on. What score_of() returns, times `scale`, is to base 2: with SOFT_CAP a bias in
//                                natural-log units is multiplied by LOG2_E, else divided by sm_scale
//   a custom mask                mask_score() and visible_columns(); a kernel masks only blocks at an edge of what its
//                                rows see, so every block becomes an edge
//   something in the denominator end_row()
#pragma once
#include "attention_state.cuh"
#include "convert.cuh"
#include "page_table.cuh"

static_assert(SOFT_CAP == 0 || SOFT_CAP == 1, "SOFT_CAP must be 0 or 1");
static_assert(SINKS == 0 || SINKS == 1, "SINKS must be 0 or 1");

// The part of every attention kernel's parameters that turns products into scores: first the arrays, as spec.py has
// them in RunArrays behind lse, then the numbers. The host fills it by these names.
struct Scoring {
    const float* sinks;  // [num_qo_heads] with SINKS, natural logarithms
    float sm_scale;
    float logits_soft_cap;  // c, where SOFT_CAP
};

// What the loops need of Scoring. A kernel keeps score_of(q . k): `scale` times that is the score in base 2.
struct ScoreFactors {
    float scale;
    float to_cap;
    float from_cap;
};

__device__ __forceinline__ ScoreFactors score_factors(const Scoring& scoring) {
    if constexpr (SOFT_CAP)
        return {1.f, scoring.sm_scale / scoring.logits_soft_cap, scoring.logits_soft_cap * LOG2_E};
    else
        return {scoring.sm_scale * LOG2_E, 0.f, 0.f};
}

// Which score it is: of the query number `query` of the request, in its head `head`, with the key of the request's token
// x, a local index, whose position is said at the head of page_table.cuh; the arguments that FlexAttention gives its
// score_mod. What a variant does not read costs nothing: it is not computed.
struct ScoreAt {
    const Request& request;
    const Positions& positions;
    int query;
    int head;
    int x;
};

// `rounded`: the score is a float of its own. Otherwise the compiler may round it together with a difference that is
// taken of it, and then a score and the maximum that is equal to it differ. Kernels which subtract before they multiply
// by `scale` need it rounded, because scores may be large.
template <bool rounded = false>
__device__ __forceinline__ float score_of(float product, const ScoreFactors& factors, const ScoreAt&) {
    if constexpr (SOFT_CAP) {
        const float capped = tanh_fast(product * factors.to_cap);
        return rounded ? __fmul_rn(factors.from_cap, capped) : factors.from_cap * capped;
    } else {
        return product;
    }
}

// Masks the score of token x of a request: a row sees tokens [begin, end) of it (KvLimits), and the score of any other
// becomes -INF, whatever it was.
__device__ __forceinline__ void mask_score(float& score, int begin, int end, int x) {
    if (x < begin || x >= end) score = -INF;
}

// The same for the columns of a product's fragments: bits 2 i, 2 i + 1 are tokens first + 8 i, first + 8 i + 1.
__device__ __forceinline__ u32 visible_columns(const KvLimits& row, int first) {
    auto before = [&](int end) -> u32 {
        const int tokens = end - first, columns = tokens < 0 ? 0 : tokens / 8 * 2 + (tokens % 8 < 2 ? tokens % 8 : 2);
        return columns >= 32 ? ~0u : (1u << columns) - 1;
    };
    return before(row.end) & ~before(row.begin);
}

// The sink of a row of q. -INF is none: rows without a request (is_request) have none.
__device__ __forceinline__ float sink_of(const Scoring& scoring, int head, bool has_request) {
    if constexpr (SINKS)
        return has_request ? __ldg(scoring.sinks + head) : -INF;
    else
        return -INF;
}

// The result of a row: `weight` times what its weights times V add up to is its out.
struct RowEnd {
    float weight;
    float max;  // in base 2, as the sum is counted
    float sum;
    float sink;

    // The natural logarithm; a function, because only one thread of a row stores it, if any.
    __device__ __forceinline__ float lse() const { return SINKS && sum == INF ? sink : log_sum_exp(max, sum); }
};

// max is in base 2. A row that has seen no key has the sum 0, and so the weight 0 and the lse of its sink.
// fast_division: 1 / sum is off by up to 2 ulp.
template <bool fast_division = false>
__device__ __forceinline__ RowEnd end_row(float max, float sum, float sink) {
    if constexpr (SINKS) sum = sum_with_sink(sink * LOG2_E, 1.f, max, sum);
    const float weight = sum == 0.f ? 0.f : fast_division ? __fdividef(1.f, sum) : 1.f / sum;
    return {weight, max, sum, sink};
}
