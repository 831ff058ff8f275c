// Methods of _C that tell kernels where many tensors lie. Handed over in a Tensor[], one costs the dispatcher several
// allocations, 0.5 µs with warm caches, and asked in Python 0.9 µs; so it costs a tenth of that.
#pragma once

#include "python/module.h"

namespace adalora::python {

// What the tensors are to be. Contiguous ones of any shape are read as one row.
enum Layout : Py_ssize_t { kContiguousRows = 0, kContiguousMatrices = 1, kContiguous = 2 };

// read(tensors, place, table, layout) -> int
//
// Fills `table`, int64 [len(tensors), 5] on the CPU, with a View of each tensor; None has one too. They are to be of
// fp32, fp64, bf16 or fp16, on the device of the tensor `place`, with the layout. Returns the number of the first that
// isn't such, -1 where all are. Whoever uses the table holds the tensors, unmoved, for as long.
PyObject* read(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

// words(tensors, place, sizes) -> (words, sizes), or int
//
// Of contiguous matrices of fp32, bf16 or fp16 on the device of `place` a number each: the address, and from bit 60 on
// 1, 2 or 3 for the dtype; of None 0. `sizes`: rows and columns of each as the bytes of int64, which those that are
// there must have, or None for any; returned are those that were found, -1 for None. An int is the number of the first
// that differs.
PyObject* words(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace adalora::python
