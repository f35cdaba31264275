// Forward: a walk over the chunks of a (sequence, head) with the state in registers, one block for every
// 64 rows of the state [V, K].
//
// A warp has 16 of them and no business with the others': a product's fragment is the next product's
// operand. See chunk.cuh for the operands.
// The macro SAVE keeps the states before the chunks. OUTPUT 0 leaves y out: what a segment does to the
// empty state. VALUES 0 leaves v out too and starts from the identity: what it does to any other.
// PIPELINED 1 is for few sequences and heads: a block has four more warps, which prepare the next chunk
// in a buffer of its own while the first four walk.
#define BACKWARD 0
#define WITH_R OUTPUT
#define WITH_K VALUES
#define WITH_MOVE 1
#include "state.cuh"

constexpr int FORWARD_BYTES = (1 + PIPELINED) * PREPARED_BYTES;

// The state before a chunk, for the backward pass: fp16, a power of two a row, or 0 for a row
// of zeros.
DEVICE void save_rows(const Rows& state, u16* states, float* scales, float scale) {
    const int v = first_row() + (lane_id() >> 2), p = (lane_id() & 3) * 2;
    float top = 0, bottom = 0;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
        top = fmaxf(top, fmaxf(fabsf(state.s[n][0]), fabsf(state.s[n][1])));
        bottom = fmaxf(bottom, fmaxf(fabsf(state.s[n][2]), fabsf(state.s[n][3])));
    }
    top = row_max(top), bottom = row_max(bottom);
    const bool some_top = top > 0, some_bottom = bottom > 0;
    top = power_of_two(top), bottom = power_of_two(bottom);
    const float i = inverse_power(top), j = inverse_power(bottom);
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
        *(u32*)(states + v * N + 8 * n + p) = pack_half(state.s[n][0] * i, state.s[n][1] * i);
        *(u32*)(states + (v + 8) * N + 8 * n + p) = pack_half(state.s[n][2] * j, state.s[n][3] * j);
    }
    if ((lane_id() & 3) != 0) return;
    scales[v] = some_top ? top * scale : 0.0f, scales[v + 8] = some_bottom ? bottom * scale : 0.0f;
}

DEVICE void identity(Rows& state) {
    const int v = first_row() + (lane_id() >> 2), p = (lane_id() & 3) * 2;
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            state.s[n][i] = v + (i & 2) * 4 == 8 * n + p + (i & 1) ? 1.0f : 0.0f;
}

// The warp's channels of v for the tokens of a step, as the left operand Vᵀ; and y the same way back.
// q tokens of the first half lie `left` from the end, those of the second eight further.
DEVICE void read_values(u32 v[4], const char* from, i64 stride, int left) {
    const int q = lane_id() >> 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int token = q + (i >> 1) * 8;
        u32 x = 0;
        if (token < left) x = *(const u32*)(from + token * stride + (i & 1) * 16);
        v[i] = transpose_tile(x);
    }
}
DEVICE void write_values(char* to, const u32 y[4], i64 stride, int left) {
    const int q = lane_id() >> 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int token = q + (i >> 1) * 8;
        const u32 x = transpose_tile(y[i]);
        if (token < left) *(u32*)(to + token * stride + (i & 1) * 16) = x;
    }
}

// Sixteen tokens: yᵀ, times `scale`; the state moves on.
DEVICE void walk_step(char* shared, int step, Rows& state, const u32 v[4], u32 out[4], float scale) {
    const int first = STEP * step;
    const char* squares = step_squares(shared, step);
    u32 b[4], c[4], high[4], low[4];
    float u[2][4] = {}, y[2][4] = {};
    if (VALUES) {
        columns_square(b, squares);
        mma_pair(u, v, b);
    }
    if (OUTPUT) {
        columns_square(b, squares + SQUARE);
        mma_pair(y, v, b);
    }
#pragma unroll
    for (int block = 0; block < N / 16; ++block) {
        u32 s[4];
        as_left(s, &state.s[2 * block]);
        columns_operand(b, shared + MOVE, first, block);
        mma_pair(u, s, b);
        if (OUTPUT) {
            columns_operand(b, shared + R, first, block);
            mma_pair(y, s, b);
        }
    }
    as_left(high, u);
    if (OUTPUT) {
        columns_square(b, squares + 2 * SQUARE);
        mma_pair(y, high, b);
    }
#pragma unroll
    for (int block = 0; block < N / 16; ++block) {
        rows_operand(b, shared + B, first, block);
        mma_pair(&state.s[2 * block], high, b);
        rows_operand(low, shared + LOWS, first, block);
        take_lows(b, c, low);
        mma_pair(&state.s[2 * block], high, c);
        if (VALUES) {
            mma_pair(&state.s[2 * block], v, b);
            rows_operand(b, shared + K, first, block);
            mma_pair(&state.s[2 * block], v, b);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        out[i] = pack_input(y[i >> 1][(i & 1) * 2] * scale, y[i >> 1][(i & 1) * 2 + 1] * scale);
}

// A chunk: the state is given and left divided by `scale`, a power of two of the warp's own.
DEVICE void walk_chunk(char* shared, Rows& state, float& scale, const char* v, char* y, i64 stride,
                       int left) {
    const int at = 2 * (first_row() + (lane_id() & 3) * 2);
    u32 value[STEPS][4];
    float most = largest(state) * scale;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        if (!VALUES) break;
        read_values(value[step], v + at + STEP * step * stride, stride, left - STEP * step);
        most = fmaxf(most, largest_input(value[step]) * step_scales(shared, step)[1]);
    }
    const float next = power_of_two(warp_max(most));
    times(state, scale * inverse_power(next));
    scale = next;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const float* scales = step_scales(shared, step);
        const float f = scales[1] * inverse_power(scale);
        u32 half[4] = {}, out[4];
#pragma unroll
        for (int i = 0; i < (VALUES ? 4 : 0); ++i)
            half[i] = pack_half(low_input(value[step][i]) * f, high_input(value[step][i]) * f);
        if (step == 0)
            times_channels(state, step_to_middle(shared, 0));
        else
            times_channels(state, step_to_end(shared, step - 1), step_to_middle(shared, step));
        walk_step(shared, step, state, half, out, scales[0] * scale);
        if (OUTPUT) write_values(y + at + STEP * step * stride, out, stride, left - STEP * step);
    }
    times_channels(state, step_to_end(shared, STEPS - 1));
}

#ifndef EMULATED
extern "C"
#endif
__global__ void __launch_bounds__((1 + PIPELINED) * GROUP, (W_FP32 ? 3 : 4) / (BLOCKS + PIPELINED))
wkv7_forward(const char* __restrict__ r, const char* __restrict__ w, const char* __restrict__ k,
             const char* __restrict__ v, const char* __restrict__ a, const char* __restrict__ b,
             const float* __restrict__ initial, char* __restrict__ y, float* __restrict__ final,
             u16* __restrict__ states, float* __restrict__ states_scale,
             const i64* __restrict__ offsets, int T, int H) {
    const int pair = blockIdx.x / BLOCKS, s = pair / H, h = pair % H;
    const i64 start = PACKED ? offsets[s] : (i64)s * T;
    const int tokens = PACKED ? (int)(offsets[s + 1] - start) : T;
    const int chunks = (tokens + CHUNK - 1) / CHUNK;
    const i64 chunk = PACKED ? start / CHUNK + s : (i64)s * chunks;
    const bool walks = !PIPELINED || warp_id() < 4, prepares = !PIPELINED || !walks;
    const i64 stride = (i64)H * N, W_BYTES = W_FP32 ? 4 : 2;
    Rows state = {};
    float scale = 1;
    if (!VALUES) identity(state);
    if (initial && walks) read_rows(state, initial + (i64)pair * N * N);
    for (int n = 0; n < chunks + PIPELINED; ++n) {
        const int walked = n - PIPELINED;
        if (prepares && n < chunks) {
            const i64 at = (start + n * CHUNK) * stride + h * N;
            const int left = tokens - n * CHUNK;
            char* shared = shared_memory + (n & PIPELINED) * PREPARED_BYTES;
            load_rows(shared + W, w + at * W_BYTES, stride * W_BYTES, left, (int)W_BYTES);
            load_rows(shared + A, a + at * 2, stride * 2, left, 2);
            if (OUTPUT) load_rows(shared + R, r + at * 2, stride * 2, left, 2);
            if (VALUES) load_rows(shared + K, k + at * 2, stride * 2, left, 2);
            load_rows(shared + B, b + at * 2, stride * 2, left, 2);
        }
        if (SAVE && walks && walked >= 0) {
            const i64 index = (chunk + walked) * H + h;
            save_rows(state, states + index * N * N, states_scale + index * N, scale);
        }
        if (prepares && n < chunks) {
            char* shared = shared_memory + (n & PIPELINED) * PREPARED_BYTES;
            rows_loaded(shared, tokens - n * CHUNK);
            prepare(shared);
        }
        if (!PIPELINED) sync_block();
        if (walks && walked >= 0) {
            const i64 at = (start + walked * CHUNK) * stride + h * N;
            char* shared = shared_memory + (walked & PIPELINED) * PREPARED_BYTES;
            walk_chunk(shared, state, scale, v + at * 2, y + at * 2, stride * 2,
                       tokens - walked * CHUNK);
        }
        sync_block();  // before tiles are filled again
    }
    if (walks) write_rows(state, final + (i64)pair * N * N, scale);
}
