// nanobind's own library, compiled in from its wheel.
#include <nb_combined.cpp>
