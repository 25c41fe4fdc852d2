// CUDA on a CPU, for tests. Blocks run one after another. The threads of a block are fibers that
// yield only where they synchronise. Each launch shuffles the order of blocks and threads, so a
// kernel that depends on the order fails.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__

using std::memcpy;

struct Dim { unsigned x = 1, y = 1, z = 1; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline Dim threadIdx, blockIdx, blockDim, gridDim;

template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }

namespace emulator {

constexpr size_t STACK = 1 << 16;
constexpr unsigned char POISON = 0xa5;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool done = false;
};

// A barrier. A round ends when all threads that have not returned have arrived.
struct Barrier {
  int running = 0;
  int arrived = 0;
  unsigned round = 0;
  uint64_t values[2][32];  // the lanes' values of the last two rounds

  void end_round_if_complete() {
    if (arrived > 0 && arrived >= running) {
      arrived = 0;
      ++round;
    }
  }
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Barrier> warps;
inline Barrier block;
inline std::function<void()> body;
inline std::vector<unsigned char> shared_bytes;
inline unsigned current;
inline bool progress;

inline void* shared_memory() { return shared_bytes.data(); }

inline void wait(Barrier& barrier) {
  const unsigned round = barrier.round;
  ++barrier.arrived;
  barrier.end_round_if_complete();
  progress = true;
  while (barrier.round == round) swapcontext(&fibers[current].context, &scheduler);
}

inline int lane() { return threadIdx.x % 32; }
inline Barrier& warp() { return warps[threadIdx.x / 32]; }

// Publish this lane's value and return the values of all lanes.
inline const uint64_t* exchange(uint64_t value) {
  Barrier& barrier = warp();
  uint64_t* values = barrier.values[barrier.round % 2];
  values[lane()] = value;
  wait(barrier);
  return values;
}

// Run one thread. A thread that returns no longer counts in the barriers.
inline void enter() {
  body();
  fibers[current].done = progress = true;
  --warp().running;
  --block.running;
  warp().end_round_if_complete();
  block.end_round_if_complete();
}

// Run one block; return false on deadlock.
inline bool run_block(std::vector<unsigned>& order, std::mt19937& generator) {
  const unsigned threads = blockDim.x;
  block = {static_cast<int>(threads)};
  warps.assign(threads / 32, Barrier{32});
  for (Fiber& fiber : fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  do {
    progress = false;
    std::shuffle(order.begin(), order.end(), generator);
    for (unsigned thread : order) {
      if (fibers[thread].done) continue;
      current = threadIdx.x = thread;
      swapcontext(&scheduler, &fibers[thread].context);
    }
  } while (progress);
  return block.running == 0;
}

// Run a kernel; return 0, 1 on deadlock, or 2 if it wrote past its shared memory.
inline int launch(
    unsigned x,
    unsigned y,
    unsigned threads,
    unsigned shared,
    unsigned seed,
    std::function<void()> kernel) {
  std::mt19937 generator(seed);
  body = std::move(kernel);
  gridDim = {x, y, 1};
  blockDim = {threads, 1, 1};
  fibers.resize(threads);
  std::vector<unsigned> order(threads), blocks(x * y);
  std::iota(order.begin(), order.end(), 0);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), generator);
  for (unsigned number : blocks) {
    blockIdx = {number % x, number / x, 0};
    shared_bytes.assign(shared + 4096, POISON);
    if (!run_block(order, generator)) return 1;
    for (size_t i = shared; i < shared_bytes.size(); ++i) {
      if (shared_bytes[i] != POISON) return 2;
    }
  }
  return 0;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}

template <class... A>
int run(
    void (*kernel)(A...),
    unsigned x,
    unsigned y,
    unsigned threads,
    unsigned shared,
    unsigned seed,
    void** arguments) {
  const auto call_kernel = [=] { call(kernel, arguments, std::index_sequence_for<A...>{}); };
  return launch(x, y, threads, shared, seed, call_kernel);
}

// Define the C function through which Python runs a kernel.
#define RUN(kernel)                                                             \
  extern "C" int run_##kernel(                                                  \
      unsigned x,                                                               \
      unsigned y,                                                               \
      unsigned threads,                                                         \
      unsigned shared,                                                          \
      unsigned seed,                                                            \
      void** arguments) {                                                       \
    return emulator::run(kernel, x, y, threads, shared, seed, arguments);       \
  }

// The PTX instructions of the kernels' asm statements.
inline void cvt_f32_f16(float& y, unsigned short bits) {
  _Float16 x;
  memcpy(&x, &bits, 2);
  y = x;
}
inline void cvt_rn_f16_f32(unsigned short& bits, float x) {
  const _Float16 y = static_cast<_Float16>(x);
  memcpy(&bits, &y, 2);
}
inline void cvt_rn_bf16_f32(unsigned short& bits, float x) {
  uint32_t wide;
  memcpy(&wide, &x, 4);
  bits = std::isnan(x) ? 0x7fff : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block); }
inline void __syncwarp() { emulator::wait(emulator::warp()); }

template <class To, class From> To __bits(From from) {
  To to{};
  memcpy(&to, &from, sizeof(From));
  return to;
}
inline float __uint_as_float(unsigned bits) { return __bits<float>(bits); }
inline unsigned __float_as_uint(float x) { return __bits<unsigned>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int atomicAdd(int* at, int by) { return std::exchange(*at, *at + by); }

template <class T> T __shfl_sync(unsigned, T value, int from) {
  return __bits<T>(emulator::exchange(__bits<uint64_t>(value))[from % 32]);
}
template <class T> T __shfl_xor_sync(unsigned, T value, int with) {
  return __bits<T>(emulator::exchange(__bits<uint64_t>(value))[emulator::lane() ^ with]);
}
template <class T> T __shfl_up_sync(unsigned, T value, int by) {
  const int from = emulator::lane() - by;
  return __bits<T>(emulator::exchange(__bits<uint64_t>(value))[from < 0 ? emulator::lane() : from]);
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const uint64_t* values = emulator::exchange(value);
  return static_cast<unsigned>(*std::max_element(values, values + 32));
}
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  const uint64_t* values = emulator::exchange(value);
  return static_cast<unsigned>(*std::min_element(values, values + 32));
}
inline unsigned __match_any_sync(unsigned, int value) {
  const uint64_t* values = emulator::exchange(static_cast<unsigned>(value));
  unsigned peers = 0;
  for (int i = 0; i < 32; ++i) peers |= (values[i] == static_cast<unsigned>(value)) << i;
  return peers;
}
