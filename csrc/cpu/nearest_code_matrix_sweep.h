// Scores of a strip of rows against a chunk of codes, by instructions that multiply matrices.
#pragma once
#include "cpu/nearest_code_codebook.h"
#include "cpu/nearest_code_sweep.h"
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

constexpr int strip_rows = 32;
constexpr int matrix_rows = 16;

// The matrix registers, for as long as this lives: 0 to 3 hold scores, 4 and 5 rows, 6 and 7 codes.
struct MatrixRegisters {
  MatrixRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));  // the intrinsic names 8 of the 64 bytes
  }
  MatrixRegisters(const MatrixRegisters&) = delete;
  ~MatrixRegisters() { _tile_release(); }
};

// The intrinsics hide from the compiler what is read.
template <int i>
MMFAST_INLINE void matrix_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(i) : "memory");
}
template <int i>
MMFAST_INLINE void matrix_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(i) : "memory");
}
template <int scores, int rows, int codes>
MMFAST_INLINE void matrix_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(scores), "i"(rows), "i"(codes));
}

constexpr int64_t score_stride = lanes * sizeof(float);
constexpr int64_t code_stride = tile_codes * 2 * sizeof(int16_t);
constexpr int64_t code_step = matrix_depth * tile_codes;  // int16 of matrix_depth dimensions

// What follows computes folded, [tiles][strip_rows][lanes]: the best score of the codes of one tile
// and lane. rows: [strip_rows][depth], codes: [tiles][depth / 2][tile_vectors][lanes][2]. A job is
// a tile of codes against some rows.
//
// Scores cannot leave a register before its products are done, nor be read before they are in the
// cache: in each job the scores of the job before are stored, and those of the one before that are
// folded.
template <int rows>
struct Ring {
  static constexpr int64_t vector = rows * lanes;
  alignas(64) float scores[2][tile_vectors * vector];
  float* outs[2] = {};  // where the best scores of the last two jobs belong
  int64_t job = 0;

  float* before() { return scores[(job + 1) % 2]; }

  // Folds the scores of two jobs ago and goes on to the next job, whose best belong to `out`.
  __attribute__((always_inline)) void fold(float* out) {
    if (job > 1) fold_to(outs[job % 2], scores[job % 2]);
    outs[job % 2] = out;
    ++job;
  }

  static __attribute__((always_inline)) void fold_to(float* out, const float* from) {
#pragma GCC unroll 32
    for (int r = 0; r < vector; r += lanes)
      _mm512_store_ps(
          out + r, _mm512_max_ps(_mm512_load_ps(from + r), _mm512_load_ps(from + vector + r)));
  }

  // After the last job's scores are stored.
  void finish() {
    if (job > 1) fold_to(outs[job % 2], scores[job % 2]);
    fold_to(outs[(job + 1) % 2], scores[(job + 1) % 2]);
  }
};

// Few dimensions, depth = steps * matrix_depth: the rows stay in their registers, 16 of them
// against a few tiles of codes, which are then in the first-level cache for the other 16.
template <int steps>
static __attribute__((noinline)) void matrix_sweep_few(const int16_t* rows, int64_t,
                                                       const int16_t* codes, const float* terms,
                                                       int64_t tiles, float* folded) {
  constexpr int64_t together = 4, depth = steps * matrix_depth, row_stride = 2 * depth;
  Ring<matrix_rows> ring;
  const auto job = [&]<int set>(int64_t t, float* out) __attribute__((always_inline)) {
    constexpr int s = 2 * set, o = 2 - s;
    const int16_t* c = codes + t * tile_codes * depth;
    float* to = ring.before();
    matrix_load<6>(c, code_stride);
    matrix_load<s>(terms + t * tile_codes, 0);
    matrix_load<s + 1>(terms + t * tile_codes + lanes, 0);
    matrix_multiply<s, 4, 6>();
    matrix_store<o>(to, score_stride);
    matrix_load<7>(c + 2 * lanes, code_stride);
    matrix_multiply<s + 1, 4, 7>();
    if constexpr (steps == 2) {
      matrix_load<6>(c + code_step, code_stride);
      matrix_multiply<s, 5, 6>();
    }
    matrix_store<o + 1>(to + ring.vector, score_stride);
    if constexpr (steps == 2) {
      matrix_load<7>(c + code_step + 2 * lanes, code_stride);
      matrix_multiply<s + 1, 5, 7>();
    }
    ring.fold(out);
  };
  for (int64_t first = 0; first < tiles; first += together) {
    const int64_t end = first + together < tiles ? first + together : tiles;
    for (int half = 0; half < 2; ++half) {
      const int16_t* r = rows + half * matrix_rows * depth;
      matrix_load<4>(r, row_stride);
      if constexpr (steps == 2) matrix_load<5>(r + matrix_depth, row_stride);
      for (int64_t t = first; t < end; ++t) {
        float* out = folded + (t * strip_rows + half * matrix_rows) * lanes;
        if (ring.job % 2 == 0)
          job.template operator()<0>(t, out);
        else
          job.template operator()<1>(t, out);
      }
    }
  }
  // The number of jobs is even: the last one's scores are in registers 2 and 3.
  matrix_store<2>(ring.before(), score_stride);
  matrix_store<3>(ring.before() + ring.vector, score_stride);
  ring.finish();
}

// More dimensions: all rows against a tile of codes.
static __attribute__((noinline)) void matrix_sweep_many(const int16_t* rows, int64_t depth,
                                                        const int16_t* codes, const float* terms,
                                                        int64_t tiles, float* folded) {
  Ring<strip_rows> ring;
  constexpr int64_t half = matrix_rows * lanes;
  const int64_t row_stride = 2 * depth;
  const int16_t* below = rows + matrix_rows * depth;
  for (int64_t t = 0; t < tiles; ++t) {
    const int16_t* c = codes + t * tile_codes * depth;
    const float* term = terms + t * tile_codes;
    float* to = ring.before();
    matrix_load<4>(rows, row_stride);
    matrix_load<6>(c, code_stride);
    matrix_store<0>(to, score_stride);
    matrix_load<0>(term, 0);
    matrix_multiply<0, 4, 6>();
    matrix_load<7>(c + 2 * lanes, code_stride);
    matrix_store<1>(to + ring.vector, score_stride);
    matrix_load<1>(term + lanes, 0);
    matrix_multiply<1, 4, 7>();
    matrix_load<5>(below, row_stride);
    matrix_store<2>(to + half, score_stride);
    matrix_load<2>(term, 0);
    matrix_multiply<2, 5, 6>();
    matrix_store<3>(to + ring.vector + half, score_stride);
    matrix_load<3>(term + lanes, 0);
    matrix_multiply<3, 5, 7>();
    const auto step = [&](int64_t d) __attribute__((always_inline)) {
      matrix_load<4>(rows + d, row_stride);
      matrix_load<6>(c + d * tile_codes, code_stride);
      matrix_multiply<0, 4, 6>();
      matrix_load<7>(c + d * tile_codes + 2 * lanes, code_stride);
      matrix_multiply<1, 4, 7>();
      matrix_load<5>(below + d, row_stride);
      matrix_multiply<2, 5, 6>();
      matrix_multiply<3, 5, 7>();
    };
    step(matrix_depth);
    ring.fold(folded + t * strip_rows * lanes);
    for (int64_t d = 2 * matrix_depth; d < depth; d += matrix_depth) step(d);
  }
  float* to = ring.before();
  matrix_store<0>(to, score_stride);
  matrix_store<1>(to + ring.vector, score_stride);
  matrix_store<2>(to + half, score_stride);
  matrix_store<3>(to + ring.vector + half, score_stride);
  ring.finish();
}

using MatrixSweep = decltype(&matrix_sweep_many);

static MatrixSweep matrix_sweep_for(int64_t depth) {
  return depth == matrix_depth       ? matrix_sweep_few<1>
         : depth == 2 * matrix_depth ? matrix_sweep_few<2>
                                     : matrix_sweep_many;
}

}  // namespace mmfast::MMFAST_ISA
