// Fills one stage of the ring with 128 bytes of K of the block's rows of A and of B.
//
// A stage is kM rows of A, then kN rows of B, 128 bytes each. Chunk c (16 bytes) of row r lies at
// c ^ (r % 8): eight rows of one chunk, which is what ldmatrix reads at a time, then touch all 32
// banks, and so do the eight chunks of one row that eight lanes write. Rows beyond M or N and
// columns beyond K are filled with zeros. Of two planes a row has the high one in chunks 0 to 3 and
// the low one, of the same 64 bytes of K, in chunks 4 to 7.

#ifndef FXFUSE_CUDA_PORTABLE_LOADER_CUH_
#define FXFUSE_CUDA_PORTABLE_LOADER_CUH_

#include <type_traits>

#include "portable_kernels.h"
#include "portable_tiles.h"
#include "ptx.cuh"

namespace fxfuse {

// 16-byte copies; rows of A and B and K itself are multiples of 16 bytes. What a copy needs is an
// offset from the tile's first row, kept in a register, and a base that is the same for all threads
// of a plane and moves along K: next to no arithmetic stands between the multiplications.
template <class Config>
class AlignedLoader {
 public:
  __device__ __forceinline__ AlignedLoader(const PortableArguments& arguments, int row0,
                                           int column0) {
    const int row = threadIdx.x / kPerRow;
    const uint32_t place = threadIdx.x % kPerRow * kBytes;  // in the stage's row
    const uint32_t column = place % Config::kPlaneBytes;    // in bytes of K
    const uint32_t pitch_a = static_cast<uint32_t>(arguments.lda) * kElementBytes;
    const uint32_t pitch_b = static_cast<uint32_t>(arguments.ldb) * kElementBytes;
    left_ = arguments.k * kElementBytes - static_cast<int>(column);
    a_ = static_cast<const char*>(arguments.a) + row0 * (arguments.lda * kElementBytes);
    b_ = static_cast<const char*>(arguments.b) + column0 * (arguments.ldb * kElementBytes);
    if (Config::kPlanes == 2 && place >= Config::kPlaneBytes) {
      a_ += arguments.plane_bytes_a;
      b_ += arguments.plane_bytes_b;
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int down = row + (i < kCopiesA ? i : i - kCopiesA) * kRowStep;
      offset_[i] = down * (i < kCopiesA ? pitch_a : pitch_b) + column;
      const bool exists = i < kCopiesA ? row0 + down < arguments.m : column0 + down < arguments.n;
      inside_ |= (exists ? 1u : 0u) << i;
    }
    to_ = row * kStageRowBytes + ((place / 16) ^ (row % 8)) * 16;
  }

  // Issues part `part` of `parts` of the copies that fill the stage at `stage`. With constant
  // arguments the choice costs nothing.
  __device__ __forceinline__ void LoadPart(uint32_t stage, int part, int parts) const {
    const uint32_t inside = left_ > 0 ? inside_ : 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (i * parts / kCopies != part) continue;
      const int down = (i < kCopiesA ? i : i - kCopiesA) * kRowStep;
      const uint32_t flip = down % 8 * 16;  // 0 or 64
      copy_async_16(
          stage + (i < kCopiesA ? 0 : Config::kStageBytesA) + (to_ ^ flip) + down * kStageRowBytes,
          (i < kCopiesA ? a_ : b_) + offset_[i], inside & 1u << i);
    }
  }

  __device__ __forceinline__ void NextStage() {
    a_ += Config::kPlaneBytes;
    b_ += Config::kPlaneBytes;
    left_ -= Config::kPlaneBytes;
  }

 private:
  static constexpr int kBytes = 16;
  static constexpr int kElementBytes = sizeof(typename Config::Input);
  static constexpr int kPerRow = kStageRowBytes / kBytes;
  static constexpr int kRowStep = Config::kThreads / kPerRow;
  static constexpr int kCopiesA = Config::Tile::kM / kRowStep;
  static constexpr int kCopiesB = Config::Tile::kN / kRowStep;
  static constexpr int kCopies = kCopiesA + kCopiesB;
  static_assert(Config::Tile::kM % kRowStep == 0 && Config::Tile::kN % kRowStep == 0,
                "threads divide the tile's rows evenly");
  static_assert(kRowStep % 4 == 0, "the swizzle of later rows differs in bit 2 of r % 8 at most");
  static_assert(kCopies <= 32, "one bit each in `inside_`");
  static_assert(Config::Tile::kM <= kMaxTileRows && Config::Tile::kN <= kMaxTileRows,
                "offsets have 32 bits");

  const char* a_;
  const char* b_;
  uint32_t offset_[kCopies];
  uint32_t to_;
  uint32_t inside_ = 0;  // bit i: the row of copy i exists
  int left_;             // bytes of K from this thread's column on
};

// 4-byte copies; each thread has its column of the stage and every so many rows. Nothing is assumed
// beyond the alignment of an element.
template <class Config>
class RaggedLoader {
 public:
  __device__ __forceinline__ RaggedLoader(const PortableArguments& arguments, int row0,
                                          int column0) {
    const int row = threadIdx.x / kPerRow;
    const int column = threadIdx.x % kPerRow * kBytes;  // in bytes of K
    left_ = arguments.k * kElementBytes - column;
    step_a_ = arguments.lda * (kRowStep * kElementBytes);
    step_b_ = arguments.ldb * (kRowStep * kElementBytes);
    a_ = static_cast<const char*>(arguments.a) + (row0 + row) * arguments.lda * kElementBytes +
         column;
    b_ = static_cast<const char*>(arguments.b) + (column0 + row) * arguments.ldb * kElementBytes +
         column;
    offset_ = row * kStageRowBytes + ((column / 16) ^ (row % 8)) * 16 + column % 16;
    whole_words_ = arguments.whole_words;
#pragma unroll
    for (int i = 0; i < kCopiesA; ++i) {
      inside_ |= (row0 + row + i * kRowStep < arguments.m ? 1u : 0u) << i;
    }
#pragma unroll
    for (int i = 0; i < kCopiesB; ++i) {
      inside_ |= (column0 + row + i * kRowStep < arguments.n ? 1u : 0u) << (kCopiesA + i);
    }
  }

  // Issues part `part` of `parts` of the copies that fill the stage at `stage`. With constant
  // arguments the choice costs nothing.
  __device__ __forceinline__ void LoadPart(uint32_t stage, int part, int parts) const {
    const int valid = max(0, min(left_, kBytes));
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (i * parts / kCopies != part) continue;
      const int row = i < kCopiesA ? i : i - kCopiesA;
      const char* from = i < kCopiesA ? a_ + row * step_a_ : b_ + row * step_b_;
      const int bytes = (inside_ >> i & 1u) != 0 ? valid : 0;
      Copy(stage + (i < kCopiesA ? 0 : Config::kStageBytesA) + Offset(row), from, bytes);
    }
  }

  __device__ __forceinline__ void NextStage() {
    a_ += kStageRowBytes;
    b_ += kStageRowBytes;
    left_ -= kStageRowBytes;
  }

 private:
  static constexpr int kBytes = 4;
  static constexpr int kElementBytes = sizeof(typename Config::Input);
  static constexpr int kPerRow = kStageRowBytes / kBytes;
  static constexpr int kRowStep = Config::kThreads / kPerRow;
  static constexpr int kCopiesA = Config::Tile::kM / kRowStep;
  static constexpr int kCopiesB = Config::Tile::kN / kRowStep;
  static constexpr int kCopies = kCopiesA + kCopiesB;
  static_assert(Config::Tile::kM % kRowStep == 0 && Config::Tile::kN % kRowStep == 0,
                "threads divide the tile's rows evenly");
  static_assert(kRowStep % 4 == 0, "the swizzle of later rows differs in bit 2 of r % 8 at most");
  static_assert(kCopies <= 32, "one bit each in `inside_`");

  // Where copy `i` of an operand goes, relative to the operand's rows.
  __device__ __forceinline__ uint32_t Offset(int i) const {
    const uint32_t flip = i * kRowStep % 8 * 16;  // 0 or 64
    return (offset_ ^ flip) + i * kRowStep * kStageRowBytes;
  }

  __device__ __forceinline__ void Copy(uint32_t to, const char* from, int bytes) const {
    if (kElementBytes == 4 || whole_words_) {
      copy_async_4(to, from, bytes);
    } else {
      uint32_t word = 0;
      if (bytes >= 2) word = *reinterpret_cast<const uint16_t*>(from);
      if (bytes >= 4) word |= uint32_t{*reinterpret_cast<const uint16_t*>(from + 2)} << 16;
      store_shared_32(to, word);
    }
  }

  const char* a_;
  const char* b_;
  int64_t step_a_, step_b_;
  uint32_t offset_;
  uint32_t inside_ = 0;  // bit i: the row of copy i exists
  int left_;             // bytes of K from this thread's column on
  bool whole_words_;
};

template <class Config>
using StageLoader =
    std::conditional_t<Config::Tile::kAligned, AlignedLoader<Config>, RaggedLoader<Config>>;

// A block's way through the stages of its tile. All threads of the block call all of it.
template <class Config>
class StageRing {
 public:
  // Asks for all stages but one and waits for the first.
  __device__ __forceinline__ StageRing(const PortableArguments& arguments, int row0, int column0,
                                       uint32_t ring)
      : loader_(arguments, row0, column0),
        ring_(ring),
        read_(ring),
        write_(ring + (kStages - 1) * Config::kStageBytes) {
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      loader_.LoadPart(ring + s * Config::kStageBytes, 0, 1);
      loader_.NextStage();
      copy_async_commit();
    }
    copy_async_wait<kStages - 2>();
    __syncthreads();
  }

  // The stage that is there.
  __device__ __forceinline__ uint32_t read() const { return read_; }

  // Asks for part `part` of `parts` of the stage after those under way. It goes where the stage
  // before this one was, which every warp has left since the last Advance().
  __device__ __forceinline__ void Load(int part, int parts) const {
    loader_.LoadPart(write_, part, parts);
  }

  // Goes on to the next stage: this warp has read all of this one, and called Load for all parts.
  __device__ __forceinline__ void Advance() {
    loader_.NextStage();
    copy_async_commit();
    copy_async_wait<kStages - 2>();
    __syncthreads();
    write_ = read_;
    read_ += Config::kStageBytes;
    if (read_ == ring_ + Config::kRingBytes) read_ = ring_;
  }

  // Leaves the ring's memory to other uses.
  __device__ __forceinline__ void Leave() const {
    copy_async_wait<0>();
    __syncthreads();
  }

 private:
  static constexpr int kStages = Config::Tile::kStages;

  StageLoader<Config> loader_;
  uint32_t ring_, read_, write_;
};

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_PORTABLE_LOADER_CUH_
