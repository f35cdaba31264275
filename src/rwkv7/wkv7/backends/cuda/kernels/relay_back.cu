// The gradient of the state after every chunk, where sequences and heads are few: see relay.cuh.
//
// Slabs and what a slab has come last to first: a unit's number counts chunks from the slab's beginning all
// the same.
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
// walk_chunk_back.
DEVICE void walk_chunk_grouped(int from, Rows& E, float& scale) {
    const auto values_of = [=](int n, u32 dy[4]) {
        left_transposed(dy, place_of(from + n) + WALKED_ROWS, 0, first_row() / 16);
    };
    const auto factors_of = [=](int n) { return (const float*)(place_of(from + n) + OF_FACTORS); };
    u32 dy[4];
    float most = largest(E) * scale;
#pragma unroll
    for (int n = 0; n < STEPS; ++n) {
        values_of(n, dy);
        most = fmaxf(most, largest_input(dy) * factors_of(n)[2 * N]);
    }
    const float next = power_of_two(warp_max(most));
    times(E, scale * inverse_power(next));
    scale = next;
    Channels factors;
    read_channels(factors, factors_of(0) + N);
    values_of(0, dy);
#pragma unroll
    for (int n = 0; n < STEPS; ++n) {
        const char* step = place_of(from + n);
        const float f = factors_of(n)[2 * N] * inverse_power(scale);
        u32 e[N / 16][4], e_low[N / 16][4], high[4];
        float z[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) dy[i] = pack_half(low_input(dy[i]) * f, high_input(dy[i]) * f);
        times_channels(E, factors);
#pragma unroll
        for (int block = 0; block < N / 16; ++block)
            as_left_split(e[block], e_low[block], &E.s[2 * block]);
        begin_products();
        square_rows(z, dy, step + OF_P);
#pragma unroll
        for (int block = 0; block < N / 16; ++block) {
            add_columns(z, e[block], step + OF_W, block);
            if (INPUT_FP16) add_columns(z, e_low[block], step + OF_W, block);
        }
        end_products();
        add_rows(E.s, dy, step + OF_R);
        end_products();
        products_done<1>(z);
        as_left(high, z);
        begin_products();
        add_rows(E.s, high, step + OF_A);
        end_products();
        read_channels(factors, factors_of(n));
        if (n < STEPS - 1) {
            times_channels(factors, factors_of(n + 1) + N);
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
    const i64 stride = (i64)H * N;
    const int walkers = walked_to > walked_from ? pairs * BLOCKS : 0;
    if ((int)blockIdx.x >= walkers) {
        const i64 number = (i64)(blockIdx.x - walkers) * PREPARING + warp_id();
        const Unit unit = unit_of(number, prepared_from, prepared_to, pairs, H);
        if (!unit.exists) return;
        char* own = shared_memory + warp_id() * STEP_BYTES;
        const i64 at = ((i64)unit.s * T + unit.token) * stride + unit.h * N;
        load_step(own, r, w, a, b, at, stride, T - unit.token);
        rows_loaded(own, T - unit.token);
        prepare(own);
        keep_image(prepared + unit.image, own);
        return;
    }
    const int pair = blockIdx.x / BLOCKS, s = pair / H, h = pair % H;
    const int count = walked_to - walked_from, steps = count * STEPS, first = walked_from * CHUNK;
    const i64 at = ((i64)s * T + first) * stride + h * N;
    if (warp_id() >= WARPS) {
        const char* images = walked + (i64)pair * steps * IMAGE_BYTES;
        feed(steps, [&](int i) {
            const int n = steps - 1 - i, left = dy ? T - first - n * STEP : 0;
            fetch_step(place_of(i), images + (i64)n * IMAGE_BYTES,
                       dy + (dy ? 2 * (at + n * STEP * stride) : 0), 2 * stride, left);
        });
        return;
    }
    Rows E = {};
    float scale = 1;
    if (given) read_rows(E, given + (i64)pair * N * N);
    for (int i = 0; i < count; ++i) {
        const i64 index = ((i64)s * ((T + CHUNK - 1) / CHUNK) + walked_to - 1 - i) * H + h;
        write_rows(E, after + index * N * N, scale);
        wait_for_chunk();
#if HEAD == 64
        walk_chunk_grouped(i * STEPS, E, scale);
#else
        char* chunk = place_of(i * STEPS);  // its last step first
        const auto place = [=](int n) { return chunk + n * STEP_BYTES; };
        walk_chunk_back<WALKED_ROWS>(E, scale, place, [=](int n) { step_is_read(i * STEPS + n); });
#endif
    }
    write_rows(E, left_off + (i64)pair * N * N, scale);
}
