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

// The same variable in the shared memory of block `rank` of this cluster.
template <class Value>
GFT_DEVICE Value* in_block(Value* mine, int rank) {
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
#else
    return mine;
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

template <class Value>
GFT_DEVICE Value shuffle_first(Value value) {
    return __shfl_sync(0xffffffffu, value, 0);
}

// ---- memory ----

// 16 bytes from global to shared memory past the registers and the L1 cache. A thread sees its own copies after
// await_copies, others' copies only after a barrier on top of it.
GFT_DEVICE void copy_async(uint4* shared, const uint4* global) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
        "l"(global)
        : "memory");
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

GFT_DEVICE float2 unpack_f16(unsigned bits) { return __half22float2(reinterpret_cast<const __half2&>(bits)); }

}  // namespace gft::cuda
