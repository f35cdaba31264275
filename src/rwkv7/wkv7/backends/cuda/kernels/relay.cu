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

#ifndef EMULATED
extern "C"
#endif
__global__ void __launch_bounds__(2 * GROUP, N > 64 ? 1 : 2)
wkv7_relay(const char* __restrict__ r, const char* __restrict__ w, const char* __restrict__ k,
           const char* __restrict__ v, const char* __restrict__ a, const char* __restrict__ b,
           const float* given, char* __restrict__ y, float* left_off, u16* __restrict__ states,
           float* __restrict__ states_scale, const char* __restrict__ walked,
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
        if (SAVE) {
            const i64 index = ((i64)s * ((T + CHUNK - 1) / CHUNK) + walked_from + n) * H + h;
            save_rows(state, states + index * N * N, states_scale + index * N, scale);
        }
        wait_for_chunk();
        char* chunk = place_of(n * STEPS);
        const auto values = [=](int i, u32 value[4]) {
            left_transposed(value, chunk + i * STEP_BYTES + WALKED_ROWS, 0, first_row() / 16);
        };
        walk_chunk(chunk, state, scale, values, y + 2 * (at + n * CHUNK * stride), 2 * stride,
                   T - first - n * CHUNK, [=](int i) { step_is_read(n * STEPS + i); });
    }
    write_rows(state, left_off + (i64)pair * N * N, scale);
}
