// Who waits for whom in a block: barriers in shared memory at which copies arrive too.
//
// A barrier (mbarrier) takes turns: one is over when as many have arrived as it expects and, of a copy in
// bulk, all bytes. `wait_for_turn` must be called before the next turn is over.
#pragma once
#include "warp.cuh"

// Whether one thread can have many bytes copied in one instruction: from Hopper on.
#if defined(EMULATED) || __CUDA_ARCH__ >= 900
constexpr bool BULK = true;
#else
constexpr bool BULK = false;
#endif

#ifndef EMULATED
DEVICE void begin_barrier(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
                 : "memory");
}
// Before the block's barrier that shows the new ones to all.
DEVICE void barriers_begun() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
DEVICE void arrive(u64* barrier) {
    asm volatile("{.reg .b64 t; mbarrier.arrive.shared.b64 t, [%0];}" ::"r"(shared_address(barrier))
                 : "memory");
}
// Arrives when what this thread began to copy has come.
DEVICE void arrive_when_copied(u64* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}
DEVICE void wait_for_turn(u64* barrier, int turn) {
    u32 over;
    do {
#if __CUDA_ARCH__ >= 900
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
#else
        asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
#endif
                     : "=r"(over) : "r"(shared_address(barrier)), "r"(turn & 1) : "memory");
    } while (!over);
}
#if __CUDA_ARCH__ >= 900
// One thread's copy of what an earlier launch wrote: arrives when it has come.
DEVICE void copy_bulk(void* to, const void* from, int bytes, u64* barrier) {
    const u32 at = shared_address(barrier);
    asm volatile("{.reg .b64 t; mbarrier.arrive.expect_tx.shared.b64 t, [%0], %1;}" ::"r"(at), "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(to)), "l"(from), "r"(bytes), "r"(at) : "memory");
}
#else
DEVICE void copy_bulk(void*, const void*, int, u64*) {}
#endif
#endif
