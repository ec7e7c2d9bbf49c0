// Every row against every chunk: a block of rows stays in cache while the chunks pass.
#pragma once
#include "cpu/nearest_code_rows.h"

namespace mmfast::MMFAST_ISA {

template <class T>
struct Dense {
  static constexpr int64_t max_block_rows = 192 / tile_rows * tile_rows;
  RowScreen<T> screen;
  int64_t block_rows;
  int64_t ahead = 0;  // rows from this block to the next, which are brought nearer
  Tile* tiles = nullptr;      // [block_rows / tile_rows]
  int16_t* packed = nullptr;  // [block_rows][depth]
  int32_t* order = nullptr;   // [block_rows]
  double* squares = nullptr;  // [block_rows]
  double* peaks = nullptr;    // [block_rows]
  int64_t screened = 0, compared = 0;  // rows so far, and codes compared in float64

  Dense(const NearestCodeArgs& args, const Exact<T>& exact, const Codebook<T>& codebook,
        int64_t rows)
      : screen(args, exact, codebook), block_rows(rows) {}
  ~Dense() {
    std::free(tiles);
    std::free(packed);
    std::free(order);
    std::free(squares);
    std::free(peaks);
  }

  static int64_t rows_per_block(int64_t rows, int threads) {
    const int64_t share = (rows + threads - 1) / threads;
    const int64_t most = share < max_block_rows ? share : max_block_rows;
    return (most + tile_rows - 1) / tile_rows * tile_rows;
  }

  bool allocate() {
    const size_t n = (size_t)block_rows;
    tiles = (Tile*)std::aligned_alloc(64, n / tile_rows * sizeof(Tile));
    packed = (int16_t*)std::malloc(n * (size_t)screen.depth * 2);
    order = (int32_t*)std::malloc(n * sizeof(int32_t));
    squares = (double*)std::malloc(n * sizeof(double));
    peaks = (double*)std::malloc(n * sizeof(double));
    return tiles && packed && order && squares && peaks && screen.allocate();
  }

  // False if the rows are too hard and may be left to another method, which then decides them all.
  bool run(int64_t begin, int64_t end, bool stay) {
    const int64_t n = end - begin, depth = screen.depth;
    screened += n;
    double low = infinity, high = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T* v = read_row<T>(screen.args.x, begin + i, screen.x);
      if (screen.bytes) {
        const auto size = screen.size(v);
        squares[i] = size.square;
        peaks[i] = size.peak;
      } else {
        squares[i] = screen.square(v);
      }
      low = squares[i] < low ? squares[i] : low;
      high = squares[i] > high ? squares[i] : high;
      order[i] = (int32_t)i;
    }
    // Rows of one tile share a scale: bring those of like norm together.
    if (!(high <= 16 * low)) sort(n);
    const int64_t count = (n + tile_rows - 1) / tile_rows;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t first = t * tile_rows;
      screen.start(tiles[t], begin, order + first, n - first < tile_rows ? n - first : tile_rows,
                   squares, peaks, packed + first * depth);
    }
    for (int64_t c = 0; c < screen.codebook.num_chunks; ++c) {
      const d8 offset = d8{} - screen.codebook.chunks[c].reference;
      for (int64_t t = 0; t < count; ++t) {
        if (c == 0) fetch(begin + ahead + t * tile_rows);
        screen.screen(tiles[t], begin, packed + t * tile_rows * depth, c, offset);
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      const int64_t certain = screen.unscreened(tiles[t]) * screen.args.codes.count;
      if (!stay && too_hard(compared + certain)) return false;
      compared += screen.resolve(tiles[t], begin, packed + t * tile_rows * screen.depth);
    }
    return true;
  }

  // Brings a tile's rows into the second-level cache.
  void fetch(int64_t first) const {
    const Rows& x = screen.args.x;
    if (first + tile_rows > x.count || x.dims != 1) return;
    for (int64_t r = first; r < first + tile_rows; ++r)
      for (int64_t at = 0; at < x.width * x.step && at < 1024; at += 64)
        __builtin_prefetch(x.row(r) + at, 0, 2);
  }

  // Whether comparing codes in float64 costs more than the screening of all of them.
  bool too_hard(int64_t compared) const {
    const int64_t width = screen.width;
    const int64_t rate = screen.bytes ? 64 : 32;
    return compared * (width + 60) / 2 > screened * screen.codebook.unique * width / rate;
  }

  // Insertion sort by exponent: a block is short.
  void sort(int64_t n) {
    for (int64_t i = 1; i < n; ++i) {
      const int32_t row = order[i];
      const int key = std::ilogb(squares[row]);
      int64_t j = i;
      for (; j > 0 && std::ilogb(squares[order[j - 1]]) > key; --j) order[j] = order[j - 1];
      order[j] = row;
    }
  }
};

}  // namespace mmfast::MMFAST_ISA
