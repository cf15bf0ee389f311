// One level of histogram_correction (see histogram_correction.h). Compiled once per instruction set.
//
// The count-th smallest value t of an image, and the sum of what lies below it, in one pass over the image:
//
//   aim      a sample of fixed places gives a bracket low <= t <= high that holds 5 to 20 % of the pixels
//   scan     count and sum what lies below the bracket, keep what lies inside it      (all threads, by chunk)
//   settle   t is the low end, the high end, or found among the kept by the same means; add what lies below it
//
// Counting proves the bracket right or wrong, so the result is exact whatever the sample said; where the sample
// misled, t is searched among all pixels. A last pass writes the result, by chunk. What is kept lies in the
// output, which is written only later: the kernel needs no memory that grows with the pixels but a few counts
// for each chunk.
//
// Chunks and the lanes of sums are the same at every level and for any number of threads, so the results are too.
// README_histogram_correction.md counts and measures.
#include "cpu/histogram_correction.h"

#include "core/scratch.h"
#include "core/simd.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

constexpr int64_t kChunk = 16384;  // pixels that one thread scans at a time: 64 KiB of float32
constexpr int64_t kFew = 1024;     // values up to which searching them all is about as fast as aiming first

constexpr int kStep = 16;  // pixels of one step of every level, each with its own lane of float64 sums
constexpr int kVectors = kStep / F32::lanes;

constexpr float kInfinity = __builtin_inff();

// What a pass reads, and what it writes, is fetched this many bytes before its turn: images beyond the L2 cache
// stream up to half again as fast as by the processor's own prefetching.
constexpr int64_t kAhead = 2048;

inline void fetch_ahead(const void* read) { __builtin_prefetch(static_cast<const char*>(read) + kAhead); }
inline void fetch_ahead(const void* read, void* written) {
  fetch_ahead(read);
  __builtin_prefetch(static_cast<char*>(written) + kAhead, 1);
}

// --- sums ---------------------------------------------------------------------------------------------------------

struct LaneSums {
  F64 low[kVectors], high[kVectors];
  double tail = 0.0;  // of the pixels after the last whole step

  LaneSums() {
    for (int v = 0; v < kVectors; ++v) low[v] = high[v] = F64::zero();
  }
  void add(int v, F32 x) {
    low[v] = low[v] + low_f64(x);
    high[v] = high[v] + high_f64(x);
  }
  double total() const {
    double lanes[kStep], sum = tail;
    for (int v = 0; v < kVectors; ++v) {
      low[v].store(lanes + v * F32::lanes);
      high[v].store(lanes + v * F32::lanes + F64::lanes);
    }
    for (double lane : lanes) sum += lane;
    return sum;
  }
};

// count * value, where nothing of an infinite value is nothing.
inline double times(int64_t count, float value) {
  return count == 0 ? 0.0 : static_cast<double>(count) * static_cast<double>(value);
}

// --- search -------------------------------------------------------------------------------------------------------

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

template <class T>
int64_t count_up_to(const T* values, int64_t n, float limit) {
  const F32 limits = F32::set1(limit);
  int64_t count = 0, i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int v = 0; v < kVectors; ++v) count += (F32::load(values + i + v * F32::lanes) <= limits).count();
  for (; i < n; ++i) count += scalar_from(values[i]) <= limit;
  return count;
}

template <class T>
float largest_up_to(const T* values, int64_t n, float limit) {
  const F32 limits = F32::set1(limit);
  F32 largest = F32::set1(-kInfinity);
  int64_t i = 0;
  for (; i + F32::lanes <= n; i += F32::lanes) {
    const F32 x = F32::load(values + i);
    largest = max(largest, select(x <= limits, x, largest));
  }
  float found = reduce_max(largest);
  for (; i < n; ++i) {
    const float x = scalar_from(values[i]);
    if (x <= limit && x > found) found = x;
  }
  return found;
}

struct Bracket {
  float low, high;
};

constexpr Bracket kEverything{-kInfinity, kInfinity};

// The value of rank `rank` (0 is the smallest) of values that all lie in the bracket: halves the floats between
// its ends until one float or one value is left.
template <class T>
float search(const T* values, int64_t n, int64_t rank, Bracket bracket) {
  uint32_t low = ordered_bits(bracket.low), high = ordered_bits(bracket.high);
  int64_t below_low = 0, up_to_high = n;
  while (low < high) {
    if (up_to_high - below_low == 1) return largest_up_to(values, n, from_ordered_bits(high));
    const uint32_t middle = low + (high - low) / 2;
    const int64_t up_to_middle = count_up_to(values, n, from_ordered_bits(middle));
    if (up_to_middle > rank) {
      high = middle;
      up_to_high = up_to_middle;
    } else {
      low = middle + 1;
      below_low = up_to_middle;
    }
  }
  return from_ordered_bits(low);
}

// --- aim ----------------------------------------------------------------------------------------------------------

// A bracket that holds the value of rank `rank` unless the sample is unlike the values: from the sample's own
// values three standard deviations of a random sample's rank below and above. Overwrites `sample`.
template <class T>
Bracket aim(const T* values, int64_t n, int64_t rank, T* sample) {
  if (n <= kFew) return kEverything;
  int64_t size = 256;
  while (size < 4096 && size * 64 <= n) size *= 2;
  // One place in each stretch of equal length, wandering (multiples of the golden ratio), so that no period of
  // the image keeps step with it.
  const int64_t stretch = n / size;
  for (int64_t i = 0; i < size; ++i) {
    const uint64_t wander = static_cast<uint32_t>(i * 2654435769);
    sample[i] = values[i * stretch + static_cast<int64_t>((wander * static_cast<uint64_t>(stretch)) >> 32)];
  }
  const double share = (static_cast<double>(rank) + 0.5) / static_cast<double>(n);
  const double place = share * static_cast<double>(size);
  const double margin = 3.0 * __builtin_sqrt(place * (1.0 - share)) + 2.0;
  const double first = place - margin, last = place + margin;
  const float low = first < 0.0 ? -kInfinity : search(sample, size, static_cast<int64_t>(first), kEverything);
  const float high =
      last >= static_cast<double>(size) ? kInfinity : search(sample, size, static_cast<int64_t>(last), kEverything);
  return {low, high};
}

// --- scan ---------------------------------------------------------------------------------------------------------

// How values lie to a bracket. Those inside it are kept apart from those at its ends, which may be most of an
// image (all of it zero, say).
struct Scan {
  int64_t below = 0;    // < low, or NaN
  int64_t at_low = 0;   // == low
  int64_t inside = 0;   // > low and < high: these were kept
  int64_t at_high = 0;  // > low and == high
  double sum_below = 0.0;

  bool has_nan() const { return sum_below != sum_below; }  // +infinity is below nothing

  void add(const Scan& next) {
    below += next.below;
    at_low += next.at_low;
    inside += next.inside;
    at_high += next.at_high;
    sum_below += next.sum_below;
  }
};

// Keeps the values inside the bracket, in order, at `kept`, which has room for n.
template <class T>
Scan scan(const T* values, int64_t n, Bracket bracket, T* kept) {
  const F32 low = F32::set1(bracket.low), high = F32::set1(bracket.high);
  LaneSums sums;
  int64_t below_low = 0, above_low = 0, held = 0, at_high = 0, i = 0;
  for (; i + kStep <= n; i += kStep) {
    fetch_ahead(values + i);
    for (int v = 0; v < kVectors; ++v) {
      const F32 x = F32::load(values + i + v * F32::lanes);
      const M32 below = less_or_nan(x, low), above = x > low, inside = above & (x < high);
      sums.add(v, select(below, x, F32::zero()));
      store(compress(x, inside), kept + held);  // never beyond the pixels read: held <= i
      below_low += below.count();
      above_low += above.count();
      held += inside.count();
      at_high += (above & (x == high)).count();
    }
  }
  Scan found{below_low, i - below_low - above_low, held, at_high};
  for (; i < n; ++i) {
    const float x = scalar_from(values[i]);
    if (!(x >= bracket.low)) {
      ++found.below;
      sums.tail += x;
    } else if (x == bracket.low) {
      ++found.at_low;
    } else if (x < bracket.high) {
      kept[found.inside++] = values[i];
    } else if (x == bracket.high) {
      ++found.at_high;
    }
  }
  found.sum_below = sums.total();
  return found;
}

// The value of rank `rank` of values that all lie in the bracket. `room` is overwritten; aiming needs n of it.
template <class T>
float value_of_rank(const T* values, int64_t n, int64_t rank, Bracket bracket, T* room, int64_t room_size) {
  if (n <= kFew || room_size < n) return search(values, n, rank, bracket);
  const Bracket aimed = aim(values, n, rank, room);
  const Scan found = scan(values, n, aimed, room);
  int64_t place = rank - found.below;
  if (place < 0) return search(values, n, rank, bracket);
  if (place < found.at_low) return aimed.low;
  place -= found.at_low;
  if (place < found.inside)
    return value_of_rank(room, found.inside, place, aimed, room + found.inside, room_size - found.inside);
  return place - found.inside < found.at_high ? aimed.high : search(values, n, rank, bracket);
}

// --- one image ----------------------------------------------------------------------------------------------------

struct Selection {
  float threshold;  // the count-th smallest value
  int64_t below;    // how many values are < threshold
  int64_t equal;    // how many values are == threshold
  double sum_below;
  bool has_nan;
};

template <class T>
struct Image {
  const T* values;
  T* out;  // holds the sample and the kept values until the result is written
  int64_t pixels;
  int64_t count;
  Bracket bracket;
  Scan* scans;  // one a chunk
  Selection found;

  int64_t chunks() const { return (pixels + kChunk - 1) / kChunk; }
  int64_t chunk_pixels(int64_t chunk) const {
    const int64_t left = pixels - chunk * kChunk;
    return left < kChunk ? left : kChunk;
  }

  void aim_bracket() {
    // Without a count there is nothing to find but a NaN.
    bracket = count > 0 ? aim(values, pixels, count - 1, out) : Bracket{-kInfinity, -kInfinity};
  }

  void scan_chunk(int64_t chunk) {
    const int64_t begin = chunk * kChunk;
    scans[chunk] = scan(values + begin, chunk_pixels(chunk), bracket, out + begin);
  }

  void settle() {
    Scan all;
    for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
      std::memmove(out + all.inside, out + chunk * kChunk, static_cast<size_t>(scans[chunk].inside) * sizeof(T));
      all.add(scans[chunk]);
    }
    found = {0.0f, 0, 0, 0.0, all.has_nan()};
    if (found.has_nan || count == 0) return;

    const int64_t rank = count - 1;
    if (rank < all.below || rank >= all.below + all.at_low + all.inside + all.at_high) {  // the sample misled
      const float threshold = search(values, pixels, rank, kEverything);
      bracket = {threshold, threshold};
      all = Scan();
      for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
        scan_chunk(chunk);
        all.add(scans[chunk]);
      }
    }
    if (rank < all.below + all.at_low) {
      found = {bracket.low, all.below, all.at_low, all.sum_below, false};
      return;
    }
    const int64_t place = rank - all.below - all.at_low;
    const bool at_high = place >= all.inside;
    const float threshold =
        at_high ? bracket.high : value_of_rank(out, all.inside, place, bracket, out + all.inside, pixels - all.inside);
    // Nothing lies inside this bracket, so the scan may write where it reads.
    const Scan kept = scan(out, all.inside, {threshold, threshold}, out);
    found = {
        threshold, all.below + all.at_low + kept.below, at_high ? all.at_high : kept.at_low,
        all.sum_below + times(all.at_low, bracket.low) + kept.sum_below, false};
  }

  double mean_of_smallest() const {
    if (found.has_nan) return __builtin_nan("");
    if (count == 0) return 0.0;
    return (found.sum_below + times(count - found.below, found.threshold)) / static_cast<double>(count);
  }
};

// --- threads ------------------------------------------------------------------------------------------------------

// body(first, last, loop) for groups of images: an image for each thread at a time, and those left over together,
// by chunk on all threads.
template <class F>
void by_group(int64_t images, int64_t pixels, const ThreadLoop& loop, const F& body) {
  const ThreadLoop alone{nullptr, 1};
  const int64_t together = pixels <= kChunk ? 0 : images % loop.threads;
  loop(images - together, 1 + kChunk / (1 + pixels), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) body(b, b + 1, alone);
  });
  if (together > 0) body(images - together, images, loop);
}

// Images on which each step is done in turn, chunks of all images at once.
template <class T>
class Group {
 public:
  Group(int64_t size, int64_t pixels, int64_t count, const ThreadLoop& loop)
      : size_(size), chunks_((pixels + kChunk - 1) / kChunk), loop_(loop),
        images_(sizeof(Image<T>) * static_cast<size_t>(size)),
        scans_(sizeof(Scan) * static_cast<size_t>(size * chunks_)),
        sums_(sizeof(double) * static_cast<size_t>(size * chunks_)) {
    for (int64_t b = 0; b < size; ++b) {
      image(b).pixels = pixels;
      image(b).count = count;
      image(b).scans = scans_.template as<Scan>() + b * chunks_;
    }
  }

  Image<T>& image(int64_t b) const { return images_.template as<Image<T>>()[b]; }

  void select() const {
    loop_(size_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) image(b).aim_bracket();
    });
    each_chunk([&](int64_t b, int64_t chunk) { image(b).scan_chunk(chunk); });
    loop_(size_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) image(b).settle();
    });
  }

  // body(b, chunk) for every chunk of every image.
  template <class F>
  void each_chunk(const F& body) const {
    loop_(size_ * chunks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i / chunks_, i % chunks_);
    });
  }

  // part(b, first pixel, pixels) for every chunk; then whole(b, sum over the chunks of what part returned).
  template <class Part, class Whole>
  void sum_chunks(const Part& part, const Whole& whole) const {
    double* sums = sums_.template as<double>();
    each_chunk([&](int64_t b, int64_t chunk) {
      sums[b * chunks_ + chunk] = part(b, chunk * kChunk, image(b).chunk_pixels(chunk));
    });
    for (int64_t b = 0; b < size_; ++b) {
      double sum = 0.0;
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) sum += sums[b * chunks_ + chunk];
      whole(b, sum);
    }
  }

 private:
  int64_t size_, chunks_;
  ThreadLoop loop_;
  Scratch images_, scans_, sums_;
};

// --- forward ------------------------------------------------------------------------------------------------------

// corrected = max(error - mu, 0); returns the sum of what was stored. max keeps NaN (second operand rule).
template <class T>
double correct(const T* error, int64_t n, float mu, T* corrected) {
  const F32 shift = F32::set1(mu);
  LaneSums sums;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    fetch_ahead(error + i, corrected + i);
    for (int v = 0; v < kVectors; ++v) {
      T* out = corrected + i + v * F32::lanes;
      store(max(F32::zero(), F32::load(error + i + v * F32::lanes) - shift), out);
      sums.add(v, F32::load(out));
    }
  }
  for (; i < n; ++i) {
    const float x = scalar_from(error[i]) - mu;
    scalar_to(x < 0.0f ? 0.0f : x, corrected + i);
    sums.tail += scalar_from(corrected[i]);
  }
  return sums.total();
}

template <class T>
void forward(const HistogramCorrection& args, int64_t first, int64_t last, const ThreadLoop& loop) {
  const Group<T> group(last - first, args.pixels, args.count, loop);
  for (int64_t b = first; b < last; ++b) {
    group.image(b - first).values = static_cast<const T*>(args.error) + b * args.image_stride;
    group.image(b - first).out = static_cast<T*>(args.corrected) + b * args.pixels;
  }
  group.select();
  for (int64_t b = first; b < last; ++b) args.mu[b] = static_cast<float>(group.image(b - first).mean_of_smallest());
  group.sum_chunks(
      [&](int64_t b, int64_t begin, int64_t n) {
        const Image<T>& image = group.image(b);
        return correct(image.values + begin, n, args.mu[first + b], image.out + begin);
      },
      [&](int64_t b, double sum) { args.score[first + b] = static_cast<float>(sum); });
}

// --- backward -----------------------------------------------------------------------------------------------------

// What comes back through mu: the gradients of corrected and score, summed over the pixels above mu.
template <class T>
double sum_above(const T* error, const T* grad, int64_t n, float mu, float grad_score) {
  const F32 limit = F32::set1(mu);
  LaneSums sums;
  int64_t above = 0, i = 0;
  for (; i + kStep <= n; i += kStep) {
    fetch_ahead(error + i);
    fetch_ahead(grad + i);
    for (int v = 0; v < kVectors; ++v) {
      const M32 is_above = F32::load(error + i + v * F32::lanes) > limit;
      sums.add(v, select(is_above, F32::load(grad + i + v * F32::lanes), F32::zero()));
      above += is_above.count();
    }
  }
  for (; i < n; ++i) {
    if (!(scalar_from(error[i]) > mu)) continue;
    sums.tail += scalar_from(grad[i]);
    ++above;
  }
  return sums.total() + times(above, grad_score);
}

// The gradient of one pixel has two parts: of corrected and score where it lies above mu, and of mu where it is
// one of the smallest.
struct PixelGradient {
  float mu, threshold, grad_score;
  float share;      // of mu's gradient, for a value below the threshold
  float tie_share;  // the same, for a value equal to the threshold

  template <class T>
  void write(const T* error, const T* grad, int64_t n, T* out) const {
    const F32 mus = F32::set1(mu), thresholds = F32::set1(threshold), scores = F32::set1(grad_score);
    const F32 shares = F32::set1(share), tie_shares = F32::set1(tie_share);
    int64_t i = 0;
    for (; i + F32::lanes <= n; i += F32::lanes) {
      fetch_ahead(error + i, out + i);
      fetch_ahead(grad + i);
      const F32 x = F32::load(error + i);
      const F32 direct = select(x > mus, F32::load(grad + i) + scores, F32::zero());
      const F32 ties = select(x == thresholds, tie_shares, F32::zero());
      store(direct + select(x < thresholds, shares, ties), out + i);
    }
    for (; i < n; ++i) {
      const float x = scalar_from(error[i]);
      const float direct = x > mu ? scalar_from(grad[i]) + grad_score : 0.0f;
      scalar_to(direct + (x < threshold ? share : x == threshold ? tie_share : 0.0f), out + i);
    }
  }
};

template <class T>
void backward(const HistogramCorrectionBackward& args, int64_t first, int64_t last, const ThreadLoop& loop) {
  const Group<T> group(last - first, args.pixels, args.count, loop);
  for (int64_t b = first; b < last; ++b) {
    group.image(b - first).values = static_cast<const T*>(args.error) + b * args.image_stride;
    group.image(b - first).out = static_cast<T*>(args.grad_error) + b * args.pixels;
  }
  group.select();

  const Scratch memory(sizeof(PixelGradient) * static_cast<size_t>(last - first));
  PixelGradient* gradients = memory.as<PixelGradient>();
  const auto grads = [&](int64_t b) { return static_cast<const T*>(args.grad_corrected) + (first + b) * args.pixels; };
  group.sum_chunks(
      [&](int64_t b, int64_t begin, int64_t n) {
        const float mu = args.mu[first + b], grad_score = args.grad_score[first + b];
        return sum_above(group.image(b).values + begin, grads(b) + begin, n, mu, grad_score);
      },
      [&](int64_t b, double sum) {
        const Selection& found = group.image(b).found;
        PixelGradient& gradient = gradients[b];
        gradient = {args.mu[first + b], found.threshold, args.grad_score[first + b], 0.0f, 0.0f};
        if (args.count == 0) return;
        const double share = (args.grad_mu[first + b] - sum) / static_cast<double>(args.count);
        gradient.share = static_cast<float>(share);
        gradient.tie_share = static_cast<float>(
            share * static_cast<double>(args.count - found.below) / static_cast<double>(found.equal));
      });
  group.each_chunk([&](int64_t b, int64_t chunk) {
    const Image<T>& image = group.image(b);
    const int64_t begin = chunk * kChunk, n = image.chunk_pixels(chunk);
    if (image.found.has_nan) {
      for (int64_t i = begin; i < begin + n; ++i) scalar_to(__builtin_nanf(""), image.out + i);
    } else {
      gradients[b].write(image.values + begin, grads(b) + begin, n, image.out + begin);
    }
  });
}

}  // namespace

void histogram_correction(const HistogramCorrection& args, const ThreadLoop& loop) {
  by_group(args.images, args.pixels, loop, [&](int64_t first, int64_t last, const ThreadLoop& inner) {
    MEMAD_FAST_BY_DTYPE(args.dtype, scalar, forward<scalar>(args, first, last, inner);)
  });
}

void histogram_correction_backward(const HistogramCorrectionBackward& args, const ThreadLoop& loop) {
  by_group(args.images, args.pixels, loop, [&](int64_t first, int64_t last, const ThreadLoop& inner) {
    MEMAD_FAST_BY_DTYPE(args.dtype, scalar, backward<scalar>(args, first, last, inner);)
  });
}

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
