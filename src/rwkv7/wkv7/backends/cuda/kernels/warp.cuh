// What a warp can do: 16 x 16 x 16 products of fp16 tiles, tile loads, packing, scales.
//
// Fragments are those of mma.sync.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"). A lane
// holds of a product [16, 8], with q = lane / 4 and p = 2 (lane % 4), the elements [q][p], [q][p+1],
// [q+8][p], [q+8][p+1]. Two such tiles side by side, packed to fp16, are the left operand [16, 16]
// of the next product: results become operands without leaving the registers.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;
typedef unsigned long long u64;

#ifndef EMULATED
#define DEVICE __device__ __forceinline__
#define MEMBER __device__ __forceinline__  // of a struct

DEVICE int lane_id() { return threadIdx.x & 31; }
DEVICE int warp_id() { return threadIdx.x >> 5; }

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// d += a b: d [16, 8] fp32, a [16, 16] and b [16, 8] fp16.
DEVICE void mma(float d[4], const u32 a[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 tiles of 16-bit numbers; lane l gives the address of row l % 8 of tile l / 8.
DEVICE void load_tiles(u32 r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)) : "memory");
}

// The same, each tile transposed.
DEVICE void load_tiles_transposed(u32 r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)) : "memory");
}

// The reverse of load_tiles_transposed.
DEVICE void store_tiles_transposed(void* row, const u32 r[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(
                     shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
#else
    const u32 mine = shared_address(row);
    const int l = lane_id(), q = l >> 2, p = (l & 3) * 2;
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 to = __shfl_sync(0xffffffffu, mine, 8 * m + p + i) + 2 * q;
            const u16 x = (u16)(r[m] >> (16 * i));
            asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(x) : "memory");
        }
#endif
}

// A tile [8, 8] of 16-bit numbers in registers, transposed.
DEVICE u32 transpose_tile(u32 x) {
    u32 r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
    return r;
}

// 16 bytes to shared memory, zeros unless `valid`; done after copies_done.
DEVICE void copy_16(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid ? 16 : 0) : "memory");
}
DEVICE void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Two numbers rounded to fp16 (bf16), the first in the low half.
DEVICE u32 pack_half(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
DEVICE u32 pack_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
DEVICE float half_value(u16 x) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
    return r;
}
DEVICE float exp2_of(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
DEVICE float inverse_of(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
// The larger of each of two numbers; of fp16, or of bf16.
DEVICE u32 max_pair_half(u32 x, u32 y) {
    u32 r;
    asm("max.f16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
    return r;
}
DEVICE u32 max_pair_bf16(u32 x, u32 y) {
    u32 r;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
    return r;
}
// The largest over the warp of numbers that are not negative: their bits have the same order.
DEVICE float warp_max(float x) {
    return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(x)));
}
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE bool warp_any(bool x) { return __any_sync(0xffffffffu, x); }
DEVICE float shuffle_from(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
DEVICE float from_bits(u32 x) { return __uint_as_float(x); }
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
#endif

// A group of warps does a chunk's work together: four, which have 64 rows of the state [V, K]; where
// gradients are sums over V, as many as have all rows. A block may have several groups.
constexpr int WARPS = BY_STEP ? 4 : HEAD / 16, GROUP = 32 * WARPS;
DEVICE int member() { return warp_id() & (WARPS - 1); }
DEVICE int group_thread() { return threadIdx.x & (GROUP - 1); }

DEVICE float low_half(u32 x) { return half_value((u16)(x & 0xffffu)); }
DEVICE float high_half(u32 x) { return half_value((u16)(x >> 16)); }
DEVICE float low_bf16(u32 x) { return from_bits(x << 16); }
DEVICE float high_bf16(u32 x) { return from_bits(x & 0xffff0000u); }

// The largest of x over the four lanes that share a row of a fragment.
DEVICE float row_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}

// The power of two at or below x; 1 for what is no scale: zero, the subnormal, the huge, NaN.
DEVICE float power_of_two(float x) {
    return x > 1e-30f && x < 1e30f ? from_bits(bits_of(x) & 0x7f800000u) : 1.0f;
}
// 1 / p for a power of two, exactly.
DEVICE float inverse_power(float p) { return from_bits(0x7f000000u - bits_of(p)); }

// ---- Tiles in shared memory, 16-bit numbers ------------------------------------------------------

// A tile [rows, HEAD]; the 16-byte pieces of a row are permuted so that eight rows' same piece lie in
// different banks.
DEVICE int tile_at(int row, int piece) { return row * (2 * HEAD) + ((piece ^ (row & 7)) << 4); }
// A tile [16, 16], 32 bytes a row, permuted likewise.
DEVICE int square_at(int row, int piece) { return row * 32 + ((piece ^ (row >> 2 & 1)) << 4); }

// Operands from rows first.. of a tile X [rows, HEAD]; channels 16 block..
// left: X itself as the left operand. columns: Xᵀ as the right operand, two tiles of 8 rows of X:
// r[0], r[1] for the first, r[2], r[3] for the second. rows: X as the right operand, r[0], r[1] for
// channels 0-7 of the block, r[2], r[3] for 8-15.
DEVICE void left_operand(u32 r[4], const char* tile, int first, int block) {
    int l = lane_id();
    load_tiles(r, tile + tile_at(first + (l & 15), 2 * block + (l >> 4)));
}
DEVICE void columns_operand(u32 r[4], const char* tile, int first, int block) {
    int l = lane_id();
    load_tiles(r, tile + tile_at(first + (l & 7) + (l >> 4 << 3), 2 * block + (l >> 3 & 1)));
}
DEVICE void rows_operand(u32 r[4], const char* tile, int first, int block) {
    int l = lane_id();
    load_tiles_transposed(r, tile + tile_at(first + (l & 15), 2 * block + (l >> 4)));
}
// Xᵀ as the left operand: channels 16 block.. of 16 rows of X.
DEVICE void left_transposed(u32 r[4], const char* tile, int first, int block) {
    int l = lane_id();
    load_tiles_transposed(r,
                          tile + tile_at(first + (l & 7) + (l >> 4 << 3), 2 * block + (l >> 3 & 1)));
}
DEVICE void store_transposed(char* tile, int first, int block, const u32 r[4]) {
    int l = lane_id();
    store_tiles_transposed(
        tile + tile_at(first + (l & 7) + (l >> 4 << 3), 2 * block + (l >> 3 & 1)), r);
}
// The same for a square [16, 16].
DEVICE void left_square(u32 r[4], const char* square) {
    int l = lane_id();
    load_tiles(r, square + square_at(l & 15, l >> 4));
}
DEVICE void columns_square(u32 r[4], const char* square) {
    int l = lane_id();
    load_tiles(r, square + square_at((l & 7) + (l >> 4 << 3), l >> 3 & 1));
}
// Xᵀ of a square as the left operand, and X as the right one.
DEVICE void left_square_transposed(u32 r[4], const char* square) {
    int l = lane_id();
    load_tiles_transposed(r, square + square_at((l & 7) + (l >> 4 << 3), l >> 3 & 1));
}
DEVICE void rows_square(u32 r[4], const char* square) {
    int l = lane_id();
    load_tiles_transposed(r, square + square_at(l & 15, l >> 4));
}

// d [16, 16] += a b, with b as one of the operands above.
DEVICE void mma_pair(float d[2][4], const u32 a[4], const u32 b[4]) {
    mma(d[0], a, b[0], b[1]);
    mma(d[1], a, b[2], b[3]);
}
// d += a b of operands in two halves each: of the four products the three that count.
DEVICE void multiply_split(float d[2][4], const u32 a_high[4], const u32 a_low[4],
                           const u32 b_high[4], const u32 b_low[4]) {
    mma_pair(d, a_high, b_high), mma_pair(d, a_high, b_low), mma_pair(d, a_low, b_high);
}
// A product [16, 16] as a left operand; `high` rounded to fp16, `low` what that leaves.
DEVICE void as_left(u32 a[4], const float d[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = pack_half(d[i >> 1][(i & 1) * 2], d[i >> 1][(i & 1) * 2 + 1]);
}
DEVICE void as_left_split(u32 high[4], u32 low[4], const float d[2][4]) {
    as_left(high, d);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        low[i] = pack_half(d[i >> 1][(i & 1) * 2] - low_half(high[i]),
                           d[i >> 1][(i & 1) * 2 + 1] - high_half(high[i]));
}
// A left operand [16, 16], or a product, into 16 rows of a tile, channels 16 block..
DEVICE void store_left(char* tile, int first, int block, const u32 a[4]) {
    int row = first + (lane_id() >> 2), at = (lane_id() & 3) * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        *(u32*)(tile + tile_at(row + (i & 1) * 8, 2 * block + (i >> 1)) + at) = a[i];
}
DEVICE void store_rows(char* tile, int first, int block, const float d[2][4]) {
    u32 a[4];
    as_left(a, d);
    store_left(tile, first, block, a);
}
// A product [16, 16] into a square of shared memory.
DEVICE void store_square(char* square, const float d[2][4]) {
    int row = lane_id() >> 2, at = (lane_id() & 3) * 4;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        *(u32*)(square + square_at(row, n) + at) = pack_half(d[n][0], d[n][1]);
        *(u32*)(square + square_at(row + 8, n) + at) = pack_half(d[n][2], d[n][3]);
    }
}
// The same in two squares: the number rounded, and what that leaves.
DEVICE void store_square_split(char* high, char* low, const float d[2][4]) {
    u32 a[4], b[4];
    as_left_split(a, b, d);
    int row = lane_id() >> 2, at = (lane_id() & 3) * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int to = square_at(row + (i & 1) * 8, i >> 1) + at;
        *(u32*)(high + to) = a[i], *(u32*)(low + to) = b[i];
    }
}
