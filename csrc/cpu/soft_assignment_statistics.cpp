#include "cpu/soft_assignment_statistics.h"

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/glue.h"
#include "cpu/isa.h"
#include "cpu/outputs.h"

namespace mmfast {
namespace {

using torch::headeronly::ScalarType;

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  if (!tensor) return tensor;
  return torch::stable::contiguous(*tensor);
}

// Where head h of a dense tensor begins; null if there is none.
char* head_of(const std::optional<Tensor>& tensor, int64_t h, int64_t numbers) {
  if (!tensor) return nullptr;
  return (char*)tensor->data_ptr() + h * numbers * size_of(dtype_of(*tensor));
}

struct Call {
  Tensor x, codebook;
  std::optional<Tensor> weights;
  double temperature;
  Logits metric;
  int64_t heads, batch_dims;  // heads: whether there are any
  bool wide;

  Call(const Tensor& vectors, const Tensor& codes, const std::optional<Tensor>& given,
       double temperature, const std::string& name, int64_t batch_dims)
      : x(for_rows(vectors)),
        codebook(codes),
        weights(dense(given)),
        temperature(temperature),
        metric((Logits)choice("metric", name, {"euclidean", "distance", "cosine", "dot"})),
        heads(codes.dim() == 3),
        batch_dims(batch_dims),
        wide(dtype_of(x) == Dtype::float64 || dtype_of(codes) == Dtype::float64) {}

  int64_t num_heads() const { return heads ? x.size(0) : 1; }
  int64_t num_codes() const { return codebook.size(heads); }
  ScalarType dtype() const { return wide ? ScalarType::Double : ScalarType::Float; }

  SoftAssignmentArgs of_head(int64_t h, const std::optional<Tensor>& means,
                             const std::optional<Tensor>& entropy, const Tensor& saved) const {
    SoftAssignmentArgs args{};
    args.x = rows_of(x, heads, h);
    args.codes = rows_of(codebook, heads, h);
    args.groups = 1;
    for (int64_t d = 0; d < batch_dims; ++d) args.groups *= x.size(heads + d);
    if (weights) args.weights_dtype = dtype_of(*weights);
    args.weights = head_of(weights, h, args.x.count);
    args.temperature = temperature;
    args.metric = metric;
    args.wide = wide;
    args.means = head_of(means, h, args.groups * args.codes.count);
    args.entropy = head_of(entropy, h, args.groups);
    args.saved = head_of(saved, h, args.x.count * 2);
    return args;
  }

  void check(const char* name, bool done) const {
    STD_TORCH_CHECK(done, name, ": out of memory for ", num_codes(), " codes of dimension ",
                    codebook.size(heads + 1));
  }
};

std::tuple<Tensor, Tensor, Tensor> soft_assignment_statistics(
    const Tensor& vectors, const Tensor& codebook, const std::optional<Tensor>& weights,
    double temperature, const std::string& metric, int64_t batch_dims) {
  const Call call(vectors, codebook, weights, temperature, metric, batch_dims);
  const Tensor& x = call.x;
  std::vector<int64_t> sizes = sizes_of(x, call.heads + batch_dims);
  Tensor entropy = new_output(x, sizes, call.dtype());
  sizes.push_back(call.num_codes());
  Tensor means = new_output(x, sizes, call.dtype());
  sizes = sizes_of(x, x.dim() - 1);
  sizes.push_back(2);
  Tensor saved = new_output(x, sizes, call.dtype());
  for (int64_t h = 0; h < call.num_heads(); ++h)
    call.check("soft_assignment_statistics",
               kernels().soft_assignment_statistics(call.of_head(h, means, entropy, saved),
                                                    parallel()));
  return {means, entropy, saved};
}

std::tuple<Tensor, Tensor> soft_assignment_statistics_bwd(
    const std::optional<Tensor>& given_means, const std::optional<Tensor>& given_entropy,
    const Tensor& vectors, const Tensor& codebook, const std::optional<Tensor>& weights,
    const Tensor& given_saved, double temperature, const std::string& metric, int64_t batch_dims,
    bool need_x, bool need_codebook) {
  const Call call(vectors, codebook, weights, temperature, metric, batch_dims);
  const Tensor& x = call.x;
  const std::optional<Tensor> means = dense(given_means), entropy = dense(given_entropy);
  const Tensor saved = torch::stable::contiguous(given_saved);
  const std::vector<int64_t> none{0};
  Tensor x_gradient = new_output(x, need_x ? sizes_of(x, x.dim()) : none);
  Tensor codebook_gradient = new_output(
      codebook, need_codebook ? sizes_of(codebook, codebook.dim()) : none);
  for (int64_t h = 0; h < call.num_heads(); ++h) {
    SoftAssignmentBwdArgs args{};
    args.forward = call.of_head(h, means, entropy, saved);
    const Rows &rows = args.forward.x, &codes = args.forward.codes;
    if (need_x) args.x_gradient = head_of(x_gradient, h, rows.count * rows.width);
    if (need_codebook)
      args.codebook_gradient = head_of(codebook_gradient, h, codes.count * codes.width);
    call.check("soft_assignment_statistics_bwd",
               kernels().soft_assignment_statistics_bwd(args, parallel()));
  }
  return {x_gradient, codebook_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("soft_assignment_statistics", MMFAST_BOX(&soft_assignment_statistics));
  m.impl("soft_assignment_statistics_bwd", MMFAST_BOX(&soft_assignment_statistics_bwd));
}

}  // namespace mmfast
