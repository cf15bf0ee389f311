// One level of ssim (see ssim.h for the formula, README_ssim.md for bytes and operations).
//
// Work is cut into tiles of windows (forward) or of pixels (backward) that one thread computes on its own, from the
// images alone, in scratch memory that fits the L2 cache:
//
//   images ---> u, v, u^2, v^2 ---> horizontal filter ---> vertical filter ---> SSIM of a row of windows
//              one row at a time     `across`, all rows      4 rows at a time     -> map, or sum of 1 - SSIM
//                                    of the tile                                  -> backward: 4 partial derivatives
//
//   backward goes on:  partial derivatives ---> vertical filter ---> horizontal filter ---> grad_x, grad_y
//
// The filter is symmetric, so the same filter carries derivatives back from windows to pixels. A backward tile
// recomputes the windows around it (a margin of window_size - 1): nothing is exchanged between tiles.
#include "cpu/ssim.h"

#include "core/scratch.h"
#include "core/simd.h"

namespace memad_fast {
namespace MEMAD_FAST_ISA {
namespace {

// A tile's `across` and partial derivatives take 4 * (rows + 20) * (cols + 10) floats each: 0.2 MB, which leaves room
// in an L2 cache of 512 KB. Taller tiles recompute less of their neighbours.
constexpr int64_t kTileRows = 64;
constexpr int64_t kTileCols = 128;
constexpr int kQuantities = 4;  // u, v, u^2, v^2, and the derivatives with respect to their means
constexpr int kRowsAtOnce = 4;
constexpr int kUsualTaps = 11;  // unrolled; other window sizes take the same code with a counted loop

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// [0, size) cut into equal tiles of at most `limit`. Depends on the image alone, never on threads.
struct Cut {
  int64_t size, tiles, step;
  Cut(int64_t size, int64_t limit)
      : size(size), tiles((size + limit - 1) / limit), step(tiles == 0 ? 0 : (size + tiles - 1) / tiles) {}
  Range tile(int64_t index) const { return {smaller(index * step, size), smaller((index + 1) * step, size)}; }
};

// Four arrays of rows, one a quantity. Vector code may touch up to a vector beyond the last column.
struct Rows4 {
  float* data;
  int64_t rows, stride;
  Rows4(float* data, int64_t rows, int64_t cols) : data(data), rows(rows), stride(stride_for(cols)) {}
  float* row(int quantity, int64_t index) const { return data + (quantity * rows + index) * stride; }
  static int64_t stride_for(int64_t cols) { return (cols + 2 * F32::lanes - 1) / F32::lanes * F32::lanes; }
  static int64_t floats(int64_t rows, int64_t cols) { return kQuantities * rows * stride_for(cols); }
};

// Mirrors a position outside [0, size) at the border pixel, as torch's "reflect" does.
inline int64_t reflected(int64_t position, int64_t size) {
  if (position < 0) return -position;
  return position < size ? position : 2 * (size - 1) - position;
}

template <class T>
struct Plane {
  const T* data;
  int64_t row_stride;
  const T* row(int64_t index) const { return data + index * row_stride; }
};

template <class T>
Plane<T> plane(const Planes& planes, int64_t channels, int64_t index) {
  const int64_t offset = index / channels * planes.batch_stride + index % channels * planes.channel_stride;
  return {static_cast<const T*>(planes.data) + offset, planes.row_stride};
}

// One pair of images and how windows lie on them: window i covers the positions i - pad ... i - pad + taps - 1.
template <class T>
struct Pair {
  Plane<T> x, y;
  int64_t height, width, window_rows, window_cols, pad, taps;
  const float* window;

  Pair(const SsimInput& in, const float* window, int64_t index)
      : x(plane<T>(in.x, in.channels, index)), y(plane<T>(in.y, in.channels, index)), height(in.height),
        width(in.width), window_rows(in.window_rows()), window_cols(in.window_cols()),
        pad(in.reflect ? in.window_size / 2 : 0), taps(in.window_size), window(window) {}

  Range pixels_of(Range windows) const { return {windows.begin - pad, windows.end - pad + taps - 1}; }
  Range windows_of(Range pixels, int64_t count) const {
    return {larger(0, pixels.begin + pad - taps + 1), smaller(count, pixels.end + pad)};
  }
};

struct Constants {
  F32 c1, c2;
  explicit Constants(const SsimInput& in)
      : c1(F32::set1(static_cast<float>(0.01 * in.data_range * 0.01 * in.data_range))),
        c2(F32::set1(static_cast<float>(0.03 * in.data_range * 0.03 * in.data_range))) {}
};

// A value that is subtracted from a tile's pixels of both images before squaring, so that images on a large offset keep
// their variance. It is the pixel of smallest magnitude if all have one sign, else 0: |x - centre| <= |x| for every
// pixel, so centring never costs accuracy. NaN is passed over.
template <class T>
float centre_of(const Pair<T>& images, Range rows, Range cols) {
  F32 lowest = F32::set1(__builtin_inff()), highest = F32::set1(-__builtin_inff());
  float low = __builtin_inff(), high = -__builtin_inff();
  const auto see = [&](float value) {
    if (value < low) low = value;
    if (value > high) high = value;
  };
  for (int64_t i = larger(0, rows.begin); i < smaller(images.height, rows.end); ++i) {
    const T *x = images.x.row(i), *y = images.y.row(i);
    const int64_t stop = smaller(images.width, cols.end);
    int64_t j = larger(0, cols.begin);
    for (; j + F32::lanes <= stop; j += F32::lanes) {
      const F32 a = F32::load(x + j), b = F32::load(y + j);
      lowest = min(b, min(a, lowest));
      highest = max(b, max(a, highest));
    }
    for (; j < stop; ++j) {
      see(scalar_from(x[j]));
      see(scalar_from(y[j]));
    }
  }
  float lows[F32::lanes], highs[F32::lanes];
  lowest.store(lows);
  highest.store(highs);
  for (int lane = 0; lane < F32::lanes; ++lane) {
    if (lows[lane] < low) low = lows[lane];
    if (highs[lane] > high) high = highs[lane];
  }
  const float centre = low > 0.0f ? low : (high < 0.0f ? high : 0.0f);
  return centre - centre == 0.0f ? centre : 0.0f;  // an infinite centre is none
}

// u, v, u^2, v^2 of one row of pixels, at the columns `cols` (reflected where they lie outside).
template <class T>
void quantities(const Pair<T>& images, int64_t row, Range cols, float centre, const Rows4& out) {
  const int64_t source = reflected(row, images.height);
  const T *x = images.x.row(source), *y = images.y.row(source);
  float *u = out.row(0, 0), *v = out.row(1, 0), *uu = out.row(2, 0), *vv = out.row(3, 0);
  const F32 shift = F32::set1(centre);
  const auto put = [&](int64_t at, F32 a, F32 b) {
    a = a - shift;
    b = b - shift;
    const F32 sum = a + b, difference = a - b;
    sum.store(u + at);
    difference.store(v + at);
    (sum * sum).store(uu + at);
    (difference * difference).store(vv + at);
  };
  const int64_t stop = smaller(images.width, cols.end);
  int64_t j = larger(0, cols.begin);
  for (; j + F32::lanes <= stop; j += F32::lanes) put(j - cols.begin, F32::load(x + j), F32::load(y + j));
  if (j < stop) {
    const int rest = static_cast<int>(stop - j);
    put(j - cols.begin, F32::load_first(x + j, rest), F32::load_first(y + j, rest));
  }
  const auto mirror = [&](int64_t from, int64_t to) {
    for (int64_t at = from; at < to; ++at) {
      const int64_t pixel = reflected(at, images.width), i = at - cols.begin;
      const float a = scalar_from(x[pixel]) - centre, b = scalar_from(y[pixel]) - centre;
      u[i] = a + b;
      v[i] = a - b;
      uu[i] = u[i] * u[i];
      vv[i] = v[i] * v[i];
    }
  };
  mirror(cols.begin, smaller(0, cols.end));
  mirror(larger(cols.begin, images.width), cols.end);
}

// out[j] = sum over k of window[k] * in[j + k].
template <int kTaps>
void filter_across(const float* in, int64_t cols, const float* window, int64_t taps, float* out) {
  const int64_t count = kTaps > 0 ? kTaps : taps;
  for (int64_t j = 0; j < cols; j += F32::lanes) {
    F32 sum = F32::zero();
#pragma GCC unroll 11
    for (int64_t k = 0; k < count; ++k) sum = fma(F32::set1(window[k]), F32::load(in + j + k), sum);
    sum.store(out + j);
  }
}

// One row: out[j] = sum over k of window[k] * in[k * stride + j].
template <int kTaps>
void filter_down(const float* in, int64_t stride, int64_t cols, const float* window, int64_t taps, float* out) {
  const int64_t count = kTaps > 0 ? kTaps : taps;
  for (int64_t j = 0; j < cols; j += F32::lanes) {
    F32 sum = F32::zero();
#pragma GCC unroll 11
    for (int64_t k = 0; k < count; ++k) sum = fma(F32::set1(window[k]), F32::load(in + k * stride + j), sum);
    sum.store(out + j);
  }
}

// kRowsAtOnce rows that share their loads; each sum has the terms and the order of filter_down.
template <int kTaps>
void filter_down_block(const float* in, int64_t stride, int64_t cols, const float* window, float* out,
                       int64_t out_stride) {
  for (int64_t j = 0; j < cols; j += F32::lanes) {
    F32 sum[kRowsAtOnce] = {F32::zero(), F32::zero(), F32::zero(), F32::zero()};
#pragma GCC unroll 14
    for (int k = 0; k < kTaps + kRowsAtOnce - 1; ++k) {
      const F32 value = F32::load(in + k * stride + j);
#pragma GCC unroll 4
      for (int r = 0; r < kRowsAtOnce; ++r)
        if (k >= r && k - r < kTaps) sum[r] = fma(F32::set1(window[k - r]), value, sum[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRowsAtOnce; ++r) sum[r].store(out + r * out_stride + j);
  }
}

// `rows` (at most kRowsAtOnce) rows of all four quantities: out row i from the rows first + i ... of `in`.
void filter_down_rows(const Rows4& in, int64_t first, int64_t rows, int64_t cols, const float* window, int64_t taps,
                      const Rows4& out, int64_t out_col) {
  for (int q = 0; q < kQuantities; ++q) {
    float* to = out.row(q, 0) + out_col;
    if (taps == kUsualTaps && rows == kRowsAtOnce) {
      filter_down_block<kUsualTaps>(in.row(q, first), in.stride, cols, window, to, out.stride);
      continue;
    }
    for (int64_t i = 0; i < rows; ++i) {
      if (taps == kUsualTaps) filter_down<kUsualTaps>(in.row(q, first + i), in.stride, cols, window, taps, to + i * out.stride);
      else filter_down<0>(in.row(q, first + i), in.stride, cols, window, taps, to + i * out.stride);
    }
  }
}

void filter_across_row(const float* in, int64_t cols, const float* window, int64_t taps, float* out) {
  if (taps == kUsualTaps) filter_across<kUsualTaps>(in, cols, window, taps, out);
  else filter_across<0>(in, cols, window, taps, out);
}

// The scratch memory of one thread, for tiles of up to rows x cols windows. Zeroed once: vectors that reach beyond a
// row's end must find numbers there.
class Workspace {
 public:
  Workspace(int64_t rows, int64_t cols, int64_t taps, bool backward)
      : rows_(rows), cols_(cols), taps_(taps),
        memory_(static_cast<size_t>(floats(backward)) * sizeof(float)) {
    std::memset(memory_.as<float>(), 0, static_cast<size_t>(floats(backward)) * sizeof(float));
  }
  // u, v, u^2, v^2 of one row of pixels.
  Rows4 pixels() const { return {memory_.as<float>(), 1, cols_ + taps_}; }
  // Filtered horizontally, every row of pixels that the tile needs.
  Rows4 across() const { return {memory_.as<float>() + pixel_floats(), rows_ + taps_, cols_}; }
  // Filtered both ways: the means of a few rows of windows; in backward, derivatives filtered vertically.
  Rows4 means() const { return {memory_.as<float>() + pixel_floats() + across_floats(), kRowsAtOnce, cols_ + taps_}; }
  // The derivatives with respect to the means.
  Rows4 derivatives() const {
    return {memory_.as<float>() + pixel_floats() + across_floats() + mean_floats(), rows_, cols_};
  }

 private:
  int64_t pixel_floats() const { return Rows4::floats(1, cols_ + taps_); }
  int64_t across_floats() const { return Rows4::floats(rows_ + taps_, cols_); }
  int64_t mean_floats() const { return Rows4::floats(kRowsAtOnce, cols_ + taps_); }
  int64_t floats(bool backward) const {
    return pixel_floats() + across_floats() + mean_floats() + (backward ? Rows4::floats(rows_, cols_) : 0);
  }

  int64_t rows_, cols_, taps_;
  Scratch memory_;
};

// Calls body(row, means, index of the row in means) for each row of the windows rows x cols.
template <class T, class Body>
void for_each_window_row(const Pair<T>& images, Range rows, Range cols, float centre, const Workspace& work,
                         const Body& body) {
  const Range pixel_rows = images.pixels_of(rows), pixel_cols = images.pixels_of(cols);
  const Rows4 pixels = work.pixels(), across = work.across(), means = work.means();
  for (int64_t i = 0; i < pixel_rows.size(); ++i) {
    quantities(images, pixel_rows.begin + i, pixel_cols, centre, pixels);
    for (int q = 0; q < kQuantities; ++q)
      filter_across_row(pixels.row(q, 0), cols.size(), images.window, images.taps, across.row(q, i));
  }
  for (int64_t i = 0; i < rows.size(); i += kRowsAtOnce) {
    const int64_t count = smaller(kRowsAtOnce, rows.size() - i);
    filter_down_rows(across, i, count, cols.size(), images.window, images.taps, means, 0);
    for (int64_t r = 0; r < count; ++r) body(rows.begin + i + r, means, r);
  }
}

// One vector of windows.
struct Windows {
  F32 centred_u, mean_u, mean_v;  // E[u] of the centred and of the original pixels, E[v]
  F32 inverse_luminance, inverse_structure;  // 1 / the denominators
  F32 dark, rough;  // 1 - luminance, 1 - structure

  Windows(const Rows4& means, int64_t r, int64_t j, F32 twice_centre, const Constants& constants) {
    const F32 half = F32::set1(0.5f), one = F32::set1(1.0f);
    centred_u = F32::load(means.row(0, r) + j);
    mean_u = centred_u + twice_centre;
    mean_v = F32::load(means.row(1, r) + j);
    // Rounding must not make a variance negative. max returns its second operand for NaN.
    const F32 variance_u = max(F32::zero(), F32::load(means.row(2, r) + j) - centred_u * centred_u);
    const F32 variance_v = max(F32::zero(), F32::load(means.row(3, r) + j) - mean_v * mean_v);
    const F32 square_v = mean_v * mean_v;
    inverse_luminance = one / fma(half, fma(mean_u, mean_u, square_v), constants.c1);
    inverse_structure = one / fma(half, variance_u + variance_v, constants.c2);
    dark = square_v * inverse_luminance;
    rough = variance_v * inverse_structure;
  }
  F32 dissimilarity() const { return dark + rough - dark * rough; }  // 1 - SSIM
};

template <class T>
void map_tile(const SsimMap& args, const float* window, int64_t plane_index, Range rows, Range cols,
              const Workspace& work) {
  const Pair<T> images(args.input, window, plane_index);
  const Constants constants(args.input);
  const float centre = centre_of(images, images.pixels_of(rows), images.pixels_of(cols));
  const F32 twice_centre = F32::set1(2.0f * centre);
  for_each_window_row(images, rows, cols, centre, work, [&](int64_t row, const Rows4& means, int64_t r) {
    T* out = static_cast<T*>(args.map) + (plane_index * images.window_rows + row) * images.window_cols + cols.begin;
    for (int64_t j = 0; j < cols.size(); j += F32::lanes) {
      const F32 ssim = F32::set1(1.0f) - Windows(means, r, j, twice_centre, constants).dissimilarity();
      const int64_t rest = cols.size() - j;
      if (rest >= F32::lanes) store(ssim, out + j);
      else store_first(ssim, out + j, static_cast<int>(rest));
    }
  });
}

// The sum of 1 - SSIM over the tile's windows, in float64 and in a fixed order.
template <class T>
double loss_tile(const SsimLoss& args, const float* window, int64_t plane_index, Range rows, Range cols,
                 const Workspace& work) {
  const Pair<T> images(args.input, window, plane_index);
  const Constants constants(args.input);
  const float centre = centre_of(images, images.pixels_of(rows), images.pixels_of(cols));
  const F32 twice_centre = F32::set1(2.0f * centre);
  F64 low = F64::zero(), high = F64::zero();
  for_each_window_row(images, rows, cols, centre, work, [&](int64_t, const Rows4& means, int64_t r) {
    for (int64_t j = 0; j < cols.size(); j += F32::lanes) {
      F32 part = Windows(means, r, j, twice_centre, constants).dissimilarity();
      const int64_t rest = cols.size() - j;
      if (rest < F32::lanes) {
        float lanes[F32::lanes];
        part.store(lanes);
        part = F32::load_first(lanes, static_cast<int>(rest));
      }
      low = low + low_f64(part);
      high = high + high_f64(part);
    }
  });
  double lanes[F64::lanes], sum = 0.0;
  (low + high).store(lanes);
  for (double lane : lanes) sum += lane;
  return sum;
}

// Derivatives of one row of windows with respect to E[u], E[v], E[u^2], E[v^2]; the last two doubled, because
// d(u^2) = 2 u du. `grad` is the derivative with respect to the windows' SSIM.
template <class Grad>
void derivatives_row(const Rows4& means, int64_t r, int64_t cols, F32 twice_centre, const Constants& constants,
                     const Grad& grad, const Rows4& out, int64_t row) {
  const F32 one = F32::set1(1.0f), two = F32::set1(2.0f);
  for (int64_t j = 0; j < cols; j += F32::lanes) {
    const Windows w(means, r, j, twice_centre, constants);
    const F32 g = grad(j);
    const F32 luminance = g * (one - w.rough) * w.inverse_luminance;  // g * structure / its denominator
    const F32 structure = g * (one - w.dark) * w.inverse_structure;
    const F32 square_u = structure * w.rough, square_v = structure * (w.rough - two);
    (w.mean_u * (luminance * w.dark) - w.centred_u * square_u).store(out.row(0, row) + j);
    (w.mean_v * (luminance * (w.dark - two)) - w.mean_v * square_v).store(out.row(1, row) + j);
    square_u.store(out.row(2, row) + j);
    square_v.store(out.row(3, row) + j);
  }
}

// Reflected borders: pixel p also stands at the mirrored positions -p and 2 (size - 1) - p of the padded image.
// Calls body(position) for those that some window covers.
template <class Body>
void for_each_mirror(int64_t pixel, int64_t size, int64_t pad, const Body& body) {
  if (pixel >= 1 && pixel <= pad) body(-pixel);
  if (pixel <= size - 2 && pixel >= size - 1 - pad) body(2 * (size - 1) - pixel);
}

// Filters the derivatives down to the pixel row `pixel`, whose windows are cut off or mirrored at a border.
template <class T>
void filter_border_row(const Pair<T>& images, int64_t pixel, Range windows, const Rows4& derivatives, int64_t cols,
                       float* weights, const Rows4& out, int64_t out_col) {
  const Range seen = {larger(windows.begin, pixel + images.pad - images.taps + 1),
                      smaller(windows.end, pixel + images.pad + 1)};
  for (int64_t i = seen.begin; i < seen.end; ++i) {
    float weight = images.window[pixel + images.pad - i];
    for_each_mirror(pixel, images.height, images.pad, [&](int64_t position) {
      const int64_t tap = position + images.pad - i;
      if (tap >= 0 && tap < images.taps) weight += images.window[tap];
    });
    weights[i - seen.begin] = weight;
  }
  for (int q = 0; q < kQuantities; ++q)
    filter_down<0>(derivatives.row(q, seen.begin - windows.begin), derivatives.stride, cols, weights, seen.size(),
                   out.row(q, 0) + out_col);
}

// Adds what mirrored columns contribute. filtered and out start at the tile's first pixel column.
template <class T>
void add_mirrored_columns(const Pair<T>& images, Range pixels, const float* filtered, float* out) {
  const auto add = [&](int64_t pixel) {
    for_each_mirror(pixel, images.width, images.pad, [&](int64_t position) {
      const int64_t first = larger(0, position + images.pad - images.taps + 1);
      const int64_t last = smaller(images.window_cols - 1, position + images.pad);
      float sum = 0.0f;
      for (int64_t j = first; j <= last; ++j)
        sum += images.window[position + images.pad - j] * filtered[j - (pixels.begin + images.pad - images.taps + 1)];
      out[pixel - pixels.begin] += sum;
    });
  };
  const int64_t right = larger(images.pad + 1, images.width - 1 - images.pad);
  for (int64_t p = pixels.begin; p < smaller(pixels.end, images.pad + 1); ++p) add(p);
  for (int64_t p = larger(pixels.begin, right); p < pixels.end; ++p) add(p);
}

template <class T>
void combine_row(const Pair<T>& images, int64_t row, Range cols, float centre, const Rows4& filtered, T* grad_x,
                 T* grad_y) {
  const T *x = images.x.row(row) + cols.begin, *y = images.y.row(row) + cols.begin;
  const F32 shift = F32::set1(centre);
  for (int64_t j = 0; j < cols.size(); j += F32::lanes) {
    const int64_t left = cols.size() - j;
    const bool whole = left >= F32::lanes;
    const int rest = whole ? F32::lanes : static_cast<int>(left);
    const F32 a = (whole ? F32::load(x + j) : F32::load_first(x + j, rest)) - shift;
    const F32 b = (whole ? F32::load(y + j) : F32::load_first(y + j, rest)) - shift;
    const F32 grad_u = fma(a + b, F32::load(filtered.row(2, 0) + j), F32::load(filtered.row(0, 0) + j));
    const F32 grad_v = fma(a - b, F32::load(filtered.row(3, 0) + j), F32::load(filtered.row(1, 0) + j));
    if (whole) {
      store(grad_u + grad_v, grad_x + j);
      store(grad_u - grad_v, grad_y + j);
    } else {
      store_first(grad_u + grad_v, grad_x + j, rest);
      store_first(grad_u - grad_v, grad_y + j, rest);
    }
  }
}

template <class T>
void backward_tile(const SsimBackward& args, const float* window, int64_t plane_index, Range rows, Range cols,
                   const Workspace& work, float* weights) {
  const Pair<T> images(args.input, window, plane_index);
  const Constants constants(args.input);
  const Range window_rows = images.windows_of(rows, images.window_rows);
  const Range window_cols = images.windows_of(cols, images.window_cols);
  const float centre = centre_of(images, images.pixels_of(window_rows), images.pixels_of(window_cols));
  const F32 twice_centre = F32::set1(2.0f * centre);
  const Rows4 derivatives = work.derivatives();
  const T* grad_map = static_cast<const T*>(args.grad_map);
  const double windows = static_cast<double>(images.window_rows) * static_cast<double>(images.window_cols) *
                         static_cast<double>(args.input.planes());
  const F32 grad_each = F32::set1(grad_map ? 0.0f : static_cast<float>(-*args.grad_loss / windows));

  for_each_window_row(images, window_rows, window_cols, centre, work, [&](int64_t row, const Rows4& means, int64_t r) {
    const int64_t out = row - window_rows.begin, count = window_cols.size();
    if (!grad_map) {
      derivatives_row(means, r, count, twice_centre, constants, [&](int64_t) { return grad_each; }, derivatives, out);
      return;
    }
    const T* grad = grad_map + (plane_index * images.window_rows + row) * images.window_cols + window_cols.begin;
    const auto load_grad = [&](int64_t j) {
      const int64_t rest = count - j;
      return rest >= F32::lanes ? F32::load(grad + j) : F32::load_first(grad + j, static_cast<int>(rest));
    };
    derivatives_row(means, r, count, twice_centre, constants, load_grad, derivatives, out);
  });

  // Columns of windows that do not exist count as zero; they stand before and after those that do.
  const Rows4 down = work.means(), across = work.pixels();
  const int64_t first_col = window_cols.begin - (cols.begin + images.pad - images.taps + 1);
  const int64_t end_col = first_col + window_cols.size(), needed = cols.size() + images.taps - 1 + F32::lanes;
  for (int q = 0; q < kQuantities; ++q)
    for (int r = 0; r < kRowsAtOnce; ++r) std::memset(down.row(q, r), 0, sizeof(float) * first_col);
  for (int64_t p = rows.begin; p < rows.end;) {
    const int64_t first_window = p + images.pad - images.taps + 1;
    const auto is_inner = [&](int64_t pixel) {
      bool mirrored = false;
      for_each_mirror(pixel, images.height, images.pad, [&](int64_t) { mirrored = true; });
      return !mirrored && pixel + images.pad - images.taps + 1 >= 0 && pixel + images.pad < images.window_rows;
    };
    int64_t count = 0;
    while (count < kRowsAtOnce && p + count < rows.end && is_inner(p + count)) ++count;
    if (count > 0) {
      filter_down_rows(derivatives, first_window - window_rows.begin, count, window_cols.size(), window, images.taps,
                       down, first_col);
    } else {
      filter_border_row(images, p, window_rows, derivatives, window_cols.size(), weights, down, first_col);
      count = 1;
    }
    for (int64_t r = 0; r < count; ++r) {
      for (int q = 0; q < kQuantities; ++q) {
        float* filtered = down.row(q, r);
        for (int64_t j = end_col; j < needed; ++j) filtered[j] = 0.0f;
        filter_across_row(filtered, cols.size(), window, images.taps, across.row(q, 0));
        if (images.pad > 0) add_mirrored_columns(images, cols, filtered, across.row(q, 0));
      }
      const int64_t at = (plane_index * images.height + p + r) * images.width + cols.begin;
      combine_row(images, p + r, cols, centre, across, static_cast<T*>(args.grad_x) + at,
                  static_cast<T*>(args.grad_y) + at);
    }
    p += count;
  }
}

// All tiles of a batch, in the order planes, rows, columns.
struct Tiling {
  Cut rows, cols;
  int64_t planes;
  Tiling(int64_t planes, int64_t rows, int64_t cols) : rows(rows, kTileRows), cols(cols, kTileCols), planes(planes) {}
  int64_t count() const { return planes * rows.tiles * cols.tiles; }
  int64_t plane_of(int64_t tile) const { return tile / (rows.tiles * cols.tiles); }
  Range rows_of(int64_t tile) const { return rows.tile(tile / cols.tiles % rows.tiles); }
  Range cols_of(int64_t tile) const { return cols.tile(tile % cols.tiles); }
};

}  // namespace

void ssim_map(const SsimMap& args, const float* window, const ThreadLoop& loop) {
  const SsimInput& in = args.input;
  const Tiling tiling(in.planes(), in.window_rows(), in.window_cols());
  loop(tiling.count(), 1, [&](int64_t begin, int64_t end) {
    const Workspace work(tiling.rows.step, tiling.cols.step, in.window_size, false);
    for (int64_t t = begin; t < end; ++t) {
      MEMAD_FAST_BY_DTYPE(in.dtype, scalar, map_tile<scalar>(args, window, tiling.plane_of(t), tiling.rows_of(t),
                                                             tiling.cols_of(t), work);)
    }
  });
}

void ssim_loss(const SsimLoss& args, const float* window, const ThreadLoop& loop) {
  const SsimInput& in = args.input;
  const Tiling tiling(in.planes(), in.window_rows(), in.window_cols());
  const Scratch sums(static_cast<size_t>(tiling.count()) * sizeof(double));
  loop(tiling.count(), 1, [&](int64_t begin, int64_t end) {
    const Workspace work(tiling.rows.step, tiling.cols.step, in.window_size, false);
    for (int64_t t = begin; t < end; ++t) {
      MEMAD_FAST_BY_DTYPE(in.dtype, scalar,
                          sums.as<double>()[t] = loss_tile<scalar>(args, window, tiling.plane_of(t), tiling.rows_of(t),
                                                                   tiling.cols_of(t), work);)
    }
  });
  double sum = 0.0;
  for (int64_t t = 0; t < tiling.count(); ++t) sum += sums.as<double>()[t];
  const double windows =
      static_cast<double>(in.window_rows()) * static_cast<double>(in.window_cols()) * static_cast<double>(in.planes());
  *args.loss = static_cast<float>(sum / windows);
}

void ssim_backward(const SsimBackward& args, const float* window, const ThreadLoop& loop) {
  const SsimInput& in = args.input;
  const Tiling tiling(in.planes(), in.height, in.width);
  const int64_t margin = in.window_size - 1;
  loop(tiling.count(), 1, [&](int64_t begin, int64_t end) {
    const Workspace work(tiling.rows.step + margin, tiling.cols.step + margin, in.window_size, true);
    const Scratch weights(static_cast<size_t>(in.window_size) * sizeof(float));
    for (int64_t t = begin; t < end; ++t) {
      MEMAD_FAST_BY_DTYPE(in.dtype, scalar,
                          backward_tile<scalar>(args, window, tiling.plane_of(t), tiling.rows_of(t), tiling.cols_of(t),
                                                work, weights.as<float>());)
    }
  });
}

}  // namespace MEMAD_FAST_ISA
}  // namespace memad_fast
