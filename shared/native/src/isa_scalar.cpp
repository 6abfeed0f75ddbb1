// The kernels in plain C++, for machines with none of the other sets and as the tests' common ground. FMA is called for by
// name, so that results are the same bits as everywhere else, at the price of a library call where the machine lacks it.
#include "kernels.h"

namespace {
#include "lanes.h"
#include "rows.inl"
#include "layer.inl"
}  // namespace

const specl::Kernels* specl::scalar_kernels() { return table("scalar"); }
