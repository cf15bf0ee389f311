#include "cpu/histogram_correction.h"

#include "core/isa.h"

namespace memad_fast {

MEMAD_FAST_DECLARE_KERNEL(void histogram_correction(const HistogramCorrection& args, const ThreadLoop& loop))
MEMAD_FAST_DECLARE_KERNEL(
    void histogram_correction_backward(const HistogramCorrectionBackward& args, const ThreadLoop& loop))

void histogram_correction(const HistogramCorrection& args, const ThreadLoop& loop) {
  MEMAD_FAST_DISPATCH(histogram_correction, args, loop)
}

void histogram_correction_backward(const HistogramCorrectionBackward& args, const ThreadLoop& loop) {
  MEMAD_FAST_DISPATCH(histogram_correction_backward, args, loop)
}

}  // namespace memad_fast
