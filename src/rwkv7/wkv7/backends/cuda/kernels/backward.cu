// Backward: one block a (sequence, head), from the last chunk to the first.
//
// A chunk's states are rebuilt from the one saved before it; then step by step, the last first:
//   by rows of V (a warp its 16, as forward): Z = Pᵀ·dY + W_b·Eᵀ, dV = Gᵀ·dY + (κ + Nᵀ·β)·Eᵀ, E,
//   the scores' gradients dA (a warp one of the four), sums over V,
//   by channels (a warp its 16): dr, da, dk, db, and from them dw.
// E is the gradient of the state after a token, Z that of A_ak·V + α·Sᵀ. Everything on the side of V
// is divided by one power of two for the chunk, everything on the side of the gradients by another.
// The macro APART 1 takes every chunk of a call as a sequence of its own, whose E is known (relay_back.cu).
#define BACKWARD 1
#define BY_STEP 0
#define RELAY 0
#define WITH_R 1
#define WITH_K 1
#define WITH_MOVE 1
#include "finish.cuh"
#include "state.cuh"

// Beside what chunk.cuh lays out, a chunk has: U, in W's place; dv, at last in that of W_b; V; dY.
constexpr int U = MOVE;
constexpr int V = MOVE_BACK + TILE;
constexpr int DY = V + TILE;
constexpr int BUFFER = DY + TILE;
// The block has: E; Z of one step; the states before steps 3 and 2, later those before steps 1 and 0.
// Of large heads this is too much, and E and
// the state before a step take turns in one tile (SHARED_TILE).
constexpr bool SHARED_TILE = N > 64;
constexpr int STATE_TILE = N * N * 2;
constexpr int E_TILE = BUFFER;
constexpr int STATES = SHARED_TILE ? E_TILE : E_TILE + STATE_TILE;
constexpr int Z = STATES + (SHARED_TILE ? 1 : 2) * STATE_TILE, Z_BYTES = STEP * N * 2;
constexpr int SHARED_BYTES = Z + Z_BYTES;

DEVICE char* state_tile(int step) {
    return shared_memory + STATES + (SHARED_TILE ? 0 : (step & 1) * STATE_TILE);
}
DEVICE char* e_tile() { return shared_memory + E_TILE; }
DEVICE char* z_tile() { return shared_memory + Z; }

// In a sequence of few tokens what reaches a and b is a few products of vectors, Z·V and dY·U, and these
// may cancel. A chunk whose last step has no tokens is `brief`: its first step has Z and U in two halves,
// what they lose to fp16 in the last step's rows of V and dY.
constexpr int SPARE = CHUNK - STEP;

// The largest number of the walking warps, the same for all their threads.
DEVICE float group_max(float x) {
    float* sums = (float*)z_tile();
    x = warp_max(x);
    sync_block();
    if (lane_id() == 0) sums[warp_id()] = x;
    sync_block();
    x = fmaxf(fmaxf(sums[0], sums[1]), fmaxf(sums[2], sums[3]));
#pragma unroll
    for (int i = 4; i < WARPS; ++i) x = fmaxf(x, sums[i]);
    return x;
}

// Rows of a tile are multiplied by what `factors` holds for their step and rounded to fp16.
DEVICE float largest_scaled(const char* tile, const float factors[STEPS]) {
    float most = 0;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int row = STEP * step + (threadIdx.x >> PIECE_BITS), piece = threadIdx.x & (PIECES - 1);
        const uint4 x = *(const uint4*)(tile + tile_at(row, piece));
        const u32 pair[4] = {x.x, x.y, x.z, x.w};
        most = fmaxf(most, largest_input(pair) * factors[step]);
    }
    return most;
}
DEVICE u32 scaled(u32 x, float f) { return pack_half(low_input(x) * f, high_input(x) * f); }
DEVICE void scale_tile(char* tile, const float factors[STEPS], float f) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int row = STEP * step + (threadIdx.x >> PIECE_BITS), piece = threadIdx.x & (PIECES - 1);
        uint4* at = (uint4*)(tile + tile_at(row, piece));
        const float by = factors[step] * f;
        uint4 x = *at;
        x.x = scaled(x.x, by), x.y = scaled(x.y, by), x.z = scaled(x.z, by), x.w = scaled(x.w, by);
        *at = x;
    }
}

// The state saved before a chunk, divided by `scale`.
DEVICE void read_saved(Rows& state, const char* states, const float* scales, float inverse) {
    const int v = first_row() + (lane_id() >> 2);
    const float top = scales[v] * inverse, bottom = scales[v + 8] * inverse;
#pragma unroll
    for (int i = 0; i < N / 16; ++i) {
        const uint4 x = *(const uint4*)(states + saved_at(i));
        float *one = state.s[2 * i], *other = state.s[2 * i + 1];
        one[0] = low_half(x.x) * top, one[1] = high_half(x.x) * top;
        one[2] = low_half(x.y) * bottom, one[3] = high_half(x.y) * bottom;
        other[0] = low_half(x.z) * top, other[1] = high_half(x.z) * top;
        other[2] = low_half(x.w) * bottom, other[3] = high_half(x.w) * bottom;
    }
}

// Rows of the state [V, K] into a tile.
DEVICE void store_state(char* tile, const Rows& state) {
#pragma unroll
    for (int block = 0; block < N / 16; ++block)
        store_rows(tile, 16 * warp_id(), block, &state.s[2 * block]);
}

// The states before the steps, and what the steps remove; leaves the state after the chunk, in the
// units of its last step's middle. Those before steps 2 and 3 (SHARED_TILE: before step 3) go to shared
// memory, that before step 1 stays with the warp.
DEVICE void rebuild(char* shared, bool brief, Rows& state, u32 u[STEPS][4], u32 second[N / 16][4]) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int first = STEP * step;
        u32 v[4], b[4];
        float removed[2][4] = {};
        if (step == 0)
            times_channels(state, step_to_middle(shared, 0));
        else
            times_channels(state, step_to_end(shared, step - 1), step_to_middle(shared, step));
        if (step == 1 && !SHARED_TILE)
#pragma unroll
            for (int block = 0; block < N / 16; ++block) as_left(second[block], &state.s[2 * block]);
        if (step > (SHARED_TILE ? 2 : 1)) store_state(state_tile(step), state);
        left_transposed(v, shared + V, first, warp_id());
        columns_square(b, step_squares(shared, step));
        mma_pair(removed, v, b);
#pragma unroll
        for (int block = 0; block < N / 16; ++block) {
            u32 s[4];
            as_left(s, &state.s[2 * block]);
            columns_operand(b, shared + MOVE, first, block);
            mma_pair(removed, s, b);
        }
        if (step == 0 && brief) {
            columns_square(b, step_squares(shared, 0) + 3 * SQUARE);
            mma_pair(removed, v, b);
            as_left_split(u[0], b, removed);
            store_transposed(shared + DY, SPARE, warp_id(), b);
        }
        as_left(u[step], removed);
#pragma unroll
        for (int block = 0; block < N / 16; ++block) {
            rows_operand(b, shared + K, first, block);
            mma_pair(&state.s[2 * block], v, b);
            rows_operand(b, shared + B, first, block);
            mma_pair(&state.s[2 * block], u[step], b);
        }
    }
}

// The state before step `until`, once more, from the one before the chunk: for a SHARED_TILE.
DEVICE void rebuild_until(char* shared, int until, Rows& state) {
    times_channels(state, step_to_middle(shared, 0));
#pragma unroll 1
    for (int step = 0; step < until; ++step) {
        u32 v[4], u[4], b[4];
        left_transposed(v, shared + V, STEP * step, warp_id());
        left_transposed(u, shared + U, STEP * step, warp_id());
#pragma unroll
        for (int block = 0; block < N / 16; ++block) {
            rows_operand(b, shared + K, STEP * step, block);
            mma_pair(&state.s[2 * block], v, b);
            rows_operand(b, shared + B, STEP * step, block);
            mma_pair(&state.s[2 * block], u, b);
        }
        times_channels(state, step_to_end(shared, step), step_to_middle(shared, step + 1));
    }
}

// By rows of V: Z (and E) into shared memory, dv of the step given; the operands dYᵀ and Zᵀ are left.
DEVICE void rows_back(char* shared, int step, bool brief, Rows& E, float dv[2][4], u32 dy[4], u32 high[4]) {
    const int first = STEP * step;
    const char* squares = step_squares(shared, step);
    u32 b[4];
    float z[2][4] = {};
    times_channels(E, step_to_end(shared, step));
    if (!SHARED_TILE) store_state(e_tile(), E);
    left_transposed(dy, shared + DY, first, warp_id());
    rows_square(b, squares + 2 * SQUARE);
    mma_pair(z, dy, b);
    rows_square(b, squares + SQUARE);
    mma_pair(dv, dy, b);
#pragma unroll
    for (int block = 0; block < N / 16; ++block) {
        u32 e[4], e_low[4];
        as_left_split(e, e_low, &E.s[2 * block]);
        columns_operand(b, shared + MOVE_BACK, first, block);
        mma_pair(z, e, b);
        if (INPUT_FP16) mma_pair(z, e_low, b);
        columns_operand(b, shared + KEY_BACK, first, block);
        mma_pair(dv, e, b);
        if (INPUT_FP16) mma_pair(dv, e_low, b);
    }
    if (brief && step == 0) {
        as_left_split(high, b, z);
        store_transposed(shared + V, SPARE, warp_id(), b);
    }
    as_left(high, z);
    store_transposed(z_tile(), 0, warp_id(), high);
}

// E before the step.
DEVICE void pass_back(char* shared, int step, Rows& E, const u32 dy[4], const u32 high[4]) {
    const int first = STEP * step;
    u32 b[4];
#pragma unroll
    for (int block = 0; block < N / 16; ++block) {
        rows_operand(b, shared + R, first, block);
        mma_pair(&E.s[2 * block], dy, b);
        rows_operand(b, shared + A, first, block);
        mma_pair(&E.s[2 * block], high, b);
    }
    times_channels(E, step_to_middle(shared, step));
}

// A warp's score gradient: dA_rk, dA_rb, dA_ak, dA_ab for warps 0 to 3, in the step's squares.
DEVICE void score_gradients(char* shared, int step, bool brief) {
    const int first = STEP * step, warp = member();
    if (WARPS > 4 && warp > 3) return;
    const char* rows = warp < 2 ? shared + DY : z_tile();
    const char* columns = warp & 1 ? shared + U : shared + V;
    float d[2][4] = {};
#pragma unroll
    for (int block = 0; block < N / 16; ++block) {
        u32 a[4], b[4];
        left_operand(a, rows, warp < 2 ? first : 0, block);
        columns_operand(b, columns, first, block);
        mma_pair(d, a, b);
    }
    if (brief && step == 0)
#pragma unroll 1
        for (int block = 0; block < N / 16; ++block) {
            u32 a[4], b[4];
            if (warp & 1) {
                left_operand(a, rows, 0, block), columns_operand(b, shared + DY, SPARE, block);
                mma_pair(d, a, b);
            }
            if (warp > 1) {
                left_operand(a, shared + V, SPARE, block), columns_operand(b, columns, 0, block);
                mma_pair(d, a, b);
            }
        }
    keep_lower(d, warp < 2);
    store_square(step_squares(shared, step) + warp * SQUARE, d);
}

// What reaches the operands through the scores.
DEVICE void through_scores(const char* shared, int step, const char* squares, Gradients& d) {
    const int first = STEP * step, warp = member();
    u32 x[4], y[4], c[4];
    rows_operand(x, shared + K, first, warp), rows_operand(y, shared + B, first, warp);
    left_square(c, squares), mma_pair(d.r, c, x);
    left_square(c, squares + SQUARE), mma_pair(d.r, c, y);
    left_square(c, squares + 2 * SQUARE), mma_pair(d.a, c, x);
    left_square(c, squares + 3 * SQUARE), mma_pair(d.a, c, y);
    rows_operand(x, shared + R, first, warp), rows_operand(y, shared + A, first, warp);
    left_square_transposed(c, squares), mma_pair(d.k, c, x);
    left_square_transposed(c, squares + 2 * SQUARE), mma_pair(d.k, c, y);
    left_square_transposed(c, squares + SQUARE), mma_pair(d.b, c, x);
    left_square_transposed(c, squares + 3 * SQUARE), mma_pair(d.b, c, y);
}

// What reaches them through the state before the step (BEFORE) and through E (AFTER).
template <bool BEFORE, bool AFTER>
DEVICE void through_states(const char* shared, int step, Gradients& d) {
    const int first = STEP * step, warp = member();
    const char *state = state_tile(step), *back = e_tile(), *z = z_tile();
    u32 x[4], c[4], e[4];
#pragma unroll
    for (int block = 0; block < N / 16; ++block) {
        if (BEFORE) rows_operand(x, state, 16 * block, warp);
        if (AFTER) rows_operand(e, back, 16 * block, warp);
        if (BEFORE) {
            left_operand(c, shared + DY, first, block), mma_pair(d.r, c, x);
            left_operand(c, z, 0, block), mma_pair(d.a, c, x);
        }
        if (AFTER) {
            left_operand(c, shared + V, first, block), mma_pair(d.k, c, e);
            left_operand(c, shared + U, first, block), mma_pair(d.b, c, e);
        }
    }
}

// A walking warp's sums, where Nᵀ was split before and the last of the scores' gradients will be.
DEVICE float* sums_of(char* shared, int warp) {
    const int step = WARPS > STEPS ? warp % STEPS : warp, more = WARPS > STEPS ? warp / STEPS : 0;
    return (float*)(step_squares(shared, step) + (3 + more) * SQUARE);
}
// Σ_v S ∘ E of the state after the chunk, into shared memory: E rounded as the gradients of the keys
// will see it in the last `step` that has tokens, so that a state which began empty leaves nothing.
DEVICE void passing_on(char* shared, int step, const Rows& state, const Rows& E) {
    float* sums = sums_of(shared, warp_id());
    const int lane = lane_id(), p = (lane & 3) * 2;
    const float* to_end = step_to_end(shared, step);
    float x[N / 4];  // of channels p, p + 1, p + 8, p + 9, …
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float f = to_end[8 * n + p + i];
            const u32 e = pack_half(E.s[n][i] * f, E.s[n][2 + i] * f);
            x[2 * n + i] = state.s[n][i] * low_half(e) + state.s[n][2 + i] * high_half(e);
        }
    // The eight lanes that have the same channels add up, each at last an eighth of them: at every turn a
    // lane hands half of its sums on and adds to the others.
    int kept = 0;
#pragma unroll
    for (int mask = 16, half = N / 8; mask > 2; mask >>= 1, half >>= 1) {
        const bool upper = lane & mask;
        kept += upper ? half : 0;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            if (j >= half) continue;
            const float mine = upper ? x[j + half] : x[j], other = upper ? x[j] : x[j + half];
            x[j] = mine + shuffle_xor(other, mask);
        }
    }
    sync_block();
#pragma unroll
    for (int j = 0; j < N / 32; ++j) sums[8 * (kept + j >> 1) + p + (j & 1)] = x[j];
    sync_block();
}
// The sums of the warp's channels: what `after` of finish_step starts from.
DEVICE void arriving(char* shared, int step, float after[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int channel = 16 * member() + (i >> 1) * 8 + (lane_id() & 3) * 2 + (i & 1);
        after[i] = (sums_of(shared, 0)[channel] + sums_of(shared, 1)[channel]) +
                   (sums_of(shared, 2)[channel] + sums_of(shared, 3)[channel]);
#pragma unroll
        for (int warp = 4; warp < WARPS; ++warp) after[i] += sums_of(shared, warp)[channel];
        // E was taken in the units of the step's middle; of the states only that after the last is.
        if (step < STEPS - 1) after[i] *= inverse_of(step_to_end(shared, step)[channel]);
    }
}

// Brings E and dY of a chunk to one power of two; gives E's.
DEVICE float scale_back(char* shared, Rows& E, float e_scale) {
    float r_scales[STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) r_scales[step] = step_scales(shared, step)[0];
    const float most = fmaxf(largest(E) * e_scale, largest_scaled(shared + DY, r_scales));
    const float next = power_of_two(group_max(most));
    times(E, e_scale * inverse_power(next));
    scale_tile(shared + DY, r_scales, inverse_power(next));
    sync_block();
    return next;
}

// The same for V and the state that was saved before the chunk, of whose rows the scales are given:
// all of them 0 if it is `empty`.
DEVICE float scale_values(char* shared, const float* saved_scale, bool& empty) {
    float k_scales[STEPS], most = 0;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) k_scales[step] = step_scales(shared, step)[1];
    for (int row = lane_id(); row < N; row += 32) most = fmaxf(most, saved_scale[row]);
    empty = !warp_any(most > 0);
    const float scale =
        power_of_two(group_max(fmaxf(most, largest_scaled(shared + V, k_scales))));
    scale_tile(shared + V, k_scales, inverse_power(scale));
    sync_block();
    return scale;
}

#ifndef EMULATED
extern "C"
#endif
__global__ void __launch_bounds__(GROUP, N > 64 ? 1 : 2)
wkv7_backward(const char* __restrict__ r, const char* __restrict__ w, const char* __restrict__ k,
              const char* __restrict__ v, const char* __restrict__ a, const char* __restrict__ b,
              const char* __restrict__ dy, const float* __restrict__ dfinal,
              const char* __restrict__ states, const float* __restrict__ states_scale,
              char* __restrict__ dr, char* __restrict__ dw, char* __restrict__ dk,
              char* __restrict__ dv, char* __restrict__ da, char* __restrict__ db,
              float* __restrict__ dinitial, const i64* __restrict__ offsets, int T, int H) {
    const int pair = blockIdx.x, h = pair % H, each = APART ? (T + CHUNK - 1) / CHUNK : 1;
    const int s = pair / H / each, begin = pair / H % each * CHUNK;
    const i64 start = PACKED ? offsets[s] : (i64)s * T + begin;
    const int tokens = PACKED ? (int)(offsets[s + 1] - start)
                              : APART && T - begin > CHUNK ? CHUNK : T - begin;
    const int chunks = (tokens + CHUNK - 1) / CHUNK;
    const i64 chunk = PACKED ? start / CHUNK + s : APART ? pair / H : (i64)s * chunks;
    const i64 stride = (i64)H * N, W_BYTES = W_FP32 ? 4 : 2;
    Rows E = {};
    float e_scale = 1;
    if (dfinal) read_rows(E, dfinal + (i64)pair * N * N);
    char* const shared = shared_memory;
    for (int n = chunks - 1; n >= 0; --n) {
        const int left = tokens - n * CHUNK < CHUNK ? tokens - n * CHUNK : CHUNK;
        const i64 at = (start + n * CHUNK) * stride + h * N, index = (chunk + n) * H + h;
        load_rows(shared + W_ROWS, w + at * W_BYTES, stride * W_BYTES, left, (int)W_BYTES);
        load_rows(shared + R, r + at * 2, stride * 2, left, 2);
        load_rows(shared + A, a + at * 2, stride * 2, left, 2);
        load_rows(shared + B, b + at * 2, stride * 2, left, 2);
        load_rows(shared + K, k + at * 2, stride * 2, left, 2);
        load_rows(shared + V, v + at * 2, stride * 2, left, 2);
        load_rows(shared + DY, dy + (dy ? at * 2 : 0), stride * 2, dy ? left : 0, 2);
        rows_loaded(shared, left);
        prepare(shared);
        sync_block();
        Rows state;
        u32 second[N / 16][4];
        float after[4], v_scale = 1, unit = 1;
        bool empty = false;
        const int steps = (left + STEP - 1) / STEP;  // those behind have no tokens
        const bool brief = steps < STEPS;
        e_scale = scale_back(shared, E, e_scale);
        u32 u[STEPS][4];
        const float* saved_scale = states_scale + index * N;
        v_scale = scale_values(shared, saved_scale, empty);
        unit = v_scale * e_scale;
        read_saved(state, states + index * N * N * 2, saved_scale, inverse_power(v_scale));
        rebuild(shared, brief, state, u, second);
        passing_on(shared, steps - 1, state, E);  // waits for all: W is no longer needed
        arriving(shared, steps - 1, after);
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            store_transposed(shared + U, STEP * step, warp_id(), u[step]);
#pragma unroll 1
        for (int step = steps - 1; step >= 0; --step) {
            float out[2][4] = {};
            if (SHARED_TILE && step < STEPS - 1) {
                read_saved(state, states + index * N * N * 2, states_scale + index * N,
                           inverse_power(v_scale));
                rebuild_until(shared, step, state);
                store_state(state_tile(step), state);
            }
            if (!SHARED_TILE && step == 1)
#pragma unroll
                for (int block = 0; block < N / 16; ++block)
                    store_left(state_tile(1), 16 * warp_id(), block, second[block]);
            if (!SHARED_TILE && step == 0) {
                read_saved(state, states + index * N * N * 2, states_scale + index * N,
                           inverse_power(v_scale));
                times_channels(state, step_to_middle(shared, 0));
                store_state(state_tile(0), state);
            }
            u32 dy_rows[4], z_rows[4];
            rows_back(shared, step, brief, E, out, dy_rows, z_rows);
            if (!SHARED_TILE) pass_back(shared, step, E, dy_rows, z_rows);
            sync_block();
            u32 rounded[4];
            const float v_unit = step_scales(shared, step)[1] * e_scale;
#pragma unroll
            for (int j = 0; j < 4; ++j)
                rounded[j] = pack_input(out[j >> 1][(j & 1) * 2] * v_unit,
                                        out[j >> 1][(j & 1) * 2 + 1] * v_unit);
            store_transposed(shared + MOVE_BACK, STEP * step, warp_id(), rounded);
            Gradients d = {};
            score_gradients(shared, step, brief);
            if (SHARED_TILE) {  // the tile has the state; now that has been read, E
                through_states<true, false>(shared, step, d);
                sync_block();
                store_state(e_tile(), E);
                pass_back(shared, step, E, dy_rows, z_rows);
            }
            sync_block();
            through_scores(shared, step, step_squares(shared, step), d);
            through_states<!SHARED_TILE, true>(shared, step, d);
            sync_warp();
            finish_step(shared, step, d, w + at * W_BYTES, dw + at * W_BYTES, stride, left,
                        unit, after, empty && step == 0);
            sync_block();
        }
        store_tile(dr + at * 2, shared + R, stride * 2, left);
        store_tile(da + at * 2, shared + A, stride * 2, left);
        store_tile(dk + at * 2, shared + K, stride * 2, left);
        store_tile(db + at * 2, shared + B, stride * 2, left);
        store_tile(dv + at * 2, shared + MOVE_BACK, stride * 2, left);
        sync_block();
    }
    if (!APART) write_rows(E, dinitial + (i64)pair * N * N, e_scale);
}
