// Signs and losses in one pass over the rows, by blocks whose sums are added in their order; the
// means of the groups' distributions in another, by slices of rows that do not depend on the
// threads.
#pragma once
#include <atomic>
#include <cstdlib>

#include "cpu/bit_products.h"
#include "cpu/blocks_past_cache.h"
#include "cpu/lookup_free_quantize.h"
#include "cpu/past_cache.h"
#include "cpu/row_blocks.h"
#include "cpu/sixteen.h"

namespace mmfast::MMFAST_ISA {

template <class T>
struct LookupFree {
  using V = typename Sixteen<T>::V;
  static constexpr double least_norm = 1e-12;
  static constexpr T most_logit = sizeof(T) == 4 ? 100 : 700;  // exp of its opposite is as good as 0
  static constexpr int64_t flushed = 1024;  // rows that are summed in T

  const LookupFreeQuantizeArgs& args;
  const int64_t width, bits;
  const double s;     // entries of the codes
  const T to_logit;   // logits of the bits, over the (normalised) numbers
  const Halves half;
  const int64_t groups;  // C B / g
  int64_t slices = 1, slice_rows = 0;
  double inside = 0;             // vectors that count
  double* parts = nullptr;       // [blocks][2], sums of squares and entropies
  double* tables = nullptr;      // [slices][groups][heights][lanes]
  T *table = nullptr, *turned = nullptr;  // backward: [groups][heights][lanes], and lanes first
  std::atomic<bool> failed{false};

  explicit LookupFree(const LookupFreeQuantizeArgs& a)
      : args(a),
        width(a.z.width),
        bits(a.z.width / a.codebooks),
        s(a.spherical ? a.scale / __builtin_sqrt((double)bits) : a.scale),
        to_logit((T)(4 * a.inv_temperature * s)),
        half(a.group),
        groups(a.group ? a.z.width / a.group : 0) {
    int64_t counted = a.mask ? 0 : a.z.count;
    for (int64_t i = 0; a.mask && i < a.z.count; ++i) counted += a.mask[i];
    inside = (double)counted;
    if (inside < 1) inside = 1;
  }
  LookupFree(const LookupFree&) = delete;
  ~LookupFree() {
    std::free(parts);
    std::free(tables);
    std::free(table);
    std::free(turned);
  }

  int64_t cells() const { return half.heights * half.lanes; }

  // One over the norm of `bits` numbers, which counts as least_norm at least.
  static double inverse_norm(const T* z, int64_t bits, bool* moving = nullptr) {
    double total = 0;
    for (int64_t i = 0; i < bits; ++i) total += (double)z[i] * (double)z[i];
    const double norm = __builtin_sqrt(total);
    if (moving) *moving = !(norm <= least_norm);
    return 1 / (norm < least_norm ? least_norm : norm);
  }

  // Those rows of z [rows][width] that count, normalised: in place where nothing changes, else in
  // out. Their number to counted.
  const T* vectors(const T* z, int64_t first, int64_t rows, T* out, int64_t* counted) const {
    *counted = rows;
    if (!args.mask && !args.spherical) return z;
    T* to = out;
    for (int64_t i = 0; i < rows; ++i, z += width) {
      if (args.mask && !args.mask[first + i]) continue;
      for (int64_t c = 0; c < width; c += bits, to += bits) {
        const T factor = args.spherical ? (T)(args.scale * inverse_norm(z + c, bits)) : (T)1;
        for (int64_t d = 0; d < bits; ++d) to[d] = z[c + d] * factor;
      }
    }
    *counted = (to - out) / width;
    return out;
  }

  static V bounded(V logit) {
    const V below = logit > most_logit ? V{} + most_logit : logit;
    return below < -most_logit ? V{} - most_logit : below;
  }

  bool forward(const Parallel& parallel) {
    const int64_t blocks = blocks_of(args.z.count);
    parts = (double*)std::calloc((size_t)(2 * blocks + 1), sizeof(double));
    if (!parts) return false;
    for_blocks_past_cache(
        blocks, [this](int64_t block) { signs(block); }, parallel);
    double square = 0, entropy = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      square += parts[2 * b];
      entropy += parts[2 * b + 1];
    }
    *(T*)args.commitment = (T)(square / inside / (double)width);
    *(T*)args.entropy = (T)(entropy / inside / (double)args.codebooks);
    return !failed && (!args.group || means(parallel));
  }

  void signs(int64_t block) {
    const auto [begin, end] = block_of(block, args.z.count);
    const int64_t rows = end - begin, count = rows * width;
    T* buffer = allocate<T>(3 * count + 16);
    // A bit for each number, the last one's first.
    uint16_t* positive = allocate<uint16_t>(count / 16 + 8);
    if (!buffer || !positive) {
      std::free(buffer);
      std::free(positive);
      failed = true;
      return;
    }
    const T* z = read_rows(args.z, begin, rows, buffer);
    const bool direct = size_of(args.z.dtype) == sizeof(T);
    char* target = args.quantized + begin * width * size_of(args.z.dtype);
    T* out = direct ? (T*)target : buffer + count;
    const V up = V{} + (T)s;
    const int64_t last = (count - 1) / 16;
    const bool past_cache = direct && (uintptr_t)out % sizeof(V) == 0 &&
                            args.z.count * width * (int64_t)sizeof(T) >= past_cache_from;
    int64_t e = 0;
    for (; e + 16 <= count; e += 16) {
      const V v = load<V>(z + e), sign = v > 0 ? up : -up;
      if (past_cache)
        store_past_cache(out + e, sign);
      else
        store(out + e, sign);
      positive[last - e / 16] = (uint16_t)above_zero(backwards(v));
    }
    if (e < count) {
      const V v = load_some(z + e, count - e);
      store_some(out + e, v > 0 ? up : -up, count - e);
      positive[0] = (uint16_t)above_zero(backwards(v));
    }
    if (!direct) write_numbers(target, args.z.dtype, out, count);
    write_indices(z, (const char*)positive, 16 * (last + 1), rows,
                  args.indices + begin * args.codebooks);
    std::free(positive);
    if (args.group) {
      int64_t counted;
      const T* x = vectors(z, begin, rows, buffer + 2 * count, &counted);
      losses(x, counted * width, parts + 2 * block);
    }
    std::free(buffer);
  }

  // The first bit of a code is the highest of its index. positive: `all` bits and 8 spare bytes.
  void write_indices(const T* z, const char* positive, int64_t all, int64_t rows,
                     int64_t* indices) const {
    const int64_t codes = rows * args.codebooks;
    if (bits > 57) {  // more than eight bytes hold wherever they begin
      for (int64_t c = 0; c < codes; ++c, z += bits) {
        int64_t index = 0;
        for (int64_t d = 0; d < bits; ++d) index = 2 * index + (z[d] > 0);
        indices[c] = index;
      }
      return;
    }
    const uint64_t mask = ((uint64_t)1 << bits) - 1;
    for (int64_t c = 0, at = all - bits; c < codes; ++c, at -= bits)
      indices[c] = (int64_t)(load<uint64_t>(positive + at / 8) >> at % 8 & mask);
  }

  void losses(const T* x, int64_t count, double* out) const {
    const V up = V{} + (T)s;
    for (int64_t e = 0; e < count; e += 16) {
      V v = load_some(x + e, count - e);
      V difference = v - (v > 0 ? up : -up);
      const V logit = bounded(v * to_logit), size = absolute(logit);
      const V p = exp_below(-size);
      V value = log_one_plus(p) + size * p / (p + 1);
      for (int64_t i = count - e; i < 16; ++i) difference[i] = value[i] = 0;
      out[0] += sum_of(difference * difference);
      out[1] += sum_of(value);
    }
  }

  // Probabilities of one and of zero, [width][bit_tile] each, of vectors x [rows][width].
  void probabilities(const T* x, int64_t rows, T* p, T* q) const {
    for (int64_t d = 0; d < width; ++d)
      for (int64_t r = 0; r < bit_tile; r += 16) {
        V v{};
        for (int64_t i = 0; i < 16 && r + i < rows; ++i) v[i] = x[(r + i) * width + d];
        const V logit = v * to_logit, e = exp_below(-absolute(logit)), large = 1 / (e + 1);
        const V small = e * large;
        const auto positive = logit > 0;
        V one = positive ? large : small, zero = positive ? small : large;
        one = logit != logit ? logit : one;
        zero = logit != logit ? logit : zero;
        store(p + d * bit_tile + r, one);
        store(q + d * bit_tile + r, zero);
      }
  }

  bool means(const Parallel& parallel) {
    const int64_t all = groups * cells();
    slices = (args.z.count + 2047) / 2048;
    const int64_t room = ((int64_t)1 << 19) / all;
    if (slices > room) slices = room;
    if (slices < 1) slices = 1;
    slice_rows = ((args.z.count + slices - 1) / slices + bit_tile - 1) / bit_tile * bit_tile;
    tables = (double*)std::calloc((size_t)(slices * all), sizeof(double));
    if (!tables) return false;
    for_blocks(
        slices, [this](int64_t slice) { slice_of_means(slice); }, parallel);
    if (failed) return false;
    const int64_t used = (int64_t)1 << half.lower, codes = (int64_t)1 << args.group;
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t k = 0; k < codes; ++k) {
        double total = 0;
        for (int64_t i = 0; i < slices; ++i)
          total += tables[(i * groups + g) * cells() + k / used * half.lanes + k % used];
        ((T*)args.means)[g * codes + k] = (T)(total / inside);
      }
    return true;
  }

  void slice_of_means(int64_t slice) {
    const int64_t begin = slice * slice_rows;
    const int64_t end = begin + slice_rows < args.z.count ? begin + slice_rows : args.z.count;
    double* total = tables + slice * groups * cells();
    T* buffer = allocate<T>(2 * bit_tile * width);
    T* p = allocate<T>(2 * bit_tile * width);
    T* u = allocate<T>(bit_tile * (half.heights + half.lanes));
    T* sums = (T*)std::calloc((size_t)(groups * cells()), sizeof(T));
    if (buffer && p && u && sums) {
      T *q = p + bit_tile * width, *v = u + bit_tile * half.heights;
      for (int64_t i = begin; i < end; i += bit_tile) {
        const int64_t rows = end - i < bit_tile ? end - i : bit_tile;
        int64_t counted;
        const T* z = read_rows(args.z, i, rows, buffer);
        const T* x = vectors(z, i, rows, buffer + bit_tile * width, &counted);
        probabilities(x, counted, p, q);
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t bit = g * args.group * bit_tile, low = bit + half.upper * bit_tile;
          by_code(p + bit, q + bit, half.upper, u);
          by_row(p + low, q + low, half.lower, half.lanes, v);
          add_products(u, v, half, counted, sums + g * cells());
        }
        if ((i - begin) % flushed == flushed - bit_tile || i + bit_tile >= end)
          for (int64_t k = 0; k < groups * cells(); ++k) {
            total[k] += (double)sums[k];
            sums[k] = 0;
          }
      }
    } else {
      failed = true;
    }
    std::free(buffer);
    std::free(p);
    std::free(u);
    std::free(sums);
  }

  // The gradients of the means, without what they have in common: probabilities sum to one.
  bool take_table(const T* means) {
    const int64_t used = (int64_t)1 << half.lower, codes = (int64_t)1 << args.group;
    table = allocate<T>(groups * cells());
    turned = allocate<T>(groups * half.lanes * (half.heights < 16 ? 16 : half.heights));
    if (!table || !turned) return false;
    const int64_t across = half.heights < 16 ? 16 : half.heights;
    std::memset(table, 0, (size_t)(groups * cells()) * sizeof(T));
    std::memset(turned, 0, (size_t)(groups * half.lanes * across) * sizeof(T));
    for (int64_t g = 0; g < groups; ++g) {
      double common = 0;
      for (int64_t k = 0; k < codes; ++k) common += (double)means[g * codes + k];
      common /= (double)codes;
      for (int64_t k = 0; k < codes; ++k) {
        const T value = (T)((double)means[g * codes + k] - common);
        const int64_t h = k / used, l = k % used;
        table[g * cells() + h * half.lanes + l] = value;
        turned[(g * half.lanes + l) * across + h] = value;
      }
    }
    return true;
  }

  bool backward(const LookupFreeQuantizeBwdArgs& bwd, const Parallel& parallel) {
    if (bwd.means && !take_table((const T*)bwd.means)) return false;
    for_blocks(
        blocks_of(args.z.count), [&](int64_t block) { gradients(block, bwd); }, parallel);
    return !failed;
  }

  void gradients(int64_t block, const LookupFreeQuantizeBwdArgs& bwd) {
    const auto [begin, end] = block_of(block, args.z.count);
    const int64_t rows = end - begin, count = rows * width;
    T* buffer = allocate<T>(4 * count + 16);
    if (!buffer) {
      failed = true;
      return;
    }
    T *x_buffer = buffer + count, *out = buffer + 2 * count;
    const T* z = read_rows(args.z, begin, rows, buffer);
    std::memset(out, 0, (size_t)count * sizeof(T));
    if (args.group) {
      int64_t counted;
      const T* x = vectors(z, begin, rows, x_buffer, &counted);
      if (bwd.means && !through_means(x, counted, out)) failed = true;
      through_losses(x, counted * width, bwd, out);
      if (args.mask) spread(begin, rows, counted, out);
    }
    if (bwd.quantized.data) {
      const T* grad = read_rows(bwd.quantized, begin, rows, buffer + 3 * count);
      for (int64_t e = 0; e < count; ++e) out[e] += grad[e];
    }
    if (args.spherical)
      for (int64_t e = 0; e < count; e += bits) through_norm(z + e, out + e);
    write_dense(bwd.result + begin * width * size_of(args.z.dtype), out, count);
    std::free(buffer);
  }

  void write_dense(char* target, const T* values, int64_t count) const {
    if (size_of(args.z.dtype) == sizeof(T))
      std::memcpy(target, values, (size_t)count * sizeof(T));
    else
      write_numbers(target, args.z.dtype, values, count);
  }

  // out, of the rows that count, to the places of these rows; zeros to the others.
  void spread(int64_t begin, int64_t rows, int64_t counted, T* out) const {
    for (int64_t i = rows - 1; i >= 0; --i) {
      T* to = out + i * width;
      if (args.mask[begin + i])
        std::memmove(to, out + --counted * width, (size_t)width * sizeof(T));
      else
        std::memset(to, 0, (size_t)width * sizeof(T));
    }
  }

  // Adds what comes by the commitment and the entropy.
  void through_losses(const T* x, int64_t count, const LookupFreeQuantizeBwdArgs& bwd,
                      T* out) const {
    const V up = V{} + (T)s;
    const T of_square = (T)(bwd.commitment * 2 / inside / (double)width);
    const T of_entropy = (T)(bwd.entropy / inside / (double)args.codebooks) * to_logit;
    for (int64_t e = 0; e < count; e += 16) {
      const V v = load_some(x + e, count - e), logit = bounded(v * to_logit);
      const V p = exp_below(-absolute(logit)), one = p + 1;
      V sum = load_some(out + e, count - e);
      sum += of_square * (v - (v > 0 ? up : -up));
      sum -= of_entropy * logit * p / (one * one);
      store_some(out + e, sum, count - e);
    }
  }

  bool through_means(const T* x, int64_t rows, T* out) const {
    const int64_t across = half.heights < 16 ? 16 : half.heights;
    T* p = allocate<T>(2 * bit_tile * width);
    T* u = allocate<T>(bit_tile * (half.heights + 2 * half.lanes + across));
    T* by_height = allocate<T>(bit_tile * half.lanes);
    const bool fits = p && u && by_height;
    if (fits) {
      T *q = p + bit_tile * width, *v = u + bit_tile * half.heights;
      T *gv = v + bit_tile * half.lanes, *gu = gv + bit_tile * half.lanes;
      const T factor = to_logit / (T)inside;
      for (int64_t i = 0; i < rows; i += bit_tile) {
        const int64_t tile = rows - i < bit_tile ? rows - i : bit_tile;
        probabilities(x + i * width, tile, p, q);
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t bit = g * args.group * bit_tile, low = bit + half.upper * bit_tile;
          by_code(p + bit, q + bit, half.upper, u);
          by_row(p + low, q + low, half.lower, half.lanes, v);
          times_table(u, half.heights, table + g * cells(), half.lanes, gv);
          if (half.upper) {
            by_code(p + low, q + low, half.lower, by_height);
            times_table(by_height, (int64_t)1 << half.lower, turned + g * half.lanes * across,
                        across, gu);
          }
          for (int64_t r = 0; r < tile; ++r) {
            T ones[64];
            T *wv = gv + r * half.lanes, *wu = gu + r * across;
            for (int64_t k = 0; k < half.lanes; ++k) wv[k] *= v[r * half.lanes + k];
            for (int64_t k = 0; k < half.heights; ++k)
              if (half.upper) wu[k] *= u[k * bit_tile + r];
            if (half.upper) sums_of_bits(wu, half.upper, ones);
            const T total = sums_of_bits(wv, half.lower, ones + half.upper);
            T* to = out + (i + r) * width + g * args.group;
            for (int64_t d = 0; d < args.group; ++d)
              to[d] += factor * (ones[d] - p[bit + d * bit_tile + r] * total);
          }
        }
      }
    }
    std::free(p);
    std::free(u);
    std::free(by_height);
    return fits;
  }

  // From the gradient of a normalised vector, in place, to that of z.
  void through_norm(const T* z, T* grad) const {
    bool moving;
    const double inverse = inverse_norm(z, bits, &moving);
    double along = 0;
    for (int64_t d = 0; d < bits; ++d) along += (double)z[d] * inverse * (double)grad[d];
    if (!moving) along = 0;
    for (int64_t d = 0; d < bits; ++d)
      grad[d] = (T)(((double)grad[d] - along * (double)z[d] * inverse) * args.scale * inverse);
  }
};

static bool lookup_free_quantize(const LookupFreeQuantizeArgs& args, const Parallel& parallel) {
  return args.z.dtype == Dtype::float64 ? LookupFree<double>(args).forward(parallel)
                                        : LookupFree<float>(args).forward(parallel);
}

static bool lookup_free_quantize_bwd(const LookupFreeQuantizeBwdArgs& args,
                                     const Parallel& parallel) {
  return args.forward.z.dtype == Dtype::float64
             ? LookupFree<double>(args.forward).backward(args, parallel)
             : LookupFree<float>(args.forward).backward(args, parallel);
}

}  // namespace mmfast::MMFAST_ISA
