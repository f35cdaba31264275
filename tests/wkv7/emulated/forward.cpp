#include "cuda_on_cpu.h"
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint4 { u32 x, y, z, w; };
#include "forward.cu"
static struct { const char *r, *w, *k, *v, *a, *b; const float* initial; char* y; float* final; u16* states; float* scales; const i64* offsets; int T, H; } g;
static void call() { wkv7_forward(g.r, g.w, g.k, g.v, g.a, g.b, g.initial, g.y, g.final, g.states, g.scales, g.offsets, g.T, g.H); }
extern "C" void forward(const char* r, const char* w, const char* k, const char* v, const char* a, const char* b, const float* initial, char* y, float* final, u16* states, float* scales, const i64* offsets, int T, int H, int blocks) {
    g = {r, w, k, v, a, b, initial, y, final, states, scales, offsets, T, H};
    body = call;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(128, SHARED_BYTES);
}
