// What a segment's own y hands back: the gradient of the state before it if none reaches the one after it,
// one block for 64 of its rows.
#define BACKWARD 1
#define BY_STEP 1
#define RELAY 0
#define WITH_R 1
#define WITH_K 0
#define WITH_MOVE 0
#include "walk_back.cuh"

constexpr int DY = STEP_BYTES, PLACE_BYTES = STEP_BYTES + TILE;
constexpr int SEGMENT_BYTES = STEPS * PLACE_BYTES;

#ifndef EMULATED
extern "C"
#endif
__global__ void __launch_bounds__(GROUP, 4 / BLOCKS)
wkv7_segment_back(const char* __restrict__ r, const char* __restrict__ w, const char* __restrict__ a,
                  const char* __restrict__ b, const char* __restrict__ dy,
                  float* __restrict__ before, const i64* __restrict__ offsets, int H) {
    const int pair = blockIdx.x / BLOCKS, s = pair / H, h = pair % H;
    const i64 start = offsets[s], stride = (i64)H * N;
    const int tokens = (int)(offsets[s + 1] - start), chunks = (tokens + CHUNK - 1) / CHUNK;
    char* own = shared_memory + warp_id() * PLACE_BYTES;
    Rows E = {};
    float scale = 1;
    for (int n = chunks - 1; n >= 0; --n) {
        const int first = n * CHUNK + STEP * warp_id(), left = tokens - first;
        const i64 at = (start + first) * stride + h * N;
        load_step(own, r, w, a, b, at, stride, left);
        load_rows(own + DY, dy + (dy ? at * 2 : 0), stride * 2, dy ? left : 0, 2);
        rows_loaded(own, left);
        prepare(own);
        sync_block();
        const auto place = [](int i) { return shared_memory + (STEPS - 1 - i) * PLACE_BYTES; };
        walk_chunk_back<DY>(E, scale, place, [](int) {});
        sync_block();  // before tiles are filled again
    }
    write_rows(E, before + (i64)pair * N * N, scale);
}
