# mcpp_warnings(target): our warnings, for our own targets only, and LibTorch's own fmt, which others' targets don't get.
# MCPP_WERROR=ON (scripts/build.sh, CI) turns warnings into errors.
option(MCPP_WERROR "Treat warnings as errors" OFF)
function(mcpp_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion
    -Wnon-virtual-dtor -Woverloaded-virtual)
  if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_GREATER_EQUAL 13)
    # Wherever torch::autograd::Function::apply is inlined, it warns of std::vector<bool>::reserve in there ("forming offset 8 is
    # out of the bounds [0, 8]", or without that "... overflows the destination"), which is right as it stands. The place is the
    # standard library's, and no pragma reaches it.
    target_compile_options(${target} PRIVATE -Wno-array-bounds -Wno-stringop-overflow)
  endif()
  if(MCPP_SANITIZE)
    # The checks that sanitizers put into the standard library's inlined code (<regex>) make GCC warn of it without cause.
    target_compile_options(${target} PRIVATE -Wno-maybe-uninitialized)
  endif()
  set_target_properties(${target} PROPERTIES LIBTORCH_OWN_FMT ON)
  if(MCPP_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
endfunction()
