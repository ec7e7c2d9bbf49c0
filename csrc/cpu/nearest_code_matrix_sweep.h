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

// out[r] = max(a[r], b[r]) for `rows` rows of scores.
template <int rows>
MMFAST_INLINE void fold(float* out, const float* a, const float* b) {
#pragma GCC unroll 16
  for (int r = 0; r < rows * lanes; r += lanes)
    _mm512_store_ps(out + r, _mm512_max_ps(_mm512_load_ps(a + r), _mm512_load_ps(b + r)));
}

// What follows computes folded, [tiles][strip_rows][lanes]: the best score of the codes of one tile
// and lane. rows: [strip_rows][depth], codes: [tiles][depth / 2][tile_vectors][lanes][2].
//
// Scores cannot leave a matrix register before its products are done, nor be read where they were
// stored before the store has retired: while two registers multiply, the scores that the other two
// made are stored, and those of a few jobs before are folded.
constexpr int64_t fold_lag = 2;  // jobs; a power of two
constexpr int64_t job_scores = 2 * matrix_rows * lanes;

// Few dimensions, depth = steps * matrix_depth: the rows stay in their registers, 16 of them
// against a few tiles of codes, which are then in the first-level cache for the other 16.
template <int steps>
static __attribute__((noinline)) void matrix_sweep_few(const int16_t* rows, int64_t,
                                                       const int16_t* codes, const float* terms,
                                                       int64_t tiles, float* folded) {
  constexpr int64_t together = 4, depth = steps * matrix_depth, row_stride = 2 * depth;
  alignas(64) float scores[fold_lag][tile_vectors][matrix_rows][lanes];
  float* outs[fold_lag] = {};  // where the best of `scores` belong
  int64_t jobs = 0;
  const auto job = [&]<int set>(int64_t t, float* out) __attribute__((always_inline)) {
    constexpr int s = 2 * set, o = 2 - s, half = matrix_rows / 2;
    const int16_t* c = codes + t * tile_codes * depth;
    auto& from = scores[jobs % fold_lag];
    auto& to = scores[(jobs + fold_lag - 1) % fold_lag];
    float* const done = outs[jobs % fold_lag];
    outs[jobs % fold_lag] = out;
    ++jobs;
    matrix_load<6>(c, code_stride);
    matrix_load<s>(terms + t * tile_codes, 0);
    matrix_load<s + 1>(terms + t * tile_codes + lanes, 0);
    matrix_multiply<s, 4, 6>();
    matrix_store<o>(to[0], score_stride);
    matrix_load<7>(c + 2 * lanes, code_stride);
    matrix_multiply<s + 1, 4, 7>();
    if (done) fold<half>(done, from[0][0], from[1][0]);
    if constexpr (steps == 2) {
      matrix_load<6>(c + code_step, code_stride);
      matrix_multiply<s, 5, 6>();
    }
    matrix_store<o + 1>(to[1], score_stride);
    if constexpr (steps == 2) {
      matrix_load<7>(c + code_step + 2 * lanes, code_stride);
      matrix_multiply<s + 1, 5, 7>();
    }
    if (done) fold<half>(done + half * lanes, from[0][half], from[1][half]);
  };
  for (int64_t first = 0; first < tiles; first += together) {
    const int64_t end = first + together < tiles ? first + together : tiles;
    for (int half = 0; half < 2; ++half) {
      const int16_t* r = rows + half * matrix_rows * depth;
      matrix_load<4>(r, row_stride);
      if constexpr (steps == 2) matrix_load<5>(r + matrix_depth, row_stride);
      for (int64_t t = first; t < end; ++t) {
        float* out = folded + (t * strip_rows + half * matrix_rows) * lanes;
        if (jobs % 2 == 0)
          job.template operator()<0>(t, out);
        else
          job.template operator()<1>(t, out);
      }
    }
  }
  // The number of jobs is even: the last one's scores are in registers 2 and 3.
  auto& last = scores[(jobs - 1) % fold_lag];
  matrix_store<2>(last[0], score_stride);
  matrix_store<3>(last[1], score_stride);
  for (int64_t j = jobs < fold_lag ? 0 : jobs - fold_lag; j < jobs; ++j) {
    auto& from = scores[j % fold_lag];
    fold<matrix_rows>(outs[j % fold_lag], from[0][0], from[1][0]);
  }
}

// More dimensions: all rows against one vector of codes at a time.
static __attribute__((noinline)) void matrix_sweep_many(const int16_t* rows, int64_t depth,
                                                        const int16_t* codes, const float* terms,
                                                        int64_t tiles, float* folded) {
  constexpr int64_t lag = fold_lag / 2, half = matrix_rows * lanes;  // lag: in tiles
  alignas(64) float scores[lag][tile_vectors][strip_rows][lanes];
  const int64_t row_stride = 2 * depth;
  const int16_t* below = rows + matrix_rows * depth;
  const auto job = [&]<int v>(int64_t t) __attribute__((always_inline)) {
    constexpr int s = 2 * v, o = 2 - s;
    const int16_t* c = codes + t * tile_codes * depth + v * 2 * lanes;
    // The vector before this: of this tile or of the one before.
    float* to = scores[(t + lag - 1 + v) % lag][1 - v][0];
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
    matrix_store<o + 1>(to + half, score_stride);
    step(2 * matrix_depth);
    const int64_t done = t - lag + v;
    if (done >= 0) {
      const auto& from = scores[done % lag];
      const int64_t first = (1 - v) * half;
      fold<matrix_rows>(folded + done * strip_rows * lanes + first, from[0][0] + first,
                        from[1][0] + first);
    }
    for (int64_t d = 3 * matrix_depth; d < depth; d += matrix_depth) step(d);
  };
  for (int64_t t = 0; t < tiles; ++t) {
    job.template operator()<0>(t);
    job.template operator()<1>(t);
  }
  auto& last = scores[(tiles - 1) % lag];
  matrix_store<2>(last[1][0], score_stride);
  matrix_store<3>(last[1][matrix_rows], score_stride);
  for (int64_t t = tiles < lag ? 0 : tiles - lag; t < tiles; ++t) {
    const auto& from = scores[t % lag];
    fold<strip_rows>(folded + t * strip_rows * lanes, from[0][0], from[1][0]);
  }
}

using MatrixSweep = decltype(&matrix_sweep_many);

static MatrixSweep matrix_sweep_for(int64_t depth) {
  return depth == matrix_depth       ? matrix_sweep_few<1>
         : depth == 2 * matrix_depth ? matrix_sweep_few<2>
                                     : matrix_sweep_many;
}

}  // namespace mmfast::MMFAST_ISA
