// Groups of like codes, by repeated halving along the axis in which they spread most, so that a row
// can skip those that are too far.
#pragma once
#include <cstdlib>

#include "cpu/nearest_code_axes.h"
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

struct Halving {
  const float* places;  // [code][Axes::count] along the axes
  int64_t group_codes;  // codes of a group; only the last has fewer
  int32_t* order;       // codes, rearranged so that each group is a run
  float* keys;          // as many

  struct Range {
    int64_t first, last;
  };

  // Splits [first, last) in two runs of whole groups, if it has more than one.
  void split(int64_t first, int64_t last) const {
    const int64_t n = last - first;
    if (n <= group_codes) return;
    const int axis = widest(first, last);
    for (int64_t i = first; i < last; ++i) keys[i] = places[(int64_t)order[i] * Axes::count + axis];
    select(keys + first, order + first, n, left(n));
  }

  // Of the codes of n, those of the first run.
  int64_t left(int64_t n) const { return (n + group_codes - 1) / group_codes / 2 * group_codes; }

  // The axis of the largest variance in a sample.
  int widest(int64_t first, int64_t last) const {
    const int64_t step = last - first > 1024 ? (last - first) / 1024 : 1;
    d8 total{}, squares{};
    double count = 0;
    const d8 start = load_wide(places + (int64_t)order[first] * Axes::count);
    for (int64_t i = first; i < last; i += step, ++count) {
      const d8 p = load_wide(places + (int64_t)order[i] * Axes::count) - start;
      total += p;
      squares += p * p;
    }
    const d8 variance = squares * count - total * total;
    int best = 0;
    for (int a = 1; a < Axes::count; ++a) best = variance[a] > variance[best] ? a : best;
    return best;
  }

  // Rearranges keys and ids so that the `left` smallest keys come first.
  static void select(float* keys, int32_t* ids, int64_t n, int64_t left) {
    int64_t low = 0, high = n - 1;
    while (low < high) {
      const float pivot = keys[low + (high - low) / 2];
      int64_t i = low, j = high;
      while (i <= j) {
        while (keys[i] < pivot) ++i;
        while (keys[j] > pivot) --j;
        if (i > j) break;
        const float key = keys[i];
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
  bool run(int64_t count, const Parallel& parallel) const {
    const int64_t most = count / group_codes + 2;
    Range* ranges = (Range*)std::malloc((size_t)most * 2 * sizeof(Range));
    if (!ranges) return false;
    Range *now = ranges, *next = ranges + most;
    int64_t n = 1;
    now[0] = {0, count};
    for (bool more = true; more;) {
      struct Context {
        const Halving& halving;
        const Range* ranges;
      } context{*this, now};
      parallel.run(
          n,
          [](void* opaque, int64_t begin, int64_t end) {
            const Context& c = *(const Context*)opaque;
            for (int64_t i = begin; i < end; ++i)
              c.halving.split(c.ranges[i].first, c.ranges[i].last);
          },
          &context);
      int64_t made = 0;
      more = false;
      for (int64_t i = 0; i < n; ++i) {
        const Range range = now[i];
        if (range.last - range.first <= group_codes) {
          next[made++] = range;
          continue;
        }
        const int64_t middle = range.first + left(range.last - range.first);
        next[made++] = {range.first, middle};
        next[made++] = {middle, range.last};
        more = true;
      }
      Range* t = now;
      now = next;
      next = t;
      n = made;
    }
    std::free(ranges);
    return true;
  }
};

}  // namespace mmfast::MMFAST_ISA
