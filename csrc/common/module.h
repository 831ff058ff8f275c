// An empty Python module: importing it loads the library, whose static initialisers register the ops. The few names of
// the limited API that this takes are declared here as PEP 384 fixes them, since a plain python3 has no Python.h.
#pragma once

#include <cstdint>

extern "C" {

struct AdaloraModuleDef {
  struct {
    intptr_t references;
    void* type;
    void* (*init)();
    intptr_t index;
    void* copy;
  } base;
  const char* name;
  const char* doc;
  intptr_t size;
  void *methods, *slots, *traverse, *clear, *free;
};

void* PyModule_Create2(AdaloraModuleDef* definition, int abi_version);

}  // extern "C"

// 3 is PYTHON_ABI_VERSION, the version that modules of the limited API name.
#define ADALORA_MODULE(name)                                                                                      \
  extern "C" __attribute__((visibility("default"))) void* PyInit_##name() {                                      \
    static AdaloraModuleDef definition = {{1, nullptr, nullptr, 0, nullptr}, #name, nullptr, -1, nullptr, nullptr, \
                                          nullptr, nullptr, nullptr};                                             \
    return PyModule_Create2(&definition, 3);                                                                     \
  }
