# Installs the libraries as a CMake package: find_package(megatron_cpp) gives other projects the same targets as here.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

# Installed files find each other after the prefix is moved, and LibTorch at the path they were built with.
set(CMAKE_INSTALL_RPATH "$ORIGIN" "$ORIGIN/../${CMAKE_INSTALL_LIBDIR}")
set(CMAKE_INSTALL_RPATH_USE_LINK_PATH ON)

# A separate include folder, because other projects have a parallel/, too.
set(MCPP_INSTALL_INCLUDEDIR ${CMAKE_INSTALL_INCLUDEDIR}/${PROJECT_NAME})
set(MCPP_INSTALL_CMAKEDIR ${CMAKE_INSTALL_LIBDIR}/cmake/${PROJECT_NAME})

# mcpp_rpath(target): gives an installed target the same RPATH in the build as after installation. Otherwise CMake pads the
# RPATH of the build with colons, and the loader reads an empty entry as the current folder.
function(mcpp_rpath target)
  set_target_properties(${target} PROPERTIES BUILD_WITH_INSTALL_RPATH ON
    LIBRARY_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/${CMAKE_INSTALL_LIBDIR}"
    RUNTIME_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/bin")
endfunction()

# mcpp_public_library(layer): makes the target megatron_cpp_<layer> available as megatron_cpp::<layer>, in builds and after
# installation, with the headers of its file set HEADERS. Headers of parallel/ and step37/ can also be included as
# <megatron_cpp/parallel/...> and <megatron_cpp/step37/...>.
function(mcpp_public_library layer)
  set(target megatron_cpp_${layer})
  add_library(megatron_cpp::${layer} ALIAS ${target})
  # Before 1.0 a minor version may break the binary interface.
  set_target_properties(${target} PROPERTIES EXPORT_NAME ${layer} VERSION ${PROJECT_VERSION}
    SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
  target_compile_features(${target} PUBLIC cxx_std_20)
  mcpp_rpath(${target})
  set(forwarding_dir ${PROJECT_BINARY_DIR}/forwarding_headers)
  set(forwarding "")
  get_target_property(headers ${target} HEADER_SET)
  foreach(header IN LISTS headers)
    file(RELATIVE_PATH name ${PROJECT_SOURCE_DIR} ${header})
    if(NOT name MATCHES "^megatron_cpp/")
      file(CONFIGURE OUTPUT ${forwarding_dir}/megatron_cpp/${name} CONTENT "#pragma once\n\n#include \"${name}\"\n")
      list(APPEND forwarding ${forwarding_dir}/megatron_cpp/${name})
    endif()
  endforeach()
  target_sources(${target} PUBLIC FILE_SET forwarding TYPE HEADERS BASE_DIRS ${forwarding_dir} FILES ${forwarding})
  if(MCPP_INSTALL)
    install(TARGETS ${target} EXPORT megatron_cpp_targets
      LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
      ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
      FILE_SET HEADERS DESTINATION ${MCPP_INSTALL_INCLUDEDIR}
      FILE_SET forwarding DESTINATION ${MCPP_INSTALL_INCLUDEDIR})
  endif()
endfunction()

# Installs the exported targets, the config and version files of the package, and LibTorch.cmake, which the package uses, too.
function(mcpp_install_package)
  install(EXPORT megatron_cpp_targets NAMESPACE megatron_cpp:: DESTINATION ${MCPP_INSTALL_CMAKEDIR})
  configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/megatron_cppConfig.cmake.in
    ${PROJECT_BINARY_DIR}/megatron_cppConfig.cmake INSTALL_DESTINATION ${MCPP_INSTALL_CMAKEDIR})
  write_basic_package_version_file(${PROJECT_BINARY_DIR}/megatron_cppConfigVersion.cmake
    COMPATIBILITY SameMinorVersion)
  install(FILES ${PROJECT_BINARY_DIR}/megatron_cppConfig.cmake ${PROJECT_BINARY_DIR}/megatron_cppConfigVersion.cmake
    ${PROJECT_SOURCE_DIR}/cmake/LibTorch.cmake DESTINATION ${MCPP_INSTALL_CMAKEDIR})
endfunction()
