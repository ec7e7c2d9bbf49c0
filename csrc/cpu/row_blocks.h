// Rows as one contiguous run of numbers, and back: for kernels that look at numbers, not at rows.
#pragma once
#include "cpu/simd.h"
#include "cpu/workspace.h"
#include "cpu/write_row.h"

namespace mmfast::MMFAST_ISA {

// Room for count numbers, on the stack if they are few; no data when memory runs out.
template <class T>
struct Scratch {
  static constexpr int64_t few = 4096;
  alignas(64) T own[few];
  T* const data;

  explicit Scratch(int64_t count) : data(count <= few ? own : allocate<T>(count)) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    if (data != own) std::free(data);
  }
};

static bool is_dense(const Rows& rows) {
  const int64_t size = size_of(rows.dtype);
  return rows.dims == 1 && (rows.width == 1 || rows.step == size) &&
         (rows.count <= 1 || rows.strides[0] == rows.width * size);
}

// Rows [first, first + count) as T, one after another: in place where they already are, else copied
// to buffer [count * width].
template <class T>
static const T* read_rows(const Rows& rows, int64_t first, int64_t count, T* buffer) {
  if (is_dense(rows)) {
    Rows flat = rows;
    flat.data += first * rows.width * size_of(rows.dtype);
    flat.count = 1;
    flat.width = count * rows.width;
    flat.step = size_of(rows.dtype);
    return read_row<T>(flat, 0, buffer);
  }
  for (int64_t i = 0; i < count; ++i) {
    T* row = buffer + i * rows.width;
    const T* found = read_row<T>(rows, first + i, row);
    if (found != row) std::memcpy(row, found, (size_t)rows.width * sizeof(T));
  }
  return buffer;
}

// count numbers to a dense output of another dtype than T.
template <class T>
static void write_numbers(char* out, Dtype dtype, const T* values, int64_t count) {
  const int64_t size = size_of(dtype);
  for (int64_t i = 0; i < count; i += 8) {
    const int64_t n = count - i < 8 ? count - i : 8;
    T eight[8]{};
    std::memcpy(eight, values + i, (size_t)n * sizeof(T));
    char written[8 * sizeof(double)];
    write_eight(written, dtype, load_wide(eight));
    std::memcpy(out + i * size, written, (size_t)(n * size));
  }
}

}  // namespace mmfast::MMFAST_ISA
