// The C interface of the fxfuse kernel libraries: plain structs in, a status out, nothing thrown.
//
// Both libraries (libfxfuse_cpu, libfxfuse_cuda) execute an epilogue program over a row-major
// matrix `acc [M, N]`:
//
//   acc       = A @ B^T (+ bias)        where the problem carries a GEMM (CUDA only), or
//   acc       = pointer[FXFUSE_PTR_A]   where it does not: a matrix some other GEMM left there
//   output[j] = program(acc, operands)  for every instruction that stores to output j
//
// A problem (shapes, strides, dtypes, the program) is described once and reused; the addresses
// travel separately, so that a repeated call writes nothing but pointers.

#ifndef FXFUSE_H_
#define FXFUSE_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define FXFUSE_API __declspec(dllexport)
#else
#define FXFUSE_API __attribute__((visibility("default")))
#endif

// Raised whenever a struct below or the meaning of a field changes.
#define FXFUSE_ABI_VERSION 5

#define FXFUSE_MAX_INSTRUCTIONS 48
#define FXFUSE_MAX_OPERANDS 8
#define FXFUSE_MAX_OUTPUTS 6
#define FXFUSE_MAX_SLOTS 6
#define FXFUSE_MAX_GROUP_WIDTH 1024  // columns of a group that an op adds up
#define FXFUSE_MAX_SPLITS 2
#define FXFUSE_MAX_FACTOR_COLUMNS 32768
#define FXFUSE_TILE_IN_TURNS 1024    // see fxfuse_problem.tile
#define FXFUSE_TILE_OF_64_ROWS 2048  // the same
#define FXFUSE_TILE_SHARES_A 4096    // the same
#define FXFUSE_TILE_SHARES_B 8192    // the same
#define FXFUSE_PLANE_ROWS 32         // rows of a plane are allocated in multiples of it

typedef enum {
  FXFUSE_OK = 0,
  FXFUSE_BAD_ARGUMENT = 1,  // a field is out of its range
  FXFUSE_UNSUPPORTED = 2,   // no kernel here serves this problem; nothing was launched
  FXFUSE_RUNTIME_ERROR = 3  // the CUDA runtime failed; see fxfuse_last_error
} fxfuse_status;

typedef enum {
  FXFUSE_F32 = 0,
  FXFUSE_F16 = 1,
  FXFUSE_BF16 = 2,
  FXFUSE_BOOL = 3,  // one byte, operands only; reads as 0.0 or 1.0
  // CUDA only, without GEMM only. A problem in which any tensor is F64 is computed in double
  // precision: values, immediates (immediate_f64) and sums.
  FXFUSE_F64 = 4
} fxfuse_dtype;

// Where an argument of an instruction comes from.
typedef enum {
  FXFUSE_FROM_PREVIOUS = 0,  // what the instruction before left (the accumulator, for the first)
  FXFUSE_FROM_SLOT = 1,      // slot[index]
  FXFUSE_FROM_OPERAND = 2,   // operand[index] at this element
  FXFUSE_FROM_IMMEDIATE = 3  // immediate[index]
} fxfuse_source;

// result = opcode(arguments; immediates). The result is what the next instruction sees as
// "previous"; it is kept in slot[save] and written to output[store] where those are not -1.
// An op with parameters finds them in `immediate`; an op without may use them as arguments. The
// first parameter of an op over groups of adjacent columns (normalize, ...) is a group's width, a
// divisor of N up to FXFUSE_MAX_GROUP_WIDTH.
typedef struct {
  uint16_t opcode;
  int8_t save;
  int8_t store;
  uint8_t source[3];  // fxfuse_source of each argument
  uint8_t index[3];
  uint8_t arity;
  uint8_t reserved;
  float immediate[2];
} fxfuse_instruction;

// An extra input. Element (m, n) of the operand is
//   data[((m / repeat) % period) * row_stride + n * column_stride]
// with strides in elements:
//   scalar   row_stride = 0, column_stride = 0    one value, read on the device
//   row      row_stride = 0, column_stride = 1    [N]
//   column   row_stride = 1, column_stride = 0    [M, 1]
//   full     row_stride = ld, column_stride = 1   [M, N]
// repeat = 1 and period = M are the plain case; [T, N] against [B, T, N] has period = T, and
// [B, 1, N] against it has repeat = T.
typedef struct {
  int64_t row_stride;
  int64_t column_stride;
  int64_t repeat;
  int64_t period;
  int32_t dtype;
  int32_t reserved;
} fxfuse_operand;

// Over what an output is summed.
typedef enum {
  FXFUSE_SUM_NONE = 0,
  FXFUSE_SUM_ROWS = 1,     // over all rows, to [N]
  FXFUSE_SUM_COLUMNS = 2,  // over all columns, to [M]
  FXFUSE_SUM_ALL = 3       // to one number
} fxfuse_sum;

// A stored matrix [M, N]; columns are adjacent, rows are row_stride elements apart.
// With a sum, without GEMM only: partial sums instead, F32 or, in a problem in double precision,
// F64, rows adjacent, each of one part of the matrix, which is divided into P parts from top to
// bottom and Q from left to right:
//   SUM_ROWS [P, N], SUM_COLUMNS [M, Q], SUM_ALL [P, Q]
// dtype is then what the total will be rounded to, which says how exact the terms must be.
// P and Q are what fxfuse_cpu_partials and fxfuse_cuda_partials say. The same problem has the same
// parts at each call, so that equal calls give equal bits.
typedef struct {
  int64_t row_stride;  // unused with a sum
  int32_t dtype;
  int32_t sum;  // fxfuse_sum
} fxfuse_output;

typedef struct {
  int32_t instruction_count;
  int32_t operand_count;
  int32_t output_count;
  int32_t slot_count;
  fxfuse_instruction instruction[FXFUSE_MAX_INSTRUCTIONS];
  fxfuse_operand operand[FXFUSE_MAX_OPERANDS];
  fxfuse_output output[FXFUSE_MAX_OUTPUTS];
  // What a problem in double precision takes in place of each instruction's `immediate`.
  double immediate_f64[FXFUSE_MAX_INSTRUCTIONS][2];
} fxfuse_program;

// Routes of the CUDA library. AUTO asks it to choose (never POINTWISE: that needs no GEMM; nor
// SKINNY: it takes F32 inputs as TF32).
typedef enum {
  FXFUSE_ROUTE_AUTO = 0,
  FXFUSE_ROUTE_POINTWISE = 1,  // the program alone, over a matrix already in memory
  FXFUSE_ROUTE_PORTABLE = 2,   // mma.sync + cp.async, sm_80 and up
  FXFUSE_ROUTE_HOPPER = 3,     // TMA + wgmma, sm_90a
  FXFUSE_ROUTE_SKINNY = 4      // F32 inputs, few rows of A, products in fp32; sm_80 and up
} fxfuse_route;

// One call. With has_gemm: A [M, K] and B [N, K], both with adjacent K (row strides lda, ldb in
// elements), of input_dtype, and bias [N] or none; products of F32 inputs are taken in TF32, but in
// fp32 by FXFUSE_ROUTE_SKINNY. With b_transposed B is [K, N] with adjacent N, and ldb the stride of
// a row of that. With planes A and B are that many F16 planes each, as fxfuse_cuda_split leaves
// them, and element (m, n) of their product is multiplied by (root_a[m] * root_b[n])^2 before the
// bias is added; with b_transposed, which only FXFUSE_ROUTE_HOPPER takes of planes, by root_a[m]^2,
// for the scales of B's rows are folded into A (see `factor` below). Of one plane, which only
// FXFUSE_ROUTE_HOPPER takes, the product is hi * hi^T. Of two it is hi * hi^T + hi * lo^T + lo *
// hi^T, added up in fp32 at least every 64 of K, but hi * hi^T alone where row m of A or row n of B
// is special; with b_transposed root_b and special_b are not read. Without has_gemm: A is the
// accumulator matrix [M, N] of input_dtype with row stride lda, K and B unused.
typedef struct {
  int64_t m, n, k;
  int64_t lda, ldb;
  int32_t input_dtype;
  int32_t has_gemm;
  int32_t has_bias;
  int32_t bias_dtype;
  int32_t b_transposed;
  int32_t planes;  // 0: A and B are not planes
  int32_t route;   // fxfuse_route
  // For measurements of the Hopper and skinny routes: 16 * the columns of a tile + the blocks that
  // divide K; 0 has the library choose. To the columns is added, on the Hopper route,
  // FXFUSE_TILE_IN_TURNS for a tile that warpgroups take in turns, FXFUSE_TILE_OF_64_ROWS for one
  // of 64 rows, and FXFUSE_TILE_SHARES_A or _B for pairs of blocks that share what they bring of A
  // or B.
  int32_t tile;
  fxfuse_program program;
} fxfuse_problem;

// Addresses of one call, in this order: A, B, bias, operands, outputs, and what fxfuse_cuda_split
// left beside the planes. Unused entries are null.
// An output may be the accumulator matrix itself or an operand [M, N] that no instruction reads
// after the store (same dtype and stride): what the thread that computes an element reads there is
// read before the element is written. Nothing else overlaps.
#define FXFUSE_PTR_A 0
#define FXFUSE_PTR_B 1
#define FXFUSE_PTR_BIAS 2
#define FXFUSE_PTR_OPERAND 3
#define FXFUSE_PTR_OUTPUT (FXFUSE_PTR_OPERAND + FXFUSE_MAX_OPERANDS)
#define FXFUSE_PTR_ROOT_A (FXFUSE_PTR_OUTPUT + FXFUSE_MAX_OUTPUTS)
#define FXFUSE_PTR_ROOT_B (FXFUSE_PTR_ROOT_A + 1)
#define FXFUSE_PTR_SPECIAL_A (FXFUSE_PTR_ROOT_B + 1)
#define FXFUSE_PTR_SPECIAL_B (FXFUSE_PTR_SPECIAL_A + 1)
#define FXFUSE_PTR_COUNT (FXFUSE_PTR_SPECIAL_B + 1)

// The ABI version the library was built with.
FXFUSE_API int fxfuse_abi_version(void);
// sizeof(fxfuse_problem), so that a caller can check its own layout.
FXFUSE_API int64_t fxfuse_problem_size(void);
// How the library was built: compiler, instruction sets or GPU architectures.
FXFUSE_API const char* fxfuse_build_info(void);
// Number of opcodes, and the name of each (null outside the range).
FXFUSE_API int fxfuse_opcode_count(void);
FXFUSE_API const char* fxfuse_opcode_name(int opcode);
// What the last failed call on this thread had to say.
FXFUSE_API const char* fxfuse_last_error(void);

// libfxfuse_cpu -----------------------------------------------------------------------------------

// Runs `fn(data)` on `threads` threads at once and returns when all are done (GOMP_parallel's
// signature). Given torch's own OpenMP entry, the library shares torch's thread pool.
typedef void (*fxfuse_parallel)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);
FXFUSE_API void fxfuse_cpu_set_parallel(fxfuse_parallel parallel);
// The instruction set in use: "avx512", "avx2" or "baseline".
FXFUSE_API const char* fxfuse_cpu_isa(void);
// Forces an instruction set, for tests; FXFUSE_UNSUPPORTED where this CPU lacks it.
FXFUSE_API fxfuse_status fxfuse_cpu_set_isa(const char* name);
// Runs a problem without GEMM on at most `threads` threads.
FXFUSE_API fxfuse_status fxfuse_cpu_run(const fxfuse_problem* problem, void* const* pointers,
                                        int threads);

// The parts (see fxfuse_output) into which fxfuse_cpu_run divides a problem with sums.
FXFUSE_API fxfuse_status fxfuse_cpu_partials(const fxfuse_problem* problem, int64_t* p, int64_t* q);

// libfxfuse_cuda ----------------------------------------------------------------------------------

// Prepares the current device (loads kernels, raises shared-memory limits), so that later calls
// may be captured in a CUDA graph. FXFUSE_UNSUPPORTED below sm_80.
FXFUSE_API fxfuse_status fxfuse_cuda_init(void);
// The route and tile fxfuse_cuda_run takes for this problem on the current device.
FXFUSE_API fxfuse_status fxfuse_cuda_choose(const fxfuse_problem* problem, int32_t* route,
                                            const char** kernel);
// Enqueues a problem on `stream` (a cudaStream_t) of the current device.
FXFUSE_API fxfuse_status fxfuse_cuda_run(const fxfuse_problem* problem, void* const* pointers,
                                         void* stream);

// The parts (see fxfuse_output) into which fxfuse_cuda_run divides a problem with sums on the
// current device.
FXFUSE_API fxfuse_status fxfuse_cuda_partials(const fxfuse_problem* problem, int64_t* p,
                                              int64_t* q);

// Enqueues the last step of sums over rows on `stream` (a cudaStream_t) of the current device: adds
// up the `parts` rows of each of `count` matrices [parts, n] of fp32, one behind the other, in the
// same order at each call, and stores `sums` [count, n] of `dtype` (F32, F16 or BF16).
FXFUSE_API fxfuse_status fxfuse_cuda_add_parts(const float* source, int64_t count, int64_t parts,
                                               int64_t n, void* sums, int32_t dtype, void* stream);

// An fp32 matrix S [rows, k] and where its fp16 planes go. Element (r, c) of S is
//   source[r * row_stride + c * column_stride] * factor[c]^2
// with strides in elements, one of them 1. With m the largest finite magnitude of row r and e the
// even number for which m * 2^-e is in [2^13, 2^15) (0 for a row of zeros):
//   root[r]     = 2^(e/2), negative where row r is special and column_stride is 1
//   hi[r, c]    = fp16(S[r, c] * 2^-e), but the smallest fp16 number of its sign for an element
//                 other than 0 that would become 0
//   lo[r, c]    = fp16(S[r, c] * 2^-e - hi[r, c]), 0 where S[r, c] is not finite; with planes = 2
//   special[r]  = 1 where row r holds an infinity or a NaN, else 0
// so that S = (hi + lo) * root * root, but for 2^-23 of an element or 2^-38 of its row's largest,
// whichever is more. Infinities and NaNs stay what they are in hi. Where either row of a product is
// special, only hi * hi gives its infinities and NaNs: lo has any sign, and is 0 where hi is not.
typedef struct {
  int64_t rows, k;
  int64_t row_stride, column_stride;
  int64_t plane_stride;  // a multiple of 8, k or more; columns from k on become 0
  int32_t planes;        // 1: hi alone; 2: hi and lo
  int32_t reserved;
  const float* source;
  // fp16 [planes, R, plane_stride], at a multiple of 16 bytes, with R = rows rounded up to a
  // multiple of FXFUSE_PLANE_ROWS; rows from `rows` on are left as they are, but may be read.
  void* plane;
  float* root;       // [rows], at a multiple of 16 bytes
  int32_t* special;  // [rows], or null
  // Null, or the root [k] of a matrix [k, N] that this one is to be multiplied by, at a multiple of
  // 16 bytes: where it is negative, all rows of this one are special. It wants column_stride 1 and
  // rows of up to FXFUSE_MAX_FACTOR_COLUMNS.
  const float* factor;
} fxfuse_split;

// Enqueues the splitting of 1 to FXFUSE_MAX_SPLITS matrices on `stream` (a cudaStream_t) of the
// current device: one launch for all those of column_stride 1, and one for the others of up to 4096
// columns.
FXFUSE_API fxfuse_status fxfuse_cuda_split(const fxfuse_split* matrices, int count, void* stream);

#ifdef __cplusplus
}
#endif

#endif  // FXFUSE_H_
