// The walk forward: a chunk's tokens with the state in registers, a warp 16 of its rows.
//
// It has no business with the other warps' rows: a product's fragment is the next product's operand.
// Every step lies by itself in shared memory, STEP_BYTES behind the one before.
#pragma once
#include "state.cuh"

// Starts copying a step's inputs, the first of which is number `at` of the tensors; stride: from one
// token to the next.
DEVICE void load_step(char* step, const char* r, const char* w, const char* k, const char* a,
                      const char* b, i64 at, i64 stride, int left) {
    const int W_BYTES = W_FP32 ? 4 : 2;
    load_rows(step + W_ROWS, w + at * W_BYTES, stride * W_BYTES, left, W_BYTES);
    load_rows(step + A, a + at * 2, stride * 2, left, 2);
    if (WITH_R) load_rows(step + R, r + at * 2, stride * 2, left, 2);
    load_rows(step + K, k + at * 2, stride * 2, left, 2);
    load_rows(step + B, b + at * 2, stride * 2, left, 2);
}

// The state before a chunk, for the backward pass: fp16, its rows divided by a power of two of the warp's, 0
// for rows of zeros. `most`: the largest of the state, given divided by `scale`.
DEVICE void save_rows(const Rows& state, char* states, float* scales, float most, float scale) {
    const float power = power_of_two(most), f = inverse_power(power);
#pragma unroll
    for (int i = 0; i < N / 16; ++i) {
        const float *x = state.s[2 * i], *y = state.s[2 * i + 1];
        *(uint4*)(states + saved_at(i)) = {pack_half(x[0] * f, x[1] * f), pack_half(x[2] * f, x[3] * f),
                                           pack_half(y[0] * f, y[1] * f), pack_half(y[2] * f, y[3] * f)};
    }
    if (lane_id() < 16) scales[first_row() + lane_id()] = most > 0 ? power * scale : 0.0f;
}

// The warp's channels of v for the tokens of a step, as the left operand Vᵀ; and y the same way back.
// q tokens of the first half lie `left` from the end, those of the second eight further.
DEVICE void read_values(u32 v[4], const char* step, i64 stride, int left) {
    const int q = lane_id() >> 2;
    const char* from = step + 2 * (first_row() + (lane_id() & 3) * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int token = q + (i >> 1) * 8;
        u32 x = 0;
        if (token < left) x = *(const u32*)(from + token * stride + (i & 1) * 16);
        v[i] = transpose_tile(x);
    }
}
DEVICE void write_values(char* step, const u32 y[4], i64 stride, int left) {
    const int q = lane_id() >> 2;
    char* to = step + 2 * (first_row() + (lane_id() & 3) * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int token = q + (i >> 1) * 8;
        const u32 x = transpose_tile(y[i]);
        if (token < left) *(u32*)(to + token * stride + (i & 1) * 16) = x;
    }
}

// Sixteen tokens: yᵀ, times `scale`; the state moves on. What v adds to the state comes before what
// waits for U.
DEVICE void walk_step(const char* step, Rows& state, const u32 v[4], u32 out[4], float scale) {
    const char* squares = step + W;
    u32 b[4], b_low[N / 16][4], high[4];
    float u[2][4] = {}, y[2][4] = {};
    columns_square(b, squares);
    mma_pair(u, v, b);
    columns_square(b, squares + SQUARE);
    mma_pair(y, v, b);
#pragma unroll
    for (int block = 0; block < N / 16; ++block) {
        u32 s[4];
        as_left(s, &state.s[2 * block]);
        columns_operand(b, step + MOVE, 0, block);
        mma_pair(u, s, b);
        columns_operand(b, step + R, 0, block);
        mma_pair(y, s, b);
    }
#pragma unroll
    for (int block = 0; block < N / 16; ++block) {
        u32 low[4];
        rows_operand(b, step + K, 0, block);
        mma_pair(&state.s[2 * block], v, b);
        rows_operand(low, step + LOWS, 0, block);
        take_lows(b, b_low[block], low);
        mma_pair(&state.s[2 * block], v, b);
    }
    as_left(high, u);
#pragma unroll
    for (int block = 0; block < N / 16; ++block) {
        rows_operand(b, step + B, 0, block);
        mma_pair(&state.s[2 * block], high, b);
        mma_pair(&state.s[2 * block], high, b_low[block]);
    }
    columns_square(b, squares + 2 * SQUARE);
    mma_pair(y, high, b);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        out[i] = pack_input(y[i >> 1][(i & 1) * 2] * scale, y[i >> 1][(i & 1) * 2 + 1] * scale);
}

// A chunk: the state is given and left divided by `scale`, a power of two of the warp's own; `most` is its
// largest number, not divided. y: the chunk's first token. `values(n, v)` gives the warp's channels of step n's v; `done(n)` is called when it is read.
template <class Values, class Done>
DEVICE void walk_chunk(char* shared, Rows& state, float& scale, float most, Values values, char* y,
                       i64 stride, int left, Done done) {
#pragma unroll
    for (int n = 0; n < STEPS; ++n) {
        u32 value[4];
        values(n, value);
        most = fmaxf(most, largest_input(value) * step_scales(shared + n * STEP_BYTES, 0)[1]);
    }
    rescale(state, scale, most);
    Channels decay;
#pragma unroll
    for (int n = 0; n < STEPS; ++n) {
        char* step = shared + n * STEP_BYTES;
        const float* scales = step_scales(step, 0);
        const float f = scales[1] * inverse_power(scale);
        u32 half[4], out[4];
        values(n, half);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            half[i] = pack_half(low_input(half[i]) * f, high_input(half[i]) * f);
        if (n == 0)
            times_channels(state, step_to_middle(step, 0));
        else
            times_channels(state, decay, step_to_middle(step, 0));
        walk_step(step, state, half, out, scales[0] * scale);
        read_channels(decay, step_to_end(step, 0));
        done(n);
        write_values(y + STEP * n * stride, out, stride, left - STEP * n);
    }
    times_channels(state, decay);
}
