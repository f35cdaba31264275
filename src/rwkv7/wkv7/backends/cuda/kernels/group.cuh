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

#define FOUR(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define REST "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(FRESH ? 0 : 1), "n"(BY_ROWS)
// d [64, 8 TILES] += a b; FRESH: = a b. BY_ROWS: b's rows are those of the product's sum.
template <bool FRESH, int BY_ROWS>
DEVICE void multiply_group(float (&d)[2][4], const u32 a[4], u64 b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %13, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7}, "
        "{%8,%9,%10,%11}, %12, p, 1, 1, %14;}" : FOUR(d[0]), FOUR(d[1]) : REST);
}
template <bool FRESH, int BY_ROWS>
DEVICE void multiply_group(float (&d)[4][4], const u32 a[4], u64 b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,"
        "%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p, 1, 1, %22;}"
        : FOUR(d[0]), FOUR(d[1]), FOUR(d[2]), FOUR(d[3]) : REST);
}
template <bool FRESH, int BY_ROWS>
DEVICE void multiply_group(float (&d)[8][4], const u32 a[4], u64 b) {
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

// How a right operand lies: rows of a tile, or squares one behind the other.
enum Layout { IN_TILE = 1, IN_SQUARES = 3 };
// Where operands lie: an address, and the same as the instruction takes it, known to be one for the warp; so
// that what is added to it costs nothing between products.
struct Place {
    const char* p;
    u32 at;
};
DEVICE Place place_at(const char* p) {
#if WGMMA
    return {p, __shfl_sync(0xffffffffu, shared_address(p) >> 4 | 1u << 16, 0)};
#else
    return {p, 0};
#endif
}
DEVICE Place operator+(Place place, int bytes) { return {place.p + bytes, place.at + bytes / 16}; }
#if WGMMA
// As the instruction takes it, with the bytes from one group of eight rows to the next.
template <Layout LAYOUT>
DEVICE u64 operand_at(Place place) {
    return (u64)((LAYOUT == IN_TILE ? 1024 : 256) >> 4 | (u32)LAYOUT << 30) << 32 | place.at;
}
#endif

// d += a Xᵀ: rows 0 to 8 TILES of X; of a tile, channels 16 block... FRESH: = a Xᵀ.
template <Layout LAYOUT, bool FRESH, int TILES>
DEVICE void add_columns(float (&d)[TILES][4], const u32 a[4], Place x, int block = 0) {
#if WGMMA
    multiply_group<FRESH, 0>(d, a, operand_at<LAYOUT>(x + 32 * block));
#else
    begin_sum<FRESH>(d);
#pragma unroll
    for (int n = 0; n < TILES; n += 2) {
        u32 b[4];
        if (LAYOUT == IN_TILE)
            columns_operand(b, x.p, 8 * n, block);
        else
            columns_square(b, x.p + n / 2 * 512);
        mma_pair(&d[n], a, b);
    }
#endif
}
// d += a X: the 16 rows of X. FRESH: = a X.
template <Layout LAYOUT, bool FRESH, int TILES>
DEVICE void add_rows(float (&d)[TILES][4], const u32 a[4], Place x) {
#if WGMMA
    multiply_group<FRESH, 1>(d, a, operand_at<LAYOUT>(x));
#else
    begin_sum<FRESH>(d);
#pragma unroll
    for (int n = 0; n < TILES; n += 2) {
        u32 b[4];
        if (LAYOUT == IN_TILE)
            rows_operand(b, x.p, 0, n / 2);
        else
            rows_square(b, x.p);
        mma_pair(&d[n], a, b);
    }
#endif
}
