// Probabilities of all codes for a tile of rows at a time: logits by multiply-adds, kept while
// their largest is found, exponentials, and then sums of columns, or the products of the gradients.
//
// Tiles, and the waves of tiles that run side by side, do not depend on the threads. Sums over the
// rows of a tile are in T, over tiles in double in their order.
#pragma once
#include <atomic>
#include <cstdlib>

#include "cpu/simd.h"
#include "cpu/sixteen.h"
#include "cpu/soft_assignment_statistics.h"
#include "cpu/workspace.h"
#include "cpu/write_row.h"

namespace mmfast::MMFAST_ISA {

template <class T>
struct SoftAssignment {
  using F = typename Sixteen<T>::V;
  using V = std::conditional_t<sizeof(T) == 4, vf,
                               double __attribute__((vector_size(4 * lanes)))>;  // a register
  static constexpr int64_t per = sizeof(V) / sizeof(T);
  static constexpr int64_t panel = 32;  // codes, of which the packed codebook has each dimension
  static constexpr int64_t tile_rows = 32;
  static constexpr int64_t group = lanes == 16 ? 8 : 4;  // rows, with two registers of columns each
  static constexpr int64_t flushed = 64;  // panels whose sums are in T
  static constexpr T least_log = sizeof(T) == 4 ? -100 : -800;  // as good as log 0
  static constexpr double least_square = 1e-8;

  const SoftAssignmentArgs& args;
  const int64_t width, codes, panels, columns;  // columns: of padded vectors
  const int64_t group_rows, tiles_per_group, tiles;
  const T factor;   // of a product x c in a logit
  const T inverse;  // of the temperature
  T* centre = nullptr;    // [D]
  T* packed = nullptr;    // [panels][D][panel]
  T* terms = nullptr;     // [panels][panel], added to products
  double* total = nullptr;  // [G], of the weights
  std::atomic<bool> failed{false};

  explicit SoftAssignment(const SoftAssignmentArgs& a)
      : args(a),
        width(a.x.width),
        codes(a.codes.count),
        panels((codes + panel - 1) / panel),
        columns((width + 2 * per - 1) / (2 * per) * (2 * per)),
        group_rows(a.groups ? a.x.count / a.groups : 0),
        tiles_per_group((group_rows + tile_rows - 1) / tile_rows),
        tiles(tiles_per_group * a.groups),
        factor(a.metric == Logits::euclidean ? 2 : 1),
        inverse((T)(1 / a.temperature)) {}
  SoftAssignment(const SoftAssignment&) = delete;
  ~SoftAssignment() {
    std::free(centre);
    std::free(packed);
    std::free(terms);
    std::free(total);
    std::free(parts);
    std::free(entropies);
    std::free(carried);
    std::free(dense);
    std::free(norms);
    std::free(vectors);
    std::free(gradients);
    std::free(sums);
    std::free(column_sums);
  }

  struct Tile {
    int64_t group, first, rows;  // first: of all rows
  };
  Tile tile_of(int64_t t) const {
    const int64_t g = t / tiles_per_group, row = t % tiles_per_group * tile_rows;
    const int64_t left = group_rows - row;
    return {g, g * group_rows + row, left < tile_rows ? left : tile_rows};
  }

  double weight(int64_t i) const {
    if (!args.weights) return 1;
    return load_one<double>(args.weights + i * size_of(args.weights_dtype), args.weights_dtype);
  }

  // One over the norm, or 0.
  static double inverse_norm(const double* v, int64_t count) {
    double square = 0;
    for (int64_t d = 0; d < count; ++d) square += v[d] * v[d];
    return square == 0 ? 0 : 1 / __builtin_sqrt(square);
  }

  // Calls body(begin, end) for ranges of [0, count).
  template <class Work>
  static void in_ranges(int64_t count, const Work& work, const Parallel& parallel) {
    if (count)
      parallel.run(
          count,
          [](void* context, int64_t begin, int64_t end) { (*(const Work*)context)(begin, end); },
          (void*)&work);
  }

  // Packs the codes; with keep also in rows.
  bool prepare(bool keep, const Parallel& parallel) {
    centre = allocate<T>(width);
    packed = allocate<T>(panels * width * panel);
    terms = allocate<T>(panels * panel);
    total = allocate<double>(args.groups);
    if (keep) {
      dense = allocate<T>(panels * panel * columns);
      norms = allocate<double>(panels * panel);
    }
    double* mean = allocate<double>(2 * width);
    if (!centre || !packed || !terms || !total || (keep && (!dense || !norms)) || !mean) {
      std::free(mean);
      return false;
    }
    std::memset(mean, 0, (size_t)width * sizeof(double));
    if (args.metric != Logits::cosine)
      for (int64_t k = 0; k < codes; ++k) {
        const double* c = read_row<double>(args.codes, k, mean + width);
        for (int64_t d = 0; d < width; ++d) mean[d] += c[d];
      }
    for (int64_t d = 0; d < width; ++d) centre[d] = (T)(mean[d] / (double)codes);
    std::free(mean);
    for (int64_t g = 0; g < args.groups; ++g) {
      total[g] = 0;
      for (int64_t i = 0; i < group_rows; ++i) total[g] += weight(g * group_rows + i);
    }
    in_ranges(
        panels, [this, keep](int64_t begin, int64_t end) { pack(begin, end, keep); }, parallel);
    return !failed;
  }

  void pack(int64_t begin, int64_t end, bool keep) {
    double* row = allocate<double>(2 * width);
    if (!row) {
      failed = true;
      return;
    }
    for (int64_t k = begin * panel; k < end * panel; ++k) {
      T* to = packed + k / panel * width * panel + k % panel;
      double inverse_length = 1, square = 0;
      if (k < codes) {
        const double* c = read_row<double>(args.codes, k, row);
        if (args.metric == Logits::cosine) inverse_length = inverse_norm(c, width);
        for (int64_t d = 0; d < width; ++d) {
          const T value = (T)((c[d] - (double)centre[d]) * inverse_length);
          to[d * panel] = value;
          square += (double)value * (double)value;
        }
      } else {
        for (int64_t d = 0; d < width; ++d) to[d * panel] = 0;
      }
      const bool products = args.metric == Logits::cosine || args.metric == Logits::dot;
      if (k >= codes)  // probability 0
        terms[k] = (T)(args.metric == Logits::distance ? __builtin_inf() : -__builtin_inf());
      else
        terms[k] = (T)(products ? 0 : args.metric == Logits::distance ? square : -square);
      if (!keep) continue;
      norms[k] = inverse_length;
      for (int64_t d = 0; d < columns; ++d)
        dense[k * columns + d] = d < width ? to[d * panel] : (T)0;
    }
    std::free(row);
  }

  // What a thread needs for a tile.
  struct Workspace {
    T* logits;      // [panels][tile_rows][panel]
    T* x;           // [tile_rows][columns], times factor; zeros where the weight is 0
    double* row;    // [2 columns]
    T squares[tile_rows];
    double lengths[tile_rows], weights[tile_rows];  // inverse norms for the cosine
    alignas(64) T largest[tile_rows][per];

    explicit Workspace(const SoftAssignment& all)
        : logits(allocate<T>(all.panels * tile_rows * panel)),
          x(allocate<T>(tile_rows * all.columns)),
          row(allocate<double>(2 * all.columns)) {}
    Workspace(const Workspace&) = delete;
    ~Workspace() {
      std::free(logits);
      std::free(x);
      std::free(row);
    }
    bool failed() const { return !logits || !x || !row; }
  };

  void read(const Tile& tile, Workspace& w, T* x) const {
    std::memset(x, 0, (size_t)(tile_rows * columns) * sizeof(T));
    for (int64_t n = 0; n < tile_rows; ++n) {
      w.squares[n] = 0;
      w.lengths[n] = 1;
      w.weights[n] = n < tile.rows ? weight(tile.first + n) : 0;
      if (w.weights[n] == 0) continue;
      const double* v = read_row<double>(args.x, tile.first + n, w.row);
      T* to = x + n * columns;
      double square = 0;
      const bool centred = args.metric == Logits::euclidean || args.metric == Logits::distance;
      if (args.metric == Logits::cosine) w.lengths[n] = inverse_norm(v, width);
      for (int64_t d = 0; d < width; ++d) {
        const T value = (T)(centred ? v[d] - (double)centre[d] : v[d] * w.lengths[n]);
        square += (double)value * (double)value;
        to[d] = value * factor;
      }
      w.squares[n] = (T)square;
    }
  }

  MMFAST_INLINE V multiply_add(V a, V b, V c) {
    if constexpr (sizeof(T) == 4)
      return fma(a, b, c);
    else
      return a * b + c;
  }

  MMFAST_INLINE V root(V v) {
    if constexpr (sizeof(T) == 4) {
      return sqrt(v);
    } else {
      for (int64_t i = 0; i < per; ++i) v[i] = __builtin_sqrt(v[i]);
      return v;
    }
  }

  // Adds a [group][depth] times b [depth][2 per] to what is at c [group][2 per]; steps are from one
  // row, or one of the depth, to the next.
  MMFAST_INLINE void multiply(const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step,
                              int64_t depth, V (&sum)[group][2]) {
    for (int64_t d = 0; d < depth; ++d, a += a_step, b += b_step) {
      const V b0 = load<V>(b), b1 = load<V>(b + per);
#pragma GCC unroll 8
      for (int64_t i = 0; i < group; ++i) {
        const V v = every<V>(a[i * a_row]);
        sum[i][0] = multiply_add(v, b0, sum[i][0]);
        sum[i][1] = multiply_add(v, b1, sum[i][1]);
      }
    }
  }

  // The tile's logits, and the largest of each row at the start of w.largest.
  void logits(const T* x, int64_t rows, Workspace& w) const {
    for (int64_t n = 0; n < tile_rows; ++n) store(w.largest[n], V{} - (T)__builtin_inf());
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t n = 0; n < rows; n += group)
        for (int64_t k = 0; k < panel; k += 2 * per) {
          V sum[group][2];
          const V term[2] = {load<V>(terms + p * panel + k), load<V>(terms + p * panel + k + per)};
          const bool distance = args.metric == Logits::distance;
#pragma GCC unroll 8
          for (int64_t i = 0; i < group; ++i)
            for (int64_t j = 0; j < 2; ++j) sum[i][j] = distance ? V{} : term[j];
          multiply(x + n * columns, columns, 1, packed + p * width * panel + k, panel, width, sum);
          T* to = w.logits + (p * tile_rows + n) * panel + k;
#pragma GCC unroll 8
          for (int64_t i = 0; i < group; ++i)
            for (int64_t j = 0; j < 2; ++j) {
              V value = sum[i][j];
              if (distance) {
                value = (w.squares[n + i] + term[j]) - 2 * value;
                value = value < (T)least_square ? V{} + (T)least_square : value;
                value = -root(value);
              }
              const V before = load<V>(w.largest[n + i]);
              store(w.largest[n + i], value > before ? value : before);
              store(to + i * panel + j * per, value);
            }
        }
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t i = 1; i < per; ++i)
        if (w.largest[n][i] > w.largest[n][0]) w.largest[n][0] = w.largest[n][i];
  }

  MMFAST_INLINE F not_below(F v, T least) { return v < least ? F{} + least : v; }

  // ---- forward

  int64_t wave = 0;             // tiles
  T* parts = nullptr;           // [wave][panels][panel], sums of columns
  double* entropies = nullptr;  // [wave]
  double* carried = nullptr;    // [panels][panel], of a group that is not finished

  bool forward(const Parallel& parallel) {
    if (!prepare(false, parallel)) return false;
    wave = bounded(((int64_t)1 << 21) / (panels * panel), 32, 1024);
    if (wave > tiles) wave = tiles;
    parts = allocate<T>(wave * panels * panel);
    entropies = allocate<double>(wave);
    carried = allocate<double>(panels * panel);
    if (!parts || !entropies || !carried) return false;
    std::memset(carried, 0, (size_t)(panels * panel) * sizeof(double));
    std::memset(args.means, 0, (size_t)(args.groups * codes) * sizeof(T));
    std::memset(args.entropy, 0, (size_t)args.groups * sizeof(T));
    double entropy = 0;
    for (int64_t first = 0; first < tiles; first += wave) {
      const int64_t count = tiles - first < wave ? tiles - first : wave;
      in_ranges(
          count,
          [this, first](int64_t begin, int64_t end) {
            Workspace w(*this);
            if (w.failed()) {
              failed = true;
              return;
            }
            for (int64_t t = begin; t < end; ++t) statistics(first, t, w);
          },
          parallel);
      if (failed) return false;
      in_ranges(
          panels, [&](int64_t begin, int64_t end) { add(first, count, begin, end); }, parallel);
      for (int64_t t = 0; t < count; ++t) {
        entropy += entropies[t];
        if (!last_of_group(first + t)) continue;
        const int64_t g = (first + t) / tiles_per_group;
        if (total[g] != 0) ((T*)args.entropy)[g] = (T)(entropy / total[g]);
        entropy = 0;
      }
    }
    return true;
  }

  static int64_t bounded(int64_t value, int64_t least, int64_t most) {
    return value < least ? least : value > most ? most : value;
  }

  bool last_of_group(int64_t t) const { return (t + 1) % tiles_per_group == 0; }

  void statistics(int64_t first, int64_t t, Workspace& w) {
    const Tile tile = tile_of(first + t);
    read(tile, w, w.x);
    logits(w.x, tile.rows, w);
    double sum[tile_rows]{}, product[tile_rows]{};  // of exponentials, and times their arguments
    for (int64_t begin = 0; begin < panels; begin += flushed) {
      const int64_t end = panels < begin + flushed ? panels : begin + flushed;
      for (int64_t n = 0; n < tile.rows; ++n) {
        const T largest = w.largest[n][0];
        F sums{}, products{};
        for (int64_t p = begin; p < end; ++p)
          for (int64_t k = 0; k < panel; k += 16) {
            T* at = w.logits + (p * tile_rows + n) * panel + k;
            const F log = not_below((load<F>(at) - largest) * inverse, least_log);
            const F e = exp_below(log);
            store(at, e);
            sums += e;
            products = madd(e, log, products);
          }
        sum[n] += sum_of(sums);
        product[n] += sum_of(products);
      }
    }
    T scale[tile_rows];
    entropies[t] = 0;
    T* saved = (T*)args.saved + 2 * tile.first;
    for (int64_t n = 0; n < tile.rows; ++n) {
      const bool counts = w.weights[n] != 0;
      const double log = __builtin_log(sum[n]);
      scale[n] = (T)(w.weights[n] / sum[n]);
      if (counts) entropies[t] += w.weights[n] * (log - product[n] / sum[n]);
      saved[2 * n] = !counts ? 0 : sum[n] == sum[n] ? w.largest[n][0] : (T)sum[n];
      saved[2 * n + 1] = counts ? (T)log : 0;
    }
    T* part = parts + t * panels * panel;
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t k = 0; k < panel; k += 16) {
        F column{};
        const T* at = w.logits + p * tile_rows * panel + k;
        for (int64_t n = 0; n < tile.rows; ++n)
          column = madd(load<F>(at + n * panel), F{} + scale[n], column);
        store(part + p * panel + k, column);
      }
  }

  void add(int64_t first, int64_t count, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      double* sums = carried + p * panel;
      for (int64_t t = 0; t < count; ++t) {
        const T* part = parts + (t * panels + p) * panel;
        for (int64_t k = 0; k < panel; ++k) sums[k] += (double)part[k];
        if (!last_of_group(first + t)) continue;
        const int64_t g = (first + t) / tiles_per_group;
        T* means = (T*)args.means + g * codes + p * panel;
        const int64_t there = codes - p * panel < panel ? codes - p * panel : panel;
        for (int64_t k = 0; k < there; ++k)
          if (total[g] != 0) means[k] = (T)(sums[k] / total[g]);
        std::memset(sums, 0, (size_t)panel * sizeof(double));
      }
    }
  }

  // ---- backward

  T* dense = nullptr;        // [panels][panel][columns], the codes
  double* norms = nullptr;   // [panels][panel], what they were multiplied with
  T* vectors = nullptr;      // [wave][tile_rows][columns]
  T* gradients = nullptr;    // [wave][panels][tile_rows][panel], of logits, or of half a square
  double* sums = nullptr;    // [panels][panel][columns], products of these and the vectors
  double* column_sums = nullptr;  // [panels][panel]

  bool backward(const SoftAssignmentBwdArgs& bwd, const Parallel& parallel) {
    if (!prepare(true, parallel)) return false;
    wave = bounded(((int64_t)1 << 22) / (panels * panel * tile_rows), 4, 64);
    if (wave > tiles) wave = tiles;
    const int64_t all = panels * panel;
    vectors = allocate<T>(wave * tile_rows * columns);
    gradients = allocate<T>(wave * all * tile_rows);
    if (!vectors || !gradients) return false;
    if (bwd.codebook_gradient) {
      sums = (double*)std::calloc((size_t)(all * columns), sizeof(double));
      column_sums = (double*)std::calloc((size_t)all, sizeof(double));
      if (!sums || !column_sums) return false;
    }
    for (int64_t first = 0; first < tiles; first += wave) {
      const int64_t count = tiles - first < wave ? tiles - first : wave;
      in_ranges(
          count,
          [this, first, &bwd](int64_t begin, int64_t end) {
            Workspace w(*this);
            if (w.failed()) {
              failed = true;
              return;
            }
            for (int64_t t = begin; t < end; ++t) through(first, t, w, bwd);
          },
          parallel);
      if (failed) return false;
      if (bwd.codebook_gradient)
        in_ranges(
            panels, [this, count](int64_t begin, int64_t end) { to_codes(count, begin, end); },
            parallel);
    }
    if (bwd.codebook_gradient)
      in_ranges(
          codes, [this, &bwd](int64_t begin, int64_t end) { write_codes(bwd, begin, end); },
          parallel);
    return !failed;
  }

  void through(int64_t first, int64_t t, Workspace& w, const SoftAssignmentBwdArgs& bwd) {
    const Tile tile = tile_of(first + t);
    T* x = vectors + t * tile_rows * columns;
    T* q = gradients + t * panels * panel * tile_rows;
    read(tile, w, x);
    logits(x, tile.rows, w);
    const T* g = args.means ? (const T*)args.means + tile.group * codes : nullptr;
    const T e = args.entropy ? ((const T*)args.entropy)[tile.group] : (T)0;
    const T* saved = (const T*)args.saved + 2 * tile.first;
    const double all = total[tile.group];
    double row_sum[tile_rows];
    for (int64_t n = 0; n < tile_rows; ++n) {
      row_sum[n] = 0;
      if (n >= tile.rows || w.weights[n] == 0) {
        for (int64_t p = 0; p < panels; ++p)
          std::memset(q + (p * tile_rows + n) * panel, 0, (size_t)panel * sizeof(T));
        continue;
      }
      const T largest = saved[2 * n], log_sum = saved[2 * n + 1];
      // The sum of p (g - e log p), which its gradient is taken less.
      double mean = 0;
      for (int64_t begin = 0; begin < panels; begin += flushed) {
        const int64_t end = panels < begin + flushed ? panels : begin + flushed;
        F means{};
        for (int64_t p = begin; p < end; ++p)
          for (int64_t k = 0; k < panel; k += 16) {
            const int64_t at = (p * tile_rows + n) * panel + k;
            const F log =
                not_below((load<F>(w.logits + at) - largest) * inverse - log_sum, least_log);
            const F probability = exp_below(log);
            store(q + at, probability);
            means = madd(probability, of_mean(g, p * panel + k) - e * log, means);
          }
        mean += sum_of(means);
      }
      const T less = (T)mean;
      const T scale = all == 0 ? 0 : (T)(w.weights[n] / all / args.temperature);
      F row{};
      for (int64_t p = 0; p < panels; ++p)
        for (int64_t k = 0; k < panel; k += 16) {
          const int64_t at = (p * tile_rows + n) * panel + k;
          const F logit = load<F>(w.logits + at);
          const F log = not_below((logit - largest) * inverse - log_sum, least_log);
          F value = (of_mean(g, p * panel + k) - e * log - less) * load<F>(q + at) * scale;
          if (args.metric == Logits::distance) {
            const T least = (T)__builtin_sqrt(least_square);
            value = logit >= -least ? F{} : value / -logit;
            row += value;
          }
          store(q + at, value);
        }
      row_sum[n] = sum_of(row);
    }
    if (bwd.x_gradient) to_vectors(tile, x, q, row_sum, w, bwd);
  }

  // The gradients of codes' means from k on.
  MMFAST_INLINE F of_mean(const T* g, int64_t k, int64_t codes) {
    return !g || k >= codes ? F{} : load_some(g + k, codes - k);
  }
  F of_mean(const T* g, int64_t k) const { return of_mean(g, k, codes); }

  // x: the tile's vectors, q: its gradients.
  void to_vectors(const Tile& tile, const T* x, const T* q, const double* row_sum, Workspace& w,
                  const SoftAssignmentBwdArgs& bwd) const {
    T* result = w.x;  // [tile_rows][columns]
    std::memset(result, 0, (size_t)(tile_rows * columns) * sizeof(T));
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t n = 0; n < tile.rows; n += group)
        for (int64_t d = 0; d < columns; d += 2 * per) {
          V sum[group][2];
          T* at = result + n * columns + d;
#pragma GCC unroll 8
          for (int64_t i = 0; i < group; ++i)
            for (int64_t j = 0; j < 2; ++j) sum[i][j] = load<V>(at + i * columns + j * per);
          multiply(q + (p * tile_rows + n) * panel, panel, 1, dense + p * panel * columns + d,
                   columns, panel, sum);
#pragma GCC unroll 8
          for (int64_t i = 0; i < group; ++i)
            for (int64_t j = 0; j < 2; ++j) store(at + i * columns + j * per, sum[i][j]);
        }
    for (int64_t n = 0; n < tile.rows; ++n) {
      const T *own = x + n * columns, *found = result + n * columns;
      double* row = w.row;
      if (w.weights[n] == 0)
        std::memset(row, 0, (size_t)width * sizeof(double));
      else if (args.metric == Logits::cosine)
        through_norm(found, own, w.lengths[n], row);
      else
        for (int64_t d = 0; d < width; ++d)
          row[d] = (double)factor * (double)found[d] - row_sum[n] * (double)own[d];
      char* out = bwd.x_gradient + (tile.first + n) * width * size_of(args.x.dtype);
      write_row(out, args.x.dtype, row, width);
    }
  }

  // From the gradient of a vector of norm 1 to that of the one that was `length` times shorter.
  template <class G>
  void through_norm(const G* grad, const T* unit, double length, double* out) const {
    double along = 0;
    for (int64_t d = 0; d < width; ++d) along += (double)grad[d] * (double)unit[d];
    for (int64_t d = 0; d < width; ++d)
      out[d] = length * ((double)grad[d] - along * (double)unit[d]);
  }

  // Adds the products of a wave to the sums of the panels.
  void to_codes(int64_t count, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const auto block = [&](int64_t t) { return gradients + (t * panels + p) * tile_rows * panel; };
      for (int64_t k = 0; k < panel; k += group)
        for (int64_t d = 0; d < columns; d += 2 * per) {
          V sum[group][2]{};
          for (int64_t t = 0; t < count; ++t)
            multiply(block(t) + k, 1, panel, vectors + t * tile_rows * columns + d, columns,
                     tile_rows, sum);
          for (int64_t i = 0; i < group; ++i)
            for (int64_t j = 0; j < 2 * per; ++j)
              sums[(p * panel + k + i) * columns + d + j] += (double)sum[i][j / per][j % per];
        }
      for (int64_t k = 0; k < panel; k += 16) {
        F sum{};
        for (int64_t t = 0; t < count; ++t)
          for (int64_t n = 0; n < tile_rows; ++n) sum += load<F>(block(t) + n * panel + k);
        for (int64_t i = 0; i < 16; ++i) column_sums[p * panel + k + i] += (double)sum[i];
      }
    }
  }

  void write_codes(const SoftAssignmentBwdArgs& bwd, int64_t begin, int64_t end) {
    double* row = allocate<double>(columns);
    if (!row) {
      failed = true;
      return;
    }
    const bool squares = args.metric == Logits::euclidean || args.metric == Logits::distance;
    for (int64_t k = begin; k < end; ++k) {
      const double* found = sums + k * columns;
      const T* code = dense + k * columns;
      if (args.metric == Logits::cosine)
        through_norm(found, code, norms[k], row);
      else
        for (int64_t d = 0; d < width; ++d)
          row[d] = found[d] - (squares ? (double)factor * column_sums[k] * (double)code[d] : 0);
      char* out = bwd.codebook_gradient + k * width * size_of(args.codes.dtype);
      write_row(out, args.codes.dtype, row, width);
    }
    std::free(row);
  }
};

static bool soft_assignment_statistics(const SoftAssignmentArgs& args, const Parallel& parallel) {
  return args.wide ? SoftAssignment<double>(args).forward(parallel)
                   : SoftAssignment<float>(args).forward(parallel);
}

static bool soft_assignment_statistics_bwd(const SoftAssignmentBwdArgs& args,
                                           const Parallel& parallel) {
  return args.forward.wide ? SoftAssignment<double>(args.forward).backward(args, parallel)
                           : SoftAssignment<float>(args.forward).backward(args, parallel);
}

}  // namespace mmfast::MMFAST_ISA
