// What the relay kernels share: few sequences and heads, whose chunks all multiprocessors prepare.
//
// What a chunk prepares needs no state. A launch prepares a slab of chunks of every (sequence, head), a warp
// a step of 16 tokens, and keeps what the walk reads of it, the step's image, in memory; the same launch's
// first blocks walk the slab before, from the images that the launch before left. Of a block that walks,
// four warps walk and four copy the next steps into a ring of RING places.
#pragma once
#include "state.cuh"

constexpr int RING = 8;
constexpr int RELAY_BYTES = RING * STEP_BYTES;
// What the walk reads lies first in a step; behind it, of the step that is walked, its rows of v or dy.
constexpr int IMAGE = W + (BACKWARD ? 1 : 3) * SQUARE, WALKED_ROWS = IMAGE;
constexpr int IMAGE_BYTES = (IMAGE + 127) / 128 * 128;
static_assert(IMAGE % 16 == 0 && IMAGE + TILE <= STEP_BYTES, "the rows do not fit behind the image");

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

DEVICE void keep_image(char* to, const char* step) {
    sync_warp();
    for (int i = lane_id(); i < IMAGE / 16; i += 32) ((uint4*)to)[i] = ((const uint4*)step)[i];
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
DEVICE char* place_of(int step) { return shared_memory + step % RING * STEP_BYTES; }


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
    arrive_group(THERE, 2 * GROUP);
    for (int n = 0; n < steps; ++n) {
        sync_group(READ + n % RING, 2 * GROUP);
        if (n + RING < steps) fetch(n + RING);
        end_batch();
        if (n % STEPS == STEPS - 2 && n + 2 < steps) {
            batches_done<RING - STEPS - 1>();
            arrive_group(THERE, 2 * GROUP);
        }
    }
}
