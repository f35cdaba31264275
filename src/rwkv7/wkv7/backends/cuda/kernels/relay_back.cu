// The gradient of the state after every chunk, where sequences and heads are few: see relay.cuh.
#define BACKWARD 1
#define BY_STEP 1
#define RELAY 1
#define WITH_R 1
#define WITH_K 0
#define WITH_MOVE 0
#include "relay.cuh"
#include "walk_back.cuh"

#if HEAD == 64
// A chunk by a group, the last of whose steps is the one that is walked as number `from`; else as
// walk_chunk_back. `most`: the largest of E and of the chunk's dY; of the next chunk's dY when it is left,
// unless none of the `steps` is.
DEVICE void walk_chunk_grouped(int from, int steps, Rows& E, float& scale, float& most) {
    const auto values_of = [=](int n, u32 dy[4]) {
        left_transposed(dy, rows_of(from + n), 0, first_row() / 16);
    };
    u32 dy[4];
    rescale(E, scale, most);
    most = 0;
    Channels factors;
    read_channels(factors, factors_of(from) + N);
    values_of(0, dy);
#pragma unroll
    for (int n = 0; n < STEPS; ++n) {
        const Place step = place_at(place_of(from + n));
        const float f = factors_of(from + n)[2 * N] * inverse_power(scale);
        u32 e[N / 16][4], e_low[N / 16][4], high[4];
        float z[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) dy[i] = pack_half(low_input(dy[i]) * f, high_input(dy[i]) * f);
        times_channels(E, factors);
#pragma unroll
        for (int block = 0; block < N / 16; ++block)
            as_left_split(e[block], e_low[block], &E.s[2 * block]);
        wait_for_body(from + n);
        begin_products();
        add_rows<IN_SQUARES, true>(z, dy, step + OF_P);
#pragma unroll
        for (int block = 0; block < N / 16; ++block) {
            add_columns<IN_TILE, false>(z, e[block], step + OF_W, block);
            if (INPUT_FP16) add_columns<IN_TILE, false>(z, e_low[block], step + OF_W, block);
        }
        end_products();
        add_rows<IN_TILE, false>(E.s, dy, step + OF_R);
        end_products();
        products_done<1>(z);
        as_left(high, z);
        begin_products();
        add_rows<IN_TILE, false>(E.s, high, step + OF_A);
        end_products();
        if (from + STEPS + n < steps) most = fmaxf(most, largest_value(from + STEPS + n));
        read_channels(factors, factors_of(from + n));
        if (n < STEPS - 1) {
            times_channels(factors, factors_of(from + n + 1) + N);
            values_of(n + 1, dy);
        }
        products_done<0>(E.s);
        step_is_read(from + n);
    }
    times_channels(E, factors);
}
#endif

#ifndef EMULATED
extern "C"
#endif
__global__ void __launch_bounds__(2 * GROUP, N > 64 ? 1 : 2)
wkv7_relay_back(const char* __restrict__ r, const char* __restrict__ w, const char* __restrict__ a,
                const char* __restrict__ b, const char* __restrict__ dy, const float* given,
                float* left_off, float* __restrict__ after, const char* __restrict__ walked,
                char* __restrict__ prepared, int walked_from, int walked_to, int prepared_from,
                int prepared_to, int T, int H, int pairs) {
    const Slabs slabs = {walked, prepared, walked_from, walked_to, prepared_from, prepared_to, T, H, pairs};
    if ((int)blockIdx.x >= slabs.walkers()) {
        prepare_step(slabs, [=](char* own, i64 at, int left) {
            load_step(own, r, w, a, b, at, slabs.stride(), left);
        });
        return;
    }
    begin_ring();
    if (warp_id() >= WARPS) {
        copy_steps(slabs, dy, nullptr);
        return;
    }
    const int pair = blockIdx.x / BLOCKS, chunks = (T + CHUNK - 1) / CHUNK;
    Rows E = {};
    float scale = 1;
    if (given) read_rows(E, given + (i64)pair * N * N);
#if HEAD == 64
    float most = largest_values(0);
#endif
    for (int i = 0; i < walked_to - walked_from; ++i) {
        const i64 index = ((i64)(pair / H) * chunks + walked_to - 1 - i) * H + pair % H;
        write_rows(E, after + index * N * N, scale);
#if HEAD == 64
        most = fmaxf(most, largest(E) * scale);
        walk_chunk_grouped(i * STEPS, slabs.steps(), E, scale, most);
#else
        char* chunk = place_of(i * STEPS);  // its last step first
        wait_for_chunk(i);
        const auto place = [=](int n) { return chunk + n * STEP_BYTES; };
        walk_chunk_back<BODY>(E, scale, place, [=](int n) { step_is_read(i * STEPS + n); });
#endif
    }
    write_rows(E, left_off + (i64)pair * N * N, scale);
}
