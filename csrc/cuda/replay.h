// The launches of a replayed call: everything about them is known but the addresses of the call's tensors.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/driver.h"

namespace adalora::cuda {

constexpr size_t kMostBytes = 4096;  // of a kernel's parameters
constexpr size_t kMostParameters = 1024;
constexpr size_t kMostAddresses = 256;

// Where an address goes: a pointer, or a tensor map that describes what lies there.
struct Place {
  uint32_t offset;   // among the parameters' bytes
  uint32_t address;  // which one
  int64_t beyond;    // bytes past it
  bool in_map;
};

struct Launch {
  std::string kernel;
  CUfunction function;
  unsigned grid[3], threads, shared_bytes;
  bool dependent;                     // may begin under the launch before it (programmatic dependent launch)
  std::vector<std::byte> parameters;  // with other addresses
  std::vector<uint32_t> offsets;      // of each parameter
  std::vector<Place> places;
};

struct Replay {
  int device;
  size_t addresses;
  std::vector<Launch> launches;
};

// What the driver said, and of which launch; null: of making the device's context current.
struct Outcome {
  CUresult code;
  const Launch* launch;
};

// Makes the launches in turn; nothing is written but what the driver has, so that threads may run one replay at a time.
Outcome run(const Driver& driver, const Replay& replay, CUstream stream, const uint64_t* addresses);

// Whether it keeps to the limits above, and all places lie within the parameters, aligned, and name an address.
bool within_bounds(const Replay& replay);

}  // namespace adalora::cuda
