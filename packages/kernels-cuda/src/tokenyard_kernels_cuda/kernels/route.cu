// The top-k router after its logits: scores, selection and weights in one launch, and the gradient
// of the weights in another.
//
// Macro: LANE_EXPERTS is the number of experts per lane.
//
// Shapes: T tokens, K experts per token, E experts. One warp per token. Lane l holds experts l,
// l + 32, l + 64, ..., so E <= 32 * LANE_EXPERTS.
//
// All kernels take the routing rule as numbers: `score` is SOFTMAX, SIGMOID or SOFTMAX_OF_SELECTED;
// `power` is the p of the norm that divides the weights (0: no division); `scale` multiplies them.
#include "warp.cuh"

constexpr int SOFTMAX = 0;
constexpr int SIGMOID = 1;
constexpr int SOFTMAX_OF_SELECTED = 2;
constexpr float MIN_NORMAL = 1.17549435e-38f;  // the smallest normal float: a lower bound of norms

// Scores of one token. With SOFTMAX_OF_SELECTED they are still logits, and `total` is 0.
struct Scores {
  float at[LANE_EXPERTS];  // of this lane's experts: 0 past the last one
  float highest;           // the highest logit of the token
  float total;             // the sum before the softmax divides by it
};

// Return max(norm, MIN_NORMAL), but keep NaN, which fmaxf would replace.
__device__ inline float at_least_normal(float norm) {
  return norm < MIN_NORMAL ? MIN_NORMAL : norm;
}

__device__ inline bool is_expert(int id, int experts) { return id >= 0 && id < experts; }

// Return the j-th expert of this lane.
__device__ inline int expert_at(int j) { return j * WARP + lane_id(); }

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Return the sigmoid or the softmax of one logit.
__device__ inline float score_of(float logit, const Scores& scores, int score) {
  return score == SIGMOID ? sigmoid(logit) : expf(logit - scores.highest) / scores.total;
}

// Return the scores of all experts from logits [E] of one token.
__device__ inline Scores score_experts(const float* logits, int experts, int score) {
  Scores scores;
  scores.highest = minus_infinity();
  scores.total = 0.0f;

  // Load the logits; reduce their maximum.
#pragma unroll
  for (int j = 0; j < LANE_EXPERTS; ++j) {
    scores.at[j] = expert_at(j) < experts ? logits[expert_at(j)] : minus_infinity();
    scores.highest = fmaxf(scores.highest, scores.at[j]);
  }
  scores.highest = warp_max(scores.highest);
  if (score == SOFTMAX_OF_SELECTED) return scores;

  // Score each expert; reduce the sum.
#pragma unroll
  for (int j = 0; j < LANE_EXPERTS; ++j) {
    const float logit = scores.at[j];
    float value = 0.0f;
    if (expert_at(j) < experts) {
      value = score == SIGMOID ? sigmoid(logit) : expf(logit - scores.highest);
    }
    scores.at[j] = value;
    scores.total += value;
  }
  scores.total = warp_sum(scores.total);
  if (score == SOFTMAX) {
#pragma unroll
    for (int j = 0; j < LANE_EXPERTS; ++j) scores.at[j] /= scores.total;
  }
  return scores;
}

// Return to every lane the expert of the highest key; the lowest expert among equal keys.
__device__ inline int best_expert(const unsigned (&keys)[LANE_EXPERTS], unsigned* highest) {
  unsigned lane_highest = 0;
#pragma unroll
  for (int j = 0; j < LANE_EXPERTS; ++j) lane_highest = max(lane_highest, keys[j]);
  *highest = __reduce_max_sync(ALL, lane_highest);
  unsigned lowest = ALL;
#pragma unroll
  for (int j = LANE_EXPERTS - 1; j >= 0; --j) {
    if (keys[j] == *highest) lowest = expert_at(j);
  }
  return static_cast<int>(__reduce_min_sync(ALL, lowest));
}

// Set the key of an expert to 0, so that it is not selected again.
__device__ inline void remove_expert(unsigned (&keys)[LANE_EXPERTS], int expert) {
#pragma unroll
  for (int j = 0; j < LANE_EXPERTS; ++j) {
    if (expert_at(j) == expert) keys[j] = 0;
  }
}

// Set to 0 the keys of all experts outside the `kept` best groups.
__device__ inline void keep_groups(
    unsigned (&keys)[LANE_EXPERTS],
    unsigned* group_keys,  // [groups], shared scratch
    int experts,
    int groups,
    int kept,
    bool by_two) {
  const int size = experts / groups;
  unsigned members[LANE_EXPERTS];
  unsigned highest;
  unsigned second;

  // Phase 1: score each group by its best expert, or by the sum of its best two.
  for (int g = 0; g < groups; ++g) {
#pragma unroll
    for (int j = 0; j < LANE_EXPERTS; ++j) members[j] = expert_at(j) / size == g ? keys[j] : 0;
    const int best = best_expert(members, &highest);
    float value = from_sort_key(highest);
    if (by_two) {
      remove_expert(members, best);
      best_expert(members, &second);
      value += from_sort_key(second);
    }
    if (lane_id() == 0) group_keys[g] = sort_key(value);
  }
  __syncwarp();

  // Phase 2: select the best group `kept` times. A selected group gets key 0.
  for (int i = 0; i < kept; ++i) {
    unsigned lane_highest = 0;
    unsigned lowest = ALL;
    for (int g = lane_id(); g < groups; g += WARP) lane_highest = max(lane_highest, group_keys[g]);
    highest = __reduce_max_sync(ALL, lane_highest);
    for (int g = lane_id(); g < groups && lowest == ALL; g += WARP) {
      if (group_keys[g] == highest) lowest = g;
    }
    const unsigned best_group = __reduce_min_sync(ALL, lowest);
    __syncwarp();
    if (lane_id() == 0) group_keys[best_group] = 0;
    __syncwarp();
  }

  // Phase 3: a group that still has a key was not selected.
#pragma unroll
  for (int j = 0; j < LANE_EXPERTS; ++j) {
    if (expert_at(j) < experts && group_keys[expert_at(j) / size] != 0) keys[j] = 0;
  }
}

// Write the scores of the selected experts before normalisation; 0 for a dropped id.
__device__ inline void score_selected(
    const float* logits,      // [E]
    const int* selected_ids,  // [K], shared
    float* selected,          // [K], shared, output
    const Scores& scores,
    int experts,
    int top_k,
    int score) {
  float highest = minus_infinity();
  float total = 0.0f;
  for (int k = lane_id(); k < top_k; k += WARP) {
    const bool valid = is_expert(selected_ids[k], experts);
    const float logit = valid ? logits[selected_ids[k]] : minus_infinity();
    highest = fmaxf(highest, logit);
    if (score != SOFTMAX_OF_SELECTED) {
      selected[k] = valid ? score_of(logit, scores, score) : 0.0f;
    }
  }
  // A softmax over the selected logits only.
  if (score == SOFTMAX_OF_SELECTED) {
    highest = warp_max(highest);
    for (int k = lane_id(); k < top_k; k += WARP) {
      const bool valid = is_expert(selected_ids[k], experts);
      selected[k] = valid ? expf(logits[selected_ids[k]] - highest) : 0.0f;
      total += selected[k];
    }
    total = warp_sum(total);
    for (int k = lane_id(); k < top_k; k += WARP) selected[k] /= at_least_normal(total);
  }
  __syncwarp();
}

// Return the sum of selected [K].
__device__ inline float sum_of(const float* selected, int top_k) {
  float sum = 0.0f;
  for (int k = lane_id(); k < top_k; k += WARP) sum += selected[k];
  return warp_sum(sum);
}

// Return the p-norm of selected [K]. The highest score is factored out, since powers may underflow.
__device__ inline float norm_of(const float* selected, int top_k, float power) {
  if (power == 1.0f) return at_least_normal(sum_of(selected, top_k));
  float highest = 0.0f;
  float sum = 0.0f;
  for (int k = lane_id(); k < top_k; k += WARP) highest = fmaxf(highest, selected[k]);
  highest = at_least_normal(warp_max(highest));
  for (int k = lane_id(); k < top_k; k += WARP) {
    const float share = selected[k] / highest;
    sum += power == 2.0f ? share * share : powf(share, power);
  }
  sum = warp_sum(sum);
  return at_least_normal(highest * (power == 2.0f ? sqrtf(sum) : powf(sum, 1.0f / power)));
}

// Select K experts per token and write their weights. If `fixed_ids` is not null, skip the
// selection and write the weights of those ids.
//
// Shared memory: groups + 2 * K words per warp.
extern "C" __global__ void route(
    const float* __restrict__ logits,   // [T, E]
    const float* __restrict__ bias,     // [E] or null: added to scores for selection only
    const int* __restrict__ fixed_ids,  // [T, K] or null
    int* __restrict__ ids,              // [T, K] or null
    float* __restrict__ weights,        // [T, K]
    int tokens,
    int experts,
    int top_k,
    int score,
    float power,
    float scale,
    int groups,
    int groups_kept,
    int by_two) {
  wait_for_launch_before();
  extern __shared__ unsigned shared[];
  const long long token = static_cast<long long>(blockIdx.x) * (blockDim.x / WARP) + warp_id();
  if (token >= tokens) return;
  unsigned* group_keys = shared + warp_id() * (groups + 2 * top_k);   // [groups]
  int* selected_ids = reinterpret_cast<int*>(group_keys + groups);    // [K]
  float* selected = reinterpret_cast<float*>(selected_ids + top_k);   // [K]

  // Phase 1: score all experts.
  logits += token * experts;
  const Scores scores = score_experts(logits, experts, score);

  // Phase 2: select the K highest keys, one after another.
  if (fixed_ids) {
    for (int k = lane_id(); k < top_k; k += WARP) selected_ids[k] = fixed_ids[token * top_k + k];
  } else {
    unsigned keys[LANE_EXPERTS];
    unsigned highest;
#pragma unroll
    for (int j = 0; j < LANE_EXPERTS; ++j) {
      const int e = expert_at(j);
      keys[j] = e < experts ? sort_key(bias ? scores.at[j] + bias[e] : scores.at[j]) : 0;
    }
    if (groups_kept < groups) keep_groups(keys, group_keys, experts, groups, groups_kept, by_two);
    for (int k = 0; k < top_k; ++k) {
      const int best = best_expert(keys, &highest);
      remove_expert(keys, best);
      if (lane_id() == 0) selected_ids[k] = best;
    }
  }
  __syncwarp();

  // Epilogue: normalise and scale the selected scores.
  score_selected(logits, selected_ids, selected, scores, experts, top_k, score);
  const float divisor = power > 0.0f ? norm_of(selected, top_k, power) : 1.0f;
  for (int k = lane_id(); k < top_k; k += WARP) {
    if (ids) ids[token * top_k + k] = selected_ids[k];
    weights[token * top_k + k] = selected[k] / divisor * scale;
  }
}

// Return d norm / d score for a score of `share` = score / norm. A dropped id has share 0, where
// powf would be infinite for power < 1.
__device__ inline float norm_slope(float share, float power) {
  if (power == 1.0f) return 1.0f;
  if (power == 2.0f) return share;
  return share > 0.0f ? powf(share, power - 1.0f) : 0.0f;
}

// Replace the gradients of the normalised scores by the gradients of the scores.
__device__ inline void backward_norm(
    float* dselected,       // [K], shared
    const float* selected,  // [K], shared
    int top_k,
    float power) {
  const float norm = norm_of(selected, top_k, power);
  float along = 0.0f;
  for (int k = lane_id(); k < top_k; k += WARP) along += dselected[k] * (selected[k] / norm);
  along = warp_sum(along);
  for (int k = lane_id(); k < top_k; k += WARP) {
    const float share = selected[k] / norm;
    const float slope = norm_slope(share, power);
    dselected[k] = (dselected[k] - along * slope) / norm;
  }
}

// Backward of route: compute the gradient of the logits from the gradient of the weights.
//
// Of a softmax over the selected logits, the weights are enough, and `logits` is null. `score` must
// be SOFTMAX_OF_SELECTED then, and `power` 0.
//
// Shared memory: 3 * K words per warp.
extern "C" __global__ void route_backward(
    const float* __restrict__ dweights,  // [T, K]
    const float* __restrict__ logits,    // [T, E] or null
    const float* __restrict__ weights,   // [T, K], or null if there are logits
    const int* __restrict__ ids,         // [T, K]
    float* __restrict__ dlogits,         // [T, E]
    int tokens,
    int experts,
    int top_k,
    int score,
    float power,
    float scale) {
  wait_for_launch_before();
  extern __shared__ unsigned shared[];
  const long long token = static_cast<long long>(blockIdx.x) * (blockDim.x / WARP) + warp_id();
  if (token >= tokens) return;
  int* selected_ids = reinterpret_cast<int*>(shared + warp_id() * 3 * top_k);  // [K]
  float* selected = reinterpret_cast<float*>(selected_ids + top_k);            // [K]
  float* dselected = selected + top_k;                                         // [K]

  // Phase 1: load the ids and the gradients; load or recompute the scores.
  for (int k = lane_id(); k < top_k; k += WARP) {
    selected_ids[k] = ids[token * top_k + k];
    dselected[k] = dweights[token * top_k + k] * scale;
  }
  __syncwarp();
  Scores scores = {};
  if (weights) {
    for (int k = lane_id(); k < top_k; k += WARP) selected[k] = weights[token * top_k + k] / scale;
    __syncwarp();
  } else {
    logits += token * experts;
    scores = score_experts(logits, experts, score);
    score_selected(logits, selected_ids, selected, scores, experts, top_k, score);
  }

  // Phase 2: back through the norm.
  if (power > 0.0f) backward_norm(dselected, selected, top_k, power);

  // Phase 3: back through the scores of the selected experts. A softmax needs `mean`, the dot
  // product of the scores and their gradients.
  float mean = 0.0f;
  for (int k = lane_id(); k < top_k; k += WARP) {
    if (!is_expert(selected_ids[k], experts)) dselected[k] = 0.0f;
    mean += dselected[k] * selected[k];
  }
  mean = warp_sum(mean);
  for (int k = lane_id(); k < top_k; k += WARP) {
    if (score == SOFTMAX_OF_SELECTED) dselected[k] = selected[k] * (dselected[k] - mean);
    if (score == SIGMOID) dselected[k] *= selected[k] * (1.0f - selected[k]);
  }
  __syncwarp();

  // Phase 4: scatter to the experts. An id may appear twice, so gradients are added.
  float gradients[LANE_EXPERTS] = {};
  for (int k = 0; k < top_k; ++k) {
#pragma unroll
    for (int j = 0; j < LANE_EXPERTS; ++j) {
      if (expert_at(j) == selected_ids[k]) gradients[j] += dselected[k];
    }
  }

  // Epilogue: a softmax over all experts has a gradient for the unselected ones, too.
#pragma unroll
  for (int j = 0; j < LANE_EXPERTS; ++j) {
    const float gradient = score == SOFTMAX ? scores.at[j] * (gradients[j] - mean) : gradients[j];
    if (expert_at(j) < experts) dlogits[token * experts + expert_at(j)] = gradient;
  }
}
