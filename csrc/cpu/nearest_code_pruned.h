// Rows against the groups of codes that may hold the nearest one: those whose box, and the ball
// around whose centre, is no farther than the nearest code so far. Rows are sorted by their nearest
// group and by their place in it, so that those of a tile need the same groups.
#pragma once
#include "cpu/nearest_code_boxes.h"
#include "cpu/nearest_code_rows.h"

namespace mmfast::MMFAST_ISA {

template <class T>
struct Pruned {
  static constexpr int axes = Boxes<T>::axes;
  static constexpr int places = 8;  // that a group's rows are sorted by
  RowScreen<T> screen;
  const Boxes<T>& boxes;
  const int64_t width, padded, stride;
  int64_t block_rows;
  Tile* tile = nullptr;
  int16_t* packed = nullptr;   // [tile_rows][depth]
  float* x = nullptr;          // [tile_rows][padded] less the mean, and zeros
  float* squares = nullptr;    // [tile_rows][stride] of distances to boxes; infinity once visited
  float* projections = nullptr;  // [block_rows][axes]
  int32_t* order = nullptr;    // [block_rows]
  int32_t* keys = nullptr;     // [block_rows] group and place
  double* row_squares = nullptr;  // [block_rows]
  int32_t* starts = nullptr;   // [groups * places + 1]
  // Of a tile's rows:
  d8 square, slack;  // |x|^2; how far projected distances can be off
  d8 reach;          // no nearest code is farther
  float limits[tile_rows];  // nor a box of it, in squares

  Pruned(const NearestCodeArgs& args, const Exact<T>& exact, const Boxes<T>& b, int64_t rows)
      : screen(args, exact, b.codebook),
        boxes(b),
        width(b.codebook.width),
        padded(b.codebook.centre_stride),
        stride(b.stride),
        block_rows(rows) {}
  ~Pruned() {
    for (void* p : {(void*)tile, (void*)packed, (void*)x, (void*)squares, (void*)projections,
                    (void*)order, (void*)keys, (void*)row_squares, (void*)starts})
      std::free(p);
  }

  static int64_t rows_per_block(int64_t rows, int threads) {
    const int64_t share = (rows + 2 * threads - 1) / (2 * threads);
    return share < 8192 ? share : 8192;
  }

  bool allocate() {
    const size_t n = (size_t)block_rows;
    tile = (Tile*)std::aligned_alloc(64, sizeof(Tile));
    packed = (int16_t*)std::malloc((size_t)(tile_rows * screen.depth) * 2);
    x = (float*)std::calloc((size_t)(tile_rows * padded), sizeof(float));
    squares = (float*)std::malloc((size_t)(tile_rows * stride) * sizeof(float));
    projections = (float*)std::malloc(n * axes * sizeof(float));
    order = (int32_t*)std::malloc(n * sizeof(int32_t));
    keys = (int32_t*)std::malloc(n * sizeof(int32_t));
    row_squares = (double*)std::malloc(n * sizeof(double));
    starts = (int32_t*)std::malloc((size_t)(boxes.groups * places + 1) * sizeof(int32_t));
    return tile && packed && x && squares && projections && order && keys && row_squares &&
           starts && screen.allocate();
  }

  bool run(int64_t begin, int64_t end, bool) {
    const int64_t n = end - begin;
    for (int64_t i = 0; i < n; ++i) {
      const T* v = read_row<T>(screen.args.x, begin + i, screen.x);
      row_squares[i] = screen.square(v);
      load_row(v, x);
      store(projections + i * axes, screen.codebook.axes.project(x));
      keys[i] = key(projections + i * axes);
    }
    sort(n);
    for (int64_t i = 0; i < n; i += tile_rows)
      run_tile(begin, order + i, n - i < tile_rows ? n - i : tile_rows);
    return true;
  }

  void load_row(const T* v, float* out) const {
    int64_t d = 0;
    if constexpr (sizeof(T) == 4)
      for (; d + 8 <= width; d += 8) store(out + d, screen.value8(v, d));
    for (; d < width; ++d) out[d] = (float)screen.value(v, d);
  }

  int32_t key(const float* p) const {
    const int32_t group = boxes.nearest(p);
    const float middle = boxes.middles[group], half = boxes.halves[group];
    const float place = (p[0] - middle + half) * (places / 2) / half;
    return group * places + (place >= places - 1 ? places - 1 : place > 0 ? (int32_t)place : 0);
  }

  // Counting sort of the block's rows.
  void sort(int64_t n) {
    const int64_t count = boxes.groups * places;
    std::memset(starts, 0, (size_t)(count + 1) * sizeof(int32_t));
    for (int64_t i = 0; i < n; ++i) ++starts[keys[i] + 1];
    for (int64_t k = 0; k < count; ++k) starts[k + 1] += starts[k];
    for (int64_t i = 0; i < n; ++i) order[starts[keys[i]]++] = (int32_t)i;
  }

  void run_tile(int64_t begin, const int32_t* rows, int64_t n) {
    screen.start(*tile, begin, rows, n, row_squares, nullptr, packed);
    square = d8{};
    for (int r = 0; r < n; ++r) {
      // Projections are float32, which the squares of such rows would leave.
      tile->exact[r] |= row_squares[rows[r]] > 1e30;
      const T* v = read_row<T>(screen.args.x, begin + rows[r], screen.x);
      load_row(v, x + r * padded);
      square[r] = precise_square(v);
      boxes.measure(projections + rows[r] * axes, squares + r * stride);
    }
    slack = tile->norm * (2 * std::sqrt((double)axes) * screen.codebook.axes.norm * screen.dot_error()) + 1e-18;
    for (int r = 0; r < n; ++r) {
      const int64_t group = keys[rows[r]] / places;
      if (squares[group] < std::numeric_limits<float>::infinity()) visit(begin, group, true);
    }
    find_reach();
    visit_within(begin, n, 0x1p-4f);
    visit_within(begin, n, 1);
    screen.resolve(*tile, begin, packed);
  }

  // Visits the groups whose boxes are no farther than a share of the limits: near ones, which lower
  // the limits, before the others.
  void visit_within(int64_t begin, int64_t n, float share) {
    for (int64_t g = 0; g < boxes.groups; g += lanes) {
      uint32_t left = 0;
      for (int r = 0; r < n; ++r)
        left |= le(load<vf>(squares + r * stride + g), vf{} + share * limits[r]);
      for (; left; left &= left - 1) {
        const int64_t group = g + __builtin_ctz(left);
        bool needed = false;
        for (int r = 0; r < n; ++r) needed |= squares[r * stride + group] <= share * limits[r];
        if (needed && visit(begin, group, false)) find_reach();
      }
    }
  }

  // |x|^2, x less the mean and not rounded to float32.
  double precise_square(const T* v) const {
    const T* mean = screen.codebook.mean;
    d8 total{};
    int64_t d = 0;
    for (; d + 8 <= width; d += 8) {
      const d8 a = Exact<T>::wide8(v + d) - Exact<T>::wide8(mean + d);
      total += a * a;
    }
    double rest = sum(total);
    for (; d < width; ++d) {
      const double a = (double)v[d] - (double)mean[d];
      rest += a * a;
    }
    return rest;
  }

  void find_reach() {
    const d8 distance = square * (1 + 0x1p-40) - 2 * tile->lower;
    reach = sqrt(distance > 0 ? distance : d8{}) * (1 + 0x1p-20);
    const d8 far = reach * screen.codebook.axes.norm + slack;
    alignas(64) double all[8];
    store(all, far * far * (1 + 0x1p-18));
    for (int r = 0; r < tile_rows; ++r)
      limits[r] = !tile->screened(r) ? -1e30f : all[r] < 1e37 ? (float)all[r] : 1e37f;
  }

  // Compares the tile with a group, unless the ball around its codes is too far from all rows;
  // returns whether it did.
  bool visit(int64_t begin, int64_t group, bool always) {
    const float* centre = screen.codebook.centres + group * padded;
    const Chunk& chunk = screen.codebook.chunks[group];
    alignas(64) double dots[8]{};
    for (int r = 0; r < tile_rows; ++r) {
      vf total{};
      for (int64_t d = 0; d < padded; d += lanes)
        total = fma(load<vf>(x + r * padded + d), load<vf>(centre + d), total);
      dots[r] = (double)vsum(total);
      squares[r * stride + group] = std::numeric_limits<float>::infinity();
    }
    const d8 dot = load<d8>(dots);
    if (!always && !touches(dot, chunk)) return false;
    screen.screen(*tile, begin, packed, group, dot - chunk.reference);
    return true;
  }

  bool touches(d8 dot, const Chunk& chunk) const {
    const double norm = chunk.centre_norm / inflate, error = 2 * screen.dot_error() * norm;
    const d8 near = reach + chunk.max_norm;
    const d8 distance = (square + norm * norm) * (1 - 0x1p-40) - 2 * dot - error * tile->norm;
    alignas(64) double excess[8];
    store(excess, distance - near * near);
    bool any = false;
    for (int r = 0; r < tile_rows; ++r) any |= tile->screened(r) && !(excess[r] > 0);
    return any;
  }
};

}  // namespace mmfast::MMFAST_ISA
