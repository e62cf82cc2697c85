// wgmma, the tensor core instructions of compute capability 9.0 (sm_90a): four warps, a warpgroup, multiply 64 rows.
//
// They run asynchronously: after wgmma_commit and wgmma_wait the results are there. Meanwhile nobody may touch the
// accumulators or write the registers of a.
//
// Accumulators and a's are those of mma.sync in tile.cuh, with 16 rows a warp: d[n] holds columns [8n, 8n + 8).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flash_cosine_sim {

// Orders accesses of this thread to registers before wgmma's.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// All but the last kPending groups are complete.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No instruction: keeps the compiler from moving what computes or uses these registers across the place.
template <int kBlocks>
__device__ __forceinline__ void pin(float (&x)[kBlocks][4]) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(x[n][i])::"memory");
  }
}
template <int kBlocks>
__device__ __forceinline__ void pin(uint32_t (&x)[kBlocks][4]) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(x[n][i])::"memory");
  }
}

// How a tile of 16-bit elements lies in shared memory: panels of kPanelBytes a row, swizzled in patterns of 8 rows as
// TMA does (tile.cuh's swizzle<kPanelBytes>), one panel after the other. A descriptor is
//   bits 0-13   address / 16
//   bits 16-29  distance / 16 to the next panel, for an operand whose columns (not its contraction) are contiguous
//   bits 32-45  distance / 16 to the next 8 rows
//   bits 62-63  1, 2, 3: panels of 128, 64, 32 bytes
// so its upper half is the same for all tiles of a kernel.
template <int kPanelBytes>
__device__ __forceinline__ uint64_t make_descriptor(uint32_t lower_half) {
  static_assert(kPanelBytes == 128 || kPanelBytes == 64 || kPanelBytes == 32);
  constexpr uint32_t kMode = kPanelBytes == 128 ? 1 : kPanelBytes == 64 ? 2 : 3;
  constexpr uint32_t kUpperHalf = (8 * kPanelBytes / 16) | kMode << 30;
  return uint64_t{kUpperHalf} << 32 | lower_half;
}

// Operands of the asm statements below: the accumulators of 8, 16, ... columns.
#define WGMMA_1(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define WGMMA_2(n) WGMMA_1(n), WGMMA_1(n + 1)
#define WGMMA_4(n) WGMMA_2(n), WGMMA_2(n + 2)
#define WGMMA_8(n) WGMMA_4(n), WGMMA_4(n + 4)
#define WGMMA_16(n) WGMMA_8(n), WGMMA_8(n + 8)
#define WGMMA_ALL(...) __VA_ARGS__
// Their names in the instruction.
#define WGMMA_NAMES_4                                                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_NAMES_5                                                                                                  \
  WGMMA_NAMES_4 ", "                                                                                                   \
  "%16, %17, %18, %19"
#define WGMMA_NAMES_8                                                                                                  \
  WGMMA_NAMES_5 ", "                                                                                                   \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_9                                                                                                  \
  WGMMA_NAMES_8 ", "                                                                                                   \
  "%32, %33, %34, %35"
#define WGMMA_NAMES_12                                                                                                 \
  WGMMA_NAMES_9 ", "                                                                                                   \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_NAMES_16                                                                                                 \
  WGMMA_NAMES_12 ", "                                                                                                  \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_NAMES_13                                                                                                 \
  WGMMA_NAMES_12 ", "                                                                                                  \
  "%48, %49, %50, %51"
#define WGMMA_NAMES_17                                                                                                 \
  WGMMA_NAMES_16 ", "                                                                                                  \
  "%64, %65, %66, %67"
#define WGMMA_NAMES_32                                                                                                 \
  WGMMA_NAMES_16 ", "                                                                                                  \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "               \
  "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "                 \
  "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, "                   \
  "%119, %120, %121, %122, %123, %124, %125, %126, %127"

#define WGMMA_RS_ASM(columns, type, names, accumulators, a0, a1, a2, a3, b_, p_, t_)                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p_ ", 0;\n"                                                         \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" names "}, {" a0 ", " a1   \
               ", " a2 ", " a3 "}, " b_ ", p, 1, 1, " t_ ";\n}"                                                        \
               : WGMMA_ALL accumulators                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int{kAccumulate}), "n"(int{kTransposed}))
#define WGMMA_RS_CASE(columns, names, accumulators, a0, a1, a2, a3, b_, p_, t_)                                        \
  if constexpr (8 * kBlocks == columns) {                                                                              \
    if constexpr (__is_same(T, __half)) {                                                                              \
      WGMMA_RS_ASM(columns, "f16", names, accumulators, a0, a1, a2, a3, b_, p_, t_);                                   \
    } else {                                                                                                           \
      WGMMA_RS_ASM(columns, "bf16", names, accumulators, a0, a1, a2, a3, b_, p_, t_);                                  \
    }                                                                                                                  \
  }
#define WGMMA_SS_ASM(columns, type, names, accumulators, a_, b_, p_)                                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p_ ", 0;\n"                                                         \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" names "}, " a_ ", " b_       \
               ", p, 1, 1, 0, 0;\n}"                                                                                   \
               : WGMMA_ALL accumulators                                                                                \
               : "l"(a), "l"(b), "n"(int{kAccumulate}))
#define WGMMA_SS_CASE(columns, names, accumulators, a_, b_, p_)                                                        \
  if constexpr (8 * kBlocks == columns) {                                                                              \
    if constexpr (__is_same(T, __half)) {                                                                              \
      WGMMA_SS_ASM(columns, "f16", names, accumulators, a_, b_, p_);                                                   \
    } else {                                                                                                           \
      WGMMA_SS_ASM(columns, "bf16", names, accumulators, a_, b_, p_);                                                  \
    }                                                                                                                  \
  }

// d = a b, or d += a b with kAccumulate, for a of 64 x 16 in registers and b of 16 x 8 * kBlocks in shared memory: 16
// columns of a row-major tile [b's column][contraction], or kTransposed, rows of a tile [contraction][b's column].
template <typename T, bool kAccumulate, bool kTransposed, int kBlocks>
__device__ __forceinline__ void wgmma_rs(float (&d)[kBlocks][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kBlocks == 4 || kBlocks == 5 || kBlocks == 8 || kBlocks == 9 || kBlocks == 12 || kBlocks == 13 ||
                    kBlocks == 16 || kBlocks == 17 || kBlocks == 32,
                "add a line below");
  WGMMA_RS_CASE(32, WGMMA_NAMES_4, (WGMMA_4(0)), "%16", "%17", "%18", "%19", "%20", "%21", "%22");
  WGMMA_RS_CASE(40, WGMMA_NAMES_5, (WGMMA_4(0), WGMMA_1(4)), "%20", "%21", "%22", "%23", "%24", "%25", "%26");
  WGMMA_RS_CASE(64, WGMMA_NAMES_8, (WGMMA_8(0)), "%32", "%33", "%34", "%35", "%36", "%37", "%38");
  WGMMA_RS_CASE(72, WGMMA_NAMES_9, (WGMMA_8(0), WGMMA_1(8)), "%36", "%37", "%38", "%39", "%40", "%41", "%42");
  WGMMA_RS_CASE(96, WGMMA_NAMES_12, (WGMMA_8(0), WGMMA_4(8)), "%48", "%49", "%50", "%51", "%52", "%53", "%54");
  WGMMA_RS_CASE(128, WGMMA_NAMES_16, (WGMMA_16(0)), "%64", "%65", "%66", "%67", "%68", "%69", "%70");
  WGMMA_RS_CASE(104, WGMMA_NAMES_13, (WGMMA_8(0), WGMMA_4(8), WGMMA_1(12)), "%52", "%53", "%54", "%55", "%56", "%57",
                "%58");
  WGMMA_RS_CASE(136, WGMMA_NAMES_17, (WGMMA_16(0), WGMMA_1(16)), "%68", "%69", "%70", "%71", "%72", "%73", "%74");
  WGMMA_RS_CASE(256, WGMMA_NAMES_32, (WGMMA_16(0), WGMMA_16(16)), "%128", "%129", "%130", "%131", "%132", "%133",
                "%134");
}

// The same with a, too, in shared memory.
template <typename T, bool kAccumulate, int kBlocks>
__device__ __forceinline__ void wgmma_ss(float (&d)[kBlocks][4], uint64_t a, uint64_t b) {
  static_assert(kBlocks == 8);
  WGMMA_SS_CASE(64, WGMMA_NAMES_8, (WGMMA_8(0)), "%32", "%33", "%34");
}

#undef WGMMA_1
#undef WGMMA_2
#undef WGMMA_4
#undef WGMMA_8
#undef WGMMA_16
#undef WGMMA_ALL
#undef WGMMA_NAMES_4
#undef WGMMA_NAMES_5
#undef WGMMA_NAMES_8
#undef WGMMA_NAMES_9
#undef WGMMA_NAMES_12
#undef WGMMA_NAMES_13
#undef WGMMA_NAMES_16
#undef WGMMA_NAMES_17
#undef WGMMA_NAMES_32
#undef WGMMA_RS_ASM
#undef WGMMA_RS_CASE
#undef WGMMA_SS_ASM
#undef WGMMA_SS_CASE

}  // namespace flash_cosine_sim
