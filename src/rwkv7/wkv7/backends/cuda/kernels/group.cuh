// Products of four warps at once, a warp 16 rows of the left operand: Hopper's wgmma.
//
// The right operand is read from shared memory once for the four, where mma.sync reads it once for each.
// It must lie where the instruction finds it: rows of 128 bytes from 1024 bytes on, squares from 256 on,
// with pieces permuted as `tile_at` and `square_at` do. On other cards each warp multiplies by itself.
// Products are begun in batches: none of a batch is there, nor has read its operands, before it is done.
#pragma once
#include "warp.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define WGMMA 1
#else
#define WGMMA 0
#endif

#if WGMMA
// What other threads wrote to shared memory is there for the products of those who wait for this one.
DEVICE void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All batches but the last PENDING are done, and with them d.
template <int PENDING, int TILES>
DEVICE void products_done(float (&d)[TILES][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
}

// How a right operand lies: `across` bytes from one group of eight rows to the next.
enum { TILE_LAYOUT = 1, SQUARE_LAYOUT = 3 };
DEVICE unsigned long long operand_at(const char* p, int layout, int across) {
    const unsigned long long at = (shared_address(p) & 0x3ffff) >> 4;
    return at | 1ull << 16 | (unsigned long long)(across >> 4) << 32 | (unsigned long long)layout << 62;
}

#define FOUR(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define REST "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(FRESH ? 0 : 1), "n"(BY_ROWS)
// d [64, 8 TILES] += a b; FRESH: = a b. BY_ROWS: b's rows are those of the product's sum.
template <bool FRESH, int BY_ROWS>
DEVICE void multiply_group(float (&d)[2][4], const u32 a[4], unsigned long long b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %13, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7}, "
        "{%8,%9,%10,%11}, %12, p, 1, 1, %14;}" : FOUR(d[0]), FOUR(d[1]) : REST);
}
template <bool FRESH, int BY_ROWS>
DEVICE void multiply_group(float (&d)[4][4], const u32 a[4], unsigned long long b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,"
        "%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p, 1, 1, %22;}"
        : FOUR(d[0]), FOUR(d[1]), FOUR(d[2]), FOUR(d[3]) : REST);
}
template <bool FRESH, int BY_ROWS>
DEVICE void multiply_group(float (&d)[8][4], const u32 a[4], unsigned long long b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,"
        "%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
        "{%32,%33,%34,%35}, %36, p, 1, 1, %38;}"
        : FOUR(d[0]), FOUR(d[1]), FOUR(d[2]), FOUR(d[3]), FOUR(d[4]), FOUR(d[5]), FOUR(d[6]), FOUR(d[7])
        : REST);
}
#undef FOUR
#undef REST
#else
DEVICE void show_to_products() {}
DEVICE void begin_products() {}
DEVICE void end_products() {}
template <int PENDING, int TILES>
DEVICE void products_done(float (&)[TILES][4]) {}
template <bool FRESH, int TILES>
DEVICE void begin_sum(float (&d)[TILES][4]) {
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) d[n][i] = FRESH ? 0 : d[n][i];
}
#endif

// d += a Xᵀ: rows 0 to 8 TILES of a tile X, channels 16 block..
template <int TILES>
DEVICE void add_columns(float (&d)[TILES][4], const u32 a[4], const char* tile, int block) {
#if WGMMA
    multiply_group<false, 0>(d, a, operand_at(tile + 32 * block, TILE_LAYOUT, 1024));
#else
#pragma unroll
    for (int n = 0; n < TILES; n += 2) {
        u32 b[4];
        columns_operand(b, tile, 8 * n, block);
        mma_pair(&d[n], a, b);
    }
#endif
}
// d += a X: X a tile of 16 rows.
DEVICE void add_rows(float (&d)[8][4], const u32 a[4], const char* tile) {
#if WGMMA
    multiply_group<false, 1>(d, a, operand_at(tile, TILE_LAYOUT, 1024));
#else
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
        u32 b[4];
        rows_operand(b, tile, 0, n / 2);
        mma_pair(&d[n], a, b);
    }
#endif
}
// d += a Xᵀ of as many squares [16, 16] as d has room for, one behind the other. FRESH: = a Xᵀ.
template <bool FRESH, int TILES>
DEVICE void add_square_columns(float (&d)[TILES][4], const u32 a[4], const char* squares) {
#if WGMMA
    multiply_group<FRESH, 0>(d, a, operand_at(squares, SQUARE_LAYOUT, 256));
#else
    begin_sum<FRESH>(d);
#pragma unroll
    for (int n = 0; n < TILES; n += 2) {
        u32 b[4];
        columns_square(b, squares + n / 2 * 512);
        mma_pair(&d[n], a, b);
    }
#endif
}
// d = a X of a square.
DEVICE void square_rows(float (&d)[2][4], const u32 a[4], const char* square) {
#if WGMMA
    multiply_group<true, 1>(d, a, operand_at(square, SQUARE_LAYOUT, 256));
#else
    begin_sum<true>(d);
    u32 b[4];
    rows_square(b, square);
    mma_pair(d, a, b);
#endif
}
