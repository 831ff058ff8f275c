// The functions of the CUDA driver that a launch takes. They are looked up when first needed, not linked: the module
// loads where there is no driver, too.
#pragma once

#include <cuda.h>

namespace adalora::cuda {

struct Driver {
  decltype(&cuLaunchKernelEx) launch;
  decltype(&cuTensorMapReplaceAddress) replace_address;
  decltype(&cuCtxGetCurrent) current_context;
  decltype(&cuCtxSetCurrent) set_context;
  decltype(&cuDeviceGet) device;
  decltype(&cuDevicePrimaryCtxRetain) primary_context;
  decltype(&cuGetErrorString) error_string;
};

// Null where there is no driver, or one from before CUDA 12, which has no tensor maps.
const Driver* driver();

}  // namespace adalora::cuda
