// The CUDA kernels compiled for the host: a launch runs its threads one after the other. With them comes as much of the
// driver's interface as zo_ds/ops/cuda.py calls, so that the tests run that module unchanged.

#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <utility>

struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };
enum Stream : uint32_t { kDense, kLeft, kRight, kRandom, kGaussian };
enum { kTile = 4096 };

#define ZO_LANES 1
#include "zo_lanes.h"
#include "zo_core.h"

namespace {

enum { kFault = 1, kUnknown = 2 };                                  // of zo_host_launch
enum { kInvalidValue = 1, kNotFound = 500, kLaunchFailed = 719 };  // of the driver

struct Extent { uint32_t x; };
Extent threadIdx, blockIdx, blockDim, gridDim;
sigjmp_buf escape;  // from a launch that goes wrong

template <class T>
void atomicAdd(T* at, T value) { *at += value; }

}  // namespace

#define ZO_GLOBAL static void
#include "zo_kernels.cuh"

// What -fsanitize calls, in place of its own library. On a GPU a misaligned access is the end, and a shift by 32 or more
// gives something else than here; unnoticed, both would pass.
#define ZO_FAULT(name, ...) extern "C" void __ubsan_handle_##name(__VA_ARGS__) { siglongjmp(escape, kFault); }
ZO_FAULT(type_mismatch_v1, void*, void*)
ZO_FAULT(shift_out_of_bounds, void*, void*, void*)
ZO_FAULT(out_of_bounds, void*, void*)
ZO_FAULT(add_overflow, void*, void*, void*)
ZO_FAULT(sub_overflow, void*, void*, void*)
ZO_FAULT(mul_overflow, void*, void*, void*)
ZO_FAULT(negate_overflow, void*, void*)

namespace {

// `arguments` are pointers to the values, as the driver takes them.
template <class... Arguments, size_t... I>
void call(void (*kernel)(Arguments...), void** arguments, std::index_sequence<I...>) {
  kernel(*(Arguments*)arguments[I]...);
}
template <class... Arguments>
void call(void (*kernel)(Arguments...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<Arguments...>());
}

struct Kernel {
  const char* name;
  void (*run)(void** arguments);
};

// A kernel that is left out is an unused function, which the test's flags make an error.
#define KERNEL(name) {#name, [](void** arguments) { call(name, arguments); }}
#define PERTURB(kinds) \
  KERNEL(zo_perturb1_##kinds), KERNEL(zo_perturb4_##kinds), KERNEL(zo_perturb_factored_##kinds), \
  KERNEL(zo_perturb_gaussian_##kinds), KERNEL(zo_embedding_##kinds), KERNEL(zo_embedding_gaussian_##kinds)
#define UPDATE(kind) KERNEL(zo_update_##kind), KERNEL(zo_update_factored_##kind), KERNEL(zo_update_gaussian_##kind)
const Kernel kKernels[] = {
    PERTURB(f32_f32), PERTURB(bf16_bf16), PERTURB(bf16_f32), PERTURB(f16_f16), PERTURB(f16_f32),
    UPDATE(f32), UPDATE(bf16), UPDATE(f16), KERNEL(zo_signs), KERNEL(zo_hash_f32), KERNEL(zo_hash_half),
};

const Kernel* find(const char* name) {
  for (const Kernel& kernel : kKernels)
    if (strcmp(kernel.name, name) == 0) return &kernel;
  return nullptr;
}

}  // namespace

// 0 if every thread came through without a fault; memory that may not be touched is one too.
extern "C" int zo_host_launch(const char* name, unsigned blocks, unsigned threads, void** arguments) {
  const Kernel* kernel = find(name);
  if (!kernel) return kUnknown;
  struct sigaction own = {}, before;
  own.sa_handler = [](int) { siglongjmp(escape, kFault); };
  own.sa_flags = SA_NODEFER;
  sigaction(SIGSEGV, &own, &before);
  const int outcome = sigsetjmp(escape, 1);
  if (outcome == 0) {
    gridDim.x = blocks, blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel->run(arguments);
  }
  sigaction(SIGSEGV, &before, nullptr);
  return outcome;
}

extern "C" int cuModuleLoadData(void** module, const void*) {
  *module = nullptr;
  return 0;
}

extern "C" int cuModuleGetFunction(const Kernel** function, void*, const char* name) {
  *function = find(name);
  return *function ? 0 : kNotFound;
}

extern "C" int cuLaunchKernel(const Kernel* kernel, unsigned blocks, unsigned blocks_y, unsigned blocks_z, unsigned threads,
                              unsigned threads_y, unsigned threads_z, unsigned shared_bytes, void*, void** arguments,
                              void** extra) {
  const bool flat = blocks_y == 1 && blocks_z == 1 && threads_y == 1 && threads_z == 1;
  if (!flat || blocks == 0 || threads == 0 || threads > kThreads || shared_bytes || extra) return kInvalidValue;
  return zo_host_launch(kernel->name, blocks, threads, arguments) ? kLaunchFailed : 0;
}

extern "C" int cuGetErrorString(int, const char** text) {
  *text = "on the host";
  return 0;
}
