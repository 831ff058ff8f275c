// The memory of a matrix, as launchers hand it to kernels.
#pragma once

#include "common/dtype.h"

namespace adalora {

// Row by row, without gaps.
struct Operand {
  void* data;  // null: there is none
  DType dtype;

  // The same from an element on.
  Operand from(int64_t element) const {
    return {data == nullptr ? nullptr : static_cast<char*>(data) + element * size_of(dtype), dtype};
  }
};

}  // namespace adalora
