// The part of DLPack's C exchange that says of a tensor what it is, without owning it or waiting for a stream. As
// DLPack 1.3 fixes it: torch has that header, but not beside its stable ABI.
#pragma once

#include <cstdint>

#include "python/module.h"

extern "C" {

extern PyObject* PyExc_TypeError;
void Py_DecRef(PyObject* object);
void* PyCapsule_GetPointer(PyObject* capsule, const char* name);
PyObject* PyErr_Format(PyObject* type, const char* format, ...);
PyObject* PyObject_GetAttrString(PyObject* object, const char* name);

}  // extern "C"

namespace adalora::dlpack {

constexpr const char* kAttribute = "__dlpack_c_exchange_api__";  // of a tensor's type: a capsule
constexpr const char* kCapsule = "dlpack_exchange_api";
constexpr uint32_t kMajor = 1;

struct Device {
  int32_t type, index;
  bool operator==(const Device&) const = default;
};

constexpr int32_t kCpu = 1;  // of Device::type

enum Code : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;

  int64_t elements() const {
    int64_t count = 1;
    for (int32_t i = 0; i < dims; ++i) count *= shape[i];
    return count;
  }

  // A wrapper around other tensors, or one that only stands for another, has a shape but no memory.
  bool lies_nowhere() const { return data == nullptr && elements() != 0; }
};

struct Exchange {
  uint32_t major, minor;
  const Exchange* previous;  // of an older major version
  void *allocate, *from_object, *to_object;
  int (*read)(PyObject* object, Tensor* out);  // 0, or -1 with an exception set
  void* current_stream;
};

// torch's, which the type of any of its tensors has; null with an exception set where it has none.
inline const Exchange* exchange_of(PyObject* tensor) {
  PyObject* capsule = PyObject_GetAttrString(tensor, kAttribute);
  if (capsule == nullptr) return nullptr;
  auto* exchange = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule, kCapsule));
  Py_DecRef(capsule);  // the type holds it
  if (exchange != nullptr && (exchange->major != kMajor || exchange->read == nullptr)) {
    PyErr_Format(PyExc_TypeError, "this PyTorch has another DLPack exchange than version %d", kMajor);
    return nullptr;
  }
  return exchange;
}

}  // namespace adalora::dlpack
