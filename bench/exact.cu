// exact: causal attention of one request over its pages, in float64: slow and simple, to measure the errors of others.
//
//   out[row, head] = sum_x softmax_x(score(row, head, x)) * V[x]    x = 0 .. kv_len - rows + row
//   score          = sm_scale * q[row, head] . K[x]                 (soft_cap > 0: c * tanh(score / c))
//   lse[row, head] = ln(sum_x exp(score))
//
// in    q         [rows, num_qo_heads, HEAD_DIM] u16    half, or bfloat16 with -DBFLOAT16=1
//       k, v      [num_pages, page_size, num_kv_heads, HEAD_DIM] u16
//       page_ids  [ceil(kv_len / page_size)] int
// out   out       [rows, num_qo_heads, HEAD_DIM] double
//       lse       [rows, num_qo_heads] double
//
// grid: x = row, y = head. A warp takes every WARPS-th token, a lane DIMS neighbouring columns.
typedef unsigned short u16;

constexpr int WARPS = 16, DIMS = HEAD_DIM / 32;

__device__ double to_double(u16 x) {
#if BFLOAT16
    return __uint_as_float(unsigned(x) << 16);
#elif defined(__CUDACC__)
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#else
    const int exponent = (x >> 10) & 31, mantissa = x & 0x3ff;
    const double size = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    return x & 0x8000 ? -size : size;
#endif
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    exact_attention(const u16* q, const u16* k, const u16* v, const int* page_ids, double* out, double* lse, int rows,
                    int num_qo_heads, int num_kv_heads, int page_size, int kv_len, double sm_scale, double soft_cap) {
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    double(*states)[HEAD_DIM + 2] = reinterpret_cast<double(*)[HEAD_DIM + 2]>(shared_memory);  // [WARPS]: out, max, sum
    const double none = -1e300;  // below every score; exp(none - score) is 0
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = blockIdx.x, head = blockIdx.y, kv_head = head / (num_qo_heads / num_kv_heads);
    const long long at = (long long)row * num_qo_heads + head;

    // 1. Every warp: a running softmax over its tokens.
    double query[DIMS], total[DIMS] = {}, max = none, sum = 0;
    for (int i = 0; i < DIMS; ++i) query[i] = to_double(q[at * HEAD_DIM + lane * DIMS + i]);
    for (int token = warp; token <= kv_len - rows + row; token += WARPS) {
        const long long slot = (long long)page_ids[token / page_size] * page_size + token % page_size;
        const long long from = (slot * num_kv_heads + kv_head) * HEAD_DIM + lane * DIMS;
        double score = 0;
        for (int i = 0; i < DIMS; ++i) score += query[i] * to_double(k[from + i]);
        for (int bit = 16; bit > 0; bit /= 2) score += __shfl_xor_sync(~0u, score, bit);
        score *= sm_scale;
        if (soft_cap > 0) score = soft_cap * tanh(score / soft_cap);
        const double top = score > max ? score : max, keep = exp(max - top), weight = exp(score - top);
        max = top;
        sum = sum * keep + weight;
        for (int i = 0; i < DIMS; ++i) total[i] = total[i] * keep + weight * to_double(v[from + i]);
    }

    // 2. The warps together: a thread a column.
    for (int i = 0; i < DIMS; ++i) states[warp][lane * DIMS + i] = total[i];
    if (lane == 0) states[warp][HEAD_DIM] = max, states[warp][HEAD_DIM + 1] = sum;
    __syncthreads();
    if (threadIdx.x >= HEAD_DIM) return;
    double top = none, all = 0, column = 0;
    for (int w = 0; w < WARPS; ++w) top = states[w][HEAD_DIM] > top ? states[w][HEAD_DIM] : top;
    for (int w = 0; w < WARPS; ++w) {
        const double weight = exp(states[w][HEAD_DIM] - top);
        all += weight * states[w][HEAD_DIM + 1];
        column += weight * states[w][threadIdx.x];
    }
    out[at * HEAD_DIM + threadIdx.x] = column / all;
    if (threadIdx.x == 0) lse[at] = top + log(all);
}
