// Python's side of an extension module: importing it loads the library, whose static initialisers register the ops, and
// gives it methods. The few names of the limited API that this takes are declared here as PEP 384 fixes them, since a
// plain python3 has no Python.h.
#pragma once

#include <cstdint>

struct _object;
using PyObject = _object;
using Py_ssize_t = intptr_t;

extern "C" {

// METH_FASTCALL: arguments by position, borrowed; a new reference, or null with an exception set, is returned.
using AdaloraMethod = PyObject* (*)(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

struct AdaloraMethodDef {
  const char* name;
  AdaloraMethod method;
  int flags;
  const char* doc;
};

struct AdaloraModuleDef {
  struct {
    intptr_t references;
    void* type;
    PyObject* (*init)();
    intptr_t index;
    void* copy;
  } base;
  const char* name;
  const char* doc;
  intptr_t size;
  AdaloraMethodDef* methods;
  void *slots, *traverse, *clear, *free;
};

PyObject* PyModule_Create2(AdaloraModuleDef* definition, int abi_version);

}  // extern "C"

constexpr int kFastCall = 0x0080;  // METH_FASTCALL

// 3 is PYTHON_ABI_VERSION, the version that modules of the limited API name. What follows the name are the methods'
// definitions.
#define ADALORA_MODULE(name, ...)                                                                             \
  extern "C" __attribute__((visibility("default"))) PyObject* PyInit_##name() {                               \
    static AdaloraMethodDef methods[] = {__VA_ARGS__ __VA_OPT__(, ){nullptr, nullptr, 0, nullptr}};          \
    static AdaloraModuleDef definition = {{1, nullptr, nullptr, 0, nullptr}, #name, nullptr, -1, methods,     \
                                          nullptr, nullptr, nullptr, nullptr};                                \
    return PyModule_Create2(&definition, 3);                                                                  \
  }
