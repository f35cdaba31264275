// Runs the CUDA kernels on a CPU, thread by thread, so that their arithmetic can be tested without
// a GPU: a block's threads are fibers, and what a warp does together waits for all of its lanes.
#pragma once
#define EMULATED
#define DEVICE static inline
#define MEMBER inline
#define __global__ static
#define __launch_bounds__(...)
#define __restrict__
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <vector>

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

enum { LANES = 32, MOST_THREADS = 512, STACK = 1 << 17 };
struct Fiber { ucontext_t context; char* stack; bool done; };
struct Index { int x, y, z; };
static Fiber fibers[MOST_THREADS];
static ucontext_t scheduler;
static int current, block_threads;
static Index blockIdx, threadIdx;
static char* shared_memory;
static void (*body)();

static inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

struct Barrier { int waiting; long turn; };
static long events;  // that somebody may have waited for
static Barrier warp_barrier[MOST_THREADS / LANES], block_barrier;
static inline void wait(Barrier& b, int count) {
    long turn = b.turn;
    ++events;
    if (++b.waiting == count) { b.waiting = 0; b.turn++; return; }
    while (b.turn == turn) yield();
}
static inline int lane_id() { return current % LANES; }
static inline int warp_id() { return current / LANES; }
static inline void sync_warp() { wait(warp_barrier[warp_id()], LANES); }
static inline void sync_block() { wait(block_barrier, block_threads); }

static inline u32 bits_of(float x) { u32 r; memcpy(&r, &x, 4); return r; }
static inline float from_bits(u32 x) { float r; memcpy(&r, &x, 4); return r; }
static inline float half_value(u16 x) { _Float16 h; memcpy(&h, &x, 2); return (float)h; }
static inline u16 half_of(float x) { _Float16 h = (_Float16)x; u16 r; memcpy(&r, &h, 2); return r; }
static inline u16 bf16_of(float x) {
    u32 u = bits_of(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (u16)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline u32 pack_half(float low, float high) { return half_of(low) | (u32)half_of(high) << 16; }
static inline u32 pack_bf16(float low, float high) { return bf16_of(low) | (u32)bf16_of(high) << 16; }
static inline float bf16_value(u16 x) { return from_bits((u32)x << 16); }
static inline u32 max_pair_half(u32 x, u32 y) {
    return pack_half(fmaxf(half_value((u16)x), half_value((u16)y)), fmaxf(half_value(x >> 16), half_value(y >> 16)));
}
static inline u32 max_pair_bf16(u32 x, u32 y) {
    return pack_bf16(fmaxf(bf16_value((u16)x), bf16_value((u16)y)), fmaxf(bf16_value(x >> 16), bf16_value(y >> 16)));
}
static inline float exp2_of(float x) { return exp2f(x); }
static inline float inverse_of(float x) { return 1.0f / x; }

// What lanes hand to each other: every lane writes, all wait, every lane reads, all wait.
static float exchange_f[MOST_THREADS];
static u32 exchange_u[MOST_THREADS][6];
static const void* exchange_p[MOST_THREADS];
static inline float shuffle_xor(float x, int mask) {
    exchange_f[current] = x; sync_warp();
    float r = exchange_f[warp_id() * LANES + (lane_id() ^ mask)]; sync_warp();
    return r;
}
static inline float shuffle_from(float x, int lane) {
    exchange_f[current] = x; sync_warp();
    float r = exchange_f[warp_id() * LANES + lane]; sync_warp();
    return r;
}
static inline float warp_max(float x) {
    for (int mask = 16; mask; mask >>= 1) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}
static inline bool warp_any(bool x) {
    for (int mask = 16; mask; mask >>= 1) x |= shuffle_xor(x, mask) != 0;
    return x;
}
static inline float part(u32 pair, int i) { return half_value((u16)(i ? pair >> 16 : pair)); }
static inline void mma(float d[4], const u32 a[4], u32 b0, u32 b1) {
    u32* mine = exchange_u[current];
    memcpy(mine, a, 16); mine[4] = b0; mine[5] = b1;
    sync_warp();
    u32 (*all)[6] = exchange_u + warp_id() * LANES;
    for (int i = 0; i < 4; ++i) {
        int row = lane_id() / 4 + (i / 2) * 8, col = lane_id() % 4 * 2 + i % 2;
        float sum = d[i];
        for (int k = 0; k < 16; ++k) {
            float x = part(all[row % 8 * 4 + k % 8 / 2][(row / 8) + (k / 8) * 2], k % 2);
            float y = part(all[col * 4 + k % 8 / 2][4 + k / 8], k % 2);
            sum += x * y;
        }
        d[i] = sum;
    }
    sync_warp();
}
static inline void load_any(u32 r[4], const void* row, bool transposed) {
    exchange_p[current] = row; sync_warp();
    const void** all = exchange_p + warp_id() * LANES;
    for (int m = 0; m < 4; ++m) {
        int q = lane_id() / 4, p = lane_id() % 4 * 2;
        u16 low, high;
        if (transposed) {
            memcpy(&low, (const char*)all[m * 8 + p] + 2 * q, 2);
            memcpy(&high, (const char*)all[m * 8 + p + 1] + 2 * q, 2);
        } else {
            memcpy(&low, (const char*)all[m * 8 + q] + 2 * p, 2);
            memcpy(&high, (const char*)all[m * 8 + q] + 2 * p + 2, 2);
        }
        r[m] = low | (u32)high << 16;
    }
    sync_warp();
}
static inline void load_tiles(u32 r[4], const void* row) { load_any(r, row, false); }
static inline void load_tiles_transposed(u32 r[4], const void* row) { load_any(r, row, true); }
static inline void store_tiles_transposed(void* row, const u32 r[4]) {
    exchange_p[current] = row; sync_warp();
    const void** all = exchange_p + warp_id() * LANES;
    int q = lane_id() / 4, p = lane_id() % 4 * 2;
    for (int m = 0; m < 4; ++m)
        for (int i = 0; i < 2; ++i) {
            u16 x = (u16)(r[m] >> (16 * i));
            memcpy((char*)all[m * 8 + p + i] + 2 * q, &x, 2);
        }
    sync_warp();
}
static inline u32 transpose_tile(u32 x) {
    exchange_u[current][0] = x; sync_warp();
    u32 (*all)[6] = exchange_u + warp_id() * LANES;
    u32 r = 0;
    for (int i = 0; i < 2; ++i) {
        int row = lane_id() % 4 * 2 + i, col = lane_id() / 4;  // of the tile as it was
        r |= (all[row * 4 + col / 2][0] >> (col % 2 * 16) & 0xffff) << (16 * i);
    }
    sync_warp();
    return r;
}

// Copies that a thread has begun: they come when it waits for them, or arrive at a barrier when no thread can
// go on without. None of `from`: zeros.
struct Piece { void* to; const void* from; int bytes; };
static std::vector<Piece> begun[MOST_THREADS];
static inline void come(std::vector<Piece>& pieces) {
    for (const Piece& c : pieces)
        if (c.from) memcpy(c.to, c.from, c.bytes); else memset(c.to, 0, c.bytes);
    pieces.clear();
}
static inline void copy_16(void* to, const void* from, bool valid) {
    begun[current].push_back({to, valid ? from : nullptr, 16});
}
static inline void copies_done() { come(begun[current]); }

// A barrier in shared memory, in its 8 bytes.
struct Turns { u16 expected, missing; u32 turn : 1, bytes : 31; };
static inline void check_turn(Turns& b) {
    if (b.missing == 0 && b.bytes == 0) { b.missing = b.expected; b.turn ^= 1; }
}
static inline void begin_barrier(u64* barrier, int arrivals) {
    *(Turns*)barrier = {(u16)arrivals, (u16)arrivals, 0, 0};
}
static inline void barriers_begun() {}
static inline void arrive(u64* barrier) {
    Turns& b = *(Turns*)barrier;
    ++events; --b.missing; check_turn(b);
}
static inline void wait_for_turn(u64* barrier, int turn) {
    ++events;
    while (((Turns*)barrier)->turn == (turn & 1)) yield();
}
struct Copy { std::vector<Piece> pieces; u64* barrier; int bytes; };  // bytes: that the barrier counts
static std::vector<Copy> under_way;
static inline void arrive_when_copied(u64* barrier) {
    under_way.push_back({begun[current], barrier, 0});
    begun[current].clear();
}
static inline void copy_bulk(void* to, const void* from, int bytes, u64* barrier) {
    ((Turns*)barrier)->bytes += bytes;
    arrive(barrier);
    under_way.push_back({{{to, from, bytes}}, barrier, bytes});
}
static void copies_come() {
    for (Copy& c : under_way) {
        come(c.pieces);
        Turns& b = *(Turns*)c.barrier;
        if (c.bytes) b.bytes -= c.bytes; else --b.missing;
        check_turn(b);
    }
    under_way.clear();
}

static void enter() { body(); ++events; fibers[current].done = true; yield(); }
// One block; the caller sets `body` and blockIdx. Shared memory starts as NaN, as if never written.
static void run_block(int threads, int shared_bytes) {
    block_threads = threads;
    shared_memory = (char*)realloc(shared_memory, shared_bytes);
    memset(shared_memory, 0xff, shared_bytes);
    for (int i = 0; i < threads; ++i) {
        Fiber& f = fibers[i];
        if (!f.stack) f.stack = (char*)malloc(STACK);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack; f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = &scheduler; f.done = false;
        makecontext(&f.context, enter, 0);
    }
    for (bool busy = true; busy;) {
        busy = false;
        const long before = events;
        for (current = 0; current < threads; ++current)
            if (!fibers[current].done) {
                threadIdx.x = current; busy = true;
                swapcontext(&scheduler, &fibers[current].context);
            }
        if (!busy || events > before) continue;
        if (under_way.empty()) abort();  // no thread can ever go on
        copies_come();
    }
}
