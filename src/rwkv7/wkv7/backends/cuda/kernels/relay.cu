// Forward where sequences and heads are few: see relay.cuh.
//
// The macro SAVE keeps the states before the chunks.
#define BACKWARD 0
#define BY_STEP 1
#define RELAY 1
#define WITH_R 1
#define WITH_K 1
#define WITH_MOVE 1
#include "relay.cuh"
#include "walk.cuh"

#if HEAD == 64
// A chunk by a group, the first of whose steps is number `from`; else as walk_chunk. A step's y takes the
// place of its v. `most`: the largest of the state and of the chunk's values; of the next chunk's when it is
// left, unless none of the `steps` is.
DEVICE void walk_chunk_grouped(int from, int steps, Rows& state, float& scale, float& most) {
    const auto values_of = [=](int n, u32 v[4]) {
        left_transposed(v, rows_of(from + n), 0, first_row() / 16);
    };
    const auto scales_of = [=](int n) { return factors_of(from + n) + 2 * N; };
    u32 v[4];
    rescale(state, scale, most);
    most = 0;
    Channels factors;
    read_channels(factors, factors_of(from));
    values_of(0, v);
#pragma unroll 1
    for (int n = 0; n < STEPS; ++n) {
        const Place step = place_at(place_of(from + n));
        const float f = scales_of(n)[1] * inverse_power(scale);
        u32 s[N / 16][4], high[4], out[4];
        float d[4][4], of_y[2][4];  // yᵀ, uᵀ
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = pack_half(low_input(v[i]) * f, high_input(v[i]) * f);
        times_channels(state, factors);
#pragma unroll
        for (int block = 0; block < N / 16; ++block) as_left(s[block], &state.s[2 * block]);
        wait_for_body(from + n);
        begin_products();
        add_columns<IN_SQUARES, true>(d, v, step + OF_VALUES);
#pragma unroll
        for (int block = 0; block < N / 16; ++block) add_columns<IN_TILE, false>(d, s[block], step + OF_R, block);
        end_products();
        add_rows<IN_TILE, false>(state.s, v, step + OF_K);
        add_rows<IN_TILE, false>(state.s, v, step + OF_K_LOW);
        end_products();
        products_done<1>(d);
        as_left(high, &d[2]);
#pragma unroll
        for (int i = 0; i < 8; ++i) of_y[i >> 2][i & 3] = d[i >> 2][i & 3];
        begin_products();
        add_columns<IN_SQUARES, false>(of_y, high, step + OF_RB);
        end_products();
        add_rows<IN_TILE, false>(state.s, high, step + OF_B);
        add_rows<IN_TILE, false>(state.s, high, step + OF_B_LOW);
        end_products();
        if (from + STEPS + n < steps) most = fmaxf(most, largest_value(from + STEPS + n));
        const float of_out = scales_of(n)[0] * scale;
        products_done<1>(of_y);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            out[i] = pack_input(of_y[i >> 1][(i & 1) * 2] * of_out, of_y[i >> 1][(i & 1) * 2 + 1] * of_out);
        store_transposed(rows_of(from + n), 0, first_row() / 16, out);
        read_channels(factors, factors_of(from + n) + N);
        if (n < STEPS - 1) {
            times_channels(factors, factors_of(from + n + 1));
            values_of(n + 1, v);
        }
        products_done<0>(state.s);
        step_is_read(from + n);
    }
    times_channels(state, factors);
}
#endif

#ifndef EMULATED
extern "C"
#endif
__global__ void __launch_bounds__(2 * GROUP, N > 64 ? 1 : 2)
wkv7_relay(const char* __restrict__ r, const char* __restrict__ w, const char* __restrict__ k,
           const char* __restrict__ v, const char* __restrict__ a, const char* __restrict__ b,
           const float* given, char* __restrict__ y, float* left_off, char* __restrict__ states,
           float* __restrict__ states_scale, const char* __restrict__ walked,
           char* __restrict__ prepared, int walked_from, int walked_to, int prepared_from,
           int prepared_to, int T, int H, int pairs) {
    const Slabs slabs = {walked, prepared, walked_from, walked_to, prepared_from, prepared_to, T, H, pairs};
    if ((int)blockIdx.x >= slabs.walkers()) {
        prepare_step(slabs, [=](char* own, i64 at, int left) {
            load_step(own, r, w, k, a, b, at, slabs.stride(), left);
        });
        return;
    }
    begin_ring();
    if (warp_id() >= WARPS) {
        copy_steps(slabs, v, GROUPED ? y : nullptr);
        return;
    }
    const int pair = blockIdx.x / BLOCKS, chunks = (T + CHUNK - 1) / CHUNK;
    Rows state = {};
    float scale = 1;
    if (given) read_rows(state, given + (i64)pair * N * N);
#if HEAD == 64
    float values_most = largest_values(0);
#endif
    for (int n = 0; n < walked_to - walked_from; ++n) {
        const float most = warp_max(largest(state));
        if (SAVE) {
            const i64 index = ((i64)(pair / H) * chunks + walked_from + n) * H + pair % H;
            save_rows(state, states + index * N * N * 2, states_scale + index * N, most, scale);
        }
#if HEAD == 64
        values_most = fmaxf(values_most, most * scale);
        walk_chunk_grouped(n * STEPS, slabs.steps(), state, scale, values_most);
#else
        const int token = slabs.token(n * STEPS);
        char *chunk = place_of(n * STEPS), *to = y + 2 * slabs.at(pair, token);
        wait_for_chunk(n);
        const auto values = [=](int i, u32 value[4]) {
            left_transposed(value, chunk + i * STEP_BYTES + BODY, 0, first_row() / 16);
        };
        walk_chunk(chunk, state, scale, most * scale, values, to, 2 * slabs.stride(), T - token,
                   [=](int i) { step_is_read(n * STEPS + i); });
#endif
    }
    write_rows(state, left_off + (i64)pair * N * N, scale);
}
