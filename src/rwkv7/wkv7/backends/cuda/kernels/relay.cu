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
// A chunk by a group, the first of whose steps is number `from`; else as walk_chunk. A step's y is written
// while the next one's products are under way.
DEVICE void walk_chunk_grouped(int from, Rows& state, float& scale, float most, char* y, i64 stride,
                               int left) {
    const auto values_of = [=](int n, u32 v[4]) {
        left_transposed(v, place_of(from + n) + WALKED_ROWS, 0, first_row() / 16);
    };
    const auto scales_of = [=](int n) { return (const float*)(place_of(from + n) + OF_FACTORS) + 2 * N; };
    u32 v[4], out[4];
#pragma unroll
    for (int n = 0; n < STEPS; ++n) {
        values_of(n, v);
        most = fmaxf(most, largest_input(v) * scales_of(n)[1]);
    }
    const float next = power_of_two(warp_max(most));
    times(state, scale * inverse_power(next));
    scale = next;
    Channels factors;
    read_channels(factors, (const float*)(place_of(from) + OF_FACTORS));
    values_of(0, v);
#pragma unroll
    for (int n = 0; n < STEPS; ++n) {
        const char* step = place_of(from + n);
        const float f = scales_of(n)[1] * inverse_power(scale);
        u32 s[N / 16][4], high[4];
        float d[4][4];  // yᵀ, uᵀ
        float(&of_y)[2][4] = *(float(*)[2][4])d;
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = pack_half(low_input(v[i]) * f, high_input(v[i]) * f);
        times_channels(state, factors);
#pragma unroll
        for (int block = 0; block < N / 16; ++block) as_left(s[block], &state.s[2 * block]);
        begin_products();
        add_square_columns<true>(d, v, step + OF_VALUES);
#pragma unroll
        for (int block = 0; block < N / 16; ++block) add_columns(d, s[block], step + OF_R, block);
        end_products();
        add_rows(state.s, v, step + OF_K), add_rows(state.s, v, step + OF_K_LOW);
        end_products();
        if (n > 0) write_values(y + STEP * (n - 1) * stride, out, stride, left - STEP * (n - 1));
        products_done<1>(d);
        as_left(high, &d[2]);
        begin_products();
        add_rows(state.s, high, step + OF_B), add_rows(state.s, high, step + OF_B_LOW);
        end_products();
        add_square_columns<false>(of_y, high, step + OF_RB);
        end_products();
        read_channels(factors, (const float*)(step + OF_FACTORS) + N);
        if (n < STEPS - 1) {
            times_channels(factors, (const float*)(place_of(from + n + 1) + OF_FACTORS));
            values_of(n + 1, v);
        }
        const float of_out = scales_of(n)[0] * scale;
        products_done<0>(of_y);
        products_done<0>(state.s);
        step_is_read(from + n);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            out[i] = pack_input(of_y[i >> 1][(i & 1) * 2] * of_out, of_y[i >> 1][(i & 1) * 2 + 1] * of_out);
    }
    write_values(y + STEP * (STEPS - 1) * stride, out, stride, left - STEP * (STEPS - 1));
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
    const i64 stride = (i64)H * N;
    const int walkers = walked_to > walked_from ? pairs * BLOCKS : 0;
    if ((int)blockIdx.x >= walkers) {
        const i64 number = (i64)(blockIdx.x - walkers) * PREPARING + warp_id();
        const Unit unit = unit_of(number, prepared_from, prepared_to, pairs, H);
        if (!unit.exists) return;
        char* own = shared_memory + warp_id() * STEP_BYTES;
        const i64 at = ((i64)unit.s * T + unit.token) * stride + unit.h * N;
        load_step(own, r, w, k, a, b, at, stride, T - unit.token);
        rows_loaded(own, T - unit.token);
        prepare(own);
        keep_image(prepared + unit.image, own);
        return;
    }
    const int pair = blockIdx.x / BLOCKS, s = pair / H, h = pair % H;
    const int count = walked_to - walked_from, first = walked_from * CHUNK;
    const i64 at = ((i64)s * T + first) * stride + h * N;
    if (warp_id() >= WARPS) {
        const char* images = walked + (i64)pair * count * STEPS * IMAGE_BYTES;
        feed(count * STEPS, [&](int n) {
            fetch_step(place_of(n), images + (i64)n * IMAGE_BYTES, v + 2 * (at + n * STEP * stride),
                       2 * stride, T - first - n * STEP);
        });
        return;
    }
    Rows state = {};
    float scale = 1;
    if (given) read_rows(state, given + (i64)pair * N * N);
    for (int n = 0; n < count; ++n) {
        const float most = warp_max(largest(state));
        if (SAVE) {
            const i64 index = ((i64)s * ((T + CHUNK - 1) / CHUNK) + walked_from + n) * H + h;
            save_rows(state, states + index * N * N * 2, states_scale + index * N, most, scale);
        }
        wait_for_chunk();
        char* to = y + 2 * (at + n * CHUNK * stride);
        const int rest = T - first - n * CHUNK;
#if HEAD == 64
        walk_chunk_grouped(n * STEPS, state, scale, most * scale, to, 2 * stride, rest);
#else
        char* chunk = place_of(n * STEPS);
        const auto values = [=](int i, u32 value[4]) {
            left_transposed(value, chunk + i * STEP_BYTES + WALKED_ROWS, 0, first_row() / 16);
        };
        walk_chunk(chunk, state, scale, most * scale, values, to, 2 * stride, rest,
                   [=](int i) { step_is_read(n * STEPS + i); });
#endif
    }
    write_rows(state, left_off + (i64)pair * N * N, scale);
}
