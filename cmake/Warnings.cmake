# mcpp_warnings(target): our warnings, for our own targets only. MCPP_WERROR=ON (CI) turns them into errors.
option(MCPP_WERROR "Treat warnings as errors" OFF)
function(mcpp_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion
    -Wnon-virtual-dtor -Woverloaded-virtual)
  if(MCPP_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
endfunction()
