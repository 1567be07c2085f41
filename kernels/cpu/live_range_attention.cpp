// Live-range attention on the CPU, forward and backward, computed in float or double. Rows of queries, outputs and their gradients
// may be of 16 bits.
//
// A panel is `kLanes` neighbouring rows of (query row, query head of one KV head): its rows are the lanes of vectors. Logits
// are kept transposed, [keys, lanes]:
//
//     scores^T = key . query^T        key rows are read where they are, a number at a time
//     output^T = value^T . weights^T  the same
//
// so that no key or value is gathered or packed, the softmax needs no sum across lanes, and a key that is alive costs the same
// wherever it stands. Keys that are dead for a panel are not touched. The work of a panel is its rows times its live keys.
//
// Sums run in an order that depends on shapes and ranges alone, and, of the gradients of keys, on the number of threads.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;

// A tensor with a dense last dimension; strides are in elements, 0 along what is shared.
struct Strided {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  ScalarType type = ScalarType::Float;

  template <typename T>
  T* at(int64_t b, int64_t h, int64_t r = 0) const {
    return static_cast<T*>(data) + b * batch + h * head + r * row;
  }
  explicit operator bool() const { return data != nullptr; }

  // Calls `body` with a row, of the tensor's own type, which is T or has 16 bits.
  template <typename T, typename Body>
  void with_row(int64_t b, int64_t h, int64_t r, Body body) const {
    if (type == ScalarType::BFloat16)
      body(at<c10::BFloat16>(b, h, r));
    else if (type == ScalarType::Half)
      body(at<c10::Half>(b, h, r));
    else
      body(at<T>(b, h, r));
  }
};

// One call of the operator.
struct Call {
  int64_t num_batch, num_heads, num_kv_heads, num_queries, num_keys, head_dim, value_dim;
  int64_t num_threads;
  double scale, softcap;              // softcap: 0 for none
  Strided query, key, value;          // [B, Hq, Q, D], [B, Hkv, K, D], [B, Hkv, K, Dv]
  Strided start, end;                 // int32 [B, Hkv, K]
  Strided query_index, key_index;     // int32 [B, 1, Q], [B, 1, K]
  Strided bias;                       // [B, Hkv, K]; data is null for none
  Strided sinks, slopes;              // [1, Hq]; data is null for none
  Strided output, lse;                // [B, Hq, Q, Dv], [B, Hq, Q]
  // Of the backward alone:
  Strided grad_output, grad_lse;      // [B, Hq, Q, Dv], [B, Hq, Q]
  Strided delta;                      // [B, Hq, Q], made here: sum(grad_output * output) - grad_lse
  Strided grad_query;                 // [B, Hq, Q, D]
  Strided grad_key, grad_value;       // [B, Hkv, K, D], [B, Hkv, K, Dv], zeros, and dense but for the batch row and the head
  Strided grad_bias;                  // [B, Hkv, K], zeros, likewise; data is null for none
};

template <typename T>
using Vector = at::vec::Vectorized<T>;

constexpr int kVectors = 2;   // vectors of a panel
constexpr int64_t kBlock = 128;     // keys whose logits are kept at once: with 32 lanes of float, 16 KiB
constexpr int64_t kScan = 64;       // keys whose ranges have a common summary
constexpr int64_t kPanels = 8;      // panels that look for their keys together
constexpr int64_t kAlone = 1 << 19;  // products that one thread does faster than two
constexpr int64_t kMaxSplits = 4;   // most sums of a key's gradient

template <typename T>
constexpr int64_t kLanes = kVectors * Vector<T>::size();

// Rows of a register tile: with two vectors each, 24 accumulators of 32 registers with AVX-512, 12 of 16 with AVX2.
template <typename T>
constexpr int kTile = sizeof(T) * Vector<T>::size() >= 64 ? 12 : 6;

int64_t padded(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// Memory of one thread, aligned to cache lines.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<T*>(std::aligned_alloc(64, padded(size * sizeof(T), 64)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* take(int64_t size) {
    T* begin = data_ + used_;
    used_ += padded(size, 64 / sizeof(T));
    return begin;
  }

 private:
  T* data_;
  int64_t used_ = 0;
};

// ---- Products ---------------------------------------------------------------------------------------------------------

// out[r, lanes] = (out +) sum over i of factors(r, i) * rows[i, lanes], for R rows r.
template <int R, bool Add, typename T, typename Factor>
inline void tile_product(Factor factor, const T* rows, int64_t row_stride, int64_t count, T* out, int64_t out_stride) {
  using V = Vector<T>;
  constexpr int L = V::size();
  V sums[R][kVectors];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Add ? V::loadu(out + r * out_stride + v * L) : V(T(0));
  for (int64_t i = 0; i < count; ++i) {
    V own[kVectors];
    for (int v = 0; v < kVectors; ++v) own[v] = V::loadu(rows + i * row_stride + v * L);
    for (int r = 0; r < R; ++r) {
      const V a(factor(r, i));
      for (int v = 0; v < kVectors; ++v) sums[r][v] = at::vec::fmadd(a, own[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v].store(out + r * out_stride + v * L);
}

// Calls `body` with the height of each register tile as a type: as many of the highest as fit, then lower ones.
template <int R, typename Body>
inline void in_tiles(int64_t begin, int64_t end, Body body) {
  for (; begin + R <= end; begin += R) body(std::integral_constant<int, R>(), begin);
  if constexpr (R > 1) {
    if (begin < end) in_tiles<R / 2>(begin, end, body);
  }
}

// scores[n, lanes] = sum over d of matrix[keys[n], d] * columns[d, lanes]
template <typename T>
void key_products(const T* matrix, int64_t stride, const int32_t* keys, int64_t count, int64_t dim, const T* columns, T* scores) {
  constexpr int64_t lanes = kLanes<T>;
  in_tiles<kTile<T>>(0, count, [&](auto height, int64_t n) {
    constexpr int R = decltype(height)::value;
    const T* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = matrix + keys[n + r] * stride;
    tile_product<R, false>([&](int r, int64_t d) { return rows[r][d]; }, columns, lanes, dim, scores + n * lanes, lanes);
  });
}

// sums[d, lanes] += sum over n of matrix[keys[n], d] * weights[n, lanes]
template <typename T>
void weighted_sums(const T* matrix, int64_t stride, const int32_t* keys, int64_t count, int64_t dim, const T* weights, T* sums) {
  constexpr int64_t lanes = kLanes<T>;
  in_tiles<kTile<T>>(0, dim, [&](auto height, int64_t d) {
    constexpr int R = decltype(height)::value;
    tile_product<R, true>(
        [&](int r, int64_t n) { return matrix[keys[n] * stride + d + r]; }, weights, lanes, count, sums + d * lanes, lanes);
  });
}

// totals[keys[n], d] += sum over lanes of weights[n, lane] * rows[lane, d], for one column of vectors; the last one may be short.
template <int R, bool Whole, typename T>
inline void tile_outer(const T* weights, const T* rows, int64_t row_stride, T* const* totals, int64_t width) {
  using V = Vector<T>;
  constexpr int L = V::size();
  V sums[R][kVectors];
  const auto part = [&](int v) { return static_cast<int>(std::clamp<int64_t>(width - v * L, 0, L)); };
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Whole ? V::loadu(totals[r] + v * L) : V::loadu(totals[r] + v * L, part(v));
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
    V own[kVectors];
    for (int v = 0; v < kVectors; ++v) own[v] = V::loadu(rows + lane * row_stride + v * L);
    for (int r = 0; r < R; ++r) {
      const V a(weights[r * kLanes<T> + lane]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = at::vec::fmadd(a, own[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v) Whole ? sums[r][v].store(totals[r] + v * L) : sums[r][v].store(totals[r] + v * L, part(v));
}

// totals[keys[n], d] += sum over lanes of weights[n, lane] * rows[lane, d], for the d below `dim`.
template <typename T>
void add_outer(const T* weights, const T* rows, int64_t row_stride, const int32_t* keys, int64_t count, int64_t dim, T* totals) {
  constexpr int64_t lanes = kLanes<T>;
  in_tiles<kTile<T>>(0, count, [&](auto height, int64_t n) {
    constexpr int R = decltype(height)::value;
    for (int64_t d = 0; d < dim; d += lanes) {
      T* own[R];
      for (int r = 0; r < R; ++r) own[r] = totals + keys[n + r] * dim + d;
      if (d + lanes <= dim)
        tile_outer<R, true>(weights + n * lanes, rows + d, row_stride, own, lanes);
      else
        tile_outer<R, false>(weights + n * lanes, rows + d, row_stride, own, dim - d);
    }
  });
}

// ---- Live keys --------------------------------------------------------------------------------------------------------

// The earliest start and the latest end among each `kScan` neighbouring keys that are alive at all.
class Summary {
 public:
  explicit Summary(const Call& call)
      : batches_(call.start.batch || call.end.batch ? call.num_batch : 1),
        heads_(call.start.head || call.end.head ? call.num_kv_heads : 1),
        blocks_(padded(call.num_keys, kScan) / kScan),
        start_(batches_ * heads_ * blocks_),
        end_(batches_ * heads_ * blocks_) {
    for (int64_t b = 0; b < batches_; ++b)
      for (int64_t h = 0; h < heads_; ++h) {
        const int32_t *start = call.start.at<int32_t>(b, h), *end = call.end.at<int32_t>(b, h);
        for (int64_t block = 0; block < blocks_; ++block) {
          int32_t first = std::numeric_limits<int32_t>::max(), last = std::numeric_limits<int32_t>::min();
          const int64_t stop = std::min((block + 1) * kScan, call.num_keys);
          for (int64_t j = block * kScan; j < stop; ++j) {
            const bool alive = end[j] > start[j];
            first = std::min(first, alive ? start[j] : first);
            last = std::max(last, alive ? end[j] : last);
          }
          start_[place(b, h) + block] = first;
          end_[place(b, h) + block] = last;
        }
      }
  }

  // Keys of which some index in [low, high] is in the range, ascending, into `keys`; their number.
  int64_t find(const Call& call, int64_t b, int64_t h, int32_t low, int32_t high, int32_t* keys) const {
    const int32_t *start = call.start.at<int32_t>(b, h), *end = call.end.at<int32_t>(b, h);
    const int64_t first_block = place(batches_ > 1 ? b : 0, heads_ > 1 ? h : 0);
    int64_t count = 0;
    for (int64_t block = 0; block < blocks_; ++block) {
      if (start_[first_block + block] > high || end_[first_block + block] <= low) continue;
      const int64_t stop = std::min((block + 1) * kScan, call.num_keys);
      for (int64_t j = block * kScan; j < stop; ++j) {
        keys[count] = static_cast<int32_t>(j);
        count += (start[j] <= high) & (end[j] > low) & (end[j] > start[j]);
      }
    }
    return count;
  }

 private:
  int64_t place(int64_t b, int64_t h) const { return (b * heads_ + h) * blocks_; }
  int64_t batches_, heads_, blocks_;
  std::vector<int32_t> start_, end_;
};

// ---- A panel ----------------------------------------------------------------------------------------------------------

// The rows that a panel computes, of one batch row and KV head.
template <typename T>
struct Panel {
  static constexpr int64_t lanes = kLanes<T>;
  const Call& call;
  int64_t batch, kv_head;
  int64_t first = 0, count = 0;      // rows (query row * heads of a group + head), and lanes in use
  alignas(64) int32_t index[lanes];  // of the query row; unused lanes repeat the last one's
  int32_t low = 0, high = 0;         // smallest and largest index
  bool has_gaps = false;             // whether an index in between may belong to no row

  Panel(const Call& call, int64_t batch, int64_t kv_head) : call(call), batch(batch), kv_head(kv_head) {}

  int64_t group() const { return call.num_heads / call.num_kv_heads; }
  int64_t head(int64_t lane) const { return kv_head * group() + (first + lane) % group(); }
  int64_t row(int64_t lane) const { return (first + lane) / group(); }

  void move_to(int64_t panel) {
    first = panel * lanes;
    count = std::min(lanes, call.num_queries * group() - first);
    const int32_t* of_rows = call.query_index.at<int32_t>(batch, 0);
    for (int64_t lane = 0; lane < lanes; ++lane) index[lane] = of_rows[row(std::min(lane, count - 1))];
    low = *std::min_element(index, index + lanes);
    high = *std::max_element(index, index + lanes);
    has_gaps = static_cast<int64_t>(high) - low > row(count - 1) - row(0);
  }

  // Of candidates, the keys that some row of the panel sees.
  int64_t select(const int32_t* candidates, int64_t number, int32_t* keys) const {
    const int32_t *start = call.start.at<int32_t>(batch, kv_head), *end = call.end.at<int32_t>(batch, kv_head);
    int64_t selected = 0;
    for (int64_t i = 0; i < number; ++i) {
      const int32_t j = candidates[i];
      keys[selected] = j;
      selected += (start[j] <= high) & (end[j] > low);
    }
    if (!has_gaps) return selected;
    const int64_t number_of_keys = selected;
    selected = 0;
    for (int64_t i = 0; i < number_of_keys; ++i) {
      const int32_t j = keys[i];
      bool seen = false;
      for (int64_t lane = 0; lane < count; ++lane) seen |= start[j] <= index[lane] && index[lane] < end[j];
      keys[selected] = j;
      selected += seen;
    }
    return selected;
  }

  // Rows of `source` times `factor`, [lanes, dim], and zeros to `stride` and in unused lanes; and the same as columns.
  void load(const Strided& source, int64_t dim, int64_t stride, T factor, T* rows, T* columns) const {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      T* target = rows + lane * stride;
      int64_t filled = 0;
      if (lane < count) {
        source.with_row<T>(batch, head(lane), row(lane), [&](const auto* own) {
          for (int64_t d = 0; d < dim; ++d) target[d] = static_cast<T>(own[d]) * factor;
        });
        filled = dim;
      }
      std::fill(target + filled, target + stride, T(0));
    }
    at::vec::transpose_mxn<T>(rows, stride, columns, lanes, lanes, dim);
  }

  // The lanes of [dim, lanes] times `factors` [lanes], to rows of `target`.
  void store(const T* columns, int64_t dim, const T* factors, const Strided& target, T* rows) const {
    const int64_t stride = padded(dim, lanes);
    at::vec::transpose_mxn<T>(columns, lanes, rows, stride, dim, lanes);
    for (int64_t lane = 0; lane < count; ++lane) {
      target.with_row<T>(batch, head(lane), row(lane), [&](auto* own) {
        for (int64_t d = 0; d < dim; ++d) own[d] = rows[lane * stride + d] * factors[lane];
      });
    }
  }

  // Writes a row's log-sum-exp. Returns the factor of its sum of exp(logit - maximum) * value, of which `total` is without values.
  T finish_row(int64_t lane, T maximum, T total) const {
    T lse = maximum + std::log(total), factor = total > 0 ? 1 / total : T(0);
    if (call.sinks) {
      const T sink = *call.sinks.at<T>(0, head(lane)), larger = std::max(lse, sink), smaller = std::min(lse, sink);
      const bool is_empty = larger == -std::numeric_limits<T>::infinity();
      const T with_sink = is_empty ? larger : larger + std::log1p(std::exp(smaller - larger));
      factor *= std::exp(lse - std::max(with_sink, std::numeric_limits<T>::lowest()));
      lse = with_sink;
    }
    call.lse.at<T>(batch, head(lane))[row(lane)] = lse;
    return factor;
  }

  // Products [n, lanes] to logits, in place: softcap, bias, ALiBi, mask. `tanh` (null for none) keeps the softcap's tanh.
  void finish_logits(const int32_t* keys, int64_t number, const T* lane_slopes, T* scores, T* tanh) const {
    const int32_t *start = call.start.at<int32_t>(batch, kv_head), *end = call.end.at<int32_t>(batch, kv_head);
    if (call.softcap) {
      using V = Vector<T>;
      for (int64_t i = 0; i < number * lanes; i += V::size()) {
        const V t = V::loadu(scores + i).tanh();
        if (tanh != nullptr) t.store(tanh + i);
        (t * V(T(call.softcap))).store(scores + i);
      }
    }
    if (call.bias) {
      const T* bias = call.bias.at<T>(batch, kv_head);
      for (int64_t n = 0; n < number; ++n)
        for (int64_t lane = 0; lane < lanes; ++lane) scores[n * lanes + lane] += bias[keys[n]];
    }
    if (call.slopes) {
      const int32_t* key_index = call.key_index.at<int32_t>(batch, 0);
      for (int64_t n = 0; n < number; ++n)
        for (int64_t lane = 0; lane < lanes; ++lane)
          scores[n * lanes + lane] -= lane_slopes[lane] * static_cast<T>(std::abs(index[lane] - key_index[keys[n]]));
    }
    for (int64_t n = 0; n < number; ++n) {
      const int32_t own_start = start[keys[n]], own_end = end[keys[n]];
      if (own_start <= low && own_end > high) continue;
      T* own = scores + n * lanes;
      for (int64_t lane = 0; lane < lanes; ++lane)
        own[lane] = (own_start <= index[lane]) & (index[lane] < own_end) ? own[lane] : -std::numeric_limits<T>::infinity();
    }
  }
};

// The factor of the products of query and key, before a softcap's tanh where there is one.
template <typename T>
T query_factor(const Call& call) {
  return static_cast<T>(call.softcap ? call.scale / call.softcap : call.scale);
}

// The panels of a batch row and KV head, in parts of up to `kPanels` that look for their keys together.
template <typename T>
struct Parts {
  int64_t panels, number;

  explicit Parts(const Call& call)
      : panels(padded(call.num_queries * (call.num_heads / call.num_kv_heads), kLanes<T>) / kLanes<T>),
        number(padded(panels, kPanels) / kPanels) {}
};

// Goes over the panels of a part, each with the keys that some row of it sees.
class LiveKeys {
 public:
  explicit LiveKeys(const Call& call) : candidates_(call.num_keys + 1), keys_(call.num_keys + 1) {}

  // Calls `body(panel, keys, number of keys)`.
  template <typename T, typename Body>
  void for_each_panel(const Summary& summary, Panel<T> panel, const Parts<T>& parts, int64_t part, Body body) {
    const int64_t first = part * kPanels, last = std::min(first + kPanels, parts.panels);
    int32_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();
    for (int64_t p = first; p < last; ++p) {
      panel.move_to(p);
      low = std::min(low, panel.low);
      high = std::max(high, panel.high);
    }
    const int64_t number = summary.find(panel.call, panel.batch, panel.kv_head, low, high, candidates_.data());
    for (int64_t p = first; p < last; ++p) {
      panel.move_to(p);
      body(panel, keys_.data(), panel.select(candidates_.data(), number, keys_.data()));
    }
  }

 private:
  std::vector<int32_t> candidates_, keys_;
};

// ---- Forward ----------------------------------------------------------------------------------------------------------

template <typename T>
class Forward {
  using V = Vector<T>;
  static constexpr int L = V::size();
  static constexpr int64_t lanes = kLanes<T>;

 public:
  explicit Forward(const Call& call)
      : call_(call),
        stride_(padded(std::max(call.head_dim, call.value_dim), lanes)),
        scratch_(lanes * (3 * stride_ + kBlock + 4) + 256),
        rows_(scratch_.take(lanes * stride_)),
        query_(scratch_.take(lanes * stride_)),
        output_(scratch_.take(lanes * stride_)),
        scores_(scratch_.take(lanes * kBlock)),
        slopes_(scratch_.take(lanes)),
        factors_(scratch_.take(lanes)),
        maximum_(scratch_.take(lanes)),
        total_(scratch_.take(lanes)) {}

  void run(const Panel<T>& panel, const int32_t* all_keys, int64_t num_keys) {
    const T* key = call_.key.at<T>(panel.batch, panel.kv_head);
    const T* value = call_.value.at<T>(panel.batch, panel.kv_head);
    panel.load(call_.query, call_.head_dim, stride_, query_factor<T>(call_), rows_, query_);
    if (call_.slopes)
      for (int64_t lane = 0; lane < lanes; ++lane) slopes_[lane] = *call_.slopes.at<T>(0, panel.head(std::min(lane, panel.count - 1)));
    std::fill(output_, output_ + call_.value_dim * lanes, T(0));
    std::fill(maximum_, maximum_ + lanes, -std::numeric_limits<T>::infinity());
    std::fill(total_, total_ + lanes, T(0));
    for (int64_t n = 0; n < num_keys; n += kBlock) {
      const int64_t number = std::min(kBlock, num_keys - n);
      const int32_t* keys = all_keys + n;
      key_products(key, call_.key.row, keys, number, call_.head_dim, query_, scores_);
      panel.finish_logits(keys, number, slopes_, scores_, nullptr);
      weigh(number, n > 0);
      weighted_sums(value, call_.value.row, keys, number, call_.value_dim, scores_, output_);
    }
    finish(panel);
  }

 private:
  // Logits [n, lanes] to exp(logit - maximum), in place, and totals; what was summed before is brought to the new maximum.
  void weigh(int64_t number, bool has_sums) {
    for (int v = 0; v < kVectors; ++v) {
      T* own = scores_ + v * L;
      const V before = V::loadu(maximum_ + v * L);
      V maximum = before;
      for (int64_t n = 0; n < number; ++n) maximum = at::vec::maximum(maximum, V::loadu(own + n * lanes));
      // A lane that has seen no key yet has a maximum of -inf, which must not be subtracted from -inf.
      const V shift = at::vec::maximum(maximum, V(std::numeric_limits<T>::lowest()));
      V total(T(0));
      for (int64_t n = 0; n < number; ++n) {
        const V weight = (V::loadu(own + n * lanes) - shift).exp_u20();
        weight.store(own + n * lanes);
        total = total + weight;
      }
      maximum.store(maximum_ + v * L);
      if (has_sums) {
        const V decay = (before - shift).exp_u20();
        total = at::vec::fmadd(V::loadu(total_ + v * L), decay, total);
        for (int64_t d = 0; d < call_.value_dim; ++d) {
          T* sums = output_ + d * lanes + v * L;
          (V::loadu(sums) * decay).store(sums);
        }
      }
      total.store(total_ + v * L);
    }
  }

  void finish(const Panel<T>& panel) {
    for (int64_t lane = 0; lane < panel.count; ++lane) factors_[lane] = panel.finish_row(lane, maximum_[lane], total_[lane]);
    panel.store(output_, call_.value_dim, factors_, call_.output, rows_);
  }

  const Call& call_;
  int64_t stride_;
  Scratch<T> scratch_;
  T *rows_, *query_, *output_, *scores_, *slopes_, *factors_, *maximum_, *total_;
};

// A few rows, as in decoding, would leave most lanes of a panel idle: here the numbers of a key are the lanes. Memory is taken for
// the keys that are alive, of which a cache may have few among many slots.
template <typename T>
class FewRows {
  using V = Vector<T>;
  static constexpr int L = V::size();
  static constexpr int kWide = 4;  // vectors of an output at once

 public:
  static constexpr int64_t kMost = 8;

  explicit FewRows(const Call& call)
      : call_(call),
        stride_(padded(call.head_dim, L)),
        places_(2 * call.num_keys + 64),
        candidates_(places_.take(call.num_keys + 1)),
        keys_(places_.take(call.num_keys + 1)) {}

  void run(const Summary& summary, int64_t batch, int64_t kv_head) {
    Panel<T> panel(call_, batch, kv_head);
    panel.move_to(0);
    const int64_t candidates = summary.find(call_, batch, kv_head, panel.low, panel.high, candidates_);
    const int64_t number = panel.select(candidates_, candidates, keys_);
    length_ = padded(number, L);
    Scratch<T> scratch(panel.count * (stride_ + length_ + call_.value_dim) + 128);
    query_ = scratch.take(panel.count * stride_);
    scores_ = scratch.take(panel.count * length_);
    output_ = scratch.take(panel.count * call_.value_dim);
    const T factor = query_factor<T>(call_);
    for (int64_t r = 0; r < panel.count; ++r) {
      call_.query.with_row<T>(batch, panel.head(r), panel.row(r), [&](const auto* own) {
        for (int64_t d = 0; d < stride_; ++d) query_[r * stride_ + d] = d < call_.head_dim ? static_cast<T>(own[d]) * factor : T(0);
      });
    }
    in_tiles<4>(0, panel.count, [&](auto height, int64_t r) {
      constexpr int R = decltype(height)::value;
      dot_products<R>(call_.key.at<T>(batch, kv_head), number, query_ + r * stride_, scores_ + r * length_);
    });
    T factors[kMost];
    for (int64_t r = 0; r < panel.count; ++r) {
      T* own = scores_ + r * length_;
      finish_logits(panel, r, number, own);
      T maximum = -std::numeric_limits<T>::infinity();
      for (int64_t n = 0; n < number; ++n) maximum = std::max(maximum, own[n]);
      factors[r] = panel.finish_row(r, maximum, weigh(own, number, std::max(maximum, std::numeric_limits<T>::lowest())));
    }
    in_tiles<4>(0, panel.count, [&](auto height, int64_t r) {
      constexpr int R = decltype(height)::value;
      T* rows[R];
      for (int i = 0; i < R; ++i) rows[i] = output_ + (r + i) * call_.value_dim;
      weighted_rows<R>(call_.value.at<T>(batch, kv_head), number, scores_ + r * length_, factors + r, rows);
    });
    for (int64_t r = 0; r < panel.count; ++r)
      call_.output.with_row<T>(batch, panel.head(r), panel.row(r), [&](auto* own) {
        for (int64_t d = 0; d < call_.value_dim; ++d) own[d] = output_[r * call_.value_dim + d];
      });
  }

 private:
  template <int R>
  void dot_products(const T* key, int64_t number, const T* query, T* scores) const {
    for (int64_t n = 0; n < number; ++n) {
      const T* own = key + keys_[n] * call_.key.row;
      V sums[R];
      for (int r = 0; r < R; ++r) sums[r] = V(T(0));
      for (int64_t d = 0; d < call_.head_dim; d += L) {
        const V numbers = d + L <= call_.head_dim ? V::loadu(own + d) : V::loadu(own + d, static_cast<int>(call_.head_dim - d));
        for (int r = 0; r < R; ++r) sums[r] = at::vec::fmadd(numbers, V::loadu(query + r * stride_ + d), sums[r]);
      }
      for (int r = 0; r < R; ++r)
        scores[r * length_ + n] = at::vec::vec_reduce_all<T>([](const V& a, const V& b) { return a + b; }, sums[r]);
    }
  }

  void finish_logits(const Panel<T>& panel, int64_t r, int64_t number, T* scores) const {
    if (call_.softcap)
      for (int64_t n = 0; n < number; ++n) scores[n] = std::tanh(scores[n]) * static_cast<T>(call_.softcap);
    if (call_.bias)
      for (int64_t n = 0; n < number; ++n) scores[n] += call_.bias.at<T>(panel.batch, panel.kv_head)[keys_[n]];
    if (call_.slopes) {
      const T slope = *call_.slopes.at<T>(0, panel.head(r));
      const int32_t* key_index = call_.key_index.at<int32_t>(panel.batch, 0);
      for (int64_t n = 0; n < number; ++n) scores[n] -= slope * static_cast<T>(std::abs(panel.index[r] - key_index[keys_[n]]));
    }
    if (panel.low == panel.high) return;  // each of the keys was selected for this row
    const int32_t *start = call_.start.at<int32_t>(panel.batch, panel.kv_head), *end = call_.end.at<int32_t>(panel.batch, panel.kv_head);
    for (int64_t n = 0; n < number; ++n)
      if (start[keys_[n]] > panel.index[r] || panel.index[r] >= end[keys_[n]]) scores[n] = -std::numeric_limits<T>::infinity();
  }

  // Logits to exp(logit - shift), in place; their sum.
  static T weigh(T* scores, int64_t number, T shift) {
    V total(T(0));
    for (int64_t n = 0; n < number; n += L) {
      const int count = static_cast<int>(std::min<int64_t>(L, number - n));
      const V weight = (V::loadu(scores + n, count) - V(shift)).exp_u20();
      weight.store(scores + n, count);
      total = total + (count == L ? weight : V::loadu(scores + n, count));
    }
    return at::vec::vec_reduce_all<T>([](const V& a, const V& b) { return a + b; }, total);
  }

  template <int R>
  void weighted_rows(const T* value, int64_t number, const T* weights, const T* factors, T* const* rows) const {
    for (int64_t begin = 0; begin < call_.value_dim; begin += kWide * L) {
      const auto count = [&](int v) { return static_cast<int>(std::clamp<int64_t>(call_.value_dim - begin - v * L, 0, L)); };
      const bool is_whole = begin + kWide * L <= call_.value_dim;
      V sums[R][kWide];
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < kWide; ++v) sums[r][v] = V(T(0));
      for (int64_t n = 0; n < number; ++n) {
        const T* own = value + keys_[n] * call_.value.row + begin;
        V numbers[kWide];
        for (int v = 0; v < kWide; ++v) numbers[v] = is_whole ? V::loadu(own + v * L) : V::loadu(own + v * L, count(v));
        for (int r = 0; r < R; ++r) {
          const V weight(weights[r * length_ + n]);
          for (int v = 0; v < kWide; ++v) sums[r][v] = at::vec::fmadd(weight, numbers[v], sums[r][v]);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < kWide; ++v) (sums[r][v] * V(factors[r])).store(rows[r] + begin + v * L, count(v));
    }
  }

  const Call& call_;
  int64_t stride_, length_ = 0;
  Scratch<int32_t> places_;
  int32_t *candidates_, *keys_;
  T *query_ = nullptr, *scores_ = nullptr, *output_ = nullptr;
};

template <typename T>
void forward(const Call& call) {
  const Summary summary(call);
  const int64_t heads = call.num_batch * call.num_kv_heads, rows = call.num_queries * (call.num_heads / call.num_kv_heads);
  if (rows <= FewRows<T>::kMost) {
    // To wake a thread takes longer than this many products.
    const bool is_short = heads * rows * call.num_keys * (call.head_dim + call.value_dim) < kAlone;
#pragma omp parallel num_threads(is_short ? 1 : std::min(call.num_threads, heads))
    {
      FewRows<T> own(call);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < heads; ++i) own.run(summary, i / call.num_kv_heads, i % call.num_kv_heads);
    }
    return;
  }
  const Parts<T> parts(call);
#pragma omp parallel num_threads(std::min(call.num_threads, heads * parts.number))
  {
    Forward<T> own(call);
    LiveKeys live(call);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < heads * parts.number; ++i) {
      // Late rows first: under a causal mask they see the most keys.
      const int64_t part = parts.number - 1 - i / heads, head = i % heads;
      live.for_each_panel(
          summary, Panel<T>(call, head / call.num_kv_heads, head % call.num_kv_heads), parts, part,
          [&](const Panel<T>& panel, const int32_t* keys, int64_t number) { own.run(panel, keys, number); });
    }
  }
}

// ---- Backward ---------------------------------------------------------------------------------------------------------

// The gradient of keys, values or bias, [B, Hkv, K, dim]: each split of the query rows adds to a sum of its own, the first one to
// the result.
template <typename T>
class Totals {
 public:
  Totals(const Call& call, int64_t splits, const Strided& target, int64_t dim)
      : call_(call),
        target_(target),
        dim_(dim),
        size_(target ? call.num_batch * call.num_kv_heads * call.num_keys * dim : 0),
        splits_(splits),
        // Pages that nothing is added to cost nothing.
        others_(static_cast<T*>(std::calloc((splits - 1) * size_ + 1, sizeof(T))), &std::free) {
    if (others_ == nullptr) throw std::bad_alloc();
  }

  // Of one batch row and KV head, [K, dim]; null where there is no such gradient.
  T* at(int64_t split, int64_t head) const {
    if (!target_) return nullptr;
    if (split == 0) return target_.at<T>(head / call_.num_kv_heads, head % call_.num_kv_heads);
    return others_.get() + (split - 1) * size_ + head * call_.num_keys * dim_;
  }

  void add_up() const {
    if (splits_ == 1 || !target_) return;
    const int64_t heads = call_.num_batch * call_.num_kv_heads, chunks = padded(call_.num_keys, kScan) / kScan;
#pragma omp parallel for num_threads(call_.num_threads)
    for (int64_t i = 0; i < heads * chunks; ++i) {
      const int64_t head = i / chunks, first = i % chunks * kScan * dim_;
      const int64_t last = std::min(first + kScan * dim_, call_.num_keys * dim_);
      T* own = at(0, head);
      for (int64_t split = 1; split < splits_; ++split) {
        const T* other = at(split, head);
        for (int64_t d = first; d < last; ++d) own[d] += other[d];
      }
    }
  }

 private:
  const Call& call_;
  Strided target_;
  int64_t dim_, size_, splits_;
  std::unique_ptr<T, decltype(&std::free)> others_;
};

template <typename T>
class Backward {
  using V = Vector<T>;
  static constexpr int L = V::size();
  static constexpr int64_t lanes = kLanes<T>;

 public:
  explicit Backward(const Call& call)
      : call_(call),
        stride_(padded(call.head_dim, lanes)),
        value_stride_(padded(call.value_dim, lanes)),
        scratch_(lanes * (4 * stride_ + 2 * value_stride_ + 3 * kBlock + 4) + 256),
        query_rows_(scratch_.take(lanes * stride_)),
        query_(scratch_.take(lanes * stride_)),
        grad_query_(scratch_.take(lanes * stride_)),
        rows_(scratch_.take(lanes * stride_)),
        grad_rows_(scratch_.take(lanes * value_stride_)),
        grad_(scratch_.take(lanes * value_stride_)),
        weights_(scratch_.take(lanes * kBlock)),
        grad_scores_(scratch_.take(lanes * kBlock)),
        tanh_(scratch_.take(lanes * kBlock)),
        slopes_(scratch_.take(lanes)),
        factors_(scratch_.take(lanes)),
        lse_(scratch_.take(lanes)),
        delta_(scratch_.take(lanes)) {
    std::fill(factors_, factors_ + lanes, query_factor<T>(call));
  }

  void run(const Panel<T>& panel, const int32_t* all_keys, int64_t num_keys, T* grad_key, T* grad_value, T* grad_bias) {
    const T* key = call_.key.at<T>(panel.batch, panel.kv_head);
    const T* value = call_.value.at<T>(panel.batch, panel.kv_head);
    panel.load(call_.query, call_.head_dim, stride_, query_factor<T>(call_), query_rows_, query_);
    panel.load(call_.grad_output, call_.value_dim, value_stride_, T(1), grad_rows_, grad_);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t used = std::min(lane, panel.count - 1), head = panel.head(used), row = panel.row(used);
      if (call_.slopes) slopes_[lane] = *call_.slopes.at<T>(0, head);
      lse_[lane] = call_.lse.at<T>(panel.batch, head)[row];
      // A row that sees no key has only hidden ones, and weights of 0 with any number here. Unused lanes have no gradient: their
      // rows are zeros, and so is this.
      delta_[lane] = T(0);
      if (lse_[lane] == -std::numeric_limits<T>::infinity()) {
        lse_[lane] = T(0);
      } else if (lane < panel.count) {
        const T* grad = grad_rows_ + lane * value_stride_;
        call_.output.with_row<T>(panel.batch, head, row, [&](const auto* output) {
          for (int64_t d = 0; d < call_.value_dim; ++d) delta_[lane] += static_cast<T>(output[d]) * grad[d];
        });
        delta_[lane] -= call_.grad_lse.at<T>(panel.batch, head)[row];
      }
      if (lane < panel.count) call_.delta.at<T>(panel.batch, head)[row] = delta_[lane];
    }
    std::fill(grad_query_, grad_query_ + call_.head_dim * lanes, T(0));
    for (int64_t n = 0; n < num_keys; n += kBlock) {
      const int64_t number = std::min(kBlock, num_keys - n);
      const int32_t* keys = all_keys + n;
      key_products(key, call_.key.row, keys, number, call_.head_dim, query_, weights_);
      panel.finish_logits(keys, number, slopes_, weights_, tanh_);
      key_products(value, call_.value.row, keys, number, call_.value_dim, grad_, grad_scores_);
      differentiate(number, keys, grad_bias);
      add_outer(weights_, grad_rows_, value_stride_, keys, number, call_.value_dim, grad_value);
      add_outer(grad_scores_, query_rows_, stride_, keys, number, call_.head_dim, grad_key);
      weighted_sums(key, call_.key.row, keys, number, call_.head_dim, grad_scores_, grad_query_);
    }
    panel.store(grad_query_, call_.head_dim, factors_, call_.grad_query, rows_);
  }

 private:
  // Logits to weights, and the weights' gradients to those of the products of query and key, in place.
  void differentiate(int64_t number, const int32_t* keys, T* grad_bias) {
    for (int64_t n = 0; n < number; ++n) {
      T sum = 0;
      for (int v = 0; v < kVectors; ++v) {
        const int64_t place = n * lanes + v * L;
        const V weight = (V::loadu(weights_ + place) - V::loadu(lse_ + v * L)).exp_u20();
        V grad = weight * (V::loadu(grad_scores_ + place) - V::loadu(delta_ + v * L));
        weight.store(weights_ + place);
        if (grad_bias != nullptr) sum += at::vec::vec_reduce_all<T>([](const V& a, const V& b) { return a + b; }, grad);
        if (call_.softcap) {
          const V t = V::loadu(tanh_ + place);
          grad = grad * V(T(call_.softcap)) * (V(T(1)) - t * t);
        }
        grad.store(grad_scores_ + place);
      }
      if (grad_bias != nullptr) grad_bias[keys[n]] += sum;
    }
  }

  const Call& call_;
  int64_t stride_, value_stride_;
  Scratch<T> scratch_;
  T *query_rows_, *query_, *grad_query_, *rows_, *grad_rows_, *grad_, *weights_, *grad_scores_, *tanh_;
  T *slopes_, *factors_, *lse_, *delta_;
};

// Into how many parts the query rows of a batch row and KV head are split: the fewest that keep all threads at work.
int64_t num_splits(int64_t heads, int64_t parts, int64_t threads) {
  int64_t best = 1;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t splits = 1; splits <= std::min(kMaxSplits, parts); ++splits) {
    const int64_t items = heads * splits, rounds = (items + threads - 1) / threads;
    const double idle = static_cast<double>(rounds * threads) / items;
    if (idle < least - 0.1) best = splits, least = idle;
  }
  return best;
}

template <typename T>
void backward(const Call& call) {
  const Summary summary(call);
  const Parts<T> parts(call);
  const int64_t heads = call.num_batch * call.num_kv_heads, splits = num_splits(heads, parts.number, call.num_threads);
  const Totals<T> grad_key(call, splits, call.grad_key, call.head_dim);
  const Totals<T> grad_value(call, splits, call.grad_value, call.value_dim);
  const Totals<T> grad_bias(call, splits, call.grad_bias, 1);
#pragma omp parallel num_threads(std::min(call.num_threads, heads * splits))
  {
    Backward<T> own(call);
    LiveKeys live(call);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < heads * splits; ++i) {
      const int64_t head = i / splits, split = i % splits;
      // In turns, so that each split has early rows and late ones.
      for (int64_t part = split; part < parts.number; part += splits)
        live.for_each_panel(
            summary, Panel<T>(call, head / call.num_kv_heads, head % call.num_kv_heads), parts, part,
            [&](const Panel<T>& panel, const int32_t* keys, int64_t number) {
              own.run(panel, keys, number, grad_key.at(split, head), grad_value.at(split, head), grad_bias.at(split, head));
            });
    }
  }
  grad_key.add_up();
  grad_value.add_up();
  grad_bias.add_up();
}

// ---- The operators ----------------------------------------------------------------------------------------------------

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The tensors of a call as the kernel reads them: of the type it computes in, their last dimension dense.
class Arguments {
 public:
  Arguments(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& start, const Tensor& end,
            const MaybeTensor& query_index, const MaybeTensor& key_index, const MaybeTensor& bias, const MaybeTensor& sinks,
            const MaybeTensor& slopes, std::optional<double> scale, std::optional<double> softcap)
      : dtype(query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float) {
    call.num_batch = query.size(0), call.num_heads = query.size(1), call.num_queries = query.size(2), call.head_dim = query.size(3);
    call.num_kv_heads = key.size(1), call.num_keys = key.size(2), call.value_dim = value.size(3);
    call.num_threads = torch::stable::get_num_threads();
    call.scale = scale.value_or(1 / std::sqrt(static_cast<double>(call.head_dim)));
    call.softcap = softcap.value_or(0);
    call.query = read_rows(query), call.key = read(key), call.value = read(value);
    call.start = read(start), call.end = read(end);
    call.query_index = read_index(query_index, call.num_keys - call.num_queries, call.num_queries);
    call.key_index = read_index(key_index, 0, call.num_keys);
    if (bias) call.bias = read(*bias);
    if (sinks) call.sinks = read_of_heads(*sinks);
    if (slopes) call.slopes = read_of_heads(*slopes);
  }

  // `[B|1, H|1, (rows,) numbers]`.
  Strided read(const Tensor& tensor) {
    return read_rows(is_number(tensor) && tensor.scalar_type() != dtype ? torch::stable::to(tensor, dtype) : tensor);
  }

  // The same, in 16 bits where it has them.
  Strided read_rows(const Tensor& tensor) {
    Tensor own = tensor;
    if (own.stride(own.dim() - 1) != 1 && own.size(own.dim() - 1) != 1) own = torch::stable::contiguous(own);
    kept_.push_back(own);
    return strided(own);
  }

  Tensor make(std::initializer_list<int64_t> sizes) const { return torch::stable::new_empty(kept_.front(), std::vector<int64_t>(sizes), dtype); }

  Tensor make_zeros(std::initializer_list<int64_t> sizes) const {
    return torch::stable::new_zeros(kept_.front(), std::vector<int64_t>(sizes), dtype);
  }

  // Of the query's type.
  Tensor make_rows(std::initializer_list<int64_t> sizes) const {
    return torch::stable::new_empty(kept_.front(), std::vector<int64_t>(sizes));
  }

  static Strided strided(const Tensor& tensor) {
    Strided result{tensor.data_ptr()};
    result.type = tensor.scalar_type();
    int64_t* strides[] = {&result.batch, &result.head, &result.row};
    for (int64_t i = 0; i < tensor.dim() - 1; ++i) *strides[i] = tensor.size(i) == 1 ? 0 : tensor.stride(i);
    return result;
  }

  Call call;
  ScalarType dtype;

 private:
  static bool is_number(const Tensor& tensor) {
    return tensor.scalar_type() != ScalarType::Int && tensor.scalar_type() != ScalarType::Long;
  }

  // `[B|1, S]`, or `[S]`, or the numbers from `first` on. Numbers beyond int32 stand for its ends: no range begins or ends between.
  Strided read_index(const MaybeTensor& tensor, int64_t first, int64_t size) {
    const int64_t batches = tensor && tensor->dim() == 2 ? tensor->size(0) : 1;
    std::vector<int32_t>& own = indices_[num_indices_++];
    own.resize(std::max<int64_t>(1, batches * size));
    for (int64_t b = 0; b < batches; ++b)
      for (int64_t i = 0; i < size; ++i) {
        int64_t index = first + i;
        if (tensor) {
          const int64_t place = (tensor->dim() == 2 ? b * tensor->stride(0) : 0) + i * tensor->stride(tensor->dim() - 1);
          index = tensor->scalar_type() == ScalarType::Long ? static_cast<const int64_t*>(tensor->data_ptr())[place]
                                                            : static_cast<const int32_t*>(tensor->data_ptr())[place];
        }
        own[b * size + i] = static_cast<int32_t>(std::clamp<int64_t>(index, -(int64_t{1} << 31), (int64_t{1} << 31) - 2));
      }
    return {own.data(), batches > 1 ? size : 0};
  }

  // `[Hq]`.
  Strided read_of_heads(const Tensor& tensor) {
    Strided result = read(tensor);
    result.head = kept_.back().stride(0);
    return result;
  }

  std::vector<Tensor> kept_;
  std::vector<int32_t> indices_[2];
  int num_indices_ = 0;
};

Tensor in_type_of(const Tensor& tensor, const Tensor& like) {
  return tensor.scalar_type() == like.scalar_type() ? tensor : torch::stable::to(tensor, like.scalar_type());
}

std::tuple<Tensor, Tensor> attention(
    Tensor query, Tensor key, Tensor value, Tensor start, Tensor end, MaybeTensor query_index, MaybeTensor key_index,
    MaybeTensor bias, MaybeTensor sinks, MaybeTensor slopes, std::optional<double> scale, std::optional<double> softcap) {
  Arguments a(query, key, value, start, end, query_index, key_index, bias, sinks, slopes, scale, softcap);
  // Heads innermost: what follows an attention is their concatenation, which then copies nothing.
  Tensor output = torch::stable::transpose(a.make_rows({query.size(0), query.size(2), query.size(1), value.size(3)}), 1, 2);
  Tensor lse = a.make({query.size(0), query.size(1), query.size(2)});
  a.call.output = Arguments::strided(output), a.call.lse = Arguments::strided(lse);
  if (lse.numel() > 0) a.dtype == ScalarType::Double ? forward<double>(a.call) : forward<float>(a.call);
  return {output, lse};
}

// The gradient of a bias [B, Hkv, K], summed over the dimensions in which the bias has one.
template <typename T>
Tensor sum_to(const Tensor& grad, const Tensor& bias, const Arguments& a) {
  Tensor total = a.make_zeros({bias.size(0), bias.size(1), bias.size(2)});
  const Strided from = Arguments::strided(grad), to = Arguments::strided(total);
  for (int64_t b = 0; b < a.call.num_batch; ++b)
    for (int64_t h = 0; h < a.call.num_kv_heads; ++h) {
      const T* own = from.at<T>(b, h);
      T* sums = to.at<T>(b, h);
      for (int64_t j = 0; j < a.call.num_keys; ++j) sums[bias.size(2) > 1 ? j : 0] += own[j];
    }
  return total;
}

// -sum over rows of exp(sink - lse) * delta, for each query head
template <typename T>
Tensor grad_of_sinks(const Arguments& a) {
  const Call& call = a.call;
  Tensor total = a.make({call.num_heads});
  for (int64_t h = 0; h < call.num_heads; ++h) {
    T sum = 0;
    for (int64_t b = 0; b < call.num_batch; ++b) {
      const T *lse = call.lse.at<T>(b, h), *delta = call.delta.at<T>(b, h);
      for (int64_t i = 0; i < call.num_queries; ++i)
        if (delta[i] != 0) sum -= std::exp(*call.sinks.at<T>(0, h) - lse[i]) * delta[i];
    }
    static_cast<T*>(total.data_ptr())[h] = sum;
  }
  return total;
}

// Gradients of query, key, value, bias and sinks; of what is not given, an empty tensor.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_output, Tensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, Tensor start, Tensor end,
    MaybeTensor query_index, MaybeTensor key_index, MaybeTensor bias, MaybeTensor sinks, MaybeTensor slopes,
    std::optional<double> scale, std::optional<double> softcap) {
  Arguments a(query, key, value, start, end, query_index, key_index, bias, sinks, slopes, scale, softcap);
  Call& call = a.call;
  call.output = a.read_rows(output), call.grad_output = a.read_rows(grad_output);
  call.lse = a.read(lse), call.grad_lse = a.read(grad_lse);
  Tensor delta = a.make({call.num_batch, call.num_heads, call.num_queries});
  Tensor grad_query = a.make_rows({call.num_batch, call.num_heads, call.num_queries, call.head_dim});
  Tensor grad_key = a.make_zeros({call.num_batch, call.num_kv_heads, call.num_keys, call.head_dim});
  Tensor grad_value = a.make_zeros({call.num_batch, call.num_kv_heads, call.num_keys, call.value_dim});
  Tensor grad_bias = bias ? a.make_zeros({call.num_batch, call.num_kv_heads, call.num_keys}) : a.make({0});
  call.delta = Arguments::strided(delta), call.grad_query = Arguments::strided(grad_query);
  call.grad_key = Arguments::strided(grad_key), call.grad_value = Arguments::strided(grad_value);
  if (bias) call.grad_bias = Arguments::strided(grad_bias);
  const bool is_double = a.dtype == ScalarType::Double;
  if (delta.numel() > 0) is_double ? backward<double>(call) : backward<float>(call);
  Tensor grad_sinks = !sinks ? a.make({0}) : is_double ? grad_of_sinks<double>(a) : grad_of_sinks<float>(a);
  if (bias) grad_bias = is_double ? sum_to<double>(grad_bias, *bias, a) : sum_to<float>(grad_bias, *bias, a);
  return {grad_query, in_type_of(grad_key, key), in_type_of(grad_value, value),
          bias ? in_type_of(grad_bias, *bias) : grad_bias, sinks ? in_type_of(grad_sinks, *sinks) : grad_sinks};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rewriter, CPU, m) {
  m.impl("live_range_attention_cpu", TORCH_BOX(&attention));
  m.impl("live_range_attention_backward_cpu", TORCH_BOX(&attention_backward));
}
