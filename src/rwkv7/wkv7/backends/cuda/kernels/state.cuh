// The state in registers: a warp has 16 rows of the state [V, K].
#pragma once
#include "chunk.cuh"

#ifndef EMULATED
extern __shared__ __align__(128) char shared_memory[];
#endif

// Several blocks have the rows of one (sequence, head), where a block has too few warps for all.
constexpr int BLOCKS = N / (16 * WARPS);
// The first row of the warp's.
DEVICE int first_row() {
    return 16 * (BLOCKS == 1 ? warp_id() : blockIdx.x % BLOCKS * WARPS + warp_id());
}

// The warp's rows of the state: tiles [16, 8] side by side.
struct Rows {
    float s[N / 8][4];
};

// What a thread's elements of a row of the state are multiplied by.
struct Channels {
    float2 of[N / 8];
};
DEVICE void read_channels(Channels& factors, const float* from) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
        factors.of[n] = *(const float2*)(from + 8 * n + (lane_id() & 3) * 2);
}

DEVICE void times_channels(Rows& state, const Channels& factors) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
        const float2 f = factors.of[n];
        state.s[n][0] *= f.x, state.s[n][1] *= f.y, state.s[n][2] *= f.x, state.s[n][3] *= f.y;
    }
}
DEVICE void times_channels(Rows& state, const float* factor) {
    const int p = (lane_id() & 3) * 2;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
        const float2 f = *(const float2*)(factor + 8 * n + p);
        state.s[n][0] *= f.x, state.s[n][1] *= f.y, state.s[n][2] *= f.x, state.s[n][3] *= f.y;
    }
}
DEVICE void times_channels(Channels& factors, const float* others) {
    Channels read;
    read_channels(read, others);
#pragma unroll
    for (int n = 0; n < N / 8; ++n) factors.of[n].x *= read.of[n].x, factors.of[n].y *= read.of[n].y;
}
// The state after a step, referenced as the next one's: both factors at once.
DEVICE void times_channels(Rows& state, const Channels& one, const float* other) {
    Channels both;
    read_channels(both, other);
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
        const float x = one.of[n].x * both.of[n].x, y = one.of[n].y * both.of[n].y;
        state.s[n][0] *= x, state.s[n][1] *= y, state.s[n][2] *= x, state.s[n][3] *= y;
    }
}
DEVICE void times_channels(Rows& state, const float* one, const float* other) {
    const int p = (lane_id() & 3) * 2;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
        float2 f = *(const float2*)(one + 8 * n + p);
        const float2 g = *(const float2*)(other + 8 * n + p);
        f.x *= g.x, f.y *= g.y;
        state.s[n][0] *= f.x, state.s[n][1] *= f.y, state.s[n][2] *= f.x, state.s[n][3] *= f.y;
    }
}

DEVICE void times(Rows& state, float factor) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) state.s[n][i] *= factor;
}

// Divides the state, given divided by `scale`, by the power of two that `most` asks for.
DEVICE void rescale(Rows& state, float& scale, float most) {
    const float next = power_of_two(warp_max(most));
    times(state, scale * inverse_power(next));
    scale = next;
}

DEVICE float largest(const Rows& state) {
    float most[4] = {};  // four at a time: none waits for the one before
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) most[i] = fmaxf(most[i], fabsf(state.s[n][i]));
    return fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
}

// Where a thread has 16 bytes of the warp's rows in fp16, as saved states lie: elements [q][p], [q][p+1],
// [q+8][p], [q+8][p+1] of two tiles side by side.
DEVICE int saved_at(int pair) { return 16 * (N * first_row() / 8 + 32 * pair + lane_id()); }

// state [V, K] of fp32 in memory: to registers, and back.
DEVICE void read_rows(Rows& state, const float* from) {
    const int v = first_row() + (lane_id() >> 2), p = (lane_id() & 3) * 2;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
        const float2 top = *(const float2*)(from + v * N + 8 * n + p);
        const float2 bottom = *(const float2*)(from + (v + 8) * N + 8 * n + p);
        state.s[n][0] = top.x, state.s[n][1] = top.y;
        state.s[n][2] = bottom.x, state.s[n][3] = bottom.y;
    }
}
DEVICE void write_rows(const Rows& state, float* to, float scale) {
    const int v = first_row() + (lane_id() >> 2), p = (lane_id() & 3) * 2;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
        float2 top = {state.s[n][0] * scale, state.s[n][1] * scale};
        float2 bottom = {state.s[n][2] * scale, state.s[n][3] * scale};
        *(float2*)(to + v * N + 8 * n + p) = top;
        *(float2*)(to + (v + 8) * N + 8 * n + p) = bottom;
    }
}

DEVICE float largest_input(const u32 v[4]) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) most = max_pair(most, v[i] & SIGNLESS);
    return fmaxf(low_input(most), high_input(most));
}
