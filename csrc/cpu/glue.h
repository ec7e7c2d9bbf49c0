// From torch's stable tensors to the kernels' views.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/nearest_code.h"
#include "cpu/tensor_view.h"

namespace mmfast {

using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Double: return Dtype::float64;
    default: STD_TORCH_CHECK(false, "mmfast: expected float32, float16, bfloat16 or float64");
  }
}

// The string of a handle, which is freed. torch's own conversion, as of 2.13, never frees a copy that
// it makes: a few bytes a call, but between tensors, so that memory falls to pieces nothing fits.
inline std::string taken(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  const bool known = !torch_string_length(handle, &length) && !torch_string_c_str(handle, &data);
  std::string text = known ? std::string(data, length) : std::string();
  STD_TORCH_CHECK(!torch_delete_string(handle) && known, "mmfast: a string cannot be read");
  return text;
}

// A function of an op, boxed: strings come as handles.
template <auto function>
struct Boxed;
template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct Boxed<function> {
  template <class T>
  static constexpr bool is_string = std::is_same_v<std::remove_cvref_t<T>, std::string>;
  template <class T>
  using Held = std::conditional_t<is_string<T>, StringHandle, T>;

  template <class T>
  static decltype(auto) given(std::remove_reference_t<Held<T>>& held) {
    if constexpr (is_string<T>)
      return taken(held);
    else
      return static_cast<T&&>(held);
  }

  static Result call(Held<Parameters>... held) { return function(given<Parameters>(held)...); }
};
#define MMFAST_BOX(function) TORCH_BOX((&mmfast::Boxed<function>::call))

// tensor, or a copy of it whose numbers lie together. Torch's own takes a turn through the dispatcher
// to say that nothing is to do.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// tensor, or a copy of it where its dimensions are too many for rows_of.
inline Tensor for_rows(const Tensor& tensor) {
  return tensor.dim() <= Rows::max_dims + 1 ? tensor : torch::stable::contiguous(tensor);
}

// Dimensions [first, dim - 1) of tensor, which for_rows returned, as rows, its last as their width. Neighbouring dimensions
// that one stride describes are joined.
inline Rows rows_of(const Tensor& tensor, int64_t first, int64_t head) {
  Rows rows{};
  rows.dtype = dtype_of(tensor);
  const int64_t size = size_of(rows.dtype), last = tensor.dim() - 1;
  rows.data = (const char*)tensor.data_ptr() + (first ? head * tensor.stride(0) * size : 0);
  rows.width = tensor.size(last);
  rows.step = tensor.stride(last) * size;
  rows.count = 1;
  for (int64_t d = first; d < last; ++d) {
    const int64_t n = tensor.size(d), stride = tensor.stride(d) * size;
    rows.count *= n;
    if (n == 1) continue;
    if (rows.dims && rows.strides[rows.dims - 1] == stride * n) {
      rows.sizes[rows.dims - 1] *= n;
      rows.strides[rows.dims - 1] = stride;
      continue;
    }
    rows.sizes[rows.dims] = n;
    rows.strides[rows.dims++] = stride;
  }
  if (rows.dims == 0) {
    rows.dims = 1;
    rows.sizes[0] = 1;
    rows.strides[0] = 0;
  }
  return rows;
}

// The first dims sizes of tensor.
inline std::vector<int64_t> sizes_of(const Tensor& tensor, int64_t dims) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < dims; ++d) sizes.push_back(tensor.size(d));
  return sizes;
}

// Where among the choices value is; argument is what an error calls it.
inline int32_t choice(const char* argument, const std::string& value,
                      std::initializer_list<const char*> choices) {
  std::string names;
  int32_t i = 0;
  for (const char* name : choices) {
    if (value == name) return i;
    names += (i++ ? ", " : "") + std::string(name);
  }
  STD_TORCH_CHECK(false, argument, " must be one of ", names, ", got '", value, "'");
}

inline Metric metric_of(const std::string& name) {
  return (Metric)choice("metric", name, {"euclidean", "cosine", "dot"});
}

inline Parallel parallel() {
  return {(int)torch::stable::get_num_threads(), [](int64_t count, Body body, void* context) {
            torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
              body(context, begin, end);
            });
          }};
}

}  // namespace mmfast
