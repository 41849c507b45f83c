# find_package(dsa_tvm) -> the imported target dsa_tvm::dsa_tvm. Found relative to this file: the package can be moved.
get_filename_component(_dsa_tvm_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

if(NOT TARGET dsa_tvm::dsa_tvm)
  add_library(dsa_tvm::dsa_tvm SHARED IMPORTED)
  set_target_properties(dsa_tvm::dsa_tvm PROPERTIES
    IMPORTED_LOCATION "${_dsa_tvm_prefix}/lib/libdsa_tvm.so"
    IMPORTED_SONAME "libdsa_tvm.so"
    INTERFACE_INCLUDE_DIRECTORIES "${_dsa_tvm_prefix}/include")
endif()

unset(_dsa_tvm_prefix)
