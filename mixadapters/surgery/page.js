"use strict";
// Draws the routes. What strangers have written reaches the page as text only, by `textContent` and attributes.

const data = JSON.parse(document.getElementById("data").textContent);
const state = { layer: 0, label: null, expert: null };
const find = (id) => document.getElementById(id);
const percent = (share) => (share > 0 && share < 0.005 ? "<1%" : `${Math.round(100 * share)}%`);

// A curated start, then the golden angle: neighbours differ in hue and in lightness.
const HUES = [255, 50, 150, 320, 95, 195, 20, 285, 125, 225, 350, 70];

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

const COLOURS = data.experts.map((expert, i) => {
  if (expert.frozen) return "var(--none)";
  const hue = i < HUES.length ? HUES[i] : (i * 137.508) % 360;
  const light = [0.6, 0.68, 0.56][i % 3];
  return `light-dark(oklch(${light} 0.15 ${hue}), oklch(${light + 0.12} 0.13 ${hue}))`;
});

function colour(element, expert) {
  element.style.setProperty("--c", COLOURS[expert] || "var(--none)");
  return element;
}

function nameOf(expert) {
  if (expert < 0) return "no expert";
  const { name, mark, frozen } = data.experts[expert];
  if (frozen) return name === "frozen" ? "frozen model" : name;
  return name === mark ? `expert ${name}` : name;
}

const markOf = (expert) => (expert < 0 ? "–" : data.experts[expert].mark);
const badge = (expert) => colour(make("span", "badge", markOf(expert)), expert);

// --- numbers -------------------------------------------------------------------------------------------------

// [[expert, weight], ...] of a token, the heaviest first.
function choices(layer, text, token) {
  const { k, experts, weights } = data.layers[layer].texts[text];
  const found = [];
  for (let i = token * k; i < (token + 1) * k; i++) {
    if (experts[i] >= 0) found.push([experts[i], weights[i] / 1000]);
  }
  return found;
}

function taker(layer, text, token) {
  const [first] = choices(layer, text, token);
  return first ? first[0] : -1;
}

// Weight by expert over some texts, as shares. null: nothing to share.
function shares(layer, texts) {
  const sums = new Array(data.experts.length).fill(0);
  for (const text of texts) {
    const { experts, weights } = data.layers[layer].texts[text];
    experts.forEach((expert, i) => { if (expert >= 0) sums[expert] += weights[i]; });
  }
  return normal(sums);
}

function normal(sums) {
  const total = sums.reduce((a, b) => a + b, 0);
  return total ? sums.map((value) => value / total) : null;
}

const textsOf = (label) => [...data.texts.keys()].filter((i) => label === null || data.texts[i].label === label);

// Of all that was recorded where that is there, otherwise of the texts on the page.
function usage(layer, label) {
  const recorded = data.usage && data.usage[layer];
  if (recorded) {
    const sums = label === null ? recorded.all : recorded.labels[label];
    return sums ? normal(sums) : null;
  }
  return shares(layer, textsOf(label));
}

// --- what is drawn once --------------------------------------------------------------------------------------

const articles = data.texts.map((text, i) => {
  const article = make("article");
  const strip = make("div", "strip");
  strip.setAttribute("aria-hidden", "true");
  data.experts.forEach((_, expert) => strip.append(colour(make("i"), expert)));
  const heading = make("h3");
  heading.append(make("b", "", text.label === null ? `Text ${i + 1}` : data.labels[text.label]));
  heading.append(make("span", "", `text ${i + 1} · ${text.tokens.length} tokens`));
  const tokens = make("p", "tokens");
  tokens.setAttribute("role", "group");
  tokens.setAttribute("aria-label", `Text ${i + 1}. Left and right walk through its tokens, up and down through layers.`);
  // The space before a token stands by itself, so that a line ends before the number of an expert and not after it.
  const spaces = [];
  const spans = text.tokens.map((token, j) => {
    const space = /^[ \t]*(?=\S)/.exec(token);
    const gap = space && space[0] ? make("span", "s", space[0]) : null;
    const span = make("span", "t", gap ? token.slice(space[0].length) : token);
    span.dataset.i = j;
    if (gap) tokens.append(gap);
    tokens.append(span);
    spaces.push(gap);
    return span;
  });
  article.append(strip, heading, tokens);
  article.dataset.text = i;
  find("texts").append(article);
  return { article, strip, spans, spaces, current: -1 };
});

function stops(text, token) {
  // One stop of the tab key in each text: the token that was visited last.
  const of = articles[text];
  const old = of.spans[of.current];
  const span = of.spans[token];
  if (old && old !== span) { old.removeAttribute("tabindex"); old.removeAttribute("role"); }
  of.current = token;
  if (span) { span.tabIndex = 0; span.setAttribute("role", "button"); }
  return span;
}
articles.forEach((_, i) => stops(i, 0));

const bars = data.experts.map((expert, i) => {
  const item = make("li");
  const button = colour(make("button"), i);
  button.type = "button";
  const track = make("span", "track");
  const share = make("span", "share");
  const name = make("span", "name", nameOf(i));
  name.title = expert.name;
  track.append(make("i"));
  button.append(badge(i), name, track, share);
  button.addEventListener("click", () => { state.expert = state.expert === i ? null : i; draw(); });
  item.append(button);
  find("bars").append(item);
  return { item, button, fill: track.firstChild, share };
});

const labels = [null, ...data.labels.keys()];
for (const label of data.labels.length ? labels : []) {
  const input = make("input");
  Object.assign(input, { type: "radio", name: "label", value: label === null ? "" : label, checked: label === null });
  input.addEventListener("change", () => { state.label = label; draw(); });
  const face = make("span", "", label === null ? "All " : `${data.labels[label]} `);
  face.append(make("small", "", textsOf(label).length));
  const whole = make("label");
  whole.append(input, face);
  find("labels").append(whole);
}
find("labels").hidden = !data.labels.length;

// A heat map with a row for each name; returns what fills it.
function heatmap(id, corner, names, choose) {
  const table = document.querySelector(`#${id} table`);
  const head = table.createTHead().insertRow();
  head.append(make("td", "missing", corner));
  data.experts.forEach((expert, i) => {
    const cell = make("th");
    cell.scope = "col";
    cell.append(badge(i));
    cell.title = expert.name;
    head.append(cell);
  });
  const body = table.createTBody();
  const rows = names.map((name, i) => {
    const row = body.insertRow();
    const cell = make("th");
    cell.scope = "row";
    cell.title = name.title;
    if (choose) {
      const button = make("button", "", name.text);
      button.type = "button";
      button.addEventListener("click", () => choose(i));
      cell.append(button);
    } else {
      cell.textContent = name.text;
    }
    row.append(cell);
    return { row, cells: data.experts.map(() => row.insertCell()) };
  });
  return (values, here) => {
    const most = Math.max(1e-9, ...values.flatMap((shares) => shares || []));
    rows.forEach(({ row, cells }, i) => {
      row.className = i === here ? "here" : "";
      cells.forEach((cell, expert) => heat(cell, values[i], expert, names[i].has, most));
    });
  };
}

function heat(cell, shares, expert, has, most) {
  const missing = !shares || (has && !has.includes(expert));
  const share = missing ? 0 : shares[expert];
  cell.textContent = missing ? "" : Math.round(100 * share);
  cell.style.setProperty("--heat", `${Math.round((85 * share) / most)}%`);
  cell.className = missing ? "missing" : share > 0.7 * most ? "strong" : share < 0.005 ? "less" : "";
  cell.title = missing ? "" : `${nameOf(expert)}: ${percent(share)}`;
}

const layerMap = heatmap("by-layer", "layer", data.layers.map((l) => ({ text: l.short, title: l.key, has: l.has })), go);
const labelMap = heatmap("by-label", "label", data.labels.map((name) => ({ text: name, title: name })));
find("by-label").hidden = !data.labels.length;

// --- what changes --------------------------------------------------------------------------------------------

function drawText(text) {
  const { spans, spaces, strip } = articles[text];
  const tokens = data.texts[text].tokens;
  let before = null;
  spans.forEach((span, i) => {
    const found = choices(state.layer, text, i);
    const [expert, weight] = found[0] || [-1, 0];
    const total = found.reduce((sum, [, w]) => sum + w, 0);
    const much = Math.min(5, Math.max(1, Math.ceil(5 * (total ? weight / total : 0))));
    const classes = ["t", `m${much}`];
    if (expert < 0 || data.experts[expert].frozen) classes.push("none");
    else if (state.expert !== null && state.expert !== expert) classes.push("off");
    if (expert !== before) classes.push("first");
    if (!tokens[i]) classes.push("gap");
    if (span === pinned) classes.push("at");
    span.className = classes.join(" ");
    span.dataset.n = markOf(expert);
    colour(span, expert);
    const gap = spaces[i];
    if (gap) {
      gap.className = expert === before ? `s ${classes.slice(1).join(" ")}` : "s";
      colour(gap, expert);
    }
    before = expert;
  });
  const found = shares(state.layer, [text]) || [];
  [...strip.children].forEach((part, expert) => { part.style.flexGrow = found[expert] || 0; });
}

function drawBars() {
  const found = usage(state.layer, state.label);
  const { has } = data.layers[state.layer];
  const most = Math.max(...(found || [0]), 1e-9);
  bars.forEach(({ item, button, fill, share }, i) => {
    const value = found ? found[i] : 0;
    item.hidden = !has.includes(i);
    fill.style.inlineSize = `${100 * value / most}%`;
    share.textContent = percent(value);
    button.setAttribute("aria-pressed", state.expert === i);
    button.setAttribute("aria-label", `${nameOf(i)}, ${percent(value)} of the weight. Show its tokens alone.`);
  });
  find("balance").textContent = found ? balance(found, has) : "Nothing was recorded here.";
}

function balance(found, has) {
  const mine = has.map((expert) => found[expert]);
  const entropy = -mine.reduce((sum, share) => sum + (share > 0 ? share * Math.log2(share) : 0), 0);
  const unused = mine.filter((share) => share === 0).length;
  const most = Math.max(...mine) * mine.length;
  return `Worth ${(2 ** entropy).toFixed(1)} equal experts of ${mine.length}; the busiest takes ${most.toFixed(1)} times ` +
    `its fair share${unused ? `, ${unused} ${unused > 1 ? "are" : "is"} not used` : ""}.`;
}

function draw() {
  const layer = data.layers[state.layer];
  find("layer").value = state.layer;
  find("layer").setAttribute("aria-valuetext", `${state.layer + 1} of ${data.layers.length}, ${layer.key}`);
  const where = find("where");
  where.replaceChildren(make("b", "", `${state.layer + 1} / ${data.layers.length}`), ` ${layer.key}`);
  where.title = layer.key;
  find("before").disabled = state.layer === 0;
  find("after").disabled = state.layer === data.layers.length - 1;
  articles.forEach(({ article }, i) => {
    article.hidden = state.label !== null && data.texts[i].label !== state.label;
    if (!article.hidden) drawText(i);
  });
  drawBars();
  labelMap(data.labels.map((_, label) => usage(state.layer, label)), state.label);
  layerMap(data.layers.map((_, i) => usage(i, state.label)), state.layer);
  if (shown) inspect(...shown);
}

function go(layer) {
  state.layer = Math.min(data.layers.length - 1, Math.max(0, layer));
  draw();
}

// --- one token -----------------------------------------------------------------------------------------------

let shown = null; // [text, token] in the inspector
let pinned = null; // its element, where it was chosen and not merely pointed at

// Space alone is drawn by signs for it.
function visible(token) {
  if (!token) return "(part of a character)";
  return token.trim() ? token.trim() : token.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣");
}

function inspect(text, token) {
  shown = [text, token];
  const word = make("blockquote", "", visible(data.texts[text].tokens[token]));
  const list = make("dl");
  for (const [expert, weight] of choices(state.layer, text, token)) {
    const term = make("dt");
    const name = make("span", "name", nameOf(expert));
    name.title = nameOf(expert);
    term.append(badge(expert), name);
    const value = make("dd");
    const track = make("span", "track");
    track.append(colour(make("i"), expert));
    track.firstChild.style.inlineSize = `${Math.min(100, 100 * weight)}%`;
    value.append(track, make("span", "share", weight.toFixed(2)));
    list.append(term, value);
  }
  const rest = list.children.length ? list : make("p", "note", "No expert: the frozen model alone.");
  const way = make("ol", "way");
  way.setAttribute("aria-label", "The expert that took it, layer by layer");
  data.layers.forEach((layer, i) => {
    const step = make("li", i === state.layer ? "here" : "");
    const expert = taker(i, text, token);
    step.append(badge(expert));
    step.title = `${layer.key}: ${nameOf(expert)}`;
    way.append(step);
  });
  find("inspector").replaceChildren(word, rest);
  find("way").replaceChildren(...(data.layers.length > 1 ? [make("p", "note", "Layer by layer"), way] : []));
  find("token").classList.add("open");
}

function pin(text, token) {
  if (pinned) pinned.classList.remove("at");
  pinned = stops(text, token);
  pinned.classList.add("at");
  inspect(text, token);
}

function unpin() {
  if (pinned) pinned.classList.remove("at");
  pinned = null;
  shown = null;
  find("token").classList.remove("open");
}

const placeOf = (span) => [Number(span.closest("article").dataset.text), Number(span.dataset.i)];

find("texts").addEventListener("pointerover", (event) => {
  if (event.pointerType === "mouse" && event.target.matches(".t") && !pinned) inspect(...placeOf(event.target));
});
find("texts").addEventListener("click", (event) => {
  if (!event.target.matches(".t")) return unpin();
  pin(...placeOf(event.target));
  pinned.focus({ preventScroll: true });
});
find("close").addEventListener("click", unpin);
find("texts").addEventListener("focusin", (event) => { if (event.target.matches(".t")) pin(...placeOf(event.target)); });
find("texts").addEventListener("keydown", (event) => {
  if (!event.target.matches(".t") || event.ctrlKey || event.altKey || event.metaKey) return;
  const [text, token] = placeOf(event.target);
  const last = articles[text].spans.length - 1;
  const steps = { ArrowLeft: token - 1, ArrowRight: token + 1, Home: 0, End: last };
  const layers = { ArrowUp: state.layer - 1, ArrowDown: state.layer + 1 };
  if (event.key in steps) {
    const next = articles[text].spans[Math.min(last, Math.max(0, steps[event.key]))];
    next.tabIndex = 0;
    next.focus();
  } else if (event.key in layers) go(layers[event.key]);
  else if (event.key === "Escape") unpin();
  else return;
  event.preventDefault();
});

// --- layers --------------------------------------------------------------------------------------------------

let playing = null;

function play(on) {
  clearInterval(playing);
  playing = on ? setInterval(() => go((state.layer + 1) % data.layers.length), 900) : null;
  find("play").setAttribute("aria-pressed", on);
  find("play").setAttribute("aria-label", on ? "Stop" : "Play through the layers");
}

find("layer").max = data.layers.length - 1;
find("layer").addEventListener("input", (event) => { play(false); go(Number(event.target.value)); });
find("before").addEventListener("click", () => { play(false); go(state.layer - 1); });
find("after").addEventListener("click", () => { play(false); go(state.layer + 1); });
find("play").addEventListener("click", () => play(!playing));
find("controls").addEventListener("submit", (event) => event.preventDefault());
for (const id of ["before", "layer", "after", "play"]) find(id).hidden = data.layers.length === 1;
find("maps").classList.toggle("many", data.experts.length > 12);
find("of-what").textContent = data.usage
  ? "Share of the weight, in per cent, over all that was recorded. Choose a layer to see its text."
  : "Share of the weight, in per cent, in the texts of this page. Choose a layer to see it.";

draw();
document.documentElement.dataset.ready = "true";
