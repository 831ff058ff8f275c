#include "python/read.h"

#include <cstring>
#include <memory>

#include "common/view.h"
#include "python/dlpack.h"

extern "C" {

extern PyObject _Py_NoneStruct;
extern PyObject* PyExc_ValueError;
PyObject* PyBytes_FromStringAndSize(const char* bytes, Py_ssize_t size);
int PyBytes_AsStringAndSize(PyObject* object, char** bytes, Py_ssize_t* size);
PyObject* PyList_New(Py_ssize_t size);
int PyList_SetItem(PyObject* list, Py_ssize_t index, PyObject* item);
PyObject* PyLong_FromLongLong(long long value);
PyObject* PyTuple_Pack(Py_ssize_t size, ...);
PyObject* PyLong_FromSsize_t(Py_ssize_t value);
Py_ssize_t PyLong_AsSsize_t(PyObject* number);
PyObject* PyErr_Occurred();
Py_ssize_t PySequence_Size(PyObject* sequence);
PyObject* PySequence_GetItem(PyObject* sequence, Py_ssize_t index);

}  // extern "C"

namespace adalora::python {

namespace {

struct Release {
  void operator()(PyObject* object) const { Py_DecRef(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;

bool has_dtype(const dlpack::Tensor& tensor, uint8_t code, uint8_t bits) {
  return tensor.dtype.code == code && tensor.dtype.bits == bits && tensor.dtype.lanes == 1;
}

bool read_dtype(const dlpack::Tensor& tensor, DType& dtype) {
  if (has_dtype(tensor, dlpack::kFloat, 32)) return dtype = DType::kFloat32, true;
  if (has_dtype(tensor, dlpack::kFloat, 64)) return dtype = DType::kFloat64, true;
  if (has_dtype(tensor, dlpack::kBfloat, 16)) return dtype = DType::kBFloat16, true;
  if (has_dtype(tensor, dlpack::kFloat, 16)) return dtype = DType::kFloat16, true;
  return false;
}

// As torch sees it: whatever its strides, one without elements is.
bool is_contiguous(const dlpack::Tensor& tensor) {
  if (tensor.elements() == 0) return true;
  int64_t stride = 1;
  for (int32_t i = tensor.dims - 1; i >= 0; --i) {
    if (tensor.shape[i] > 1 && tensor.strides[i] != stride) return false;
    stride *= tensor.shape[i];
  }
  return true;
}

// The tensor as a View; false where its dtype or layout is another, or it lies nowhere.
bool view(const dlpack::Tensor& tensor, Py_ssize_t layout, View& out) {
  if (tensor.lies_nowhere() || !read_dtype(tensor, out.dtype)) return false;
  if (layout != kContiguous && tensor.dims != 2) return false;
  if (layout == kContiguous) {
    out.rows = 1;
    out.columns = tensor.elements();
    out.stride = out.columns;
  } else {
    out.rows = tensor.shape[0];
    out.columns = tensor.shape[1];
    out.stride = tensor.strides[0];
  }
  const bool fits = layout == kContiguousRows ? out.columns <= 1 || tensor.strides[1] == 1 : is_contiguous(tensor);
  if (!fits) return false;
  out.data = out.elements() == 0 ? nullptr : static_cast<char*>(tensor.data) + tensor.byte_offset;
  return true;
}

enum class Outcome { kRead, kNone, kRaised };  // kRaised: an exception is set

// The View of the i-th of some tensors.
Outcome view(PyObject* tensors, Py_ssize_t i, const dlpack::Exchange& exchange, const dlpack::Device& device,
             Py_ssize_t layout, View& out) {
  const Owned item(PySequence_GetItem(tensors, i));
  if (item == nullptr) return Outcome::kRaised;
  if (item.get() == &_Py_NoneStruct) {
    out = {nullptr, DType::kFloat32, -1, -1, 0};
    return Outcome::kRead;
  }
  dlpack::Tensor tensor;
  if (exchange.read(item.get(), &tensor) < 0) return Outcome::kRaised;
  return tensor.device == device && view(tensor, layout, out) ? Outcome::kRead : Outcome::kNone;
}

// Of a dtype but fp64, in a word.
int64_t code_of(DType dtype) { return dtype == DType::kFloat32 ? 1 : dtype == DType::kBFloat16 ? 2 : 3; }

}  // namespace

PyObject* read(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "read: expected tensors, place, table and layout");
  const dlpack::Exchange* exchange = dlpack::exchange_of(arguments[1]);
  dlpack::Tensor place, table;
  if (exchange == nullptr || exchange->read(arguments[1], &place) < 0 || exchange->read(arguments[2], &table) < 0)
    return nullptr;
  const Py_ssize_t tensors = PySequence_Size(arguments[0]);
  const Py_ssize_t layout = PyLong_AsSsize_t(arguments[3]);
  if (tensors < 0 || PyErr_Occurred() != nullptr) return nullptr;
  const bool fits = table.device.type == dlpack::kCpu && has_dtype(table, dlpack::kInt, 64) && table.dims == 2 &&
                    table.shape[0] == tensors && table.shape[1] == kViewWords && is_contiguous(table) &&
                    !table.lies_nowhere();
  if (!fits) return PyErr_Format(PyExc_ValueError, "table: expected int64 [%zd, %zd] on the CPU", tensors, kViewWords);
  View* views = reinterpret_cast<View*>(static_cast<char*>(table.data) + table.byte_offset);
  for (Py_ssize_t i = 0; i < tensors; ++i) {
    const Outcome outcome = view(arguments[0], i, *exchange, place.device, layout, views[i]);
    if (outcome == Outcome::kRaised) return nullptr;
    if (outcome == Outcome::kNone) return PyLong_FromSsize_t(i);
  }
  return PyLong_FromSsize_t(-1);
}

PyObject* words(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "words: expected tensors, place and sizes");
  const dlpack::Exchange* exchange = dlpack::exchange_of(arguments[1]);
  dlpack::Tensor place;
  if (exchange == nullptr || exchange->read(arguments[1], &place) < 0) return nullptr;
  const Py_ssize_t tensors = PySequence_Size(arguments[0]);
  if (tensors < 0) return nullptr;
  const Py_ssize_t bytes = tensors * static_cast<Py_ssize_t>(2 * sizeof(int64_t));
  Py_ssize_t given = 0;
  char *expected = nullptr, *sizes = nullptr;
  if (arguments[2] != &_Py_NoneStruct) {
    if (PyBytes_AsStringAndSize(arguments[2], &expected, &given) < 0) return nullptr;
    if (given != bytes) return PyErr_Format(PyExc_ValueError, "sizes: expected %zd bytes, got %zd", bytes, given);
  }
  const Owned found(PyBytes_FromStringAndSize(nullptr, bytes)), words(PyList_New(tensors));
  if (found == nullptr || words == nullptr || PyBytes_AsStringAndSize(found.get(), &sizes, &given) < 0) return nullptr;
  for (Py_ssize_t i = 0; i < tensors; ++i) {
    View v{};
    const Outcome outcome = view(arguments[0], i, *exchange, place.device, kContiguousMatrices, v);
    if (outcome == Outcome::kRaised) return nullptr;
    const int64_t shape[2] = {v.rows, v.columns};
    if (outcome == Outcome::kNone || v.dtype == DType::kFloat64) return PyLong_FromSsize_t(i);
    const char* own = expected == nullptr || !v.there() ? nullptr : expected + i * sizeof shape;
    if (own != nullptr && std::memcmp(own, shape, sizeof shape) != 0) return PyLong_FromSsize_t(i);
    std::memcpy(sizes + i * sizeof shape, shape, sizeof shape);
    PyObject* word = PyLong_FromLongLong(v.there() ? reinterpret_cast<int64_t>(v.data) | code_of(v.dtype) << 60 : 0);
    if (word == nullptr || PyList_SetItem(words.get(), i, word) < 0) return nullptr;
  }
  return PyTuple_Pack(2, words.get(), found.get());
}

}  // namespace adalora::python
