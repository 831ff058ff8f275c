#include "cuda/driver.h"

#include <dlfcn.h>

namespace adalora::cuda {

namespace {

template <typename Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace

const Driver* driver() {
  static const Driver* found = []() -> const Driver* {
    static Driver all{};
    void* library = dlopen("libcuda.so.1", RTLD_LAZY);
    const bool complete = library != nullptr && find(library, "cuLaunchKernelEx", all.launch) &&
                          find(library, "cuTensorMapReplaceAddress", all.replace_address) &&
                          find(library, "cuCtxGetCurrent", all.current_context) &&
                          find(library, "cuCtxSetCurrent", all.set_context) &&
                          find(library, "cuDeviceGet", all.device) &&
                          find(library, "cuDevicePrimaryCtxRetain", all.primary_context) &&
                          find(library, "cuGetErrorString", all.error_string);
    return complete ? &all : nullptr;
  }();
  return found;
}

}  // namespace adalora::cuda
