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
// what two registers accumulate.
//
// Scores cannot leave a register before its products are done, nor be read before they are in the
// cache: while two registers multiply, the scores of the job before are stored from the other two,
// and those of the tile before that are folded, a part of the rows in each job.

// The scores of this tile and of the one before; `vectors`: how many of its scores a row gets in
// one job.
template <int vectors>
struct Ring {
  static constexpr int group = tile_vectors / vectors;  // jobs of a tile
  static constexpr int rows = 2 * matrix_rows / vectors;
  alignas(64) float scores[2 * group][2 * matrix_rows * lanes];
  float* outs[2] = {};  // where the best scores of the two tiles belong
  int64_t job = 0;

  float* before() { return scores[(job + 2 * group - 1) % (2 * group)]; }

  // Folds the rows whose turn it is and goes on to the next job, of a tile whose best scores
  // belong to `out`.
  __attribute__((always_inline)) void fold(float* out) {
    const int64_t done = job - group - 1;
    if (done >= 0) fold_part(done);
    if (job % group == 0) outs[job / group % 2] = out;
    ++job;
  }

  __attribute__((always_inline)) void fold_part(int64_t done) {
    constexpr int part = rows / group, other = rows * lanes;
    const int64_t first = done % group * part * lanes, which = done / group % 2;
    const float* from = scores[which * group] + first;
    float* to = outs[which] + first;
#pragma GCC unroll 16
    for (int r = 0; r < part * lanes; r += lanes)
      _mm512_store_ps(
          to + r, _mm512_max_ps(_mm512_load_ps(from + r), _mm512_load_ps(from + other + r)));
  }

  // After the last job's scores are stored.
  void finish() {
    for (int64_t done = job > group ? job - group - 1 : 0; done < job; ++done) fold_part(done);
  }
};

// Few dimensions, depth = steps * matrix_depth: the rows stay in their registers, 16 of them
// against a few tiles of codes, which are then in the first-level cache for the other 16.
template <int steps>
static __attribute__((noinline)) void matrix_sweep_few(const int16_t* rows, int64_t,
                                                       const int16_t* codes, const float* terms,
                                                       int64_t tiles, float* folded) {
  constexpr int64_t together = 4, depth = steps * matrix_depth, row_stride = 2 * depth;
  Ring<2> ring;
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
    matrix_store<o + 1>(to + matrix_rows * lanes, score_stride);
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
  matrix_store<3>(ring.before() + matrix_rows * lanes, score_stride);
  ring.finish();
}

// More dimensions: all rows against one vector of codes at a time.
static __attribute__((noinline)) void matrix_sweep_many(const int16_t* rows, int64_t depth,
                                                        const int16_t* codes, const float* terms,
                                                        int64_t tiles, float* folded) {
  Ring<1> ring;
  const int64_t row_stride = 2 * depth;
  const int16_t* below = rows + matrix_rows * depth;
  const auto job = [&]<int v>(int64_t t) __attribute__((always_inline)) {
    constexpr int s = 2 * v, o = 2 - s;
    const int16_t* c = codes + t * tile_codes * depth + v * 2 * lanes;
    float* to = ring.before();
    matrix_load<s>(terms + t * tile_codes + v * lanes, 0);
    matrix_load<s + 1>(terms + t * tile_codes + v * lanes, 0);
    const auto step = [&](int64_t d) __attribute__((always_inline)) {
      matrix_load<6 + v>(c + d * tile_codes, code_stride);
      matrix_load<4>(rows + d, row_stride);
      matrix_multiply<s, 4, 6 + v>();
      matrix_load<5>(below + d, row_stride);
      matrix_multiply<s + 1, 5, 6 + v>();
    };
    step(0);
    matrix_store<o>(to, score_stride);
    step(matrix_depth);
    matrix_store<o + 1>(to + matrix_rows * lanes, score_stride);
    step(2 * matrix_depth);
    ring.fold(folded + t * strip_rows * lanes);
    for (int64_t d = 3 * matrix_depth; d < depth; d += matrix_depth) step(d);
  };
  for (int64_t t = 0; t < tiles; ++t) {
    job.template operator()<0>(t);
    job.template operator()<1>(t);
  }
  matrix_store<2>(ring.before(), score_stride);
  matrix_store<3>(ring.before() + matrix_rows * lanes, score_stride);
  ring.finish();
}

using MatrixSweep = decltype(&matrix_sweep_many);

static MatrixSweep matrix_sweep_for(int64_t depth) {
  return depth == matrix_depth       ? matrix_sweep_few<1>
         : depth == 2 * matrix_depth ? matrix_sweep_few<2>
                                     : matrix_sweep_many;
}

}  // namespace mmfast::MMFAST_ISA
