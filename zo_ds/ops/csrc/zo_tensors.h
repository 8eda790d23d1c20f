// The ops on one piece of a tensor, for one instruction set. No include guard; see zo_core.h.

// Room for kMost terms at a piece: signs of dense or factored noise, or half-words of gaussian noise.
struct SignScratch {
  enum { kMost = kGroup };
  uint8_t table[kMost * kTableBytes + kPad];
  float signed_ones[kMost];
};
struct NormalScratch {
  enum { kMost = kGroupOfNormals, kRow = kTile + 8 * kBlocks };
  uint16_t words[kMost * kRow];
};

// Terms begin .. begin + count - 1 (at most kMost) of the noise at a piece.
static Signs zo_terms(const Noise& noise, const Piece& piece, int64_t begin, int count, SignScratch& scratch) {
  if (noise.right == nullptr) {
    for (int t = 0; t < count; ++t)
      zo_fill_signs(scratch.table + (size_t)t * kTableBytes, piece.tile, piece.first, piece.count, kDense,
                    (uint64_t)noise.seeds[begin + t], noise.param, (uint32_t)noise.directions[begin + t]);
    return {scratch.table, kTableBytes, noise.coefficients + begin, count};
  }
  for (int t = 0; t < count; ++t) {
    const uint8_t* left = noise.left + (size_t)(begin + t) * noise.left_row;
    scratch.signed_ones[t] = zo_minus_if(noise.coefficients[begin + t], left[piece.row >> 3] >> (piece.row & 7) & 1);
  }
  const uint8_t* right = noise.right + (size_t)begin * noise.right_row + piece.tile * kTableBytes;
  return {right, noise.right_row, scratch.signed_ones, count};
}
static Normals zo_terms(const Noise& noise, const Piece& piece, int64_t begin, int count, NormalScratch& scratch) {
  enum { kRow = NormalScratch::kRow };
  for (int t = 0; t < count; ++t)
    zo_fill_words(scratch.words + (size_t)t * kRow + (piece.first & ~7), piece.element, piece.count, kGaussian,
                  (uint64_t)noise.seeds[begin + t], noise.param, (uint32_t)noise.directions[begin + t]);
  return {scratch.words, kRow, noise.coefficients + begin, count, noise.quantiles};
}

template <class Scratch, class From, class To>
static void zo_perturb_piece(const Noise& noise, const Piece& piece, const From* from, To* to, int64_t stride,
                             int directions) {
  Scratch scratch;
  for (int d = 0; d < directions; ++d) {
    const auto terms = zo_terms(noise, piece, d, 1, scratch);
    zo_sweep<kNearest>(from, to + d * stride, nullptr, piece.first, piece.count, 1.0f, terms);
  }
}

template <class Terms>
ZO_FN void zo_settle(float* at, const float* sum, const uint16_t*, const Piece& piece, float shrink, const Terms& terms) {
  zo_sweep<kNearest>(sum, at, nullptr, piece.first, piece.count, shrink, terms);
}
template <class T, class From, class Terms>
ZO_FN void zo_settle(T* at, const From* sum, const uint16_t* random, const Piece& piece, float shrink,
                     const Terms& terms) {
  zo_sweep<kStochastic>(sum, at, random, piece.first, piece.count, shrink, terms);
}

// All updates of a plan on one piece, which stays in the first-level cache.
template <class Scratch, class T>
static void zo_update_piece(const Noise& noise, const Piece& piece, const Plan& plan, bool decays, T* at) {
  enum { kMost = Scratch::kMost };
  Scratch scratch;
  float sum[kTile];
  uint16_t buffer[kTile + 8 + 8 * kBlocks];
  int64_t begin = 0;
  for (int64_t k = 0; k < plan.updates; ++k) {
    const uint16_t* random = nullptr;
    if (sizeof(T) == 2)
      random = zo_fill_words(buffer, piece.element, piece.count, kRandom, (uint64_t)plan.rounding_seeds[k], noise.param,
                             0);
    float shrink = decays ? plan.shrinks[k] : 1.0f;
    const int64_t end = begin + plan.term_counts[k];
    bool started = false;
    for (; end - begin > kMost; begin += kMost, started = true, shrink = 1.0f) {
      const auto terms = zo_terms(noise, piece, begin, kMost, scratch);
      if (started) zo_sweep<kNearest>(sum, sum, nullptr, piece.first, piece.count, shrink, terms);
      else zo_sweep<kNearest>(at, sum, nullptr, piece.first, piece.count, shrink, terms);
    }
    const auto terms = zo_terms(noise, piece, begin, (int)(end - begin), scratch);
    if (started) zo_settle(at, sum, random, piece, shrink, terms);
    else zo_settle(at, at, random, piece, shrink, terms);
    begin = end;
  }
}

static void zo_perturb_any(const Noise& noise, const Piece& piece, const void* from, Dtype from_type, void* to,
                           Dtype to_type, int64_t stride, int directions) {
  const auto go = [&](auto* in, auto* out) {
    if (noise.quantiles)
      zo_perturb_piece<NormalScratch>(noise, piece, in + piece.at, out + piece.at, stride, directions);
    else
      zo_perturb_piece<SignScratch>(noise, piece, in + piece.at, out + piece.at, stride, directions);
  };
  if (from_type == kFloat32) go((const float*)from, (float*)to);
  else if (from_type == kBfloat16 && to_type == kBfloat16) go((const Bf16*)from, (Bf16*)to);
  else if (from_type == kBfloat16) go((const Bf16*)from, (float*)to);
  else if (to_type == kFloat16) go((const Fp16*)from, (Fp16*)to);
  else go((const Fp16*)from, (float*)to);
}

static void zo_update_any(const Noise& noise, const Piece& piece, const Plan& plan, bool decays, void* tensor,
                          Dtype type) {
  const auto go = [&](auto* at) {
    if (noise.quantiles) zo_update_piece<NormalScratch>(noise, piece, plan, decays, at + piece.at);
    else zo_update_piece<SignScratch>(noise, piece, plan, decays, at + piece.at);
  };
  if (type == kFloat32) go((float*)tensor);
  else if (type == kBfloat16) go((Bf16*)tensor);
  else go((Fp16*)tensor);
}

static uint64_t zo_hash_any(const Piece& piece, const void* tensor, Dtype type, const uint32_t* weights) {
  if (type == kFloat32) return zo_hash_piece((const float*)tensor + piece.at, piece.first, piece.count, weights);
  return zo_hash_piece((const uint16_t*)tensor + piece.at, piece.first, piece.count, weights);
}

static const Kernels kernels = {zo_perturb_any, zo_update_any, zo_hash_any, zo_fill_signs};
