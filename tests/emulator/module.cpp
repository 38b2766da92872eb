// The CUDA launchers of csrc/adafm/cuda/passes.h, run on the emulator, for NumPy.
//
// 16-bit numbers come as uint16. Buffers that a launcher wants are made here, of just the size that
// it asks for and full of NaN, so a sanitizer sees what goes past and a test sees what was not set.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "adafm/cuda/passes.h"
#include "emulator.h"

namespace py = pybind11;
using namespace lemma_fast;
using namespace lemma_fast::adafm;

namespace {

struct Buffer {
  std::unique_ptr<unsigned char[]> bytes;

  explicit Buffer(size_t size) : bytes(new unsigned char[size]) {
    std::memset(bytes.get(), 0xff, size);
  }
  void* get() const { return bytes.get(); }
};

void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(error);
}

template <class T>
Weights<T> weights_of(std::vector<py::array>& arrays) {
  if (arrays.size() != kWeights) throw std::invalid_argument("AdaFMWeights has 52 tensors");
  float* pointers[kWeights];
  for (int i = 0; i < kWeights; ++i) pointers[i] = static_cast<float*>(arrays[i].mutable_data());
  Weights<T> weights;
  std::memcpy(&weights, pointers, sizeof(weights));
  return weights;
}

void inference(const CudaShape& shape, bool channels_last, py::array features, py::array guidance,
               std::vector<py::array> weights, py::array out) {
  const Buffer folded(folded_bytes(shape)), workspace(inference_workspace_bytes(shape));
  check(fold_cuda(shape, weights_of<const float>(weights), folded.get(), nullptr));
  check(inference_cuda(shape, channels_last, features.data(), guidance.data(), folded.get(),
                       out.mutable_data(), workspace.get(), nullptr));
}

std::unique_ptr<Buffer> forward(const CudaShape& shape, bool training, py::array features,
                                py::array guidance, std::vector<py::array> weights, py::array out) {
  auto saved = std::make_unique<Buffer>(saved_bytes(shape));
  const Buffer workspace(forward_workspace_bytes(shape));
  check(forward_cuda(shape, training, features.data(), guidance.data(), weights_of<float>(weights),
                     out.mutable_data(), saved->get(), workspace.get(), nullptr));
  return saved;
}

void backward(const CudaShape& shape, bool training, py::array out_gradient, py::array features,
              py::array guidance, std::vector<py::array> weights, const Buffer& saved,
              py::array features_gradient, py::array guidance_gradient,
              std::vector<py::array> gradients) {
  const Buffer workspace(backward_workspace_bytes(shape));
  check(backward_cuda(shape, training, out_gradient.data(), features.data(), guidance.data(),
                      weights_of<const float>(weights), saved.get(),
                      features_gradient.mutable_data(), guidance_gradient.mutable_data(),
                      weights_of<float>(gradients), workspace.get(), nullptr));
}

}  // namespace

PYBIND11_MODULE(adafm_emulated, module) {
  py::class_<CudaShape>(module, "Shape")
      .def(py::init([](int64_t images, int64_t channels, int64_t positions, int dtype, bool tf32) {
             return CudaShape{images, channels, positions, static_cast<Dtype>(dtype), tf32};
           }),
           py::arg("images"), py::arg("channels"), py::arg("positions"), py::arg("dtype"),
           py::arg("tf32"));
  py::class_<Buffer>(module, "Buffer");
  module.def("saved_bytes", saved_bytes);
  module.def("inference", inference);
  module.def("forward", forward);
  module.def("backward", backward);
  module.def("run_highest_first", emulator::run_highest_first);
}
