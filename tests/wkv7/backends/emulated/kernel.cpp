// A kernel of the backend `cuda` as a function of a shared library: run(arguments, blocks).
//
// Compiled with KERNEL, the kernel's name, THREADS and SHARED, a block's; the program, as the
// backend would hand it to NVRTC, is program.inc. Arguments come in 8-byte slots, as in a launch.
#include <utility>

#include "cuda_on_cpu.h"
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint4 { u32 x, y, z, w; };
#include "program.inc"

static const u64* slots;

template <class T>
static T argument(u64 slot) {
    T value;
    memcpy(&value, &slot, sizeof value);
    return value;
}
template <class... A, size_t... I>
static void call(void (*kernel)(A...), std::index_sequence<I...>) {
    kernel(argument<A>(slots[I])...);
}
template <class... A>
static constexpr int count(void (*)(A...)) { return sizeof...(A); }

static void thread() { call(KERNEL, std::make_index_sequence<count(KERNEL)>()); }

extern "C" int arguments() { return count(KERNEL); }
extern "C" void run(const u64* given, int blocks) {
    slots = given;
    body = thread;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(THREADS, SHARED);
}
