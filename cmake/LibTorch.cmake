# Imported targets for LibTorch, made directly from its files.
#
# The wheel's own find_package(Torch) requires a matching CUDA toolkit with nvcc, and may find a system NCCL that lacks
# symbols; neither is needed to compile and link against the wheel. Hence these targets:
#   LibTorch::torch       headers, libtorch_cpu, libc10; a target with the property LIBTORCH_OWN_FMT gets LibTorch's fmt, too
#   LibTorch::torch_cuda  libtorch_cuda, libc10_cuda, the wheel's NCCL and CUDA headers; only if LibTorch has CUDA
#
# Torch_ROOT: the folder that holds include/ and lib/ (the wheel's torch/ folder, or an unpacked libtorch).

set(Torch_ROOT "$ENV{Torch_ROOT}" CACHE PATH "Folder of LibTorch that holds include/ and lib/")
if(Torch_ROOT AND NOT IS_ABSOLUTE "${Torch_ROOT}")
  cmake_path(ABSOLUTE_PATH Torch_ROOT BASE_DIRECTORY "$ENV{PWD}" NORMALIZE OUTPUT_VARIABLE absolute)
  set_property(CACHE Torch_ROOT PROPERTY VALUE "${absolute}")
endif()
if(Torch_ROOT MATCHES "[,;]")
  # The path becomes part of `-Wl,-rpath,...`, which the compiler splits at commas.
  message(FATAL_ERROR "Torch_ROOT='${Torch_ROOT}' must have neither comma nor semicolon: no linker's option can name it. "
    "Move it, or give a link to it that has none.")
endif()
if(NOT Torch_ROOT OR NOT EXISTS "${Torch_ROOT}/lib/libtorch_cpu.so")
  message(FATAL_ERROR "No LibTorch at Torch_ROOT='${Torch_ROOT}' (lib/libtorch_cpu.so is missing). "
    "Run scripts/build.sh, which sets one up, or pass -DTorch_ROOT=/path/to/torch.")
endif()

set(LibTorch_VERSION "")
foreach(header include/torch/headeronly/version.h include/torch/csrc/api/include/torch/version.h)  # new and old
  if(NOT LibTorch_VERSION AND EXISTS "${Torch_ROOT}/${header}")
    file(STRINGS "${Torch_ROOT}/${header}" torch_version_lines REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
    list(TRANSFORM torch_version_lines REPLACE "[^0-9]" "")
    list(JOIN torch_version_lines "." LibTorch_VERSION)
  endif()
endforeach()
if(NOT LibTorch_VERSION)
  message(FATAL_ERROR "The LibTorch at ${Torch_ROOT} doesn't say its version (include/torch/headeronly/version.h).")
endif()
# An installed package requires exactly one version; megatron_cppConfig.cmake checks that.
if(LibTorch_VERSION VERSION_LESS 2.11 AND NOT megatron_cpp_LIBTORCH_VERSION)
  message(FATAL_ERROR "LibTorch ${LibTorch_VERSION} at ${Torch_ROOT} is too old; 2.11 is the oldest.")
endif()

# Imported targets are global if CMAKE_FIND_PACKAGE_TARGETS_GLOBAL is set, as for packages.
set(torch_scope "")
if(CMAKE_FIND_PACKAGE_TARGETS_GLOBAL)
  set(torch_scope GLOBAL)
endif()
file(GLOB torch_nvidia_folders "${Torch_ROOT}/../nvidia/*/lib")
if(NOT TARGET LibTorch::torch)
  foreach(library c10 torch_cpu)
    add_library(LibTorch::${library} SHARED IMPORTED ${torch_scope})
    set_target_properties(LibTorch::${library} PROPERTIES IMPORTED_LOCATION "${Torch_ROOT}/lib/lib${library}.so")
  endforeach()
  add_library(LibTorch::torch INTERFACE IMPORTED ${torch_scope})
  # The wheel's include/ also has headers of other projects (fmt 12, protobuf, pybind11, ...), which would hide the versions
  # that a user's project links with. So users get LibTorch's own folders through symbolic links, and the whole include/
  # after the system's folders (-idirafter).
  set(torch_include "${CMAKE_BINARY_DIR}/libtorch_include")
  file(MAKE_DIRECTORY "${torch_include}")
  foreach(folder ATen c10 caffe2 torch)
    if(EXISTS "${Torch_ROOT}/include/${folder}")
      file(CREATE_LINK "${Torch_ROOT}/include/${folder}" "${torch_include}/${folder}" SYMBOLIC)
    endif()
  endforeach()
  set(own_fmt $<BOOL:$<TARGET_PROPERTY:LIBTORCH_OWN_FMT>>)
  target_include_directories(LibTorch::torch SYSTEM INTERFACE
    "$<IF:${own_fmt},${Torch_ROOT}/include,${torch_include}>" "${Torch_ROOT}/include/torch/csrc/api/include")
  target_compile_options(LibTorch::torch INTERFACE "$<$<NOT:${own_fmt}>:SHELL:-idirafter \"${Torch_ROOT}/include\">")
  target_link_libraries(LibTorch::torch INTERFACE LibTorch::torch_cpu LibTorch::c10)
  # fmt 12 is header-only here: its library is inside libtorch_cpu, with hidden symbols.
  target_compile_definitions(LibTorch::torch INTERFACE $<${own_fmt}:FMT_HEADER_ONLY=1> USE_DISTRIBUTED USE_C10D)
  # libtorch_cpu of a CUDA wheel needs libcudart and libcupti in these folders; our shared libraries need libtorch_cuda.
  foreach(folder IN LISTS torch_nvidia_folders ITEMS "${Torch_ROOT}/lib")
    target_link_options(LibTorch::torch INTERFACE "LINKER:-rpath-link,${folder}")
  endforeach()
endif()

set(LibTorch_HAS_CUDA OFF)
if(EXISTS "${Torch_ROOT}/lib/libtorch_cuda.so")
  # NO_CACHE: results depend on Torch_ROOT, which may change.
  find_path(LibTorch_NCCL_INCLUDE nccl.h HINTS "${NCCL_ROOT}/include" "${Torch_ROOT}/../nvidia/nccl/include"
    NO_DEFAULT_PATH NO_CACHE)
  find_library(LibTorch_NCCL_LIBRARY NAMES nccl libnccl.so.2 HINTS "${NCCL_ROOT}/lib"
    "${Torch_ROOT}/../nvidia/nccl/lib" NO_DEFAULT_PATH NO_CACHE)
  file(GLOB cuda_include_folders "${Torch_ROOT}/../nvidia/cu1*/include" "${Torch_ROOT}/../nvidia/cuda_runtime/include")
  find_path(LibTorch_CUDA_INCLUDE cuda_runtime_api.h HINTS ${cuda_include_folders} ENV CUDA_HOME
    PATH_SUFFIXES include NO_DEFAULT_PATH NO_CACHE)
  # cuda_runtime.h, which headers of c10 include, needs crt/, which is not in the wheel, but in the package nvidia-cuda-crt.
  find_path(LibTorch_CUDA_CRT_INCLUDE crt/host_config.h HINTS ${cuda_include_folders} ENV CUDA_HOME
    PATH_SUFFIXES include NO_DEFAULT_PATH NO_CACHE)
  find_library(LibTorch_CUDART_LIBRARY NAMES libcudart.so.13 libcudart.so.12 cudart HINTS ${torch_nvidia_folders}
    ENV CUDA_HOME PATH_SUFFIXES lib64 lib NO_DEFAULT_PATH NO_CACHE)
  set(torch_cuda_needs LibTorch_NCCL_INCLUDE LibTorch_NCCL_LIBRARY LibTorch_CUDA_INCLUDE LibTorch_CUDA_CRT_INCLUDE
    LibTorch_CUDART_LIBRARY)
  set(torch_cuda_lacks "")
  foreach(need IN LISTS torch_cuda_needs)
    if(NOT ${need})
      list(APPEND torch_cuda_lacks ${need})
    endif()
  endforeach()
  if(torch_cuda_lacks)
    message(STATUS "LibTorch has CUDA, but no NCCL can be built: ${torch_cuda_lacks} not found (nccl.h, libnccl, "
      "cuda_runtime_api.h, crt/host_config.h, libcudart; pip packages nvidia-nccl-cu13, nvidia-cuda-runtime, "
      "nvidia-cuda-crt beside the torch wheel, or NCCL_ROOT and CUDA_HOME)")
  else()
    set(LibTorch_HAS_CUDA ON)
    if(NOT TARGET LibTorch::torch_cuda)
      add_library(LibTorch::torch_cuda_library SHARED IMPORTED ${torch_scope})
      set_target_properties(LibTorch::torch_cuda_library PROPERTIES
        IMPORTED_LOCATION "${Torch_ROOT}/lib/libtorch_cuda.so")
      add_library(LibTorch::c10_cuda SHARED IMPORTED ${torch_scope})
      set_target_properties(LibTorch::c10_cuda PROPERTIES IMPORTED_LOCATION "${Torch_ROOT}/lib/libc10_cuda.so")
      add_library(LibTorch::torch_cuda INTERFACE IMPORTED ${torch_scope})
      target_include_directories(LibTorch::torch_cuda SYSTEM INTERFACE
        "${LibTorch_NCCL_INCLUDE}" "${LibTorch_CUDA_INCLUDE}" "${LibTorch_CUDA_CRT_INCLUDE}")
      target_link_libraries(LibTorch::torch_cuda INTERFACE
        LibTorch::torch LibTorch::torch_cuda_library LibTorch::c10_cuda "${LibTorch_NCCL_LIBRARY}" "${LibTorch_CUDART_LIBRARY}")
    endif()
  endif()
endif()
