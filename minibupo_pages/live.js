"use strict";
// The live page. What the reader types goes through the model (model.js), and the page shows what its
// policies say (policies.js), as a grid (grid.js), as an answer, and as entropies by layer.

const data = JSON.parse($("data").textContent);
const {words, eos, config, checkpoints} = data;  // words: the text of each token
const L = config.n_layer, log_vocab = Math.log(words.length);
const SAMPLES = 50, DIVISORS = [1, 50];  // from, to
const stops = checkpoints.filter(({key}) => key !== "other").length;  // of the slider; "other" is another run

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
const model_label = () => checkpoints[state.checkpoint].label;

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

const operators = Object.keys(data.results), nth = i => operators[i % operators.length];
const PROBLEM = `7${nth(0)}5${nth(2)}3${nth(1)}2=`;  // 7+5*3-2= if the operators are + - *

// ---- The state of the page, and what follows from it ----

const defaults = {
  text: PROBLEM,
  checkpoint: stops - 1,
  view: "raw",
  layer: null,  // of the policy that answers; null: pi_theta
  temperature: 0,
  divisor: 7,  // of the temperature at which pi_theta answers beside it
  seed: 1,  // of the random numbers, so that an answer at a temperature can be shown again
  asked: false,  // whether the policy was asked to answer
};
const state = {...defaults};
let tokens = [];  // those of the text that the model reads
let logits, inside;  // all_logits and look_inside of the text in sight
let turn = 0;  // counts changes of the state: what was begun before the last one stops

// The lines of careful work for the text that was read, or null if it is not a problem: an expression of
// two or more digits, one =, and nothing or the beginning of an answer, in which no line is empty.
function expected_lines() {
  const [expression, ...begun] = decode(tokens).split("="), lines = careful(expression);
  const is_problem = lines && lines.length > 1 && begun.length > 0 && begun.slice(0, -1).every(line => line);
  return is_problem ? lines : null;
}

function is_correct(response) {  // whether it ends with the correct result; null if there is no problem
  const expected = expected_lines();
  return expected && decode([...tokens, ...response]).split("=").at(-1) === expected.at(-1) + words[eos];
}

function has_correct_lines(response) {  // train_toy.py's: each line follows from the one before
  const text = decode([...tokens, ...response]), lines = text.replace(words[eos], "").split("=");
  const follows = (line, i) => careful(lines[i])?.slice(1).includes(line);
  return text.endsWith(words[eos]) && lines.at(-1).length === 1 && lines.slice(1).every(follows);
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

// How many of SAMPLES responses are correct, or pass another test; null if the state changes meanwhile.
async function count_correct(layer, temperature, {tell = () => {}, of = model(), passes = is_correct} = {}) {
  const mine = turn, random = random_numbers(state.seed), prompt = read(of, tokens, layer);
  let correct = 0;
  for (let i = 1; i <= SAMPLES; i++) {
    const sampled = [...generate(of, prompt, response_limit(), temperature, eos, random)];
    if (passes(sampled.map(({token}) => token))) correct += 1;
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
  if (tokens.length === 0) notes.push(`Type a problem, such as ${PROBLEM}`);
  else if (!decode(tokens).includes("=")) notes.push("A problem ends in =");
  else if (expected_lines() === null)
    notes.push(`This is not a problem of the task: digits and operators alternate before one =, as in ${PROBLEM}`);
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
  const rest = `From row ${tokens.length} on, the column "next" is the answer of ${who}, in the model "${model_label()}".`;
  const prompt_rows = "The rows above the line are inside the problem: training never scores what a policy says there.";
  $("continued").textContent = `${first > 0 ? prompt_rows : ""} ${response.length > 0 ? rest : ""}`;
  for (const id of ["averaged", "rule"]) $(id).textContent = "";
  for (const id of ["curves", "bars"]) {
    $(id).replaceChildren();
    $(id).setAttribute("aria-label", "There is no text to measure.");
  }
  if (input.length === 0) return;
  const positions = input.map((_, t) => t).filter(t => t >= first);
  inside = look_inside(logits, positions);
  const kind = first < 0 ? "all" : "the answer's";
  const number = `there are ${positions.length}`;
  $("averaged").textContent = `The numbers are means over ${kind} positions of the text in sight: ${number}.`;
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
  $("rule").textContent = named ? `▲ For this text and model the rule names layer ${named}.` : "The rule names no layer here.";
  const told = inside.dH_mlp.map(value => value.toFixed(2)).join(", ");
  svg.setAttribute("aria-label", `dH_FFN in nats of layers 1 to ${L}: ${told}. ${$("rule").textContent}`);
}

function verdict(correct) {
  if (correct === null) return "There is nothing to check: this is not a problem of the task.";
  return correct ? "✓ correct" : "✗ incorrect";
}

function draw_answer(response) {  // of the policy that was asked, beside careful work and the control
  const outputs = ["answer", "verdict", "share", "tokens", "careful", "control", "control-verdict", "control-share"];
  for (const id of outputs) $(id).replaceChildren();
  $("verdict").hidden = false;
  $("who").textContent = policy_text();
  $("use-careful").hidden = !state.asked || expected_lines() === null;
  if (!state.asked) return;
  const said = response.map(({token}) => token), correct = is_correct(said);
  $("answer").textContent = decode(said);
  $("verdict").textContent = verdict(correct);
  for (const {token, p} of response) make("small", p.toFixed(2), make("li", words[token], $("tokens")));
  if (correct === null) return;
  $("careful").textContent = solution(decode(tokens).split("=")[0]);
  const control = respond(null, colder()).map(({token}) => token);
  $("control").textContent = decode(control);
  $("control-verdict").textContent = verdict(is_correct(control));
  if (state.temperature === 0)
    $("control-share").textContent = "At temperature 0 there is nothing to divide: this is pi_theta's likeliest answer.";
}

const colder = () => state.temperature / state.divisor;  // the temperature of the control

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
  $("checkpoint").value = Math.min(state.checkpoint, stops - 1);
  $("compare").checked = state.checkpoint === stops;
  $("name").textContent = model_label();
  $("checkpoint").setAttribute("aria-valuetext", model_label());
  document.querySelector(`input[name=view][value=${state.view}]`).checked = true;
  $("layer").value = state.layer ?? "";
  $("temperature").value = state.temperature;
  $("degrees").textContent = state.temperature.toFixed(2);
  $("divisor").value = state.divisor;
  $("divisor-note").textContent = "";
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
  tell_cell();
}

function tell_cell() {  // the details take room below the grid only if a cell is pointed at
  $("inside").classList.toggle("on", grid.at !== null);
  if (grid.at === null) $("where").textContent = "";
}

// ---- The address: #p=7%2B5*3-2%3D&layer=4&t=0, also model and view; seed, divisor and asked, if they
// are not the default; and q, the number of the open question ----

function write_fragment() {
  const {text: p, layer, temperature: t, view, seed, divisor} = state;
  const parts = {p, layer, t, model: checkpoints[state.checkpoint].key, view};
  if (seed !== defaults.seed) parts.seed = seed;
  if (divisor !== defaults.divisor) parts.divisor = divisor;
  if (!state.asked) parts.asked = 0;
  if (question) parts.q = questions.indexOf(question) + 1;
  const given = Object.entries(parts).filter(([, value]) => value !== null);
  const fragment = given.map(([name, value]) => `${name}=${encodeURIComponent(value)}`).join("&");
  history.replaceState(null, "", `#${fragment}`);
}

const whole = (text, from, to) => (/^\d+$/.test(text) && +text >= from && +text <= to ? +text : undefined);

function read_fragment() {  // set the state, let the policy answer, and open a question
  const given = new URLSearchParams(location.hash.slice(1).replaceAll("+", "%2B")), complaints = [];
  function take(name, part, value_of) {  // value_of returns undefined for what is not allowed
    if (!given.has(name)) return;
    const value = value_of(given.get(name));
    if (value === undefined) complaints.push(`Ignored: ${name}=${given.get(name)}.`);
    else state[part] = value;
  }
  const index = found => (found < 0 ? undefined : found);
  if (given.has("p")) Object.assign(state, defaults, {asked: true});
  take("p", "text", text => text);
  take("layer", "layer", text => whole(text, 1, L));
  take("t", "temperature", text => (/^\d*\.?\d+$/.test(text) && +text <= 2 ? +text : undefined));
  take("model", "checkpoint", text => index(checkpoints.findIndex(({key}) => key === text)));
  take("view", "view", text => VIEWS.find(view => view === text));
  take("seed", "seed", text => whole(text, 1, 2 ** 31));
  take("divisor", "divisor", text => whole(text, ...DIVISORS));
  take("asked", "asked", text => (text === "0" ? false : undefined));
  const q = given.has("q") ? whole(given.get("q"), 1, questions.length) : null;
  if (q === undefined) complaints.push(`Ignored: q=${given.get("q")}.`);
  update(complaints);
  if (q) open_question(q - 1);
  else if (given.has("p")) close_question();
  write_fragment();
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
  $("answers").scrollIntoView({block: "nearest"});
  reveal();
}

async function sample_both() {  // how many samples are correct: of the chosen policy, and of the control
  if (expected_lines() === null) return [];  // there is nothing to check
  const into = id => ({tell: text => $(id).textContent = text});
  const correct = await count_correct(state.layer, state.temperature, into("share"));
  if (correct === null) return [];
  return [correct, await count_correct(null, colder(), into("control-share"))];
}

function slide(by) {  // from the other run, one comes back to the end of this one
  const checkpoint = state.checkpoint === stops ? stops - 1 : state.checkpoint + by;
  change({checkpoint: Math.min(stops - 1, Math.max(0, checkpoint))});
}

function compare() {  // the other run, if the page has one, and back to the end of this one
  change({checkpoint: state.checkpoint === stops ? stops - 1 : Math.min(stops, checkpoints.length - 1)});
}

function divide() {  // take the divisor, or say why not
  const divisor = whole($("divisor").value, ...DIVISORS);
  if (divisor !== undefined) return change({divisor});
  $("divisor").value = state.divisor;
  const allowed = `a whole number from ${DIVISORS.join(" to ")}`;
  $("divisor-note").textContent = `The temperature can be divided by ${allowed}; the divisor stays ${state.divisor}.`;
}

const shortcuts = {
  "/": () => $("problem").select(),
  "[": () => slide(-1),
  "]": () => slide(1),
  c: compare,
  n: () => change({view: VIEWS[(VIEWS.indexOf(state.view) + 1) % VIEWS.length]}),
  a: answer,
  s: () => $("ask-sample").click(),
  p: () => $("layer").focus(),
  g: () => $("panels").focus(),
};

function tell_training() {  // which layer phase 1 trained, and by what margin
  const {dH_mlp, sem, problems, positions, more} = data.rule, target = data.target;
  const signed = value => `${value < 0 ? "\u2212" : "+"}${Math.abs(value).toFixed(3)}`;
  const named = values => target_layer(values) === null ? "no layer" : `layer ${target_layer(values)}`;
  if (target !== null) {
    const chosen = `the rule named ${named(dH_mlp)}. It was applied to means over ${positions} positions of the base
      model's own sampled answers to ${problems} problems.`;
    const by = data.chosen ? `This layer was chosen by hand; ${chosen}` : `Before RL, ${chosen}`;
    const i = target - 1, ratio = Math.abs(dH_mlp[i]) / sem[i];
    const mean = of => `${signed(of.dH_mlp[i])} ± ${of.sem[i].toFixed(3)}`;
    const margin = `At layer ${target} the mean was ${mean(data.rule)} nats, where ± is one standard error: it was
      ${ratio.toFixed(1)} standard errors from 0.`;
    const again = `Over ${more.problems} problems it is ${mean(more)}, and the rule names ${named(more.dH_mlp)}.`;
    const close = ratio < 2 ? "So the sign at this layer was a matter of chance." : "";
    $("trained").textContent = `Phase 1 of this run trained layer ${target}. ${by} ${margin} ${close} ${again}`;
  }
  const table = make("table", null, $("measured"));
  write(make("caption", null, table), "dH_FFN of the base model, mean ± standard error, by layer");
  const head = make("tr", null, table);
  for (const text of ["problems", ...dH_mlp.map((_, i) => i + 1)]) make("th", text, head).scope = "col";
  for (const each of [data.rule, more]) {
    const row = make("tr", null, table);
    make("th", each.problems, row).scope = "row";
    each.dH_mlp.forEach((value, i) => make("td", `${signed(value)} ± ${each.sem[i].toFixed(3)}`, row));
  }
}

function write_texts() {  // what the page says about these models
  const count = data.sizes.reduce((sum, [, size]) => sum + size, 0);
  const [, ...lines] = careful(PROBLEM.slice(0, -1));
  $("size").textContent = `of ${L} layers and ${count.toLocaleString("en")} parameters`;
  for (const node of document.querySelectorAll(".top")) node.textContent = L;
  document.querySelector(".uniform").textContent = `log ${words.length} = ${log_vocab.toFixed(2)} nats`;
  $("example").textContent = PROBLEM;
  $("example-answer").textContent = solution(PROBLEM.slice(0, -1));
  $("example-whole").textContent = PROBLEM + solution(PROBLEM.slice(0, -1));
  const first = `${PROBLEM.slice(0, 3)} is ${lines[0][0]}, so it writes what is left, ${lines[0]}=`;
  $("example-lines").textContent = `${first}; then ${lines.slice(1).join("=; then ")}.`;
  const tied = `At emb., every view prefers the character just read, because this model unembeds with the matrix
    with which it embeds. The raw vector is short, so its policy is still uncertain. The final norm and the scaling
    make it long, so the entropy falls to about 0. Layer 1 adds a much longer vector, which points elsewhere.`;
  $("tied").textContent = config.tied ? tied : "";
  $("rounded").textContent = data.rounded;
  tell_training();
}

function start() {
  write_texts();
  $("checkpoint").max = stops - 1;
  $("comparison").hidden = stops === checkpoints.length;
  $("other").textContent = checkpoints[stops]?.label;
  make("option", "pi_theta (the whole model)", $("layer")).value = "";
  for (let layer = 1; layer <= L; layer++) make("option", `layer ${layer}`, $("layer")).value = layer;
  questions.forEach((_, i) => {
    const link = make("a", i + 1, $("questions"));
    link.href = `#q=${i + 1}`;
    link.setAttribute("aria-label", `Question ${i + 1}`);
  });

  $("problem").addEventListener("input", () => change({text: $("problem").value, seed: 1, asked: false}));
  $("problem").addEventListener("keydown", event => {
    if (event.key === "Enter") answer();
  });
  $("checkpoint").addEventListener("input", () => change({checkpoint: +$("checkpoint").value}));
  for (const input of document.querySelectorAll("input[name=view]"))
    input.addEventListener("change", () => change({view: input.value}));
  $("layer").addEventListener("change", () => change({layer: +$("layer").value || null}));
  $("temperature").addEventListener("input", () => change({temperature: +$("temperature").value}));
  $("divisor").addEventListener("change", divide);
  $("compare").addEventListener("change", compare);
  $("ask-answer").addEventListener("click", answer);
  $("ask-sample").addEventListener("click", () => {
    change({seed: state.seed + 1, asked: true});
    sample_both();
  });
  $("use-careful").addEventListener("click", () => {
    const [expression] = decode(tokens).split("=");
    change({text: `${expression}=${solution(expression)}`, asked: false});
  });
  $("go-on").addEventListener("click", () => $("answers").scrollIntoView());
  $("panels").addEventListener("keydown", event => grid.key(event));
  for (const kind of ["keydown", "pointermove", "click"]) $("panels").addEventListener(kind, tell_cell);
  $("guess").addEventListener("input", keep_guess);
  $("question").addEventListener("submit", event => {
    event.preventDefault();
    show_question();
  });
  document.addEventListener("keydown", event => {
    const typing = event.target.matches?.("input[type=text]");
    if (event.key === "Escape") document.activeElement.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !(event.key in shortcuts)) return;
    event.preventDefault();
    shortcuts[event.key]();
  });
  addEventListener("hashchange", read_fragment);
  read_fragment();
}
