#include "cuda/replay.h"

#include <algorithm>
#include <cstring>

namespace adalora::cuda {

namespace {

// A thread of autograd may come here before it has made a call that gives it a context.
CUresult ensure_context(const Driver& driver, int ordinal) {
  CUcontext context = nullptr;
  CUresult code = driver.current_context(&context);
  if (code != CUDA_SUCCESS || context != nullptr) return code;
  CUdevice device;
  if ((code = driver.device(&device, ordinal)) != CUDA_SUCCESS) return code;
  if ((code = driver.primary_context(&context, device)) != CUDA_SUCCESS) return code;
  return driver.set_context(context);
}

CUresult make(const Driver& driver, const Launch& launch, CUstream stream, const uint64_t* addresses) {
  alignas(CUtensorMap) std::byte parameters[kMostBytes];
  void* pointers[kMostParameters];
  std::memcpy(parameters, launch.parameters.data(), launch.parameters.size());
  for (const Place& place : launch.places) {
    const uint64_t address = addresses[place.address] + static_cast<uint64_t>(place.beyond);
    std::byte* target = parameters + place.offset;
    if (place.in_map) {
      const CUresult code =
          driver.replace_address(reinterpret_cast<CUtensorMap*>(target), reinterpret_cast<void*>(address));
      if (code != CUDA_SUCCESS) return code;
    } else {
      std::memcpy(target, &address, sizeof address);
    }
  }
  for (size_t i = 0; i < launch.offsets.size(); ++i) pointers[i] = parameters + launch.offsets[i];
  CUlaunchAttribute dependent{};
  dependent.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  dependent.value.programmaticStreamSerializationAllowed = 1;
  CUlaunchConfig config{};
  config.gridDimX = launch.grid[0];
  config.gridDimY = launch.grid[1];
  config.gridDimZ = launch.grid[2];
  config.blockDimX = launch.threads;
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = launch.shared_bytes;
  config.hStream = stream;
  config.attrs = &dependent;
  config.numAttrs = launch.dependent;
  return driver.launch(&config, launch.function, pointers, nullptr);
}

bool within_bounds(const Launch& launch, size_t addresses) {
  const size_t bytes = launch.parameters.size();
  const auto within = [bytes](uint32_t offset, size_t size) { return offset <= bytes && size <= bytes - offset; };
  return bytes <= kMostBytes && launch.offsets.size() <= kMostParameters &&
         std::all_of(launch.offsets.begin(), launch.offsets.end(), [&](uint32_t o) { return within(o, 1); }) &&
         std::all_of(launch.places.begin(), launch.places.end(), [&](const Place& place) {
           const size_t size = place.in_map ? sizeof(CUtensorMap) : sizeof(uint64_t);
           const size_t alignment = place.in_map ? alignof(CUtensorMap) : 1;
           return within(place.offset, size) && place.offset % alignment == 0 && place.address < addresses;
         });
}

}  // namespace

Outcome run(const Driver& driver, const Replay& replay, CUstream stream, const uint64_t* addresses) {
  if (const CUresult code = ensure_context(driver, replay.device); code != CUDA_SUCCESS) return {code, nullptr};
  for (const Launch& launch : replay.launches) {
    if (const CUresult code = make(driver, launch, stream, addresses); code != CUDA_SUCCESS) return {code, &launch};
  }
  return {CUDA_SUCCESS, nullptr};
}

bool within_bounds(const Replay& replay) {
  return replay.addresses <= kMostAddresses &&
         std::all_of(replay.launches.begin(), replay.launches.end(),
                     [&](const Launch& launch) { return within_bounds(launch, replay.addresses); });
}

}  // namespace adalora::cuda
