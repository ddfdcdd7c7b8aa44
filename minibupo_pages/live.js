"use strict";
// The live page. What the reader types goes through the model (model.js), and the page shows what its
// policies say (policies.js), as a grid (grid.js), as an answer, and as entropies by layer.

const data = JSON.parse($("data").textContent);
const {words, eos, config, checkpoints} = data;  // words: the text of each token
const L = config.n_layer, log_vocab = Math.log(words.length);
const SAMPLES = 50;

// ---- The models: their weights are float16 in base64, and are decoded when they are first used ----

function float16(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  return sign * (exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24);
}

function decode_model(weights) {
  const bytes = atob(weights), named = {};
  let at = 0;
  for (const [name, size] of data.sizes) {
    named[name] = new Float32Array(size);
    for (let i = 0; i < size; i++, at += 2)
      named[name][i] = float16(bytes.charCodeAt(at) | (bytes.charCodeAt(at + 1) << 8));
  }
  return new GPT(config, named);
}

const load = key => {  // the model of a checkpoint
  const checkpoint = checkpoints.find(each => each.key === key) ?? checkpoints[0];
  return checkpoint.model ??= decode_model(checkpoint.weights);
};
const model = () => load(checkpoints[state.checkpoint].key);

// ---- The task: train_toy.py's encode and careful ----

function encode(text) {  // the tokens of a text, and the characters that are not in the vocabulary
  const found = (text.match(/<eos>|./gsu) ?? []).map(word => [word, words.indexOf(word)]);
  return {
    tokens: found.filter(([, token]) => token >= 0).map(([, token]) => token),
    ignored: [...new Set(found.filter(([, token]) => token < 0).map(([word]) => word))],
  };
}

const decode = tokens => tokens.map(token => words[token]).join("");

function careful(expression) {  // all lines of careful work, or null for what is not an expression
  const characters = [...expression], is_digit = c => c >= "0" && c <= "9";
  const fits = (c, i) => (i % 2 ? c in data.results : is_digit(c));
  if (characters.length % 2 === 0 || !characters.every(fits)) return null;
  const lines = [expression];
  while (lines.at(-1).length > 1) {
    const [a, operator, b] = lines.at(-1);  // data.results has the result of all 10 * 10 operations
    lines.push(data.results[operator][10 * a + +b] + lines.at(-1).slice(3));
  }
  return lines;
}

function solution(expression) {  // the careful response, if there is one
  const lines = careful(expression);
  return lines && lines.length > 1 ? lines.slice(1).join("=") + words[eos] : "";
}

// ---- The state of the page, and what follows from it ----

const state = {
  text: "7+5*3-2=",
  checkpoint: Math.max(0, checkpoints.findIndex(({key}) => key === "final")),
  view: "raw",
  layer: null,  // of the policy that answers; null: pi_theta
  temperature: 0,
  seed: 1,  // of the random numbers, so that an answer at a temperature can be shown again
  asked: false,  // whether the policy was asked to answer
};
let tokens = [];  // those of the text that the model reads
let logits, inside;  // all_logits and look_inside of the text in sight
let turn = 0;  // counts changes of the state: what was begun before the last one stops

function is_correct(response) {  // of the problem that was read; null if it is none
  const [expression, ...lines] = decode(tokens).split("="), expected = careful(expression);
  if (expected === null || lines.length === 0) return null;
  return decode([...tokens, ...response]).split("=").at(-1) === expected.at(-1) + words[eos];
}

function policy_text() {  // who answers
  return `${state.layer === null ? "pi_theta" : `layer ${state.layer}`} at temperature ${state.temperature}`;
}

function response_limit() {  // as in training, and enough for careful work on longer problems
  const digits = Math.ceil(decode(tokens).split("=")[0].length / 2);
  const limit = Math.max(data.limit, digits * (digits - 1));
  return tokens.at(-1) === eos ? 0 : Math.min(limit, config.context_length - tokens.length);
}

function respond(layer, temperature, of = model()) {  // [{token, p}, ...]
  if (tokens.length === 0) return [];
  const random = random_numbers(state.seed), prompt = read(of, tokens, layer);
  return [...generate(of, prompt, response_limit(), temperature, eos, random)];
}

async function count_correct(layer, temperature, tell, of = model()) {  // among SAMPLES responses
  const mine = turn, random = random_numbers(state.seed), prompt = read(of, tokens, layer);
  let correct = 0;
  for (let i = 1; i <= SAMPLES; i++) {
    const sampled = [...generate(of, prompt, response_limit(), temperature, eos, random)];
    if (is_correct(sampled.map(({token}) => token))) correct += 1;
    if (i % 5 > 0) continue;
    tell(`${correct} of ${i} samples are correct (${Math.round((100 * correct) / i)}%)`);
    await new Promise(resolve => setTimeout(resolve));  // let the browser draw, and take keys
    if (mine !== turn) return null;
  }
  return correct;
}

function read_text(complaints) {  // set `tokens`, and name what is ignored
  const {tokens: all, ignored} = encode(state.text), room = config.context_length;
  tokens = all.slice(0, room);
  const notes = [...complaints];
  if (ignored.length > 0) {
    const named = ignored.map(character => `"${character}"`).join(" ");
    notes.push(`Ignored, because the model's vocabulary does not have it: ${named}.`);
  }
  if (all.length > room)
    notes.push(`Ignored: the last ${all.length - room} characters, because the model reads at most ${room}.`);
  if (all.length >= room) notes.push("There is no room for an answer.");
  if (tokens.length === 0) notes.push("Type a problem, such as 7+5*3-2=");
  else if (!decode(tokens).includes("=")) notes.push("A problem ends in =");
  $("note").textContent = notes.join(" ");
}

// ---- Drawing ----

const short = token => words[token].replace(/[<>]/g, "");  // "eos" fits into a cell

function cell(site, view, layer, position) {  // what Grid shows: [entropy, [token, p], ...]
  const of_site = logits[layer > L ? "normed" : view][site];  // normed H^L is pi_theta
  const by_position = of_site[Math.min(layer, L) - (site === "resid_post" ? 0 : 1)];
  if (!by_position || (layer > L && site !== "resid_post")) return undefined;
  const pi = softmax(by_position[position]);
  return [entropy(by_position[position]), ...likeliest(pi, 5).map(token => [short(token), pi[token]])];
}

const view_names = {raw: "raw", normed: "final norm", scaled: `scaled to H^${L}`};
const grid = new Grid({n_layer: L, log_vocab, views: view_names, cell, pi_theta: true});

function draw_inside(response) {  // the grid and the entropies of the text and its response
  const all = [...tokens, ...response.map(({token}) => token)];
  const input = response.length > 0 ? all.slice(0, -1) : all;  // nothing follows the last one
  const shown = all.map(short);
  if (input.length > 0) logits = all_logits(model(), model().trace(input));
  const first = all.indexOf(words.indexOf("="));  // the first position that predicts the response
  grid.show(shown.slice(0, input.length), shown.slice(1), first);
  grid.paint(state.view);
  const who = state.asked ? policy_text() : "pi_theta at temperature 0";
  const rest = `From row ${tokens.length} on, what follows is the answer of ${who}.`;
  $("continued").textContent = response.length > 0 ? rest : "";
  if (input.length === 0) return;
  const positions = input.map((_, t) => t).filter(t => t >= first);
  inside = look_inside(logits, positions);
  const kind = first < 0 ? "all" : "the response";
  $("averaged").textContent = `Means over ${kind} positions of the text in sight, ${positions.length} in number.`;
  draw_curves();
  draw_bars();
}

function draw(svg, tag, attributes, text = null) {
  const node = document.createElementNS(svg.namespaceURI, tag);
  for (const name in attributes) node.setAttribute(name, attributes[name]);
  node.textContent = text;
  svg.append(node);
  return node;
}

function draw_curves() {
  const svg = $("curves"), left = 40, right = 385, top = 15, bottom = 215;
  const x = layer => left + ((right - left - 10) * layer) / L + 5;
  const y = value => bottom - ((bottom - top) * value) / log_vocab;
  svg.replaceChildren();
  draw(svg, "path", {class: "frame", d: `M${left},${top}V${bottom}H${right}`});
  draw(svg, "path", {class: "frame", "stroke-dasharray": "2 4", d: `M${left},${top}H${right}`});
  draw(svg, "text", {x: right, y: top - 4, "text-anchor": "end"}, "uniform");
  for (const value of [0, 1, 2, +log_vocab.toFixed(2)])
    draw(svg, "text", {x: left - 5, y: y(value) + 4, "text-anchor": "end"}, value);
  for (let layer = 0; layer <= L; layer++)
    draw(svg, "text", {x: x(layer), y: bottom + 17, "text-anchor": "middle"}, layer || "emb.");
  draw(svg, "text", {x: (left + right) / 2, y: bottom + 32, "text-anchor": "middle"}, "layer");
  const circle = "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", square = "M-4,-4h8v8h-8z", triangle = "M0,-5l5,9h-10z";
  const marks = {raw: circle, normed: square, scaled: triangle};
  for (const view of VIEWS) {
    const points = inside[view].map((value, layer) => `${x(layer)},${y(value)}`);
    draw(svg, "polyline", {points: points.join(" "), class: `curve ${view}`});
    for (const point of points) draw(svg, "path", {d: marks[view], transform: `translate(${point})`, class: view});
  }
  const told = VIEWS.map(view => `${view}: ${inside[view].map(value => value.toFixed(2)).join(", ")}`);
  svg.setAttribute("aria-label", `Entropy in nats of layers 0 to ${L}. ${told.join(". ")}.`);
}

function draw_bars() {
  const svg = $("bars"), left = 40, right = 385, top = 20, bottom = 215, named = target_layer(inside.dH_mlp);
  const low = Math.min(-1, ...inside.dH_mlp), high = Math.max(1, ...inside.dH_mlp);
  const y = value => bottom - 14 - ((bottom - top - 14) * (value - low)) / (high - low);
  const width = (right - left) / L;
  svg.replaceChildren();
  draw(svg, "path", {class: "frame", d: `M${left},${y(0)}H${right}`});
  draw(svg, "text", {x: left - 5, y: y(0) + 4, "text-anchor": "end"}, 0);
  inside.dH_mlp.forEach((value, i) => {
    const layer = i + 1, x = left + width * (i + 0.5), ends = [y(0), y(value)].sort((a, b) => a - b);
    const bar = {x: x - width / 4, y: ends[0], width: width / 2, height: ends[1] - ends[0]};
    draw(svg, "rect", {...bar, class: layer === named ? "bar named" : "bar"});
    const number = `${value < 0 ? "\u2212" : "+"}${Math.abs(value).toFixed(2)}`;  // with a true minus
    draw(svg, "text", {x, y: value < 0 ? y(value) + 14 : y(value) - 6, "text-anchor": "middle"}, number);
    const name = layer === named ? `▲ ${layer}` : layer;
    draw(svg, "text", {x, y: bottom + 17, "text-anchor": "middle"}, name);
  });
  draw(svg, "text", {x: (left + right) / 2, y: bottom + 32, "text-anchor": "middle"}, "layer");
  $("rule").textContent = named ? `▲ The rule names layer ${named}.` : "The rule names no layer.";
  const told = inside.dH_mlp.map(value => value.toFixed(2)).join(", ");
  svg.setAttribute("aria-label", `dH_FFN in nats of layers 1 to ${L}: ${told}. ${$("rule").textContent}`);
}

function verdict(correct) {
  if (correct === null) return "There is nothing to check: this is not a problem of the task.";
  return correct ? "✓ correct" : "✗ incorrect";
}

function draw_answer(response) {  // of the policy that was asked, beside careful work and the control
  for (const node of document.querySelectorAll(".answers output, .answers div > div, #tokens")) node.replaceChildren();
  $("verdict").hidden = false;
  $("who").textContent = policy_text();
  if (!state.asked) return;
  const said = response.map(({token}) => token), correct = is_correct(said);
  $("answer").textContent = decode(said);
  $("verdict").textContent = verdict(correct);
  for (const {token, p} of response) make("small", p.toFixed(2), make("li", words[token], $("tokens")));
  $("careful").textContent = solution(decode(tokens).split("=")[0]);
  const control = respond(null, state.temperature / $("divisor").value).map(({token}) => token);
  $("control").textContent = decode(control);
  $("control-verdict").textContent = correct === null ? "" : verdict(is_correct(control));
}

async function reveal() {  // the answer that is drawn, token by token
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  const mine = turn, items = [...$("tokens").children], texts = items.map(item => item.firstChild.data);
  $("verdict").hidden = true;
  for (let i = 0; i <= items.length; i++) {
    items.forEach((item, j) => item.hidden = j >= i);
    $("answer").textContent = texts.slice(0, i).join("");
    await new Promise(resolve => setTimeout(resolve, 100));
    if (mine !== turn) return;  // the state has changed, and everything is drawn anew
  }
  $("verdict").hidden = false;
}

function draw_controls() {
  if ($("problem").value !== state.text) $("problem").value = state.text;
  $("checkpoint").value = state.checkpoint;
  $("name").textContent = checkpoints[state.checkpoint].label;
  $("checkpoint").setAttribute("aria-valuetext", checkpoints[state.checkpoint].label);
  document.querySelector(`input[name=view][value=${state.view}]`).checked = true;
  $("layer").value = state.layer ?? "";
  $("temperature").value = state.temperature;
  $("degrees").textContent = state.temperature.toFixed(2);
}

function update(complaints = []) {  // show the state; a policy that was asked answers anew
  turn++;
  read_text(complaints);
  draw_controls();
  let response = [];
  if (state.asked) response = respond(state.layer, state.temperature);
  else if (decode(tokens).includes("=")) response = respond(null, 0);
  draw_answer(response);
  draw_inside(response);
}

// ---- The address: #p=7%2B5*3-2%3D&layer=4&t=0, and also model, view, and q for a question ----

function write_fragment() {
  const {text: p, layer, temperature: t, view} = state;
  const parts = {p, layer, t, model: checkpoints[state.checkpoint].key, view};
  const given = Object.entries(parts).filter(([, value]) => value !== null);
  const fragment = given.map(([name, value]) => `${name}=${encodeURIComponent(value)}`).join("&");
  history.replaceState(null, "", `#${fragment}`);
}

function read_fragment() {  // set the state, and let the policy answer
  const given = new URLSearchParams(location.hash.slice(1).replaceAll("+", "%2B")), complaints = [];
  function take(name, part, value_of) {  // value_of returns undefined for what is not allowed
    if (!given.has(name)) return;
    const value = value_of(given.get(name));
    if (value === undefined) complaints.push(`Ignored: ${name}=${given.get(name)}.`);
    else state[part] = value;
  }
  const layers = Array.from({length: L}, (_, i) => i + 1);
  if (given.has("p")) Object.assign(state, {layer: null, temperature: 0, seed: 1, asked: true});
  take("p", "text", text => text);
  take("layer", "layer", text => layers.find(layer => String(layer) === text));
  take("t", "temperature", text => (/^\d*\.?\d+$/.test(text) && +text <= 2 ? +text : undefined));
  take("model", "checkpoint", text => checkpoints.map((_, i) => i).find(i => checkpoints[i].key === text));
  take("view", "view", text => VIEWS.find(view => view === text));
  update(complaints);
  if (questions[given.get("q") - 1]) open_question(given.get("q") - 1);
}

// ---- What the reader does ----

let later = null;  // the timer that writes the fragment, after the last of several changes

function change(parts = {}) {
  Object.assign(state, parts);
  update();
  clearTimeout(later);
  later = setTimeout(write_fragment, 300);
}

function answer() {
  change({seed: state.asked ? state.seed + 1 : state.seed, asked: true});
  reveal();
}

async function sample_both() {  // how many samples are correct: of the chosen policy, and of the control
  if (is_correct([]) === null) return [];  // there is nothing to check
  const control = state.temperature / $("divisor").value;
  const correct = await count_correct(state.layer, state.temperature, text => $("share").textContent = text);
  if (correct === null) return [];
  return [correct, await count_correct(null, control, text => $("control-share").textContent = text)];
}

function slide(by) {
  change({checkpoint: Math.min(checkpoints.length - 1, Math.max(0, state.checkpoint + by))});
}

const shortcuts = {
  "/": () => $("problem").select(),
  "[": () => slide(-1),
  "]": () => slide(1),
  n: () => change({view: VIEWS[(VIEWS.indexOf(state.view) + 1) % VIEWS.length]}),
  a: answer,
  s: () => $("ask-sample").click(),
  p: () => $("layer").focus(),
  g: () => $("panels").focus(),
};

function start() {
  const count = data.sizes.reduce((sum, [, size]) => sum + size, 0);
  $("size").textContent = `of ${L} layers and ${count.toLocaleString("en")} parameters`;
  for (const node of document.querySelectorAll(".top")) node.textContent = L;
  $("example").textContent = PROBLEM;
  $("example-answer").textContent = solution(PROBLEM.slice(0, -1));
  $("trained").textContent = data.target === null ? "" : `Phase 1 of this run trained layer ${data.target}.`;
  $("rounded").textContent = data.rounded;
  $("checkpoint").max = checkpoints.length - 1;
  make("option", "pi_theta (the whole model)", $("layer")).value = "";
  for (let layer = 1; layer <= L; layer++) make("option", `layer ${layer}`, $("layer")).value = layer;
  questions.forEach((_, i) => {
    const link = make("a", i + 1, $("questions"));
    link.href = `#q=${i + 1}`;
    link.setAttribute("aria-label", `Question ${i + 1}`);
  });

  $("problem").addEventListener("input", () => change({text: $("problem").value, asked: false}));
  $("problem").addEventListener("keydown", event => {
    if (event.key === "Enter") answer();
    if (event.key === "Escape") $("problem").blur();
  });
  $("checkpoint").addEventListener("input", () => change({checkpoint: +$("checkpoint").value}));
  for (const input of document.querySelectorAll("input[name=view]"))
    input.addEventListener("change", () => change({view: input.value}));
  $("layer").addEventListener("change", () => change({layer: +$("layer").value || null}));
  $("temperature").addEventListener("input", () => change({temperature: +$("temperature").value}));
  $("divisor").addEventListener("change", () => change());
  $("ask-answer").addEventListener("click", answer);
  $("ask-sample").addEventListener("click", () => {
    change({seed: state.seed + 1, asked: true});
    sample_both();
  });
  $("panels").addEventListener("keydown", event => grid.key(event));
  $("question").addEventListener("submit", event => {
    event.preventDefault();
    show_question();
  });
  document.addEventListener("keydown", event => {
    const typing = event.target.matches?.("input[type=text], input[type=number], select");
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !(event.key in shortcuts)) return;
    event.preventDefault();
    shortcuts[event.key]();
  });
  addEventListener("hashchange", read_fragment);
  read_fragment();
}
