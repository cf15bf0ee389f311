// One level of histogram_correction (see histogram_correction.h). Compiled once per instruction set.
//
// Bytes: the image is read by the selection (1 + ~1 passes), by the sum and by the write-out; at 4 bytes a
// pixel and images that fit the L2 cache, only the first read and the write reach memory.
#include "cpu/histogram_correction.h"

#include "core/scratch.h"
#include "core/simd.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

// Sums are made over blocks of this many pixels, each block in float64, blocks in order: the result does
// not depend on threads. A multiple of every lane count.
constexpr int64_t kBlock = 4096;

constexpr int kRadixBits = 11;  // 2048 counters (8 KiB) stay in L1; 32 bits take passes of 11, 11 and 10
constexpr int kBuckets = 1 << kRadixBits;

// Unsigned order of the result is the numeric order of the floats (-0 just below +0).
inline uint32_t ordered_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits ^ ((bits & 0x80000000u) ? 0xffffffffu : 0x80000000u);
}

inline float from_ordered_bits(uint32_t ordered) {
  const uint32_t bits = ordered ^ ((ordered & 0x80000000u) ? 0x80000000u : 0xffffffffu);
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

struct Selection {
  float threshold;  // the count-th smallest value
  int64_t below;    // how many values are < threshold
  int64_t equal;    // how many values are == threshold
  bool has_nan;
};

template <class T>
bool any_nan(const T* image, int64_t pixels) {
  int64_t i = 0;
  for (; i + F32::lanes <= pixels; i += F32::lanes) {
    const F32 x = F32::load(image + i);
    if ((x == x).bits() != (F32::zero() == F32::zero()).bits()) return true;
  }
  for (; i < pixels; ++i) {
    const float x = scalar_from(image[i]);
    if (x != x) return true;
  }
  return false;
}

// The count-th smallest value (count >= 1) by three histogram passes over the bits that are still open.
template <class T>
float select_smallest(const T* image, int64_t pixels, int64_t count, int64_t* histogram) {
  uint32_t prefix = 0;      // the bits decided so far, in place
  int open_bits = 32;
  int64_t rank = count - 1;
  while (open_bits > 0) {
    const int digit_bits = open_bits > kRadixBits ? kRadixBits : open_bits;
    const int shift = open_bits - digit_bits;
    const uint32_t digit_mask = (1u << digit_bits) - 1;
    std::memset(histogram, 0, sizeof(int64_t) * kBuckets);
    if (open_bits == 32) {
      for (int64_t i = 0; i < pixels; ++i) ++histogram[ordered_bits(scalar_from(image[i])) >> shift];
    } else {
      const uint32_t decided = prefix >> open_bits;
      for (int64_t i = 0; i < pixels; ++i) {
        const uint32_t bits = ordered_bits(scalar_from(image[i]));
        if ((bits >> open_bits) == decided) ++histogram[(bits >> shift) & digit_mask];
      }
    }
    uint32_t digit = 0;
    while (rank >= histogram[digit]) rank -= histogram[digit++];
    prefix |= digit << shift;
    open_bits = shift;
  }
  return from_ordered_bits(prefix);
}

template <class T>
Selection select(const T* image, int64_t pixels, int64_t count, int64_t* histogram) {
  Selection found{0.0f, 0, 0, any_nan(image, pixels)};
  if (found.has_nan || count == 0) return found;
  found.threshold = select_smallest(image, pixels, count, histogram);
  for (int64_t i = 0; i < pixels; ++i) {
    const float x = scalar_from(image[i]);
    found.below += x < found.threshold;
    found.equal += x == found.threshold;
  }
  return found;
}

// Lane sums of one block in float64.
struct BlockSum {
  F64 low = F64::zero(), high = F64::zero();
  double tail = 0.0;

  void add(F32 x) {
    low = low + low_f64(x);
    high = high + high_f64(x);
  }
  double total() const {
    double part[F64::lanes], sum = tail;
    (low + high).store(part);
    for (double p : part) sum += p;
    return sum;
  }
};

template <class T>
double sum_below(const T* image, int64_t pixels, float threshold) {
  const F32 limit = F32::set1(threshold);
  double sum = 0.0;
  for (int64_t start = 0; start < pixels; start += kBlock) {
    const int64_t stop = start + kBlock < pixels ? start + kBlock : pixels;
    BlockSum block;
    int64_t i = start;
    for (; i + F32::lanes <= stop; i += F32::lanes) {
      const F32 x = F32::load(image + i);
      block.add(select(x < limit, x, F32::zero()));
    }
    for (; i < stop; ++i) {
      const float x = scalar_from(image[i]);
      if (x < threshold) block.tail += x;
    }
    sum += block.total();
  }
  return sum;
}

// corrected = max(error - mu, 0); returns the sum of what was stored. max keeps NaN (second operand rule).
template <class T>
double correct(const T* image, int64_t pixels, float mu, T* corrected) {
  const F32 shift = F32::set1(mu);
  double sum = 0.0;
  for (int64_t start = 0; start < pixels; start += kBlock) {
    const int64_t stop = start + kBlock < pixels ? start + kBlock : pixels;
    BlockSum block;
    int64_t i = start;
    for (; i + F32::lanes <= stop; i += F32::lanes) {
      const F32 x = max(F32::zero(), F32::load(image + i) - shift);
      store(x, corrected + i);
      block.add(F32::load(corrected + i));
    }
    for (; i < stop; ++i) {
      const float x = scalar_from(image[i]) - mu;
      scalar_to(x < 0.0f ? 0.0f : x, corrected + i);
      block.tail += scalar_from(corrected[i]);
    }
    sum += block.total();
  }
  return sum;
}

template <class T>
void forward(const HistogramCorrection& args, int64_t begin, int64_t end) {
  const Scratch histogram(sizeof(int64_t) * kBuckets);
  for (int64_t b = begin; b < end; ++b) {
    const T* image = static_cast<const T*>(args.error) + b * args.image_stride;
    const Selection found = select(image, args.pixels, args.count, histogram.as<int64_t>());
    double mu = 0.0;
    if (found.has_nan) {
      mu = __builtin_nan("");
    } else if (args.count > 0) {
      mu = sum_below(image, args.pixels, found.threshold);
      // A product with 0 would turn an infinite threshold into NaN.
      if (args.count > found.below) mu += static_cast<double>(args.count - found.below) * found.threshold;
      mu /= static_cast<double>(args.count);
    }
    args.mu[b] = static_cast<float>(mu);
    T* corrected = static_cast<T*>(args.corrected) + b * args.pixels;
    args.score[b] = static_cast<float>(correct(image, args.pixels, args.mu[b], corrected));
  }
}

template <class T>
void backward(const HistogramCorrectionBackward& args, int64_t begin, int64_t end) {
  const Scratch histogram(sizeof(int64_t) * kBuckets);
  for (int64_t b = begin; b < end; ++b) {
    const T* image = static_cast<const T*>(args.error) + b * args.image_stride;
    const T* grad = static_cast<const T*>(args.grad_corrected) + b * args.pixels;
    T* out = static_cast<T*>(args.grad_error) + b * args.pixels;
    const float mu = args.mu[b], grad_score = args.grad_score[b];
    const Selection found = select(image, args.pixels, args.count, histogram.as<int64_t>());
    if (found.has_nan) {
      for (int64_t i = 0; i < args.pixels; ++i) scalar_to(__builtin_nanf(""), out + i);
      continue;
    }
    double through_mu = args.grad_mu[b];
    for (int64_t i = 0; i < args.pixels; ++i)
      if (scalar_from(image[i]) > mu) through_mu -= static_cast<double>(scalar_from(grad[i])) + grad_score;
    float share = 0.0f, tie_share = 0.0f;
    if (args.count > 0) {
      share = static_cast<float>(through_mu / static_cast<double>(args.count));
      tie_share = static_cast<float>(through_mu / static_cast<double>(args.count) *
                                     static_cast<double>(args.count - found.below) /
                                     static_cast<double>(found.equal));
    }
    for (int64_t i = 0; i < args.pixels; ++i) {
      const float x = scalar_from(image[i]);
      float g = x > mu ? scalar_from(grad[i]) + grad_score : 0.0f;
      if (args.count > 0) g += x < found.threshold ? share : (x == found.threshold ? tie_share : 0.0f);
      scalar_to(g, out + i);
    }
  }
}

}  // namespace

void histogram_correction(const HistogramCorrection& args, const ThreadLoop& loop) {
  loop(args.images, 1, [&](int64_t begin, int64_t end) {
    MEMAD_FAST_BY_DTYPE(args.dtype, scalar, forward<scalar>(args, begin, end);)
  });
}

void histogram_correction_backward(const HistogramCorrectionBackward& args, const ThreadLoop& loop) {
  loop(args.images, 1, [&](int64_t begin, int64_t end) {
    MEMAD_FAST_BY_DTYPE(args.dtype, scalar, backward<scalar>(args, begin, end);)
  });
}

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
