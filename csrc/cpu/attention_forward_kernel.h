// Attention without its matrix: scores of 64 queries and a chunk of keys at a time, softmax as the
// chunks come (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et
// al., "FlashAttention", 2022).
//
// Lanes are queries: scores lie [key][query], outputs [Ev][query], so that keys and values are read
// in rows as they are, one number at a time, and only queries and outputs are transposed. A query's
// largest score and sum stay in its lane, and nothing about one query depends on those beside it,
// nor on how many threads there are. Only where they are few (attention_few_queries.h), all go
// another way.
//
// A task is up to 256 queries, of all heads that share a key head, and packs each chunk of keys and
// values once for them. Memory: (E + Ev) (256 + 256) numbers and some 100 KB for each thread,
// whatever the lengths.
#pragma once
#include <atomic>
#include <cstdlib>

#include "cpu/attention_few_queries.h"
#include "cpu/attention_limits.h"
#include "cpu/attention_softmax.h"
#include "cpu/workspace.h"

namespace mmfast::MMFAST_ISA {

template <class Kind>
struct AttentionForward {
  using T = typename Kind::Number;
  using V = typename Kind::V;
  using Element = typename Kind::Element;
  using Few = FewQueries<std::conditional_t<Kind::numbers == 2, Singles, Kind>>;
  // Rows of a key head, at most, that FewQueries takes. Vectors of pairs pay from five on.
  static constexpr int64_t few = Kind::numbers == 2 ? 4 : Few::most;
  static constexpr int64_t block = attention_block, most_blocks = 4;
  static constexpr int64_t chunk = 4 * block;  // keys
  static constexpr int64_t per = sizeof(V) / sizeof(T);
  static constexpr T infinity = __builtin_inf();

  const AttentionArgs& args;
  const int64_t group, depth;  // heads of a key head; elements of a query
  const bool adds;             // numbers of a mask
  const bool scales;           // scores are multiplied by scale before anything else
  const T unit;                // of scores, else
  const bool drops;
  const Random random;
  int64_t blocks;              // of a task
  int64_t* firsts = nullptr;   // [batches + 1], the tasks of each
  std::atomic<bool> failed{false};

  static constexpr double log2e = 1.4426950408889634;

  explicit AttentionForward(const AttentionArgs& a)
      : args(a),
        group(a.key_heads ? a.heads / a.key_heads : 0),
        depth(elements_of<Kind>(a.width)),
        adds(a.mask.data && a.mask.additive),
        scales(adds || a.scale == 0),
        unit(scales ? 1 : (T)__builtin_fabs(a.scale)),
        drops(a.dropout > 0),
        random(a.seed, a.offset) {}
  AttentionForward(const AttentionForward&) = delete;
  ~AttentionForward() { std::free(firsts); }

  // What a thread works with.
  struct Memory {
    Element* queries;  // [blocks][depth][block]
    T* sums;           // [blocks][Ev][block], of values
    Element* keys;     // [chunk][depth]
    Element* values;   // [chunk][Ev]
    T* scores;         // [chunk][block], and probabilities
    Element* pairs;    // [chunk / 2][block], probabilities as pairs
    T* added;          // [chunk][block]
    T* few;            // of few queries
    void* all = nullptr;
    alignas(64) T largest[most_blocks][block];  // scores
    alignas(64) T total[most_blocks][block];    // of exponentials
    alignas(64) T shrink[block], tile_largest[block];
    alignas(64) uint64_t attended[chunk], kept[chunk];
    QueryRow rows[most_blocks * block];

    ~Memory() { std::free(all); }
    bool allocate(const AttentionForward& work) {
      const int64_t width = work.args.value_width, lines = 64;
      int64_t used = 0, offsets[8];
      const int64_t sizes[8] = {
          work.blocks * work.depth * block * (int64_t)sizeof(Element),
          work.blocks * width * block * (int64_t)sizeof(T),
          chunk * work.depth * (int64_t)sizeof(Element),
          chunk * width * (int64_t)sizeof(Element),
          chunk * block * (int64_t)sizeof(T),
          Kind::numbers == 2 ? chunk / 2 * block * (int64_t)sizeof(Element) : 0,
          work.adds ? chunk * block * (int64_t)sizeof(T) : 0,
          Few::room(work.args) * (int64_t)sizeof(T)};
      for (int i = 0; i < 8; ++i) {
        offsets[i] = used;
        used += (sizes[i] + lines - 1) / lines * lines;
      }
      char* at = MMFAST_ISA::allocate<char>(used);
      all = at;
      queries = (Element*)(at + offsets[0]);
      sums = (T*)(at + offsets[1]);
      keys = (Element*)(at + offsets[2]);
      values = (Element*)(at + offsets[3]);
      scores = (T*)(at + offsets[4]);
      pairs = (Element*)(at + offsets[5]);
      added = (T*)(at + offsets[6]);
      few = (T*)(at + offsets[7]);
      return at;
    }
  };

  int64_t rows_of(int64_t batch) const {
    int64_t rows = 0;
    for (int s = 0; s < args.query_streams; ++s) rows += args.queries[s].sequences.length(batch);
    return rows * group;
  }

  // Row r of a batch's and key head's, streams one behind the other in each head.
  QueryRow row_of(int64_t batch, int64_t key_head, int64_t r, int64_t rows_of_head) const {
    const int64_t first = args.queries[0].sequences.length(batch);
    const int64_t head = key_head * group + r / rows_of_head, index = r % rows_of_head;
    if (index < first) return {head, index, 0};
    return {head, index - first, 1};
  }

  // Scores of a tile to memory, and the largest of each query.
  struct PutScores {
    T* scores;
    T* largest;
    template <int M, int N>
    inline __attribute__((always_inline)) void operator()(const SumTile<V, M, N>& sums,
                                                          int64_t row, int64_t column) const {
      ToMemory<T>{scores, block}(sums, row, column);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        V most = load<V>(largest + column + n * per);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) most = larger(sums.v[m][n], most);
        store(largest + column + n * per, most);
      }
    }
  };

  // Sums so far, made smaller as the largest score grew.
  struct FromShrunk {
    const T* sums;
    const T* shrink;
    template <int M, int N>
    inline __attribute__((always_inline)) void operator()(SumTile<V, M, N>& tile, int64_t row,
                                                          int64_t column) const {
      FromMemory<T>{sums, block}(tile, row, column);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const V by = load<V>(shrink + column + n * per);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) tile.v[m][n] *= by;
      }
    }
  };

  // Applies what limits attention to scores of `count` keys, and finds the largest.
  void limit(Memory& memory, int64_t count, int64_t vectors, bool some) const {
    const V least = V{} - infinity, scale = V{} + (T)__builtin_fabs(args.scale);
    for (int64_t n = 0; n < vectors; ++n) {
      V most = least;
      for (int64_t j = 0; j < count; ++j) {
        T* at = memory.scores + j * block + n * per;
        V score = load<V>(at);
        if (adds)
          score = fma(score, scale, load<V>(memory.added + j * block + n * per));
        else if (scales)
          score *= scale;
        if (some) score = where_bits(memory.attended[j] >> (n * per), score, least);
        most = larger(score, most);
        store(at, score);
      }
      store(memory.tile_largest + n * per, most);
    }
  }

  // From scores to exponentials; the largest and the totals of block t follow.
  template <bool DROPS>
  void exponentials(Memory& memory, int64_t t, int64_t count, int64_t vectors) const {
    const V factor = V{} + (T)((double)unit * log2e);
    for (int64_t n = 0; n < vectors; ++n) {
      const V before = load<V>(memory.largest[t] + n * per);
      const V most = larger(load<V>(memory.tile_largest + n * per), before);
      const V base = most == -infinity ? V{} : most;
      const V shrink = power_of_two((before - base) * factor);
      store(memory.largest[t] + n * per, most);
      store(memory.shrink + n * per, shrink);
      const T* from = memory.scores + n * per;
      const auto one = [&](int64_t j, V& total) __attribute__((always_inline)) {
        // The difference first: products of large scores would differ by their rounding.
        V p = power_of_two((load<V>(from + j * block) - base) * factor);
        total += p;
        if (DROPS) p = where_bits(memory.kept[j] >> (n * per), p, V{});
        return p;
      };
      V totals[2]{};
      int64_t j = 0;
      for (; j + 2 <= count; j += 2) {
        const V even = one(j, totals[0]), odd = one(j + 1, totals[1]);
        put(memory, j, n * per, even, odd);
      }
      if (j < count) {
        const V even = one(j, totals[0]);
        put(memory, j, n * per, even, V{});
      }
      const V total = load<V>(memory.total[t] + n * per);
      store(memory.total[t] + n * per, fma(total, shrink, totals[0] + totals[1]));
    }
  }

  // Probabilities of keys j and j + 1, where there may be no second one.
  MMFAST_INLINE void put(Memory& memory, int64_t j, int64_t column, V even, V odd) {
    if constexpr (Kind::numbers == 2) {
      store(memory.pairs + j / 2 * block + column, pairs_of(even, odd));
    } else {
      T* at = memory.scores + j * block + column;
      store(at, even);
      if (j + 1 < chunk) store(at + block, odd);
    }
  }

  void work(Memory& memory, int64_t task) const {
    int64_t batch = 0;
    while (task >= firsts[batch + 1]) ++batch;
    const int64_t rows = rows_of(batch), task_rows = blocks * block;
    const int64_t tasks_of_head = (firsts[batch + 1] - firsts[batch]) / args.key_heads;
    const int64_t key_head = (task - firsts[batch]) / tasks_of_head;
    const int64_t part = (task - firsts[batch]) % tasks_of_head, first = part * task_rows;
    if (part == 0) fill(batch, key_head);
    const int64_t count = rows - first < task_rows ? rows - first : task_rows;
    if (count <= 0) return;
    for (int64_t r = 0; r < count; ++r)
      memory.rows[r] = row_of(batch, key_head, first + r, rows / group);
    if (rows <= few) {
      Few(args, random, unit, scales, batch, key_head, memory.rows, rows, memory.few).run();
      return;
    }
    const int64_t used = (count + block - 1) / block;
    read_queries(memory, batch, count);
    std::memset(memory.sums, 0, (size_t)(used * args.value_width * block) * sizeof(T));
    for (int64_t t = 0; t < used; ++t)
      for (int64_t i = 0; i < block; ++i) {
        memory.largest[t][i] = -infinity;
        memory.total[t][i] = 0;
      }
    for (int s = 0; s < args.key_streams; ++s) {
      const int64_t keys = args.keys[s].sequences.length(batch);
      for (int64_t j = 0; j < keys; j += chunk)
        attend(memory, batch, key_head, s, j, keys - j < chunk ? keys - j : chunk, count);
    }
    for (int64_t t = 0; t < used; ++t)
      finish(memory, batch, t, count - t * block < block ? count - t * block : block);
  }

  void read_queries(Memory& memory, int64_t batch, int64_t count) const {
    for (int64_t first = 0; first < count; first += block) {
      Element* out = memory.queries + first * depth;
      const int64_t n = count - first < block ? count - first : block;
      const auto row = [&](int64_t i) {
        const QueryRow& r = memory.rows[first + i];
        const QueryStream& stream = args.queries[r.stream];
        return (const char*)stream.query.at(batch, r.head,
                                            stream.sequences.begin(batch) + r.index);
      };
      pack_transposed<Kind>(out, block, row, n, args.width, (n + per - 1) / per * per, args.dtype);
      if (args.scale < 0)
        for (int64_t i = 0; i < depth * block; ++i) out[i] = negative(out[i]);
    }
  }
  static float negative(float x) { return -x; }
  static double negative(double x) { return -x; }
  static uint32_t negative(uint32_t pair) { return pair ^ 0x80008000u; }

  // Keys [j, j + count) of a stream, for all blocks of queries.
  void attend(Memory& memory, int64_t batch, int64_t key_head, int s, int64_t j, int64_t count,
              int64_t queries) const {
    const KeyStream& stream = args.keys[s];
    const int64_t begin = stream.sequences.begin(batch) + j;
    const int64_t width = args.value_width;
    Broadcasts<Kind> keys{nullptr, 0, 1}, values{nullptr, 1, 0};
    const int64_t offset = args.causal == Causal::bottom_right
                               ? stream.sequences.length(batch) -
                                     args.queries[0].sequences.length(batch)
                               : 0;
    for (int64_t t = 0; t * block < queries; ++t) {
      const int64_t n = queries - t * block < block ? queries - t * block : block;
      const int64_t vectors = (n + per - 1) / per;
      const Limits limits = limits_of(memory, batch, t, n, j, count, offset);
      if (limits == Limits::none_attends) continue;
      if (!keys.data) {
        keys = rows_at(stream.key, batch, key_head, begin, count, args.width, memory.keys);
        values = values_at(stream.value, batch, key_head, begin, count, memory.values);
      }
      const Panel<Kind> panel{memory.queries + t * block * depth, block};
      for (int64_t i = 0; i < block; ++i) memory.tile_largest[i] = -infinity;
      products<Kind>(keys, count, panel, vectors, depth, FromZero{},
                     PutScores{memory.scores, memory.tile_largest});
      if (limits == Limits::some || scales) limit(memory, count, vectors, limits == Limits::some);
      drops ? exponentials<true>(memory, t, count, vectors)
            : exponentials<false>(memory, t, count, vectors);
      T* sums = memory.sums + t * block * width;
      products<Kind>(values, width, probabilities(memory), vectors, elements_of<Kind>(count),
                     FromShrunk{sums, memory.shrink}, ToMemory<T>{sums, block});
    }
  }

  static Panel<Kind> probabilities(const Memory& memory) {
    if constexpr (Kind::numbers == 2)
      return {memory.pairs, block};
    else
      return {memory.scores, block};
  }

  // Rows where they are if they are elements already, one behind the other.
  Broadcasts<Kind> rows_at(const HeadRows& rows, int64_t batch, int64_t head, int64_t begin,
                           int64_t count, int64_t width, Element* buffer) const {
    const int64_t size = size_of(args.dtype), elements = elements_of<Kind>(width);
    const bool same = size * Kind::numbers == (int64_t)sizeof(Element);
    const char* at = rows.at(batch, head, begin);
    if (same && rows.row == elements * (int64_t)sizeof(Element) && width % Kind::numbers == 0)
      return {(const Element*)at, elements, 1};
    const auto row = [&](int64_t i) { return at + i * rows.row; };
    pack_along<Kind>(buffer, elements, row, count, width, args.dtype);
    return {buffer, elements, 1};
  }

  // [k][Ev].
  Broadcasts<Kind> values_at(const HeadRows& rows, int64_t batch, int64_t head, int64_t begin,
                             int64_t count, Element* buffer) const {
    const int64_t width = args.value_width;
    if constexpr (Kind::numbers == 2) {
      const char* at = rows.at(batch, head, begin);
      const auto row = [&](int64_t i) { return at + i * rows.row; };
      pack_across<Kind>(buffer, width, row, count, width, width, args.dtype);
      return {buffer, 1, width};
    } else {
      const Broadcasts<Kind> found = rows_at(rows, batch, head, begin, count, width, buffer);
      return {found.data, 1, found.row};
    }
  }

  enum class Limits { none_attends, some, all };

  // Which of the keys [j, j + count) the n queries of block t attend to: bits of memory.
  Limits limits_of(Memory& memory, int64_t batch, int64_t t, int64_t n, int64_t j, int64_t count,
                   int64_t offset) const {
    const QueryRow* rows = memory.rows + t * block;
    const bool masked = args.mask.data && !adds;
    bool bounded = false;
    if (args.causal != Causal::none) {
      int64_t lowest = rows[0].index, highest = rows[0].index;
      for (int64_t i = 1; i < n; ++i) {
        lowest = rows[i].index < lowest ? rows[i].index : lowest;
        highest = rows[i].index > highest ? rows[i].index : highest;
      }
      if (j > highest + offset) return Limits::none_attends;
      bounded = j + count - 1 > lowest + offset;
    }
    if (masked || bounded) {
      uint64_t any = 0, every = ~0ull;
      for (int64_t first = 0; first < count; first += block) {
        const int64_t keys = count - first < block ? count - first : block;
        uint64_t* words = memory.attended + first;
        attended_bits(args, batch, rows, n, j + first, keys, offset, words);
        transpose_bits(words);
        for (int64_t i = 0; i < keys; ++i) {
          any |= words[i];
          every &= words[i];
        }
      }
      if (!any) return Limits::none_attends;
      bounded = every != low_bits(n);
    }
    if (adds)
      for (int64_t first = 0; first < count; first += block)
        added_numbers<V>(args, batch, rows, n, j + first,
                         count - first < block ? count - first : block,
                         memory.added + first * block);
    if (drops)
      for (int64_t first = 0; first < count; first += block) {
        kept_bits(args, random, batch, rows, n, j + first,
                  count - first < block ? count - first : block, memory.kept + first);
        transpose_bits(memory.kept + first);
      }
    return bounded ? Limits::some : Limits::all;
  }

  // Outputs of block t.
  void finish(Memory& memory, int64_t batch, int64_t t, int64_t count) const {
    const int64_t width = args.value_width;
    const T kept = drops ? args.dropout < 1 ? (T)(1 / (1 - args.dropout)) : 0 : 1;
    alignas(64) T inverse[block], lse[block];
    for (int64_t i = 0; i < block; i += per) {
      const V total = load<V>(memory.total[t] + i), most = load<V>(memory.largest[t] + i);
      store(inverse + i, total == 0 ? V{} : kept / total);
      store(lse + i, total == 0 ? V{} - infinity : fma(most, V{} + unit, natural_logarithm(total)));
    }
    const QueryRow* rows = memory.rows + t * block;
    char* outs[block];
    for (int64_t i = 0; i < count; ++i) {
      const QueryStream& stream = args.queries[rows[i].stream];
      const int64_t row = stream.sequences.begin(batch) + rows[i].index;
      outs[i] = stream.out.at(batch, rows[i].head, row);
      *(T*)stream.lse.at(batch, rows[i].head, row) = lse[i];
    }
    const T* sums = memory.sums + t * block * width;
    with_dtype<Kind>(args.dtype, [&]<Dtype D>() {
      for (int64_t first = 0; first < count; first += per)
        write<D>(sums + first, load<V>(inverse + first), outs + first, count - first);
    });
  }

  // Columns of sums, times `by`, to the first `count` rows.
  template <Dtype D>
  void write(const T* sums, V by, char* const* outs, int64_t count) const {
    const int64_t width = args.value_width;
    constexpr int64_t step = per * Kind::numbers;  // numbers in a vector
    const auto number = [&](int64_t e) __attribute__((always_inline)) {
      return load<V>(sums + e * block) * by;
    };
    const auto element = [&](int64_t e) __attribute__((always_inline)) {
      if constexpr (Kind::numbers == 2)
        return (V)pairs_of(number(e), number(e + 1));
      else
        return number(e);
    };
    const auto put = [&](int64_t i, int64_t e, V v) __attribute__((always_inline)) {
      char* at = outs[i] + e * size_of(D);
      if constexpr (Kind::numbers == 2)
        store_first(at, v, (width - e) * 2);
      else
        write_first(at, D, v, width - e);
    };
    V v[per];
    int64_t e = 0;
    for (; e + step <= width && count >= per; e += step) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < per; ++i) v[i] = element(e + i * Kind::numbers);
      transpose(v);
#pragma GCC unroll 16
      for (int64_t i = 0; i < per; ++i) put(i, e, v[i]);
    }
    for (; e < width; e += step) {
      for (int64_t i = 0; i < per; ++i) {
        const int64_t at = e + i * Kind::numbers;
        v[i] = at + Kind::numbers <= width ? element(at) : V{};
        if constexpr (Kind::numbers == 2)
          if (at + 1 == width) v[i] = (V)pairs_of(number(at), V{});
      }
      transpose(v);
      for (int64_t i = 0; i < per && i < count; ++i) put(i, e, v[i]);
    }
  }

  // Rows that there are not: zeros.
  void fill(int64_t batch, int64_t key_head) const {
    for (int s = 0; s < args.query_streams; ++s) {
      const QueryStream& stream = args.queries[s];
      const int64_t begin = stream.sequences.begin(batch);
      for (int64_t h = key_head * group; h < (key_head + 1) * group; ++h)
        for (int64_t i = stream.sequences.length(batch); i < stream.sequences.rows; ++i) {
          std::memset(stream.out.at(batch, h, begin + i), 0,
                      (size_t)(args.value_width * size_of(args.dtype)));
          *(T*)stream.lse.at(batch, h, begin + i) = -infinity;
        }
    }
  }

  bool run(const Parallel& parallel) {
    firsts = allocate<int64_t>(args.batches + 1);
    if (!firsts) return false;
    int64_t all = 0;
    for (int64_t b = 0; b < args.batches; ++b)
      all += (rows_of(b) + block - 1) / block * args.key_heads;
    // Enough tasks for every thread to have some, but large ones.
    blocks = all / (4 * (int64_t)parallel.threads);
    blocks = blocks < 1 ? 1 : blocks > most_blocks ? most_blocks : blocks;
    firsts[0] = 0;
    for (int64_t b = 0; b < args.batches; ++b) {
      const int64_t parts = (rows_of(b) + blocks * block - 1) / (blocks * block);
      firsts[b + 1] = firsts[b] + (parts ? parts : 1) * args.key_heads;
    }
    const int64_t tasks = firsts[args.batches];
    if (tasks == 0) return true;
    parallel.run(
        tasks,
        [](void* context, int64_t begin, int64_t end) {
          AttentionForward& self = *(AttentionForward*)context;
          Memory memory;
          if (!memory.allocate(self)) {
            self.failed = true;
            return;
          }
          for (int64_t task = begin; task < end; ++task) self.work(memory, task);
        },
        this);
    return !failed;
  }
};

static bool attention_forward(const AttentionArgs& args, const Parallel& parallel) {
  switch (args.dtype) {
    case Dtype::float64: return AttentionForward<Doubles>(args).run(parallel);
    case Dtype::bfloat16: return AttentionForward<HalfProducts>(args).run(parallel);
    default: return AttentionForward<Singles>(args).run(parallel);
  }
}

}  // namespace mmfast::MMFAST_ISA
