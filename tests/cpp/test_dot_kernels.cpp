// Checks the dot kernel of every instruction set that this processor can run, and names those it checked.
#include <cstdio>

#include "core/isa.h"
#include "dot_check.h"

int main() {
  for (const memad_fast::Isa isa : memad_fast::supported_isas()) {
    memad_fast::set_isa(memad_fast::isa_name(isa));
    memad_fast::check_dot_kernel(memad_fast::isa_name(isa), memad_fast::active_dot_kernel());
    std::puts(memad_fast::isa_name(isa));
  }
}
