// The ops on one piece of a tensor, for one instruction set. No include guard; see zo_core.h.

// Terms begin .. begin + count - 1 (at most kGroup) of the noise at a piece; table and signed_ones are scratch.
static Terms zo_terms(const Noise& noise, const Piece& piece, int64_t begin, int count, uint8_t* table,
                      float* signed_ones) {
  if (noise.right == nullptr) {
    for (int t = 0; t < count; ++t)
      zo_fill_signs(table + (size_t)t * kTableBytes, piece.tile, piece.first, piece.count, kDense,
                    (uint64_t)noise.seeds[begin + t], noise.param, (uint32_t)noise.directions[begin + t]);
    return {table, kTableBytes, noise.coefficients + begin, count};
  }
  for (int t = 0; t < count; ++t) {
    const uint8_t* left = noise.left + (size_t)(begin + t) * noise.left_row;
    signed_ones[t] = zo_minus_if(noise.coefficients[begin + t], left[piece.row >> 3] >> (piece.row & 7) & 1);
  }
  return {noise.right + (size_t)begin * noise.right_row + piece.tile * kTableBytes, noise.right_row, signed_ones, count};
}

template <class From, class To>
static void zo_perturb_piece(const Noise& noise, const Piece& piece, const From* from, To* to, int64_t stride,
                             int directions) {
  uint8_t table[kTableBytes + kPad];
  float signed_one[1];
  for (int d = 0; d < directions; ++d) {
    const Terms terms = zo_terms(noise, piece, d, 1, table, signed_one);
    zo_sweep<kNearest>(from, to + d * stride, nullptr, piece.first, piece.count, 1.0f, terms);
  }
}

ZO_FN void zo_settle(float* at, const float* sum, const uint16_t*, const Piece& piece, float shrink, const Terms& terms) {
  zo_sweep<kNearest>(sum, at, nullptr, piece.first, piece.count, shrink, terms);
}
template <class T, class From>
ZO_FN void zo_settle(T* at, const From* sum, const uint16_t* random, const Piece& piece, float shrink,
                     const Terms& terms) {
  zo_sweep<kStochastic>(sum, at, random, piece.first, piece.count, shrink, terms);
}

// All updates of a plan on one piece, which stays in the first-level cache.
template <class T>
static void zo_update_piece(const Noise& noise, const Piece& piece, const Plan& plan, bool decays, T* at) {
  uint8_t table[kGroup * kTableBytes + kPad];
  float signed_ones[kGroup];
  float sum[kTile];
  uint16_t buffer[kTile + 8 + 8 * kBlocks];
  int64_t begin = 0;
  for (int64_t k = 0; k < plan.updates; ++k) {
    const uint16_t* random = nullptr;
    if (sizeof(T) == 2)
      random = zo_fill_random(buffer, piece.element, piece.count, (uint64_t)plan.rounding_seeds[k], noise.param);
    float shrink = decays ? plan.shrinks[k] : 1.0f;
    const int64_t end = begin + plan.term_counts[k];
    bool started = false;
    for (; end - begin > kGroup; begin += kGroup, started = true, shrink = 1.0f) {
      const Terms terms = zo_terms(noise, piece, begin, kGroup, table, signed_ones);
      if (started) zo_sweep<kNearest>(sum, sum, nullptr, piece.first, piece.count, shrink, terms);
      else zo_sweep<kNearest>(at, sum, nullptr, piece.first, piece.count, shrink, terms);
    }
    const Terms terms = zo_terms(noise, piece, begin, (int)(end - begin), table, signed_ones);
    if (started) zo_settle(at, sum, random, piece, shrink, terms);
    else zo_settle(at, at, random, piece, shrink, terms);
    begin = end;
  }
}

static void zo_perturb_any(const Noise& noise, const Piece& piece, const void* from, Dtype from_type, void* to,
                           Dtype to_type, int64_t stride, int directions) {
  const auto go = [&](auto* in, auto* out) {
    zo_perturb_piece(noise, piece, in + piece.at, out + piece.at, stride, directions);
  };
  if (from_type == kFloat32) go((const float*)from, (float*)to);
  else if (from_type == kBfloat16 && to_type == kBfloat16) go((const Bf16*)from, (Bf16*)to);
  else if (from_type == kBfloat16) go((const Bf16*)from, (float*)to);
  else if (to_type == kFloat16) go((const Fp16*)from, (Fp16*)to);
  else go((const Fp16*)from, (float*)to);
}

static void zo_update_any(const Noise& noise, const Piece& piece, const Plan& plan, bool decays, void* tensor,
                          Dtype type) {
  if (type == kFloat32) zo_update_piece(noise, piece, plan, decays, (float*)tensor + piece.at);
  else if (type == kBfloat16) zo_update_piece(noise, piece, plan, decays, (Bf16*)tensor + piece.at);
  else zo_update_piece(noise, piece, plan, decays, (Fp16*)tensor + piece.at);
}

static uint64_t zo_hash_any(const Piece& piece, const void* tensor, Dtype type, const uint32_t* weights) {
  if (type == kFloat32) return zo_hash_piece((const float*)tensor + piece.at, piece.first, piece.count, weights);
  return zo_hash_piece((const uint16_t*)tensor + piece.at, piece.first, piece.count, weights);
}

static const Kernels kernels = {zo_perturb_any, zo_update_any, zo_hash_any, zo_fill_signs};
