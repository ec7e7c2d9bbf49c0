// The codebook as the screening reads it: centred, rounded to integers or bfloat16, in chunks.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "cpu/nearest_code.h"
#include "cpu/nearest_code_exact.h"
#include "cpu/nearest_code_groups.h"
#include "cpu/nearest_code_sweep.h"
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

constexpr int64_t serial_work = 1 << 15;  // multiplications below which threads do not pay
constexpr int64_t chunk_bytes = 1 << 18;  // packed codes that stay in the second-level cache
constexpr double norm_term_range = 1 << 29;
constexpr double inflate = 1 + 1e-4;  // covers the rounding of norms

// What numbers are rounded to. pairs: each is the sum of two bfloat16, and its products are three.
enum class Form { bytes, int16, bfloat16, pairs };

constexpr int64_t byte_tiles = 32;  // tiles of a chunk of bytes, whose scores have few bits for ids

constexpr int32_t byte_offset = 128;   // added to the bytes of codes, which have no sign
constexpr int64_t matrix_depth = 32;   // bfloat16 of a row of a matrix tile
constexpr int64_t matrix_tiles = 16;   // tiles of codes whose scores stay in the first-level cache

// Codes that share a scale, and whose packed form stays in cache while rows stream past. In a
// grouped codebook, a group: its codes are rounded relative to its own centre.
struct Chunk {
  int64_t first_tile, tiles;
  double scale;         // integers per unit, or bfloat16
  double max_norm;      // largest |c - centre|
  double max_residual;  // largest rounding error |c - centre - c' / scale|
  double reference;     // |c|^2 / 2 is stored relative to this
  double half_range;    // largest deviation from it
  double far_norm;      // largest |c|
  double centre_norm;   // |centre|
  int32_t id_mask;      // low bits of a score that hold the tile's number
};

template <class T>
struct Codebook {
  const NearestCodeArgs& args;
  const Exact<T>& exact;
  Form form = Form::int16;    // if grouped, always
  int64_t width, depth = 0;   // D, and int16 of a packed code
  bool beyond = false;        // a code is not finite, or so large or small that scores cannot be
  bool grouped = false;
  double max_norm = 0, mean_norm = 0;
  T* mean = nullptr;          // [D]
  double* norms = nullptr;    // [K] |c|, less the mean
  double* peaks = nullptr;    // [K] the largest of their numbers
  uint64_t* hashes = nullptr;  // [K]
  int64_t unique = 0;
  int32_t* order = nullptr;   // [tile][tile_codes] the codes; -1 for padding
  Chunk* chunks = nullptr;
  int64_t num_chunks = 0, num_tiles = 0;
  Axes axes;                  // once grouped
  float* places = nullptr;    // [K][Axes::count] along them, less the mean
  float* centres = nullptr;   // [group][centre_stride] of the groups, less the mean
  int64_t centre_stride = 0;
  int16_t* packed = nullptr;  // [tile][depth / 2][tile_vectors][lanes][2]
  // [tile + 1][tile_codes] (reference - |c|^2 / 2) / half_range; of bfloat16, times scale^2 instead
  float* norm_terms = nullptr;

  Codebook(const NearestCodeArgs& a, const Exact<T>& e)
      : args(a), exact(e), width(a.x.width) {}
  Codebook(const Codebook&) = delete;
  ~Codebook() {
    std::free(mean);
    std::free(norms);
    std::free(peaks);
    std::free(hashes);
    std::free(order);
    std::free(places);
    release();
  }

  // Frees what differs from form to form.
  void release() {
    std::free(chunks);
    std::free(centres);
    std::free(packed);
    std::free(norm_terms);
    chunks = nullptr;
    centres = norm_terms = nullptr;
    packed = nullptr;
    num_chunks = 0;
  }

  bool whole() const { return form == Form::int16 || form == Form::bytes; }
  int shift() const { return form == Form::int16 && depth <= tagged_depth ? tag_shift : 0; }
  // The largest integer that rounding to multiples of 2^shift cannot pass.
  double largest() const { return form == Form::bytes ? 127 : 32768 - (1 << shift()); }

  // Where the parts of a number lie in a packed code: D rounded up to pairs.
  int64_t part() const { return (width + 1) / 2 * 2; }

  // Packs the codes in one form or, after that, in another.
  // group_codes: 0, or the codes of a group.
  bool prepare(const Parallel& parallel, Form wanted, int64_t group_codes) {
    if (!norms) {
      if (!look(parallel)) return false;
      if (beyond) return true;
    } else {
      drop_padding();
      release();
    }
    // Centres and their distances are kept in float32, whose range their squares must not leave.
    grouped = group_codes > 0 && unique >= 4 * group_codes && max_norm > 1e-15 && max_norm < 1e15;
    form = grouped ? Form::int16 : wanted;
    depth = form == Form::pairs ? 3 * part() : part();
    if (form == Form::bytes) depth = (width + 3) / 4 * 2;
    if (!whole()) depth = (depth + matrix_depth - 1) / matrix_depth * matrix_depth;
    if (grouped) {
      if (!group(parallel, group_codes)) return false;
    } else if (spread()) {
      sort_by_norm();
    }
    if (!cut(group_codes)) return false;
    packed = (int16_t*)std::aligned_alloc(
        64, (size_t)(num_tiles * tile_codes * depth * 2 + 63) / 64 * 64);
    norm_terms = (float*)std::calloc((size_t)((num_tiles + 1) * tile_codes), sizeof(float));
    if (!packed || !norm_terms) return false;
    return over(parallel, num_chunks, &Codebook::pack);
  }

  // Finds the mean, the norms and the codes that differ.
  bool look(const Parallel& parallel) {
    const int64_t codes = args.codes.count;
    norms = (double*)std::malloc((size_t)codes * sizeof(double));
    peaks = (double*)std::malloc((size_t)codes * sizeof(double));
    hashes = (uint64_t*)std::malloc((size_t)codes * sizeof(uint64_t));
    order = (int32_t*)std::malloc((size_t)codes * sizeof(int32_t));
    if (!norms || !peaks || !hashes || !order || !find_mean()) return false;
    if (!over(parallel, codes, &Codebook::measure)) return false;
    if (!representable()) {
      beyond = true;
      return true;
    }
    return drop_duplicates();
  }

  // Undoes what cut() added to the order.
  void drop_padding() {
    int64_t n = 0;
    for (int64_t i = 0; i < num_tiles * tile_codes; ++i)
      if (order[i] >= 0) order[n++] = order[i];
  }

  // Runs (this->*body)(i, [D + 16] doubles, [D] numbers) for all i < count.
  using PerItem = void (Codebook::*)(int64_t, double*, T*);
  bool over(const Parallel& parallel, int64_t count, PerItem body) {
    struct Context {
      Codebook& codebook;
      PerItem body;
      std::atomic<bool> failed{false};
    } context{*this, body};
    const Body run = [](void* opaque, int64_t begin, int64_t end) {
      Context& c = *(Context*)opaque;
      double* centred = (double*)std::malloc((size_t)(c.codebook.width + 16) * sizeof(double));
      T* buffer = (T*)std::malloc((size_t)c.codebook.width * sizeof(T));
      if (centred && buffer)
        for (int64_t i = begin; i < end; ++i) (c.codebook.*c.body)(i, centred, buffer);
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

  double factor(int64_t k) const {
    if (args.metric != Metric::cosine) return 1;
    return exact.norms[k] > 0 ? 1 / exact.norms[k] : 0;
  }

  // Any point near the codes serves as their centre, so a sample of them is enough.
  bool find_mean() {
    const int64_t codes = args.codes.count, most = 512;
    const int64_t step = (codes + most - 1) / most;
    mean = (T*)std::calloc((size_t)width, sizeof(T));
    T* buffer = (T*)std::malloc((size_t)width * sizeof(T));
    double* total = (double*)std::calloc((size_t)width, sizeof(double));
    const bool ok = mean && buffer && total;
    int64_t used = 0;
    for (int64_t k = 0; ok && k < codes; k += step, ++used) {
      const T* c = read_row<T>(args.codes, k, buffer);
      const double f = factor(k);
      for (int64_t d = 0; d < width; ++d) total[d] += (double)c[d] * f;
    }
    double square = 0;
    for (int64_t d = 0; ok && d < width; ++d) {
      mean[d] = (T)(total[d] / (double)used);
      square += (double)mean[d] * (double)mean[d];
    }
    mean_norm = std::sqrt(square);
    std::free(buffer);
    std::free(total);
    return ok;
  }

  // The code as the scores see it: normalised for cosine, less the mean.
  void centre(int64_t k, double* centred, T* buffer) const {
    const T* c = read_row<T>(args.codes, k, buffer);
    const double f = factor(k);
    for (int64_t d = 0; d < width; ++d) centred[d] = (double)c[d] * f - (double)mean[d];
  }

  void measure(int64_t k, double* centred, T* buffer) {
    centre(k, centred, buffer);
    // Equal codes have equal norms and equal weighted sums: a hash with no chain of products.
    d8 squares{}, weighted{}, weight{1.0, 1.414, 1.732, 2.236, 2.646, 3.317, 3.606, 4.123};
    d8 largest{};
    int64_t d = 0;
    for (; d + 8 <= width; d += 8) {
      const d8 v = load<d8>(centred + d);
      squares += v * v;
      largest = v > largest ? v : largest;
      largest = -v > largest ? -v : largest;
      weighted += v * weight;
      weight += 0.618034;
    }
    double square = sum(squares), hash = sum(weighted);
    for (; d < width; ++d) {
      square += centred[d] * centred[d];
      hash += centred[d] * weight[d % 8];
      largest[0] = std::fabs(centred[d]) > largest[0] ? std::fabs(centred[d]) : largest[0];
    }
    peaks[k] = 0;
    for (int j = 0; j < 8; ++j) peaks[k] = largest[j] > peaks[k] ? largest[j] : peaks[k];
    norms[k] = std::sqrt(square);
    uint64_t bits;
    std::memcpy(&bits, &hash, 8);
    bits *= 0x9E3779B97F4A7C15u;
    hashes[k] = bits ^ bits >> 32;
  }

  bool representable() {
    bool ok = true;  // the comparisons fail for NaN
    for (int64_t k = 0; k < args.codes.count; ++k) {
      ok &= norms[k] < 1e140 && (norms[k] == 0 || norms[k] > 1e-140);
      if (args.metric == Metric::cosine)
        ok &= exact.norms[k] == 0 || (exact.norms[k] > 1e-140 && exact.norms[k] < 1e140);
      if (norms[k] > max_norm) max_norm = norms[k];
    }
    return ok;
  }

  // The first of each set of equal codes goes into order: it is the one that a tie chooses.
  bool drop_duplicates() {
    const int64_t codes = args.codes.count;
    int64_t slots = 16;
    while (slots < 2 * codes) slots *= 2;
    int32_t* table = (int32_t*)std::malloc((size_t)slots * sizeof(int32_t));
    T* a = (T*)std::malloc((size_t)width * sizeof(T));
    T* b = (T*)std::malloc((size_t)width * sizeof(T));
    const bool ok = table && a && b;
    if (ok) std::memset(table, 0xFF, (size_t)slots * sizeof(int32_t));
    for (int64_t k = 0; ok && k < codes; ++k) {
      int64_t at = (int64_t)(hashes[k] & (uint64_t)(slots - 1));
      bool duplicate = false;
      for (; table[at] >= 0; at = (at + 1) & (slots - 1)) {
        const int32_t other = table[at];
        if (hashes[other] != hashes[k]) continue;
        duplicate = std::memcmp(read_row<T>(args.codes, k, a), read_row<T>(args.codes, other, b),
                                (size_t)width * sizeof(T)) == 0;
        if (duplicate) break;
      }
      if (duplicate) continue;
      table[at] = (int32_t)k;
      order[unique++] = (int32_t)k;
    }
    std::free(table);
    std::free(a);
    std::free(b);
    std::free(hashes);
    hashes = nullptr;
    return ok;
  }

  // Whether norms differ so much that an outlier's scale must not be everyone's.
  bool spread() const {
    double total = 0;
    for (int64_t i = 0; i < unique; ++i) total += norms[order[i]];
    return max_norm > 4 * total / (double)unique;
  }

  // Heapsort of the order by falling norm.
  void sort_by_norm() {
    const auto swap = [&](int64_t i, int64_t j) {
      const int32_t t = order[i];
      order[i] = order[j];
      order[j] = t;
    };
    const auto sift = [&](int64_t i, int64_t end) {
      for (int64_t child; (child = 2 * i + 1) < end; i = child) {
        if (child + 1 < end && norms[order[child + 1]] < norms[order[child]]) ++child;
        if (norms[order[i]] <= norms[order[child]]) break;
        swap(i, child);
      }
    };
    for (int64_t i = unique / 2 - 1; i >= 0; --i) sift(i, unique);
    for (int64_t end = unique - 1; end > 0; --end) {
      swap(0, end);
      sift(0, end);
    }
  }

  // Rearranges the order into groups of like codes.
  bool group(const Parallel& parallel, int64_t group_codes) {
    const int64_t codes = args.codes.count;
    double* centred = (double*)std::malloc((size_t)(width + 16) * sizeof(double));
    T* buffer = (T*)std::malloc((size_t)width * sizeof(T));
    float* keys = (float*)std::malloc((size_t)unique * sizeof(float));
    places = (float*)std::malloc((size_t)(codes * Axes::count) * sizeof(float));
    bool ok = centred && buffer && keys && places;
    ok = ok && axes.find(width, unique, [&](int64_t i) {
      centre(order[i], centred, buffer);
      return centred;
    });
    ok = ok && over(parallel, codes, &Codebook::locate);
    ok = ok && Halving{places, group_codes, order, keys}.run(unique, parallel);
    std::free(centred);
    std::free(buffer);
    std::free(keys);
    return ok;
  }

  void locate(int64_t k, double* centred, T* buffer) {
    centre(k, centred, buffer);
    store(places + k * Axes::count, narrow(axes.project(centred)));
  }

  // Cuts the order into chunks and fills them up to whole tiles.
  bool cut(int64_t group_codes) {
    int64_t most = chunk_bytes / (2 * depth);
    const int64_t limit = form == Form::bytes ? byte_tiles : whole() ? chunk_tiles : matrix_tiles;
    if (most > limit * tile_codes) most = limit * tile_codes;
    most = most < tile_codes ? tile_codes : most / tile_codes * tile_codes;
    if (grouped) most = group_codes;
    const bool falling = !grouped && spread();
    const auto length = [&](int64_t first) {
      int64_t n = 1;
      while (n < most && first + n < unique &&
             !(falling && norms[order[first + n]] < norms[order[first]] / 4))
        ++n;
      return n;
    };
    int64_t tiles = 0;
    for (int64_t first = 0, n; first < unique; first += n, ++num_chunks) {
      n = length(first);
      tiles += (n + tile_codes - 1) / tile_codes;
    }
    num_tiles = tiles;
    chunks = (Chunk*)std::calloc((size_t)num_chunks, sizeof(Chunk));
    int32_t* padded = (int32_t*)std::malloc((size_t)(tiles * tile_codes) * sizeof(int32_t));
    if (grouped) {
      centre_stride = (width + 15) / 16 * 16;
      centres = (float*)std::calloc((size_t)(num_chunks * centre_stride), sizeof(float));
    }
    if (!chunks || !padded || (grouped && !centres)) {
      std::free(padded);
      return false;
    }
    int64_t tile = 0, i = 0;
    for (int64_t first = 0, n; first < unique; first += n, ++i) {
      n = length(first);
      chunks[i].first_tile = tile;
      chunks[i].tiles = (n + tile_codes - 1) / tile_codes;
      while (chunks[i].id_mask < chunks[i].tiles - 1) chunks[i].id_mask = 2 * chunks[i].id_mask + 1;
      for (int64_t j = 0; j < chunks[i].tiles * tile_codes; ++j)
        padded[tile * tile_codes + j] = j < n ? order[first + j] : -1;
      tile += chunks[i].tiles;
    }
    std::free(order);
    order = padded;
    return true;
  }

  // Less the group's centre too.
  void centre_in_group(int64_t i, int32_t k, double* centred, T* buffer) const {
    centre(k, centred, buffer);
    if (grouped)
      for (int64_t d = 0; d < width; ++d) centred[d] -= (double)centres[i * centre_stride + d];
    for (int64_t d = width; d < part() + 8; ++d) centred[d] = 0;
  }

  void pack(int64_t i, double* centred, T* buffer) {
    Chunk& chunk = chunks[i];
    const int32_t* codes = order + chunk.first_tile * tile_codes;
    const int64_t count = chunk.tiles * tile_codes;
    double low = std::numeric_limits<double>::infinity(), high = 0, widest = 0, peak = 0;
    for (int64_t j = 0; j < count && codes[j] >= 0; ++j) {
      low = norms[codes[j]] < low ? norms[codes[j]] : low;
      high = norms[codes[j]] > high ? norms[codes[j]] : high;
      peak = peaks[codes[j]] > peak ? peaks[codes[j]] : peak;
    }
    if (grouped) {
      find_centre(i, centred, buffer);
      for (int64_t j = 0; j < count && codes[j] >= 0; ++j) {
        centre_in_group(i, codes[j], centred, buffer);
        double square = 0;
        for (int64_t d = 0; d < width; ++d) square += centred[d] * centred[d];
        widest = square > widest ? square : widest;
      }
      widest = std::sqrt(widest);
    } else {
      widest = high;
    }
    chunk.max_norm = widest * inflate;
    chunk.far_norm = high * inflate;
    const double most = form == Form::bytes ? peak : widest;
    if (whole())
      chunk.scale = most > 0 ? largest() / most : 1;
    else
      chunk.scale = max_norm > 0 ? std::ldexp(1.0, -std::ilogb(max_norm)) : 1;
    if (args.metric == Metric::euclidean) {
      chunk.reference = (low * low + high * high) / 4;
      chunk.half_range = (high * high - low * low) / 4;
    }
    for (int64_t t = 0; t < chunk.tiles; ++t) {
      const int64_t tile = chunk.first_tile + t;
      if (whole())
        pack_tile(i, tile, centred, buffer);
      else
        pack_matrix_tile(i, tile, centred, buffer);
    }
  }

  void find_centre(int64_t i, double* centred, T* buffer) {
    Chunk& chunk = chunks[i];
    const int32_t* codes = order + chunk.first_tile * tile_codes;
    int64_t n = 0;
    for (; n < chunk.tiles * tile_codes && codes[n] >= 0; ++n) {
      centre(codes[n], centred, buffer);
      for (int64_t d = 0; d < width; ++d) centres[i * centre_stride + d] += (float)centred[d];
    }
    double square = 0;
    for (int64_t d = 0; d < width; ++d) {
      float& c = centres[i * centre_stride + d];
      c /= (float)n;
      square += (double)c * (double)c;
    }
    chunk.centre_norm = std::sqrt(square) * inflate;
  }

  void pack_tile(int64_t i, int64_t tile, double* centred, T* buffer) {
    Chunk& chunk = chunks[i];
    int16_t* out = packed + tile * tile_codes * depth;
    const double magic = std::ldexp(0x1.8p52, shift());  // adding it rounds to whole multiples
    double worst = 0;
    for (int j = 0; j < tile_codes; ++j) {
      const int32_t k = order[tile * tile_codes + j];
      float& term = norm_terms[tile * tile_codes + j];
      int16_t* at = out + 2 * j;
      if (k < 0) {
        term = -std::numeric_limits<float>::infinity();
        for (int64_t w = 0; w < depth / 2; ++w, at += 2 * tile_codes) store<int32_t>(at, 0);
        continue;
      }
      centre_in_group(i, k, centred, buffer);
      term = chunk.half_range > 0
                 ? (float)((chunk.reference - norms[k] * norms[k] / 2) / chunk.half_range)
                 : 0.0f;
      d8 error{};
      for (int64_t d = 0; d < width; d += 8) {
        const d8 scaled = load<d8>(centred + d) * chunk.scale;
        const d8 rounded = (scaled + magic) - magic;
        const d8 e = scaled - rounded;
        error += e * e;
        const i32x8 q = __builtin_convertvector(rounded, i32x8);
        int32_t words[4];
        int64_t count = (part() - d) / 2;
        if (form == Form::bytes) {
          store(words, __builtin_convertvector(q + byte_offset, i8x8));
          count = (part() - d + 3) / 4;
        } else {
          store(words, __builtin_convertvector(q, i16x8));
        }
        const int64_t most = form == Form::bytes ? 2 : 4;
        if (count > most) count = most;
        for (int64_t w = 0; w < count; ++w, at += 2 * tile_codes) store(at, words[w]);
      }
      const double norm = std::sqrt(sum(error)) / chunk.scale;
      worst = norm > worst ? norm : worst;
    }
    if (worst * inflate > chunk.max_residual) chunk.max_residual = worst * inflate;
  }

  // The bfloat16 nearest to numbers that a float32 can hold, in its upper half.
  static i32x8 nearest_bfloat16(d8 v) {
    const i32x8 bits = (i32x8)__builtin_convertvector(v, f8);
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & (i32x8{} + ~0xFFFF);
  }

  // In pairs a code is its upper parts, its lower parts and its upper parts again.
  void pack_matrix_tile(int64_t i, int64_t tile, double* centred, T* buffer) {
    Chunk& chunk = chunks[i];
    int16_t* out = packed + tile * tile_codes * depth;
    std::memset(out, 0, (size_t)(tile_codes * depth) * 2);
    const double unit = chunk.scale * chunk.scale;
    double worst = 0;
    for (int j = 0; j < tile_codes; ++j) {
      const int32_t k = order[tile * tile_codes + j];
      float& term = norm_terms[tile * tile_codes + j];
      if (k < 0) {
        term = -std::numeric_limits<float>::infinity();
        continue;
      }
      centre_in_group(i, k, centred, buffer);
      term = args.metric == Metric::euclidean
                 ? (float)((chunk.reference - norms[k] * norms[k] / 2) * unit)
                 : 0.0f;
      d8 error{};
      for (int64_t d = 0; d < part(); d += 8) {
        const d8 scaled = load<d8>(centred + d) * chunk.scale;
        const i32x8 upper = nearest_bfloat16(scaled);
        d8 e = scaled - widen((f8)upper);
        write(out, j, d, upper);
        if (form == Form::pairs) {
          const i32x8 lower = nearest_bfloat16(e);
          e -= widen((f8)lower);
          write(out, j, part() + d, lower);
          write(out, j, 2 * part() + d, upper);
        }
        error += e * e;
      }
      const double norm = std::sqrt(sum(error)) / chunk.scale;
      worst = norm > worst ? norm : worst;
    }
    worst = worst * inflate + lost() / chunk.scale;
    if (worst > chunk.max_residual) chunk.max_residual = worst;
  }

  // What the numbers too small for a bfloat16 add to the norm of a residual.
  double lost() const { return (double)width * 0x1p-125; }

  // Numbers d to d + 7, as far as they are of the same part, of code j of a packed tile.
  void write(int16_t* out, int j, int64_t d, i32x8 values) const {
    int16_t q[8];
    store(q, __builtin_convertvector(values >> 16, i16x8));
    const int64_t left = part() - d % part();
    for (int64_t p = 0; p < 8 && p < left; p += 2)
      store(out + (d + p) * tile_codes + 2 * j, load<int32_t>(q + p));
  }
};

}  // namespace mmfast::MMFAST_ISA
