// The only pybind11 file: build information and the processor's capabilities. No torch headers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/kept_memory.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of mmfast; importing this registers them with torch.";
  m.def("build_info", [] {
    py::dict info;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#else
    info["compiler"] = "gcc " __VERSION__;
#endif
    info["torch_target_version"] = MMFAST_TORCH_TARGET;
    return info;
  });
  m.def(
      "dot_products",
      [](int64_t rounds, bool bfloat16) {
        const mmfast::Kernels& kernels = mmfast::kernels();
        return (bfloat16 ? kernels.bfloat16_products : kernels.integer_products)(rounds);
      },
      py::arg("rounds"), py::arg("bfloat16"), py::call_guard<py::gil_scoped_release>(),
      "Run rounds of dot-product instructions, int16 or bfloat16; the multiply-adds they were.");
  m.def(
      "matrix_products", [](int64_t rounds) { return mmfast::kernels().matrix_products(rounds); },
      py::arg("rounds"), py::call_guard<py::gil_scoped_release>(),
      "Run rounds of products of bfloat16 matrices; the multiply-adds they were, 0 without AMX.");
  m.def("kept_bytes", &mmfast::kept_bytes, "Bytes of outputs that died, kept for the next ones.");
  m.def("release_kept_memory", &mmfast::release_kept_memory, "Give them back to the system.");
  m.attr("LEAST_KEPT") = mmfast::least_kept;
  m.def("isa", [] { return mmfast::kernels().isa; }, "The instruction set in use.");
  m.def("supported_isas", &mmfast::supported_isas, "The instruction sets this processor has.");
}
