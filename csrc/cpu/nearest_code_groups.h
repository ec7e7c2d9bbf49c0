// Groups of like codes, by repeated halving along the direction in which they spread most, so that
// a row can skip those that the triangle inequality excludes.
#pragma once
#include <cstdlib>

#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

template <class T>
struct Halving {
  const Rows& codes;
  int64_t group_codes;  // codes of a group; only the last has fewer
  int32_t* order;       // codes, rearranged so that each group is a run
  bool failed = false;

  struct Range {
    int64_t first, last;
  };

  struct Workspace {
    double* mean;
    double* axis;
    double* next;
    double* keys;
    T* buffer;
    bool allocate(int64_t width, int64_t count) {
      mean = (double*)std::malloc((size_t)(3 * width + count) * sizeof(double));
      buffer = (T*)std::malloc((size_t)width * sizeof(T));
      if (!mean || !buffer) return false;
      axis = mean + width;
      next = axis + width;
      keys = next + width;
      return true;
    }
    void release() {
      std::free(mean);
      std::free(buffer);
    }
  };

  // Splits [first, last) down to groups.
  void split(int64_t first, int64_t last) {
    const int64_t n = last - first;
    if (n <= group_codes) return;
    const int64_t groups = (n + group_codes - 1) / group_codes;
    const int64_t left = groups / 2 * group_codes;
    Workspace w{};
    if (w.allocate(codes.width, n)) {
      project(w, first, last);
      select(w.keys, order + first, n, left);
    } else {
      failed = true;
    }
    w.release();
  }

  // keys[i]: position of code order[first + i] along the axis of largest spread, which a few steps
  // of the power method on a sample approximate.
  void project(Workspace& w, int64_t first, int64_t last) {
    const int64_t width = codes.width, n = last - first;
    const int64_t step = n > 1024 ? n / 1024 : 1;
    for (int64_t d = 0; d < width; ++d) w.mean[d] = 0;
    int64_t used = 0;
    for (int64_t i = first; i < last; i += step, ++used) {
      const T* c = read_row<T>(codes, order[i], w.buffer);
      for (int64_t d = 0; d < width; ++d) w.mean[d] += (double)c[d];
    }
    for (int64_t d = 0; d < width; ++d) w.mean[d] /= (double)used;
    const T* c = read_row<T>(codes, order[first], w.buffer);
    for (int64_t d = 0; d < width; ++d) w.axis[d] = (double)c[d] - w.mean[d];
    for (int round = 0; round < 4; ++round) {
      for (int64_t d = 0; d < width; ++d) w.next[d] = 0;
      for (int64_t i = first; i < last; i += step) {
        c = read_row<T>(codes, order[i], w.buffer);
        const double along = offset(w, c);
        for (int64_t d = 0; d < width; ++d) w.next[d] += along * ((double)c[d] - w.mean[d]);
      }
      double square = 0;
      for (int64_t d = 0; d < width; ++d) square += w.next[d] * w.next[d];
      if (!(square > 0) || !(square < 1e300)) break;
      const double factor = 1 / std::sqrt(square);
      for (int64_t d = 0; d < width; ++d) w.axis[d] = w.next[d] * factor;
    }
    for (int64_t i = 0; i < n; ++i) w.keys[i] = offset(w, read_row<T>(codes, order[first + i], w.buffer));
  }

  double offset(const Workspace& w, const T* c) const {
    const int64_t width = codes.width;
    d8 total{};
    int64_t d = 0;
    for (; d + 8 <= width; d += 8) {
      d8 v;
      for (int j = 0; j < 8; ++j) v[j] = (double)c[d + j];
      total += (v - load<d8>(w.mean + d)) * load<d8>(w.axis + d);
    }
    double rest = sum(total);
    for (; d < width; ++d) rest += ((double)c[d] - w.mean[d]) * w.axis[d];
    return rest;
  }

  // Rearranges keys and ids so that the `left` smallest keys come first.
  static void select(double* keys, int32_t* ids, int64_t n, int64_t left) {
    int64_t low = 0, high = n - 1;
    while (low < high) {
      const double pivot = keys[low + (high - low) / 2];
      int64_t i = low, j = high;
      while (i <= j) {
        while (keys[i] < pivot) ++i;
        while (keys[j] > pivot) --j;
        if (i > j) break;
        const double key = keys[i];
        keys[i] = keys[j];
        keys[j] = key;
        const int32_t id = ids[i];
        ids[i++] = ids[j];
        ids[j--] = id;
      }
      if (left <= j)
        high = j;
      else if (left >= i)
        low = i;
      else
        return;
    }
  }

  // Level by level, the ranges of a level side by side.
  bool run(int64_t count, const Parallel& parallel) {
    Range* ranges = (Range*)std::malloc((size_t)(count / group_codes + 2) * 2 * sizeof(Range));
    if (!ranges) return false;
    Range* next = ranges + count / group_codes + 2;
    int64_t n = 1;
    ranges[0] = {0, count};
    Range* now = ranges;
    for (bool more = true; more;) {
      struct Context {
        Halving& halving;
        const Range* ranges;
      } context{*this, now};
      parallel.run(
          n,
          [](void* opaque, int64_t begin, int64_t end) {
            Context& c = *(Context*)opaque;
            for (int64_t i = begin; i < end; ++i) c.halving.split(c.ranges[i].first, c.ranges[i].last);
          },
          &context);
      int64_t made = 0;
      more = false;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t size = now[i].last - now[i].first;
        if (size <= group_codes) {
          next[made++] = now[i];
          continue;
        }
        const int64_t left = (size + group_codes - 1) / group_codes / 2 * group_codes;
        next[made++] = {now[i].first, now[i].first + left};
        next[made++] = {now[i].first + left, now[i].last};
        more = true;
      }
      Range* t = now;
      now = next;
      next = t;
      n = made;
    }
    std::free(ranges);
    return !failed;
  }
};

}  // namespace mmfast::MMFAST_ISA
