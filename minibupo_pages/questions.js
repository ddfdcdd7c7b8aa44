"use strict";
// Predict first: six questions of the lecture, for the live page. To ask others, change this list. A
// question has a text `ask`, a state of the page (see live.js), a function `tell` that reads the
// answer off the models, as one text or a list of lines, and an explanation `why`.

const index_of = wanted => Math.max(0, checkpoints.findIndex(({key}) => key === wanted));
const l = data.target ?? Math.max(1, L - 2);  // the layer of phase 1
const CHAIN = "9-1*8*0-5=", PROBLEMS = 30, MANY = 200;
const nats = value => `${value.toFixed(2)} nats`;
const correctly = said => `"${decode(said)}", which is ${is_correct(said) ? "correct" : "incorrect"}`;

function says(layer, checkpoint) {  // the tokens that a policy answers at temperature 0
  return respond(layer, 0, load(checkpoint)).map(({token}) => token);
}

const questions = [
  {
    ask: `An internal policy stops at a layer. Let the trained model answer ${PROBLEM}, but stop at layer ${l} of ${L}:
      unembed the stream there, take the likeliest character, append it, and repeat. Will its answer be the same as that of pi_theta,
      the whole model? Will it be correct?`,
    state: {text: PROBLEM, checkpoint: index_of("final"), layer: l, temperature: 0, view: "raw"},
    tell: () => `Layer ${l} answers ${correctly(says(l, "final"))}. pi_theta answers ${correctly(says(null, "final"))}.`,
    why: `The internal policy of layer ${l} gives probabilities for the next character, and can be sampled, as any policy can.
      It uses only what layers 1 to ${l} have written into the stream. In the grid, each column is such a policy. The column
      "next" is now the answer of layer ${l}. Press "Put it into the grid" under the careful answer: then it is the careful
      answer, and you can look for the first column of the stream that is underlined in every row below the line.`,
  },
  {
    ask: `In the base model, the raw policies become more confident from layer to layer: their entropy falls. The stream
      also becomes longer from layer to layer: its norm grows. Scale the stream of every layer to the norm of the top one, H^${L}.
      How much does entropy now fall between layer 1 and layer ${L}: (a) about as much as before, (b) about half as much,
      or (c) less than a third as much?`,
    state: {text: PROBLEM, checkpoint: index_of("base"), layer: null, temperature: 0, view: "scaled"},
    tell: () => {
      const fall = view => inside[view][1] - inside[view][L], share = fall("scaled") / fall("raw");
      const option = share > 2 / 3 ? "(a)" : share > 1 / 3 ? "(b)" : "(c)";
      return `${option}: the fall is ${Math.round(100 * share)}% of what it was. Raw, the entropy falls from
        ${nats(inside.raw[1])} at layer 1 to ${nats(inside.raw[L])} at layer ${L}. Scaled, it falls from
        ${nats(inside.scaled[1])} to ${nats(inside.scaled[L])}.`;
    },
    why: `A longer vector makes larger logits, and larger logits make a policy more confident, even if it prefers the same
      characters. So raw entropy depends on the norm of the stream as well as on uncertainty. How much of the
      fall remains depends on the norm at which you compare. See the three curves.`,
  },
  {
    ask: `Sample ${SAMPLES} answers to ${PROBLEM} from the base model at temperature 1. Can the policy of layer ${L}, without the final
      norm, be correct more often than pi_theta, the whole model? If so, what would you check before you say that it knows more?`,
    state: {text: PROBLEM, checkpoint: index_of("base"), layer: L, temperature: 1, view: "raw"},
    tell: async () => {
      const [of_layer, colder] = await sample_both(), of_pi_theta = await count_correct(null, 1);
      return `Correct answers among ${SAMPLES}: ${of_layer} of layer ${L}, ${of_pi_theta} of pi_theta, and ${colder} of
        pi_theta at 1/${state.divisor} of the temperature.`;
    },
    why: `Without the norm, the long vector H^${L} makes large logits, which act like a low temperature. So compare two
      policies at temperatures at which they are equally confident: change the temperature, or the divisor for pi_theta.
      Question 6 has a problem for which this is not enough.`,
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
    why: `Where a bar is close to 0, its sign depends on the text, and so does the rule. Average over many problems and report
      the margin. This run averaged over ${data.rule.problems} problems: the table below the bars has the means and their
      standard errors, also over ${data.rule.more.problems} problems.`,
  },
  {
    ask: `RL rewarded correct final results, and nothing else. Ask pi_theta ${CHAIN} before and after RL. What do you expect
      to change: the length of its likeliest answer, the result, the share of sampled answers that are correct?`,
    state: {text: CHAIN, checkpoint: index_of("final"), layer: null, temperature: 0, view: "raw"},
    tell: async () => {
      const counts = [];
      for (const key of ["base", "final"]) counts.push(await count_correct(null, 1, {of: load(key)}));
      return `The base answers ${correctly(says(null, "base"))}. After RL, it answers ${correctly(says(null, "final"))}.
        At temperature 1, ${counts[0]} of ${SAMPLES} samples were correct before RL, and ${counts[1]} are now.`;
    },
    why: `The base had seen careful and abbreviated solutions. RL made careful ones by far the most probable, because they are
      correct more often; their lines were not rewarded. Slide through training, and watch the column π: its colours turn dark, which
      means that pi_theta has become confident.`,
  },
  {
    ask: `In question 3 a lower temperature of pi_theta closed the gap. On ${CHAIN}, can the base model's layer ${L - 1} be correct
      more often than pi_theta at any temperature? If so, does it know better how to solve the problem? Guess how many of
      ${SAMPLES} sampled answers of layer ${L - 1} are correct, and in how many all lines are correct.`,
    state: {text: CHAIN, checkpoint: index_of("base"), layer: L - 1, temperature: 1, view: "raw"},
    tell: async () => {
      const parts = [];
      for (const [layer, temperature] of [[L - 1, 1], [null, 1], [null, 1 / 3], [null, 1 / 7]]) {
        const correct = await count_correct(layer, temperature);
        const lines = await count_correct(layer, temperature, {passes: has_correct_lines});
        const who = `${layer === null ? "pi_theta" : `layer ${layer}`} at temperature ${temperature.toFixed(2)}`;
        parts.push(`${who}: ${correct} correct, ${lines} with correct lines`);
      }
      return [
        `Of ${SAMPLES} answers:`,
        ...parts,
        `The likeliest answer of pi_theta is ${correctly(says(null, "base"))}.`,
        `Of ${MANY} random problems of five digits, the likeliest answer of layer ${L - 1} is correct for
          ${await count_solved(L - 1)}, and that of pi_theta for ${await count_solved(null)}.`,
      ];
    },
    why: `Look at what the layer writes. In the course's run, most of its lines are incorrect, but it keeps the factor 0, and
      anything times 0 is 0. So its errors do not matter here, and it ends with 0-5=5. pi_theta's likeliest answer computes 9-1=8, and then
      leaves the 0 out of its first line. A low temperature only makes a policy more confident of the character that it
      already prefers, so pi_theta becomes more certain of this error. Temperature explains a difference only where both
      policies prefer the same characters. And one problem does not show which policy is better: compare over many.`,
  },
];
// In a task with other operators, the text of the last two is not true.
if (solution(CHAIN.slice(0, -1)) !== "8*8*0-5=4*0-5=0-5=5<eos>") questions.length = 4;
let question = null;
const guesses = {};  // by the number of the question

function open_question(i) {
  if (question !== questions[i]) for (const id of ["guessed", "told", "why"]) $(id).textContent = "";
  question = questions[i];
  mark_question();
  write($("asked"), `${i + 1}. ${question.ask}`);
  $("guess").value = guesses[i] ?? "";
  $("guess").focus();
}

function close_question() {
  question = null;
  mark_question();
}

function mark_question() {
  const links = [...$("questions").children];
  links.forEach((link, i) => link.setAttribute("aria-current", questions[i] === question));
  $("question").hidden = question === null;
  $("further").hidden = $("told").textContent === "";
}

function keep_guess() {
  guesses[questions.indexOf(question)] = $("guess").value;
}

async function show_question() {
  change({...question.state, seed: 1, asked: true});
  const mine = turn, why = question.why;
  $("guessed").textContent = `Your guess: ${$("guess").value}`;
  $("why").textContent = "";
  $("told").textContent = "Computing…";
  $("further").hidden = false;
  const told = await question.tell();
  $("told").replaceChildren();
  if (mine === turn) {  // the state has not changed meanwhile
    for (const line of [told].flat()) write(make("div", null, $("told")), line);
    write($("why"), why);
  }
  mark_question();
}

function random_problem(random, digits) {
  const pick = list => list[Math.floor(random() * list.length)];
  let text = pick("0123456789");
  for (let i = 1; i < digits; i++) text += pick(Object.keys(data.results)) + pick("0123456789");
  return `${text}=`;
}

function likeliest_answer(text, layer) {  // the tokens of a problem, and those that the policy answers at temperature 0
  const prompt = encode(text).tokens, read_prompt = read(model(), prompt, layer);
  return [prompt, [...generate(model(), read_prompt, data.limit, 0, eos)].map(({token}) => token)];
}

async function count_solved(layer) {  // of MANY random problems
  const random = random_numbers(1);
  let correct = 0;
  for (let i = 0; i < MANY; i++) {
    const text = random_problem(random, 5), [, response] = likeliest_answer(text, layer);
    if (decode(response).split("=").at(-1) === careful(text.slice(0, -1)).at(-1) + words[eos]) correct += 1;
    await new Promise(resolve => setTimeout(resolve));
  }
  return correct;
}

function rule_for(text) {  // the layer that the rule names for a problem and the model's own answer
  const [prompt, response] = likeliest_answer(text, null), input = [...prompt, ...response].slice(0, -1);
  const found = all_logits(model(), model().trace(input));
  const layer = target_layer(look_inside(found, input.map((_, t) => t).slice(prompt.length - 1)).dH_mlp);
  return layer === null ? "no layer" : `layer ${layer}`;
}
