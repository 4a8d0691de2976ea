// csrc/cuda/decode.cuh without torch: `check` runs it for compute-sanitizer, `time` prints what a
// node of a graph and a barrier of the grid take, as JSON.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/cuda/decode.cuh"

#define CHECK(call) vps::succeed(call, #call)

__global__ void nothing() {}
__global__ void barriers(int count) {
  for (int i = 0; i < count; ++i) cooperative_groups::this_grid().sync();
}

template <class V>
V* on_device(const std::vector<V>& values) {
  V* copy;
  CHECK(cudaMalloc(&copy, values.size() * sizeof(V)));
  CHECK(cudaMemcpy(copy, values.data(), values.size() * sizeof(V), cudaMemcpyHostToDevice));
  return copy;
}
template <class V>
V* poisoned(size_t count) {
  V* memory;
  CHECK(cudaMalloc(&memory, count * sizeof(V)));
  CHECK(cudaMemset(memory, 0xFF, count * sizeof(V)));
  return memory;
}

/// Decodes twice; says whether all is finite and equal to the bit.
bool check(int d_in, int d_out, int r) {
  std::mt19937 random(d_in + d_out);
  std::normal_distribution<float> normal;
  std::vector<float> x(d_in), weight(static_cast<size_t>(d_in) * d_out), bias(d_out);
  for (auto* values : {&x, &weight, &bias})
    for (float& value : *values) value = normal(random);
  const double ranks = r;
  const std::vector<double> policy = {1, 0.3, 0.8, ranks, ranks, ranks, ranks, 1, 1};
  const std::vector<double> entropy = {0.7, 1.3};
  vps::Decode p{};
  p.x = on_device(x);
  p.weight = on_device(weight);
  p.bias = on_device(bias);
  p.policy = reinterpret_cast<const vps::Policy*>(on_device(policy));
  p.entropy = on_device(entropy);
  p.row_stride = p.d_in = d_in;
  p.d_out = d_out;
  p.r = r;
  p.inverse_width = 1.0 / d_out;
  p.adaptive = true;
  p.tau = 0.8f;
  p.clamp = -1;
  const void* const kernel = reinterpret_cast<const void*>(vps::decode_kernel<float>);
  const vps::Plan plan = vps::plan(kernel, 0, d_in, d_out, r);
  p.rows_per_block = plan.rows_per_block;
  p.features = poisoned<int64_t>(2 * r);
  p.core = poisoned<float>(r * r);
  p.gamma = poisoned<float>(1);
  std::vector<float> y[2] = {std::vector<float>(d_out), std::vector<float>(d_out)};
  for (auto& found : y) {
    p.records = poisoned<vps::Record>(static_cast<size_t>(plan.blocks) * r);
    p.sums = poisoned<float>(static_cast<size_t>(plan.blocks) * (1 + r));
    p.y = poisoned<float>(d_out);
    void* arguments[] = {&p};
    CHECK(cudaLaunchCooperativeKernel(kernel, dim3(plan.blocks), dim3(vps::kThreads), arguments,
                                      plan.bytes, nullptr));
    CHECK(cudaMemcpy(found.data(), p.y, d_out * sizeof(float), cudaMemcpyDeviceToHost));
  }
  bool good = std::memcmp(y[0].data(), y[1].data(), d_out * sizeof(float)) == 0;
  for (const float value : y[0]) good = good && std::isfinite(value);
  std::printf("%d to %d, r = %d, %d blocks: %s\n", d_in, d_out, r, plan.blocks,
              good ? "good" : "BAD");
  return good;
}

/// Microseconds of what `enqueue` puts on a stream.
template <class Enqueue>
float microseconds(cudaStream_t stream, Enqueue enqueue) {
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  float best = 1e30f;
  for (int i = 0; i < 20; ++i) {
    float elapsed;
    CHECK(cudaEventRecord(start, stream));
    enqueue();
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaEventElapsedTime(&elapsed, start, end));
    best = std::min(best, 1e3f * elapsed);
  }
  return best;
}

/// Microseconds of an empty node in a graph, launched early (PDL) or not.
float node(cudaStream_t stream, bool early) {
  float found[2];
  for (const int at : {0, 1}) {
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < 1 + 200 * at; ++i) {
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(1);
      config.blockDim = dim3(32);
      config.stream = stream;
      config.attrs = &attribute;
      config.numAttrs = early;
      CHECK(cudaLaunchKernelEx(&config, nothing));
    }
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&replay, graph, 0));
    found[at] = microseconds(stream, [&] { CHECK(cudaGraphLaunch(replay, stream)); });
  }
  return (found[1] - found[0]) / 200;
}

float barrier(cudaStream_t stream, int blocks) {
  float found[2];
  for (int count : {0, 100})
    found[count > 0] = microseconds(stream, [&] {
      void* arguments[] = {&count};
      CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(barriers), dim3(blocks),
                                        dim3(vps::kThreads), arguments, 0, stream));
    });
  return (found[1] - found[0]) / 100;
}

int main(int, char** arguments) {
  if (arguments[1] && std::strcmp(arguments[1], "check") == 0) {
    bool good = true;
    for (const auto& [d_in, d_out, r] : {std::tuple(256, 300, 4), {577, 33, 1}, {1024, 2048, 8}})
      good = check(d_in, d_out, r) && good;
    return !good;
  }
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  const int processors = vps::attribute(cudaDevAttrMultiProcessorCount, 0);
  std::printf("{\"node us\": %.3f, \"node us, PDL\": %.3f, ", node(stream, false),
              node(stream, true));
  std::printf("\"barrier us, a block a processor\": %.3f, \"barrier us, two\": %.3f}\n",
              barrier(stream, processors), barrier(stream, 2 * processors));
}
