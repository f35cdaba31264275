// The walk back of E alone, the gradient of the state, a warp 16 of its rows: Z = Pᵀ·dY + W_b·Eᵀ and
// E ← E + dYᵀ·ρ + Zᵀ·α.
//
// A warp divides its rows of E and of dYᵀ by a power of two of its own. Every step lies by itself in shared
// memory.
#pragma once
#include "state.cuh"

// Starts copying what a step needs of the inputs, the first of which is number `at` of the tensors.
DEVICE void load_step(char* step, const char* r, const char* w, const char* a, const char* b, i64 at,
                      i64 stride, int left) {
    const int W_BYTES = W_FP32 ? 4 : 2;
    load_rows(step + W_ROWS, w + at * W_BYTES, stride * W_BYTES, left, W_BYTES);
    load_rows(step + A, a + at * 2, stride * 2, left, 2);
    load_rows(step + R, r + at * 2, stride * 2, left, 2);
    load_rows(step + B, b + at * 2, stride * 2, left, 2);
}

// Sixteen tokens back: E after them is given, dy divided by E's scale.
DEVICE void step_back(char* step, Rows& E, const u32 dy[4]) {
    u32 b[4], high[4];
    float z[2][4] = {};
    times_channels(E, step_to_end(step, 0));
    rows_square(b, step + W + P_SQUARE);
    mma_pair(z, dy, b);
#pragma unroll
    for (int block = 0; block < N / 16; ++block) {
        u32 e[4], e_low[4];
        as_left_split(e, e_low, &E.s[2 * block]);
        columns_operand(b, step + MOVE_BACK, 0, block);
        mma_pair(z, e, b);
        if (INPUT_FP16) mma_pair(z, e_low, b);
    }
    as_left(high, z);
#pragma unroll
    for (int block = 0; block < N / 16; ++block) {
        rows_operand(b, step + R, 0, block);
        mma_pair(&E.s[2 * block], dy, b);
        rows_operand(b, step + A, 0, block);
        mma_pair(&E.s[2 * block], high, b);
    }
    times_channels(E, step_to_middle(step, 0));
}

// A chunk back: E is given and left divided by `scale`. `place(n)` is where the step lies that is walked
// as the n-th, the chunk's last one first, with dY's rows ROWS_AT behind; `done(n)` is called when it is read.
template <int ROWS_AT, class Place, class Done>
DEVICE void walk_chunk_back(Rows& E, float& scale, Place place, Done done) {
    u32 value[STEPS][4];
    float most = largest(E) * scale;
#pragma unroll
    for (int n = 0; n < STEPS; ++n) {
        left_transposed(value[n], place(n) + ROWS_AT, 0, first_row() / 16);
        most = fmaxf(most, largest_input(value[n]) * step_scales(place(n), 0)[0]);
    }
    rescale(E, scale, most);
#pragma unroll
    for (int n = 0; n < STEPS; ++n) {
        const float f = step_scales(place(n), 0)[0] * inverse_power(scale);
        u32 half[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            half[j] = pack_half(low_input(value[n][j]) * f, high_input(value[n][j]) * f);
        step_back(place(n), E, half);
        done(n);
    }
}
