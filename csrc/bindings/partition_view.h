// Turns the sizes and strides of a [..., P, C, D] tensor or array into the PartitionRows that bank_attention takes.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/bank_attention.h"

namespace memad_fast {

// Owns the sizes and strides that its PartitionRows points to.
class PartitionView {
 public:
  // `sizes` and `strides` (in elements) of all dims >= 3 dimensions.
  PartitionView(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides)
      : data_(data), partition_stride_(strides[dims - 3]) {
    for (int64_t d = 0; d < dims - 1; ++d) {
      if (d == dims - 3) continue;
      rows_ *= sizes[d];
      if (!sizes_.empty() && strides_.back() == strides[d] * sizes[d]) {
        sizes_.back() *= sizes[d];
        strides_.back() = strides[d];
      } else {
        sizes_.push_back(sizes[d]);
        strides_.push_back(strides[d]);
      }
    }
  }

  // Query rows of one partition.
  int64_t count() const { return rows_; }

  PartitionRows rows() const {
    return {data_, partition_stride_, static_cast<int>(sizes_.size()), sizes_.data(), strides_.data()};
  }

 private:
  void* data_;
  int64_t partition_stride_;
  int64_t rows_ = 1;
  std::vector<int64_t> sizes_, strides_;
};

}  // namespace memad_fast
