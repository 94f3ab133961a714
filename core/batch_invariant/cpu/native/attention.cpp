// softmax(Q K^T * scale + mask) V, one query row at a time as far as the bits are concerned.
//
// Of every query row, in fp32 (operands widened exactly):
//   score[j] = dot * scale, dot = the sum over chunks of SIZE_CHUNK of the head dimension,
//     ascending, each a serial FMA chain from +0 (gemm.h); with a soft cap it becomes
//     tanh(score / cap) * cap, every step rounded (math.h); an additive mask is added, rounded
//     again; the score is -inf where the mask is false or -inf or where causality, the window or
//     the length of the sequence forbids j;
//   top = the largest score, exactly, a sink being one more; p[j] = exp(score[j] - top) (math.h);
//   total = for each block of KEY_BLOCK keys a serial sum of p over ascending j from +0; the blocks
//     are added in ascending order from +0, and last exp(sink - top);
//   acc[d] = for each of these blocks a serial FMA chain of p[j] V[j, d] from +0, added likewise;
//   out[d] = acc[d] / total + 0, rounded once; lse = log(total) + top.
// Blocks are counted from the first key of the sequence or, under a mask, from the first key whose
// addend is not more than FAR below the largest one of the row (keys before that one make blocks
// of their own). A key whose score is -inf takes no part, whatever K and V hold there. A row without
// any other key and without a sink gives zeros and an lse of -inf. Every NaN is written as the one
// quiet NaN.
//
// So a row's bits depend on its own query, on the keys that take part, and on their places behind
// the key from which blocks are counted: not on the batch, the head, the number of queries, padding
// on either side, pages, strides or threads. A masked key between others adds nothing and keeps its
// place: without it, later keys may be in other blocks.
#include "gemm.h"
#include "math.h"
#include "parallel.h"

namespace bi {
namespace {

// What Python passes. Strides are in elements; the last dimension of Q, K, V and out has unit
// stride.
struct AttentionArgs {
  i64 dtype;  // F32, BF16 or F16: of Q, K, V and out
  i64 batch, q_heads, kv_heads, queries, keys, size, v_size;
  const char* q;
  i64 q_batch, q_head, q_row;
  const char* k;
  i64 k_batch, k_head, k_row;
  const char* v;
  i64 v_batch, v_head, v_row;
  i64 mask_kind;   // a MaskKind
  i64 mask_dtype;  // of an additive mask
  const char* mask;
  i64 mask_batch, mask_head, mask_row, mask_col;  // zero where the mask is broadcast
  char* out;
  i64 out_batch, out_head, out_row;
  float* lse;  // null for none
  i64 lse_batch, lse_head, lse_row;
  i64 causal;  // key j takes part in query i only if j <= i
  i64 threads;
  double scale;
};

// One sequence of a batch whose lengths differ. Its queries are rows q_row .. q_row + queries of Q
// and out; its keys first .. end count from row k_row of K and V, or from its first page.
struct Sequence {
  i64 q_row, queries;
  i64 position;  // of the first query among the keys
  i64 k_row, first, end;
};

// A batch of sequences: `base.queries` and `base.keys` are the most that one of them has.
struct SequencesArgs {
  AttentionArgs base;
  const Sequence* sequences;  // [batch]
  const i32* pages;           // [batch, ...], which page holds the keys; null: they lie in rows
  i64 pages_row, page_size;   // the strides k_batch and v_batch are those of a page
  i64 window;                 // keys in (position - window, position]; 0 for no window
  const float* sinks;         // [q_heads], null for none
  double soft_cap;            // 0 for none
};

enum MaskKind : i64 { NO_MASK = 0, BOOL_MASK = 1, ADDITIVE_MASK = 2 };

constexpr float INF = __builtin_inff();
// exp() never gives it, it adds nothing to any chain, and it tells a key that takes no part from
// one whose weight is too small for fp32.
constexpr float ABSENT = -0.0f;
constexpr u32 ABSENT_BITS = 0x80000000u;

// One chain over a long row would round every term at the size of the whole sum.
constexpr i64 SIZE_CHUNK = 16;
constexpr i64 KEY_BLOCK = 128;
// Masks are also written with finite numbers, down to the lowest one of a dtype.
constexpr float FAR = 1e4f;

constexpr i64 WEIGHT_BYTES = 384 << 10;  // of the weights of a task: they stay in the L2 cache
constexpr i64 MIN_ROWS = 12, MAX_ROWS = 48;
constexpr i64 FIRST_KEY = 32;  // a task's first key is a multiple of this
constexpr i64 MIN_TASK_WORK = 1 << 18;  // multiply-adds that are worth handing to another thread

constexpr i32x16 LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

i64 bytes_of(i64 dtype) { return dtype == F64 ? 8 : dtype == F32 ? 4 : 2; }

BI_INLINE i32x16 load_bools(const u8* p, i64 stride, i64 n) {
  typedef u8 u8x16 __attribute__((vector_size(16)));
  if (stride == 1 && n == 16) return __builtin_convertvector(load<u8x16>(p), i32x16);
  u8 buffer[16] = {};
  for (i64 l = 0; l < n; l++) buffer[l] = p[l * stride];
  return __builtin_convertvector(load<u8x16>(buffer), i32x16);
}

template <class T>
BI_INLINE f32x16 load_strided(const T* p, i64 stride, i64 n) {
  if (stride == 1) return load_f32(p, n);
  T buffer[16] = {};
  for (i64 l = 0; l < n; l++) buffer[l] = p[l * stride];
  return load_f32(buffer);
}

struct Attention {
  const AttentionArgs& g;
  const SequencesArgs* more;  // null: all sequences are whole, and none of its options is used
  const GemmKernel& kernel;
  i64 group;                    // query heads of one key head
  i64 task_heads, head_chunks;  // query heads of a task, and how many tasks make up a group
  i64 task_queries, query_chunks;

  // The rows of a task: `heads` query heads times `queries` queries, head by head; `keys` keys from
  // `begin` are all that any of them sees.
  struct Rows {
    Sequence sequence;
    i64 batch, kv_head, head0, heads, query0, queries, begin, keys;
    i64 count() const { return heads * queries; }
    i64 head(i64 row) const { return head0 + row / queries; }
    i64 query(i64 row) const { return query0 + row % queries; }
  };

  Rows rows_of(i64 task) const {
    i64 chunk = query_chunks - 1 - task % query_chunks;  // causal: the longest ones first
    i64 head_chunk = task / query_chunks % head_chunks;
    i64 kv = task / (query_chunks * head_chunks);
    Rows r{};
    r.batch = kv / g.kv_heads;
    r.kv_head = kv % g.kv_heads;
    r.head0 = r.kv_head * group + head_chunk * task_heads;
    r.heads = min(task_heads, (r.kv_head + 1) * group - r.head0);
    r.sequence = more != nullptr ? more->sequences[r.batch]
                                 : Sequence{0, g.queries, 0, 0, 0, g.keys};
    r.query0 = chunk * task_queries;
    r.queries = max(min(task_queries, r.sequence.queries - r.query0), 0);
    i64 end = last(r, r.query0 + r.queries - 1) + 1;
    r.begin = first(r, r.query0) / FIRST_KEY * FIRST_KEY;
    r.keys = max(end - r.begin, 0);
    return r;
  }

  // The first and the last key that a query of the task's sequence may see.
  i64 first(const Rows& r, i64 query) const {
    i64 key = r.sequence.first;
    if (more == nullptr || more->window == 0) return key;
    return max(key, r.sequence.position + query - more->window + 1);
  }
  i64 last(const Rows& r, i64 query) const {
    i64 key = r.sequence.end - 1;
    return g.causal ? min(key, r.sequence.position + query) : key;
  }

  // Where row `key` of the keys or values of a task lies.
  const char* row_of(const char* base, i64 batch, i64 head, i64 row, const Rows& r, i64 key) const {
    i64 at = r.kv_head * head;
    if (more != nullptr && more->pages != nullptr) {
      i64 page = more->pages[r.batch * more->pages_row + key / more->page_size];
      at += page * batch + key % more->page_size * row;
    } else {
      at += r.batch * batch + (r.sequence.k_row + key) * row;
    }
    return base + at * kernel.element_bytes;
  }
  const char* key_row(const Rows& r, i64 key) const {
    return row_of(g.k, g.k_batch, g.k_head, g.k_row, r, key);
  }
  const char* value_row(const Rows& r, i64 key) const {
    return row_of(g.v, g.v_batch, g.v_head, g.v_row, r, key);
  }
  // How many of `keys` keys from `key` on lie one row stride apart.
  i64 together(i64 key, i64 keys) const {
    if (more == nullptr || more->pages == nullptr) return keys;
    return min(keys, more->page_size - key % more->page_size);
  }

  // What a row needs to know about its keys: the first and last one it may see, where its mask
  // begins, and where its first block of keys does.
  struct Sight {
    i64 first, last;
    const char* mask;
    i64 base;
  };
  Sight sight(const Rows& r, i64 row) const {
    i64 at = r.batch * g.mask_batch + r.head(row) * g.mask_head + r.query(row) * g.mask_row;
    i64 bytes = g.mask_kind == BOOL_MASK ? 1 : bytes_of(g.mask_dtype);
    Sight found{first(r, r.query(row)), last(r, r.query(row)), g.mask + at * bytes,
                r.sequence.first};
    if (g.mask_kind != NO_MASK) found.base = first_shown(found);
    return found;
  }

  // The key from which a mask's blocks of a row are counted, the one behind the last if all are
  // masked. A NaN is not far below anything.
  i64 first_shown(const Sight& sight) const {
    i64 end = sight.last + 1, key = 0;
    f32x16 top = splat(-INF);
    for (; key < end; key += 16) {
      i64 n = min(end - key, 16);
      f32x16 added = mask(sight, key, n);
      top = ((added > top) & (LANE < static_cast<i32>(n))) ? added : top;
    }
    f32x16 least = splat(largest(top) - FAR);
    for (key = 0; key < end;) {
      i64 n = min(end - key, 16), lane = 0;
      f32x16 added = mask(sight, key, n);
      i32x16 hidden = (added == -INF) | (added < least);
      while (lane < n && hidden[lane]) lane++;
      key += lane;
      if (lane < n) break;
    }
    return key;
  }

  // What the mask adds to the scores of the `n` keys from `key` on: -inf where it lets none be seen.
  f32x16 mask(const Sight& sight, i64 key, i64 n) const {
    i64 at = key * g.mask_col;
    if (g.mask_kind == BOOL_MASK) {
      const u8* from = reinterpret_cast<const u8*>(sight.mask) + at;
      return load_bools(from, g.mask_col, n) != 0 ? splat(0.0f) : splat(-INF);
    }
    const char* from = sight.mask + at * bytes_of(g.mask_dtype);
    switch (g.mask_dtype) {
      case BF16:
        return load_strided(reinterpret_cast<const bf16*>(from), g.mask_col, n);
      case F16:
        return load_strided(reinterpret_cast<const f16*>(from), g.mask_col, n);
      default:
        return load_strided(reinterpret_cast<const float*>(from), g.mask_col, n);
    }
  }

  // The 16 scores of a row that begin at key `col`, -inf where a key takes no part.
  f32x16 masked(f32x16 score, const Sight& sight, i64 end, i64 col) const {
    if (g.mask_kind != NO_MASK) {
      f32x16 added = mask(sight, col, max(min(end - col, 16), 0));
      score = added == -INF ? splat(-INF) : g.mask_kind == BOOL_MASK ? score : score + added;
    }
    i64 left = sight.last - col, before = sight.first - col;
    if (before > 0) score = LANE < static_cast<i32>(min(before, 16)) ? splat(-INF) : score;
    return left >= 15 ? score : LANE > static_cast<i32>(max(left, -1)) ? splat(-INF) : score;
  }

  i64 head_blocks() const { return ceil_div(g.size, KC); }

  // Scores as [key blocks][rows][LDA], and the largest of each row as 16 lanes.
  // `gathered`: room for the keys of a panel that lie in several pages.
  // `c`: room for two panels of accumulators.
  void scores(const Rows& r, const Sight* sights, const float* q, char* gathered, float* panel,
              float* c, float* out, f32x16* top) const {
    i64 nr = kernel.panel_lanes, rows = r.count();
    f32x16 scale = splat(static_cast<float>(g.scale));
    f32x16 cap = splat(more != nullptr ? static_cast<float>(more->soft_cap) : 0.0f);
    bool capped = cap[0] > 0;
    for (i64 i = 0; i < rows; i++) top[i] = splat(-INF);
    for (i64 key = 0; key < r.keys; key += nr) {
      i64 cols = min(r.keys - key, nr), row = g.k_row;
      const char* k = key_row(r, r.begin + key);
      if (together(r.begin + key, cols) < cols) {
        i64 bytes = g.size * kernel.element_bytes;
        for (i64 l = 0; l < cols; l++) {
          __builtin_memcpy(gathered + l * bytes, key_row(r, r.begin + key + l),
                           static_cast<size_t>(bytes));
        }
        k = gathered;
        row = g.size;
      }
      for (i64 d = 0; d < g.size; d += SIZE_CHUNK) {
        i64 units = min(g.size - d, SIZE_CHUNK);
        multiply_nk(kernel, q + d / KC * rows * LDA + d % KC, k + d * kernel.element_bytes, row,
                    cols, units, units, rows, panel, d == 0 ? c : c + rows * nr, true);
        if (d > 0) add(c, c + rows * nr, rows * nr);
      }
      float* block = out + key / KC * rows * LDA + key % KC;
      for (i64 i = 0; i < rows; i++) {
        for (i64 l = 0; l < nr; l += 16) {
          f32x16 s = load<f32x16>(c + i * nr + l) * scale;
          if (capped) s = tanh(s / cap) * cap;
          s = masked(s, sights[i], r.begin + r.keys, r.begin + key + l);
          i32x16 keep = (s <= top[i]) | (top[i] != top[i]);  // a NaN gets in and never out
          top[i] = keep ? top[i] : s;
          store(block + i * LDA + l, s);
        }
      }
    }
  }

  static void add(float* to, const float* from, i64 count) {
    for (i64 i = 0; i < count; i += 16) store(to + i, load<f32x16>(to + i) + load<f32x16>(from + i));
  }

  static float largest(f32x16 lanes) {
    float top = lanes[0];
    for (int l = 1; l < 16; l++) top = lanes[l] <= top || top != top ? top : lanes[l];
    return top;
  }

  // The largest score of a row, its sink included.
  float with_sink(const Rows& r, i64 row, float top) const {
    if (more == nullptr || more->sinks == nullptr) return top;
    float sink = more->sinks[r.head(row)];
    return sink <= top || top != top ? top : sink;
  }

  // Scores become weights, in place; `top[i]` the largest score of row i.
  void weights(const Rows& r, float* p, const float* top) const {
    i64 rows = r.count();
    for (i64 key = 0; key < r.keys; key += KC) {
      i64 units = round_up(min(r.keys - key, KC), 16);
      for (i64 i = 0; i < rows; i++) {
        float* row = p + (key / KC * rows + i) * LDA;
        f32x16 shift = splat(top[i]);
        for (i64 u = 0; u < units; u += 16) {
          f32x16 s = load<f32x16>(row + u);
          store(row + u, s == -INF ? splat(ABSENT) : exp(s - shift));
        }
      }
    }
  }

  // How many keys from `r.begin` on lie before the next block of a row's keys.
  static i64 first_block(const Rows& r, const Sight& sight) {
    i64 from = (r.begin - sight.base) % KEY_BLOCK;
    return from >= 0 ? KEY_BLOCK - from : -from;
  }

  // The sums of the weights, 16 rows side by side; behind them the sinks.
  void totals(const Rows& r, const Sight* sights, const float* p, const float* top,
              float* total) const {
    i64 rows = r.count();
    for (i64 i = 0; i < rows; i += 16) {
      f32x16 block = {}, sum = {};
      i32x16 end;  // of each row's block
      for (int l = 0; l < 16; l++)
        end[l] = static_cast<i32>(first_block(r, sights[min(i + l, rows - 1)]));
      for (i64 key = 0; key < r.keys; key += KC) {
        const float* from[16];
        for (i64 l = 0; l < 16; l++) from[l] = p + (key / KC * rows + min(i + l, rows - 1)) * LDA;
        i64 units = min(r.keys - key, KC);
        for (i64 u = 0; u < units; u += 8) {  // those past the last key are ABSENT
          f32x16 weight[8];
          transpose<ToF32<float>>(from, u, weight);
          i32 at = static_cast<i32>(key + u);
          if (__builtin_reduce_or(end < at + 8) == 0) {
            for (int j = 0; j < 8; j++) block += weight[j];
            continue;
          }
          for (int j = 0; j < 8; j++) {
            i32x16 begins = end == at + j;
            sum = begins ? sum + block : sum;
            block = (begins ? splat(0.0f) : block) + weight[j];
            end += begins & static_cast<i32>(KEY_BLOCK);
          }
        }
      }
      store(total + i, sum + block);
    }
    if (more == nullptr || more->sinks == nullptr) return;
    for (i64 i = 0; i < rows; i++) {
      if (top[i] != -INF) total[i] += exp(more->sinks[r.head(i)] - top[i]);
    }
  }

  // out[panels][rows][lanes] = weights times values; `block` has room for as much, and `ends` for
  // where the block of each row ends.
  void values(const Rows& r, const Sight* sights, const float* p, float* panel, i64* ends,
              float* block, float* out) const {
    i64 nr = kernel.panel_lanes, rows = r.count(), c_panel = rows * nr;
    i64 panels = ceil_div(g.v_size, nr);
    i64 swept = rows <= kernel.sweep_rows ? g.v_size / nr : 0;
    for (i64 i = 0; i < rows; i++) ends[i] = first_block(r, sights[i]);
    for (i64 key = 0, units; key < r.keys; key += units) {
      units = together(r.begin + key, min(r.keys - key, KC - key % KC));
      for (i64 i = 0; i < rows; i++) units = min(units, ends[i] - key);
      const float* a = p + key / KC * rows * LDA + key % KC;
      const char* from = value_row(r, r.begin + key);
      if (swept > 0) kernel.sweep(a, from, g.v_row, swept, units, rows, block, c_panel, key == 0);
      for (i64 j = swept; j < panels; j++) {
        kernel.pack_panel[0](from + j * nr * kernel.element_bytes, g.v_row,
                             min(g.v_size - j * nr, nr), units, units, panel);
        kernel.multiply(a, panel, units, rows, block + j * c_panel, key == 0);
      }
      for (i64 i = 0; i < rows; i++) {
        if (key + units < r.keys && key + units < ends[i]) continue;
        ends[i] += KEY_BLOCK;
        for (i64 j = 0; j < panels; j++) {
          i64 at = j * c_panel + i * nr;
          add(out + at, block + at, nr);
          __builtin_memset(block + at, 0, static_cast<size_t>(nr) * sizeof(float));
        }
      }
    }
  }

  // The row's values again, without the keys that take no part: zero times infinity is not zero.
  template <class T>
  void row_without_absent(const Rows& r, const Sight& sight, i64 row, const float* p,
                          float* out) const {
    i64 nr = kernel.panel_lanes, rows = r.count();
    for (i64 d = 0; d < g.v_size; d += 16) {
      i64 n = min(g.v_size - d, 16), end = first_block(r, sight);
      f32x16 block = {}, sum = {};
      for (i64 key = 0; key < r.keys; key++) {
        if (key == end) sum += block, block = f32x16{}, end += KEY_BLOCK;
        float weight = p[(key / KC * rows + row) * LDA + key % KC];
        if (bit_cast<u32>(weight) == ABSENT_BITS) continue;
        const T* v = reinterpret_cast<const T*>(value_row(r, r.begin + key));
        block = fma(splat(weight), load_f32(v + d, n), block);
      }
      store(out + (d / nr * rows + row) * nr + d % nr, sum + block);
    }
  }

  // Writes one row; false if what it was made of is not finite.
  template <class T>
  bool write_row(const Rows& r, i64 row, bool none, float total, const float* acc) const {
    i64 nr = kernel.panel_lanes, rows = r.count();
    T* out = reinterpret_cast<T*>(g.out) + r.batch * g.out_batch + r.head(row) * g.out_head +
             (r.sequence.q_row + r.query(row)) * g.out_row;
    f32x16 zeros = {};
    for (i64 d = 0; d < g.v_size; d += 16) {
      i64 n = min(g.v_size - d, 16);
      f32x16 sum = load<f32x16>(acc + (d / nr * rows + row) * nr + d % nr);
      zeros += LANE < static_cast<i32>(n) ? sum - sum : splat(0.0f);
      f32x16 x = none ? splat(0.0f) : sum / splat(total) + 0.0f;
      store_f32(out + d, x == x ? x : splat(__builtin_nanf("")), n);
    }
    return largest(zeros) == 0.0f;
  }

  template <class T>
  void finish(const Rows& r, const Sight* sights, const float* p, const float* top,
              const float* total, float* acc) const {
    for (i64 i = 0; i < r.count(); i++) {
      bool none = top[i] == -INF;
      bool finite = write_row<T>(r, i, none, total[i], acc);
      if (!finite && !none && (g.causal || g.mask_kind != NO_MASK || more != nullptr)) {
        row_without_absent<T>(r, sights[i], i, p, acc);
        write_row<T>(r, i, none, total[i], acc);
      }
      if (g.lse != nullptr) {
        float lse = none ? -INF : log(total[i]) + top[i];
        g.lse[r.batch * g.lse_batch + r.head(i) * g.lse_head +
              (r.sequence.q_row + r.query(i)) * g.lse_row] =
            lse == lse ? lse : __builtin_nanf("");
      }
    }
  }

  Status run(i64 task) const {
    Rows r = rows_of(task);
    if (r.queries == 0) return OK;
    i64 nr = kernel.panel_lanes, rows = r.count(), panels = ceil_div(g.v_size, nr);
    i64 key_blocks = max(ceil_div(r.keys, KC), 1);
    i64 lanes = round_up(rows, 16);
    i64 sizes[] = {KC * nr,
                   2 * rows * nr,
                   head_blocks() * rows * LDA,
                   key_blocks * rows * LDA,
                   2 * panels * rows * nr,
                   rows * 16,
                   lanes,
                   lanes,
                   rows * static_cast<i64>(sizeof(Sight) / sizeof(float)),
                   rows * static_cast<i64>(sizeof(i64) / sizeof(float)),
                   more != nullptr && more->pages != nullptr ? nr * g.size : 0};
    i64 floats = 0;
    for (i64& size : sizes) {
      i64 at = floats;
      floats += round_up(size, 16);
      size = at;
    }
    Scratch scratch(floats * static_cast<i64>(sizeof(float)));
    if (scratch.data == nullptr) return OUT_OF_MEMORY;
    float* base = scratch.as<float>();
    float *panel = base + sizes[0], *c = base + sizes[1], *q = base + sizes[2],
          *p = base + sizes[3];
    float *acc = base + sizes[4], *top = base + sizes[6], *total = base + sizes[7];
    f32x16* top_lanes = reinterpret_cast<f32x16*>(base + sizes[5]);
    Sight* sights = reinterpret_cast<Sight*>(base + sizes[8]);
    i64* ends = reinterpret_cast<i64*>(base + sizes[9]);
    char* gathered = reinterpret_cast<char*>(base + sizes[10]);
    for (i64 i = 0; i < rows; i++) sights[i] = sight(r, i);

    __builtin_memset(acc, 0, static_cast<size_t>(panels * rows * nr) * sizeof(float));
    for (i64 d = 0; d < head_blocks(); d++) {
      i64 units = min(g.size - d * KC, KC);
      for (i64 h = 0; h < r.heads; h++) {
        const char* from =
            g.q + (r.batch * g.q_batch + (r.head0 + h) * g.q_head +
                   (r.sequence.q_row + r.query0) * g.q_row + d * KC) *
                      kernel.element_bytes;
        kernel.pack_rows(from, g.q_row, r.queries, units, units,
                         q + (d * rows + h * r.queries) * LDA);
      }
    }
    if (g.size == 0) __builtin_memset(c, 0, static_cast<size_t>(rows * nr) * sizeof(float));
    scores(r, sights, q, gathered, panel, c, p, top_lanes);
    for (i64 i = 0; i < rows; i++) top[i] = with_sink(r, i, largest(top_lanes[i]));
    weights(r, p, top);
    totals(r, sights, p, top, total);
    values(r, sights, p, panel, ends, acc + panels * rows * nr, acc);
    switch (g.dtype) {
      case F32:
        finish<float>(r, sights, p, top, total, acc);
        break;
      case BF16:
        finish<bf16>(r, sights, p, top, total, acc);
        break;
      default:
        finish<f16>(r, sights, p, top, total, acc);
    }
    return OK;
  }
};

Status attend(const AttentionArgs& g, const SequencesArgs* more) {
  if (g.dtype != F32 && g.dtype != BF16 && g.dtype != F16) return BAD_DTYPE;
  if (g.mask_kind == ADDITIVE_MASK && g.mask_dtype != F32 && g.mask_dtype != BF16 &&
      g.mask_dtype != F16) {
    return BAD_DTYPE;
  }
  if (min(min(min(g.batch, g.q_heads), min(g.queries, g.keys)),
          min(min(g.size, g.v_size), g.kv_heads)) < 0 ||
      g.mask_kind < NO_MASK || g.mask_kind > ADDITIVE_MASK ||
      (g.causal && g.mask_kind != NO_MASK)) {
    return BAD_ARGUMENT;
  }
  if (g.batch == 0 || g.q_heads == 0 || g.queries == 0) return OK;
  if (g.kv_heads == 0 || g.q_heads % g.kv_heads != 0) return BAD_ARGUMENT;

  Attention a{g, more, *fma_kernel(static_cast<DType>(g.dtype)), g.q_heads / g.kv_heads, 1, 1, 1,
              1};
  i64 row_bytes = max(ceil_div(g.keys, KC), 1) * LDA * static_cast<i64>(sizeof(float));
  i64 rows = max(MIN_ROWS, min(MAX_ROWS, WEIGHT_BYTES / row_bytes));
  a.query_chunks = ceil_div(g.queries, rows);
  a.task_queries = ceil_div(g.queries, a.query_chunks);
  a.query_chunks = ceil_div(g.queries, a.task_queries);
  i64 tasks = g.batch * g.kv_heads * a.query_chunks;
  // The heads of a group share the packed keys and values, unless threads would be idle for it.
  a.head_chunks = max(ceil_div(a.group, max(rows / a.task_queries, 1)),
                      min(a.group, ceil_div(g.threads, tasks)));
  a.task_heads = ceil_div(a.group, a.head_chunks);
  a.head_chunks = ceil_div(a.group, a.task_heads);
  tasks *= a.head_chunks;

  i64 work = a.task_heads * a.task_queries * max(g.keys * (g.size + g.v_size), 1);
  i64 grain = ceil_div(MIN_TASK_WORK, work);
  return parallel_for(
      static_cast<int>(g.threads), ceil_div(tasks, grain), [&](i64 first) -> Status {
        for (i64 task = first * grain; task < min(tasks, (first + 1) * grain); task++) {
          Status status = a.run(task);
          if (status != OK) return status;
        }
        return OK;
      });
}

}  // namespace
}  // namespace bi

BI_EXPORT bi::i32 bi_attention(const bi::AttentionArgs* args) { return bi::attend(*args, nullptr); }

BI_EXPORT bi::i32 bi_attention_of_sequences(const bi::SequencesArgs* args) {
  using namespace bi;
  if (args->base.mask_kind != NO_MASK || args->window < 0 || !(args->soft_cap >= 0) ||
      (args->pages != nullptr && args->page_size < 1)) {
    return BAD_ARGUMENT;
  }
  return attend(args->base, args);
}
