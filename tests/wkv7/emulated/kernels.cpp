// The kernels as functions of a library: one that runs every block of a grid in turn.
#include "cuda_on_cpu.h"
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint4 { u32 x, y, z, w; };
#ifdef FORWARD
#include "forward.cu"
#define KERNEL wkv7_forward
static const int BYTES = FORWARD_BYTES;
typedef const char* In;
static struct { In r, w, k, v, a, b; const float* initial; char* y; float* final; u16* states; float* scales; const i64* offsets; int T, H; } g;
static void call() { wkv7_forward(g.r, g.w, g.k, g.v, g.a, g.b, g.initial, g.y, g.final, g.states, g.scales, g.offsets, g.T, g.H); }
extern "C" void forward(In r, In w, In k, In v, In a, In b, const float* initial, char* y, float* final, u16* states, float* scales, const i64* offsets, int T, int H, int blocks) {
    g = {r, w, k, v, a, b, initial, y, final, states, scales, offsets, T, H};
#else
#include "backward.cu"
static const int BYTES = SHARED_BYTES;
typedef const char* In;
static struct { In r, w, k, v, a, b, dy; const float* dfinal; const u16* states; const float* scales; char *dr, *dw, *dk, *dv, *da, *db; float* dinitial; const i64* offsets; int T, H; } g;
static void call() { wkv7_backward(g.r, g.w, g.k, g.v, g.a, g.b, g.dy, g.dfinal, g.states, g.scales, g.dr, g.dw, g.dk, g.dv, g.da, g.db, g.dinitial, g.offsets, g.T, g.H); }
extern "C" void backward(In r, In w, In k, In v, In a, In b, In dy, const float* dfinal, const u16* states, const float* scales, char* dr, char* dw, char* dk, char* dv, char* da, char* db, float* dinitial, const i64* offsets, int T, int H, int blocks) {
    g = {r, w, k, v, a, b, dy, dfinal, states, scales, dr, dw, dk, dv, da, db, dinitial, offsets, T, H};
#endif
    body = call;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(128, BYTES);
}
