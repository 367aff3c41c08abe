# mcpp_warnings(target): our warnings, for our own targets only, and LibTorch's own fmt, which others' targets don't get.
# MCPP_WERROR=ON (scripts/build.sh, CI) turns warnings into errors.
option(MCPP_WERROR "Treat warnings as errors" OFF)
function(mcpp_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion
    -Wnon-virtual-dtor -Woverloaded-virtual)
  set_target_properties(${target} PROPERTIES LIBTORCH_OWN_FMT ON)
  if(MCPP_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
endfunction()
