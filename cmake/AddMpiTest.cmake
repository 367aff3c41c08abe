# add_mpi_test(NAME x_test SOURCES x_test.cpp LIBRARIES y RANKS 1 2 4 [TIMEOUT s] [ARGS ...] [GPU])
#
# One executable, one ctest test per rank count (x_test.np2). The watchdog of tests/support/mpi_main.cpp fires 10 s before
# ctest's TIMEOUT and names the test that hangs. GPU: gives the test the label gpu, so that scripts/gpu_check.sh includes it.
set(MPI_TEST_FLAGS "")
if(MPI_CXX_LIBRARY_VERSION_STRING MATCHES "Open MPI")
  set(MPI_TEST_FLAGS --oversubscribe --bind-to none)
endif()
# Golden cases are read from the source tree. HWLOC_HIDE_ERRORS: hwloc, which MPI uses, complains in containers without /sys.
set(MCPP_TEST_ENVIRONMENT
  "MCPP_TEST_CASES=${PROJECT_SOURCE_DIR}/tests/cases;OMP_NUM_THREADS=1;OMPI_MCA_mpi_yield_when_idle=1;OMPI_ALLOW_RUN_AS_ROOT=1;OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1;HWLOC_HIDE_ERRORS=2")
if(MCPP_SANITIZE)
  # Up to GCC 13 and LLVM 16, the __tls_get_addr of sanitizers mistakes some blocks of dynamic thread-local memory for those
  # of glibc 2.19, depending on their address, and LeakSanitizer then reads unmapped memory ("Tracer caught signal 11",
  # google/sanitizers issue 1322).
  list(APPEND MCPP_TEST_ENVIRONMENT "ASAN_OPTIONS=intercept_tls_get_addr=0"
    "LSAN_OPTIONS=suppressions=${PROJECT_SOURCE_DIR}/tests/support/leaks.supp:print_suppressions=0")
endif()
set(MCPP_TEST_DEVICE "cpu" CACHE STRING "Device the multi-rank tests run on: cpu or cuda")

# For scripts/affected_tests.py: writes lines "PROGRAM SOURCE" to test_sources.txt.
function(list_test_sources program)
  foreach(source IN LISTS ARGN)
    cmake_path(ABSOLUTE_PATH source BASE_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR} NORMALIZE)
    cmake_path(RELATIVE_PATH source BASE_DIRECTORY ${PROJECT_SOURCE_DIR})
    set_property(GLOBAL APPEND_STRING PROPERTY MCPP_TEST_SOURCES "${program} ${source}\n")
  endforeach()
endfunction()

add_custom_target(gpu_tests)

function(add_mpi_test)
  cmake_parse_arguments(PARSE_ARGV 0 T "GPU" "NAME;TIMEOUT" "SOURCES;LIBRARIES;RANKS;ARGS")
  if(T_UNPARSED_ARGUMENTS OR NOT T_RANKS)
    message(FATAL_ERROR "add_mpi_test(${T_NAME}): RANKS is required; unknown: ${T_UNPARSED_ARGUMENTS}")
  endif()
  if(NOT T_TIMEOUT)
    set(T_TIMEOUT 300)
  endif()
  add_executable(${T_NAME} ${T_SOURCES})
  list_test_sources(${T_NAME} ${T_SOURCES})
  target_link_libraries(${T_NAME} PRIVATE ${T_LIBRARIES} mpi_gtest_main)
  mcpp_warnings(${T_NAME})
  target_precompile_headers(${T_NAME} REUSE_FROM mcpp_precompiled)
  set(labels mpi)
  if(T_GPU)
    list(APPEND labels gpu)
    add_dependencies(gpu_tests ${T_NAME})
  endif()
  foreach(n IN LISTS T_RANKS)
    set(test ${T_NAME}.np${n})
    add_test(NAME ${test} COMMAND ${MPIEXEC_EXECUTABLE} ${MPIEXEC_NUMPROC_FLAG} ${n} ${MPI_TEST_FLAGS}
      ${MPIEXEC_PREFLAGS} $<TARGET_FILE:${T_NAME}> ${MPIEXEC_POSTFLAGS} ${T_ARGS}
      --gtest_output=xml:${CMAKE_BINARY_DIR}/test-results/${test}.xml)
    math(EXPR watchdog "${T_TIMEOUT} - 10")
    set_tests_properties(${test} PROPERTIES PROCESSORS ${n} TIMEOUT ${T_TIMEOUT} LABELS "${labels};np${n}"
      # One mpirun at a time: Open MPI 4 sometimes fails to start ("orte_session_dir failed") while another mpirun of the
      # same user ends and removes the session folder that both use.
      RESOURCE_LOCK mpirun
      ENVIRONMENT "TEST_RANKS=${n};TEST_WATCHDOG_S=${watchdog};TEST_DEVICE=${MCPP_TEST_DEVICE};${MCPP_TEST_ENVIRONMENT}")
  endforeach()
endfunction()
