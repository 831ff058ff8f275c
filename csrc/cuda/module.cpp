// Module adalora_kernels._C_cuda. Its methods replay the launches of Triton's kernels; what they get comes from
// backends/triton/parameters.py.
#include "python/module.h"

#include <cstring>
#include <memory>
#include <new>

#include "cuda/replay.h"
#include "python/dlpack.h"

extern "C" {

struct _ts;
extern PyObject _Py_NoneStruct;
extern PyObject *PyExc_RuntimeError, *PyExc_ValueError;

PyObject* PyBytes_FromStringAndSize(const char* bytes, Py_ssize_t size);
int PyBytes_AsStringAndSize(PyObject* object, char** bytes, Py_ssize_t* size);
PyObject* PyCapsule_New(void* pointer, const char* name, void (*destructor)(PyObject*));
void PyErr_Clear();
PyObject* PyErr_NoMemory();
PyObject* PyErr_Occurred();
void PyEval_RestoreThread(_ts* state);
_ts* PyEval_SaveThread();
long long PyLong_AsLongLong(PyObject* object);
unsigned long long PyLong_AsUnsignedLongLong(PyObject* object);
PyObject* PyTuple_GetItem(PyObject* tuple, Py_ssize_t place);
Py_ssize_t PyTuple_Size(PyObject* tuple);
const char* PyUnicode_AsUTF8AndSize(PyObject* object, Py_ssize_t* size);
void Py_IncRef(PyObject* object);

}  // extern "C"

namespace adalora::cuda {

namespace {

constexpr char kName[] = "adalora_kernels.Replay";

struct Raised {};  // an exception of Python's is set

[[noreturn]] void raise(PyObject* type, const char* message) {
  PyErr_Format(type, "%s", message);
  throw Raised{};
}

PyObject* item(PyObject* tuple, Py_ssize_t place) {
  PyObject* found = PyTuple_GetItem(tuple, place);
  if (found == nullptr) throw Raised{};
  return found;
}

Py_ssize_t size(PyObject* tuple) {
  const Py_ssize_t found = PyTuple_Size(tuple);
  if (found < 0) raise(PyExc_TypeError, "expected a tuple");
  return found;
}

template <typename Integer>
Integer integer(PyObject* object) {
  const long long value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred() != nullptr) throw Raised{};
  if (static_cast<long long>(static_cast<Integer>(value)) != value) raise(PyExc_ValueError, "an integer is too large");
  return static_cast<Integer>(value);
}

uint64_t address(PyObject* object) {
  const unsigned long long value = PyLong_AsUnsignedLongLong(object);
  if (value == ~0ULL && PyErr_Occurred() != nullptr) throw Raised{};
  return value;
}

// What torch says of a tensor. Raises where the object is none, or lies nowhere.
dlpack::Tensor tensor_of(PyObject* object) {
  static const dlpack::Exchange* exchange = nullptr;
  if (exchange == nullptr) exchange = dlpack::exchange_of(object);
  dlpack::Tensor found;
  if (exchange == nullptr || exchange->read(object, &found) < 0) throw Raised{};
  if (found.lies_nowhere()) raise(PyExc_TypeError, "expected a tensor with memory of its own");
  return found;
}

uint64_t address_of(PyObject* tensor) {
  if (tensor == &_Py_NoneStruct) return 0;
  const dlpack::Tensor found = tensor_of(tensor);
  return reinterpret_cast<uint64_t>(found.data) + found.byte_offset;
}

// The next bytes of a layout.
struct Writer {
  std::byte bytes[kMostBytes];
  size_t used = 0;

  void add(const void* data, size_t size) {
    if (size > sizeof bytes - used) raise(PyExc_ValueError, "layout: too many tensors");
    std::memcpy(bytes + used, data, size);
    used += size;
  }
};

void add_layout(Writer& writer, PyObject* tensor) {
  if (tensor == &_Py_NoneStruct) {
    writer.add("", 1);
    return;
  }
  const dlpack::Tensor found = tensor_of(tensor);
  const auto dims = static_cast<uint8_t>(found.dims + 1);
  const auto low = static_cast<uint8_t>((reinterpret_cast<uint64_t>(found.data) + found.byte_offset) % 16);
  writer.add(&dims, 1);
  writer.add(&low, 1);
  writer.add(&found.dtype, sizeof found.dtype);
  writer.add(&found.device, sizeof found.device);
  writer.add(found.shape, static_cast<size_t>(found.dims) * sizeof(int64_t));
  writer.add(found.strides, static_cast<size_t>(found.dims) * sizeof(int64_t));
}

std::vector<std::byte> bytes(PyObject* object) {
  char* data = nullptr;
  Py_ssize_t count = 0;
  if (PyBytes_AsStringAndSize(object, &data, &count) < 0) throw Raised{};
  const auto* first = reinterpret_cast<const std::byte*>(data);
  return {first, first + count};
}

const Driver& loaded_driver() {
  const Driver* found = driver();
  if (found == nullptr) raise(PyExc_RuntimeError, "libcuda.so.1 can't be loaded, or is from before CUDA 12");
  return *found;
}

void check(const Driver& driver, CUresult code, const char* what) {
  if (code == CUDA_SUCCESS) return;
  const char* text = nullptr;
  if (driver.error_string(code, &text) != CUDA_SUCCESS || text == nullptr) text = "unknown error";
  PyErr_Format(PyExc_RuntimeError, "%s: CUDA: %s", what, text);
  throw Raised{};
}

// (kernel, function, (x, y, z), threads, shared bytes, dependent, parameters, offsets, places)
Launch launch_of(PyObject* given) {
  Launch launch{};
  const char* kernel = PyUnicode_AsUTF8AndSize(item(given, 0), nullptr);
  if (kernel == nullptr) throw Raised{};
  launch.kernel = kernel;
  launch.function = reinterpret_cast<CUfunction>(address(item(given, 1)));
  for (int i = 0; i < 3; ++i) launch.grid[i] = integer<unsigned>(item(item(given, 2), i));
  launch.threads = integer<unsigned>(item(given, 3));
  launch.shared_bytes = integer<unsigned>(item(given, 4));
  launch.dependent = integer<bool>(item(given, 5));
  launch.parameters = bytes(item(given, 6));
  PyObject *offsets = item(given, 7), *places = item(given, 8);
  for (Py_ssize_t i = 0; i < size(offsets); ++i) launch.offsets.push_back(integer<uint32_t>(item(offsets, i)));
  for (Py_ssize_t i = 0; i < size(places); ++i) {
    PyObject* place = item(places, i);
    launch.places.push_back({integer<uint32_t>(item(place, 0)), integer<uint32_t>(item(place, 1)),
                             integer<int64_t>(item(place, 2)), integer<bool>(item(place, 3))});
  }
  return launch;
}

// A replay, and the kernels that it launches: their code must not go before it does.
struct Held {
  Replay replay;
  PyObject* kernels;
};

void release(PyObject* capsule) {
  auto* held = static_cast<Held*>(PyCapsule_GetPointer(capsule, kName));
  Py_DecRef(held->kernels);
  delete held;
}

const Replay& replay_of(PyObject* capsule) {
  const auto* held = static_cast<Held*>(PyCapsule_GetPointer(capsule, kName));
  if (held == nullptr) raise(PyExc_TypeError, "replay: expected what make_replay made");
  return held->replay;
}

// An exception of C++ must not pass through Python.
template <typename Body>
PyObject* guarded(Body body) {
  try {
    return body();
  } catch (const Raised&) {
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

void check_count(Py_ssize_t count, Py_ssize_t expected, const char* method) {
  if (count == expected) return;
  PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", method, expected, count);
  throw Raised{};
}

PyObject* make_replay(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    check_count(count, 4, "make_replay");
    loaded_driver();
    auto held = std::make_unique<Held>();
    held->replay.device = integer<int>(arguments[0]);
    held->replay.addresses = integer<uint32_t>(arguments[1]);
    for (Py_ssize_t i = 0; i < size(arguments[2]); ++i) {
      held->replay.launches.push_back(launch_of(item(arguments[2], i)));
    }
    if (!within_bounds(held->replay)) raise(PyExc_ValueError, "make_replay: more than it holds, or out of bounds");
    held->kernels = arguments[3];
    PyObject* capsule = PyCapsule_New(held.get(), kName, release);
    if (capsule != nullptr) Py_IncRef(held.release()->kernels);
    return capsule;
  });
}

PyObject* replay(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    if (count < 2) check_count(count, 2, "replay");
    const Replay& known = replay_of(arguments[0]);
    check_count(count, 2 + static_cast<Py_ssize_t>(known.addresses), "replay");
    const auto stream = reinterpret_cast<CUstream>(address(arguments[1]));
    uint64_t addresses[kMostAddresses];
    for (size_t i = 0; i < known.addresses; ++i) addresses[i] = address_of(arguments[2 + i]);
    const Driver& driver = loaded_driver();
    _ts* state = PyEval_SaveThread();  // a launch waits where the queue is full
    const Outcome outcome = run(driver, known, stream, addresses);
    PyEval_RestoreThread(state);
    check(driver, outcome.code, outcome.launch == nullptr ? "context" : outcome.launch->kernel.c_str());
    Py_IncRef(&_Py_NoneStruct);
    return &_Py_NoneStruct;
  });
}

PyObject* layout(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  PyObject* found = guarded([&]() -> PyObject* {
    Writer writer;
    for (Py_ssize_t i = 0; i < count; ++i) add_layout(writer, arguments[i]);
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(writer.bytes), static_cast<Py_ssize_t>(writer.used));
  });
  if (found != nullptr) return found;
  PyErr_Clear();
  Py_IncRef(&_Py_NoneStruct);
  return &_Py_NoneStruct;
}

PyObject* relocated(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    check_count(count, 2, "relocated");
    const std::vector<std::byte> given = bytes(arguments[0]);
    if (given.size() != sizeof(CUtensorMap)) raise(PyExc_ValueError, "relocated: expected the bytes of a tensor map");
    CUtensorMap map;
    std::memcpy(&map, given.data(), sizeof map);
    const Driver& driver = loaded_driver();
    check(driver, driver.replace_address(&map, reinterpret_cast<void*>(address(arguments[1]))), "relocated");
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(&map), sizeof map);
  });
}

}  // namespace

}  // namespace adalora::cuda

ADALORA_MODULE(_C_cuda,
               {"make_replay", adalora::cuda::make_replay, kFastCall,
                "make_replay(device, addresses, launches, kernels): launches in which that many addresses vary."},
               {"replay", adalora::cuda::replay, kFastCall,
                "replay(replay, stream, *tensors): makes the launches, in turn, with the tensors' addresses."},
               {"layout", adalora::cuda::layout, kFastCall,
                "layout(*tensors): dtypes, devices, shapes, strides, alignments as bytes; None where one has none."},
               {"relocated", adalora::cuda::relocated, kFastCall,
                "relocated(map, address): the tensor map of the same layout at another address."})
