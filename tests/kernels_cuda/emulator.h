// CUDA on a CPU, for tests: blocks one after another, the threads of a block as fibers that give way to each other only
// where they wait. In which order both run is drawn anew at each launch, so that what depends on it comes out wrong.
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

// Threads that wait for each other; a round ends when all that are left have come.
struct Gathering {
  int left = 0, came = 0;
  unsigned round = 0;
  uint64_t values[2][32];

  void end_if_all_came() {
    if (came > 0 && came >= left) {
      came = 0;
      ++round;
    }
  }
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Gathering> warps;
inline Gathering block;
inline std::function<void()> body;
inline std::vector<unsigned char> shared_bytes;
inline unsigned current;
inline bool progress;

inline void* shared_memory() { return shared_bytes.data(); }

inline void wait(Gathering& gathering) {
  const unsigned round = gathering.round;
  ++gathering.came;
  gathering.end_if_all_came();
  progress = true;
  while (gathering.round == round) swapcontext(&fibers[current].context, &scheduler);
}

inline int lane() { return threadIdx.x % 32; }
inline Gathering& warp() { return warps[threadIdx.x / 32]; }

// Give a value, and get those of all lanes.
inline const uint64_t* exchange(uint64_t value) {
  Gathering& own = warp();
  uint64_t* values = own.values[own.round % 2];
  values[lane()] = value;
  wait(own);
  return values;
}

inline void enter() {
  body();
  fibers[current].done = progress = true;
  --warp().left;
  --block.left;
  warp().end_if_all_came();
  block.end_if_all_came();
}

// Run one block; false if its threads wait for each other in vain.
inline bool run_block(std::vector<unsigned>& order, std::mt19937& draw) {
  const unsigned threads = blockDim.x;
  block = {static_cast<int>(threads)};
  warps.assign(threads / 32, Gathering{32});
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
    std::shuffle(order.begin(), order.end(), draw);
    for (unsigned thread : order) {
      if (fibers[thread].done) continue;
      current = threadIdx.x = thread;
      swapcontext(&scheduler, &fibers[thread].context);
    }
  } while (progress);
  return block.left == 0;
}

// Return 0, 1 if threads wait in vain, 2 if more shared memory was written than was asked for.
inline int launch(unsigned x, unsigned y, unsigned threads, unsigned shared, unsigned seed, std::function<void()> kernel) {
  std::mt19937 draw(seed);
  body = std::move(kernel);
  gridDim = {x, y, 1};
  blockDim = {threads, 1, 1};
  fibers.resize(threads);
  std::vector<unsigned> order(threads), blocks(x * y);
  std::iota(order.begin(), order.end(), 0);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), draw);
  for (unsigned number : blocks) {
    blockIdx = {number % x, number / x, 0};
    shared_bytes.assign(shared + 4096, POISON);
    if (!run_block(order, draw)) return 1;
    for (size_t i = shared; i < shared_bytes.size(); ++i) {
      if (shared_bytes[i] != POISON) return 2;
    }
  }
  return 0;
}

template <class... A, size_t... I> void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}

template <class... A>
int run(void (*kernel)(A...), unsigned x, unsigned y, unsigned threads, unsigned shared, unsigned seed, void** arguments) {
  return launch(x, y, threads, shared, seed, [=] { call(kernel, arguments, std::index_sequence_for<A...>{}); });
}

// Let Python start a kernel.
#define RUN(kernel)                                                                                                    \
  extern "C" int run_##kernel(unsigned x, unsigned y, unsigned threads, unsigned shared, unsigned seed, void** all) {  \
    return emulator::run(kernel, x, y, threads, shared, seed, all);                                                    \
  }

// What the compiler's asm statements do.
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
