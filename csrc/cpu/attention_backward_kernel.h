// The gradients of attention without a matrix of scores: probabilities are made again from the
// logarithms of their sums, block by block (Dao et al., "FlashAttention", 2022, algorithm 4).
//
// Keys are cut into parts whose length depends on nothing but their number. A part keeps the
// gradients of its keys and values over all queries of all heads that share them, and makes its
// share of the queries' gradients. Shares are added in the order of the parts, so that the bits are
// the same whether one thread takes all parts of a head or each goes to another. Where parts go to
// several threads, there is a share for each of twice as many parts as threads.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdlib>

#include "cpu/attention_backward_workspace.h"

namespace mmfast::MMFAST_ISA {

// Blocks of keys that stay in the second-level cache with their gradients.
constexpr int64_t near_blocks = 4;

template <class Kind>
struct AttentionBackward {
  using T = typename Kind::Number;
  using Element = typename Kind::Element;
  using V = typename Kind::V;
  using Tile = BackwardTile<Kind>;
  using Workspace = BackwardWorkspace<Kind>;
  using Queries = JoinedRows<QueryStream>;
  using Keys = JoinedRows<KeyStream>;
  static constexpr int64_t w = native_width<T>, numbers = Kind::numbers;

  static int64_t elements(int64_t n) { return elements_of<Kind>(n); }

  const AttentionArgs& args;
  const Random random;
  const int64_t group, padded_width = in_vectors<T>(args.width);
  int64_t most_rows = 0, most_keys = 0;  // of a batch
  int64_t most_parts_of_a_batch = 0;
  std::atomic<bool> failed{false};

  explicit AttentionBackward(const AttentionArgs& a)
      : args(a), random(a.seed, a.offset), group(a.key_heads ? a.heads / a.key_heads : 0) {
    for (int64_t b = 0; b < a.batches; ++b) {
      const int64_t rows = queries(b).count, keys = this->keys(b).count;
      most_rows = rows > most_rows ? rows : most_rows;
      most_keys = keys > most_keys ? keys : most_keys;
      // Fewer keys may be more parts.
      if (parts_of(keys) > most_parts_of_a_batch) most_parts_of_a_batch = parts_of(keys);
    }
  }

  Queries queries(int64_t b) const { return {args.queries, args.query_streams, b}; }
  Keys keys(int64_t b) const { return {args.keys, args.key_streams, b}; }
  static int64_t parts_of(int64_t keys) {
    const int64_t part = part_keys(keys);
    return (keys + part - 1) / part;
  }

  // Calls work(workspace, task) for every task, each on whatever thread is free.
  template <class Work>
  void for_tasks(int64_t count, bool with_totals, const Work& work, const Parallel& parallel) {
    struct Context {
      AttentionBackward& all;
      const Work& work;
      int64_t count;
      typename Workspace::Sizes sizes;
      std::atomic<int64_t> next{0};
    } context{*this, work, count, {args, group, most_rows, most_keys, with_totals}};
    const int64_t threads = parallel.threads < count ? parallel.threads : count;
    const Body body = [](void* at, int64_t, int64_t) {
      Context& context = *(Context*)at;
      Workspace workspace;
      if (context.next >= context.count) return;
      if (!workspace.allocate(context.sizes)) {
        context.all.failed = true;
        return;
      }
      for (int64_t task; !context.all.failed && (task = context.next++) < context.count;)
        context.work(workspace, task);
    };
    if (threads == 1)
      body(&context, 0, 1);
    else if (threads > 1)
      parallel.run(threads, body, &context);
  }

  bool run(const Parallel& parallel) {
    const int64_t pairs = args.batches * args.key_heads;
    if (args.grad_mask) {
      // One thread for all that shares a part of the mask's gradient.
      const int64_t batches = args.mask.batch ? args.batches : 1;
      const int64_t heads = args.mask.head ? args.key_heads : 1;
      const auto work = [&](Workspace& workspace, int64_t task) {
        for (int64_t b = batches > 1 ? task / heads : 0; b < args.batches; b += batches)
          for (int64_t h = heads > 1 ? task % heads : 0; h < args.key_heads; h += heads)
            all_parts(workspace, b, h);
      };
      for_tasks(batches * heads, true, work, parallel);
    } else if (parallel.threads == 1 || most_parts_of_a_batch <= 1 ||
               pairs >= 2 * parallel.threads || (pairs && pairs % parallel.threads == 0)) {
      const auto work = [&](Workspace& workspace, int64_t task) {
        all_parts(workspace, task / args.key_heads, task % args.key_heads);
      };
      for_tasks(pairs, true, work, parallel);
    } else {
      const int64_t wanted = 2 * parallel.threads;  // tasks at a time
      const int64_t slots = most_parts_of_a_batch < wanted ? most_parts_of_a_batch : wanted;
      const int64_t together = (wanted + slots - 1) / slots;
      const int64_t most = together < pairs ? together : pairs;
      T* shares = allocate<T>(most * group * (1 + slots) * share_size());
      if (!shares) return false;
      for (int64_t pair = 0; pair < pairs; pair += most)
        for (int64_t part = 0; part < most_parts_of_a_batch && !failed; part += slots)
          separate_parts({shares, slots, pair, most < pairs - pair ? most : pairs - pair, part},
                         parallel);
      std::free(shares);
    }
    return !failed;
  }

  int64_t share_size() const { return most_rows * padded_width; }

  // A batch's head of keys: all its parts, one after the other.
  void all_parts(Workspace& workspace, int64_t b, int64_t key_head) const {
    const int64_t length = keys(b).count, parts = parts_of(length);
    const int64_t size = queries(b).count * padded_width;
    for (int64_t part = 0; part < parts; ++part) {
      const auto take = [&](int64_t g, const T* share) {
        const int64_t head = key_head * group + g;
        if (parts == 1) {
          write_queries(b, head, 0, queries(b).count, &share, 1);
          return;
        }
        T* total = workspace.totals + g * size;
        if (part == 0)
          std::memcpy(total, share, (size_t)size * sizeof(T));
        else
          for (int64_t i = 0; i < size; i += w)
            store(total + i, load<V>(total + i) + load<V>(share + i));
        if (part == parts - 1) write_queries(b, head, 0, queries(b).count, &total, 1);
      };
      one_part(workspace, b, key_head, part, part > 0,
               [&](int64_t) { return workspace.grad_query; }, take);
    }
    zero_rest(b, key_head, parts == 0);
  }

  // Parts [part, part + slots) of `count` pairs of a batch and a head of keys, side by side.
  struct Round {
    T* shares;  // [count][group][1 + slots], the first the sum of the rounds before
    int64_t slots, pair, count, part;
  };

  T* share_of(const Round& round, int64_t i, int64_t g, int64_t slot) const {
    return round.shares + ((i * group + g) * (1 + round.slots) + slot) * share_size();
  }

  void separate_parts(const Round& round, const Parallel& parallel) {
    const auto work = [&](Workspace& workspace, int64_t task) {
      const int64_t i = task / round.slots, slot = task % round.slots;
      const int64_t b = (round.pair + i) / args.key_heads;
      const int64_t key_head = (round.pair + i) % args.key_heads, parts = parts_of(keys(b).count);
      if (round.part + slot < parts)
        one_part(workspace, b, key_head, round.part + slot, false,
                 [&](int64_t g) { return share_of(round, i, g, 1 + slot); },
                 [](int64_t, const T*) {});
      if (round.part + slot == 0) zero_rest(b, key_head, parts == 0);
    };
    for_tasks(round.count * round.slots, false, work, parallel);
    if (failed) return;
    struct Context {
      const AttentionBackward& all;
      const Round& round;
      int64_t blocks;
    } context{*this, round, (most_rows + sum_rows - 1) / sum_rows};
    const Body body = [](void* at, int64_t begin, int64_t end) {
      const Context& context = *(const Context*)at;
      for (int64_t task = begin; task < end; ++task)
        context.all.add_shares(context.round, task / context.blocks,
                               task % context.blocks * sum_rows);
    };
    parallel.run(round.count * group * context.blocks, body, &context);
  }

  // Of sum_rows queries, from the first on, of one of the heads of a round.
  static constexpr int64_t sum_rows = 64;
  void add_shares(const Round& round, int64_t index, int64_t first) const {
    const int64_t i = index / group, g = index % group;
    const int64_t b = (round.pair + i) / args.key_heads;
    const int64_t head = (round.pair + i) % args.key_heads * group + g;
    const int64_t length = queries(b).count, left = parts_of(keys(b).count) - round.part;
    const int64_t end = first + sum_rows < length ? first + sum_rows : length;
    if (left <= 0 || first >= end) return;
    const T* shares[1 + most_parts];
    int64_t count = 0;
    for (int64_t slot = round.part == 0; slot <= round.slots && slot <= left; ++slot)
      shares[count++] = share_of(round, i, g, slot);
    if (left <= round.slots) {
      write_queries(b, head, first, end, shares, count);
      return;
    }
    T* total = share_of(round, i, g, 0);
    for (int64_t at = first * padded_width; at < end * padded_width; at += w)
      store(total + at, sum_of_shares(shares, count, at));
  }

  template <class Share>
  static V sum_of_shares(Share* const* shares, int64_t count, int64_t at) {
    V sum = load<V>(shares[0] + at);
    for (int64_t i = 1; i < count; ++i) sum += load<V>(shares[i] + at);
    return sum;
  }

  // Gradients of queries [first, end): sums of shares [rows][padded_width] in their order.
  template <class Share>
  void write_queries(int64_t b, int64_t head, int64_t first, int64_t end, Share* const* shares,
                     int64_t parts) const {
    const Queries all = queries(b);
    for (int64_t i = first; i < end; ++i) {
      char* to = all.at(&QueryStream::grad_query, head, i);
      for (int64_t d = 0; d < args.width; d += w) {
        const V sum = sum_of_shares(shares, parts, i * padded_width + d);
        write_first(to + d * size_of(args.dtype), args.dtype, sum * (T)args.scale, args.width - d);
      }
    }
  }

  // Gradients of rows that take no part: padding behind a sequence, and queries without keys.
  void zero_rest(int64_t b, int64_t key_head, bool no_keys) const {
    const int64_t size = size_of(args.dtype);
    for (int s = 0; s < args.query_streams; ++s) {
      const QueryStream& stream = args.queries[s];
      const int64_t length = stream.sequences.length(b), begin = stream.sequences.begin(b);
      const int64_t end = stream.sequences.begins ? length : stream.sequences.rows;
      for (int64_t g = 0; g < group; ++g)
        for (int64_t i = no_keys ? 0 : length; i < end; ++i)
          std::memset(stream.grad_query.at(b, key_head * group + g, begin + i), 0,
                      (size_t)(args.width * size));
    }
    for (int s = 0; s < args.key_streams; ++s) {
      const KeyStream& stream = args.keys[s];
      if (stream.sequences.begins) continue;
      for (int64_t j = stream.sequences.length(b); j < stream.sequences.rows; ++j) {
        std::memset(stream.grad_key.at(b, key_head, j), 0, (size_t)(args.width * size));
        std::memset(stream.grad_value.at(b, key_head, j), 0, (size_t)(args.value_width * size));
      }
    }
  }

  // Gradients of one part's keys and values, and for each head of the group its share of the
  // queries': in share(g), handed to take(g, share). `packed`: the part before was packed here.
  template <class Share, class Take>
  void one_part(Workspace& workspace, int64_t b, int64_t key_head, int64_t part, bool packed,
                const Share& share, const Take& take) const {
    const Keys all_keys = keys(b);
    const Queries all_queries = queries(b);
    const int64_t size = part_keys(all_keys.count), begin = part * size;
    const int64_t end = begin + size < all_keys.count ? begin + size : all_keys.count;
    const int64_t blocks = (end - begin + key_block - 1) / key_block;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = begin + block * key_block;
      pack_keys(workspace, all_keys, key_head, block, first, end - first);
    }
    std::memset(workspace.grad_key, 0, (size_t)(blocks * args.width * key_block) * sizeof(T));
    std::memset(workspace.grad_value, 0,
                (size_t)(blocks * args.value_width * key_block) * sizeof(T));
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = key_head * group + g;
      if (!(packed && group == 1)) pack_queries(workspace, all_queries, head);
      T* grad_query = share(g);
      std::memset(grad_query, 0, (size_t)(all_queries.count * padded_width) * sizeof(T));
      for (int64_t block = 0; block < blocks; block += near_blocks)
        some_blocks(workspace, b, head, grad_query, begin, end, block,
                    block + near_blocks < blocks ? block + near_blocks : blocks);
      take(g, (const T*)grad_query);
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = begin + block * key_block;
      const int64_t count = end - first < key_block ? end - first : key_block;
      write_keys(workspace, all_keys, key_head, &KeyStream::grad_key, first, count,
                 workspace.grad_key + block * args.width * key_block, args.width, (T)args.scale);
      write_keys(workspace, all_keys, key_head, &KeyStream::grad_value, first, count,
                 workspace.grad_value + block * args.value_width * key_block, args.value_width, 1);
    }
  }

  void pack_keys(Workspace& workspace, const Keys& all, int64_t head, int64_t block, int64_t first,
                 int64_t left) const {
    const int64_t count = left < key_block ? left : key_block, columns = in_vectors<T>(count);
    const auto key = [&](int64_t i) { return all.at(&KeyStream::key, head, first + i); };
    const auto value = [&](int64_t i) { return all.at(&KeyStream::value, head, first + i); };
    // Or they would be read sixteen rows at a time, which no processor foresees.
    for (int64_t i = 0; i < count; ++i) {
      prefetch(key(i), args.width);
      prefetch(value(i), args.value_width);
    }
    pack_transposed<Kind>(workspace.key + block * elements(args.width) * key_block, key_block, key,
                          count, args.width, columns, args.dtype);
    pack_transposed<Kind>(workspace.value + block * elements(args.value_width) * key_block,
                          key_block, value, count, args.value_width, columns, args.dtype);
    pack_across<Kind>(workspace.key_across + block * elements(key_block) * padded_width,
                      padded_width, key, count, args.width, padded_width, args.dtype);
  }

  void prefetch(const char* row, int64_t width) const {
    for (int64_t byte = 0; byte < width * size_of(args.dtype); byte += 64)
      __builtin_prefetch(row + byte);
  }

  void pack_queries(Workspace& workspace, const Queries& all, int64_t head) const {
    const auto query = [&](int64_t i) { return all.at(&QueryStream::query, head, i); };
    const auto grad_out = [&](int64_t i) {
      const char* row = all.at(&QueryStream::grad_out, head, i);
      return row ? row : workspace.zeros;
    };
    const int64_t rows = all.count, width = args.width, value_width = args.value_width;
    pack_along<Kind>(workspace.query, elements(width), query, rows, width, args.dtype);
    pack_along<Kind>(workspace.grad_out, elements(value_width), grad_out, rows, value_width,
                     args.dtype);
    if constexpr (numbers > 1) {
      pack_across<Kind>(workspace.query_across, width, query, rows, width, width, args.dtype);
      pack_across<Kind>(workspace.grad_out_across, value_width, grad_out, rows, value_width,
                        value_width, args.dtype);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const T lse = load<T>(all.at(&QueryStream::lse, head, i));
      workspace.lse[i] = lse;
      workspace.empty[i] = lse == -(T)__builtin_inf();
      const char *grad = grad_out(i), *out = all.at(&QueryStream::out, head, i);
      V sum{};
      for (int64_t d = 0; d < value_width; d += w) {
        const int64_t at = d * size_of(args.dtype), left = value_width - d;
        sum = fma(read_first<V>(grad + at, args.dtype, left),
                  read_first<V>(out + at, args.dtype, left), sum);
      }
      T delta = 0;
      for (int64_t l = 0; l < w; ++l) delta += sum[l];
      workspace.delta[i] = delta;
    }
  }

  // All queries of a head against blocks [block, last_block) of the part of keys [begin, end).
  void some_blocks(Workspace& workspace, int64_t b, int64_t head, T* grad_query, int64_t begin,
                   int64_t end, int64_t block, int64_t last_block) const {
    const int64_t rows = queries(b).count;
    Tile tile;
    tile.width = args.width;
    tile.value_width = args.value_width;
    tile.padded_width = padded_width;
    tile.scale = (T)args.scale;
    tile.scores = workspace.scores;
    tile.products = workspace.products;
    tile.p = workspace.p;
    tile.d = workspace.d;
    tile.d_along = workspace.d_along;
    tile.grad_scores = args.grad_mask ? workspace.grad_scores : nullptr;
    tile.bias = nullptr;
    tile.kept_factor = args.dropout < 1 ? (T)(1 / (1 - args.dropout)) : 0;
    for (int64_t i = 0; i < rows; i += Tile::query_block) {
      const int64_t end_row = i + Tile::query_block < rows ? i + Tile::query_block : rows;
      for (int64_t k = block; k < last_block; ++k) {
        const int64_t first_key = begin + k * key_block;
        tile.keys = end - first_key < key_block ? end - first_key : key_block;
        tile.key = workspace.key + k * elements(args.width) * key_block;
        tile.value = workspace.value + k * elements(args.value_width) * key_block;
        tile.key_across = workspace.key_across + k * elements(key_block) * padded_width;
        tile.grad_key = workspace.grad_key + k * args.width * key_block;
        tile.grad_value = workspace.grad_value + k * args.value_width * key_block;
        one_tile(workspace, tile, b, head, grad_query, i, end_row, first_key);
      }
    }
  }

  // Queries [row, end_row) against the keys of a tile, the first of which is first_key.
  void one_tile(Workspace& workspace, Tile& tile, int64_t b, int64_t head, T* grad_query,
                int64_t row, int64_t end_row, int64_t first_key) const {
    // Row i attends to keys up to i + shift.
    const bool causal = args.causal != Causal::none;
    const int64_t rows = queries(b).count, all_keys = keys(b).count;
    const int64_t shift = args.causal == Causal::bottom_right ? all_keys - rows : 0;
    if (causal && first_key - shift > row) row = (first_key - shift) / numbers * numbers;
    if (row >= end_row) return;
    tile.rows = end_row - row;
    uint64_t attended[Tile::query_block], kept[Tile::query_block];
    QueryRow query_rows[Tile::query_block];
    for (int64_t r = 0; r < tile.rows; ++r) query_rows[r] = {head, row + r, 0};
    attended_bits(args, b, query_rows, tile.rows, first_key, tile.keys, shift, attended);
    for (int64_t r = 0; r < tile.rows; ++r)
      if (workspace.empty[row + r]) attended[r] = 0;
    tile.attended = attended;
    tile.kept = nullptr;
    if (args.dropout > 0) {
      kept_bits(args, random, b, query_rows, tile.rows, first_key, tile.keys, kept);
      tile.kept = kept;
    }
    if (args.mask.data && args.mask.additive) read_bias(workspace, tile, b, head, row, first_key);
    tile.query = workspace.query + row * elements(args.width);
    tile.grad_out = workspace.grad_out + row * elements(args.value_width);
    tile.query_across = workspace.query_across + row / numbers * args.width;
    tile.grad_out_across = workspace.grad_out_across + row / numbers * args.value_width;
    tile.lse = workspace.lse + row;
    tile.delta = workspace.delta + row;
    tile.grad_query = grad_query + row * padded_width;
    if (tile.run() && args.grad_mask) add_to_mask(workspace, tile, b, head, row, first_key);
  }

  // What a tile's scores get from the mask.
  void read_bias(Workspace& workspace, Tile& tile, int64_t b, int64_t head, int64_t row,
                 int64_t key) const {
    const AttentionMask& mask = args.mask;
    const int64_t rows = mask.row ? tile.rows : 1;
    for (int64_t i = 0; i < rows; ++i) {
      const char* from = mask.at(b, head, row + i, key);
      T* to = workspace.bias + i * key_block;
      if (mask.column == size_of(mask.dtype))
        for (int64_t j = 0; j < tile.keys; j += w)
          store(to + j, read_first<V>(from + j * mask.column, mask.dtype, tile.keys - j));
      else
        for (int64_t j = 0; j < tile.keys; ++j)
          to[j] = load_one<T>(from + j * mask.column, mask.dtype);
    }
    tile.bias = workspace.bias;
    tile.bias_step = mask.row ? key_block : 0;
  }

  void add_to_mask(const Workspace& workspace, const Tile& tile, int64_t b, int64_t head,
                   int64_t row, int64_t key) const {
    const AttentionMask& mask = args.mask;
    const int64_t columns = mask.column ? keys(b).count : 1;
    const int64_t rows = mask.row ? queries(b).count : 1;
    const int64_t heads = mask.head ? args.heads : 1;
    const int64_t matrix = (mask.batch ? b : 0) * heads + (mask.head ? head : 0);
    double* to = (double*)args.grad_mask + matrix * rows * columns;
    for (int64_t i = 0; i < tile.rows; ++i) {
      double* sums = to + (mask.row ? (row + i) * columns : 0) + (mask.column ? key : 0);
      const T* from = workspace.grad_scores + i * key_block;
      if (mask.column)
        for (int64_t j = 0; j < tile.keys; ++j) sums[j] += (double)from[j];
      else
        for (int64_t j = 0; j < tile.keys; ++j) *sums += (double)from[j];
    }
  }

  // from: [width][key_block]
  void write_keys(Workspace& workspace, const Keys& all, int64_t head, HeadRows KeyStream::*rows,
                  int64_t first, int64_t count, const T* from, int64_t width, T factor) const {
    using Plain = std::conditional_t<sizeof(T) == 8, Doubles, Singles>;
    const int64_t step = in_vectors<T>(width);
    const auto row = [&](int64_t i) { return (const char*)(from + i * key_block); };
    pack_transposed<Plain>(workspace.rows, step, row, width, count, step, Native<T>::dtype);
    for (int64_t j = 0; j < count; ++j) {
      char* to = all.at(rows, head, first + j);
      for (int64_t d = 0; d < width; d += w)
        write_first(to + d * size_of(args.dtype), args.dtype,
                    load<V>(workspace.rows + j * step + d) * factor, width - d);
    }
  }
};

static bool attention_backward(const AttentionArgs& args, const Parallel& parallel) {
  switch (args.dtype) {
    case Dtype::float64: return AttentionBackward<Doubles>(args).run(parallel);
    case Dtype::bfloat16: return AttentionBackward<HalfProducts>(args).run(parallel);
    default: return AttentionBackward<Singles>(args).run(parallel);
  }
}

}  // namespace mmfast::MMFAST_ISA
