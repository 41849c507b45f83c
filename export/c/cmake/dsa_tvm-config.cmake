# find_package(dsa_tvm) -> the imported target dsa_tvm::dsa_tvm. Found relative to this file: the package can be moved.
get_filename_component(_dsa_tvm_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

if(NOT TARGET dsa_tvm::dsa_tvm)
  if(_dsa_tvm_prefix MATCHES ",")
    # For a library or a link directory that it knows, CMake writes -Wl,-rpath,PATH, which the compiler cuts at every comma.
    add_library(dsa_tvm::dsa_tvm INTERFACE IMPORTED)
    string(REGEX REPLACE "([\"\\$`])" "\\\\\\1" _dsa_tvm_quoted "${_dsa_tvm_prefix}")
    set_target_properties(dsa_tvm::dsa_tvm PROPERTIES
      INTERFACE_LINK_OPTIONS "SHELL:-L\"${_dsa_tvm_quoted}/lib\" -Wl,-rpath -Xlinker \"${_dsa_tvm_quoted}/lib\""
      INTERFACE_LINK_LIBRARIES "-ldsa_tvm;m")
    unset(_dsa_tvm_quoted)
  else()
    add_library(dsa_tvm::dsa_tvm SHARED IMPORTED)
    set_target_properties(dsa_tvm::dsa_tvm PROPERTIES
      IMPORTED_LOCATION "${_dsa_tvm_prefix}/lib/libdsa_tvm.so"
      IMPORTED_SONAME "libdsa_tvm.so"
      INTERFACE_LINK_LIBRARIES m)
  endif()
  set_target_properties(dsa_tvm::dsa_tvm PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${_dsa_tvm_prefix}/include")
endif()

unset(_dsa_tvm_prefix)
