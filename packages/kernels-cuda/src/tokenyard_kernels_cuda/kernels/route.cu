// The top-k router after its logits: scores, selection and weights in one launch, and the gradient of the weights.
//
// A warp for a token; each lane holds every 32nd expert, LANE_EXPERTS of them, so that experts <= 32 * LANE_EXPERTS.
#include "warp.cuh"

constexpr int SOFTMAX = 0, SIGMOID = 1, SOFTMAX_OF_SELECTED = 2;
constexpr float LEAST = 1.17549435e-38f;  // the least normal float: what a norm is at least

// The rule, as all kernels here take it. `power` is the p of the norm, 0 for none.
struct Scores {
  float at[LANE_EXPERTS];  // of this lane's experts: 0 past the last one
  float highest, total;    // of the softmax
};

// What is not a number stays so; fmaxf would make LEAST of it.
__device__ inline float at_least(float norm) { return norm < LEAST ? LEAST : norm; }

__device__ inline bool is_expert(int id, int experts) { return id >= 0 && id < experts; }

__device__ inline int expert_at(int j) { return j * WARP + lane_id(); }

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ inline Scores scores_of(const float* logits, int experts, int score) {
  Scores own;
  own.highest = minus_infinity();
  own.total = 0.0f;
#pragma unroll
  for (int j = 0; j < LANE_EXPERTS; ++j) {
    own.at[j] = expert_at(j) < experts ? logits[expert_at(j)] : minus_infinity();
    own.highest = fmaxf(own.highest, own.at[j]);
  }
  own.highest = warp_max(own.highest);
  if (score == SOFTMAX_OF_SELECTED) return own;
#pragma unroll
  for (int j = 0; j < LANE_EXPERTS; ++j) {
    const bool there = expert_at(j) < experts;
    own.at[j] = !there ? 0.0f : score == SIGMOID ? sigmoid(own.at[j]) : expf(own.at[j] - own.highest);
    own.total += own.at[j];
  }
  own.total = warp_sum(own.total);
  if (score == SOFTMAX) {
#pragma unroll
    for (int j = 0; j < LANE_EXPERTS; ++j) own.at[j] /= own.total;
  }
  return own;
}

// The lowest expert of those whose rank is the highest; every lane gets it.
__device__ inline int best_expert(const unsigned (&rank)[LANE_EXPERTS], unsigned* highest) {
  unsigned own = 0;
#pragma unroll
  for (int j = 0; j < LANE_EXPERTS; ++j) own = max(own, rank[j]);
  *highest = __reduce_max_sync(ALL, own);
  unsigned lowest = ALL;
#pragma unroll
  for (int j = LANE_EXPERTS - 1; j >= 0; --j) {
    if (rank[j] == *highest) lowest = expert_at(j);
  }
  return static_cast<int>(__reduce_min_sync(ALL, lowest));
}

__device__ inline void take(unsigned (&rank)[LANE_EXPERTS], int expert) {
#pragma unroll
  for (int j = 0; j < LANE_EXPERTS; ++j) {
    if (expert_at(j) == expert) rank[j] = 0;
  }
}

// Set the ranks to 0 of all experts that are not in the best groups; `worth` [groups] is scratch.
__device__ inline void keep_groups(unsigned (&rank)[LANE_EXPERTS], unsigned* worth, int experts, int groups, int kept,
                                   bool by_two) {
  const int size = experts / groups;
  unsigned own[LANE_EXPERTS], highest, second;
  for (int g = 0; g < groups; ++g) {
#pragma unroll
    for (int j = 0; j < LANE_EXPERTS; ++j) own[j] = expert_at(j) / size == g ? rank[j] : 0;
    const int best = best_expert(own, &highest);
    float value = from_order(highest);
    if (by_two) {
      take(own, best);
      best_expert(own, &second);
      value += from_order(second);
    }
    if (lane_id() == 0) worth[g] = in_order(value);
  }
  __syncwarp();
  for (int i = 0; i < kept; ++i) {  // a group that was taken is worth 0
    unsigned most = 0, lowest = ALL;
    for (int g = lane_id(); g < groups; g += WARP) most = max(most, worth[g]);
    highest = __reduce_max_sync(ALL, most);
    for (int g = lane_id(); g < groups && lowest == ALL; g += WARP) {
      if (worth[g] == highest) lowest = g;
    }
    const unsigned taken = __reduce_min_sync(ALL, lowest);
    __syncwarp();
    if (lane_id() == 0) worth[taken] = 0;
    __syncwarp();
  }
#pragma unroll
  for (int j = 0; j < LANE_EXPERTS; ++j) {
    if (expert_at(j) < experts && worth[expert_at(j) / size] != 0) rank[j] = 0;
  }
}

// own [top_k]: the scores of the chosen experts before they are normalised, 0 of those dropped.
__device__ inline void score_chosen(const float* logits, const int* chosen, float* own, const Scores& all, int experts,
                                    int top_k, int score) {
  float highest = minus_infinity(), total = 0.0f;
  for (int k = lane_id(); k < top_k; k += WARP) {
    const bool kept = is_expert(chosen[k], experts);
    const float logit = kept ? logits[chosen[k]] : minus_infinity();
    highest = fmaxf(highest, logit);
    if (score != SOFTMAX_OF_SELECTED) {
      own[k] = !kept ? 0.0f : score == SIGMOID ? sigmoid(logit) : expf(logit - all.highest) / all.total;
    }
  }
  if (score == SOFTMAX_OF_SELECTED) {
    highest = warp_max(highest);
    for (int k = lane_id(); k < top_k; k += WARP) {
      own[k] = is_expert(chosen[k], experts) ? expf(logits[chosen[k]] - highest) : 0.0f;
      total += own[k];
    }
    total = warp_sum(total);
    for (int k = lane_id(); k < top_k; k += WARP) own[k] /= at_least(total);
  }
  __syncwarp();
}

__device__ inline float sum_of(const float* own, int top_k) {
  float sum = 0.0f;
  for (int k = lane_id(); k < top_k; k += WARP) sum += own[k];
  return warp_sum(sum);
}

// The highest is taken out first: powers may underflow.
__device__ inline float norm_of(const float* own, int top_k, float power) {
  if (power == 1.0f) return at_least(sum_of(own, top_k));
  float highest = 0.0f, sum = 0.0f;
  for (int k = lane_id(); k < top_k; k += WARP) highest = fmaxf(highest, own[k]);
  highest = at_least(warp_max(highest));
  for (int k = lane_id(); k < top_k; k += WARP) {
    const float part = own[k] / highest;
    sum += power == 2.0f ? part * part : powf(part, power);
  }
  sum = warp_sum(sum);
  return at_least(highest * (power == 2.0f ? sqrtf(sum) : powf(sum, 1.0f / power)));
}

// ids and weights [tokens, top_k]. If `given` [tokens, top_k] is not null, those ids are only weighted.
extern "C" __global__ void route(
    const float* __restrict__ logits, const float* __restrict__ bias, const int* __restrict__ given,
    int* __restrict__ ids, float* __restrict__ weights, int tokens, int experts, int top_k, int score, float power,
    float scale, int groups, int groups_kept, int by_two) {
  extern __shared__ unsigned shared[];
  const long long token = static_cast<long long>(blockIdx.x) * (blockDim.x / WARP) + warp_id();
  if (token >= tokens) return;
  unsigned* worth = shared + warp_id() * (groups + 2 * top_k);
  int* chosen = reinterpret_cast<int*>(worth + groups);  // [top_k]
  float* own = reinterpret_cast<float*>(chosen + top_k);  // [top_k]
  logits += token * experts;
  const Scores scores = scores_of(logits, experts, score);
  if (given) {
    for (int k = lane_id(); k < top_k; k += WARP) chosen[k] = given[token * top_k + k];
  } else {
    unsigned rank[LANE_EXPERTS], highest;
#pragma unroll
    for (int j = 0; j < LANE_EXPERTS; ++j) {
      const int e = expert_at(j);
      rank[j] = e < experts ? in_order(bias ? scores.at[j] + bias[e] : scores.at[j]) : 0;
    }
    if (groups_kept < groups) keep_groups(rank, worth, experts, groups, groups_kept, by_two);
    for (int k = 0; k < top_k; ++k) {
      const int best = best_expert(rank, &highest);
      take(rank, best);
      if (lane_id() == 0) chosen[k] = best;
    }
  }
  __syncwarp();
  score_chosen(logits, chosen, own, scores, experts, top_k, score);
  const float divisor = power > 0.0f ? norm_of(own, top_k, power) : 1.0f;
  for (int k = lane_id(); k < top_k; k += WARP) {
    if (ids) ids[token * top_k + k] = chosen[k];
    weights[token * top_k + k] = own[k] / divisor * scale;
  }
}

// given [top_k]: the gradients of the scores before they were normalised, from those of the weights.
__device__ inline void through_norm(float* given, const float* own, int top_k, float power) {
  const float norm = norm_of(own, top_k, power);
  float along = 0.0f;
  for (int k = lane_id(); k < top_k; k += WARP) along += given[k] * (own[k] / norm);
  along = warp_sum(along);
  for (int k = lane_id(); k < top_k; k += WARP) {
    const float share = own[k] / norm;
    const float direction = power == 1.0f ? 1.0f : power == 2.0f ? share : share > 0.0f ? powf(share, power - 1.0f) : 0.0f;
    given[k] = (given[k] - along * direction) / norm;
  }
}

// dlogits [tokens, experts] from dweights [tokens, top_k].
extern "C" __global__ void route_backward(
    const float* __restrict__ dweights, const float* __restrict__ logits, const int* __restrict__ ids,
    float* __restrict__ dlogits, int tokens, int experts, int top_k, int score, float power, float scale) {
  extern __shared__ unsigned shared[];
  const long long token = static_cast<long long>(blockIdx.x) * (blockDim.x / WARP) + warp_id();
  if (token >= tokens) return;
  int* chosen = reinterpret_cast<int*>(shared + warp_id() * 3 * top_k);  // [top_k]
  float* own = reinterpret_cast<float*>(chosen + top_k);                 // [top_k]
  float* given = own + top_k;                                            // [top_k]
  logits += token * experts;
  for (int k = lane_id(); k < top_k; k += WARP) {
    chosen[k] = ids[token * top_k + k];
    given[k] = dweights[token * top_k + k] * scale;
  }
  __syncwarp();
  const Scores scores = scores_of(logits, experts, score);
  score_chosen(logits, chosen, own, scores, experts, top_k, score);
  if (power > 0.0f) through_norm(given, own, top_k, power);
  float mean = 0.0f;
  for (int k = lane_id(); k < top_k; k += WARP) {
    if (!is_expert(chosen[k], experts)) given[k] = 0.0f;
    mean += given[k] * own[k];
  }
  mean = warp_sum(mean);
  for (int k = lane_id(); k < top_k; k += WARP) {
    if (score == SOFTMAX_OF_SELECTED) given[k] = own[k] * (given[k] - mean);
    if (score == SIGMOID) given[k] *= own[k] * (1.0f - own[k]);
  }
  __syncwarp();
  float spread[LANE_EXPERTS] = {};
  for (int k = 0; k < top_k; ++k) {
#pragma unroll
    for (int j = 0; j < LANE_EXPERTS; ++j) {
      if (expert_at(j) == chosen[k]) spread[j] += given[k];
    }
  }
#pragma unroll
  for (int j = 0; j < LANE_EXPERTS; ++j) {
    const float gradient = score == SOFTMAX ? scores.at[j] * (spread[j] - mean) : spread[j];
    if (expert_at(j) < experts) dlogits[token * experts + expert_at(j)] = gradient;
  }
}
