# Compiles the public headers that changed since CI_BASE, each alone (all of them with MCPP_CHANGED_HEADERS=all in the
# environment; those listed there, separated by semicolons, otherwise).
#   cmake -DSOURCE=tree -DPREFIX=installed -DINCLUDEDIR=below it -DBUILD=folder -DOPTIONS="for cmake" -P changed.cmake
if(DEFINED ENV{MCPP_CHANGED_HEADERS})
  set(changed "$ENV{MCPP_CHANGED_HEADERS}")
else()
  execute_process(COMMAND ${SOURCE}/scripts/changed_files.sh *.h OUTPUT_VARIABLE changed COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX REPLACE "\n$" "" changed "${changed}")
  string(REPLACE "\n" ";" changed "${changed}")
endif()
set(public "")
foreach(header IN LISTS changed)
  if(header STREQUAL all OR EXISTS ${PREFIX}/${INCLUDEDIR}/${header})
    list(APPEND public ${header})
  endif()
endforeach()
list(LENGTH public num_public)
message("${num_public} changed public headers: ${public}")
execute_process(COMMAND ${CMAKE_COMMAND} -S ${SOURCE}/tests/install/headers -B ${BUILD} ${OPTIONS} "-DHEADERS=${public}"
  COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${CMAKE_COMMAND} --build ${BUILD} -j 2 COMMAND_ERROR_IS_FATAL ANY)
