# Installs BUILD and moves it to PREFIX: nothing installed may know where it was put first.
get_filename_component(folder ${PREFIX} DIRECTORY)
file(REMOVE_RECURSE ${folder})
execute_process(COMMAND ${CMAKE_COMMAND} --install ${BUILD} --prefix ${folder}/first_prefix
  COMMAND_ERROR_IS_FATAL ANY OUTPUT_QUIET)
file(RENAME ${folder}/first_prefix ${PREFIX})
