// The CUDA kernels: extern "C", over raw pointers, launched on a stream. No shared memory, no shuffles, no barriers.
// A warp takes a tile of 4096 elements of the noise: lane l makes the Philox block whose bytes are the signs of runs
// l, l + 32, l + 64, ... of 8 elements, so neighbouring lanes touch neighbouring memory and no block is made twice. A block
// of gaussian noise serves one run of 8, so there a thread takes a run.

#if defined(__CUDACC__)
#include "zo_device.h"
#include "zo_core.h"
#endif

enum { kRun = 8, kThreads = 128, kBlockOfDirections = 4 };

struct alignas(16) Quad { uint32_t x, y, z, w; };

// Sixteen bytes of global memory in one access: left alone, the compiler splits some and takes addresses out of a table
// for generic ones.
#if defined(__CUDACC__)
ZO_FN Quad zo_get_quad(const void* from) {
  Quad q;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w) : "l"(__cvta_generic_to_global(from)) : "memory");
  return q;
}
ZO_FN void zo_put_quad(void* to, Quad q) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               : : "l"(__cvta_generic_to_global(to)), "r"(q.x), "r"(q.y), "r"(q.z), "r"(q.w) : "memory");
}
#else
ZO_FN Quad zo_get_quad(const void* from) { return *(const Quad*)from; }
ZO_FN void zo_put_quad(void* to, Quad q) { *(Quad*)to = q; }
#endif

// Eight neighbours at a multiple of 16 bytes.
ZO_FN void zo_read(const float* from, float v[kRun]) {
  const Quad a = zo_get_quad(from), b = zo_get_quad(from + 4);
  v[0] = zo_float(a.x), v[1] = zo_float(a.y), v[2] = zo_float(a.z), v[3] = zo_float(a.w);
  v[4] = zo_float(b.x), v[5] = zo_float(b.y), v[6] = zo_float(b.z), v[7] = zo_float(b.w);
}
ZO_FN float zo_value(const Bf16*, uint32_t bits) { return zo_float(bits << 16); }
ZO_FN float zo_value(const Fp16*, uint32_t bits) { return zo_fp16_value(bits); }
template <class T>
ZO_FN void zo_read(const T* from, float v[kRun]) {
  const Quad a = zo_get_quad(from);
  const uint32_t pairs[4] = {a.x, a.y, a.z, a.w};
  ZO_UNROLL
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = zo_value(from, pairs[i] & 0xffffu);
    v[2 * i + 1] = zo_value(from, pairs[i] >> 16);
  }
}
ZO_FN float zo_read_one(const float* from) { return *from; }
template <class T>
ZO_FN float zo_read_one(const T* from) { return zo_value(from, from->bits); }

template <class T>
ZO_FN void zo_load_run(const T* slice, int64_t at, int64_t n, bool whole, float v[kRun]) {
  if (whole) {
    zo_read(slice + at, v);
  } else {
    ZO_UNROLL
    for (int e = 0; e < kRun; ++e) v[e] = at + e >= 0 && at + e < n ? zo_read_one(slice + at + e) : 0.0f;
  }
}

// Bits of a 16-bit format, to nearest, or with random bits.
ZO_FN uint32_t zo_half(const Bf16*, float x) { return zo_bf16_nearest(zo_bits(x)); }
ZO_FN uint32_t zo_half(const Fp16*, float x) { return zo_fp16_nearest(zo_bits(x)); }
ZO_FN uint32_t zo_half(const Bf16*, float x, uint32_t random) { return zo_bf16_stochastic(zo_bits(x), random); }
ZO_FN uint32_t zo_half(const Fp16*, float x, uint32_t random) { return zo_fp16_stochastic(zo_bits(x), random); }

ZO_FN void zo_store_run(float* slice, int64_t at, int64_t n, bool whole, const float v[kRun]) {
  if (whole) {
    zo_put_quad(slice + at, {zo_bits(v[0]), zo_bits(v[1]), zo_bits(v[2]), zo_bits(v[3])});
    zo_put_quad(slice + at + 4, {zo_bits(v[4]), zo_bits(v[5]), zo_bits(v[6]), zo_bits(v[7])});
  } else {
    ZO_UNROLL
    for (int e = 0; e < kRun; ++e)
      if (at + e >= 0 && at + e < n) slice[at + e] = v[e];
  }
}
template <class T>
ZO_FN void zo_store_run(T* slice, int64_t at, int64_t n, bool whole, const float v[kRun]) {
  if (whole) {
    zo_put_quad(slice + at, {
        zo_half(slice, v[0]) | zo_half(slice, v[1]) << 16, zo_half(slice, v[2]) | zo_half(slice, v[3]) << 16,
        zo_half(slice, v[4]) | zo_half(slice, v[5]) << 16, zo_half(slice, v[6]) | zo_half(slice, v[7]) << 16});
  } else {
    ZO_UNROLL
    for (int e = 0; e < kRun; ++e)
      if (at + e >= 0 && at + e < n) slice[at + e].bits = (uint16_t)zo_half(slice, v[e]);
  }
}

// Whether vector accesses are allowed at element `at` of a slice (a multiple of 8 elements away from the others).
template <class T>
ZO_FN bool zo_whole(const T* slice, int64_t at, int64_t n) {
  return at >= 0 && at + kRun <= n && ((uint64_t)(slice + at) & 15) == 0;
}

ZO_FN void zo_words(uint32_t w[4], uint64_t block, uint32_t stream, uint64_t seed, uint32_t param, uint32_t direction) {
  uint64_t x[4];
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  zo_counter(x, block, stream, param, direction);
  ZO_UNROLL
  for (int round = 0; round < 10; ++round) {
    zo_philox_round(x, k0, k1);
    zo_philox_next(k0, k1);
  }
  ZO_UNROLL
  for (int q = 0; q < 4; ++q) w[q] = (uint32_t)x[q];
}

// The byte of signs of the run of 8 that begins at a multiple of 8 of a stream.
ZO_FN uint32_t zo_run_signs(uint64_t element, uint32_t stream, uint64_t seed, uint32_t param, uint32_t direction) {
  uint32_t w[4];
  zo_words(w, (element >> 12) * 32 + ((element >> 3) & 31), stream, seed, param, direction);
  const uint32_t s = (uint32_t)(element >> 8) & 15;
  const uint32_t word = s < 8 ? (s < 4 ? w[0] : w[1]) : (s < 12 ? w[2] : w[3]);
  return word >> (8 * (s & 3)) & 0xffu;
}

// v[e] -= c u_e, where bit e of `signs` set means u_e = -1. Higher bits may hold anything.
ZO_FN void zo_subtract_run(float v[kRun], float c, uint32_t signs) {
  ZO_UNROLL
  for (int e = 0; e < kRun; ++e) v[e] -= zo_float(zo_flip<uint32_t>(zo_bits(c), signs, 31u - (uint32_t)e));
}

// v[e] -= c z_e, where half-word e of a block of the noise names z_e.
ZO_FN void zo_subtract_normals(float v[kRun], float c, const uint32_t w[4], const float* quantiles) {
  ZO_UNROLL
  for (int e = 0; e < kRun; ++e) {
    const uint32_t word = w[e >> 1] >> (16 * (e & 1)) & 0xffffu;
    v[e] -= c * zo_float(zo_normal<uint32_t>(zo_bits(quantiles[word & 0x7fffu]), word));
  }
}

ZO_FN uint64_t zo_thread() { return (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; }

// ---- perturb -------------------------------------------------------------------------------------------------------

struct PerturbArguments {
  int64_t n;
  uint64_t start;
  uint64_t seed;
  uint32_t param;
  int32_t count;  // of directions, at most kBlockOfDirections
  uint32_t directions[kBlockOfDirections];
  float minus_eps[kBlockOfDirections];
};

template <int kMost, class From, class To>
ZO_FN void zo_perturb_dense(const From* theta, To* out, const PerturbArguments& a) {
  const uint64_t tile = a.start / kTile + zo_thread() / 32;
  const uint32_t lane = threadIdx.x & 31;
  if (tile * kTile >= a.start + (uint64_t)a.n) return;
  uint32_t words[kMost][4];
  ZO_UNROLL
  for (int d = 0; d < kMost; ++d) zo_words(words[d], tile * 32 + lane, kDense, a.seed, a.param, a.directions[d]);
  int64_t at = (int64_t)(tile * kTile + kRun * lane - a.start);
#pragma unroll 1
  for (int q = 0; q < 4; ++q) {
    ZO_UNROLL
    for (int s = 0; s < 4; ++s, at += 32 * kRun) {
      if (at + kRun <= 0 || at >= a.n) continue;
      float theta_run[kRun];
      zo_load_run(theta, at, a.n, zo_whole(theta, at, a.n), theta_run);
      ZO_UNROLL
      for (int d = 0; d < kMost; ++d) {
        if (d >= a.count) break;
        float v[kRun];
        ZO_UNROLL
        for (int e = 0; e < kRun; ++e) v[e] = theta_run[e];
        zo_subtract_run(v, a.minus_eps[d], words[d][0] >> (8 * s));
        To* slice = out + d * a.n;
        zo_store_run(slice, at, a.n, zo_whole(slice, at, a.n), v);
      }
    }
    // Rotated instead of indexed, so that the words stay in registers while the loop stays short.
    ZO_UNROLL
    for (int d = 0; d < kMost; ++d) words[d][0] = words[d][1], words[d][1] = words[d][2], words[d][2] = words[d][3];
  }
}

// Where a thread's run of columns lies in a slice with factored noise.
struct Place {
  int64_t at;       // of its first element, may be negative
  uint64_t row;     // in the whole parameter
  uint64_t column;  // a multiple of 8
  int64_t low, high;  // the row's part of the slice
};

ZO_FN bool zo_place(Place& p, uint64_t index, int64_t n, uint64_t start, uint64_t columns) {
  const uint64_t runs = (columns + kRun - 1) / kRun;
  p.row = start / columns + index / runs;
  p.column = index % runs * kRun;
  p.at = (int64_t)(p.row * columns + p.column - start);
  p.low = (int64_t)(p.row * columns - start);
  p.high = p.low + (int64_t)columns;
  if (p.low < 0) p.low = 0;
  if (p.high > n) p.high = n;
  return p.at + kRun > p.low && p.at < p.high;
}

template <class From, class To>
ZO_FN void zo_perturb_factored(const From* theta, To* out, const PerturbArguments& a, uint64_t columns) {
  Place p;
  if (!zo_place(p, zo_thread(), a.n, a.start, columns)) return;
  float theta_run[kRun];
  const int64_t shift = p.at - p.low;  // addresses count from the row's part
  zo_load_run(theta + p.low, shift, p.high - p.low, zo_whole(theta + p.low, shift, p.high - p.low), theta_run);
  ZO_UNROLL
  for (int d = 0; d < kBlockOfDirections; ++d) {
    if (d >= a.count) break;
    const uint32_t left = zo_run_signs(p.row & ~7ull, kLeft, a.seed, a.param, a.directions[d]) >> (p.row & 7) & 1;
    const uint32_t right = zo_run_signs(p.column, kRight, a.seed, a.param, a.directions[d]);
    float v[kRun];
    ZO_UNROLL
    for (int e = 0; e < kRun; ++e) v[e] = theta_run[e];
    zo_subtract_run(v, left ? -a.minus_eps[d] : a.minus_eps[d], right);
    To* slice = out + d * a.n + p.low;
    zo_store_run(slice, shift, p.high - p.low, zo_whole(slice, shift, p.high - p.low), v);
  }
}

// theta_run - c_d u_d of a run of gaussian noise for each direction; slice d of the results lies at out + d * stride.
template <class To>
ZO_FN void zo_displace_normals(To* out, int64_t stride, int64_t at, int64_t n, uint64_t element,
                               const float theta_run[kRun], const PerturbArguments& a, const float* quantiles) {
  ZO_UNROLL
  for (int d = 0; d < kBlockOfDirections; ++d) {
    if (d >= a.count) break;
    uint32_t w[4];
    zo_words(w, element >> 3, kGaussian, a.seed, a.param, a.directions[d]);
    float v[kRun];
    ZO_UNROLL
    for (int e = 0; e < kRun; ++e) v[e] = theta_run[e];
    zo_subtract_normals(v, a.minus_eps[d], w, quantiles);
    To* slice = out + d * stride;
    zo_store_run(slice, at, n, zo_whole(slice, at, n), v);
  }
}

template <class From, class To>
ZO_FN void zo_perturb_gaussian(const From* theta, To* out, const PerturbArguments& a, const float* quantiles) {
  const uint64_t element = (a.start & ~7ull) + kRun * zo_thread();
  const int64_t at = (int64_t)(element - a.start);
  if (at >= a.n) return;
  float theta_run[kRun];
  zo_load_run(theta, at, a.n, zo_whole(theta, at, a.n), theta_run);
  zo_displace_normals(out, a.n, at, a.n, element, theta_run, a, quantiles);
}

// ---- embedding_rows ------------------------------------------------------------------------------------------------

template <class From, class To>
ZO_FN void zo_embedding(const From* table, const int64_t* ids, To* out, int64_t rows, int64_t width, int factored,
                        const PerturbArguments& a) {
  // Runs are aligned to the noise: to elements of the table, or to columns.
  const int64_t runs = width / kRun + 2;
  const int64_t place = (int64_t)(zo_thread() / (uint64_t)runs), run = (int64_t)(zo_thread() % (uint64_t)runs);
  if (place >= rows) return;
  const uint64_t row = (uint64_t)ids[place], first = factored ? 0 : row * (uint64_t)width;
  const uint64_t element = (first & ~7ull) + (uint64_t)(kRun * run);
  const int64_t at = (int64_t)(element - first);
  if (at + kRun <= 0 || at >= width) return;
  float theta_run[kRun];
  const From* source = table + row * (uint64_t)width;
  zo_load_run(source, at, width, zo_whole(source, at, width), theta_run);
  ZO_UNROLL
  for (int d = 0; d < kBlockOfDirections; ++d) {
    if (d >= a.count) break;
    float c = a.minus_eps[d];
    if (factored && zo_run_signs(row & ~7ull, kLeft, a.seed, a.param, a.directions[d]) >> (row & 7) & 1) c = -c;
    float v[kRun];
    ZO_UNROLL
    for (int e = 0; e < kRun; ++e) v[e] = theta_run[e];
    zo_subtract_run(v, c, zo_run_signs(element, factored ? kRight : kDense, a.seed, a.param, a.directions[d]));
    To* slice = out + (d * rows + place) * width;
    zo_store_run(slice, at, width, zo_whole(slice, at, width), v);
  }
}

template <class From, class To>
ZO_FN void zo_embedding_gaussian(const From* table, const int64_t* ids, To* out, int64_t rows, int64_t width,
                                 const PerturbArguments& a, const float* quantiles) {
  const int64_t runs = width / kRun + 2;
  const int64_t place = (int64_t)(zo_thread() / (uint64_t)runs), run = (int64_t)(zo_thread() % (uint64_t)runs);
  if (place >= rows) return;
  const uint64_t first = (uint64_t)ids[place] * (uint64_t)width;
  const uint64_t element = (first & ~7ull) + (uint64_t)(kRun * run);
  const int64_t at = (int64_t)(element - first);
  if (at >= width) return;
  float theta_run[kRun];
  zo_load_run(table + first, at, width, zo_whole(table + first, at, width), theta_run);
  zo_displace_normals(out + place * width, rows * width, at, width, element, theta_run, a, quantiles);
}

// ---- update --------------------------------------------------------------------------------------------------------

struct PlanArguments {
  int32_t updates;
  const int64_t* term_counts;
  const float* shrinks;
  const int64_t* rounding_seeds;
  const int64_t* seeds;
  const int64_t* directions;
  const float* coefficients;
};

// One row of the table of slices that an update works on.
struct UpdateSlice {
  uint64_t theta;  // address
  int64_t n;
  uint64_t start;
  uint64_t columns;
  uint64_t param;
  uint64_t decays;
  uint64_t first;  // warp (dense) or thread (factored, gaussian) that begins it
};

// The slice that a worker belongs to: the last one whose first worker is not behind it.
ZO_FN const UpdateSlice& zo_find(const UpdateSlice* slices, int32_t count, uint64_t worker) {
  int32_t low = 0, high = count;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (slices[middle].first <= worker) low = middle;
    else high = middle;
  }
  return slices[low];
}

// Rounds to a 16-bit format and back; a block of random bits serves the 8 elements from a multiple of 8 on. fp32 has
// been rounded already.
ZO_FN void zo_round_run(const float*, float[kRun], uint64_t, uint64_t, uint32_t) {}
template <class T>
ZO_FN void zo_round_run(const T* type, float v[kRun], uint64_t element, uint64_t seed, uint32_t param) {
  uint64_t x[4];
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  zo_counter(x, element >> 3, kRandom, param, 0);
  // A loop that stays one keeps the compiler from mixing the blocks of all runs, for which registers do not suffice.
#pragma unroll 1
  for (int rounds = 0; rounds < 10; rounds += 5) {
    ZO_UNROLL
    for (int i = 0; i < 5; ++i) {
      zo_philox_round(x, k0, k1);
      zo_philox_next(k0, k1);
    }
  }
  const uint32_t w[4] = {(uint32_t)x[0], (uint32_t)x[1], (uint32_t)x[2], (uint32_t)x[3]};
  ZO_UNROLL
  for (int e = 0; e < kRun; ++e) v[e] = zo_value(type, zo_half(type, v[e], w[e >> 1] >> (16 * (e & 1)) & 0xffffu));
}

// The same from any element on.
ZO_FN void zo_round_run_anywhere(const float*, float[kRun], uint64_t, uint64_t, uint32_t) {}
template <class T>
ZO_FN void zo_round_run_anywhere(const T* type, float v[kRun], uint64_t element, uint64_t seed, uint32_t param) {
  uint32_t w[8];
  const uint32_t offset = (uint32_t)element & 7;
  zo_words(w, element >> 3, kRandom, seed, param, 0);
  zo_words(w + 4, (element >> 3) + 1, kRandom, seed, param, 0);
  // Shifted down by 4, 2 and 1 half-words, so that no register is indexed by a variable.
  ZO_UNROLL
  for (int i = 0; i < 6; ++i) w[i] = offset & 4 ? w[i + 2] : w[i];
  ZO_UNROLL
  for (int i = 0; i < 5; ++i) w[i] = offset & 2 ? w[i + 1] : w[i];
  ZO_UNROLL
  for (int i = 0; i < 4; ++i) w[i] = offset & 1 ? w[i] >> 16 | w[i + 1] << 16 : w[i];
  ZO_UNROLL
  for (int e = 0; e < kRun; ++e) v[e] = zo_value(type, zo_half(type, v[e], w[e >> 1] >> (16 * (e & 1)) & 0xffffu));
}

template <class T>
ZO_FN void zo_update_dense(const UpdateSlice* slices, int32_t count, const PlanArguments& plan) {
  enum { kRuns = 8 };  // held in registers; a lane has 16, so each block is made twice
  const uint64_t warp = zo_thread() / 32;
  const uint32_t lane = threadIdx.x & 31;
  const UpdateSlice& slice = zo_find(slices, count, warp);
  T* theta = (T*)slice.theta;
  const uint32_t param = (uint32_t)slice.param;
  const uint64_t tile = slice.start / kTile + (warp - slice.first);
  if (slice.n == 0 || tile * kTile >= slice.start + (uint64_t)slice.n) return;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const uint64_t element = tile * kTile + 2048u * (uint32_t)half + kRun * lane;
    const int64_t at = (int64_t)(element - slice.start);
    float v[kRuns][kRun];
    ZO_UNROLL
    for (int r = 0; r < kRuns; ++r) {
      const int64_t here = at + 32 * kRun * r;
      zo_load_run(theta, here, slice.n, zo_whole(theta, here, slice.n), v[r]);
    }
    int32_t term = 0;
#pragma unroll 1
    for (int32_t k = 0; k < plan.updates; ++k) {
      const float shrink = slice.decays ? plan.shrinks[k] : 1.0f;
      ZO_UNROLL
      for (int r = 0; r < kRuns; ++r) {
        ZO_UNROLL
        for (int e = 0; e < kRun; ++e) v[r][e] *= shrink;
      }
      const int32_t end = term + (int32_t)plan.term_counts[k];
#pragma unroll 1
      for (; term < end; ++term) {
        uint32_t w[4];
        zo_words(w, tile * 32 + lane, kDense, (uint64_t)plan.seeds[term], param, (uint32_t)plan.directions[term]);
        const uint32_t pair[2] = {half ? w[2] : w[0], half ? w[3] : w[1]};
        const float c = plan.coefficients[term];
        ZO_UNROLL
        for (int r = 0; r < kRuns; ++r) zo_subtract_run(v[r], c, pair[r >> 2] >> (8 * (r & 3)));
      }
      ZO_UNROLL
      for (int r = 0; r < kRuns; ++r)
        zo_round_run(theta, v[r], element + 32u * kRun * (uint32_t)r, (uint64_t)plan.rounding_seeds[k], param);
    }
    ZO_UNROLL
    for (int r = 0; r < kRuns; ++r) {
      const int64_t here = at + 32 * kRun * r;
      if (here + kRun > 0 && here < slice.n) zo_store_run(theta, here, slice.n, zo_whole(theta, here, slice.n), v[r]);
    }
  }
}

template <class T>
ZO_FN void zo_update_factored(const UpdateSlice* slices, int32_t count, const PlanArguments& plan) {
  const UpdateSlice& slice = zo_find(slices, count, zo_thread());
  Place p;
  if (slice.n == 0 || !zo_place(p, zo_thread() - slice.first, slice.n, slice.start, slice.columns)) return;
  const uint32_t param = (uint32_t)slice.param;
  T* theta = (T*)slice.theta + p.low;
  const int64_t shift = p.at - p.low, n = p.high - p.low;
  const uint64_t element = p.row * slice.columns + p.column;
  float v[kRun];
  zo_load_run(theta, shift, n, zo_whole(theta, shift, n), v);
  int32_t term = 0;
  for (int32_t k = 0; k < plan.updates; ++k) {
    const float shrink = slice.decays ? plan.shrinks[k] : 1.0f;
    ZO_UNROLL
    for (int e = 0; e < kRun; ++e) v[e] *= shrink;
    for (const int32_t end = term + (int32_t)plan.term_counts[k]; term < end; ++term) {
      const uint64_t seed = (uint64_t)plan.seeds[term];
      const uint32_t direction = (uint32_t)plan.directions[term];
      const uint32_t left = zo_run_signs(p.row & ~7ull, kLeft, seed, param, direction) >> (p.row & 7) & 1;
      const float c = plan.coefficients[term];
      zo_subtract_run(v, left ? -c : c, zo_run_signs(p.column, kRight, seed, param, direction));
    }
    zo_round_run_anywhere(theta, v, element, (uint64_t)plan.rounding_seeds[k], param);
  }
  zo_store_run(theta, shift, n, zo_whole(theta, shift, n), v);
}

template <class T>
ZO_FN void zo_update_gaussian(const UpdateSlice* slices, int32_t count, const PlanArguments& plan,
                              const float* quantiles) {
  const UpdateSlice& slice = zo_find(slices, count, zo_thread());
  T* theta = (T*)slice.theta;
  const uint32_t param = (uint32_t)slice.param;
  const uint64_t element = (slice.start & ~7ull) + kRun * (zo_thread() - slice.first);
  const int64_t at = (int64_t)(element - slice.start), n = slice.n;
  if (at >= n) return;
  float v[kRun];
  zo_load_run(theta, at, n, zo_whole(theta, at, n), v);
  int32_t term = 0;
#pragma unroll 1
  for (int32_t k = 0; k < plan.updates; ++k) {
    const float shrink = slice.decays ? plan.shrinks[k] : 1.0f;
    ZO_UNROLL
    for (int e = 0; e < kRun; ++e) v[e] *= shrink;
#pragma unroll 1
    for (const int32_t end = term + (int32_t)plan.term_counts[k]; term < end; ++term) {
      uint32_t w[4];
      zo_words(w, element >> 3, kGaussian, (uint64_t)plan.seeds[term], param, (uint32_t)plan.directions[term]);
      zo_subtract_normals(v, plan.coefficients[term], w, quantiles);
    }
    zo_round_run(theta, v, element, (uint64_t)plan.rounding_seeds[k], param);
  }
  zo_store_run(theta, at, n, zo_whole(theta, at, n), v);
}

// ---- hash ----------------------------------------------------------------------------------------------------------

ZO_FN uint32_t zo_word(const float* at) { return zo_bits(*at); }
ZO_FN uint32_t zo_word(const uint16_t* at) { return *at; }

template <class Bits>
ZO_FN void zo_hash(const Bits* slice, int64_t n, uint64_t start, uint32_t param, unsigned long long* total) {
  uint64_t sum = 0;
  const uint64_t warps = (uint64_t)gridDim.x * blockDim.x / 32;
  const uint64_t end = (start + (uint64_t)n + kTile - 1) / kTile;
  for (uint64_t tile = start / kTile + zo_thread() / 32; tile < end; tile += warps) {
    uint64_t own = 0;
    for (uint32_t i = threadIdx.x & 31; i < kTile; i += 32) {
      const int64_t at = (int64_t)(tile * kTile + i - start);
      if (at >= 0 && at < n) own += (uint64_t)zo_word(slice + at) * zo_hash_element(i);
    }
    sum += own * zo_hash_tile(param, tile);
  }
  atomicAdd(total, (unsigned long long)sum);
}

// ---- entry points --------------------------------------------------------------------------------------------------

// At least 16 warps to a multiprocessor: the update holds 64 elements of each thread in registers.
#ifndef ZO_GLOBAL
#define ZO_GLOBAL extern "C" __global__ void __launch_bounds__(kThreads, 4)
#endif

#define ZO_PERTURB(name, From, To)                                                                            \
  ZO_GLOBAL zo_perturb1_##name(const From* theta, To* out, PerturbArguments a) {                              \
    zo_perturb_dense<1>(theta, out, a);                                                                       \
  }                                                                                                           \
  ZO_GLOBAL zo_perturb4_##name(const From* theta, To* out, PerturbArguments a) {                              \
    zo_perturb_dense<kBlockOfDirections>(theta, out, a);                                                      \
  }                                                                                                           \
  ZO_GLOBAL zo_perturb_factored_##name(const From* theta, To* out, PerturbArguments a, uint64_t columns) {    \
    zo_perturb_factored(theta, out, a, columns);                                                              \
  }                                                                                                           \
  ZO_GLOBAL zo_perturb_gaussian_##name(const From* theta, To* out, PerturbArguments a,                     \
                                       const float* quantiles) {                                              \
    zo_perturb_gaussian(theta, out, a, quantiles);                                                            \
  }                                                                                                           \
  ZO_GLOBAL zo_embedding_##name(const From* table, const int64_t* ids, To* out, int64_t rows, int64_t width,  \
                                int factored, PerturbArguments a) {                                           \
    zo_embedding(table, ids, out, rows, width, factored, a);                                                  \
  }                                                                                                           \
  ZO_GLOBAL zo_embedding_gaussian_##name(const From* table, const int64_t* ids, To* out, int64_t rows,        \
                                         int64_t width, PerturbArguments a, const float* quantiles) {         \
    zo_embedding_gaussian(table, ids, out, rows, width, a, quantiles);                                        \
  }
ZO_PERTURB(f32_f32, float, float)
ZO_PERTURB(bf16_bf16, Bf16, Bf16)
ZO_PERTURB(bf16_f32, Bf16, float)
ZO_PERTURB(f16_f16, Fp16, Fp16)
ZO_PERTURB(f16_f32, Fp16, float)

#define ZO_UPDATE(name, T)                                                                                    \
  ZO_GLOBAL zo_update_##name(const UpdateSlice* slices, int32_t count, PlanArguments plan) {                  \
    zo_update_dense<T>(slices, count, plan);                                                                  \
  }                                                                                                           \
  ZO_GLOBAL zo_update_factored_##name(const UpdateSlice* slices, int32_t count, PlanArguments plan) {         \
    zo_update_factored<T>(slices, count, plan);                                                               \
  }                                                                                                           \
  ZO_GLOBAL zo_update_gaussian_##name(const UpdateSlice* slices, int32_t count, PlanArguments plan,           \
                                      const float* quantiles) {                                               \
    zo_update_gaussian<T>(slices, count, plan, quantiles);                                                    \
  }
ZO_UPDATE(f32, float)
ZO_UPDATE(bf16, Bf16)
ZO_UPDATE(f16, Fp16)

// Bytes k .. of `count` directions from element `start` (a multiple of 8) on.
ZO_GLOBAL zo_signs(uint8_t* out, int64_t bytes, uint64_t start, uint32_t stream, PerturbArguments a) {
  const int64_t k = (int64_t)zo_thread();
  if (k >= bytes) return;
  ZO_UNROLL
  for (int d = 0; d < kBlockOfDirections; ++d)
    if (d < a.count) out[d * bytes + k] = (uint8_t)zo_run_signs(start + 8 * (uint64_t)k, stream, a.seed, a.param, a.directions[d]);
}

ZO_GLOBAL zo_hash_f32(const float* slice, int64_t n, uint64_t start, uint32_t param, unsigned long long* total) {
  zo_hash(slice, n, start, param, total);
}
ZO_GLOBAL zo_hash_half(const uint16_t* slice, int64_t n, uint64_t start, uint32_t param, unsigned long long* total) {
  zo_hash(slice, n, start, param, total);
}
