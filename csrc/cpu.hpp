#pragma once

#include <map>
#include <string>

namespace mome {

// Instruction sets of this processor that the kernels of this project could use, by GCC's names.
// Empty where the core was not built for x86-64.
std::map<std::string, bool> cpu_features();

}  // namespace mome
