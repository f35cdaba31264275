// From segment to segment: what is handed on, when each segment's map M and what it adds are known.
//
// Forward (BACK 0): the state before every segment, S ← S·M + B. Backward (BACK 1): the gradient of
// the state after every segment, E ← E·Mᵀ + F. One block a (sequence, head), fp32 throughout.
// Every array is [sequences · segments, H, N, N], but for `given`, [sequences, H, N, N] or null.
#define BACKWARD 0
#define BY_STEP 1
#define RELAY 0
#define WITH_R 0
#define WITH_K 0
#define WITH_MOVE 0
#include "state.cuh"

constexpr int PITCH = N + 1;  // floats; a column's elements then lie in different banks
constexpr int CHAIN_BYTES = 2 * N * PITCH * 4;
constexpr int CHAIN_THREADS = 2 * N;  // 4 rows, every eighth column each

#ifndef EMULATED
extern "C"
#endif
__global__ void __launch_bounds__(CHAIN_THREADS)
wkv7_chain(const float* __restrict__ maps, const float* __restrict__ added,
           const float* __restrict__ given, float* __restrict__ handed, int segments, int H) {
    float *x = (float*)shared_memory, *m = x + N * PITCH;
    const int s = blockIdx.x / H, h = blockIdx.x % H, size = N * N;
    const int row = threadIdx.x >> 3 << 2, column = threadIdx.x & 7;
    for (int i = threadIdx.x; i < size; i += CHAIN_THREADS)
        x[i / N * PITCH + i % N] = given ? given[(i64)blockIdx.x * size + i] : 0.0f;
    sync_block();
    for (int n = 0; n < segments; ++n) {
        const i64 at = ((i64)(s * segments + (BACK ? segments - 1 - n : n)) * H + h) * size;
        for (int i = threadIdx.x; i < size; i += CHAIN_THREADS) {
            const int to = i / N * PITCH + i % N;
            handed[at + i] = x[to];
            m[to] = maps[at + i];
        }
        sync_block();
        float sum[4][N / 8];
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < N / 8; ++j) sum[i][j] = added[at + (row + i) * N + column + 8 * j];
#pragma unroll 4
        for (int c = 0; c < N; ++c)
#pragma unroll
            for (int j = 0; j < N / 8; ++j) {
                const int other = column + 8 * j;
                const float y = BACK ? m[other * PITCH + c] : m[c * PITCH + other];
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[i][j] += x[(row + i) * PITCH + c] * y;
            }
        sync_block();
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < N / 8; ++j) x[(row + i) * PITCH + column + 8 * j] = sum[i][j];
        sync_block();
    }
}
