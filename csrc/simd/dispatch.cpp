// Which instruction set's loops run.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace vps {
namespace {

struct Choice {
  const char* name;
  const Kernels* table;
};

Choice choose() {
  const char* wanted = std::getenv("VPS_CPP_ISA");
  const std::string name = wanted ? wanted : "";
  if (!name.empty() && name != "avx512" && name != "avx2" && name != "generic")
    throw std::invalid_argument("VPS_CPP_ISA must be avx512, avx2 or generic, got '" + name + "'");
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if ((name.empty() || name == "avx512") && has_avx512) return {"avx512", avx512::table};
  if ((name.empty() || name == "avx2") && has_avx2) return {"avx2", avx2::table};
#endif
  if (name.empty() || name == "generic") return {"generic", generic::table};
  throw std::invalid_argument("VPS_CPP_ISA: this processor has no " + name);
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Kernels& kernels(Dtype dtype) { return choice().table[static_cast<int>(dtype)]; }

const char* instruction_set() { return choice().name; }

}  // namespace vps
