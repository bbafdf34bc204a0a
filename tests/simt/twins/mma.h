// Twins of the PTX in kernels/mma.cuh.
#pragma once

inline void load_matrix_x4(u32 (&matrix)[4], shared_address row) {
    const uint4* data = simt::shared_at<uint4>(row);
    const uint4* const* rows = simt::gather("load_matrix_x4", data);
    const int group = simt::lane() / 4, pair = simt::lane() % 4;
    for (int m = 0; m < 4; ++m) matrix[m] = (&rows[m * 8 + group]->x)[pair];
}

inline void load_matrix_x4_transposed(u32 (&matrix)[4], shared_address row) {
    const u16* data = (const u16*)simt::shared_at<uint4>(row);
    const u16* const* rows = simt::gather("load_matrix_x4_transposed", data);
    const int group = simt::lane() / 4, pair = simt::lane() % 4;
    for (int m = 0; m < 4; ++m)
        matrix[m] = rows[m * 8 + pair * 2][group] | u32(rows[m * 8 + pair * 2 + 1][group]) << 16;
}

inline u32 transpose_8x8(u32 matrix) {
    const u32* lanes = simt::gather("transpose_8x8", matrix);
    const int group = simt::lane() / 4, pair = simt::lane() % 4;
    const u32 first = lanes[pair * 8 + group / 2], second = lanes[pair * 8 + 4 + group / 2];
    return group % 2 ? first >> 16 | (second & 0xffff0000) : (first & 0xffff) | second << 16;
}

#ifdef BFLOAT16
inline void mma_m16n8k16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    struct Fragments {
        float2 a[4], b[2];
    };
    auto unpack = [](u32 packed) { return make_float2(to_float(u16(packed)), to_float(u16(packed >> 16))); };
    const Fragments own{{unpack(a[0]), unpack(a[1]), unpack(a[2]), unpack(a[3])}, {unpack(b0), unpack(b1)}};
    const Fragments* lanes = simt::gather("mma_m16n8k16", own);
    const int group = simt::lane() / 4, pair = simt::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int upper = i / 2, column = pair * 2 + i % 2;
        for (int k = 0; k < 8; ++k) {  // k counts pairs along the inner dimension
            const float2 x = lanes[group * 4 + k % 4].a[upper + k / 4 * 2], y = lanes[column * 4 + k % 4].b[k / 4];
            c[i] += x.x * y.x + x.y * y.y;
        }
    }
}
#endif
