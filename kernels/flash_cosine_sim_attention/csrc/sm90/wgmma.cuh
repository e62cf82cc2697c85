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
  static_assert(kPending <= 7, "ptxas makes a larger number 7 without a word");
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

// The same for a tile of core matrices, 8 rows of 16 bytes without a swizzle: bits 16-29 are the distance / 16 to the
// next one along the contraction, of which there are two for 8 rows.
__device__ __forceinline__ uint64_t make_plain_descriptor(uint32_t lower_half) {
  return uint64_t{256 / 16} << 32 | lower_half;
}

// Operands of the asm statements below: the accumulators of 8, 16, ... columns, as x, "+f" or "=f".
#define WGMMA_1(x, n) x(d[n][0]), x(d[n][1]), x(d[n][2]), x(d[n][3])
#define WGMMA_2(x, n) WGMMA_1(x, n), WGMMA_1(x, n + 1)
#define WGMMA_4(x, n) WGMMA_2(x, n), WGMMA_2(x, n + 2)
#define WGMMA_8(x, n) WGMMA_4(x, n), WGMMA_4(x, n + 4)
#define WGMMA_16(x, n) WGMMA_8(x, n), WGMMA_8(x, n + 8)
#define WGMMA_ALL_32(x) WGMMA_4(x, 0)
#define WGMMA_ALL_40(x) WGMMA_ALL_32(x), WGMMA_1(x, 4)
#define WGMMA_ALL_48(x) WGMMA_ALL_32(x), WGMMA_2(x, 4)
#define WGMMA_ALL_64(x) WGMMA_8(x, 0)
#define WGMMA_ALL_72(x) WGMMA_ALL_64(x), WGMMA_1(x, 8)
#define WGMMA_ALL_96(x) WGMMA_ALL_64(x), WGMMA_4(x, 8)
#define WGMMA_ALL_104(x) WGMMA_ALL_96(x), WGMMA_1(x, 12)
#define WGMMA_ALL_128(x) WGMMA_16(x, 0)
#define WGMMA_ALL_136(x) WGMMA_ALL_128(x), WGMMA_1(x, 16)
#define WGMMA_ALL_256(x) WGMMA_ALL_128(x), WGMMA_16(x, 16)
// Their names in the instruction.
// clang-format off
#define WGMMA_NAMES_4                                                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_NAMES_5                                                                                                  \
  WGMMA_NAMES_4 ", "                                                                                                   \
  "%16, %17, %18, %19"
#define WGMMA_NAMES_6                                                                                                  \
  WGMMA_NAMES_5 ", "                                                                                                   \
  "%20, %21, %22, %23"
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

#define WGMMA_RS_ASM(columns, type, names, a0, a1, a2, a3, b_, p_, t_)                                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p_ ", 0;\n"                                                         \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" names "}, {" a0 ", " a1   \
               ", " a2 ", " a3 "}, " b_ ", p, 1, 1, " t_ ";\n}"                                                        \
               : WGMMA_ALL_##columns("+f")                                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int{kAccumulate}), "n"(int{kTransposed}))
#define WGMMA_RS_CASE(columns, names, a0, a1, a2, a3, b_, p_, t_)                                                      \
  if constexpr (8 * kBlocks == columns) {                                                                              \
    if constexpr (__is_same(T, __half)) {                                                                              \
      WGMMA_RS_ASM(columns, "f16", names, a0, a1, a2, a3, b_, p_, t_);                                                 \
    } else {                                                                                                           \
      WGMMA_RS_ASM(columns, "bf16", names, a0, a1, a2, a3, b_, p_, t_);                                                \
    }                                                                                                                  \
  }
#define WGMMA_SS_ASM(columns, type, names, x, a_, b_, p_, t_)                                                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p_ ", 0;\n"                                                         \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" names "}, " a_ ", " b_       \
               ", p, 1, 1, 0, " t_ ";\n}"                                                                              \
               : WGMMA_ALL_##columns(x)                                                                                \
               : "l"(a), "l"(b), "n"(int{kAccumulate}), "n"(int{kTransposed}))
// Without kAccumulate d is only written: nothing of what it was has to wait, in registers, until then.
#define WGMMA_SS_TYPE(columns, type, names, a_, b_, p_, t_)                                                            \
  if constexpr (kAccumulate) {                                                                                         \
    WGMMA_SS_ASM(columns, type, names, "+f", a_, b_, p_, t_);                                                          \
  } else {                                                                                                             \
    WGMMA_SS_ASM(columns, type, names, "=f", a_, b_, p_, t_);                                                          \
  }
#define WGMMA_SS_CASE(columns, names, a_, b_, p_, t_)                                                                  \
  if constexpr (8 * kBlocks == columns) {                                                                              \
    if constexpr (__is_same(T, __half)) {                                                                              \
      WGMMA_SS_TYPE(columns, "f16", names, a_, b_, p_, t_)                                                             \
    } else {                                                                                                           \
      WGMMA_SS_TYPE(columns, "bf16", names, a_, b_, p_, t_)                                                            \
    }                                                                                                                  \
  }
// clang-format on

// d = a b, or d += a b with kAccumulate, for a of 64 x 16 in registers and b of 16 x 8 * kBlocks in shared memory: 16
// columns of a row-major tile [b's column][contraction], or kTransposed, rows of a tile [contraction][b's column].
template <typename T, bool kAccumulate, bool kTransposed, int kBlocks>
__device__ __forceinline__ void wgmma_rs(float (&d)[kBlocks][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kBlocks == 4 || kBlocks == 5 || kBlocks == 8 || kBlocks == 9 || kBlocks == 12 || kBlocks == 13 ||
                    kBlocks == 16 || kBlocks == 17 || kBlocks == 32,
                "add a line below");
  WGMMA_RS_CASE(32, WGMMA_NAMES_4, "%16", "%17", "%18", "%19", "%20", "%21", "%22");
  WGMMA_RS_CASE(40, WGMMA_NAMES_5, "%20", "%21", "%22", "%23", "%24", "%25", "%26");
  WGMMA_RS_CASE(64, WGMMA_NAMES_8, "%32", "%33", "%34", "%35", "%36", "%37", "%38");
  WGMMA_RS_CASE(72, WGMMA_NAMES_9, "%36", "%37", "%38", "%39", "%40", "%41", "%42");
  WGMMA_RS_CASE(96, WGMMA_NAMES_12, "%48", "%49", "%50", "%51", "%52", "%53", "%54");
  WGMMA_RS_CASE(128, WGMMA_NAMES_16, "%64", "%65", "%66", "%67", "%68", "%69", "%70");
  WGMMA_RS_CASE(104, WGMMA_NAMES_13, "%52", "%53", "%54", "%55", "%56", "%57", "%58");
  WGMMA_RS_CASE(136, WGMMA_NAMES_17, "%68", "%69", "%70", "%71", "%72", "%73", "%74");
  WGMMA_RS_CASE(256, WGMMA_NAMES_32, "%128", "%129", "%130", "%131", "%132", "%133", "%134");
}

// The same with a, too, in shared memory, 64 rows of a tile [row][contraction].
template <typename T, bool kAccumulate, bool kTransposed, int kBlocks>
__device__ __forceinline__ void wgmma_ss(float (&d)[kBlocks][4], uint64_t a, uint64_t b) {
  static_assert(kBlocks == 4 || kBlocks == 6 || kBlocks == 8 || kBlocks == 16, "add a line below");
  WGMMA_SS_CASE(32, WGMMA_NAMES_4, "%16", "%17", "%18", "%19");
  WGMMA_SS_CASE(48, WGMMA_NAMES_6, "%24", "%25", "%26", "%27");
  WGMMA_SS_CASE(64, WGMMA_NAMES_8, "%32", "%33", "%34", "%35");
  WGMMA_SS_CASE(128, WGMMA_NAMES_16, "%64", "%65", "%66", "%67");
}

#undef WGMMA_1
#undef WGMMA_2
#undef WGMMA_4
#undef WGMMA_8
#undef WGMMA_16
#undef WGMMA_ALL_32
#undef WGMMA_ALL_40
#undef WGMMA_ALL_48
#undef WGMMA_ALL_64
#undef WGMMA_ALL_72
#undef WGMMA_ALL_96
#undef WGMMA_ALL_104
#undef WGMMA_ALL_128
#undef WGMMA_ALL_136
#undef WGMMA_ALL_256
#undef WGMMA_NAMES_4
#undef WGMMA_NAMES_5
#undef WGMMA_NAMES_6
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
#undef WGMMA_SS_TYPE
#undef WGMMA_SS_CASE

}  // namespace flash_cosine_sim
