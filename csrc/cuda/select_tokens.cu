// select_tokens: score + age, tile bonus, top k, compaction and ages, all rows of a step at once.
//
// Fused: everything from the scores to the inverse map.  A row (a layer of a sample) is a CTA's
// work and its keys stay in shared memory, or in L2 where a row is too long for that.  Radix select
// (four digits of 8 bits) sorts nothing and takes the same time for any k.  Limited by latency: a
// row is a chain of four histograms with one barrier each, since every warp finds the digit's
// bucket for itself; then one scan.  Few very long rows would leave the GPU idle: these are cut in
// chunks, a CTA each, and every step of the chain is a launch.
//
// Deterministic: counts are integers, and slots come from a scan in the order of the tokens.
// Compiled without contraction of a * b + c: scores must be the reference's, bit for bit.
#include "../order.h"
#include "common.cuh"

namespace toca::cuda {
namespace {

constexpr const char* kOp = "select_tokens";
constexpr int kBits = 8;  // of a digit of the radix select
constexpr int kDigits = 32 / kBits;
constexpr int kBuckets = 1 << kBits;
constexpr int kBucketsOfLane = kBuckets / kWarp;
constexpr int kWarps = kMaxThreads / kWarp;

constexpr int64_t kSharedTokens = 23 * 1024;  // their keys fit beside Counters from sm_80 on
constexpr int64_t kLongRow = 64 * 1024;       // worth several CTAs,
constexpr int64_t kFewRows = 64;              // unless rows alone fill the GPU
constexpr int kChunk = 8 * 1024;              // tokens of a CTA then

// Shared memory of a CTA, in front of the keys.
struct Counters {
  int histogram[kDigits][kBuckets];
  int nan[kWarps], larger[kWarps], equal[kWarps];  // of every warp
};

// Scratch of the launches of long rows, behind the keys.
struct ChunkCounters {
  int* histogram;  // [R, kDigits, kBuckets]
  int* nan;        // [R, chunks]
  int* larger;     // [R, chunks]
  int* equal;      // [R, chunks]
  int chunks;
};

__device__ Counters& counters() {
  extern __shared__ uint4 memory[];
  return *reinterpret_cast<Counters*>(memory);
}

// Tokens [begin, end) of a row.
struct Span {
  int begin, end;
};

// This warp's share of a span.  A token is read by the same thread in every pass.
__device__ Span warp_share(Span span) {
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  const int each = div_up(div_up(span.end - span.begin, warps), kWarp) * kWarp;
  const int begin = min(span.begin + warp * each, span.end);
  return {begin, min(begin + each, span.end)};
}

__device__ int lane() { return threadIdx.x % kWarp; }

// Writes the keys of a span and returns this thread's number of NaN scores.
__device__ int rank_span(const SelectTokens& p, int64_t r, Span span, uint32_t* key) {
  const float* score = p.score + r * p.N;
  const int32_t* age = p.age + r * p.N;
  int nan = 0;
#pragma unroll 4
  for (int n = span.begin + lane(); n < span.end; n += kWarp) {
    const float total = aged_score(score[n], age[n], p.age_weight);
    nan += !(total == total);
    key[n] = order_key(total);
  }
  return nan;
}

// One thread for a tile: no two tiles share a token.
__device__ void reward_tiles(const SelectTokens& p, int first, int step, uint32_t* key) {
  const int rows = int(p.rows), cols = int(p.cols), cell = int(p.cell);
  const int down = div_up(rows, cell), across = div_up(cols, cell);
  for (int tile = first; tile < int(p.frames) * down * across; tile += step) {
    const int line = tile / across, frame = line / down;
    reward_tile(p, (line - frame * down) * cell, (tile - line * across) * cell,
                key + frame * rows * cols);
  }
}

// What is known of the k-th largest key after some digits: the keys that agree with `key` in
// `known` are candidates, and `need` of them, the largest, are in the top k.
struct Threshold {
  uint32_t key = 0, known = 0;
  int need;
};

__device__ int shift_of(int digit) { return 32 - kBits * (digit + 1); }

__device__ void count_digit(const uint32_t* key, Span span, const Threshold& t, int digit,
                            int* histogram) {
  const int shift = shift_of(digit);
#pragma unroll 4
  for (int n = span.begin + lane(); n < span.end; n += kWarp)
    if ((key[n] & t.known) == t.key) atomicAdd(&histogram[key[n] >> shift & (kBuckets - 1)], 1);
}

// Adds the digit that the histogram of the candidates tells.  Every lane gets the result; there is
// a bucket, because 1 <= need <= candidates.
__device__ void add_digit(const int* histogram, int digit, Threshold& t) {
  int count[kBucketsOfLane], sum = 0;
#pragma unroll
  for (int i = 0; i < kBucketsOfLane; ++i) {
    count[i] = histogram[lane() * kBucketsOfLane + i];
    sum += count[i];
  }
  int larger = sum;  // candidates in the buckets of this lane and of the lanes above
  for (int step = 1; step < kWarp; step *= 2) {
    const int above = __shfl_down_sync(kAllLanes, larger, step);
    if (lane() + step < kWarp) larger += above;
  }
  larger -= sum;
  const bool here = larger < t.need && larger + sum >= t.need;
  int bucket = 0, need = 0;
#pragma unroll
  for (int i = kBucketsOfLane - 1; i >= 0; --i) {
    if (larger < t.need && larger + count[i] >= t.need) {
      bucket = lane() * kBucketsOfLane + i;
      need = t.need - larger;
    }
    larger += count[i];
  }
  const int owner = __ffs(__ballot_sync(kAllLanes, here)) - 1;
  bucket = __shfl_sync(kAllLanes, bucket, owner);
  t.need = __shfl_sync(kAllLanes, need, owner);
  t.key |= uint32_t(bucket) << shift_of(digit);
  t.known |= uint32_t(kBuckets - 1) << shift_of(digit);
}

// k = 0: above every key.
__device__ Threshold no_token() { return {0xffffffffu, 0xffffffffu, 0}; }

struct Found {
  int larger, equal;  // keys above the threshold, and at it
};

__device__ Found count_span(const uint32_t* key, Span span, const Threshold& t) {
  Found found{0, 0};
#pragma unroll 4
  for (int n = span.begin + lane(); n < span.end; n += kWarp) {
    found.larger += key[n] > t.key;
    found.equal += key[n] == t.key;
  }
  return {warp_sum(found.larger), warp_sum(found.equal)};
}

// The first `count` of the values, added up by a warp.
__device__ int sum_of(const int* values, int count) {
  int sum = 0;
  for (int i = lane(); i < count; i += kWarp) sum += values[i];
  return warp_sum(sum);
}

// Index, inverse and ages of a span, after `before` in the tokens in front of it.
__device__ void write_span(const SelectTokens& p, int64_t r, const uint32_t* key, Span span,
                           const Threshold& t, Found before) {
  int32_t* age = p.age + r * p.N;
  int32_t* inverse = p.inverse + r * p.N;
  int64_t* index = p.index + slots_of(p, r).first;
  const unsigned lower = (1u << lane()) - 1;
  for (int first = span.begin; first < span.end; first += kWarp) {
    const int n = first + lane();
    const bool inside = n < span.end;
    const bool is_larger = inside && key[n] > t.key, is_equal = inside && key[n] == t.key;
    const unsigned larger = __ballot_sync(kAllLanes, is_larger);
    const unsigned equal = __ballot_sync(kAllLanes, is_equal);
    const int ties = before.equal + __popc(equal & lower);
    const bool chosen = is_larger || (is_equal && ties < t.need);
    const int slot = before.larger + __popc(larger & lower) + min(ties, t.need);
    if (inside) {
      inverse[n] = chosen ? slot : -1;
      age[n] = chosen ? 0 : age[n] + 1;
      if (chosen) index[slot] = n;
    }
    before.larger += __popc(larger);
    before.equal += __popc(equal);
  }
}

// Counts the span of a CTA warp by warp, then writes it.
__device__ void compact(const SelectTokens& p, int64_t r, const uint32_t* key, Span span,
                        const Threshold& t, Found before) {
  Counters& c = counters();
  const Span mine = warp_share(span);
  const int warp = threadIdx.x / kWarp;
  const Found found = count_span(key, mine, t);
  if (lane() == 0) c.larger[warp] = found.larger, c.equal[warp] = found.equal;
  __syncthreads();
  before.larger += sum_of(c.larger, warp);
  before.equal += sum_of(c.equal, warp);
  write_span(p, r, key, mine, t, before);
}

// --- a row is a CTA's work -----------------------------------------------------------------------

template <bool kShared>  // whether the keys fit
__global__ void __launch_bounds__(kMaxThreads, 1) select_row_kernel(SelectTokens p) {
  const int64_t r = blockIdx.x;
  Counters& c = counters();
  uint32_t* key = kShared ? reinterpret_cast<uint32_t*>(&c + 1) : p.scratch + r * p.N;
  const Span row{0, int(p.N)}, mine = warp_share(row);

  for (int i = threadIdx.x; i < kDigits * kBuckets; i += blockDim.x) c.histogram[0][i] = 0;
  const int nan = warp_sum(rank_span(p, r, mine, key));
  if (lane() == 0) c.nan[threadIdx.x / kWarp] = nan;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    const int total = sum_of(c.nan, blockDim.x / kWarp);
    if (lane() == 0) p.nan[r] = total;
  }

  Threshold t = no_token();
  const int k = int(slots_of(p, r).count);
  if (k > 0) {  // the same for the whole CTA
    if (has_reward(p)) {
      reward_tiles(p, threadIdx.x, blockDim.x, key);
      __syncthreads();
    }
    t = {0, 0, k};
    for (int digit = 0; digit < kDigits; ++digit) {
      count_digit(key, mine, t, digit, c.histogram[digit]);
      __syncthreads();
      add_digit(c.histogram[digit], digit, t);
    }
  }
  compact(p, r, key, row, t, {0, 0});
}

// --- a row is several CTAs' work: x is the chunk, y the row --------------------------------------

__device__ Span chunk_of(const SelectTokens& p) {
  const int begin = blockIdx.x * kChunk;
  return {begin, int(min(p.N, int64_t(begin) + kChunk))};
}

// What the digits before `digits` tell.
__device__ Threshold threshold_of(const SelectTokens& p, const ChunkCounters& c, int64_t r,
                                  int digits) {
  const int k = int(slots_of(p, r).count);
  if (k == 0) return no_token();
  Threshold t{0, 0, k};
  for (int digit = 0; digit < digits; ++digit)
    add_digit(c.histogram + (r * kDigits + digit) * kBuckets, digit, t);
  return t;
}

__global__ void __launch_bounds__(kMaxThreads, 1)
    rank_chunk_kernel(SelectTokens p, ChunkCounters c) {
  const int64_t r = blockIdx.y;
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < kDigits * kBuckets; i += blockDim.x)
      c.histogram[r * kDigits * kBuckets + i] = 0;
  const int nan = warp_sum(rank_span(p, r, warp_share(chunk_of(p)), p.scratch + r * p.N));
  if (lane() == 0) counters().nan[threadIdx.x / kWarp] = nan;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    const int total = sum_of(counters().nan, blockDim.x / kWarp);
    if (lane() == 0) c.nan[r * c.chunks + blockIdx.x] = total;
  }
}

__global__ void __launch_bounds__(kMaxThreads, 1) reward_tiles_kernel(SelectTokens p) {
  reward_tiles(p, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x,
               p.scratch + blockIdx.y * p.N);
}

__global__ void __launch_bounds__(kMaxThreads, 1)
    count_digit_kernel(SelectTokens p, ChunkCounters c, int digit) {
  const int64_t r = blockIdx.y;
  if (slots_of(p, r).count == 0) return;  // the whole CTA
  int* histogram = counters().histogram[0];
  for (int i = threadIdx.x; i < kBuckets; i += blockDim.x) histogram[i] = 0;
  const Threshold t = threshold_of(p, c, r, digit);
  __syncthreads();
  count_digit(p.scratch + r * p.N, warp_share(chunk_of(p)), t, digit, histogram);
  __syncthreads();
  int* sum = c.histogram + (r * kDigits + digit) * kBuckets;
  for (int i = threadIdx.x; i < kBuckets; i += blockDim.x)
    if (histogram[i] > 0) atomicAdd(&sum[i], histogram[i]);
}

__global__ void __launch_bounds__(kMaxThreads, 1)
    count_chunk_kernel(SelectTokens p, ChunkCounters c) {
  const int64_t r = blockIdx.y, at = r * c.chunks + blockIdx.x;
  const Threshold t = threshold_of(p, c, r, kDigits);
  const Found found = count_span(p.scratch + r * p.N, warp_share(chunk_of(p)), t);
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (lane() == 0) counters().larger[warp] = found.larger, counters().equal[warp] = found.equal;
  __syncthreads();
  if (warp > 0) return;
  const int larger = sum_of(counters().larger, warps), equal = sum_of(counters().equal, warps);
  if (lane() == 0) c.larger[at] = larger, c.equal[at] = equal;
}

__global__ void __launch_bounds__(kMaxThreads, 1)
    write_chunk_kernel(SelectTokens p, ChunkCounters c) {
  const int64_t r = blockIdx.y, row = r * c.chunks;
  const int chunk = blockIdx.x;
  const Threshold t = threshold_of(p, c, r, kDigits);
  const Found before{sum_of(c.larger + row, chunk), sum_of(c.equal + row, chunk)};
  compact(p, r, p.scratch + r * p.N, chunk_of(p), t, before);
  if (chunk == 0 && threadIdx.x < kWarp) {
    const int nan = sum_of(c.nan + row, c.chunks);
    if (lane() == 0) p.nan[r] = nan;
  }
}

// --- launches ------------------------------------------------------------------------------------

bool in_chunks(int64_t R, int64_t N) { return N > kLongRow && R <= kFewRows; }

void select_in_chunks(const SelectTokens& p, const Stream& stream) {
  const int chunks = int(div_up(p.N, int64_t(kChunk)));
  ChunkCounters c;
  c.histogram = reinterpret_cast<int*>(p.scratch + p.R * p.N);
  c.nan = c.histogram + p.R * kDigits * kBuckets;
  c.larger = c.nan + p.R * chunks;
  c.equal = c.larger + p.R * chunks;
  c.chunks = chunks;
  const Shape shape{dim3(chunks, unsigned(p.R)), dim3(kMaxThreads), sizeof(Counters)};
  launch(kOp, stream, shape, rank_chunk_kernel, p, c);
  if (has_reward(p)) launch(kOp, stream, shape, reward_tiles_kernel, p);
  for (int digit = 0; digit < kDigits; ++digit)
    launch(kOp, stream, shape, count_digit_kernel, p, c, digit);
  launch(kOp, stream, shape, count_chunk_kernel, p, c);
  launch(kOp, stream, shape, write_chunk_kernel, p, c);
}

void select_rows(const SelectTokens& p, const Stream& stream) {
  const bool shared = p.N <= kSharedTokens;
  // About four tokens for a thread: barriers of fewer warps are cheaper.
  const int64_t warps = min(max(div_up(p.N, int64_t(4 * kWarp)), int64_t(8)), int64_t(kWarps));
  Shape shape{dim3(unsigned(p.R)), dim3(unsigned(warps * kWarp)), sizeof(Counters)};
  if (shared) shape.shared += p.N * sizeof(uint32_t);
  launch(kOp, stream, shape, shared ? select_row_kernel<true> : select_row_kernel<false>, p);
}

}  // namespace

int64_t select_tokens_scratch(int64_t R, int64_t N) {
  if (N <= kSharedTokens) return 0;
  if (!in_chunks(R, N)) return R * N;
  return R * (N + kDigits * kBuckets + 3 * div_up(N, int64_t(kChunk)));
}

void select_tokens(const SelectTokens& p, const Stream& stream) {
  check_count(p.N, "tokens", kOp);
  check_count(p.R, "rows", kOp);
  if (p.R == 0) return;
  const OnDevice device(stream.device, kOp);
  if (in_chunks(p.R, p.N)) return select_in_chunks(p, stream);
  select_rows(p, stream);
}

}  // namespace toca::cuda
