// Certified screening: integer scores of every code, and the few codes that their error bound
// leaves for float64. See nearest_code_kernel.h for the idea.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "cpu/nearest_code.h"
#include "cpu/nearest_code_exact.h"
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

constexpr int tile_rows = lanes == 16 ? 6 : 4;     // rows of a register tile
constexpr int tile_vectors = 2;  // vectors of codes of a register tile
constexpr int tile_codes = tile_vectors * lanes;
constexpr int64_t direct_rows = 6;      // below, packing the codebook does not pay
constexpr int64_t serial_work = 1 << 15;  // multiplications below which threads do not pay
constexpr int64_t chunk_bytes = 1 << 18;  // packed codes that stay in the second-level cache
constexpr int64_t chunk_tiles = 256;      // limits the bits that an id takes from a score
// With few dimensions the comparison costs as much as the products. There, both factors are
// multiples of 2^tag_shift, so that the low bits of a score stay those it starts from: the id.
constexpr int64_t tagged_depth = 16;
constexpr int tag_shift = 4;
static_assert(1 << 2 * tag_shift >= chunk_tiles);
constexpr int64_t max_block_rows = 192;
constexpr int capacity = 32;            // candidates of a row
constexpr double norm_term_range = 1 << 29;
constexpr double inflate = 1 + 1e-4;  // covers the rounding of norms summed in float32

// Codes that share a scale, and whose packed form stays in cache while rows stream past.
struct Chunk {
  int64_t first_tile, tiles;
  double scale;         // integers per unit
  double max_norm;      // largest |c|
  double max_residual;  // largest rounding error |c - c' / scale|
  double reference;     // |c|^2 / 2 is stored relative to this
  double half_range;    // largest deviation from it
  int32_t id_mask;      // low bits of a score that hold the tile's number
};

struct Candidate {
  double upper;   // bound of the score
  int64_t where;  // tile * lanes + lane; or -1 - (chunk * lanes + lane), to look through that lane
};

struct RowState {
  double norm;      // upper bound of |x|
  double residual;  // upper bound of |x - x' / scale|
  double lower;     // the best score is at least this
  int count;        // candidates
  bool exact;       // screening cannot serve this row
  Candidate candidates[capacity];
};

template <class T>
struct Screen;

// What a thread needs besides the packed codebook.
template <class T>
struct Scratch {
  RowState* states = nullptr;   // [block_rows]
  int16_t* packed = nullptr;    // [block_rows][depth]
  int32_t* order = nullptr;     // [block_rows]
  double* tile_scales = nullptr;  // [block_rows / tile_rows]
  T* x = nullptr;               // [D]
  T* c = nullptr;               // [2 D]

  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    std::free(states);
    std::free(packed);
    std::free(order);
    std::free(tile_scales);
    std::free(x);
    std::free(c);
  }
  bool allocate(const Screen<T>& screen, int64_t rows) {
    const size_t n = (size_t)rows, width = (size_t)screen.width;
    states = (RowState*)std::malloc(n * sizeof(RowState));
    packed = (int16_t*)std::malloc(n * (size_t)screen.depth * 2);
    order = (int32_t*)std::malloc(n * sizeof(int32_t));
    tile_scales = (double*)std::malloc(n * sizeof(double));
    x = (T*)std::malloc(width * sizeof(T));
    c = (T*)std::malloc(2 * width * sizeof(T));
    return states && packed && order && tile_scales && x && c;
  }
};

// Best and second best score of each lane for tile_rows rows x [tile_rows][depth] over `tiles`
// tiles of codes. The low bits of a score, as id_mask says, hold the number of its tile.
// Few pairs are a template parameter, so that the compiler unrolls them. Reads the terms of one
// tile more.
template <int known_pairs, bool tagged>
static __attribute__((noinline)) void sweep(const int16_t* x, int64_t depth, const int16_t* codes,
                                            const float* terms, int64_t tiles, float unit,
                                            int32_t id_mask, int32_t (*best)[lanes],
                                            int32_t (*second)[lanes]) {
  const int64_t pairs = known_pairs ? known_pairs : depth / 2;
  if (known_pairs) depth = 2 * known_pairs;
  const vi mask = vset(id_mask);
  vi high[tile_rows], low[tile_rows];
#pragma GCC unroll 8
  for (int r = 0; r < tile_rows; ++r) high[r] = low[r] = vset(INT32_MIN);
  // What a tile's scores start from, made while the tile before it is multiplied: its latency
  // would stand before every product.
  vi start[tile_vectors];
  const auto prepare = [&](int64_t t) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < tile_vectors; ++v) {
      start[v] = vscale(terms + t * tile_codes + v * lanes, unit);
      if constexpr (tagged) start[v] = vtag(start[v], mask, vset((int32_t)t));
    }
  };
  prepare(0);
  for (int64_t t = 0; t < tiles; ++t) {
    vi acc[tile_rows][tile_vectors];
#pragma GCC unroll 8
    for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < tile_vectors; ++v) acc[r][v] = start[v];
    prepare(t + 1);
    const auto accumulate = [&](int64_t p) __attribute__((always_inline)) {
      vi c[tile_vectors];
#pragma GCC unroll 8
      for (int v = 0; v < tile_vectors; ++v) c[v] = vload(codes + v * lanes * 2);
      codes += tile_codes * 2;
#pragma GCC unroll 8
      for (int r = 0; r < tile_rows; ++r) {
        const vi b = vbroadcast(x + r * depth + 2 * p);
#pragma GCC unroll 8
        for (int v = 0; v < tile_vectors; ++v) acc[r][v] = vdot16(acc[r][v], c[v], b);
      }
    };
    if constexpr (known_pairs > 0) {
#pragma GCC unroll 16
      for (int64_t p = 0; p < known_pairs; ++p) accumulate(p);
    } else {
      for (int64_t p = 0; p < pairs; ++p) accumulate(p);
    }
#pragma GCC unroll 8
    for (int r = 0; r < tile_rows; ++r) {
      // The codes of one tile and lane compete as one: whoever needs the winner compares them all.
      vi s = acc[r][0];
#pragma GCC unroll 8
      for (int v = 1; v < tile_vectors; ++v) s = vmax(s, acc[r][v]);
      if constexpr (!tagged) s = vtag(s, mask, vset((int32_t)t));
      low[r] = vmax(low[r], vmin(high[r], s));
      high[r] = vmax(high[r], s);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < tile_rows; ++r) {
    vstore(best[r], high[r]);
    vstore(second[r], low[r]);
  }
}

template <class T>
struct Screen {
  const NearestCodeArgs& args;
  const Exact<T>& exact;
  int64_t width, depth;  // D, and D rounded up to pairs
  bool all_exact = false;  // the codebook is beyond what scores can represent
  double max_norm = 0, mean_norm = 0;
  T* mean = nullptr;          // [D]
  double* norms = nullptr;    // [K] |c|, then reused as the order's key
  uint64_t* hashes = nullptr;
  int32_t* order = nullptr;   // [positions] code at each position, -1 for padding
  int64_t unique = 0;
  Chunk* chunks = nullptr;
  int64_t num_chunks = 0, num_tiles = 0;
  int16_t* packed = nullptr;  // [tile][depth / 2][tile_vectors][lanes][2]
  float* norm_terms = nullptr;  // [tile + 1][tile_codes] reference - |c|^2 / 2

  Screen(const NearestCodeArgs& a, const Exact<T>& e)
      : args(a), exact(e), width(a.x.width), depth((a.x.width + 1) / 2 * 2) {}
  Screen(const Screen&) = delete;
  ~Screen() {
    std::free(mean);
    std::free(norms);
    std::free(hashes);
    std::free(order);
    std::free(chunks);
    std::free(packed);
    std::free(norm_terms);
  }

  bool tagged() const { return depth <= tagged_depth; }
  int shift() const { return tagged() ? tag_shift : 0; }
  // The largest int16 that rounding to multiples of 2^shift cannot pass.
  double largest() const { return 32768 - (1 << shift()); }

  int64_t block_rows(int threads) const {
    const int64_t share = (args.x.count + threads - 1) / threads;
    const int64_t rows = share < max_block_rows ? share : max_block_rows;
    return (rows + tile_rows - 1) / tile_rows * tile_rows;
  }

  bool prepare(const Parallel& parallel) {
    const int64_t codes = args.codes.count;
    mean = (T*)std::calloc((size_t)width, sizeof(T));
    norms = (double*)std::malloc((size_t)codes * sizeof(double));
    hashes = (uint64_t*)std::malloc((size_t)codes * sizeof(uint64_t));
    if (!mean || !norms || !hashes || !find_mean()) return false;
    if (!over_codes(parallel, codes, [](Screen& s, int64_t k, double* c, T* buffer) {
          s.measure(k, c, buffer);
        }))
      return false;
    for (int64_t k = 0; k < codes; ++k) {
      // Comparisons fail for NaN.
      if (!(norms[k] < 1e140) || (norms[k] > 0 && norms[k] < 1e-140)) all_exact = true;
      if (norms[k] > max_norm) max_norm = norms[k];
    }
    if (args.metric == Metric::cosine)
      for (int64_t k = 0; k < codes; ++k)
        if (exact.norms[k] != 0 && !(exact.norms[k] > 1e-140 && exact.norms[k] < 1e140))
          all_exact = true;
    if (all_exact) return true;
    double sum = 0;
    for (int64_t d = 0; d < width; ++d) sum += (double)mean[d] * (double)mean[d];
    mean_norm = std::sqrt(sum);
    if (!choose_order() || !choose_chunks()) return false;
    std::free(hashes);
    hashes = nullptr;
    packed = (int16_t*)std::aligned_alloc(64, (size_t)(num_tiles * tile_codes * depth * 2 + 63) / 64 * 64);
    norm_terms = (float*)std::calloc((size_t)((num_tiles + 1) * tile_codes), sizeof(float));
    if (!packed || !norm_terms) return false;
    return over_codes(parallel, num_tiles, [](Screen& s, int64_t tile, double* c, T* buffer) {
      s.pack(tile, c, buffer);
    });
  }

  // Runs body(screen, i, [D] doubles, [D] numbers) for all i < count.
  using CodeBody = void (*)(Screen&, int64_t, double*, T*);
  bool over_codes(const Parallel& parallel, int64_t count, CodeBody body) {
    struct Context {
      Screen& screen;
      CodeBody body;
      std::atomic<bool> failed{false};
    } context{*this, body};
    const Body run = [](void* opaque, int64_t begin, int64_t end) {
      Context& c = *(Context*)opaque;
      double* centred = (double*)std::malloc((size_t)(c.screen.width + 16) * sizeof(double));
      T* buffer = (T*)std::malloc((size_t)c.screen.width * sizeof(T));
      if (centred && buffer)
        for (int64_t i = begin; i < end; ++i) c.body(c.screen, i, centred, buffer);
      else
        c.failed = true;
      std::free(centred);
      std::free(buffer);
    };
    if (args.codes.count * width < serial_work)
      run(&context, 0, count);
    else
      parallel.run(count, run, &context);
    return !context.failed;
  }

  double code_factor(int64_t k) const {
    if (args.metric != Metric::cosine) return 1;
    return exact.norms[k] > 0 ? 1 / exact.norms[k] : 0;
  }

  // Any point near the codes serves as their centre, so a sample of them is enough.
  bool find_mean() {
    const int64_t codes = args.codes.count, most = 512;
    const int64_t step = (codes + most - 1) / most;
    T* buffer = (T*)std::malloc((size_t)width * sizeof(T));
    double* total = (double*)std::calloc((size_t)width, sizeof(double));
    const bool ok = buffer && total;
    int64_t used = 0;
    for (int64_t k = 0; ok && k < codes; k += step, ++used) {
      const T* c = read_row<T>(args.codes, k, buffer);
      const double factor = code_factor(k);
      for (int64_t d = 0; d < width; ++d) total[d] += (double)c[d] * factor;
    }
    for (int64_t d = 0; ok && d < width; ++d) mean[d] = (T)(total[d] / (double)used);
    std::free(buffer);
    std::free(total);
    return ok;
  }

  // The code as the scores see it: normalised for cosine, less the mean.
  void centre(int64_t k, double* centred, const T* c) const {
    const double factor = code_factor(k);
    for (int64_t d = 0; d < width; ++d) centred[d] = (double)c[d] * factor - (double)mean[d];
  }

  void measure(int64_t k, double* centred, T* buffer) {
    centre(k, centred, read_row<T>(args.codes, k, buffer));
    // Equal codes have equal norms and equal weighted sums: a hash with no chain of products.
    d8 squares{}, weighted{}, weight{1.0, 1.414, 1.732, 2.236, 2.646, 3.317, 3.606, 4.123};
    int64_t d = 0;
    for (; d + 8 <= width; d += 8) {
      const d8 v = load<d8>(centred + d);
      squares += v * v;
      weighted += v * weight;
      weight += 0.618034;
    }
    double square = sum(squares), hash = sum(weighted);
    for (; d < width; ++d) {
      square += centred[d] * centred[d];
      hash += centred[d] * weight[d % 8];
    }
    norms[k] = std::sqrt(square);
    uint64_t bits;
    std::memcpy(&bits, &hash, 8);
    bits *= 0x9E3779B97F4A7C15u;
    hashes[k] = bits ^ bits >> 32;
  }

  // One position for each distinct code, large norms first where they differ much, so that an
  // outlier's scale is not everyone's.
  bool choose_order() {
    const int64_t codes = args.codes.count;
    int64_t slots = 16;
    while (slots < 2 * codes) slots *= 2;
    int32_t* table = (int32_t*)std::malloc((size_t)slots * sizeof(int32_t));
    order = (int32_t*)std::malloc((size_t)codes * sizeof(int32_t));
    T* a = (T*)std::malloc((size_t)width * sizeof(T));
    T* b = (T*)std::malloc((size_t)width * sizeof(T));
    const bool ok = table && order && a && b;
    if (ok) {
      std::memset(table, 0xFF, (size_t)slots * sizeof(int32_t));
      for (int64_t k = 0; k < codes; ++k) {
        int64_t at = (int64_t)(hashes[k] & (uint64_t)(slots - 1));
        bool duplicate = false;
        for (; table[at] >= 0; at = (at + 1) & (slots - 1)) {
          const int32_t other = table[at];
          if (hashes[other] != hashes[k]) continue;
          const T* c = read_row<T>(args.codes, k, a);
          duplicate = std::memcmp(c, read_row<T>(args.codes, other, b), (size_t)width * sizeof(T)) == 0;
          if (duplicate) break;
        }
        if (duplicate) continue;
        table[at] = (int32_t)k;
        order[unique++] = (int32_t)k;
      }
      double total = 0;
      for (int64_t i = 0; i < unique; ++i) total += norms[order[i]];
      if (max_norm > 4 * total / (double)unique) sort_by_norm(0, unique);
    }
    std::free(table);
    std::free(a);
    std::free(b);
    return ok;
  }

  // Heapsort of order[first, last) by falling norm.
  void sort_by_norm(int64_t first, int64_t last) {
    const int64_t n = last - first;
    int32_t* at = order + first;
    const auto sift = [&](int64_t i, int64_t end) {
      for (int64_t child; (child = 2 * i + 1) < end; i = child) {
        if (child + 1 < end && norms[at[child + 1]] < norms[at[child]]) ++child;
        if (norms[at[i]] <= norms[at[child]]) break;
        const int32_t t = at[i];
        at[i] = at[child];
        at[child] = t;
      }
    };
    for (int64_t i = n / 2 - 1; i >= 0; --i) sift(i, n);
    for (int64_t end = n - 1; end > 0; --end) {
      const int32_t t = at[0];
      at[0] = at[end];
      at[end] = t;
      sift(0, end);
    }
  }

  // Cuts the order into chunks and fills them up to whole tiles.
  bool choose_chunks() {
    int64_t most = chunk_bytes / (2 * depth);
    if (most > chunk_tiles * tile_codes) most = chunk_tiles * tile_codes;
    most = most < tile_codes ? tile_codes : most / tile_codes * tile_codes;
    const auto length = [&](int64_t first) {
      double largest = 0;
      int64_t n = 0;
      while (n < most && first + n < unique) {
        const double norm = norms[order[first + n]];
        if (norm > largest) largest = norm;
        // Only in a sorted order: a chunk ends where norms have fallen to a quarter.
        if (n >= 1 && sorted() && norm < largest / 4) break;
        ++n;
      }
      return n;
    };
    for (int64_t first = 0; first < unique; first += length(first)) ++num_chunks;
    chunks = (Chunk*)std::calloc((size_t)num_chunks, sizeof(Chunk));
    if (!chunks) return false;
    int64_t tiles = 0, i = 0;
    for (int64_t first = 0, n; first < unique; first += n, ++i) {
      n = length(first);
      Chunk& chunk = chunks[i];
      chunk.first_tile = tiles;
      chunk.tiles = (n + tile_codes - 1) / tile_codes;
      tiles += chunk.tiles;
      double low = std::numeric_limits<double>::infinity(), high = 0;
      for (int64_t j = first; j < first + n; ++j) {
        const double norm = norms[order[j]];
        low = norm < low ? norm : low;
        high = norm > high ? norm : high;
      }
      chunk.max_norm = high * inflate;
      chunk.scale = high > 0 ? largest() / high : 1;
      if (args.metric == Metric::euclidean) {
        chunk.reference = (low * low + high * high) / 4;
        chunk.half_range = (high * high - low * low) / 4;
      }
      int32_t ids = 1;
      while (ids < chunk.tiles) ids *= 2;
      chunk.id_mask = ids - 1;
    }
    num_tiles = tiles;
    int32_t* padded = (int32_t*)std::malloc((size_t)(tiles * tile_codes) * sizeof(int32_t));
    if (!padded) return false;
    for (int64_t c = 0, first = 0, n; c < num_chunks; ++c, first += n) {
      n = length(first);
      int32_t* at = padded + chunks[c].first_tile * tile_codes;
      for (int64_t j = 0; j < chunks[c].tiles * tile_codes; ++j)
        at[j] = j < n ? order[first + j] : -1;
    }
    std::free(order);
    order = padded;
    return true;
  }

  bool sorted() const { return norms[order[0]] == max_norm && unique > 1 && spread(); }
  bool spread() const {
    double total = 0;
    for (int64_t i = 0; i < unique; ++i) total += norms[order[i]];
    return max_norm > 4 * total / (double)unique;
  }

  const Chunk& chunk_of(int64_t tile) const {
    int64_t low = 0, high = num_chunks - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (chunks[middle].first_tile <= tile)
        low = middle;
      else
        high = middle - 1;
    }
    return chunks[low];
  }

  void pack(int64_t tile, double* centred, T* buffer) {
    Chunk& chunk = const_cast<Chunk&>(chunk_of(tile));
    int16_t* out = packed + tile * tile_codes * depth;
    const double magic = std::ldexp(0x1.8p52, shift());  // adding it rounds to whole multiples
    double worst = 0;
    for (int j = 0; j < tile_codes; ++j) {
      const int32_t k = order[tile * tile_codes + j];
      int16_t* at = out + 2 * j;
      if (k < 0) {
        norm_terms[tile * tile_codes + j] = -std::numeric_limits<float>::infinity();
        for (int64_t d = 0; d < depth; d += 2, at += 2 * tile_codes) store<int32_t>(at, 0);
        continue;
      }
      centre(k, centred, read_row<T>(args.codes, k, buffer));
      for (int64_t d = width; d < depth + 8; ++d) centred[d] = 0;
      norm_terms[tile * tile_codes + j] =
          args.metric == Metric::euclidean
              ? (float)(chunk.reference - norms[k] * norms[k] / 2)
              : 0.0f;
      d8 error{};
      for (int64_t d = 0; d < depth; d += 8) {
        const d8 scaled = load<d8>(centred + d) * chunk.scale;
        const d8 whole = (scaled + magic) - magic;
        const d8 e = scaled - whole;
        error += e * e;
        int16_t q[8];
        store(q, __builtin_convertvector(__builtin_convertvector(whole, i32x8), i16x8));
        for (int i = 0; i < 8 && d + i < depth; i += 2, at += 2 * tile_codes)
          store(at, load<int32_t>(q + i));
      }
      const double norm = std::sqrt(sum(error)) / chunk.scale;
      worst = norm > worst ? norm : worst;
    }
    worst *= inflate;
    // Tiles of one chunk may be packed by several threads.
    std::atomic_ref<double> residual(chunk.max_residual);
    for (double seen = residual; worst > seen && !residual.compare_exchange_weak(seen, worst);) {
    }
  }

  // --- rows ---

  void rows(Scratch<T>& scratch, int64_t begin, int64_t end) const {
    const int64_t n = end - begin;
    const int64_t tiles = (n + tile_rows - 1) / tile_rows;
    double low = std::numeric_limits<double>::infinity(), high = 0;
    for (int64_t i = 0; i < n; ++i) {
      RowState& state = scratch.states[i];
      state.count = 0;
      state.lower = -std::numeric_limits<double>::infinity();
      state.norm = row_norm(read_row<T>(args.x, begin + i, scratch.x));
      state.exact = all_exact || !(state.norm < 1e140);
      if (state.exact) state.norm = 0;
      low = state.norm < low ? state.norm : low;
      high = state.norm > high ? state.norm : high;
      scratch.order[i] = (int32_t)i;
    }
    if (!all_exact) {
      // Rows of one tile share a scale: bring those of like norm together.
      if (high > 4 * low) sort_rows(scratch, n);
      for (int64_t t = 0; t < tiles; ++t) quantise(scratch, begin, t, n);
      for (int64_t c = 0; c < num_chunks; ++c)
        for (int64_t t = 0; t < tiles; ++t) screen(scratch, t, n, c);
    }
    for (int64_t i = 0; i < n; ++i) resolve(scratch, begin + i, scratch.states[i]);
  }

  static void sort_rows(Scratch<T>& scratch, int64_t n) {
    // Insertion sort by exponent: n is at most max_block_rows.
    for (int64_t i = 1; i < n; ++i) {
      const int32_t row = scratch.order[i];
      const int key = std::ilogb(scratch.states[row].norm);
      int64_t j = i;
      for (; j > 0 && std::ilogb(scratch.states[scratch.order[j - 1]].norm) > key; --j)
        scratch.order[j] = scratch.order[j - 1];
      scratch.order[j] = row;
    }
  }

  // An upper bound of |x|, x less the mean; not finite if x is not.
  double row_norm(const T* x) const {
    if constexpr (sizeof(T) == 4) {
      f8 total{};
      int64_t d = 0;
      for (; d + 8 <= width; d += 8) {
        const f8 v = row_value8(x, d);
        total += v * v;
      }
      float rest = sum(total);
      for (; d < width; ++d) {
        const float v = row_value(x, d);
        rest += v * v;
      }
      // Squares neither overflowed nor vanished.
      if (rest > 1e-24f && rest < 1e30f) return std::sqrt((double)rest) * inflate;
    }
    double total = 0;
    for (int64_t d = 0; d < width; ++d) {
      const double v = (double)x[d] - (args.metric == Metric::euclidean ? (double)mean[d] : 0.0);
      total += v * v;
    }
    return std::sqrt(total) * inflate;
  }

  // Only for the Euclidean metric does the mean shift the rows too; a product's argmax ignores it.
  T row_value(const T* x, int64_t d) const {
    return args.metric == Metric::euclidean ? x[d] - mean[d] : x[d];
  }
  f8 row_value8(const float* x, int64_t d) const {
    const f8 v = load<f8>(x + d);
    return args.metric == Metric::euclidean ? v - load<f8>(mean + d) : v;
  }

  void quantise(Scratch<T>& scratch, int64_t begin, int64_t tile, int64_t n) const {
    double highest = 0;
    for (int r = 0; r < tile_rows && tile * tile_rows + r < n; ++r) {
      const double norm = scratch.states[scratch.order[tile * tile_rows + r]].norm;
      highest = norm > highest ? norm : highest;
    }
    double scale = highest > 0 ? largest() / highest : std::numeric_limits<double>::infinity();
    for (int64_t c = 0; c < num_chunks; ++c) {
      const double limit = norm_term_range / (chunks[c].scale * chunks[c].half_range);
      scale = limit < scale ? limit : scale;
    }
    if (!(scale < 1e200)) scale = 1;
    scratch.tile_scales[tile] = scale;
    for (int r = 0; r < tile_rows; ++r) {
      const int64_t i = tile * tile_rows + r;
      int16_t* out = scratch.packed + i * depth;
      RowState* state = i < n ? &scratch.states[scratch.order[i]] : nullptr;
      if (!state || state->exact) {
        std::memset(out, 0, (size_t)depth * 2);
        continue;
      }
      const T* x = read_row<T>(args.x, begin + scratch.order[i], scratch.x);
      // Float32 serves where neither the values nor the scale come near its limits.
      const bool plain = sizeof(T) == 4 && scale > 1e-20 && scale < 1e20 && highest > 1e-10;
      state->residual = (plain ? round_float(x, scale, out) : round_double(x, scale, out)) *
                        inflate / scale;
    }
  }

  double round_float(const T* x, double scale, int16_t* out) const {
    const float s = (float)scale, magic = std::ldexp(0x1.8p23f, shift());
    float rest = 0;
    int64_t d = 0;
    if constexpr (sizeof(T) == 4) {
      f8 error{};
      for (; d + 8 <= width; d += 8) {
        const f8 scaled = row_value8(x, d) * s;
        const f8 shifted = scaled + magic;
        const f8 e = scaled - (shifted - magic);
        error += e * e;
        // The low bits of the shifted value are the multiple.
        store(out + d, __builtin_convertvector((i32x8)shifted << shift(), i16x8));
      }
      rest = sum(error);
    }
    for (; d < width; ++d) {
      const float scaled = (float)row_value(x, d) * s;
      const float whole = (scaled + magic) - magic;
      rest += (scaled - whole) * (scaled - whole);
      out[d] = (int16_t)whole;
    }
    for (; d < depth; ++d) out[d] = 0;
    return std::sqrt((double)rest);
  }

  double round_double(const T* x, double scale, int16_t* out) const {
    const double magic = std::ldexp(0x1.8p52, shift());
    double rest = 0;
    for (int64_t d = 0; d < width; ++d) {
      const double v = (double)x[d] - (args.metric == Metric::euclidean ? (double)mean[d] : 0.0);
      const double scaled = v * scale, whole = (scaled + magic) - magic;
      rest += (scaled - whole) * (scaled - whole);
      out[d] = (int16_t)whole;
    }
    for (int64_t d = width; d < depth; ++d) out[d] = 0;
    return std::sqrt(rest);
  }

  // Scores of one tile of rows against one chunk.
  void screen(Scratch<T>& scratch, int64_t tile, int64_t n, int64_t c) const {
    const Chunk& chunk = chunks[c];
    const double unit = scratch.tile_scales[tile] * chunk.scale;
    alignas(64) int32_t best[tile_rows][lanes], second[tile_rows][lanes];
    const auto run = depth == 8 ? sweep<4, true> : tagged() ? sweep<0, true> : sweep<0, false>;
    run(scratch.packed + tile * tile_rows * depth, depth,
          packed + chunk.first_tile * tile_codes * depth,
          norm_terms + chunk.first_tile * tile_codes, chunk.tiles, (float)unit, chunk.id_mask, best,
          second);
    const double per_unit = 1 / unit;
    const double noise =
        (2.0 * chunk.id_mask + 256) * per_unit;  // the id's bits, rounding of the norm term
    for (int r = 0; r < tile_rows && tile * tile_rows + r < n; ++r) {
      RowState& state = scratch.states[scratch.order[tile * tile_rows + r]];
      if (state.exact) continue;
      collect(state, chunk, c, unit, per_unit, noise, best[r], second[r]);
    }
  }

  // How far a score can be from the true one.
  double error_bound(const RowState& state, const Chunk& chunk, double noise) const {
    const double codes = chunk.max_norm + chunk.max_residual;
    // Rounding of x - mean and of the norms; the definition's own rounding in float64.
    const double storage = sizeof(T) == 4 ? 0x1p-21 : 0x1p-49;
    const double definition = (double)(width + 16) * 0x1p-50;
    double bound = state.residual * chunk.max_norm +
                   (state.norm + state.residual) * chunk.max_residual + noise +
                   storage * (state.norm + codes) * codes;
    if (args.metric == Metric::euclidean)
      bound += definition * (state.norm + codes) * (state.norm + codes);
    else
      bound += definition * state.norm *
               (args.metric == Metric::cosine ? 4.0 : 4 * (exact.max_norm + mean_norm));
    return bound;
  }

  void collect(RowState& state, const Chunk& chunk, int64_t c, double unit, double per_unit,
               double noise, const int32_t* best, const int32_t* second) const {
    const double bound = error_bound(state, chunk, noise);
    const auto threshold_of = [&](double lower) {
      const double limit = (lower + chunk.reference - bound) * unit - 2;
      return vset(limit < -2147483648.0 ? INT32_MIN : limit > 2147483647.0 ? INT32_MAX : (int32_t)limit);
    };
    const vi top = vload(best);
    vi threshold = threshold_of(state.lower);
    if (!vge(top, threshold)) return;
    const double lower = vhmax(top) * per_unit - chunk.reference - bound;
    if (lower > state.lower) {
      state.lower = lower;
      threshold = threshold_of(lower);
    }
    for (uint32_t left = vge(top, threshold); left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      const int64_t tile = chunk.first_tile + (best[lane] & chunk.id_mask);
      if (order[tile * tile_codes + lane] < 0) continue;
      add(state, {best[lane] * per_unit - chunk.reference + bound, tile * lanes + lane});
    }
    for (uint32_t left = vge(vload(second), threshold); left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      if (second[lane] == INT32_MIN) continue;
      add(state, {second[lane] * per_unit - chunk.reference + bound, -1 - (c * lanes + lane)});
    }
  }

  static void add(RowState& state, Candidate candidate) {
    if (state.count == capacity) {
      int kept = 0;
      for (int i = 0; i < state.count; ++i)
        if (state.candidates[i].upper >= state.lower) state.candidates[kept++] = state.candidates[i];
      state.count = kept;
      if (kept == capacity) {
        state.exact = true;
        return;
      }
    }
    state.candidates[state.count++] = candidate;
  }

  void resolve(Scratch<T>& scratch, int64_t row, RowState& state) const {
    const T* x = read_row<T>(args.x, row, scratch.x);
    if (state.exact) {
      exact.scan(row, x, scratch.c);
      return;
    }
    Nearest<T> best = exact.start(x);
    for (int i = 0; i < state.count; ++i) {
      const Candidate& candidate = state.candidates[i];
      if (candidate.upper < state.lower) continue;
      int64_t tile = candidate.where / lanes, tiles = 1, lane = candidate.where % lanes;
      if (candidate.where < 0) {
        const Chunk& chunk = chunks[(-1 - candidate.where) / lanes];
        tile = chunk.first_tile;
        tiles = chunk.tiles;
        lane = (-1 - candidate.where) % lanes;
      }
      for (int64_t j = 0; j < tiles * tile_vectors; ++j) {
        const int32_t code = order[tile * tile_codes + j * lanes + lane];
        if (code >= 0) exact.consider(best, code, scratch.c);
      }
    }
    exact.write(row, best);
  }
};

}  // namespace mmfast::MMFAST_ISA
