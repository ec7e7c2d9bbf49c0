// Rows and the codes that screening leaves them: how far a score can be from the true one, and the
// comparison in float64.
#pragma once
#include <cmath>
#include <cstdlib>
#include <limits>

#include "cpu/nearest_code_codebook.h"
#include "cpu/nearest_code_exact.h"
#include "cpu/nearest_code_sweep.h"
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

constexpr int capacity = 32;  // candidates of a row
constexpr double infinity = std::numeric_limits<double>::infinity();

struct Candidate {
  double upper;   // bound of the score
  int32_t where;  // tile * lanes + lane; or -1 - chunk, to look through that chunk
  // In that case, the integer score that upper is made of; or, by_lane, the lanes to look through.
  int32_t whole;
};

// Rows that are screened together.
template <int size>
struct TileOf {
  d8 norm;      // upper bounds of |x|, x less the mean
  d8 residual;  // upper bounds of |x - x' / scale|
  d8 lower;     // the best score is at least this
  d8 bias;      // of bytes: what their integer scores have too much
  double scale;  // of all rows
  int32_t rows[size];   // within the block; -1 for none
  int32_t count[size];  // candidates
  bool exact[size];     // screening cannot serve this row
  Candidate candidates[size][capacity];

  bool screened(int r) const { return rows[r] >= 0 && !exact[r]; }
};

template <class T>
struct Survivors {
  const NearestCodeArgs& args;
  const Exact<T>& exact;
  const Codebook<T>& codebook;
  const int64_t width, depth;
  const bool far;          // the codes are not in the second-level cache
  const bool rough;        // there are so many candidates that float32 distances come first
  const bool in_place;     // float32 distances can read the codes where they are
  const bool by_lane;      // looking again through a chunk's lanes by float32 distances is cheap
  const float share;       // of a distance in float32, that is still more than a nearer code's: out
  const double inflation;  // covers the rounding of the float32 sums of D squares
  T* x = nullptr;          // [8][D], a tile's rows
  T* c = nullptr;          // [D]

  Survivors(const NearestCodeArgs& a, const Exact<T>& e, const Codebook<T>& b)
      : args(a),
        exact(e),
        codebook(b),
        width(b.width),
        depth(b.depth),
        far(b.args.codes.count * b.width * b.args.codes.step > 1 << 19),
        rough(sizeof(T) == 4 && b.form == Form::bytes && a.metric == Metric::euclidean),
        in_place(rough && contiguous(a.codes)),
        by_lane(in_place && !far),
        share((float)(1 - 2 * e.rough_error() - 0x1p-22)),
        inflation(inflate + (double)b.width * 0x1p-27) {}
  Survivors(const Survivors&) = delete;
  ~Survivors() {
    std::free(x);
    std::free(c);
  }

  static bool contiguous(const Rows& rows) {
    return rows.dims == 1 && rows.dtype == Dtype::float32 && rows.step == 4;
  }

  // Like read_row, whose call costs something where numbers are in place.
  static const T* row_of(const Rows& rows, int64_t i, T* buffer) {
    if (sizeof(T) == 4 && contiguous(rows)) return (const T*)(rows.data + i * rows.strides[0]);
    return read_row<T>(rows, i, buffer);
  }

  bool allocate() {
    x = (T*)std::malloc((size_t)width * 8 * sizeof(T));
    c = (T*)std::malloc((size_t)width * sizeof(T));
    return x && c;
  }

  bool euclidean() const { return args.metric == Metric::euclidean; }

  // Only for the Euclidean metric does the mean shift the rows too; a product's argmax ignores it.
  T value(const T* v, int64_t d) const { return euclidean() ? v[d] - codebook.mean[d] : v[d]; }
  template <class V>
  V values(const float* v, int64_t d) const {
    return euclidean() ? load<V>(v + d) - load<V>((const float*)codebook.mean + d) : load<V>(v + d);
  }
  f8 value8(const float* v, int64_t d) const { return values<f8>(v, d); }

  // |x|^2 and the largest number, x less the mean.
  struct Size {
    double square, peak;
  };

  Size size(const T* v) const {
    T most = 0;
    int64_t d = 0;
    if constexpr (sizeof(T) == 4) {
      vf total0{}, total1{};
      vi largest = vset(0);
      const auto take = [&](vf& total) __attribute__((always_inline)) {
        const vf a = values<vf>(v, d);
        total = fma(a, a, total);
        // Numbers without a sign are in the order of their bits.
        largest = vmax(largest, (vi)a & vset(INT32_MAX));
        d += lanes;
      };
      while (d + 2 * lanes <= width) {
        take(total0);
        take(total1);
      }
      if (d + lanes <= width) take(total0);
      const int32_t bits = vhmax(largest);
      std::memcpy(&most, &bits, sizeof bits);
      float square = vsum(total0 + total1);
      for (; d < width; ++d) {
        const T a = std::fabs(value(v, d));
        square += a * a;
        most = a > most ? a : most;
      }
      if (settled(square)) return {square, most};
    }
    for (; d < width; ++d) {
      const T a = std::fabs(value(v, d));
      most = a > most ? a : most;
    }
    return {square(v), most};
  }

  // Whether squares neither overflowed nor vanished in this float32 sum.
  static bool settled(float square) { return square > 1e-24f && square < 1e30f; }

  // |x|^2, x less the mean; not finite if x is not.
  double square(const T* v) const {
    if constexpr (sizeof(T) == 4) {
      f8 total0{}, total1{};
      int64_t d = 0;
      for (; d + 16 <= width; d += 16) {
        const f8 a = value8(v, d), b = value8(v, d + 8);
        total0 += a * a;
        total1 += b * b;
      }
      for (; d + 8 <= width; d += 8) {
        const f8 a = value8(v, d);
        total0 += a * a;
      }
      float rest = sum(total0 + total1);
      for (; d < width; ++d) rest += value(v, d) * value(v, d);
      if (settled(rest)) return rest;
    }
    double total = 0;
    for (int64_t d = 0; d < width; ++d) {
      const double t = (double)v[d] - (euclidean() ? (double)codebook.mean[d] : 0.0);
      total += t * t;
    }
    return total;
  }

  // How far a score can be from the true one.
  // noise: what the arithmetic of the scores adds.
  template <int size>
  d8 error_bound(const TileOf<size>& tile, const Chunk& chunk, d8 noise) const {
    // Rounding of x - mean and of the norm terms; the definition's own rounding in float64.
    const double storage = sizeof(T) == 4 ? 0x1p-23 : 0x1p-49;
    const double definition = (double)(width + 16) * 0x1p-50;
    d8 bound = tile.residual * chunk.max_norm + (tile.norm + tile.residual) * chunk.max_residual +
               noise + storage * tile.norm * chunk.far_norm;
    if (euclidean()) {
      const d8 distance = tile.norm + chunk.far_norm;
      bound += definition * distance * distance;
    } else {
      bound += definition * tile.norm *
               (args.metric == Metric::cosine ? 4.0 : 4 * (exact.max_norm + codebook.mean_norm));
      if (args.metric == Metric::cosine) bound += storage * tile.norm;
    }
    if (codebook.grouped) bound += dot_error() * tile.norm * chunk.centre_norm;
    return bound;
  }

  // Relative error of a product with a group's centre: four sums of D / 4 float32 terms.
  double dot_error() const { return (double)(width / 4 + 8) * 0x1p-24; }

  // The codes of one tile and lane, which will be compared.
  void prefetch(int64_t position) const {
    if (!far) return;
    for (int v = 0; v < tile_vectors; ++v) {
      const int32_t k = codebook.order[position + v * lanes];
      if (k < 0) continue;
      const char* p = args.codes.row(k);
      for (int64_t at = 0; at < width * args.codes.step && at < 1024; at += 64)
        __builtin_prefetch(p + at);
    }
  }

  // Adds a candidate, and finds out more about the row's where there is no room for it.
  template <int size>
  void add(TileOf<size>& tile, int64_t begin, int r, double& lower, Candidate candidate) const {
    if (tile.count[r] == capacity) drop(tile, r, lower);
    if (tile.count[r] == capacity && euclidean()) {
      Contest contest(exact.start(read_row<T>(args.x, begin + tile.rows[r], x)));
      const int first = most_promising(tile, r);
      if (tile.candidates[r][first].where >= 0) enter(contest, tile.candidates[r][first].where);
      lower = better(lower, tile.norm[r], contest);
      drop(tile, r, lower);
    }
    if (tile.count[r] == capacity)
      tile.exact[r] = true;
    else
      tile.candidates[r][tile.count[r]++] = candidate;
  }

  // Drops the candidates that cannot be the nearest.
  template <int size>
  static void drop(TileOf<size>& tile, int r, double lower) {
    Candidate* all = tile.candidates[r];
    int kept = 0;
    for (int j = 0; j < tile.count[r]; ++j)
      if (all[j].upper >= lower) all[kept++] = all[j];
    tile.count[r] = kept;
  }

  // Of the candidates, the single code with the highest score; the first if there is none.
  template <int size>
  static int most_promising(const TileOf<size>& tile, int r) {
    const Candidate* all = tile.candidates[r];
    int first = 0;
    for (int j = 1; j < tile.count[r]; ++j)
      if (all[j].where >= 0 && !(all[first].where >= 0 && all[j].upper <= all[first].upper))
        first = j;
    return first;
  }

  static float distance_of(uint64_t key) {
    const uint32_t bits = (uint32_t)(key >> 32);
    float distance;
    std::memcpy(&distance, &bits, 4);
    return distance;
  }

  // Codes that compete for a row: of most, float32 shows that they lose.
  struct Contest {
    static constexpr int most = 2 * capacity;
    static constexpr uint64_t none = (uint64_t)0x7F800000 << 32;  // infinitely far
    Nearest<T> best;  // of those compared in float64
    int count = 0;    // of those that may have to be
    uint64_t first = none, next = none;  // the two nearest of these: distance, then code
    int32_t codes[most];
    float distances[most];

    Contest() {}
    float nearest() const { return distance_of(first); }
    explicit Contest(Nearest<T> start) : best(start) {}
  };

  void enter_code(Contest& contest, int32_t k) const {
    if constexpr (sizeof(T) == 4)
      if (rough)
        return enter_distance(contest, k,
                              exact.rough(contest.best.x, read_row<T>(args.codes, k, c)));
    exact.consider(contest.best, k, c);
  }

  __attribute__((always_inline)) void enter_distance(Contest& contest, int32_t k,
                                                     float distance) const {
    if (contest.count == Contest::most) decide(contest);
    contest.codes[contest.count] = k;
    contest.distances[contest.count++] = distance;
    if (!(distance > 1e-30f && distance < 1e37f)) {
      contest.next = 0;
      return;
    }
    // Positive numbers are in the order of their bits; minima need no branches, which could not be
    // predicted.
    uint32_t bits;
    std::memcpy(&bits, &distance, 4);
    const uint64_t key = (uint64_t)bits << 32 | (uint32_t)k;
    const uint64_t farther = key > contest.first ? key : contest.first;
    contest.first = key < contest.first ? key : contest.first;
    contest.next = farther < contest.next ? farther : contest.next;
  }

  // The codes of a lane of a tile.
  __attribute__((always_inline)) int64_t enter(Contest& contest, int64_t where) const {
    const int32_t* codes = codebook.order + where / lanes * tile_codes + where % lanes;
    if constexpr (sizeof(T) == 4 && tile_vectors == 2)
      if (in_place && codes[lanes] >= 0) {
        float distances[2];
        exact.rough(contest.best.x, row_of(args.codes, codes[0], c),
                    row_of(args.codes, codes[lanes], c), distances);
        enter_distance(contest, codes[0], distances[0]);
        enter_distance(contest, codes[lanes], distances[1]);
        return tile_vectors;
      }
#pragma GCC unroll 8
    for (int64_t v = 0; v < tile_vectors; ++v)
      if (codes[v * lanes] >= 0) enter_code(contest, codes[v * lanes]);
    return tile_vectors;
  }

  void decide(Contest& contest) const {
    if (contest.count == 0) return;
    const float nearest = contest.nearest();
    if (distance_of(contest.next) * share > nearest && contest.best.index < 0) {
      exact.consider(contest.best, (int32_t)contest.first, c);
      contest.count = 0;
      return;
    }
    const double error = exact.rough_error(), limit = nearest * (1 + error);
    for (int j = 0; j < contest.count; ++j)
      if (!(contest.distances[j] * (1 - error) > limit))
        exact.consider(contest.best, contest.codes[j], c);
    contest.count = 0;
  }

  // What the best score is at least, knowing the contest so far. norm: upper bound of |x|.
  double better(double lower, double norm, const Contest& contest) const {
    const double value = rough ? contest.nearest() : contest.best.value;
    return better(d8{} + lower, d8{} + norm, d8{} + value)[0];
  }

  d8 better(d8 lower, d8 norm, d8 value) const {
    const double storage = sizeof(T) == 4 ? 0x1p-23 : 0x1p-49, terms = (double)(width + 16);
    const d8 lost = norm * norm * (2 * (inflation - 1) + terms * storage);
    const d8 reached = (norm * norm - lost - value * (1 + terms * storage)) / 2;
    return reached > lower ? reached : lower;
  }

  // Rows that every code will be compared with.
  template <int size>
  static int unscreened(const TileOf<size>& tile) {
    int rows = 0;
    for (int r = 0; r < size; ++r) rows += tile.rows[r] >= 0 && tile.exact[r];
    return rows;
  }

  // Codes that resolve() will compare.
  template <int size>
  int64_t pending(const TileOf<size>& tile) const {
    int64_t codes = 0;
    for (int r = 0; r < size; ++r) {
      if (tile.rows[r] < 0) continue;
      if (tile.exact[r]) codes += args.codes.count;
      for (int j = 0; !tile.exact[r] && j < tile.count[r]; ++j) {
        const Candidate& candidate = tile.candidates[r][j];
        if (candidate.upper < tile.lower[r]) continue;
        codes += tile_vectors;
      }
    }
    return codes;
  }

  // Decides the tile's rows; returns how many codes were compared. rescreen(contest, r,
  // lower, candidate) looks through a chunk.
  template <int size, class Rescreen>
  int64_t resolve(TileOf<size>& tile, int64_t begin, const Rescreen& rescreen) const {
    int64_t codes = 0;
    Contest contests[size];
    alignas(64) double lowers[8];
    int counts[size];
    store(lowers, tile.lower);
    // Each step is taken for all rows, so that none waits for what another's branches depend on.
    for (int r = 0; r < size; ++r) {
      counts[r] = 0;
      if (tile.rows[r] < 0) continue;
      const int64_t row = begin + tile.rows[r];
      const T* v = row_of(args.x, row, x + r * width);
      if (tile.exact[r] || tile.count[r] == 0) {
        exact.scan(row, v, c);
        codes += args.codes.count;
        continue;
      }
      contests[r].best = exact.start(v);
      // The most promising first: what it reaches is more than screening could promise.
      Candidate* all = tile.candidates[r];
      const int first = most_promising(tile, r);
      counts[r] = tile.count[r];
      if (all[first].where < 0) continue;
      codes += enter(contests[r], all[first].where);
      all[first] = all[--counts[r]];
    }
    if (euclidean()) {
      const auto value = [&](int r) __attribute__((always_inline)) {
        return r >= size ? 0.0 : rough ? contests[r].nearest() : contests[r].best.value;
      };
      const d8 values{value(0), value(1), value(2), value(3), value(4), value(5), value(6), value(7)};
      store(lowers, better(tile.lower, tile.norm, values));
    }
    // Which of the others can be nearer is not predictable either.
    struct {
      int32_t where, row;
    } others[size * capacity];
    int left = 0;
    bool again = false;
    for (int r = 0; r < size; ++r)
      for (int j = 0; j < counts[r]; ++j) {
        const Candidate& candidate = tile.candidates[r][j];
        others[left] = {candidate.where, r};
        const bool open = candidate.upper >= lowers[r];
        left += open & (candidate.where >= 0);
        again |= open & (candidate.where < 0);
      }
    for (int j = 0; j < left; ++j) codes += enter(contests[others[j].row], others[j].where);
    for (int r = 0; again && r < size; ++r)
      for (int j = 0; j < counts[r]; ++j) {
        const Candidate& candidate = tile.candidates[r][j];
        if (candidate.where < 0 && candidate.upper >= lowers[r])
          codes += rescreen(contests[r], r, lowers[r], candidate);
      }
    for (int r = 0; r < size; ++r) {
      if (!contests[r].best.x) continue;
      decide(contests[r]);
      exact.write(begin + tile.rows[r], contests[r].best);
    }
    return codes;
  }
};

}  // namespace mmfast::MMFAST_ISA
