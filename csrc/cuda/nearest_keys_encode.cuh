// Query rows of one chunk as codes (nearest_keys_encode.cu makes them, the screen and the exact stage read them).
#pragma once

#include "cuda/nearest_keys_rows.cuh"

namespace memad_fast::cuda {

enum class Path : uint8_t {
  none = 0,      // not finite: it has no neighbours
  screened = 1,
  full = 2,      // only the float64 stage can hold it
};

struct QueryCodes {
  int8_t* codes;    // [padded][dims]
  float* scale;     // [padded] each:
  float* norm;      //   alpha
  float* residual;  //   beta
  float* own;       //   what upper ends include beside the key's part
  double* shift;    //   an exact value + shift is an upper end of the score; not for ip
  Path* path;
};

struct EncodeQueries {
  Rows query;
  int64_t first, count, padded;  // rows of the query; rows beyond count have no neighbours
  const float* centre;
  int64_t dims;
  Metric metric;
  ErrorTerms error;
  QueryCodes out;
};

cudaError_t encode_queries(const EncodeQueries& args, cudaStream_t stream);

}  // namespace memad_fast::cuda
