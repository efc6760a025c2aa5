// Turns a list of tiles into kernels and their host-side descriptions; see portable_*.cu.

#ifndef FXFUSE_CUDA_PORTABLE_INSTANCES_CUH_
#define FXFUSE_CUDA_PORTABLE_INSTANCES_CUH_

#include "math_device.cuh"
#include "portable_gemm.cuh"

namespace fxfuse {

template <class Config>
PortableKernel DescribePortable(const char* name, int32_t dtype, TileKind tile, MathLevel math) {
  using Tile = typename Config::Tile;
  return {name,
          reinterpret_cast<const void*>(&PortableGemm<Config>),
          dtype,
          Config::kPlanes == 2 ? int16_t{2} : int16_t{0},
          tile,
          math,
          Tile::kM,
          Tile::kN,
          Config::kThreads,
          Config::kSharedBytes};
}

// 16-byte stores: eight columns where outputs have 16 bits, four where one has 32.
template <class Input, class Tile>
using PortableFast = PortableConfig<Input, Tile, DeviceFastMath, 8>;
template <class Input, class Tile>
using PortableHalf = PortableConfig<Input, Tile, DeviceHalfMath, 8>;
template <class Input, class Tile>
using PortableExact = PortableConfig<Input, Tile, DeviceMath, 4>;
// fp32 matrices in two planes each.
template <class Tile>
using PortableHighest = PortableConfig<__half, Tile, DeviceMath, 4, 2>;

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_PORTABLE_INSTANCES_CUH_
