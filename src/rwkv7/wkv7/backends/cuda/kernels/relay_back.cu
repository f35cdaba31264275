// The gradient of the state after every chunk, where sequences and heads are few: see relay.cuh.
//
// Of backward's walk (backward.cu) what passes E on: Z = Pᵀ·dY + W_b·Eᵀ, E ← (E + dYᵀ·ρ + Zᵀ·α). A warp has
// 16 rows of E and divides them, and its rows of dYᵀ, by a power of two of its own. Slabs and what a slab
// has come last to first: a unit's number counts chunks from the slab's beginning all the same.
#define BACKWARD 1
#define BY_STEP 1
#define RELAY 1
#define WITH_R 1
#define WITH_K 0
#define WITH_MOVE 0
#include "relay.cuh"

// Starts copying what a step needs of the inputs.
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
        const i64 number = (i64)(blockIdx.x - walkers) * (2 * WARPS) + warp_id();
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
        char* chunk = place_of(i * STEPS);  // its last step first
        u32 value[STEPS][4];
        float most = largest(E) * scale;
#pragma unroll
        for (int n = 0; n < STEPS; ++n) {
            char* step = chunk + n * STEP_BYTES;
            left_transposed(value[n], step + WALKED_ROWS, 0, first_row() / 16);
            most = fmaxf(most, largest_input(value[n]) * step_scales(step, 0)[0]);
        }
        const float next = power_of_two(warp_max(most));
        times(E, scale * inverse_power(next));
        scale = next;
#pragma unroll
        for (int n = 0; n < STEPS; ++n) {
            char* step = chunk + n * STEP_BYTES;
            const float f = step_scales(step, 0)[0] * inverse_power(scale);
            u32 half[4];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                half[j] = pack_half(low_input(value[n][j]) * f, high_input(value[n][j]) * f);
            step_back(step, E, half);
            step_is_read(i * STEPS + n);
        }
    }
    write_rows(E, left_off + (i64)pair * N * N, scale);
}
