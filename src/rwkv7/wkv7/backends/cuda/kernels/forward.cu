// Forward: a walk over the chunks of a (sequence, head) with the state in registers, one block for every
// 64 rows of the state [V, K], which prepares a chunk, a warp a step, and walks it.
//
// The macro SAVE keeps the states before the chunks. See chunk.cuh for the operands.
#define BACKWARD 0
#define BY_STEP 1
#define RELAY 0
#define WITH_R 1
#define WITH_K 1
#define WITH_MOVE 1
#include "walk.cuh"

constexpr int FORWARD_BYTES = STEPS * STEP_BYTES;

#ifndef EMULATED
extern "C"
#endif
__global__ void __launch_bounds__(GROUP, 4 / BLOCKS)
wkv7_forward(const char* __restrict__ r, const char* __restrict__ w, const char* __restrict__ k,
             const char* __restrict__ v, const char* __restrict__ a, const char* __restrict__ b,
             const float* __restrict__ initial, char* __restrict__ y, float* __restrict__ final,
             char* __restrict__ states, float* __restrict__ states_scale,
             const i64* __restrict__ offsets, int T, int H) {
    const int pair = blockIdx.x / BLOCKS, s = pair / H, h = pair % H;
    const i64 start = PACKED ? offsets[s] : (i64)s * T;
    const int tokens = PACKED ? (int)(offsets[s + 1] - start) : T;
    const int chunks = (tokens + CHUNK - 1) / CHUNK;
    const i64 chunk = PACKED ? start / CHUNK + s : (i64)s * chunks;
    const i64 stride = (i64)H * N;
    char* own = shared_memory + warp_id() * STEP_BYTES;
    Rows state = {};
    float scale = 1;
    if (initial) read_rows(state, initial + (i64)pair * N * N);
    for (int n = 0; n < chunks; ++n) {
        const i64 at = (start + n * CHUNK) * stride + h * N;
        const int left = tokens - n * CHUNK, first = STEP * warp_id();
        load_step(own, r, w, k, a, b, at + first * stride, stride, left - first);
        const float most = warp_max(largest(state));
        if (SAVE) {
            const i64 index = (chunk + n) * H + h;
            save_rows(state, states + index * N * N * 2, states_scale + index * N, most, scale);
        }
        rows_loaded(own, left - first);
        prepare(own);
        sync_block();
        u32 value[STEPS][4];
#pragma unroll
        for (int i = 0; i < STEPS; ++i)
            read_values(value[i], v + 2 * (at + STEP * i * stride), 2 * stride, left - STEP * i);
        const auto values = [&](int i, u32 v[4]) {
#pragma unroll
            for (int j = 0; j < 4; ++j) v[j] = value[i][j];
        };
        walk_chunk(shared_memory, state, scale, most * scale, values, y + 2 * at, 2 * stride, left,
                   [](int) {});
        sync_block();  // before tiles are filled again
    }
    write_rows(state, final + (i64)pair * N * N, scale);
}
