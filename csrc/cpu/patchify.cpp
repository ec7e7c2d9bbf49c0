// A band of patches, one behind the other in the last dimension, is a block of tokens that stays in
// the first-level cache while the rows of the image that it is cut from pass by.
#include <cstring>
#include <string>

#include "cpu/glue.h"
#include "cpu/outputs.h"

namespace mmfast {
namespace {

struct Patches {
  static constexpr int dims = 3;  // fewer have leading ones of size 1
  const char* image;
  const char* tokens;  // [B, L, inner], the numbers of a token one after another
  int64_t batch, channels;
  int64_t places[dims], patch[dims];
  // Of the image, bytes.
  int64_t stride_b, stride_c, strides[dims];
  // Of the tokens, bytes.
  int64_t token_b, token_l;
  bool channels_last;
  int64_t size;  // of a number, bytes

  int64_t bands() const { return batch * places[0] * places[1]; }
};

template <int64_t SIZE>
struct Unit {
  char bytes[SIZE];
};

// Moves count units, `to_step` and `from_step` bytes apart.
template <int64_t SIZE>
inline void move(char* to, int64_t to_step, const char* from, int64_t from_step, int64_t count) {
  for (int64_t i = 0; i < count; ++i, to += to_step, from += from_step) {
    Unit<SIZE> unit;
    std::memcpy(&unit, from, SIZE);
    std::memcpy(to, &unit, SIZE);
  }
}

using Move = void (*)(char*, int64_t, const char*, int64_t, int64_t);

Move move_of(int64_t size) {
  switch (size) {
    case 2: return move<2>;
    case 4: return move<4>;
    case 8: return move<8>;
    case 16: return move<16>;
    case 32: return move<32>;
    default: return nullptr;
  }
}

struct Walk {
  const Patches& p;
  bool to_tokens;
  int64_t unit;  // numbers that lie together on both sides
  Move move_units;

  Walk(const Patches& patches, bool to) : p(patches), to_tokens(to), unit(1) {
    const int64_t width = p.patch[2];
    // Numbers of a patch's row follow each other in the image, and in a token if channels do not
    // come between them.
    const bool together = p.strides[2] == p.size && (!p.channels_last || p.channels == 1);
    if (together && move_of(width * p.size)) unit = width;
    move_units = move_of(unit * p.size);
  }

  void step(const char* token, int64_t token_step, const char* image, int64_t image_step,
            int64_t count) const {
    if (to_tokens)
      move_units((char*)token, token_step, image, image_step, count);
    else
      move_units((char*)image, image_step, token, token_step, count);
  }

  void band(int64_t index) const {
    const int64_t b = index / (p.places[0] * p.places[1]);
    const int64_t place = index % (p.places[0] * p.places[1]);
    const int64_t f = place / p.places[1], h = place % p.places[1], wide = p.places[2];
    const char* image = p.image + b * p.stride_b + f * p.patch[0] * p.strides[0] +
                        h * p.patch[1] * p.strides[1];
    const char* tokens = p.tokens + b * p.token_b + place * wide * p.token_l;
    const int64_t numbers = p.patch[0] * p.patch[1] * p.patch[2];
    const int64_t of_channel = (p.channels_last ? 1 : numbers) * p.size;
    const int64_t of_number = (p.channels_last ? p.channels : 1) * p.size;
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t i = 0; i < p.patch[0]; ++i)
        for (int64_t j = 0; j < p.patch[1]; ++j) {
          const char* row = image + c * p.stride_c + i * p.strides[0] + j * p.strides[1];
          const char* token =
              tokens + c * of_channel + (i * p.patch[1] + j) * p.patch[2] * of_number;
          for (int64_t k = 0; k < p.patch[2]; k += unit)
            step(token + k * of_number, p.token_l, row + k * p.strides[2],
                 p.patch[2] * p.strides[2], wide);
        }
  }

  void run() const {
    const auto body = [](void* context, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) ((const Walk*)context)->band(i);
    };
    parallel().run(p.bands(), body, (void*)this);
  }
};

void run(const Tensor& image, const Tensor& tokens, const std::vector<int64_t>& patch,
         bool channels_last, bool to_tokens) {
  if (image.numel() == 0) return;
  Patches p{};
  p.size = size_of(dtype_of(image));
  p.image = (const char*)image.data_ptr();
  p.tokens = (const char*)tokens.data_ptr();
  p.batch = image.size(0);
  p.channels = image.size(1);
  p.stride_b = image.stride(0) * p.size;
  p.stride_c = image.stride(1) * p.size;
  const int64_t missing = Patches::dims - (int64_t)patch.size();
  for (int64_t d = 0; d < Patches::dims; ++d) {
    const bool there = d >= missing;
    p.patch[d] = there ? patch[(size_t)(d - missing)] : 1;
    p.places[d] = there ? image.size(2 + d - missing) / p.patch[d] : 1;
    p.strides[d] = there ? image.stride(2 + d - missing) * p.size : 0;
  }
  p.token_b = tokens.stride(0) * p.size;
  p.token_l = tokens.stride(1) * p.size;
  p.channels_last = channels_last;
  Walk(p, to_tokens).run();
}

Tensor patchify(const Tensor& x, std::vector<int64_t> patch, bool channels_last) {
  int64_t length = 1, numbers = x.size(1);
  for (size_t d = 0; d < patch.size(); ++d) {
    length *= x.size((int64_t)d + 2) / patch[d];
    numbers *= patch[d];
  }
  Tensor tokens = new_output(x, {x.size(0), length, numbers});
  run(x, tokens, patch, channels_last, true);
  return tokens;
}

Tensor unpatchify(const Tensor& given, std::vector<int64_t> patch, std::vector<int64_t> sizes,
                  bool channels_last) {
  const Tensor tokens =
      given.size(2) > 1 && given.stride(2) != 1 ? torch::stable::contiguous(given) : given;
  int64_t channels = tokens.size(2);
  for (const int64_t p : patch) channels /= p;
  std::vector<int64_t> shape{tokens.size(0), channels};
  shape.insert(shape.end(), sizes.begin(), sizes.end());
  Tensor image = new_output(tokens, shape);
  run(image, tokens, patch, channels_last, false);
  return image;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("patchify", MMFAST_BOX(&patchify));
  m.impl("unpatchify", MMFAST_BOX(&unpatchify));
}

}  // namespace mmfast
