// Rows against the groups of codes that the triangle inequality leaves: no code of a group can be
// nearer than |x - centre| less the group's radius. Rows are sorted by their nearest centre, so
// that those of a tile need the same groups.
#pragma once
#include "cpu/nearest_code_rows.h"

namespace mmfast::MMFAST_ISA {

template <class T>
struct Pruned {
  RowScreen<T> screen;
  const int64_t groups, stride, width;
  int64_t block_rows;
  Tile* tile = nullptr;
  int16_t* packed = nullptr;  // [tile_rows][depth]
  float* x = nullptr;         // [tile_rows][D] less the mean
  float* dots = nullptr;      // [tile_rows][stride] with the centres
  float* gaps = nullptr;      // [tile_rows][stride] no code of the group is nearer than this
  float* squares = nullptr;   // [stride] |centre|^2
  float* radii = nullptr;     // [stride]
  int32_t* order = nullptr;   // [block_rows]
  int32_t* nearest = nullptr;  // [block_rows] group
  double* row_squares = nullptr;    // [block_rows]
  int32_t* starts = nullptr;  // [groups + 1]

  Pruned(const NearestCodeArgs& args, const Exact<T>& exact, const Codebook<T>& codebook,
         int64_t rows)
      : screen(args, exact, codebook),
        groups(codebook.num_chunks),
        stride(codebook.centre_stride),
        width(codebook.width),
        block_rows(rows) {}
  ~Pruned() {
    for (void* p : {(void*)tile, (void*)packed, (void*)x, (void*)dots, (void*)gaps,
                    (void*)squares, (void*)radii, (void*)order, (void*)nearest, (void*)row_squares,
                    (void*)starts})
      std::free(p);
  }

  static int64_t rows_per_block(int64_t rows, int threads) {
    const int64_t share = (rows + 2 * threads - 1) / (2 * threads);
    return share < 8192 ? share : 8192;
  }

  bool allocate() {
    const size_t n = (size_t)block_rows, s = (size_t)stride;
    tile = (Tile*)std::aligned_alloc(64, sizeof(Tile));
    packed = (int16_t*)std::malloc((size_t)(tile_rows * screen.depth) * 2);
    x = (float*)std::calloc((size_t)(tile_rows * width), sizeof(float));
    dots = (float*)std::malloc(tile_rows * s * sizeof(float));
    gaps = (float*)std::malloc(tile_rows * s * sizeof(float));
    squares = (float*)std::calloc(s, sizeof(float));
    radii = (float*)std::calloc(s, sizeof(float));
    order = (int32_t*)std::malloc(n * sizeof(int32_t));
    nearest = (int32_t*)std::malloc(n * sizeof(int32_t));
    row_squares = (double*)std::malloc(n * sizeof(double));
    starts = (int32_t*)std::malloc((size_t)(groups + 1) * sizeof(int32_t));
    if (!tile || !packed || !x || !dots || !gaps || !squares || !radii || !order || !nearest ||
        !row_squares || !starts || !screen.allocate())
      return false;
    for (int64_t g = 0; g < groups; ++g) {
      const double norm = screen.codebook.chunks[g].centre_norm / inflate;
      squares[g] = (float)(norm * norm);
      radii[g] = (float)(screen.codebook.chunks[g].max_norm * inflate);
    }
    return true;
  }

  bool run(int64_t begin, int64_t end, bool) {
    const int64_t n = end - begin;
    for (int64_t i = 0; i < n; i += tile_rows) {
      const int64_t m = n - i < tile_rows ? n - i : tile_rows;
      int32_t rows[tile_rows];
      for (int r = 0; r < m; ++r) {
        rows[r] = (int32_t)(i + r);
        row_squares[i + r] = screen.square(read_row<T>(screen.args.x, begin + i + r, screen.x));
      }
      load_rows(begin, rows, m);
      measure();
      for (int r = 0; r < m; ++r) nearest[i + r] = nearest_group(r);
    }
    sort(n);
    for (int64_t i = 0; i < n; i += tile_rows)
      run_tile(begin, order + i, n - i < tile_rows ? n - i : tile_rows);
    return true;
  }

  void load_rows(int64_t begin, const int32_t* rows, int64_t n) {
    for (int64_t r = 0; r < n; ++r) {
      const T* v = read_row<T>(screen.args.x, begin + rows[r], screen.x);
      for (int64_t d = 0; d < width; ++d) x[r * width + d] = (float)screen.value(v, d);
    }
  }

  // dots: products of the tile's rows with all centres.
  void measure() {
    const float* centres = screen.codebook.centres;
    for (int64_t g = 0; g < stride; g += lanes) {
      vf total[tile_rows][4]{};
      int64_t d = 0;
      for (; d + 4 <= width; d += 4)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const vf c = load<vf>(centres + (d + j) * stride + g);
#pragma GCC unroll 8
          for (int r = 0; r < tile_rows; ++r)
            total[r][j] = fma(vf{} + x[r * width + d + j], c, total[r][j]);
        }
      for (; d < width; ++d) {
        const vf c = load<vf>(centres + d * stride + g);
#pragma GCC unroll 8
        for (int r = 0; r < tile_rows; ++r)
          total[r][0] = fma(vf{} + x[r * width + d], c, total[r][0]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < tile_rows; ++r)
        store(dots + r * stride + g,
              (total[r][0] + total[r][1]) + (total[r][2] + total[r][3]));
    }
  }

  int32_t nearest_group(int r) const {
    int32_t best = 0;
    float least = std::numeric_limits<float>::infinity();
    for (int64_t g = 0; g < groups; ++g) {
      const float distance = squares[g] - 2 * dots[r * stride + g];
      if (distance < least) {
        least = distance;
        best = (int32_t)g;
      }
    }
    return best;
  }

  // Counting sort of the block's rows by their nearest group.
  void sort(int64_t n) {
    std::memset(starts, 0, (size_t)(groups + 1) * sizeof(int32_t));
    for (int64_t i = 0; i < n; ++i) ++starts[nearest[i] + 1];
    for (int64_t g = 0; g < groups; ++g) starts[g + 1] += starts[g];
    for (int64_t i = 0; i < n; ++i) order[starts[nearest[i]]++] = (int32_t)i;
  }

  void run_tile(int64_t begin, const int32_t* rows, int64_t n) {
    screen.start(*tile, begin, rows, n, row_squares, nullptr, packed);
    // Distances to centres are float32, which the squares of such rows would leave.
    for (int r = 0; r < n; ++r) tile->exact[r] |= row_squares[rows[r]] > 1e30;
    load_rows(begin, rows, n);
    measure();
    d8 square{};
    for (int r = 0; r < n; ++r) {
      double total = 0;
      for (int64_t d = 0; d < width; ++d) total += (double)x[r * width + d] * x[r * width + d];
      square[r] = total;
      find_gaps(r, (float)total, (float)tile->norm[r]);
    }
    for (int r = 0; r < n; ++r) visit(begin, nearest[rows[r]]);
    float reach[tile_rows];
    find_reach(square, reach);
    for (int64_t g = 0; g < groups; g += lanes) {
      uint32_t left = 0;
      for (int r = 0; r < n; ++r)
        left |= le(load<vf>(gaps + r * stride + g), vf{} + reach[r]);
      for (; left; left &= left - 1) {
        const int64_t group = g + __builtin_ctz(left);
        bool needed = false;
        for (int r = 0; r < n; ++r) needed |= gaps[r * stride + group] <= reach[r];
        if (!needed) continue;
        visit(begin, group);
        find_reach(square, reach);
      }
    }
    screen.resolve(*tile, begin, packed);
  }

  // gaps: lower bounds of |x - centre| - radius.
  void find_gaps(int r, float square, float norm) {
    // Rounding of the product, of the squares and of the sum.
    const float relative = (float)(2 * screen.dot_error() * norm), absolute = 0x1p-21f * square;
    for (int64_t g = 0; g < stride; g += lanes) {
      const vf c = load<vf>(squares + g);
      vf distance = square + c - 2 * load<vf>(dots + r * stride + g);
      distance -= relative * sqrt(c) + absolute + 0x1p-21f * c;
      distance = distance > 0 ? distance : vf{};
      store(gaps + r * stride + g, sqrt(distance) - load<vf>(radii + g));
    }
    for (int64_t g = groups; g < stride; ++g)
      gaps[r * stride + g] = std::numeric_limits<float>::infinity();
  }

  // reach: upper bounds of the distance to the nearest code.
  void find_reach(d8 square, float* reach) const {
    for (int r = 0; r < tile_rows; ++r) {
      if (!tile->screened(r)) {
        reach[r] = -std::numeric_limits<float>::infinity();
        continue;
      }
      const double distance = square[r] * (1 + 0x1p-40) - 2 * tile->lower[r];
      reach[r] = (float)(std::sqrt(distance > 0 ? distance : 0) * (1 + 0x1p-20)) + 1e-30f;
    }
  }

  // Compares the tile with a group, once.
  void visit(int64_t begin, int64_t group) {
    if (gaps[group] == std::numeric_limits<float>::infinity()) return;
    d8 offset{};
    for (int r = 0; r < tile_rows; ++r) {
      offset[r] = (double)dots[r * stride + group];
      gaps[r * stride + group] = std::numeric_limits<float>::infinity();
    }
    offset -= screen.codebook.chunks[group].reference;
    screen.screen(*tile, begin, packed, group, offset);
  }
};

}  // namespace mmfast::MMFAST_ISA
