// C = alpha * A B + beta * addend for one matrix or a batch of them: the schedule and the last rounding.
//
// The bits of an element of C are those of its own chain over k (gemm.h names the orders), then, in the
// accumulator's precision, alpha * chain if alpha != 1, then fma(beta, addend, that) if there is an addend,
// then one rounding to the dtype of C. Nothing here depends on M, N, the batch, the strides or the threads
// except the order in which independent elements are computed.
#include "gemm.h"

#include "parallel.h"

namespace bi {
namespace {

// What Python passes, packed by the format string in native.py. Strides are in elements.
struct GemmArgs {
  i64 dtype, out_dtype;
  i64 M, N, K, batch;
  const char* a;
  i64 a_row, a_batch;
  const char* b;
  i64 b_layout;  // 0: [K, N] with unit stride in n; 1: [N, K] with unit stride in k
  i64 b_row, b_batch;
  const char* addend;  // null for none
  i64 addend_row, addend_col, addend_batch;
  char* c;
  i64 c_row, c_batch;
  i64 threads;
  i64 bf16_order;  // a Bf16Order; -1 is the process's own
  double alpha, beta;
};

template <class T>
struct Lanes {
  using Vector = f32x16;
  BI_INLINE f32x16 read(const T* p, i64 n) { return load_f32(p, n); }
  BI_INLINE void write(T* p, f32x16 v, i64 n) { store_f32(p, v, n); }
};
template <>
struct Lanes<double> {
  using Vector = f64x8;
  BI_INLINE f64x8 read(const double* p, i64 n) {
    if (n >= 8) return load<f64x8>(p);
    double buffer[8] = {};
    __builtin_memcpy(buffer, p, static_cast<size_t>(n) * 8);
    return load<f64x8>(buffer);
  }
  BI_INLINE void write(double* p, f64x8 v, i64 n) {
    __builtin_memcpy(p, &v, static_cast<size_t>(min(n, 8)) * 8);
  }
};

// Rounds accumulators [panels][rows_of_a_panel][nr] into rows of C.
template <class T, class Acc>
void finish(const GemmArgs& g, const void* accumulators, i64 rows_of_a_panel, i64 nr, i64 batch, i64 row0, i64 rows,
            i64 col0, i64 cols) {
  using Vector = typename Lanes<T>::Vector;
  constexpr i64 LANES = sizeof(Vector) / sizeof(Acc);
  const Acc* acc = static_cast<const Acc*>(accumulators);
  const Vector alpha = splat(static_cast<Acc>(g.alpha)), beta = splat(static_cast<Acc>(g.beta));
  const bool scaled = g.alpha != 1.0;
  const T* addend = reinterpret_cast<const T*>(g.addend);
  if (addend != nullptr) addend += batch * g.addend_batch + row0 * g.addend_row + col0 * g.addend_col;
  T* c = reinterpret_cast<T*>(g.c) + batch * g.c_batch + row0 * g.c_row + col0;
  for (i64 i = 0; i < rows; i++, c += g.c_row) {
    for (i64 j = 0; j < cols; j += LANES) {
      i64 left = cols - j;
      Vector x = load<Vector>(acc + (j / nr * rows_of_a_panel + i) * nr + j % nr);
      if (scaled) x *= alpha;
      if (addend != nullptr) {
        const T* from = addend + i * g.addend_row + j * g.addend_col;
        if (g.addend_col == 1) {
          x = fma(beta, Lanes<T>::read(from, left), x);
        } else {
          T some[LANES] = {};
          for (i64 l = 0; l < min(left, LANES); l++) some[l] = from[l * g.addend_col];
          x = fma(beta, Lanes<T>::read(some, LANES), x);
        }
      }
      Lanes<T>::write(c + j, x, left);
    }
  }
}

using Finish = void (*)(const GemmArgs&, const void*, i64, i64, i64, i64, i64, i64, i64);

Finish finish_for(i64 out_dtype) {
  switch (out_dtype) {
    case F32: return finish<float, float>;
    case F64: return finish<double, double>;
    case BF16: return finish<bf16, float>;
    case F16: return finish<f16, float>;
  }
  return nullptr;
}

constexpr i64 MAX_ROWS = 384;        // rows of a task: with KC they fill about half of a 1 MiB L2 cache
constexpr i64 MAX_COLS = 256;
constexpr i64 WHOLE_A_BYTES = 1 << 20;
constexpr i64 TASKS_PER_THREAD = 8;  // enough that a slow thread does not hold up the others
constexpr i64 MIN_TASK_WORK = 1 << 18;  // multiply-adds that are worth handing to another thread

struct Plan {
  const GemmKernel* kernel;
  Finish finish;
  i64 units, k_blocks;     // packed units of K, and how many blocks of KC they make
  i64 row_blocks, block_rows;
  i64 col_chunks, chunk_cols;
  bool whole_a;            // all k blocks of a task's rows are packed at once, and panels are finished one by one
};

Plan make_plan(const GemmArgs& g, const GemmKernel* kernel) {
  Plan p{};
  p.kernel = kernel;
  p.finish = finish_for(g.out_dtype);
  p.units = round_up(ceil_div(g.K, kernel->k_per_unit), kernel->unit_multiple);
  p.k_blocks = ceil_div(p.units, KC);
  p.row_blocks = ceil_div(g.M, MAX_ROWS);
  p.block_rows = round_up(ceil_div(g.M, p.row_blocks), kernel->row_multiple);
  p.whole_a = p.block_rows * p.k_blocks * LDA * kernel->unit_bytes <= WHOLE_A_BYTES;
  i64 nr = kernel->panel_lanes;
  i64 others = g.batch * p.row_blocks;
  i64 wanted = ceil_div(g.threads * TASKS_PER_THREAD, others);
  p.chunk_cols = min(round_up(ceil_div(g.N, wanted), nr), MAX_COLS);
  p.col_chunks = ceil_div(g.N, p.chunk_cols);
  return p;
}

struct Gemm {
  const GemmArgs& g;
  const Plan& p;

  const char* a_at(i64 batch, i64 row, i64 k) const {
    return g.a + (batch * g.a_batch + row * g.a_row + k) * p.kernel->element_bytes;
  }
  const char* b_at(i64 batch, i64 col, i64 k) const {
    i64 at = g.b_layout == 0 ? k * g.b_row + col : col * g.b_row + k;
    return g.b + (batch * g.b_batch + at) * p.kernel->element_bytes;
  }
  i64 block_units(i64 block) const { return min(p.units - block * KC, KC); }
  i64 block_ks(i64 block) const {
    return max(0, min(g.K - block * KC * p.kernel->k_per_unit, KC * p.kernel->k_per_unit));
  }

  void pack_a(i64 batch, i64 row0, i64 rows, i64 block, char* out) const {
    p.kernel->pack_rows(a_at(batch, row0, block * KC * p.kernel->k_per_unit), g.a_row, rows, block_ks(block),
                        block_units(block), out);
  }
  void pack_b(i64 batch, i64 col, i64 block, char* out) const {
    p.kernel->pack_panel[g.b_layout](b_at(batch, col, block * KC * p.kernel->k_per_unit), g.b_row,
                                     min(g.N - col, p.kernel->panel_lanes), block_ks(block), block_units(block),
                                     out);
  }

  i64 a_block_bytes() const { return p.block_rows * LDA * p.kernel->unit_bytes; }
  i64 panel_bytes() const { return KC * p.kernel->panel_lanes * p.kernel->unit_bytes; }
  i64 c_panel_bytes() const { return p.block_rows * p.kernel->panel_lanes * p.kernel->unit_bytes; }

  // `packed_a`, if not null, holds all k blocks of all rows.
  Status run(i64 task, const char* packed_a) const {
    i64 chunk = task % p.col_chunks, row_block = task / p.col_chunks % p.row_blocks;
    i64 batch = task / (p.col_chunks * p.row_blocks);
    i64 row0 = row_block * p.block_rows, rows = min(g.M - row0, p.block_rows);
    i64 col0 = chunk * p.chunk_cols, cols = min(g.N - col0, p.chunk_cols);
    i64 nr = p.kernel->panel_lanes, panels = ceil_div(cols, nr);
    i64 a_blocks = packed_a != nullptr ? 0 : p.whole_a ? p.k_blocks : 1;
    i64 c_panels = p.whole_a ? 1 : panels;
    Scratch scratch(panel_bytes() + c_panels * c_panel_bytes() + a_blocks * a_block_bytes());
    if (scratch.data == nullptr) return OUT_OF_MEMORY;
    char* panel = scratch.as<char>();
    char* c = panel + panel_bytes();
    char* a = c + c_panels * c_panel_bytes();
    if (p.k_blocks == 0) __builtin_memset(c, 0, static_cast<size_t>(c_panels * c_panel_bytes()));

    if (p.kernel->begin != nullptr) p.kernel->begin();
    if (p.whole_a) {
      for (i64 k = 0; k < a_blocks; k++) pack_a(batch, row0, rows, k, a + k * a_block_bytes());
      const char* from = packed_a != nullptr ? packed_a : a;
      for (i64 j = 0; j < panels; j++) {
        for (i64 k = 0; k < p.k_blocks; k++) {
          pack_b(batch, col0 + j * nr, k, panel);
          p.kernel->multiply(from + k * a_block_bytes(), panel, block_units(k), rows, c, k == 0);
        }
        p.finish(g, c, p.block_rows, nr, batch, row0, rows, col0 + j * nr, min(cols - j * nr, nr));
      }
    } else {
      for (i64 k = 0; k < p.k_blocks; k++) {
        pack_a(batch, row0, rows, k, a);
        for (i64 j = 0; j < panels; j++) {
          pack_b(batch, col0 + j * nr, k, panel);
          p.kernel->multiply(a, panel, block_units(k), rows, c + j * c_panel_bytes(), k == 0);
        }
      }
      p.finish(g, c, p.block_rows, nr, batch, row0, rows, col0, cols);
    }
    if (p.kernel->end != nullptr) p.kernel->end();
    return OK;
  }

  Status run_all() const {
    i64 tasks = g.batch * p.row_blocks * p.col_chunks;
    bool share_a = p.whole_a && g.batch == 1 && p.row_blocks == 1 && p.col_chunks > 1 && p.k_blocks > 0;
    Scratch shared(share_a ? p.k_blocks * a_block_bytes() : 0);
    if (shared.data == nullptr) return OUT_OF_MEMORY;
    if (share_a) {
      for (i64 k = 0; k < p.k_blocks; k++) pack_a(0, 0, g.M, k, shared.as<char>() + k * a_block_bytes());
    }
    const char* packed_a = share_a ? shared.as<char>() : nullptr;
    i64 work = p.block_rows * p.chunk_cols * max(g.K, 1);
    i64 group = ceil_div(MIN_TASK_WORK, work);  // tiny matrices share a task
    return parallel_for(static_cast<int>(g.threads), ceil_div(tasks, group), [&](i64 first) -> Status {
      for (i64 task = first * group; task < min(tasks, (first + 1) * group); task++) {
        Status status = run(task, packed_a);
        if (status != OK) return status;
      }
      return OK;
    });
  }
};

// The order that bf16 GEMMs of this process use: the fastest that the CPU has.
Bf16Order bf16_order() {
  if (bf16_kernel(BF16_AMX) != nullptr) return BF16_AMX;
  return bf16_kernel(BF16_DOT) != nullptr ? BF16_DOT : BF16_SERIAL;
}

}  // namespace
}  // namespace bi

BI_EXPORT bi::i32 bi_bf16_order() { return bi::bf16_order(); }

// 1 if this CPU can run the order, else 0.
BI_EXPORT bi::i32 bi_bf16_order_supported(bi::i32 order) {
  return bi::bf16_kernel(static_cast<bi::Bf16Order>(order)) != nullptr;
}

BI_EXPORT bi::i32 bi_gemm(const bi::GemmArgs* args) {
  using namespace bi;
  GemmArgs g = *args;
  if (g.M < 0 || g.N < 0 || g.K < 0 || g.batch < 0 || (g.b_layout != 0 && g.b_layout != 1)) return BAD_ARGUMENT;
  if (finish_for(g.out_dtype) == nullptr) return BAD_DTYPE;
  bool widened = (g.dtype == BF16 || g.dtype == F16) && g.out_dtype == F32;
  if (g.out_dtype != g.dtype && !widened) return BAD_DTYPE;
  const GemmKernel* kernel =
      g.dtype == BF16 ? bf16_kernel(g.bf16_order < 0 ? bf16_order() : static_cast<Bf16Order>(g.bf16_order))
                      : fma_kernel(static_cast<DType>(g.dtype));
  if (kernel == nullptr) return g.dtype == BF16 ? BAD_ARGUMENT : BAD_DTYPE;
  if (g.M == 0 || g.N == 0 || g.batch == 0) return OK;
  if (g.beta == 0.0) g.addend = nullptr;
  Plan plan = make_plan(g, kernel);
  return Gemm{g, plan}.run_all();
}
