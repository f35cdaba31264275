// A chunk of 64 tokens in shared memory, and what is prepared of it before the state is needed.
//
// Works in steps of 16 tokens, a warp each. Exponents are taken from the middle of a step, so that
// at RWKV-7's strongest decay they span seven bits either way and fp16 holds the operands:
//     α = a·2^(e-m)   ρ = r·2^(g-m)   β = b·2^(m-g)   κ = k·2^(m-g)
// g being the running sum of base-2 log decays within the step, e that of the tokens before, m the g
// of the middle token. The state is carried times 2^m to match. X = (I - A_ab)⁻¹ is found in fp32.
// Compiled with the macros HEAD, the channels of a head, and INPUT_FP16, W_FP32, LOGIT and PACKED, each
// 0 or 1. The file that includes this one says with BACKWARD, WITH_R, WITH_K and WITH_MOVE what it needs.
#pragma once
#include "warp.cuh"

constexpr int N = HEAD;     // channels of a head, K = V
constexpr int CHUNK = 64;   // tokens between two states in memory
constexpr int STEP = 16;    // tokens between two states in registers
constexpr int STEPS = CHUNK / STEP;
// Where steps have nothing to do with each other until the state goes through them (BY_STEP), each lies by
// itself in shared memory, and is step 0 of what lies there.
constexpr int ROWS = BY_STEP ? STEP : CHUNK;
constexpr int TILE = ROWS * N * 2;
constexpr int PIECES = N / 8, PIECE_BITS = N > 64 ? 4 : 3;  // of 16 bytes, in a row of a tile
// A step's channels are prepared 64 at a time, a part: all by one warp, or each by one of several.
constexpr int PARTS = N / 64, WARPS_PER_STEP = WARPS / STEPS, OWN_PARTS = PARTS / WARPS_PER_STEP;
constexpr int OWN_BLOCKS = 4 * OWN_PARTS;  // of 16 channels
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LOGIT_SCALE = 0.6065306597126334f;  // e^(-1/2)

// Bytes into shared memory. The tiles hold the inputs first: r becomes ρ, k κ, b β, a α. W receives what
// α loses to fp16, then squares (see `prepare`); w itself may take more room.
constexpr int W_ROW = W_FP32 ? 4 * N : 2 * N;
constexpr int SQUARE = 512, SOLVE_ROW = 80;
constexpr int RHO_LOW_ROW = N + 16;  // bytes; by step they lie where A_ab will be solved
constexpr int P_SQUARE = BY_STEP ? 0 : 2 * SQUARE;
constexpr int FACTORS_STEP = 2 * N * 4, SCALES_STEP = 16;
#if BY_STEP
// What the walk reads comes first, then w, what is solved with, and b if nothing but a product of it is
// read. LOWS: what κ and β lose to fp16; for the state a byte of each is enough, the upper ones of fp16
// numbers, κ's above β's in one tile. Backward it is fp16 and of β alone, and W_b takes its place.
constexpr int R = 0, A = TILE, K = WITH_K ? 2 * TILE : 0;
constexpr int FACTORS = BACKWARD ? 2 * TILE : 4 * TILE, SCALES = FACTORS + FACTORS_STEP;
constexpr int LOWS = SCALES + SCALES_STEP, B_LOW = LOWS, K_LOW = 0;
constexpr int W = LOWS + TILE, W_ROWS = W_FP32 ? LOWS : W;
constexpr int SOLVE = W + TILE, SOLVE_STEP = STEP * RHO_LOW_ROW;
constexpr int B = BACKWARD ? SOLVE + SOLVE_STEP : 3 * TILE;
constexpr int STEP_BYTES = BACKWARD ? B + TILE : SOLVE + SOLVE_STEP;
// Where W = X·α goes, and backward W_b = Xᵀ·β.
constexpr int MOVE = A, MOVE_BACK = B_LOW, KEY_BACK = 0;
#else
constexpr int R = 0, K = TILE, A = 2 * TILE, B = 3 * TILE, W = 4 * TILE, W_ROWS = W;
constexpr int SOLVE = W + CHUNK * W_ROW, SOLVE_STEP = 2 * SQUARE;
constexpr int FACTORS = SOLVE + STEPS * SOLVE_STEP;
constexpr int SCALES = FACTORS + STEPS * FACTORS_STEP;
constexpr int COMMON_BYTES = SCALES + STEPS * SCALES_STEP;
// MOVE receives W = X·α. What κ and β lose to fp16 makes room for κ + Nᵀ·β and W_b = Xᵀ·β.
constexpr int MOVE = COMMON_BYTES;
constexpr int K_LOW = MOVE + TILE, B_LOW = K_LOW + TILE, LOWS = 0;
constexpr int KEY_BACK = K_LOW, MOVE_BACK = B_LOW;
#endif

// What a step keeps in shared memory beside its rows of the tiles.
DEVICE char* step_squares(char* shared, int step) { return shared + W + step * STEP * W_ROW; }
DEVICE char* step_low(char* shared, int step) {  // a tile whose rows 16 step.. are the step's own
    return shared + W + step * STEP * (W_ROW - 2 * N);
}
DEVICE char* step_inverse(char* shared, int step) { return shared + SOLVE + step * SOLVE_STEP; }
// 2^m and 2^(G-m) of every channel, G being the step's whole decay.
DEVICE float* step_to_middle(char* shared, int step) {
    return (float*)(shared + FACTORS + step * FACTORS_STEP);
}
DEVICE float* step_to_end(char* shared, int step) { return step_to_middle(shared, step) + N; }
// The powers of two that the step's r, k and a are divided by (b is multiplied by a's).
DEVICE float* step_scales(char* shared, int step) {
    return (float*)(shared + SCALES + step * SCALES_STEP);
}

DEVICE float low_input(u32 x) { return INPUT_FP16 ? low_half(x) : low_bf16(x); }
DEVICE float high_input(u32 x) { return INPUT_FP16 ? high_half(x) : high_bf16(x); }
DEVICE u32 pack_input(float x, float y) { return INPUT_FP16 ? pack_half(x, y) : pack_bf16(x, y); }

DEVICE u32 max_pair(u32 x, u32 y) { return INPUT_FP16 ? max_pair_half(x, y) : max_pair_bf16(x, y); }
constexpr u32 SIGNLESS = 0x7fff7fffu;

DEVICE float log2_decay(float w) {
    return LOGIT ? -LOGIT_SCALE * LOG2E * inverse_of(1.0f + exp2_of(-LOG2E * w)) : w * LOG2E;
}

// Two neighbouring channels of a row: lane l has 2 l and 2 l + 1 of a part.
DEVICE u32* channels_at(char* tile, int row, int part) {
    int l = lane_id();
    return (u32*)(tile + tile_at(row, 8 * part + (l >> 2)) + (l & 3) * 4);
}
// The step that a warp prepares, the first of its parts there, and a barrier for the step's warps: the whole
// block's where they are several, since racecheck loses count of barriers beside those of a group.
DEVICE int prepared_step() { return BY_STEP ? 0 : WARPS_PER_STEP == 1 ? member() : member() % STEPS; }
DEVICE int prepared_part() { return WARPS_PER_STEP == 1 ? 0 : member() / STEPS; }
DEVICE void sync_step() {
    WARPS_PER_STEP == 1 ? sync_warp() : sync_block();
}

// Starts copying the rows of a warp's step of [tokens, H, N] numbers of `width` bytes; those past the
// end become zeros.
DEVICE void load_rows(char* tile, const char* from, i64 stride, int tokens, int width) {
    const int pieces = N * width / 16, first = STEP * prepared_step();
    for (int i = 32 * prepared_part() + lane_id(); i < STEP * pieces; i += 32 * WARPS_PER_STEP) {
        int row = first + i / pieces, piece = i % pieces;
        int at = width == 2 ? tile_at(row, piece) : row * W_ROW + piece * 16;
        bool valid = row < tokens;
        copy_16(tile + at, from + (valid ? row * stride + piece * 16 : 0), valid);
    }
}

// The tile's rows of a step times up (and the scale), as fp16; gives the power of two taken out.
DEVICE float scale_of(char* tile, int first) {
    u32 most = 0;
#pragma unroll
    for (int j = 0; j < STEP * PARTS; ++j)
        most = max_pair(most, *channels_at(tile, first + j % STEP, j / STEP) & SIGNLESS);
    return power_of_two(warp_max(fmaxf(low_input(most), high_input(most))));
}

// Both halves' upper bytes, and what rounds to them.
constexpr u32 UPPER = 0xff00ff00u, HALF_BYTE = 0x00800080u;
DEVICE void take_lows(u32 k[4], u32 b[4], const u32 lows[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) k[i] = lows[i] & UPPER, b[i] = lows[i] << 8 & UPPER;
}

// What ρ loses to fp16, for inputs of fp16 alone: the r·k of a few tokens may cancel, and then it shows.
// A tile, in W's place, or by step the upper bytes; read before A_ab is solved there.
DEVICE char* step_rho_low(char* shared, int step) {
    return BY_STEP ? step_inverse(shared, step) : shared + MOVE;
}
DEVICE void store_rho_low(char* tile, int row, int part, u32 low) {
    if (!BY_STEP) {
        *channels_at(tile, row, part) = low;
        return;
    }
    const u32 bytes = low + HALF_BYTE;
    *(u16*)(tile + row % STEP * RHO_LOW_ROW + 64 * part + 2 * lane_id()) =
        (u16)((bytes >> 8 & 0xffu) | (bytes >> 16 & 0xff00u));
}
DEVICE void left_rho_low(u32 x[4], const char* tile, int first, int block) {
    if (!BY_STEP) {
        left_operand(x, tile, first, block);
        return;
    }
    const char* at = tile + (lane_id() >> 2) * RHO_LOW_ROW + 16 * block + (lane_id() & 3) * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 bytes = *(const u16*)(at + (i & 1) * 8 * RHO_LOW_ROW + (i >> 1) * 8);
        x[i] = bytes << 8 & 0xff00u | bytes << 16 & 0xff000000u;
    }
}

// Waits for the step's rows; those of w past the end are made such that nothing decays there.
DEVICE void rows_loaded(char* shared, int tokens) {
    const int first = STEP * prepared_step();
    copies_done();
    sync_step();
    // Zeros, as they were filled, are decays of 1. Several warps must meet at the barrier below.
    if (!LOGIT || (WARPS_PER_STEP == 1 && first + STEP <= tokens)) return;
    for (int i = 32 * prepared_part() + lane_id(); i < STEP * N; i += 32 * WARPS_PER_STEP) {
        const int row = first + i / N, channel = i % N;
        if (row < tokens) continue;
        if (W_FP32)
            ((float*)(shared + W_ROWS + row * W_ROW))[channel] = -1e30f;
        else
            ((u16*)(shared + W_ROWS + tile_at(row, channel >> 3)))[channel & 7] =
                INPUT_FP16 ? 0xfc00 : 0xff80;
    }
    sync_step();
}

struct Decays {  // 2^(g-m) after each token of a step, of two channels; at first g itself
    float up0[STEP], up1[STEP], before0, before1;  // before: 2^-m
};

// The decays of a part's channels, from the step's rows of w; 2^m and 2^(G-m) to shared memory.
DEVICE void find_decays(char* shared, int step, int part, Decays& d) {
    const int lane = lane_id(), first = STEP * step, channel = 64 * part + 2 * lane;
    float g0 = 0, g1 = 0;
#pragma unroll
    for (int j = 0; j < STEP; ++j) {
        float w0, w1;
        if (W_FP32) {
            const float* row = (const float*)(shared + W_ROWS + (first + j) * W_ROW) + channel;
            w0 = row[0], w1 = row[1];
        } else {
            u32 x = *channels_at(shared + W_ROWS, first + j, part);
            w0 = low_input(x), w1 = high_input(x);
        }
        g0 += log2_decay(w0), g1 += log2_decay(w1);
        d.up0[j] = g0, d.up1[j] = g1;
    }
    const float m0 = d.up0[STEP / 2 - 1], m1 = d.up1[STEP / 2 - 1];
    float* to_middle = step_to_middle(shared, step) + channel;
    float* to_end = step_to_end(shared, step) + channel;
    to_middle[0] = exp2_of(m0), to_middle[1] = exp2_of(m1);
    to_end[0] = exp2_of(g0 - m0), to_end[1] = exp2_of(g1 - m1);
    d.before0 = exp2_of(-m0), d.before1 = exp2_of(-m1);
#pragma unroll
    for (int j = 0; j < STEP; ++j)
        d.up0[j] = exp2_of(d.up0[j] - m0), d.up1[j] = exp2_of(d.up1[j] - m1);
}

// A part's channels of the operands over those of the inputs.
DEVICE void turn_operands(char* shared, int step, int part, const Decays& d, float r_inverse,
                          float k_inverse, float a_inverse, float a_scale) {
    const int first = STEP * step;
    char* low = step_low(shared, step);
    float before0 = d.before0, before1 = d.before1;
#pragma unroll
    for (int j = 0; j < STEP; ++j) {
        u32* r = channels_at(shared + R, first + j, part);
        u32* k = channels_at(shared + K, first + j, part);
        u32* a = channels_at(shared + A, first + j, part);
        u32* b = channels_at(shared + B, first + j, part);
        float down0 = inverse_of(d.up0[j]), down1 = inverse_of(d.up1[j]);
        if (WITH_R) {
            const float r0 = low_input(*r) * (d.up0[j] * r_inverse);
            const float r1 = high_input(*r) * (d.up1[j] * r_inverse);
            *r = pack_half(r0, r1);
            if (INPUT_FP16)
                store_rho_low(step_rho_low(shared, step), first + j, part,
                              pack_half(r0 - low_half(*r), r1 - high_half(*r)));
        }
        u32 k_low = 0;
        if (WITH_K) {
            float k0 = low_input(*k) * (down0 * k_inverse);
            float k1 = high_input(*k) * (down1 * k_inverse);
            *k = pack_half(k0, k1);
            k_low = pack_half(k0 - low_half(*k), k1 - high_half(*k));
        }
        float b0 = low_input(*b) * (down0 * a_scale), b1 = high_input(*b) * (down1 * a_scale);
        *b = pack_half(b0, b1);
        const u32 b_low = pack_half(b0 - low_half(*b), b1 - high_half(*b));
        if (BACKWARD) {
            if (WITH_K) *channels_at(shared + K_LOW, first + j, part) = k_low;
            *channels_at(shared + B_LOW, first + j, part) = b_low;
        } else
            *channels_at(shared + LOWS, first + j, part) =
                (k_low + HALF_BYTE & UPPER) | (b_low + HALF_BYTE & UPPER) >> 8;
        float a0 = low_input(*a) * (before0 * a_inverse);
        float a1 = high_input(*a) * (before1 * a_inverse);
        *a = pack_half(a0, a1);
        *channels_at(low, first + j, part) = pack_half(a0 - low_half(*a), a1 - high_half(*a));
        before0 = d.up0[j], before1 = d.up1[j];
    }
}

// Forward what κ and β lose is kept to the byte, whose smallest number is 2^-16: of numbers about 1/16, as a
// key's are, nothing would be left of it. So κ is taken 8 times larger and β 16 times, v and α smaller.
constexpr float K_ROOM = BACKWARD ? 1.0f : 1.0f / 8, A_ROOM = BACKWARD ? 1.0f : 16.0f;

// The operands of a step, from its rows of the inputs.
DEVICE void prepare_operands(char* shared) {
    const int step = prepared_step(), first = STEP * step, part = prepared_part();
    Decays decays[OWN_PARTS];
#pragma unroll
    for (int i = 0; i < OWN_PARTS; ++i) find_decays(shared, step, part + i, decays[i]);
    const float r_scale = WITH_R ? scale_of(shared + R, first) : 1.0f;
    const float k_scale = WITH_K ? scale_of(shared + K, first) * K_ROOM : 1.0f;
    const float a_scale = scale_of(shared + A, first) * A_ROOM;
    const float r_inverse = inverse_power(r_scale), k_inverse = inverse_power(k_scale);
    const float a_inverse = inverse_power(a_scale);
    if (lane_id() == 0 && part == 0) {
        float* scales = step_scales(shared, step);
        scales[0] = r_scale, scales[1] = k_scale, scales[2] = a_scale;
    }
    sync_step();  // w has been read, and the inputs for their scales; their rows are used anew
#pragma unroll
    for (int i = 0; i < OWN_PARTS; ++i)
        turn_operands(shared, step, part + i, decays[i], r_inverse, k_inverse, a_inverse, a_scale);
    sync_step();
}

// (I - A_ab)⁻¹ of a step, a column a lane, by forward substitution in fp32; kept as two squares of
// fp16, the number rounded and what that leaves.
DEVICE void invert(char* inverse, char* scratch, const float ab[2][4]) {
    const int lane = lane_id(), column = lane & 15;
    const int row = lane >> 2, at = (lane & 3) * 2;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        float* top = (float*)(scratch + row * SOLVE_ROW) + 8 * n + at;
        float* bottom = (float*)(scratch + (row + 8) * SOLVE_ROW) + 8 * n + at;
        top[0] = ab[n][0], top[1] = ab[n][1], bottom[0] = ab[n][2], bottom[1] = ab[n][3];
    }
    sync_warp();
    float x[STEP];
#pragma unroll
    for (int i = 0; i < STEP; ++i) x[i] = 0;
#pragma unroll
    for (int i = 0; i < STEP; ++i) {
        float sum = i == column ? 1.0f : 0.0f;
#pragma unroll
        for (int l = 0; l < i; l += 4) {
            const float4 a = *(const float4*)(scratch + i * SOLVE_ROW + 4 * l);
            sum += a.x * x[l] + a.y * x[l + 1] + a.z * x[l + 2] + a.w * x[l + 3];
        }
        x[i] = sum;
    }
    sync_warp();  // by step the squares overwrite what was solved
    char* square = inverse + (lane < 16 ? 0 : SQUARE);
#pragma unroll
    for (int i = 0; i < STEP; ++i) {
        u32 high = pack_half(x[i], 0.0f);
        u32 mine = lane < 16 ? high : pack_half(x[i] - low_half(high), 0.0f);
        *(u16*)(square + square_at(i, column >> 3) + (column & 7) * 2) = (u16)mine;
    }
    sync_warp();
}

DEVICE void keep_lower(float d[2][4], bool diagonal) {
    const int row = lane_id() >> 2, column = (lane_id() & 3) * 2;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        int t = row + (i & 2) * 4, s = column + (i & 1) + (i >> 2) * 8;
        if (t < s || (t == s && !diagonal)) d[i >> 2][i & 3] = 0;
    }
}

// The scores of a step's tokens: A_ab and A_ak below the diagonal, A_rb and A_rk with it.
DEVICE void find_scores(const char* shared, int first, const char* alpha_low, const char* rho_low,
                        float ab[2][4], float ak[2][4], float rb[2][4], float rk[2][4]) {
#pragma unroll
    for (int block = 0; block < N / 16; ++block) {
        u32 alpha[4], rho[4], beta[4], kappa[4];
        left_operand(alpha, shared + A, first, block);
        columns_operand(beta, shared + B, first, block);
        mma_pair(ab, alpha, beta);
        if (WITH_R) {
            left_operand(rho, shared + R, first, block);
            mma_pair(rb, rho, beta);
        }
        if (WITH_K) {
            columns_operand(kappa, shared + K, first, block);
            mma_pair(ak, alpha, kappa);
        }
        if (WITH_R && WITH_K) mma_pair(rk, rho, kappa);
        if (INPUT_FP16) {  // held to finer bounds than bf16
            u32 low[4], k_low[4], b_low[4];
            left_operand(low, alpha_low, first, block);
            mma_pair(ab, low, beta);
            if (WITH_K) mma_pair(ak, low, kappa);
            if (BACKWARD) {
                columns_operand(k_low, shared + K_LOW, first, block);
                columns_operand(b_low, shared + B_LOW, first, block);
            } else {
                columns_operand(low, shared + LOWS, first, block);
                take_lows(k_low, b_low, low);
            }
            mma_pair(ab, alpha, b_low);
            if (WITH_R) mma_pair(rb, rho, b_low);
            if (WITH_K) mma_pair(ak, alpha, k_low);
            if (WITH_R && WITH_K) mma_pair(rk, rho, k_low);
            if (!WITH_R) continue;
            left_rho_low(low, rho_low, first, block);
            mma_pair(rb, low, beta);
            if (WITH_K) mma_pair(rk, low, kappa);
        }
    }
    keep_lower(ab, false), keep_lower(ak, false), keep_lower(rb, true), keep_lower(rk, true);
}

// W = X·α of a step.
DEVICE void find_move(char* shared, int step, const char* inverse) {
    const int first = STEP * step, from = prepared_part() * OWN_BLOCKS;
    u32 x_high[4], x_low[4];
    left_square(x_high, inverse), left_square(x_low, inverse + SQUARE);
#pragma unroll
    for (int block = from; block < from + OWN_BLOCKS; ++block) {
        u32 high[4], low[4];
        rows_operand(high, shared + A, first, block);
        rows_operand(low, step_low(shared, step), first, block);
        float d[2][4] = {};
        multiply_split(d, x_high, x_low, high, low);
        store_rows(shared + MOVE, first, block, d);
    }
}

// W_b = Xᵀ·β of a step, and κ + Nᵀ·β, by which E reaches v: on a repeated key its terms cancel, and
// they do so here, in fp32, before E multiplies what is left.
DEVICE void find_move_back(char* shared, int step, const char* inverse, const char* squares) {
    const int first = STEP * step, from = prepared_part() * OWN_BLOCKS;
    u32 x_high[4], x_low[4], n_high[4], n_low[4];
    rows_square(x_high, inverse), rows_square(x_low, inverse + SQUARE);
    if (WITH_K) rows_square(n_high, squares), rows_square(n_low, squares + 3 * SQUARE);
#pragma unroll
    for (int block = from; block < from + OWN_BLOCKS; ++block) {
        u32 b_high[4], b_low[4], high[4], low[4];
        float w[2][4] = {}, key[2][4];
        left_transposed(b_high, shared + B, first, block);
        left_transposed(b_low, shared + B_LOW, first, block);
        multiply_split(w, b_high, b_low, x_high, x_low);
        as_left(high, w);
        store_transposed(shared + MOVE_BACK, first, block, high);
        if (!WITH_K) continue;
        left_transposed(high, shared + K, first, block);
        left_transposed(low, shared + K_LOW, first, block);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            key[i >> 1][(i & 1) * 2] = low_half(high[i]) + low_half(low[i]);
            key[i >> 1][(i & 1) * 2 + 1] = high_half(high[i]) + high_half(low[i]);
        }
        multiply_split(key, b_high, b_low, n_high, n_low);
        as_left(high, key);
        store_transposed(shared + KEY_BACK, first, block, high);
    }
}

// The squares [16, 16] of a step: N = X·A_ak; forward A_rk and A_rb, by which v and U reach y; backward
// G = A_rk + A_rb·N and P = A_rb·X, by which dY reaches v and Z. What cancels in these products on a
// repeated key does so in fp32, before it is rounded.
DEVICE void find_squares(const char* inverse, char* squares, const float ak[2][4],
                         const float rb[2][4], float rk[2][4]) {
    u32 high[4], low[4], x_high[4], x_low[4];
    if (WITH_K) {
        float n[2][4] = {};
        store_square_split(squares, squares + 3 * SQUARE, ak);
        sync_warp();
        left_square(x_high, inverse), left_square(x_low, inverse + SQUARE);
        rows_square(high, squares), rows_square(low, squares + 3 * SQUARE);
        multiply_split(n, x_high, x_low, high, low);
        sync_warp();
        store_square_split(squares, squares + 3 * SQUARE, n);
    }
    if (BACKWARD) {
        float p[2][4] = {};
        sync_warp();
        as_left_split(high, low, rb);
        rows_square(x_high, inverse), rows_square(x_low, inverse + SQUARE);
        multiply_split(p, high, low, x_high, x_low);
        store_square(squares + P_SQUARE, p);
        if (WITH_K) {
            rows_square(x_high, squares), rows_square(x_low, squares + 3 * SQUARE);
            multiply_split(rk, high, low, x_high, x_low);
            store_square(squares + SQUARE, rk);
        }
    } else if (WITH_R) {
        store_square(squares + SQUARE, rk), store_square(squares + 2 * SQUARE, rb);
    }
}

// All that a step needs before the state: operands, X, W, and the squares at step_squares.
DEVICE void prepare(char* shared) {
    const int step = prepared_step(), first = STEP * step;
    const bool leads = prepared_part() == 0;  // of the step's warps, the one that finds the squares
    prepare_operands(shared);
    float ab[2][4] = {}, ak[2][4] = {}, rb[2][4] = {}, rk[2][4] = {};
    char *inverse = step_inverse(shared, step), *squares = step_squares(shared, step);
    if (leads) {
        find_scores(shared, first, step_low(shared, step), step_rho_low(shared, step), ab, ak, rb, rk);
        if (INPUT_FP16) sync_warp();  // what ρ loses has been read
        invert(inverse, BY_STEP ? inverse : shared + MOVE + first * 2 * N, ab);
    }
    if (WARPS_PER_STEP > 1) sync_step();
    if (WITH_MOVE) find_move(shared, step, inverse);
    sync_step();  // the low part of α has been read; its rows are used anew
    if (leads) find_squares(inverse, squares, ak, rb, rk);
    if (WARPS_PER_STEP > 1) sync_step();
    if (BACKWARD) find_move_back(shared, step, inverse, squares);
}
