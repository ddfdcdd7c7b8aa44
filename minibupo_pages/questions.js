"use strict";
// Predict first: five questions of the lecture, for the live page. To ask others, change this list. A
// question has a text `ask`, a state of the page (see live.js), a function `tell` that reads the
// answer off the models, and an explanation `why`.

const index_of = wanted => Math.max(0, checkpoints.findIndex(({key}) => key === wanted));
const l = data.target ?? Math.max(1, L - 2);  // the layer of phase 1
const PROBLEM = "7+5*3-2=", CHAIN = "9-1*8*0-5=", PROBLEMS = 30;
const nats = value => `${value.toFixed(2)} nats`;
const correctly = said => `"${decode(said)}", which is ${is_correct(said) ? "correct" : "incorrect"}`;

function says(layer, checkpoint) {  // the tokens that a policy answers at temperature 0
  return respond(layer, 0, load(checkpoint)).map(({token}) => token);
}

const questions = [
  {
    ask: `An internal policy stops at a layer. Let the trained model answer ${PROBLEM}, but stop at layer ${l} of ${L}:
      unembed the stream there, take the likeliest character, and go on. Will its answer be the same as that of pi_theta,
      the whole model? Will it be correct?`,
    state: {text: PROBLEM, checkpoint: index_of("final"), layer: l, temperature: 0, view: "raw"},
    tell: () => `Layer ${l} answers ${correctly(says(l, "final"))}. pi_theta answers ${correctly(says(null, "final"))}.`,
    why: `The internal policy of layer ${l} gives probabilities for the next character, and can be sampled, as any policy can.
      It uses only what layers 1 to ${l} have written into the stream. In the grid, each column is such a policy: look for the
      first column in which a correct character is the likeliest.`,
  },
  {
    ask: `In the base model, the raw policies become more confident from layer to layer: their entropy falls. The stream
      also becomes longer from layer to layer. Scale the stream of every layer to the norm of the top one, H^${L}.
      How much does entropy now fall between layer 1 and layer ${L}: as much, half as much, or hardly?`,
    state: {text: PROBLEM, checkpoint: index_of("base"), layer: null, temperature: 0, view: "scaled"},
    tell: () => `Raw, the entropy falls from ${nats(inside.raw[1])} at layer 1 to ${nats(inside.raw[L])} at layer ${L}.
      Scaled, it is ${nats(inside.scaled[1])} at layer 1 and ${nats(inside.scaled[L])} at layer ${L}.`,
    why: `A longer vector makes larger logits, and larger logits make a policy more confident, even if it prefers the same
      characters. So raw entropy depends on the norm of the stream as well as on uncertainty. How much of the
      fall remains depends on the norm at which you compare. See the three curves.`,
  },
  {
    ask: `Sample ${SAMPLES} answers to ${PROBLEM} from the base model at temperature 1. Can the policy of layer ${L}, without the final
      norm, be correct more often than pi_theta, the whole model? If so, what would you check before you say that it knows more?`,
    state: {text: PROBLEM, checkpoint: index_of("base"), layer: L, temperature: 1, view: "raw"},
    tell: async () => {
      const [of_layer, colder] = await sample_both(), of_pi_theta = await count_correct(null, 1, () => {});
      return `Correct answers among ${SAMPLES}: ${of_layer} of layer ${L}, ${of_pi_theta} of pi_theta, and ${colder} of
        pi_theta at 1/${$("divisor").value} of the temperature.`;
    },
    why: `Without the norm, the long vector H^${L} makes large logits, which is the same as a low temperature. So compare two
      policies at temperatures at which they are equally confident: change the temperature, or the fraction for pi_theta.`,
  },
  {
    ask: `The rule takes the last layer below the top whose FFN raises entropy, dH_FFN > 0. It is computed from the text in
      sight. Does it name the same layer of the base model for every problem?`,
    state: {text: PROBLEM, checkpoint: index_of("base"), layer: null, temperature: 0, view: "raw"},
    tell: async () => {
      const random = random_numbers(1), counts = {};
      for (let i = 0; i < PROBLEMS; i++) {
        const named = rule_for(random_problem(random, 5));
        counts[named] = (counts[named] ?? 0) + 1;
        await new Promise(resolve => setTimeout(resolve));
      }
      const named = Object.entries(counts).sort().map(([layer, count]) => `${layer} for ${count}`);
      return `For ${PROBLEM} it names ${rule_for(PROBLEM)}. Of ${PROBLEMS} random problems of five digits, it names
        ${named.join(", ")}.`;
    },
    why: `Where a bar is close to 0, its sign depends on the text, and so does the rule. A rule needs many problems, and its
      margin reported beside it. train_toy.py takes the mean over 64 problems.`,
  },
  {
    ask: `RL rewarded correct final results, and nothing else. Ask pi_theta ${CHAIN} before and after RL. What do you expect
      to change: the length of its likeliest answer, the result, the share of sampled answers that are correct?`,
    state: {text: CHAIN, checkpoint: index_of("final"), layer: null, temperature: 0, view: "raw"},
    tell: async () => {
      const counts = [];
      for (const key of ["base", "final"]) counts.push(await count_correct(null, 1, () => {}, load(key)));
      return `The base answers ${correctly(says(null, "base"))}. After RL, it answers ${correctly(says(null, "final"))}.
        At temperature 1, ${counts[0]} of ${SAMPLES} samples were correct before RL, and ${counts[1]} are now.`;
    },
    why: `The base had seen careful and abbreviated solutions. RL made careful ones by far the most probable, because they are
      correct more often; nobody asked for them. Slide through training, and watch the column π: its colours turn dark, which
      means that pi_theta has become confident.`,
  },
];
let question = null;

function open_question(i) {
  question = questions[i];
  for (const id of ["guessed", "told", "why"]) $(id).textContent = "";
  [...$("questions").children].forEach((link, j) => link.setAttribute("aria-current", i === j));
  $("question").hidden = false;
  $("asked").textContent = `${i + 1}. ${question.ask}`;
  $("guess").value = "";
  $("guess").focus();
}

async function show_question() {
  Object.assign(state, question.state, {seed: 1, asked: true});
  change();
  const mine = turn, why = question.why;
  $("guessed").textContent = `Your guess: ${$("guess").value}`;
  $("why").textContent = "";
  $("told").textContent = "Computing…";
  const told = await question.tell();
  $("told").textContent = mine === turn ? told : "";  // empty if the reader has gone on meanwhile
  $("why").textContent = mine === turn ? why : "";
}

function random_problem(random, digits) {
  const pick = list => list[Math.floor(random() * list.length)];
  let text = pick("0123456789");
  for (let i = 1; i < digits; i++) text += pick(Object.keys(data.results)) + pick("0123456789");
  return `${text}=`;
}

function rule_for(text) {  // the layer that the rule names for a problem and the model's own answer
  const prompt = encode(text).tokens, read_prompt = read(model(), prompt, null);
  const response = [...generate(model(), read_prompt, data.limit, 0, eos)].map(({token}) => token);
  const input = [...prompt, ...response].slice(0, -1);
  const found = all_logits(model(), model().trace(input));
  const layer = target_layer(look_inside(found, input.map((_, t) => t).slice(prompt.length - 1)).dH_mlp);
  return layer === null ? "no layer" : `layer ${layer}`;
}
