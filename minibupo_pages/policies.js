"use strict";
// Internal policies of a model of model.js, with the names of minibupo.py: views, entropy, the rule, sampling.

const VIEWS = ["raw", "normed", "scaled"];

// Vectors (T, d) of the stream as a view unembeds them: as they are (an internal policy), with the final
// norm (the logit lens), or scaled to the norm of the vector in `top` (T, d), which is H^L.
function seen(model, view, h, top) {
  if (view === "raw") return h;
  if (view === "normed") return model.final_norm(h);
  const d = model.cfg.d_model, scaled = new Float32Array(h.length);
  for (let row = 0; row < h.length; row += d) {
    let squares = 0, top_squares = 0;
    for (let i = row; i < row + d; i++) {
      squares += h[i] ** 2;
      top_squares += top[i] ** 2;
    }
    const scale = Math.sqrt(top_squares / squares);
    for (let i = row; i < row + d; i++) scaled[i] = h[i] * scale;
  }
  return scaled;
}

function rows(x, size) {  // a list of the rows of x (T, size)
  return Array.from({length: x.length / size}, (_, t) => x.subarray(t * size, (t + 1) * size));
}

// The logits of every policy at every position: {view: {site: [[logits (V), ...], ...]}}, by layer and
// position. Layers are 1..L, and 0..L of resid_post. attn_in and mlp_in, which are normed, have the view raw.
function all_logits(model, traces) {
  const top = traces.at(-1).resid_post, of = site => traces.map(trace => trace[site]);
  const vectors = {resid_post: [traces[0].resid_pre, ...of("resid_post")]};
  for (const site of ["attn_out", "mlp_out", "attn_in", "mlp_in"]) vectors[site] = of(site);
  const found = {};
  for (const view of VIEWS) {
    found[view] = {};
    for (const site in vectors) {
      if (view !== "raw" && site.endsWith("_in")) continue;
      found[view][site] = vectors[site].map(
        h => rows(model.unembed(seen(model, view, h, top)), model.cfg.vocab_size));
    }
  }
  return found;
}

function entropy(logits) {  // Eq. 8: -sum_j pi_j log pi_j of pi = softmax(logits), in nats
  let sum = 0;
  for (const p of softmax(logits)) if (p > 0) sum -= p * Math.log(p);
  return sum;
}

function target_layer(dH_mlp) {  // the last layer below the top with dH_FFN > 0; null if there is none
  for (let layer = dH_mlp.length - 1; layer >= 1; layer--) if (dH_mlp[layer - 1] > 0) return layer;
  return null;
}

// Means of entropies over some positions: by layer 0..L of H^l in each view, and dH_FFN of layers 1..L.
function look_inside(logits, positions) {
  const mean = (view, site) => logits[view][site].map(
    by_position => positions.reduce((sum, t) => sum + entropy(by_position[t]), 0) / positions.length);
  const mlp = mean("raw", "mlp_out"), mlp_in = mean("raw", "mlp_in");
  return {
    raw: mean("raw", "resid_post"),
    normed: mean("normed", "resid_post"),
    scaled: mean("scaled", "resid_post"),
    dH_mlp: mlp.map((written, i) => written - mlp_in[i]),
  };
}

function random_numbers(seed) {  // a xorshift generator of numbers in [0, 1), the same for the same seed
  let bits = Math.imul(seed, 0x9e3779b1) | 1;
  return () => {
    bits ^= bits << 13;
    bits ^= bits >>> 17;
    bits ^= bits << 5;
    return (bits >>> 0) / 2 ** 32;
  };
}

function sample(pi, random) {  // one token, drawn with the probabilities pi
  let rest = random();
  const token = pi.findIndex(p => (rest -= p) < 0);
  return token < 0 ? likeliest(pi)[0] : token;  // rounding can leave a rest of 1e-16
}

function likeliest(pi, count = 1) {  // the likeliest tokens, the most probable one first
  return [...pi.keys()].sort((i, j) => pi[j] - pi[i]).slice(0, count);
}

// What a policy has read: its cache, and the logits of the next token. The policy is that of H^layer,
// or pi_theta if layer is null.
function read(model, tokens, layer, cache = model.empty_cache(), start = 0) {
  const traces = model.trace(tokens, cache, start, layer ?? model.cfg.n_layer);
  const h = traces.at(-1).resid_post.slice(-model.cfg.d_model);  // of the last position
  const logits = model.unembed(layer === null ? model.final_norm(h) : h);
  return {layer, cache, length: start + tokens.length, logits};
}

// Yield {token, p} of a response until eos_id or max_new_tokens. Temperature 0 takes the likeliest token;
// p is the token's probability at this temperature, or at temperature 1 if it is 0.
function* generate(model, prompt, max_new_tokens, temperature, eos_id, random) {
  const cache = prompt.cache.map(({keys, values}) => ({keys: keys.slice(), values: values.slice()}));
  let last = prompt;
  for (let i = 1; i <= max_new_tokens; i++) {
    const pi = softmax(last.logits, temperature || 1);
    const token = temperature === 0 ? likeliest(pi)[0] : sample(pi, random);
    yield {token, p: pi[token]};
    if (token === eos_id || i === max_new_tokens) return;
    last = read(model, [token], last.layer, cache, last.length);
  }
}
