// The dtypes of parameters.
#pragma once

#include <cstdint>

#include "common/inline.h"

namespace adalora {

enum class DType : int64_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

ADALORA_INLINE int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace adalora
