// Runs decode_kernel on standard input and writes what it made to standard output; see
// tests/backends/test_csrc_cuda_emulated.py for the layout of both.
#include "decode.cuh"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

struct Header {
  int32_t element_size, bfloat16, blocks, rows_per_block, d_in, d_out, r, adaptive;
  int32_t bias, I_in, I_out, entropy, columns, counted, seed;
  float tau, clamp;
};

std::byte* next;

template <class V>
V* take(int64_t count, int64_t size = sizeof(V)) {
  V* block = reinterpret_cast<V*>(next);
  next += (count * size + 63) / 64 * 64;
  return block;
}

template <class V>
V* read(bool given, int64_t count, int64_t size = sizeof(V)) {
  if (!given) return nullptr;
  V* block = take<V>(count, size);
  if (std::fread(block, size, count, stdin) != static_cast<size_t>(count)) std::abort();
  return block;
}

template <class T>
void run_block(const vps::Decode& p, int block, int blocks) {
  blockIdx.x = block;
  gridDim.x = blocks;
  emulated_shared = static_cast<float*>(std::malloc(vps::shared_bytes(p.d_in, p.rows_per_block, p.r)));
  for (auto& barrier : warp_barriers) barrier = new std::barrier<>(32);
  std::vector<std::thread> threads;
  for (int i = 0; i < kEmulatedThreads; ++i)
    threads.emplace_back([&p, i] {
      threadIdx.x = i;
      vps::decode_kernel<T>(p);
    });
  for (auto& thread : threads) thread.join();
}

int main() {
  Header h;
  if (std::fread(&h, sizeof(h), 1, stdin) != 1) return 2;
  constexpr int64_t kBytes = 1 << 26;
  next = static_cast<std::byte*>(
      mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  std::memset(next, 0xFF, kBytes);  // NaN wherever nothing was written
  const int64_t size = h.element_size, r = h.r, blocks = h.blocks;
  vps::Decode p{};
  p.x = read<std::byte>(true, h.d_in, size);
  p.weight = read<std::byte>(true, static_cast<int64_t>(h.d_out) * h.d_in, size);
  p.bias = read<std::byte>(h.bias, h.d_out, size);
  p.I_in = read<int64_t>(h.I_in, r);
  p.I_out = read<int64_t>(h.I_out, r);
  p.policy = read<vps::Policy>(true, 1);
  p.entropy = read<double>(h.entropy, 2);
  p.columns = read<double>(h.columns, r);
  p.counted = read<bool>(h.counted, 1);
  p.y = take<std::byte>(h.d_out, size);
  p.features = take<int64_t>(2 * r);
  p.core = take<float>(r * r);
  p.gamma = take<float>(1);
  p.t = take<std::byte>(r, size);
  p.records = take<vps::Record>(blocks * r);
  p.sums = take<float>(blocks * (1 + r));
  p.row_stride = h.d_in;
  p.d_in = h.d_in;
  p.d_out = h.d_out;
  p.rows_per_block = h.rows_per_block;
  p.r = h.r;
  p.inverse_width = 1.0 / h.d_out;
  p.adaptive = h.adaptive;
  p.tau = h.tau;
  p.clamp = h.clamp;

  grid_barrier = take<pthread_barrier_t>(1);
  pthread_barrierattr_t shared;
  pthread_barrierattr_init(&shared);
  pthread_barrierattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
  pthread_barrier_init(grid_barrier, &shared, blocks * kEmulatedThreads);
  std::vector<int> order(h.blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(h.seed));
  for (const int block : order)
    if (fork() == 0) {
      usleep((block * 7919 + h.seed) % 5000);
      if (size == 4)
        run_block<float>(p, block, h.blocks);
      else if (h.bfloat16)
        run_block<__nv_bfloat16>(p, block, h.blocks);
      else
        run_block<__half>(p, block, h.blocks);
      _exit(0);
    }
  int status;
  while (wait(&status) > 0)
    if (status != 0) return 3;
  std::fwrite(p.y, size, h.d_out, stdout);
  std::fwrite(p.features, sizeof(int64_t), 2 * r, stdout);
  std::fwrite(p.core, sizeof(float), r * r, stdout);
  std::fwrite(p.gamma, sizeof(float), 1, stdout);
  std::fwrite(p.t, size, r, stdout);
  return 0;
}
