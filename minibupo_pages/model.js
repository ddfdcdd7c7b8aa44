"use strict";
// The forward pass of model.py in plain JavaScript, with the same names, to be read beside it.
//
// A tensor is one Float32Array, row after row. Its shape stands in a comment: T tokens, d = d_model,
// V = vocab_size, D = head_dim; a weight is (out, in). Sums are computed in float64, the only kind
// of number that JavaScript has, and stored in float32. Layers are numbered 1..L; H^0 is the embedding.

// x W^T: (T, in) -> (T, out). Four outputs at a time are three times as fast as one. (If their number
// is no multiple of four, the sums past the last row of W are NaN, and the next token overwrites them
// or, after the last one, the typed array ignores them.)
function linear(W, x, size) {
  const T = x.length / size, out = W.length / size, y = new Float32Array(T * out);
  for (let t = 0; t < T; t++) {
    for (let i = 0; i < out; i += 4) {
      let a = 0, b = 0, c = 0, e = 0;
      for (let j = 0; j < size; j++) {
        const w = i * size + j, value = x[t * size + j];
        a += W[w] * value;
        b += W[w + size] * value;
        c += W[w + 2 * size] * value;
        e += W[w + 3 * size] * value;
      }
      y[t * out + i] = a;
      y[t * out + i + 1] = b;
      y[t * out + i + 2] = c;
      y[t * out + i + 3] = e;
    }
  }
  return y;
}

function add(x, y) {  // y may be shorter: then it is added to each row, as a bias is
  const z = new Float32Array(x.length);
  for (let i = 0; i < x.length; i++) z[i] = x[i] + y[i % y.length];
  return z;
}

function rms_norm(x, weight, eps) {  // x / sqrt(mean(x^2) + eps) * weight, over the last dimension
  const size = weight.length, y = new Float32Array(x.length);
  for (let row = 0; row < x.length; row += size) {
    let squares = 0;
    for (let i = 0; i < size; i++) squares += x[row + i] ** 2;
    const scale = 1 / Math.sqrt(squares / size + eps);
    for (let i = 0; i < size; i++) y[row + i] = x[row + i] * scale * weight[i];
  }
  return y;
}

function columns(x, size, from, to) {  // x[:, from:to] of x (T, size)
  const T = x.length / size, y = new Float32Array(T * (to - from));
  for (let t = 0; t < T; t++) y.set(x.subarray(t * size + from, t * size + to), t * (to - from));
  return y;
}

function rope_table(cfg) {  // cos and sin (context_length, D/2) of position * theta^(-2i/D)
  const half = cfg.head_dim / 2, size = cfg.context_length * half;
  const angle = index => Math.floor(index / half) * cfg.rope_theta ** (-(index % half) / half);
  const cos = new Float32Array(size).map((_, index) => Math.cos(angle(index)));
  const sin = new Float32Array(size).map((_, index) => Math.sin(angle(index)));
  return {cos, sin};
}

function rotate(x, heads, D, {cos, sin}, start) {  // turn the pairs (x_i, x_{i+D/2}) of x (T, heads, D)
  const half = D / 2, y = new Float32Array(x.length);
  for (let row = 0; row < x.length; row += D) {
    const position = start + Math.floor(row / D / heads);
    for (let i = 0; i < half; i++) {
      const c = cos[position * half + i], s = sin[position * half + i];
      y[row + i] = x[row + i] * c - x[row + i + half] * s;
      y[row + i + half] = x[row + i + half] * c + x[row + i] * s;
    }
  }
  return y;
}

function softmax(logits, temperature = 1) {  // in float64
  const highest = logits.reduce((a, b) => Math.max(a, b));
  const pi = new Float64Array(logits.length);
  for (let i = 0; i < pi.length; i++) pi[i] = Math.exp((logits[i] - highest) / temperature);
  const total = pi.reduce((a, b) => a + b);
  return pi.map(weight => weight / total);
}

class GPT {
  constructor(cfg, weights) {  // the fields of GPTConfig, and {name: Float32Array} of a state_dict
    this.cfg = cfg;
    this.weights = weights;
    this.E_u = weights[cfg.tied ? "embed.weight" : "lm_head.weight"];  // (V, d)
    this.rope = rope_table(cfg);
  }

  weight(layer, name) {
    return this.weights[`blocks.${layer - 1}.${name}`];
  }

  embed(tokens) {  // H^0 (T, d)
    const d = this.cfg.d_model, h = new Float32Array(tokens.length * d), E = this.weights["embed.weight"];
    tokens.forEach((token, t) => h.set(E.subarray(token * d, (token + 1) * d), t * d));
    return h;
  }

  final_norm(h) {
    return rms_norm(h, this.weights["final_norm.weight"], this.cfg.norm_eps);
  }

  unembed(h) {  // logits h E_u^T (T, V), without the final norm
    return linear(this.E_u, h, this.cfg.d_model);
  }

  attention(layer, x, cache, start) {
    const {d_model, n_head, n_kv_head, head_dim: D, qk_norm, qkv_bias, norm_eps} = this.cfg;
    const rows = (n_head + 2 * n_kv_head) * D, T = x.length / d_model;
    let qkv = linear(this.weight(layer, "attn.qkv.weight"), x, d_model);
    if (qkv_bias) qkv = add(qkv, this.weight(layer, "attn.qkv.bias"));
    let q = columns(qkv, rows, 0, n_head * D);  // (T, n_head, D)
    let k = columns(qkv, rows, n_head * D, (n_head + n_kv_head) * D);  // (T, n_kv_head, D)
    const v = columns(qkv, rows, (n_head + n_kv_head) * D, rows);
    if (qk_norm) {
      q = rms_norm(q, this.weight(layer, "attn.q_norm.weight"), norm_eps);
      k = rms_norm(k, this.weight(layer, "attn.k_norm.weight"), norm_eps);
    }
    q = rotate(q, n_head, D, this.rope, start);
    k = rotate(k, n_kv_head, D, this.rope, start);
    const {keys, values} = cache[layer - 1];  // (context_length, n_kv_head, D)
    keys.set(k, start * n_kv_head * D);
    values.set(v, start * n_kv_head * D);

    const y = new Float32Array(T * n_head * D), scores = new Float64Array(start + T);
    for (let t = 0; t < T; t++) {
      for (let h = 0; h < n_head; h++) {
        const at = (t * n_head + h) * D, group = Math.floor(h * n_kv_head / n_head);
        for (let u = 0; u <= start + t; u++) {  // causal: no later token is attended to
          let sum = 0;
          for (let i = 0; i < D; i++) sum += q[at + i] * keys[(u * n_kv_head + group) * D + i];
          scores[u] = sum / Math.sqrt(D);
        }
        softmax(scores.subarray(0, start + t + 1)).forEach((p, u) => {
          for (let i = 0; i < D; i++) y[at + i] += p * values[(u * n_kv_head + group) * D + i];
        });
      }
    }
    return linear(this.weight(layer, "attn.out.weight"), y, n_head * D);
  }

  mlp(layer, x) {  // SwiGLU: down(silu(gate(x)) * up(x))
    const {d_model, d_mlp} = this.cfg;
    const gate_up = linear(this.weight(layer, "mlp.gate_up.weight"), x, d_model);
    const gate = columns(gate_up, 2 * d_mlp, 0, d_mlp), up = columns(gate_up, 2 * d_mlp, d_mlp, 2 * d_mlp);
    for (let i = 0; i < gate.length; i++) gate[i] *= up[i] / (1 + Math.exp(-gate[i]));
    return linear(this.weight(layer, "mlp.down.weight"), gate, d_mlp);
  }

  block(layer, resid_pre, cache, start) {  // a LayerTrace: what the layer reads and writes, each (T, d)
    const norm = (x, name) => rms_norm(x, this.weight(layer, name), this.cfg.norm_eps);
    const attn_in = norm(resid_pre, "attn_norm.weight");
    const attn_out = this.attention(layer, attn_in, cache, start);  // A^l
    const resid_mid = add(resid_pre, attn_out);  // Eq. 1
    const mlp_in = norm(resid_mid, "mlp_norm.weight");
    const mlp_out = this.mlp(layer, mlp_in);  // F^l
    const resid_post = add(resid_mid, mlp_out);  // H^l
    return {resid_pre, attn_in, attn_out, resid_mid, mlp_in, mlp_out, resid_post};
  }

  empty_cache() {
    const {n_layer, context_length, n_kv_head, head_dim} = this.cfg;
    const room = () => new Float32Array(context_length * n_kv_head * head_dim);
    return Array.from({length: n_layer}, () => ({keys: room(), values: room()}));
  }

  // The LayerTraces of layers 1..n_layer for tokens at positions start, start + 1, ... The cache holds
  // the keys and values of the tokens before them, and takes theirs.
  trace(tokens, cache = this.empty_cache(), start = 0, n_layer = this.cfg.n_layer) {
    const traces = [];
    for (let layer = 1, h = this.embed(tokens); layer <= n_layer; layer++) {
      traces.push(this.block(layer, h, cache, start));
      h = traces.at(-1).resid_post;
    }
    return traces;
  }
}
