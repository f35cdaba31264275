// What the relay kernels share: few sequences and heads, whose chunks all multiprocessors prepare.
//
// What a chunk prepares needs no state. A launch prepares a slab of chunks of every (sequence, head), a warp
// a step of 16 tokens, and keeps what the walk reads of it, the step's image, in memory; the same launch's
// first blocks walk the slab before, from the images that the launch before left. Of a block that walks,
// four warps walk and four copy the next steps into a ring of RING places.
//
// At N = 64 the four warps that walk multiply as a group (group.cuh), and an image has its own layout; at
// N = 128 it is the beginning of a step as it was prepared. Behind it, of the step that is walked, lie its
// rows of v or dy.
#pragma once
#include "group.cuh"
#include "state.cuh"

constexpr bool GROUPED = N == 64;
#if HEAD == 64 && BACKWARD
// W_b, ρ, α; P; the factors and scales.
constexpr int OF_W = 0, OF_R = TILE, OF_A = 2 * TILE, OF_P = 3 * TILE, OF_FACTORS = OF_P + SQUARE;
constexpr int IMAGE = OF_FACTORS + FACTORS_STEP + SCALES_STEP, RING = 8;
#elif HEAD == 64
// ρ and W; κ, β and what they lose to fp16; A_rk and X·A_ak, then A_rb; the factors and scales.
constexpr int OF_R = 0, OF_K = 2 * TILE, OF_B = 3 * TILE, OF_K_LOW = 4 * TILE, OF_B_LOW = 5 * TILE;
constexpr int OF_VALUES = 6 * TILE, OF_RB = OF_VALUES + 2 * SQUARE, OF_FACTORS = OF_RB + SQUARE;
constexpr int IMAGE = OF_FACTORS + FACTORS_STEP + SCALES_STEP, RING = 6;
#else
constexpr int IMAGE = W + (BACKWARD ? 1 : 3) * SQUARE, RING = 8;
static_assert(IMAGE + TILE <= STEP_BYTES, "the rows do not fit behind the image");
#endif
constexpr int WALKED_ROWS = IMAGE, IMAGE_BYTES = (IMAGE + 127) / 128 * 128;
constexpr int PLACE_BYTES = GROUPED ? (IMAGE + TILE + 1023) / 1024 * 1024 : STEP_BYTES;
constexpr int PREPARING = 2 * WARPS;  // warps, a step each
constexpr int RELAY_BYTES =
    RING * PLACE_BYTES > PREPARING * STEP_BYTES ? RING * PLACE_BYTES : PREPARING * STEP_BYTES;
static_assert(IMAGE % 16 == 0, "copied 16 bytes at a time");

struct Unit {  // a step that a warp prepares
    int s, h, token;
    i64 image;
    bool exists;
};
// That of the warp, of the chunks from..to of all sequences; neighbours are heads of the same tokens.
DEVICE Unit unit_of(i64 number, int from, int to, int pairs, int H) {
    const int h = number % H, step = number / H % STEPS, n = number / H / STEPS % (to - from);
    const i64 s = number / H / STEPS / (to - from);
    const i64 image = ((s * H + h) * (to - from) + n) * STEPS + step;
    return {(int)s, h, (from + n) * CHUNK + step * STEP, image * IMAGE_BYTES, s * H < pairs};
}

// A part of a prepared step to its place in the image.
template <int BYTES>
DEVICE void keep(char* to, const char* from) {
#pragma unroll
    for (int i = lane_id(); i < BYTES / 16; i += 32) ((uint4*)to)[i] = ((const uint4*)from)[i];
}
DEVICE void keep_image(char* to, char* step) {
    sync_warp();
#if HEAD == 64 && BACKWARD
    keep<TILE>(to + OF_W, step + MOVE_BACK);
    keep<TILE>(to + OF_R, step + R), keep<TILE>(to + OF_A, step + A);
    keep<SQUARE>(to + OF_P, step + W + P_SQUARE);
    keep<FACTORS_STEP + SCALES_STEP>(to + OF_FACTORS, step + FACTORS);
#elif HEAD == 64
    keep<TILE>(to + OF_R, step + R), keep<TILE>(to + OF_R + TILE, step + MOVE);
    keep<TILE>(to + OF_K, step + K), keep<TILE>(to + OF_B, step + B);
#pragma unroll
    for (int i = lane_id(); i < TILE / 16; i += 32) {
        const uint4 x = ((const uint4*)(step + LOWS))[i];
        const u32 lows[4] = {x.x, x.y, x.z, x.w};
        u32 k[4], b[4];
        take_lows(k, b, lows);
        ((uint4*)(to + OF_K_LOW))[i] = {k[0], k[1], k[2], k[3]};
        ((uint4*)(to + OF_B_LOW))[i] = {b[0], b[1], b[2], b[3]};
    }
    keep<SQUARE>(to + OF_VALUES, step + W + SQUARE), keep<SQUARE>(to + OF_VALUES + SQUARE, step + W);
    keep<SQUARE>(to + OF_RB, step + W + 2 * SQUARE);
    keep<FACTORS_STEP + SCALES_STEP>(to + OF_FACTORS, step + FACTORS);
#else
    keep<IMAGE>(to, step);
#endif
}

// By the warps that do not walk: a step's image and rows, into its place of the ring.
DEVICE void fetch_step(char* place, const char* image, const char* rows, i64 stride, int left) {
    for (int i = group_thread(); i < IMAGE / 16; i += GROUP)
        copy_16(place + 16 * i, image + 16 * i, true);
    for (int i = group_thread(); i < STEP * PIECES; i += GROUP) {
        const int row = i >> PIECE_BITS, piece = i & (PIECES - 1);
        const bool valid = row < left;
        copy_16(place + WALKED_ROWS + tile_at(row, piece),
                rows + (valid ? row * stride + piece * 16 : 0), valid);
    }
}
DEVICE char* place_of(int step) { return shared_memory + step % RING * PLACE_BYTES; }

// Who walks waits for nothing but the beginning of a chunk, until all of it is THERE, which is said when the
// last step before it is begun; a step's place is filled anew once it is READ. So a walk is never as much
// as RING steps ahead of those who wait for that: a barrier for each place is enough.
enum { THERE = 1, READ };
DEVICE void wait_for_chunk() { sync_group(THERE, 2 * GROUP); }
DEVICE void step_is_read(int step) { arrive_group(READ + step % RING, 2 * GROUP); }

// Feeds those who walk `steps` steps, with `fetch(n)` for step n.
template <class Fetch>
DEVICE void feed(int steps, Fetch fetch) {
    for (int n = 0; n < RING; ++n) {
        if (n < steps) fetch(n);
        end_batch();
    }
    batches_done<RING - STEPS>();
    show_to_products();
    arrive_group(THERE, 2 * GROUP);
    for (int n = 0; n < steps; ++n) {
        sync_group(READ + n % RING, 2 * GROUP);
        if (n + RING < steps) fetch(n + RING);
        end_batch();
        if (n % STEPS == STEPS - 2 && n + 2 < steps) {
            batches_done<RING - STEPS - 1>();
            show_to_products();
            arrive_group(THERE, 2 * GROUP);
        }
    }
}
