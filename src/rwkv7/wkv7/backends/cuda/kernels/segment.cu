// What a segment does to any state, S → S·M + B, in one walk: one block for 64 rows of both.
//
// M is what is left of the identity when v is left out, B what v adds to the empty state. A step's
// operands are read once for the two, and neither waits for the other.
#define BACKWARD 0
#define BY_STEP 1
#define RELAY 0
#define WITH_R 0
#define WITH_K 1
#define WITH_MOVE 1
#include "walk.cuh"

constexpr int SEGMENT_BYTES = STEPS * STEP_BYTES;
constexpr int VALUES = R;  // v takes the room of r, which has no part in this

DEVICE void identity(Rows& state) {
    const int v = first_row() + (lane_id() >> 2), p = (lane_id() & 3) * 2;
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            state.s[n][i] = v + (i & 2) * 4 == 8 * n + p + (i & 1) ? 1.0f : 0.0f;
}

// Sixteen tokens.
DEVICE void pass_step(const char* step, Rows& map, Rows& added, const u32 v[4]) {
    u32 b[4], high[4], high_map[4];
    float u[2][4] = {}, u_map[2][4] = {};
    columns_square(b, step + W);
    mma_pair(u, v, b);
#pragma unroll
    for (int block = 0; block < N / 16; ++block) {
        u32 s[4];
        columns_operand(b, step + MOVE, 0, block);
        as_left(s, &added.s[2 * block]);
        mma_pair(u, s, b);
        as_left(s, &map.s[2 * block]);
        mma_pair(u_map, s, b);
    }
    as_left(high, u), as_left(high_map, u_map);
#pragma unroll
    for (int block = 0; block < N / 16; ++block) {
        u32 low[4], b_low[4];
        rows_operand(b, step + K, 0, block);
        mma_pair(&added.s[2 * block], v, b);
        rows_operand(low, step + LOWS, 0, block);
        take_lows(b, b_low, low);
        mma_pair(&added.s[2 * block], v, b);
        rows_operand(b, step + B, 0, block);
        mma_pair(&map.s[2 * block], high_map, b);
        mma_pair(&added.s[2 * block], high, b);
        mma_pair(&map.s[2 * block], high_map, b_low);
        mma_pair(&added.s[2 * block], high, b_low);
    }
}

#ifndef EMULATED
extern "C"
#endif
__global__ void __launch_bounds__(GROUP, BLOCKS == 1 ? 3 : 2)
wkv7_segment(const char* __restrict__ w, const char* __restrict__ k, const char* __restrict__ v,
             const char* __restrict__ a, const char* __restrict__ b, float* __restrict__ maps,
             float* __restrict__ adds, const i64* __restrict__ offsets, int H) {
    const int pair = blockIdx.x / BLOCKS, s = pair / H, h = pair % H;
    const i64 start = offsets[s], stride = (i64)H * N;
    const int tokens = (int)(offsets[s + 1] - start);
    char* own = shared_memory + warp_id() * STEP_BYTES;
    Rows map, added = {};
    float map_scale = 1, scale = 1;
    identity(map);
    for (int n = 0; n < tokens; n += CHUNK) {
        const int first = n + STEP * warp_id();
        const i64 at = (start + first) * stride + h * N;
        load_step(own, nullptr, w, k, a, b, at, stride, tokens - first);
        load_rows(own + VALUES, v + at * 2, stride * 2, tokens - first, 2);
        rows_loaded(own, tokens - first);
        prepare(own);
        sync_block();
        u32 value[4];
        float most = largest(added) * scale;
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            char* step = shared_memory + i * STEP_BYTES;
            left_transposed(value, step + VALUES, 0, first_row() / 16);
            most = fmaxf(most, largest_input(value) * step_scales(step, 0)[1]);
        }
        rescale(added, scale, most);
        rescale(map, map_scale, largest(map) * map_scale);
#pragma unroll 1
        for (int i = 0; i < STEPS; ++i) {
            char* step = shared_memory + i * STEP_BYTES;
            const float f = step_scales(step, 0)[1] * inverse_power(scale);
            left_transposed(value, step + VALUES, 0, first_row() / 16);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                value[j] = pack_half(low_input(value[j]) * f, high_input(value[j]) * f);
            Channels factors;
            read_channels(factors, step_to_middle(step, 0));
            times_channels(map, factors), times_channels(added, factors);
            pass_step(step, map, added, value);
            read_channels(factors, step_to_end(step, 0));
            times_channels(map, factors), times_channels(added, factors);
        }
        sync_block();  // before tiles are filled again
    }
    write_rows(map, maps + (i64)pair * N * N, map_scale);
    write_rows(added, adds + (i64)pair * N * N, scale);
}
