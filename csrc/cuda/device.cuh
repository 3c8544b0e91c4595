// What the kernels ask of the GPU, one instruction or intrinsic each. tests/cpp/device_on_host holds a twin of this
// file that runs the same kernels on the host, thread by thread.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define GFT_KERNEL(max_threads, min_blocks) static __global__ void __launch_bounds__(max_threads, min_blocks)
#define GFT_DEVICE [[maybe_unused]] static __device__ __forceinline__

namespace gft::cuda {

// ---- where a thread is ----

GFT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
GFT_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
GFT_DEVICE long long block_index() { return blockIdx.x; }
GFT_DEVICE long long block_count() { return gridDim.x; }

// ---- blocks and clusters (before sm_90 a cluster is one block) ----

GFT_DEVICE void block_barrier() { __syncthreads(); }

GFT_DEVICE int cluster_blocks() {
#if __CUDA_ARCH__ >= 900
    return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#else
    return 1;
#endif
}

GFT_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
    return static_cast<int>(cooperative_groups::this_cluster().block_rank());
#else
    return 0;
#endif
}

// Every thread of the cluster arrives; what was written before to any block's shared memory is seen after.
GFT_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#else
    __syncthreads();
#endif
}

// ---- letters between the blocks of a cluster: 16 bytes into another block's shared memory, counted as they land ----

// Open while it waits for the bytes that its owner expects; then it closes and is open for the next ones. All of them
// lie in shared memory; a block names another's by its own.
struct Mailbox {
    unsigned long long barrier;
};

GFT_DEVICE unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// By one thread, before the first cluster_barrier.
GFT_DEVICE void open_mailbox(Mailbox* mailbox) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(mailbox)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// By one thread, once for each time the mailbox is to close; letters may have come before.
GFT_DEVICE void expect_letters(Mailbox* mailbox, int letters) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(mailbox)), "r"(letters * 16)
                 : "memory");
#endif
}

// `letter` to the place `to` of block `rank`. No fence: the letter and its count travel together.
GFT_DEVICE void send_letter(uint4 letter, const uint4* to, const Mailbox* mailbox, int rank) {
#if __CUDA_ARCH__ >= 900
    unsigned place, count;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(place) : "r"(shared_address(to)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(count) : "r"(shared_address(mailbox)), "r"(rank));
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(place),
        "r"(letter.x), "r"(letter.y), "r"(letter.z), "r"(letter.w), "r"(count)
        : "memory");
#endif
}

// Until the mailbox has closed once more; `parity`: of how often it had closed before.
GFT_DEVICE void await_letters(const Mailbox* mailbox, int parity) {
#if __CUDA_ARCH__ >= 900
    int closed = 0;
    while (closed == 0)
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, "
            "p; }"
            : "=r"(closed)
            : "r"(shared_address(mailbox)), "r"(parity)
            : "memory");
#endif
}

GFT_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
    return dynamic_shared_memory;
}

template <class Value>
GFT_DEVICE Value shuffle_xor(Value value, int lanes) {
    return __shfl_xor_sync(0xffffffffu, value, lanes);
}

// The first lane of this warp for which it is so; 32: none.
GFT_DEVICE int first_lane(bool here) {
    const unsigned lanes = __ballot_sync(0xffffffffu, here);
    return lanes == 0 ? 32 : __ffs(static_cast<int>(lanes)) - 1;
}

// ---- memory ----

// 16 bytes from global to shared memory past the registers and the L1 cache. A thread sees its own copies after
// await_copies, others' copies only after a barrier on top of it.
GFT_DEVICE void copy_async(uint4* shared, const uint4* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

GFT_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPendingGroups>
GFT_DEVICE void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPendingGroups) : "memory");
}

// Kept in L2 and not in L1. Not the read-only path: in place, the same kernel writes here later.
GFT_DEVICE uint4 load_vector(const uint4* from) { return __ldcg(from); }

// Evicted first: a gradient is next read long after it has left the cache.
GFT_DEVICE void store_vector(uint4* to, uint4 value) { __stcs(to, value); }
GFT_DEVICE void store_vector(uint2* to, uint2 value) { __stcs(to, value); }

GFT_DEVICE void add_count(int* counter, int n) { atomicAdd(counter, n); }  // whole numbers: the order cannot be seen

// ---- arithmetic ----

GFT_DEVICE float exp2_fast(float x) {  // 2 ulp, subnormal results are 0
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

GFT_DEVICE float reciprocal_fast(float x) {  // 1 ulp; 1/inf = 0
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// Two numbers at once, which sm_100 does in one instruction.
struct Pair {
    float x, y;
};

GFT_DEVICE unsigned long long bits_of_pair(Pair p) {
    unsigned long long bits;
    asm("mov.b64 %0, {%1, %2};" : "=l"(bits) : "f"(p.x), "f"(p.y));
    return bits;
}

GFT_DEVICE Pair pair_of_bits(unsigned long long bits) {
    Pair p;
    asm("mov.b64 {%0, %1}, %2;" : "=f"(p.x), "=f"(p.y) : "l"(bits));
    return p;
}

GFT_DEVICE Pair fma_pair(Pair a, Pair b, Pair c) {
#if __CUDA_ARCH__ >= 1000
    unsigned long long result;
    asm("fma.rn.f32x2 %0, %1, %2, %3;"
        : "=l"(result)
        : "l"(bits_of_pair(a)), "l"(bits_of_pair(b)), "l"(bits_of_pair(c)));
    return pair_of_bits(result);
#else
    return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)};
#endif
}

GFT_DEVICE Pair add_pair(Pair a, Pair b) {
#if __CUDA_ARCH__ >= 1000
    unsigned long long result;
    asm("add.rn.f32x2 %0, %1, %2;" : "=l"(result) : "l"(bits_of_pair(a)), "l"(bits_of_pair(b)));
    return pair_of_bits(result);
#else
    return {a.x + b.x, a.y + b.y};
#endif
}

GFT_DEVICE Pair multiply_pair(Pair a, Pair b) {
#if __CUDA_ARCH__ >= 1000
    unsigned long long result;
    asm("mul.rn.f32x2 %0, %1, %2;" : "=l"(result) : "l"(bits_of_pair(a)), "l"(bits_of_pair(b)));
    return pair_of_bits(result);
#else
    return {a.x * b.x, a.y * b.y};
#endif
}

GFT_DEVICE float float_of_bits(unsigned bits) { return __uint_as_float(bits); }
GFT_DEVICE unsigned bits_of_float(float value) { return __float_as_uint(value); }

GFT_DEVICE unsigned pack_bf16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const unsigned&>(pair);
}

GFT_DEVICE unsigned pack_f16(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const unsigned&>(pair);
}

// The larger of each half; a NaN loses, as with fmaxf.
GFT_DEVICE unsigned larger_bf16(unsigned a, unsigned b) {
    const __nv_bfloat162 pair =
        __hmax2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const unsigned&>(pair);
}

GFT_DEVICE unsigned larger_f16(unsigned a, unsigned b) {
    const __half2 pair = __hmax2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
    return reinterpret_cast<const unsigned&>(pair);
}

GFT_DEVICE float2 unpack_f16(unsigned bits) { return __half22float2(reinterpret_cast<const __half2&>(bits)); }

}  // namespace gft::cuda
