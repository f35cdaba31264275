// From the gradients of a step's operands to those of its inputs, a warp 16 channels.
#pragma once
#include "chunk.cuh"

struct Gradients {  // of a step's operands, the warp's 16 channels
    float r[2][4], a[2][4], k[2][4], b[2][4];
};

// The sum of x over the tokens from each on, within a step: x is a product's pair of rows q, q + 8.
DEVICE void sums_from_each(float& top, float& bottom) {
    const int lane = lane_id();
#pragma unroll
    for (int shift = 4; shift < 32; shift <<= 1) {
        const int from = lane + shift;
        const float t = shuffle_from(top, from & 31), b = shuffle_from(bottom, from & 31);
        top += from < 32 ? t : 0.0f, bottom += from < 32 ? b : 0.0f;
    }
    top += shuffle_from(bottom, lane & 3);
}
// The sum of x over the tokens up to each.
DEVICE void sums_to_each(float& top, float& bottom) {
    const int lane = lane_id();
#pragma unroll
    for (int shift = 4; shift < 32; shift <<= 1) {
        const int from = lane - shift;
        const float t = shuffle_from(top, from & 31), b = shuffle_from(bottom, from & 31);
        top += from >= 0 ? t : 0.0f, bottom += from >= 0 ? b : 0.0f;
    }
    bottom += shuffle_from(top, 28 + (lane & 3));
}

DEVICE float decay_slope(float w) {  // of the base-e log decay to w
    const float rise = inverse_of(1.0f + exp2_of(-LOG2E * w));
    const float fall = inverse_of(1.0f + exp2_of(LOG2E * w));
    return LOGIT ? -LOGIT_SCALE * rise * fall : 1.0f;
}

// By channels: the gradients of the inputs from those of the operands, in place of the operands;
// dw straight to memory. `after`: what arrives at the log decays of the step's last token from the
// tokens behind it, for columns 2 (lane % 4) + {0, 1, 8, 9} of the warp's channels; moves on.
// `begins`: the state before the step is empty, and its first token has nothing to decay: its dw is
// zero, of which the sums would leave what fp32 loses in them.
DEVICE void finish_step(char* shared, int step, const Gradients& d, const char* w, char* dw,
                        i64 stride, int left, float unit, float after[4], bool begins) {
    const int first = STEP * step, lane = lane_id(), q = lane >> 2, warp = member();
    const float* scales = step_scales(shared, step);
    const float r_unit = unit * inverse_power(scales[0]), k_unit = unit * inverse_power(scales[1]);
    const float a_unit = unit * inverse_power(scales[2]), b_unit = unit * scales[2];
    const float top_unit = begins && q == 0 ? 0.0f : unit;
    const bool top_inside = first + q < left, bottom_inside = first + 8 + q < left;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const int channel = 16 * warp + 8 * n + (lane & 3) * 2;
        const int piece = 2 * warp + n, at = (lane & 3) * 4;
        float w_top[2] = {}, w_bottom[2] = {};
        const i64 top_row = (first + q) * stride + channel, bottom_row = top_row + 8 * stride;
        if (W_FP32) {
            if (top_inside) w_top[0] = ((const float*)w)[top_row], w_top[1] = ((const float*)w)[top_row + 1];
            if (bottom_inside) w_bottom[0] = ((const float*)w)[bottom_row], w_bottom[1] = ((const float*)w)[bottom_row + 1];
        } else {
            if (top_inside) {
                u32 x = *(const u32*)(w + 2 * top_row);
                w_top[0] = low_input(x), w_top[1] = high_input(x);
            }
            if (bottom_inside) {
                u32 x = *(const u32*)(w + 2 * bottom_row);
                w_bottom[0] = low_input(x), w_bottom[1] = high_input(x);
            }
        }
        u32* r_top = (u32*)(shared + R + tile_at(first + q, piece) + at);
        u32* r_bottom = (u32*)(shared + R + tile_at(first + q + 8, piece) + at);
        u32* a_top = (u32*)(shared + A + tile_at(first + q, piece) + at);
        u32* a_bottom = (u32*)(shared + A + tile_at(first + q + 8, piece) + at);
        u32* k_top = (u32*)(shared + K + tile_at(first + q, piece) + at);
        u32* k_bottom = (u32*)(shared + K + tile_at(first + q + 8, piece) + at);
        u32* b_top = (u32*)(shared + B + tile_at(first + q, piece) + at);
        u32* b_bottom = (u32*)(shared + B + tile_at(first + q + 8, piece) + at);
        float dr[4], da[4], dk[4], db[4], dlog[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float log_top = top_inside ? log2_decay(w_top[i]) : 0.0f;
            const float log_bottom = bottom_inside ? log2_decay(w_bottom[i]) : 0.0f;
            float g_top = log_top, g_bottom = log_bottom;
            sums_to_each(g_top, g_bottom);
            const float middle = shuffle_from(g_top, 28 + (lane & 3));
            g_top -= middle, g_bottom -= middle;
            // What arrives at g and at e, from the operands as they were rounded.
            const float q_top = (i ? high_half(*a_top) : low_half(*a_top)) * d.a[n][i];
            const float q_bottom = (i ? high_half(*a_bottom) : low_half(*a_bottom)) * d.a[n][2 + i];
            float top = q_top + (i ? high_half(*r_top) : low_half(*r_top)) * d.r[n][i] -
                        (i ? high_half(*k_top) : low_half(*k_top)) * d.k[n][i] -
                        (i ? high_half(*b_top) : low_half(*b_top)) * d.b[n][i];
            float bottom = q_bottom + (i ? high_half(*r_bottom) : low_half(*r_bottom)) * d.r[n][2 + i] -
                           (i ? high_half(*k_bottom) : low_half(*k_bottom)) * d.k[n][2 + i] -
                           (i ? high_half(*b_bottom) : low_half(*b_bottom)) * d.b[n][2 + i];
            sums_from_each(top, bottom);
            const float behind = after[2 * n + i];
            dlog[i] = (behind + top - q_top) * top_unit * decay_slope(w_top[i]);
            dlog[2 + i] = (behind + bottom - q_bottom) * unit * decay_slope(w_bottom[i]);
            after[2 * n + i] = behind + shuffle_from(top, lane & 3);
            const float up_top = exp2_of(g_top), up_bottom = exp2_of(g_bottom);
            const float down_top = inverse_of(up_top), down_bottom = inverse_of(up_bottom);
            dr[i] = d.r[n][i] * up_top * r_unit, dr[2 + i] = d.r[n][2 + i] * up_bottom * r_unit;
            da[i] = d.a[n][i] * exp2_of(g_top - log_top) * a_unit;
            da[2 + i] = d.a[n][2 + i] * exp2_of(g_bottom - log_bottom) * a_unit;
            dk[i] = d.k[n][i] * down_top * k_unit, dk[2 + i] = d.k[n][2 + i] * down_bottom * k_unit;
            db[i] = d.b[n][i] * down_top * b_unit, db[2 + i] = d.b[n][2 + i] * down_bottom * b_unit;
        }
        *r_top = pack_input(dr[0], dr[1]), *r_bottom = pack_input(dr[2], dr[3]);
        *a_top = pack_input(da[0], da[1]), *a_bottom = pack_input(da[2], da[3]);
        *k_top = pack_input(dk[0], dk[1]), *k_bottom = pack_input(dk[2], dk[3]);
        *b_top = pack_input(db[0], db[1]), *b_bottom = pack_input(db[2], db[3]);
        if (W_FP32) {
            if (top_inside) *(float2*)((float*)dw + top_row) = {dlog[0], dlog[1]};
            if (bottom_inside) *(float2*)((float*)dw + bottom_row) = {dlog[2], dlog[3]};
        } else {
            if (top_inside) *(u32*)(dw + 2 * top_row) = pack_input(dlog[0], dlog[1]);
            if (bottom_inside) *(u32*)(dw + 2 * bottom_row) = pack_input(dlog[2], dlog[3]);
        }
    }
}

// A whole tile of finished gradients to memory.
DEVICE void store_tile(char* to, const char* tile, i64 stride, int left) {
    for (int i = group_thread(); i < CHUNK * PIECES; i += GROUP) {
        const int row = i >> PIECE_BITS, piece = i & (PIECES - 1);
        if (row < left)
            *(uint4*)(to + row * stride + piece * 16) = *(const uint4*)(tile + tile_at(row, piece));
    }
}
