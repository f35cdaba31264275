// What the relay kernels share: few sequences and heads, whose chunks all multiprocessors prepare.
//
// What a chunk prepares needs no state. A launch prepares a slab of chunks of every (sequence, head), a warp
// a step of 16 tokens, and keeps what the walk reads of it, the step's image, in memory; the same launch's
// first blocks walk the slab before, from the images that the launch before left. Of a block that walks,
// four warps walk and four copy the next steps into a ring of RING places.
//
// At N = 64 the four warps that walk multiply as a group (group.cuh), and an image has its own layout; at
// N = 128 it is the beginning of a step as it was prepared.
#pragma once
#include "barrier.cuh"
#include "group.cuh"
#include "state.cuh"

constexpr bool GROUPED = N == 64;
// An image: what is multiplied with, the body, then at N = 64 the factors and scales. Of a step that is
// walked soon those, and its rows of v or dy, lie in a ring of their own, EARLY steps long: what a chunk's
// numbers are divided by is found from all of its steps before the first.
#if HEAD == 64 && BACKWARD
// W_b, ρ, α; P.
constexpr int OF_W = 0, OF_R = TILE, OF_A = 2 * TILE, OF_P = 3 * TILE, BODY = OF_P + SQUARE;
constexpr int IMAGE = BODY + FACTORS_STEP + SCALES_STEP, RING = 8, EARLY = 12;
#elif HEAD == 64
// ρ and W; κ, β and what they lose to fp16; A_rk and X·A_ak, then A_rb.
constexpr int OF_R = 0, OF_K = 2 * TILE, OF_B = 3 * TILE, OF_K_LOW = 4 * TILE, OF_B_LOW = 5 * TILE;
constexpr int OF_VALUES = 6 * TILE, OF_RB = OF_VALUES + 2 * SQUARE, BODY = OF_RB + SQUARE;
constexpr int IMAGE = BODY + FACTORS_STEP + SCALES_STEP, RING = 6, EARLY = 8;
#else
constexpr int BODY = W + (BACKWARD ? 1 : 3) * SQUARE, IMAGE = BODY, RING = 8, EARLY = 8;
static_assert(BODY + TILE <= STEP_BYTES, "the rows do not fit behind the image");
#endif
constexpr int IMAGE_BYTES = (IMAGE + 127) / 128 * 128;
constexpr int PLACE_BYTES = GROUPED ? (BODY + 1023) / 1024 * 1024 : STEP_BYTES;
constexpr int EARLY_AT = GROUPED ? RING * PLACE_BYTES : BODY;
constexpr int EARLY_BYTES = GROUPED ? (TILE + IMAGE - BODY + 127) / 128 * 128 : PLACE_BYTES;
constexpr int BARRIERS = RING * PLACE_BYTES + (GROUPED ? EARLY * EARLY_BYTES : 0);
// Warps of a block that prepare, a step each; of one that walks, those that copy.
constexpr int PREPARING = 2 * WARPS, COPYING = PREPARING - WARPS;
constexpr int RING_BYTES = BARRIERS + 8 * (RING + 2 * EARLY);
constexpr int RELAY_BYTES =
    RING_BYTES > PREPARING * STEP_BYTES ? RING_BYTES : PREPARING * STEP_BYTES;
static_assert(BODY % 16 == 0 && IMAGE % 16 == 0, "copied 16 bytes at a time");

DEVICE char* place_of(int step) { return shared_memory + step % RING * PLACE_BYTES; }
DEVICE char* rows_of(int step) { return shared_memory + EARLY_AT + step % EARLY * EARLY_BYTES; }
DEVICE const float* factors_of(int step) { return (const float*)(rows_of(step) + TILE); }

// A part of a prepared step to its place in the image.
template <int BYTES>
DEVICE void keep(char* to, const char* from) {
#pragma unroll
    for (int i = lane_id(); i < BYTES / 16; i += 32) ((uint4*)to)[i] = ((const uint4*)from)[i];
}
DEVICE void keep_image(char* to, char* step) {
#if HEAD == 64 && BACKWARD
    keep<TILE>(to + OF_W, step + MOVE_BACK);
    keep<TILE>(to + OF_R, step + R), keep<TILE>(to + OF_A, step + A);
    keep<SQUARE>(to + OF_P, step + W + P_SQUARE);
    keep<FACTORS_STEP + SCALES_STEP>(to + BODY, step + FACTORS);
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
    keep<FACTORS_STEP + SCALES_STEP>(to + BODY, step + FACTORS);
#else
    keep<IMAGE>(to, step);
#endif
}

// A launch: the chunks that it walks and that it prepares, and the call's sizes. Steps of a (sequence, head)
// are counted as they are walked: backward the last of a slab first.
struct Slabs {
    const char* walked;  // images [pairs, steps]
    char* prepared;
    int walked_from, walked_to, prepared_from, prepared_to, T, H, pairs;

    MEMBER int walkers() const { return walked_to > walked_from ? pairs * BLOCKS : 0; }
    MEMBER int steps() const { return (walked_to - walked_from) * STEPS; }
    // The first token of a step that is walked.
    MEMBER int token(int n) const {
        return BACKWARD ? walked_to * CHUNK - (n + 1) * STEP : walked_from * CHUNK + n * STEP;
    }
    MEMBER i64 stride() const { return (i64)H * N; }  // from one token to the next
    // The first number of a token in a tensor of the call.
    MEMBER i64 at(int pair, int token) const {
        return ((i64)(pair / H) * T + token) * stride() + pair % H * N;
    }
};

// A warp's work where none walks: `load(own, at, left)` starts copying what a step is prepared of. Neighbours
// are heads of the same tokens.
template <class Load>
DEVICE void prepare_step(const Slabs& slabs, Load load) {
    const int unit = (blockIdx.x - slabs.walkers()) * PREPARING + warp_id();
    const int pair = unit % slabs.pairs, step = unit / slabs.pairs;
    const int steps = (slabs.prepared_to - slabs.prepared_from) * STEPS;
    if (step >= steps) return;
    char* own = shared_memory + warp_id() * STEP_BYTES;
    const int token = slabs.prepared_from * CHUNK + step * STEP, n = BACKWARD ? steps - 1 - step : step;
    load(own, slabs.at(pair, token), slabs.T - token);
    rows_loaded(own, slabs.T - token);
    prepare(own);
    sync_warp();
    keep_image(slabs.prepared + ((i64)pair * steps + n) * IMAGE_BYTES, own);
}

// Of a block that walks: a place's body is there, its rows and factors are, it was read.
DEVICE u64* barriers() { return (u64*)(shared_memory + BARRIERS); }
DEVICE u64* body_barrier(int step) { return barriers() + step % RING; }
DEVICE u64* rows_barrier(int step) { return barriers() + RING + step % EARLY; }
DEVICE u64* read_barrier(int step) { return barriers() + RING + EARLY + step % EARLY; }
DEVICE void begin_ring() {
    if (threadIdx.x == 0) {
        for (int i = 0; i < RING; ++i) begin_barrier(body_barrier(i), BULK ? 1 : 32);
        for (int i = 0; i < EARLY; ++i)
            begin_barrier(rows_barrier(i), 32), begin_barrier(read_barrier(i), GROUP);
        barriers_begun();
    }
    sync_block();
}
DEVICE void wait_for_body(int step) { wait_for_turn(body_barrier(step), step / RING); }
DEVICE void wait_for_rows(int step) { wait_for_turn(rows_barrier(step), step / EARLY); }
DEVICE void wait_until_read(int step) { wait_for_turn(read_barrier(step), step / EARLY); }
// Every thread says so: racecheck does not see that one speaks for its warp.
DEVICE void step_is_read(int step) { arrive(read_barrier(step)); }

// At N = 64: the largest of the warp's channels of v (of dY) of a step, in the state's (E's) units; and of
// the four steps of a chunk.
DEVICE float largest_value(int step) {
    u32 value[4];
    wait_for_rows(step);
    left_transposed(value, rows_of(step), 0, first_row() / 16);
    return largest_input(value) * factors_of(step)[2 * N + (BACKWARD ? 0 : 1)];
}
DEVICE float largest_values(int from) {
    float most = 0;
    for (int n = from; n < from + STEPS; ++n) most = fmaxf(most, largest_value(n));
    return most;
}

// All of a chunk is there.
DEVICE void wait_for_chunk(int chunk) {
    for (int n = chunk * STEPS; n < chunk * STEPS + STEPS; ++n) wait_for_rows(n), wait_for_body(n);
}

// Rows that took the place of those of a step to memory.
DEVICE void write_step(char* to, const char* rows, i64 stride, int left) {
    for (int i = lane_id(); i < STEP * PIECES; i += 32) {
        const int row = i >> PIECE_BITS, piece = i & (PIECES - 1);
        if (row < left)
            *(uint4*)(to + row * stride + piece * 16) = *(const uint4*)(rows + tile_at(row, piece));
    }
    sync_warp();
}

// The work of a warp that copies: every fourth step, its rows of `values` (none: zeros). At N = 64 and
// with `out` the rows that have taken their place when the step was read go there.
DEVICE void copy_steps(const Slabs& slabs, const char* values, char* out) {
    static_assert(EARLY % COPYING == 0, "a warp fills the places that it hands out of");
    const int pair = blockIdx.x / BLOCKS, steps = slabs.steps();
    const i64 stride = 2 * slabs.stride();
    for (int n = warp_id() - WARPS; n < steps + EARLY; n += COPYING) {
        if (const int old = n - EARLY; old >= 0) {
            wait_until_read(old);
            const int token = slabs.token(old);
            if (out) write_step(out + 2 * slabs.at(pair, token), rows_of(old), stride, slabs.T - token);
        }
        if (n >= steps) continue;
        const char* image = slabs.walked + ((i64)pair * steps + n) * IMAGE_BYTES;
        const char* rows = values ? values + 2 * slabs.at(pair, slabs.token(n)) : image;
        const int left = values ? slabs.T - slabs.token(n) : 0;
        for (int i = lane_id(); i < STEP * PIECES; i += 32) {
            const int row = i >> PIECE_BITS, piece = i & (PIECES - 1);
            const bool valid = row < left;
            copy_16(rows_of(n) + tile_at(row, piece), rows + (valid ? row * stride + piece * 16 : 0), valid);
        }
        for (int i = lane_id(); i < (IMAGE - BODY) / 16; i += 32)
            copy_16(rows_of(n) + TILE + 16 * i, image + BODY + 16 * i, true);
        arrive_when_copied(rows_barrier(n));
        if (n >= RING) wait_until_read(n - RING);
        if (BULK) {
            if (lane_id() == 0) copy_bulk(place_of(n), image, BODY, body_barrier(n));
        } else {
            for (int i = lane_id(); i < BODY / 16; i += 32)
                copy_16(place_of(n) + 16 * i, image + 16 * i, true);
            arrive_when_copied(body_barrier(n));
        }
    }
}
