"use strict";
// What lens.html and live.html share: the grid of policies with its colours and keys, and the details
// of the cell that is pointed at. Texts enter the page as textContent, so they never become HTML.

const $ = id => document.getElementById(id);
const SITES = {resid_post: "stream H", attn_out: "attention A", mlp_out: "FFN F"};

function make(tag, text, parent) {
  const node = document.createElement(tag);
  if (text !== null) node.textContent = text;
  parent.append(node);
  return node;
}

function write(node, text) {  // with H^6 and dH_FFN as they are printed
  node.replaceChildren();
  for (const part of text.split(/(\^\w+|_FFN)/)) {
    if (part.startsWith("^")) make("sup", part.slice(1), node);
    else if (part.startsWith("_")) make("sub", part.slice(1), node);
    else node.append(part);
  }
}

// Dark blue is confident, yellow is uncertain: readers with any colour vision can order the two.
const CONFIDENT = [0, 34, 78], UNCERTAIN = [253, 231, 120];
const colour = share =>
  `rgb(${CONFIDENT.map((from, i) => Math.round(from + (UNCERTAIN[i] - from) * share)).join(",")})`;
const text_colour = share => (share < 0.44 ? "white" : "black");  // the one with more contrast

class Grid {
  // cell(site, view, layer, position) returns [entropy, [token, p], ...], the likeliest token first, or
  // undefined if there is no such policy: the embedding has no attention and no FFN. `views` has their
  // names. With pi_theta, the stream has one more column, number L + 1.
  constructor({n_layer, log_vocab, views, cell, pi_theta = false}) {
    Object.assign(this, {n_layer, log_vocab, views, cell, pi_theta});
    this.at = null;  // the cell pointed at: {layer, position, site}
    // Not "pointerover": a browser also fires it when the cell under a resting pointer is repainted.
    for (const kind of ["pointermove", "click"]) {
      $("panels").addEventListener(kind, event => {
        const {layer, position, site} = event.target.dataset;
        if (position !== undefined) this.point(+layer, +position, site);
      });
    }
    $("log_vocab").textContent = log_vocab.toFixed(2);
    $("scale").style.background = `linear-gradient(90deg, ${colour(0)}, ${colour(1)})`;
  }

  layers(site) {
    const stream = site === "resid_post";
    const first = stream ? 0 : 1, last = stream && this.pi_theta ? this.n_layer + 1 : this.n_layer;
    return Array.from({length: last - first + 1}, (_, i) => first + i);
  }

  name(layer) {
    return layer > this.n_layer ? "π" : layer === 0 ? "emb." : String(layer);
  }

  // Draw a row for each position, with the token read there and the token that follows. A line is drawn
  // above the row `first`.
  show(tokens, next_tokens, first = 0) {
    Object.assign(this, {tokens, next_tokens, tds: {}});
    $("panels").replaceChildren();
    for (const site in SITES) {
      const table = make("table", null, $("panels"));
      table.className = "grid";
      make("caption", `${SITES[site]}, by layer`, table);
      const head = make("tr", null, make("thead", null, table));
      for (const text of ["read", "next", ...this.layers(site).map(layer => this.name(layer))])
        make("th", text, head).scope = "col";
      const body = make("tbody", null, table);
      for (let position = 0; position < tokens.length; position++) {
        const row = make("tr", null, body);
        if (position === first && position > 0) row.className = "first";
        make("th", tokens[position], row).scope = "row";
        make("th", next_tokens[position] ?? "", row);
        for (const layer of this.layers(site)) {
          const td = make("td", null, row);
          Object.assign(td.dataset, {site, layer, position});
          this.tds[[site, layer, position]] = td;
        }
      }
    }
    if (this.at) this.at.position = Math.min(this.at.position, tokens.length - 1);
    if (tokens.length === 0) this.at = null;
  }

  paint(view) {
    this.view = view;
    for (const td of Object.values(this.tds)) {
      const {site, layer, position} = td.dataset;
      const [entropy, [token]] = this.cell(site, view, +layer, +position);
      const share = Math.min(1, entropy / this.log_vocab);
      td.textContent = token;
      td.style.background = colour(share);
      td.style.color = text_colour(share);
      td.classList.toggle("same", token === this.next_tokens[position]);
    }
    this.mark(true);
    this.tell();
  }

  mark(on) {
    if (!this.at) return;
    for (const site in SITES) this.tds[[site, this.at.layer, this.at.position]]?.classList.toggle("at", on);
  }

  point(layer, position, site = this.at?.site ?? "resid_post") {
    const highest = this.layers("resid_post").at(-1), last = this.tokens.length - 1;
    layer = Math.min(highest, Math.max(0, layer));
    position = Math.min(last, Math.max(0, position));
    const at = {layer, position, site};
    if (last < 0 || (this.at && Object.keys(at).every(key => at[key] === this.at[key]))) return;
    this.mark(false);
    this.at = at;
    this.mark(true);
    this.tell();
  }

  site() {  // of the cell pointed at; the embedding and pi_theta only have a stream
    return this.layers(this.at.site).includes(this.at.layer) ? this.at.site : "resid_post";
  }

  key(event) {  // an arrow key moves by one cell
    const moves = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    this.point((this.at?.layer ?? 0) + move[0], (this.at?.position ?? 0) + move[1]);
    if (!this.at) return;
    const td = this.tds[[this.site(), this.at.layer, this.at.position]];
    td.scrollIntoView({block: "nearest", inline: "nearest"});
  }

  tell() {  // the five likeliest tokens of all policies of the cell pointed at
    $("detail").replaceChildren();
    if (!this.at) return;
    const {layer, position} = this.at, next = this.next_tokens[position];
    const names = {0: "layer 0 (embedding)", [this.n_layer + 1]: "pi_theta"};
    $("where").textContent = `${names[layer] ?? `layer ${layer}`}, position ${position + 1} of ${this.tokens.length}: `
      + `the last token read is "${this.tokens[position]}"`
      + (next === undefined ? "" : `, the one that follows is "${next}"`);
    const policy = layer > this.n_layer ? "pi_theta" : SITES[this.site()];
    const own = this.cell(this.site(), this.view, layer, position);
    $("where").textContent += `; the likeliest for ${policy} is "${own[1][0]}"`;
    for (const site in SITES) {
      for (const view in this.views) {
        const found = this.cell(site, view, layer, position);
        if (!found || (layer > this.n_layer && view !== Object.keys(this.views)[0])) continue;
        const table = make("table", null, $("detail"));
        table.id = `${site}-${view}`;
        // The tables of the cell pointed at come first; on a phone, a page may leave the others out.
        table.classList.toggle("other", site !== this.site());
        const title = layer > this.n_layer ? "pi_theta" : `${SITES[site]}, ${this.views[view]}`;
        write(make("caption", null, table), `${title}: ${found[0].toFixed(2)} nats`);
        for (const [token, p] of found.slice(1)) {
          const row = make("tr", null, table);
          make("td", token, row);
          make("td", p.toFixed(4), row);
        }
      }
    }
  }
}
