// Streams of bits by a register of 64 of them. Eight indices fill whole bytes, so that a long row is
// shared out in pieces.
#pragma once
#include "cpu/pack_indices.h"
#include "cpu/simd.h"

namespace mmfast::MMFAST_ISA {

struct PackIndices {
  static constexpr int64_t piece = 8192;  // indices, a multiple of eight
  const PackIndicesArgs& args;
  const int64_t bytes;   // of a packed row
  const int64_t pieces;  // of a row

  explicit PackIndices(const PackIndicesArgs& a)
      : args(a), bytes((a.count * a.bits + 7) / 8), pieces((a.count + piece - 1) / piece) {}

  template <class Index>
  void pack(const Index* indices, int64_t count, uint8_t* out) const {
    const uint64_t mask = ((uint64_t)1 << args.bits) - 1;
    uint64_t waiting = 0;
    int filled = 0;
    for (int64_t i = 0; i < count; ++i) {
      waiting |= ((uint64_t)indices[i] & mask) << filled;
      filled += args.bits;
      if (filled >= 32) {
        std::memcpy(out, &waiting, 4);
        out += 4;
        waiting >>= 32;
        filled -= 32;
      }
    }
    for (; filled > 0; filled -= 8, waiting >>= 8) *out++ = (uint8_t)waiting;
  }

  void unpack(const uint8_t* in, const uint8_t* end, int64_t count, int64_t* indices) const {
    const uint64_t mask = ((uint64_t)1 << args.bits) - 1;
    int64_t i = 0, bit = 0;
    for (; i < count && in + bit / 8 + 8 <= end; ++i, bit += args.bits)
      indices[i] = (int64_t)(load<uint64_t>(in + bit / 8) >> bit % 8 & mask);
    for (; i < count; ++i, bit += args.bits) {
      uint64_t last = 0;
      std::memcpy(&last, in + bit / 8, (size_t)(end - in - bit / 8));
      indices[i] = (int64_t)(last >> bit % 8 & mask);
    }
  }

  // Piece `at` of all rows' pieces.
  template <class Work>
  void each(int64_t at, const Work& work) const {
    const int64_t row = at / pieces, first = at % pieces * piece;
    const int64_t rest = args.count - first;
    work(row * args.count + first, rest < piece ? rest : piece,
         args.packed + row * bytes + first * args.bits / 8, args.packed + (row + 1) * bytes);
  }
};

static void pack_indices(const PackIndicesArgs& args, const Parallel& parallel) {
  PackIndices work(args);
  parallel.run(
      args.rows * work.pieces,
      [](void* context, int64_t begin, int64_t end) {
        const PackIndices& w = *(const PackIndices*)context;
        for (int64_t at = begin; at < end; ++at)
          w.each(at, [&](int64_t first, int64_t count, uint8_t* out, const uint8_t*) {
            if (w.args.index_bytes == 8)
              w.pack((const int64_t*)w.args.indices + first, count, out);
            else
              w.pack((const int32_t*)w.args.indices + first, count, out);
          });
      },
      &work);
}

static void unpack_indices(const PackIndicesArgs& args, const Parallel& parallel) {
  PackIndices work(args);
  parallel.run(
      args.rows * work.pieces,
      [](void* context, int64_t begin, int64_t end) {
        const PackIndices& w = *(const PackIndices*)context;
        for (int64_t at = begin; at < end; ++at)
          w.each(at, [&](int64_t first, int64_t count, const uint8_t* in, const uint8_t* last) {
            w.unpack(in, last, count, (int64_t*)w.args.indices + first);
          });
      },
      &work);
}

}  // namespace mmfast::MMFAST_ISA
