// C = alpha * A B + beta * addend for one matrix or a batch: the schedule and the last rounding.
//
// The bits of an element of C are those of its own chain over k (gemm.h names the orders), or, in
// fp32, of one chain for each chunk of k, the chains being added in ascending order; then, in the
// accumulator's precision, alpha * that if alpha != 1, then fma(beta, addend, that) if there is an
// addend, then one rounding to the dtype of C. Every NaN is written as the one quiet NaN
// without sign or payload: which of two NaNs an FMA keeps is up to the compiler. Nothing here
// depends on M, N, the batch, the strides or the threads except the order in which independent
// elements are computed.
#include "gemm.h"

#include "parallel.h"

namespace bi {
namespace {

// What Python passes, packed by the format string in cpu/matmul.py. Strides are in elements.
struct GemmArgs {
  i64 dtype, out_dtype;
  i64 M, N, K, batch;
  i64 chunk;  // k of one chain, a multiple of KC; 0 is one chain over all of K
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

// C, unlike what Python passes, may have any column stride: see with_few_rows.
struct Problem : GemmArgs {
  i64 c_col = 1;
};

template <class T>
struct Lanes {
  using Vector = f32x16;
  BI_INLINE f32x16 read(const T* p, i64 n) { return load_f32(p, n); }
  BI_INLINE void write(T* p, f32x16 v, i64 n) { store_f32(p, v, n); }
  BI_INLINE f32x16 one_nan(f32x16 v) { return v == v ? v : splat(__builtin_nanf("")); }
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
  BI_INLINE f64x8 one_nan(f64x8 v) { return v == v ? v : splat(__builtin_nan("")); }
};

// Rounds accumulators [panels][rows_of_a_panel][nr] into rows of C.
template <class T, class Acc>
void finish(const Problem& g, const void* accumulators, i64 rows_of_a_panel, i64 nr, i64 batch,
            i64 row0, i64 rows, i64 col0, i64 cols) {
  using Vector = typename Lanes<T>::Vector;
  constexpr i64 LANES = sizeof(Vector) / sizeof(Acc);
  const Acc* acc = static_cast<const Acc*>(accumulators);
  const Vector alpha = splat(static_cast<Acc>(g.alpha)), beta = splat(static_cast<Acc>(g.beta));
  const bool scaled = g.alpha != 1.0;
  const T* addend = reinterpret_cast<const T*>(g.addend);
  if (addend != nullptr)
    addend += batch * g.addend_batch + row0 * g.addend_row + col0 * g.addend_col;
  T* c = reinterpret_cast<T*>(g.c) + batch * g.c_batch + row0 * g.c_row + col0 * g.c_col;
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
      x = Lanes<T>::one_nan(x);
      if (g.c_col == 1) {
        Lanes<T>::write(c + j, x, left);
      } else {
        T some[LANES];
        Lanes<T>::write(some, x, LANES);
        for (i64 l = 0; l < min(left, LANES); l++) c[(j + l) * g.c_col] = some[l];
      }
    }
  }
}

using Finish = void (*)(const Problem&, const void*, i64, i64, i64, i64, i64, i64, i64);

Finish finish_for(i64 out_dtype) {
  switch (out_dtype) {
    case F32:
      return finish<float, float>;
    case F64:
      return finish<double, double>;
    case BF16:
      return finish<bf16, float>;
    case F16:
      return finish<f16, float>;
  }
  return nullptr;
}

constexpr i64 MAX_ROWS = 384;  // rows of a task: with KC they fill about half of a 1 MiB L2 cache
constexpr i64 MAX_COLS = 256;
constexpr i64 SWEEP_COLS = 1024;
constexpr i64 WHOLE_A_BYTES = 1 << 20;
constexpr i64 TASKS_PER_THREAD = 8;  // enough that a slow thread does not hold up the others
constexpr i64 SWEEPS_PER_THREAD = 2;
constexpr i64 MIN_TASK_WORK = 1 << 18;  // multiply-adds that are worth handing to another thread;
constexpr i64 ROWS_OF_LOADING = 6;  // reading a column of B costs as much as so many rows of them

// How the work is cut. A task is a block of rows times a chunk of columns of one matrix.
struct Plan {
  const GemmKernel* kernel;
  Finish finish;
  i64 units;                  // packed units of K
  i64 k_blocks, block_units;  // cut into blocks of at most KC, nearly equal or, in chunks, of KC
  i64 chunk_blocks;           // blocks of a chunk, all of them if there is one chain
  i64 row_blocks, block_rows;
  i64 col_chunks, chunk_cols;
  bool whole_a;       // all k blocks of a task's rows are packed at once
  bool sweep;         // B is read as [K, N] in place
  bool panels_first;  // a panel of C is finished before the next is begun
};

Plan make_plan(const Problem& g, const GemmKernel* kernel) {
  Plan p{};
  p.kernel = kernel;
  p.finish = finish_for(g.out_dtype);
  p.units = round_up(ceil_div(g.K, kernel->k_per_unit), kernel->unit_multiple);
  const bool chunked = g.chunk > 0 && g.chunk < g.K;
  p.block_units =
      chunked ? KC : round_up(ceil_div(p.units, max(ceil_div(p.units, KC), 1)), STREAM_UNITS);
  p.k_blocks = p.units == 0 ? 0 : ceil_div(p.units, p.block_units);
  p.chunk_blocks = chunked ? g.chunk / KC : p.k_blocks;
  p.row_blocks = ceil_div(g.M, MAX_ROWS);
  p.block_rows = round_up(ceil_div(g.M, p.row_blocks), kernel->row_multiple);
  p.whole_a = p.block_rows * p.k_blocks * LDA * kernel->unit_bytes <= WHOLE_A_BYTES;
  p.sweep = g.b_layout == 0 && g.M <= kernel->sweep_rows;
  p.panels_first = p.whole_a && !p.sweep;
  i64 wanted = ceil_div(g.threads * (p.sweep ? SWEEPS_PER_THREAD : TASKS_PER_THREAD),
                        g.batch * p.row_blocks);
  p.chunk_cols =
      min(round_up(ceil_div(g.N, wanted), kernel->panel_lanes), p.sweep ? SWEEP_COLS : MAX_COLS);
  p.col_chunks = ceil_div(g.N, p.chunk_cols);
  return p;
}

struct Gemm {
  const Problem& g;
  const Plan& p;
  const GemmKernel& kernel;

  // Sizes and places of packed blocks.
  bool begins(i64 block) const { return block % p.chunk_blocks == 0; }  // a chain, from +0
  bool chunked() const { return p.chunk_blocks < p.k_blocks; }
  i64 block_units(i64 block) const { return min(p.units - block * p.block_units, p.block_units); }
  i64 block_start(i64 block) const { return block * p.block_units * kernel.k_per_unit; }
  i64 block_ks(i64 block) const {
    return max(0, min(g.K - block_start(block), p.block_units * kernel.k_per_unit));
  }
  i64 a_block_bytes() const { return p.block_rows * LDA * kernel.unit_bytes; }
  i64 panel_bytes() const { return KC * kernel.panel_lanes * kernel.unit_bytes; }
  i64 c_panel_elements() const { return p.block_rows * kernel.panel_lanes; }
  i64 c_panel_bytes() const { return c_panel_elements() * kernel.unit_bytes; }

  const char* b_at(i64 batch, i64 col, i64 k) const {
    i64 at = g.b_layout == 0 ? k * g.b_row + col : col * g.b_row + k;
    return g.b + (batch * g.b_batch + at) * kernel.element_bytes;
  }

  void pack_a(i64 batch, i64 row0, i64 rows, i64 block, char* out) const {
    i64 k = block_start(block);
    const char* a = g.a + (batch * g.a_batch + row0 * g.a_row + k) * kernel.element_bytes;
    kernel.pack_rows(a, g.a_row, rows, block_ks(block), block_units(block), out);
  }

  // Adds what `block` gives to one panel of C, as [K, N] from its unit `from` on.
  void multiply_panel(const char* a, i64 batch, i64 col, i64 block, i64 from, i64 rows, char* panel,
                      char* c) const {
    i64 units = block_units(block), ks = block_ks(block), k0 = block_start(block);
    i64 cols = min(g.N - col, kernel.panel_lanes);
    if (g.b_layout == 1) {
      multiply_nk(kernel, a, b_at(batch, col, k0), g.b_row, cols, ks, units, rows, panel, c,
                  begins(block));
    } else if (from < units) {
      i64 skipped = from * kernel.k_per_unit;
      kernel.pack_panel[0](b_at(batch, col, k0 + skipped), g.b_row, cols, ks - skipped,
                           units - from, panel);
      kernel.multiply(a + from * kernel.unit_bytes, panel, units - from, rows, c,
                      begins(block) && from == 0);
    }
  }

  // After the last block of a chunk but the first: adds its chains in `c` to those in `sum`.
  void end_block(i64 block, const char* c, char* sum, i64 bytes) const {
    if (c == sum || (!begins(block + 1) && block + 1 < p.k_blocks)) return;
    const float* from = reinterpret_cast<const float*>(c);
    float* to = reinterpret_cast<float*>(sum);
    for (i64 i = 0; i < bytes / 4; i += 16)
      store(to + i, load<f32x16>(to + i) + load<f32x16>(from + i));
  }

  // `packed_a`, if not null, holds all k blocks of all rows.
  Status run(i64 task, const char* packed_a) const {
    i64 chunk = task % p.col_chunks, row_block = task / p.col_chunks % p.row_blocks;
    i64 batch = task / (p.col_chunks * p.row_blocks);
    i64 row0 = row_block * p.block_rows, rows = min(g.M - row0, p.block_rows);
    i64 col0 = chunk * p.chunk_cols, cols = min(g.N - col0, p.chunk_cols);
    i64 nr = kernel.panel_lanes, panels = ceil_div(cols, nr);
    i64 a_blocks = packed_a != nullptr ? 0 : p.whole_a ? p.k_blocks : 1;
    i64 c_panels = p.panels_first ? 1 : panels;
    const i64 c_bytes = c_panels * c_panel_bytes();
    Scratch scratch(panel_bytes() + (chunked() ? 2 : 1) * c_bytes + a_blocks * a_block_bytes());
    if (scratch.data == nullptr) return OUT_OF_MEMORY;
    char* panel = scratch.as<char>();
    char* sum = panel + panel_bytes();
    char* later = chunked() ? sum + c_bytes : sum;  // where chunks but the first are computed
    char* own_a = later + c_bytes;
    if (p.k_blocks == 0) __builtin_memset(sum, 0, static_cast<size_t>(c_bytes));
    if (p.whole_a) {
      for (i64 k = 0; k < a_blocks; k++) pack_a(batch, row0, rows, k, own_a + k * a_block_bytes());
    }
    const char* whole_a = packed_a != nullptr ? packed_a : own_a;

    if (kernel.begin != nullptr) kernel.begin();
    if (p.panels_first) {
      for (i64 j = 0; j < panels; j++) {
        i64 col = col0 + j * nr;
        for (i64 k = 0; k < p.k_blocks; k++) {
          char* c = k < p.chunk_blocks ? sum : later;
          multiply_panel(whole_a + k * a_block_bytes(), batch, col, k, 0, rows, panel, c);
          end_block(k, c, sum, rows * nr * kernel.unit_bytes);
        }
        p.finish(g, sum, p.block_rows, nr, batch, row0, rows, col, min(cols - j * nr, nr));
      }
    } else {
      for (i64 k = 0; k < p.k_blocks; k++) {
        const char* a = p.whole_a ? whole_a + k * a_block_bytes() : own_a;
        char* c = k < p.chunk_blocks ? sum : later;
        if (!p.whole_a) pack_a(batch, row0, rows, k, own_a);
        i64 swept_panels = p.sweep ? cols / nr : 0, swept_units = block_ks(k) / kernel.k_per_unit;
        if (swept_panels > 0) {
          kernel.sweep(a, b_at(batch, col0, block_start(k)), g.b_row, swept_panels, swept_units,
                       rows, c, c_panel_elements(), begins(k));
        }
        for (i64 j = 0; j < panels; j++) {
          multiply_panel(a, batch, col0 + j * nr, k, j < swept_panels ? swept_units : 0, rows,
                         panel, c + j * c_panel_bytes());
        }
        end_block(k, c, sum, c_bytes);
      }
      p.finish(g, sum, p.block_rows, nr, batch, row0, rows, col0, cols);
    }
    if (kernel.end != nullptr) kernel.end();
    return OK;
  }

  Status run_all() const {
    i64 tasks = g.batch * p.row_blocks * p.col_chunks;
    bool share_a =
        p.whole_a && g.batch == 1 && p.row_blocks == 1 && p.col_chunks > 1 && p.k_blocks > 0;
    Scratch shared(share_a ? p.k_blocks * a_block_bytes() : 0);
    if (shared.data == nullptr) return OUT_OF_MEMORY;
    if (share_a) {
      for (i64 k = 0; k < p.k_blocks; k++)
        pack_a(0, 0, g.M, k, shared.as<char>() + k * a_block_bytes());
    }
    const char* packed_a = share_a ? shared.as<char>() : nullptr;
    i64 work = (p.block_rows + ROWS_OF_LOADING) * p.chunk_cols * max(g.K, 1);
    i64 group = ceil_div(MIN_TASK_WORK, work);  // tiny matrices share a task
    return parallel_for(
        static_cast<int>(g.threads), ceil_div(tasks, group), [&](i64 first) -> Status {
          for (i64 task = first * group; task < min(tasks, (first + 1) * group); task++) {
            Status status = run(task, packed_a);
            if (status != OK) return status;
          }
          return OK;
        });
  }
};

// A product with few columns and many rows is computed as its transpose, whose few rows take the
// paths that read the larger operand in place. a * b = b * a, so every chain keeps its bits.
void with_few_rows(Problem& g, const GemmKernel& kernel) {
  if (g.N == 1 && g.b_layout == 0 && g.b_row == 1) g.b_layout = 1;
  if (g.b_layout != 1 || g.N > kernel.stream_rows || g.M <= g.N) return;
  Problem t = g;
  t.M = g.N, t.N = g.M;
  t.a = g.b, t.a_row = g.b_row, t.a_batch = g.b_batch;
  t.b = g.a, t.b_row = g.a_row, t.b_batch = g.a_batch;
  t.addend_row = g.addend_col, t.addend_col = g.addend_row;
  t.c_row = g.c_col, t.c_col = g.c_row;
  g = t;
}

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
  Problem g{*args};
  if (g.M < 0 || g.N < 0 || g.K < 0 || g.batch < 0 || (g.b_layout != 0 && g.b_layout != 1))
    return BAD_ARGUMENT;
  if (g.chunk < 0 || g.chunk % KC != 0 || (g.chunk > 0 && g.dtype != F32)) return BAD_ARGUMENT;
  if (finish_for(g.out_dtype) == nullptr) return BAD_DTYPE;
  bool widened = (g.dtype == BF16 || g.dtype == F16) && g.out_dtype == F32;
  if (g.out_dtype != g.dtype && !widened) return BAD_DTYPE;
  const GemmKernel* kernel =
      g.dtype == BF16
          ? bf16_kernel(g.bf16_order < 0 ? bf16_order() : static_cast<Bf16Order>(g.bf16_order))
          : fma_kernel(static_cast<DType>(g.dtype));
  if (kernel == nullptr) return g.dtype == BF16 ? BAD_ARGUMENT : BAD_DTYPE;
  if (g.M == 0 || g.N == 0 || g.batch == 0) return OK;
  if (g.beta == 0.0) g.addend = nullptr;
  with_few_rows(g, *kernel);
  Plan plan = make_plan(g, kernel);
  return Gemm{g, plan, *kernel}.run_all();
}
