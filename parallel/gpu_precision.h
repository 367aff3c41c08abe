// How exactly GPUs multiply.
#pragma once

namespace parallel {

/// From here on GPUs compute products and convolutions of float32 tensors in float32, and add those of float16 and
/// bfloat16 up in float32. By LibTorch's defaults cuDNN's convolutions of float32 run in TF32, with 10 bits after the
/// point, and cuBLAS may round partial sums of half types. For the whole process, on all its threads; changes nothing
/// on the CPU, and needs no GPU. Runtime::choose_device does it where it chooses a GPU; a program that chooses its
/// device itself calls it before its first product. Who prefers TF32's speed allows it afterwards:
/// at::globalContext().setAllowTF32CuBLAS(true), setAllowTF32CuDNN(true).
void multiply_exactly_on_gpus();

}  // namespace parallel
