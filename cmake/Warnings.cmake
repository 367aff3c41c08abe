# mcpp_warnings(target): turns on warnings, and the fmt in LibTorch, for a target of this project.
# MCPP_WERROR=ON (scripts/build.sh, CI) turns warnings into errors.
option(MCPP_WERROR "Treat warnings as errors" OFF)
function(mcpp_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion
    -Wnon-virtual-dtor -Woverloaded-virtual)
  if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_GREATER_EQUAL 13)
    # False warnings about std::vector<bool>::reserve ("forming offset 8 is out of the bounds [0, 8]", "... overflows the
    # destination") wherever torch::autograd::Function::apply is inlined. They are located in the standard library, where no
    # pragma has an effect.
    target_compile_options(${target} PRIVATE -Wno-array-bounds -Wno-stringop-overflow)
  endif()
  if(MCPP_SANITIZE)
    # Sanitizer checks in inlined code of the standard library (<regex>) cause false warnings of GCC.
    target_compile_options(${target} PRIVATE -Wno-maybe-uninitialized)
  endif()
  set_target_properties(${target} PROPERTIES LIBTORCH_OWN_FMT ON)
  if(MCPP_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
endfunction()
