// The whole C++ API of toca_kernels: one params struct and one function per op.
//
// Pointers and sizes only; no torch, no Python.  Strides are in elements, not bytes.  The contract
// of each op is the docstring of the function of the same name in toca_kernels/ops.py.
#pragma once

#include <cstdint>

namespace toca {

// The last two are of 8-bit caches only: e4m3fn, and one float32 scale for each row.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kFloat8 = 4 };

struct AttentionScores {
  const void* q;     // [B, H, Nq, D], strides q_b, q_h, q_n, 1
  const void* k;     // [B, H, N, D], strides k_b, k_h, k_n, 1
  const float* lse;  // [B, H, Nq]
  float* partial;    // [B, H, N], scratch: the column sums of every head
  float* out;        // [B, N]
  int64_t B, H, Nq, N, D;
  int64_t q_b, q_h, q_n, k_b, k_h, k_n;
  float scale;
  DType dtype;
  int threads;
};

struct AttentionEntropy {
  const void* q;        // [B, H, N, D], strides q_b, q_h, q_n, 1
  const void* k;        // [B, H, L, D], strides k_b, k_h, k_n, 1
  const float* lse;     // [B, H, N], or nullptr: computed on the way
  const uint8_t* mask;  // [B, L], or nullptr: every key
  void* packed;         // [B, H, D, L up to a multiple of 64], 4 bytes each, scratch: the keys
  float* out;           // [B, N]
  int64_t B, H, N, L, D;
  int64_t q_b, q_h, q_n, k_b, k_h, k_n;
  float scale;
  DType dtype;
  int threads;
};

struct SelectTokens {
  const float* score;      // [R, N]
  int32_t* age;            // [R, N], updated
  const int64_t* offsets;  // [R + 1]; row r selects offsets[r + 1] - offsets[r] tokens; nullptr: k
  int64_t* index;          // [offsets[R]] or [R, k]
  int32_t* inverse;        // [R, N]
  int32_t* nan;            // [R]
  uint32_t* scratch;       // [cuda::select_tokens_scratch(R, N)] or nullptr; the CPU has its own
  int64_t R, N, k;
  int64_t frames, rows, cols, cell;  // frames * rows * cols == N
  float age_weight, bonus;
  int threads;
};

// A row of C values for a sample (token stride 0) or for each of its tokens.
struct RowsView {
  const void* data;  // nullptr: absent
  int64_t stride_b, stride_n;
};

constexpr int kMaxSlopes = 2;

// By what a cache is extrapolated over the steps since each of its tokens was computed.
struct Forecast {
  void* slope[kMaxSlopes];  // [B, N, C] each, the cache's dtype, written with the cache
  const float* distance;    // [B, N]
  int slopes;               // how many there are; 0: the cache is not extrapolated
  int order;                // how many of them are read
  int computed;             // how often all tokens have been computed, at most 3
};

struct GatherModulate {
  const void* x;         // [B, N, C]
  const int64_t* index;  // [B, k], or nullptr: every token
  RowsView shift, scale, gate;
  const void* cache;         // [B, N, C] or nullptr
  const float* cache_scale;  // [B, N]: cache row = values * scale; nullptr: the cache has x's dtype
  Forecast forecast;         // of the cache
  DType cache_dtype;         // dtype, kInt8 or kFloat8
  const void* weight;        // [C] or nullptr
  const void* bias;          // [C] or nullptr
  void* out;                 // [B, k, C]
  int64_t B, N, k, C;
  float eps;
  bool rms;
  DType dtype;
  int threads;
};

constexpr int kMaxUpdates = 4;

struct ResidualUpdate {
  RowsView gate;           // absent: 1
  void* cache;             // [B, N, C], written where inverse >= 0
  float* cache_scale;      // [B, N], written with the cache; nullptr: the cache has x's dtype
  DType cache_dtype;       // dtype, kInt8 or kFloat8
  const void* fresh;       // [B, k, C] or nullptr
  const int32_t* inverse;  // [B, N] or nullptr
  int64_t k;
  Forecast forecast;  // of the cache; 8-bit caches, of any update, have none
};

struct ScatterResidual {
  const void* x;  // [B, N, C]
  void* out;      // [B, N, C], may be x
  ResidualUpdate update[kMaxUpdates];
  int updates;
  int64_t B, N, C;
  DType dtype;
  int threads;
};

// Rows in 8 bits: values = round(row / scale), scale = max |row| / 127 (int8) or / 448 (float8); or
// as they are, with their differences.
struct StoreRows {
  const void* rows;   // [R, C]
  void* values;       // [R, C]
  float* scale;       // [R]; nullptr: a forecast cache
  Forecast forecast;  // of R rows
  int64_t R, C;
  DType dtype;
  DType cache_dtype;  // dtype, kInt8 or kFloat8
  int threads;
};

struct ReadRows {
  const void* cache;  // [B, N, C]
  const float*
      cache_scale;       // [B, N]: cache row = values * scale; nullptr: the cache has out's dtype
  Forecast forecast;     // of the cache
  const int64_t* index;  // [B, k], or nullptr: every token
  void* out;             // [B, k, C]
  int64_t B, N, k, C;
  DType dtype;
  DType cache_dtype;  // dtype, kInt8 or kFloat8
  int threads;
};

namespace cpu {

// A value of the caller's data is out of range: nothing was written.
struct OutOfRange {
  int64_t value, low, stop;
};

void attention_scores(const AttentionScores& p);
void attention_entropy(const AttentionEntropy& p);
void select_tokens(const SelectTokens& p);
void gather_modulate(const GatherModulate& p);    // throws OutOfRange
void scatter_residual(const ScatterResidual& p);  // throws OutOfRange
void store_rows(const StoreRows& p);
void read_rows(const ReadRows& p);  // throws OutOfRange

const char* isa();                  // the instruction set in use, the best of isas() unless chosen
int isas(const char** names);       // compiled in and supported by this CPU, best first; at most 8
bool choose_isa(const char* name);  // for tests and benchmarks; false: not among isas()

}  // namespace cpu

namespace cuda {

// A device by its number, and a stream on it.
struct Stream {
  int device;
  void* handle;
};

// Queue an op; its pointers are the device's.  They neither allocate nor wait, so a call can be
// captured in a graph, and so no value can be refused: an index or a slot out of range is not
// followed.  They throw std::runtime_error where CUDA fails, std::invalid_argument for a size.
void select_tokens(const SelectTokens& p, const Stream& stream);
void gather_modulate(const GatherModulate& p, const Stream& stream);
void scatter_residual(const ScatterResidual& p, const Stream& stream);
void store_rows(const StoreRows& p, const Stream& stream);
void read_rows(const ReadRows& p, const Stream& stream);

int64_t select_tokens_scratch(int64_t R, int64_t N);  // words

// None of these throws, and the first two do not start CUDA.
int toolkit_version();                 // 13000 for 13.0; 0: built without CUDA, the ops above throw
int driver_version();                  // the newest CUDA that the driver knows; 0: no driver
int device_count(const char** error);  // -1: could not be counted, and `error` says why

}  // namespace cuda
}  // namespace toca
