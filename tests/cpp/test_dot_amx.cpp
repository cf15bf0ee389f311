// Checks the AMX dot kernel on a model of its instructions, and that the model faults where a processor would.
#include "amx_model.h"
#include "dot_check.h"

namespace {

struct Shapes {
  uint8_t palette = 1, rest[15] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

template <class Use>
void must_fault(const char* what, const Shapes& shapes, const Use& use) {
  try {
    _tile_loadconfig(&shapes);
    use();
  } catch (const std::logic_error&) {
    _tile_release();
    return;
  }
  std::fprintf(stderr, "the model accepts %s\n", what);
  std::exit(1);
}

void check_model() {
  const auto nothing = [] {};
  Shapes shapes;
  shapes.palette = 2;
  must_fault("an unknown palette", shapes, nothing);
  shapes = {};
  shapes.rest[3] = 1;
  must_fault("reserved bytes", shapes, nothing);
  shapes = {};
  shapes.rows[0] = 17;
  must_fault("17 rows", shapes, nothing);
  shapes = {};
  shapes.row_bytes[8] = 64;
  must_fault("a ninth tile", shapes, nothing);
  shapes = {};
  shapes.rows[5] = 0;
  must_fault("half a shape", shapes, nothing);
  shapes.row_bytes[5] = 0;
  must_fault("the use of a tile without a shape", shapes, [] { _tile_zero(5); });
  shapes = {};
  must_fault("tile 8", shapes, [] { _tile_zero(8); });
  must_fault("use after release", shapes, [] {
    _tile_release();
    _tile_zero(0);
  });
  must_fault("a product in place", shapes, [] { _tile_dpbssd(0, 0, 1); });
  shapes.rows[1] = 4;
  must_fault("a product of other rows", shapes, [] { _tile_dpbssd(0, 1, 2); });
  must_fault("a product of other depth", shapes, [] { _tile_dpbssd(0, 2, 1); });
}

}  // namespace

int main() {
  check_model();
  memad_fast::check_dot_kernel("amx", memad_fast::amx::dot_kernel);
  if (amx_model::state.configured) {
    std::fputs("the kernel leaves its tiles configured\n", stderr);
    return 1;
  }
  std::puts("amx");
}
