// The CPU library: entry points over raw pointers, threads, and the choice of an instruction set at run time.
// Plain C++17, no torch headers, no -march: the vector code is compiled by target pragma.

#include <stddef.h>
#include <stdint.h>

#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef ZO_DIGEST
#define ZO_DIGEST ""
#endif

namespace {

struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };
enum Rounding { kNearest, kStochastic };
enum Stream : uint32_t { kDense, kLeft, kRight, kRandom, kGaussian };
enum Dtype { kFloat32, kBfloat16, kFloat16 };
enum { kTile = 4096, kTableBytes = kTile / 8, kGroup = 16, kGroupOfNormals = 4, kPad = 64 };

inline uint32_t zo_word(float x) { uint32_t bits; __builtin_memcpy(&bits, &x, 4); return bits; }
inline uint32_t zo_word(uint16_t x) { return x; }

// Several updates in order, see zo_cpu_update.
struct Plan {
  int64_t updates;
  const int64_t* term_counts;
  const float* shrinks;
  const int64_t* rounding_seeds;
};

// The directions of one parameter. Factored ones come with packed tables: row t of `right` holds the signs of all
// columns in the layout of zo_fill_signs, row t of `left` those of the slice's rows, eight to a byte. Gaussian ones come
// with the 2**15 positive quantiles.
struct Noise {
  uint32_t param;
  const int64_t* seeds;
  const int64_t* directions;
  const float* coefficients;
  const uint8_t* right;
  size_t right_row;
  const uint8_t* left;
  size_t left_row;
  const float* quantiles;
};

struct Piece {
  int64_t at;        // index of its first element in the slice
  uint64_t element;  // index of that element in the whole parameter
  int count;
  uint64_t tile;     // tile of the noise, or of columns
  int first;         // index of the first element in that tile
  uint64_t row;      // index into the left factor's table
};

inline float zo_minus_if(float x, int minus) { return minus ? -x : x; }

// What every instruction set offers.
struct Kernels {
  void (*perturb)(const Noise&, const Piece&, const void*, Dtype, void*, Dtype, int64_t, int);
  void (*update)(const Noise&, const Piece&, const Plan&, bool, void*, Dtype);
  uint64_t (*hash)(const Piece&, const void*, Dtype, const uint32_t*);
  void (*fill_signs)(uint8_t*, uint64_t, int, int, uint32_t, uint64_t, uint32_t, uint32_t);
};

}  // namespace

#define ZO_LANES 1
namespace scalar {
namespace {
#include "zo_lanes.h"
#include "zo_core.h"
#include "zo_tiles.h"
#include "zo_tensors.h"
}  // namespace
}  // namespace scalar
#undef ZO_LANES
#undef ZO_FN
#undef ZO_UNROLL

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
#define ZO_LANES 8
namespace avx2 {
namespace {
#include "zo_lanes.h"
#include "zo_core.h"
#include "zo_tiles.h"
#include "zo_tensors.h"
}  // namespace
}  // namespace avx2
#undef ZO_LANES
#undef ZO_FN
#undef ZO_UNROLL
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif
#define ZO_LANES 16
namespace avx512 {
namespace {
#include "zo_lanes.h"
#include "zo_core.h"
#include "zo_tiles.h"
#include "zo_tensors.h"
}  // namespace
}  // namespace avx512
#undef ZO_LANES
#undef ZO_FN
#undef ZO_UNROLL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace {

const Kernels& kernels_of(int isa) {
#if defined(__x86_64__)
  if (isa == 2) return avx512::kernels;
  if (isa == 1) return avx2::kernels;
#endif
  return scalar::kernels;
}

// Elements start .. start + count - 1 of a parameter, cut into pieces.
class Slice {
 public:
  Slice() = default;
  Slice(int64_t count, uint64_t start, uint64_t columns) : count_(count), start_(start), columns_(columns) {
    if (columns_) {
      first_row_ = start_ / columns_;
      tiles_ = (columns_ + kTile - 1) / kTile;
    }
  }

  uint64_t columns() const { return columns_; }
  int64_t count() const { return count_; }
  // The left factor's table begins at a multiple of 8 rows.
  uint64_t table_row() const { return first_row_ & ~(uint64_t)7; }
  uint64_t table_rows() const { return (start_ + (uint64_t)count_ - 1) / columns_ + 1 - table_row(); }

  // Index of the piece that holds element `at` of the slice, or the number of pieces for at == count.
  int64_t piece_of(int64_t at) const {
    if (at >= count_) return count_ ? piece_of(count_ - 1) + 1 : 0;
    const uint64_t element = start_ + (uint64_t)at;
    if (!columns_) return (int64_t)(element / kTile - start_ / kTile);
    const uint64_t row = element / columns_;
    const int64_t index = (int64_t)((row - first_row_) * tiles_ + (element - row * columns_) / kTile);
    return index - first_piece();
  }

  Piece piece(int64_t index) const {
    Piece p{};
    uint64_t begin, end;  // in the whole parameter
    if (!columns_) {
      p.tile = start_ / kTile + (uint64_t)index;
      begin = p.tile * kTile;
      end = begin + kTile;
    } else {
      const uint64_t place = (uint64_t)(index + first_piece());
      const uint64_t row = first_row_ + place / tiles_;
      p.tile = place % tiles_;
      p.row = row - table_row();
      begin = row * columns_ + p.tile * kTile;
      end = p.tile + 1 == tiles_ ? (row + 1) * columns_ : begin + kTile;
    }
    const uint64_t from = begin > start_ ? begin : start_;
    const uint64_t to = end < start_ + (uint64_t)count_ ? end : start_ + (uint64_t)count_;
    p.at = (int64_t)(from - start_);
    p.element = from;
    p.first = (int)(from - begin);
    p.count = (int)(to - from);
    return p;
  }

 private:
  int64_t first_piece() const { return (int64_t)((start_ - first_row_ * columns_) / kTile); }

  int64_t count_ = 0;
  uint64_t start_ = 0, columns_ = 0, first_row_ = 0, tiles_ = 1;
};

// Calls work(tensor, first piece, end) so that every thread gets about the same number of elements, in order.
template <class Work>
void in_parallel(const std::vector<Slice>& slices, int threads, Work work) {
  int64_t total = 0;
  for (const Slice& s : slices) total += s.count();
  const int64_t useful = total / (4 * kTile) + 1;
  if (threads > useful) threads = (int)useful;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int i = 0; i < threads; ++i) {
    const int64_t from = total * i / threads, to = total * (i + 1) / threads;
    int64_t before = 0;
    for (size_t s = 0; s < slices.size(); ++s) {
      const int64_t count = slices[s].count();
      const int64_t lo = from > before ? from - before : 0, hi = to < before + count ? to - before : count;
      before += count;
      // A piece belongs to the thread whose range holds its first element.
      const auto begin_of = [&](int64_t at) {
        const int64_t index = slices[s].piece_of(at);
        return at < count && slices[s].piece(index).at < at ? index + 1 : index;
      };
      if (lo < hi) work(s, begin_of(lo), begin_of(hi));
    }
  }
}

// Packed tables of a tensor's factored directions.
class Factors {
 public:
  Factors(const Kernels& kernels, const Slice& slice, Noise& noise, int64_t terms) {
    if (!slice.columns() || !slice.count()) return;
    fill(kernels, noise, terms, kRight, 0, slice.columns(), right_, noise.right_row);
    fill(kernels, noise, terms, kLeft, slice.table_row(), slice.table_rows(), left_, noise.left_row);
    noise.right = right_.data();
    noise.left = left_.data();
  }

 private:
  static void fill(const Kernels& kernels, const Noise& noise, int64_t terms, uint32_t stream, uint64_t first,
                   uint64_t count, std::vector<uint8_t>& table, size_t& row) {
    const uint64_t tile = first / kTile, tiles = (first + count - 1) / kTile + 1 - tile;
    const size_t bytes = (count + 7) / 8;
    row = bytes;
    table.resize((size_t)terms * bytes + kPad);
    uint8_t whole[kTableBytes];
    for (int64_t t = 0; t < terms; ++t) {
      for (uint64_t k = 0; k < tiles; ++k) {
        const uint64_t begin = (tile + k) * kTile;
        const uint64_t from = begin > first ? begin : first;
        const uint64_t end = begin + kTile < first + count ? begin + kTile : first + count;
        kernels.fill_signs(whole, tile + k, (int)(from - begin), (int)(end - from), stream,
                           (uint64_t)noise.seeds[t], noise.param, (uint32_t)noise.directions[t]);
        __builtin_memcpy(table.data() + (size_t)t * bytes + (from - first) / 8, whole + (from - begin) / 8,
                         (end - from + 7) / 8);
      }
    }
  }

  std::vector<uint8_t> right_, left_;
};

const uint32_t* hash_weights() {
  static const std::vector<uint32_t> weights = [] {
    std::vector<uint32_t> w(kTile);
    for (uint32_t i = 0; i < kTile; ++i) w[i] = scalar::zo_hash_element(i);
    return w;
  }();
  return weights.data();
}

int64_t size_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

}  // namespace

// What the library was built from; see zo_ds/ops/builder.py.
extern "C" const char* zo_cpu_digest(void) { return ZO_DIGEST; }

// Instruction sets of this machine: 0 plain C++, 1 AVX2, 2 AVX-512.
extern "C" int zo_cpu_best_isa(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return 2;
  return avx2 ? 1 : 0;
#else
  return 0;
#endif
}

// out[d] = round(theta + eps_d u_d): `count` directions of one slice, out laid out [count, n]. Dtypes: 0 fp32, 1 bf16,
// 2 fp16; out has theta's dtype, or fp32. With quantiles (and columns 0) u is gaussian.
extern "C" void zo_cpu_perturb(const void* theta, int theta_type, void* out, int out_type, int64_t n, uint64_t start,
                               uint64_t columns, const float* quantiles, uint32_t param, int64_t count,
                               const int64_t* seeds, const int64_t* directions, const float* minus_eps, int isa,
                               int threads) {
  const Kernels& kernels = kernels_of(isa);
  const std::vector<Slice> slices = {Slice(n, start, columns)};
  Noise noise{param, seeds, directions, minus_eps, nullptr, 0, nullptr, 0, quantiles};
  const Factors factors(kernels, slices[0], noise, count);
  in_parallel(slices, threads, [&](size_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.perturb(noise, slices[0].piece(i), theta, (Dtype)theta_type, out, (Dtype)out_type, n, (int)count);
  });
}

// out[d, i] = round(table[ids[i]] + eps_d u_d of that row), out laid out [count, ids, width].
extern "C" void zo_cpu_embedding_rows(const void* table, int table_type, const int64_t* ids, int64_t rows, void* out,
                                      int out_type, int64_t width, int factored, const float* quantiles,
                                      uint32_t param, int64_t count, const int64_t* seeds, const int64_t* directions,
                                      const float* minus_eps, int isa, int threads) {
  const Kernels& kernels = kernels_of(isa);
  const int64_t in = width * size_of(table_type), row = width * size_of(out_type);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows * width * count > 4 * kTile)
  for (int64_t i = 0; i < rows; ++i) {
    const uint64_t start = (uint64_t)ids[i] * (uint64_t)width;
    const Slice slice(width, start, factored ? (uint64_t)width : 0);
    Noise noise{param, seeds, directions, minus_eps, nullptr, 0, nullptr, 0, quantiles};
    const Factors factors(kernels, slice, noise, count);
    for (int64_t p = 0; p < slice.piece_of(width); ++p)
      kernels.perturb(noise, slice.piece(p), (const char*)table + ids[i] * in, (Dtype)table_type,
                      (char*)out + i * row, (Dtype)out_type, rows * width, (int)count);
  }
}

// theta <- round(theta * shrink - sum_t c_t u_t), update after update, on many slices in one pass over each.
// seeds, directions and coefficients hold the terms of all updates in order; term_counts says how many each has.
// Slices that are gaussian take quantiles.
extern "C" void zo_cpu_update(int64_t tensors, void* const* thetas, const int* types, const int64_t* counts,
                              const int64_t* starts, const int64_t* columns, const int* gaussian,
                              const float* quantiles, const int64_t* params, const int* decays, int64_t updates,
                              const int64_t* term_counts, const float* shrinks, const int64_t* rounding_seeds,
                              const int64_t* seeds, const int64_t* directions, const float* coefficients, int isa,
                              int threads) {
  const Kernels& kernels = kernels_of(isa);
  std::vector<Slice> slices;
  bool factored = false;
  for (int64_t s = 0; s < tensors; ++s) {
    slices.emplace_back(counts[s], (uint64_t)starts[s], (uint64_t)columns[s]);
    factored |= columns[s] != 0;
  }
  // Tables of factored directions grow with the terms, so long histories take more than one pass.
  const int64_t most_terms = factored ? 512 : INT64_MAX;
  int64_t term = 0;
  for (int64_t k = 0; k < updates;) {
    int64_t last = k, terms = 0;
    while (last < updates && (last == k || terms + term_counts[last] <= most_terms)) terms += term_counts[last++];
    const Plan plan{last - k, term_counts + k, shrinks + k, rounding_seeds + k};
    std::vector<Noise> noises;
    std::vector<Factors> factors;
    factors.reserve((size_t)tensors);
    for (int64_t s = 0; s < tensors; ++s) {
      noises.push_back({(uint32_t)params[s], seeds + term, directions + term, coefficients + term, nullptr, 0, nullptr, 0,
                        gaussian[s] ? quantiles : nullptr});
      factors.emplace_back(kernels, slices[(size_t)s], noises.back(), terms);
    }
    in_parallel(slices, threads, [&](size_t s, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        kernels.update(noises[s], slices[s].piece(i), plan, decays[s] != 0, thetas[s], (Dtype)types[s]);
    });
    k = last;
    term += terms;
  }
}

// Signs of elements start .. start + n - 1 (start a multiple of 8), eight to a byte, out laid out [count, (n + 7) / 8].
extern "C" void zo_cpu_signs(uint8_t* out, int64_t n, uint64_t start, uint32_t stream, uint32_t param, int64_t count,
                             const int64_t* seeds, const int64_t* directions, int isa, int threads) {
  const Kernels& kernels = kernels_of(isa);
  const std::vector<Slice> slices = {Slice(n, start, 0)};
  in_parallel(slices, threads, [&](size_t, int64_t begin, int64_t end) {
    uint8_t table[kTableBytes];
    for (int64_t i = begin; i < end; ++i) {
      const Piece piece = slices[0].piece(i);
      for (int64_t d = 0; d < count; ++d) {
        kernels.fill_signs(table, piece.tile, piece.first, piece.count, stream, (uint64_t)seeds[d], param,
                           (uint32_t)directions[d]);
        __builtin_memcpy(out + d * ((n + 7) / 8) + piece.at / 8, table + piece.first / 8,
                         (size_t)(piece.count + 7) / 8);
      }
    }
  });
}

// A slice's part of its parameter's hash; parts add up modulo 2**64.
extern "C" uint64_t zo_cpu_hash(const void* tensor, int type, int64_t n, uint64_t start, uint32_t param, int isa,
                                int threads) {
  const Kernels& kernels = kernels_of(isa);
  const std::vector<Slice> slices = {Slice(n, start, 0)};
  const uint32_t* weights = hash_weights();
  uint64_t total = 0;
  in_parallel(slices, threads, [&](size_t, int64_t begin, int64_t end) {
    uint64_t sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      const Piece piece = slices[0].piece(i);
      sum += kernels.hash(piece, tensor, (Dtype)type, weights) * scalar::zo_hash_tile(param, piece.tile);
    }
    __atomic_fetch_add(&total, sum, __ATOMIC_RELAXED);
  });
  return total;
}
