#include "cpu/ssim.h"

#include <cmath>

#include "core/isa.h"
#include "core/scratch.h"

namespace memad_fast {

MEMAD_FAST_DECLARE_KERNEL(void ssim_map(const SsimMap& args, const float* window, const ThreadLoop& loop))
MEMAD_FAST_DECLARE_KERNEL(void ssim_loss(const SsimLoss& args, const float* window, const ThreadLoop& loop))
MEMAD_FAST_DECLARE_KERNEL(void ssim_backward(const SsimBackward& args, const float* window, const ThreadLoop& loop))

namespace {

// The normalised Gaussian in one dimension. The middle tap takes up the rounding of the others: a sum other than 1
// would show as variance in flat areas.
class Window {
 public:
  Window(int64_t size, double sigma) : taps_(static_cast<std::size_t>(size) * sizeof(float)) {
    const int64_t radius = size / 2;
    const auto tap = [&](int64_t i) {
      const double distance = static_cast<double>(i - radius) / sigma;
      return std::exp(-0.5 * distance * distance);
    };
    double sum = 0.0, others = 0.0;
    for (int64_t i = 0; i < size; ++i) sum += tap(i);
    for (int64_t i = 0; i < size; ++i) {
      data()[i] = static_cast<float>(tap(i) / sum);
      if (i != radius) others += data()[i];
    }
    data()[radius] = static_cast<float>(1.0 - others);
  }
  float* data() const { return taps_.as<float>(); }

 private:
  Scratch taps_;
};

}  // namespace

void ssim_map(const SsimMap& args, const ThreadLoop& loop) {
  const Window window(args.input.window_size, args.input.sigma);
  MEMAD_FAST_DISPATCH(ssim_map, args, window.data(), loop)
}

void ssim_loss(const SsimLoss& args, const ThreadLoop& loop) {
  const Window window(args.input.window_size, args.input.sigma);
  MEMAD_FAST_DISPATCH(ssim_loss, args, window.data(), loop)
}

void ssim_backward(const SsimBackward& args, const ThreadLoop& loop) {
  const Window window(args.input.window_size, args.input.sigma);
  MEMAD_FAST_DISPATCH(ssim_backward, args, window.data(), loop)
}

}  // namespace memad_fast
