"use strict";
// The map of heads and MLPs, drawn from the page's data; without it, the table of the strongest.

const data = JSON.parse(document.getElementById("data").textContent);
const width = data.units.length;
const chooser = document.getElementById("choose");
const grid = document.getElementById("map");
const name = (at) => {
  const unit = data.units[at % width];
  return `L${Math.floor(at / width)}${unit.startsWith("H") ? "" : "_"}${unit}`;
};
const known = new Map(); // component -> its place in the values of every map
for (const { values } of data.maps) {
  values.forEach((value, at) => value !== null && known.set(name(at), at));
}
const each = (values) => [...new Set(values)];
const number = (value) => (value === null ? "" : String(value).replace("-", "−"));
const pinned = new Set();
let selected = null; // a component
let shown = null; // the map

// ------------------------------------------------------------------------------ what is chosen
function fill(field, values, wanted) {
  const select = chooser.elements[field];
  const kept = [wanted, select.value].find((value) => values.includes(value)) ?? values[0];
  select.replaceChildren(...values.map((value) => make("option", {}, value)));
  select.value = kept;
  select.closest("label").hidden = !values.length;
  return wanted !== null && wanted !== undefined && kept !== wanted ? [`${field} “${wanted}”`] : [];
}

function choose(wanted = {}) {
  const fields = chooser.elements;
  let maps = data.maps;
  const missing = [];
  for (const field of ["model", "experiment", "scenario"]) {
    missing.push(...fill(field, each(maps.map((map) => map[field])), wanted[field]));
    maps = maps.filter((map) => map[field] === fields[field].value);
  }
  missing.push(...choosePrompt(wanted.prompt));
  shown = maps[0];
  draw();
  return missing;
}

// Those of the model and scenario first; a pair of models has none of its own.
function choosePrompt(wanted) {
  const { model, scenario, prompt } = chooser.elements;
  const near = (word) => (word.model === model.value) * 2 + (word.scenario === scenario.value);
  const prompts = each([...data.words].sort((a, b) => near(b) - near(a)).map((word) => word.prompt));
  const best = Math.max(...data.words.map(near));
  const kept = data.words.some((word) => word.prompt === prompt.value && near(word) === best);
  if (!kept) prompt.replaceChildren();
  return fill("prompt", prompts, wanted);
}

function restore() {
  const given = state.read();
  const missing = choose(Object.fromEntries(given));
  pinned.clear();
  const named = [...given.getAll("pin"), ...given.getAll("component")];
  for (const pin of given.getAll("pin")) if (known.has(pin)) pinned.add(pin);
  selected = known.has(given.get("component")) ? given.get("component") : null;
  const absent = each(named).filter((one) => !known.has(one));
  state.missing([...missing, ...absent.map((one) => `component “${one}”`)]);
  mark();
}

function strongest() {
  const sizes = shown.values.map((value) => Math.abs(value ?? -1));
  return name(sizes.indexOf(Math.max(...sizes)));
}

function keep() {
  const { model, experiment, scenario, prompt } = chooser.elements;
  state.write([
    ...[model, experiment, scenario, prompt].map((field) => [field.name, field.value || null]),
    ["component", selected],
    ...[...pinned].map((pin) => ["pin", pin]),
  ]);
}

// ------------------------------------------------------------------------------------- the map
function draw() {
  const same = data.maps.filter((map) => map.model === shown.model);
  const places = each(same.flatMap((map) => Object.keys(map.values).filter((at) => map.values[at] !== null)));
  const measured = new Set(data.units.filter((_, unit) => // heads, attention, MLPs: all or none
    shown.values.some((value, at) => value !== null && at % width === unit)).map((unit) => unit[0]));
  const columns = data.units.filter((unit, i) => measured.has(unit[0]) &&
    places.some((at) => at % width === i));
  const layers = Math.max(...places.map((at) => Math.floor(at / width))) + 1;
  const bound = Math.max(...shown.values.map((value) => Math.abs(value ?? 0))) || 1;
  const head = make("tr", {}, make("td"), ...columns.map((unit) => make("th", { scope: "col" }, unit)));
  const rows = [...Array(layers).keys()].reverse().map((layer) =>
    make("tr", {}, make("th", { scope: "row" }, String(layer)),
      ...columns.map((unit) => cell(layer * width + data.units.indexOf(unit), bound))),
  );
  grid.classList.toggle("roomy", columns.length <= 16);
  grid.replaceChildren(make("caption", {}, "Layers upwards, their parts across"),
    make("thead", {}, head), make("tbody", {}, ...rows));
  const end = String(Number(bound.toPrecision(3)));
  const unit = shown.unit && ` ${shown.unit}`;
  document.getElementById("ends").replaceChildren(
    ...[`−${end}`, "0", `${end}${unit}`].map((text) => make("span", {}, text)));
  document.getElementById("meaning").textContent =
    `Above zero (red): ${shown.meaning}. ${shown.clear.length ? "Dot: clear of its control." : ""}`;
  mark();
}

function cell(at, bound) {
  const value = shown.values[at] ?? null;
  const clear = shown.clear.includes(at);
  const said = value === null ? "no value" : `${number(value)} ${shown.unit}`.trim();
  const own = make("td", { tabindex: "-1", "data-component": name(at),
    "aria-label": `${name(at)}: ${said}${clear ? ", clear of its control" : ""}` });
  own.className = [value === null ? "none" : value < 0 ? "negative" : "positive", clear && "clear"]
    .filter(Boolean).join(" ");
  own.style.setProperty("--strength", `${Math.round((100 * Math.abs(value ?? 0)) / bound)}%`);
  return own;
}

const cells = () => [...grid.querySelectorAll("[data-component]")];

// Which cell Tab reaches, which are pinned, and the panels of these.
function mark() {
  selected ??= strongest();
  const own = cells();
  const reached = own.find((one) => one.dataset.component === selected) ?? own[0];
  for (const one of own) {
    one.tabIndex = one === reached ? 0 : -1;
    one.setAttribute("aria-selected", pinned.has(one.dataset.component));
    one.setAttribute("aria-current", one.dataset.component === selected);
  }
  show(selected);
  document.getElementById("pins").replaceChildren(
    ...[...pinned].filter((pin) => pin !== selected).map((pin) => panel(pin)));
}

function toggle(component) {
  if (!pinned.delete(component)) pinned.add(component);
  mark();
  keep();
}

// ---------------------------------------------------------------------------------- the panels
function show(component) {
  document.getElementById("panel").replaceChildren(panel(component));
}

function panel(component) {
  const at = known.get(component);
  const [, layer, head] = /^L(\d+)(?:H(\d+))?/.exec(component);
  const of = head !== undefined ? `head ${head}` : component.endsWith("MLP") ? "MLP" : "attention";
  const press = make("button", { type: "button", class: "pin", "aria-pressed": pinned.has(component),
    "aria-label": `Pin ${component}` }, pinned.has(component) ? "Unpin" : "Pin");
  press.addEventListener("click", () => toggle(component));
  const maps = data.maps.filter((map) => (map.values[at] ?? null) !== null)
    .sort((a, b) => (b === shown) - (a === shown) || (b.model === shown.model) - (a.model === shown.model));
  const head_ = make("thead", {}, make("tr", {},
    ...["Experiment", "Value", "Control"].map((text) => make("th", { scope: "col" }, text))));
  const table = make("table", {}, make("caption", {}, `Values of ${component} in every experiment`),
    head_, make("tbody", {}, ...maps.map((map) => line(map, at))));
  return make("article", {}, make("h3", {}, `${component} `, press),
    make("p", { class: "place" }, `layer ${layer}, ${of}`), ...words(component),
    make("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": `Values of ${component}` }, table));
}

function line(map, at) {
  const [low, high, control] = map.details[at] ?? [null, null, null];
  const [id, href] = data.cells[map.cell];
  const interval = low === null ? "" : `[${number(low)}, ${number(high)}]`;
  return make("tr", map === shown ? { class: "shown" } : {},
    make("th", { scope: "row" }, make("a", { href, title: id }, map.experiment),
      make("span", { class: "place" }, `${map.model} · ${map.scenario}`)),
    make("td", { class: "number" }, `${number(map.values[at])} ${map.unit}`,
      make("span", { class: "place" }, interval)),
    make("td", { class: "number" }, number(control)));
}

// What it attends to and what its output reads, on the prompt that is chosen.
function words(component) {
  const { prompt } = chooser.elements;
  return data.words
    .filter((word) => component in word.tokens && word.prompt === prompt.value)
    .map((word) => make("p", { class: "words" }, make("a", { href: data.cells[word.cell][1] }, word.says), " ",
      ...word.tokens[component].filter(([, value]) => Math.abs(value) >= 0.005).flatMap(([token, value]) => [
        make("span", { class: "token" }, make("code", {}, token), ` ${number(value.toFixed(2))}`), " "])));
}

// ------------------------------------------------------------------------------- mouse and keys
const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
  Home: [0, -Infinity], End: [0, Infinity] };

grid.addEventListener("keydown", (event) => {
  const own = event.target.closest("[data-component]");
  if (!own) return;
  if (event.key === "Enter" || event.key === " ") toggle(own.dataset.component);
  else if (event.key in STEPS) {
    const [down, right] = STEPS[event.key];
    const body = own.closest("tbody");
    const row = body.rows[Math.min(Math.max(own.parentNode.sectionRowIndex + down, 0), body.rows.length - 1)];
    row.cells[Math.min(Math.max(own.cellIndex + right, 1), row.cells.length - 1)].focus();
  } else return;
  event.preventDefault();
});
grid.addEventListener("focusin", (event) => {
  const own = event.target.closest("[data-component]");
  if (!own || own.dataset.component === selected) return;
  selected = own.dataset.component;
  mark();
  keep();
});
grid.addEventListener("click", (event) => {
  const own = event.target.closest("[data-component]");
  if (own) toggle(own.dataset.component);
});
grid.addEventListener("mouseover", (event) => {
  const own = event.target.closest("[data-component]");
  if (own && known.has(own.dataset.component)) show(own.dataset.component);
});
grid.addEventListener("mouseleave", () => show(selected));
chooser.addEventListener("input", () => {
  choose();
  keep();
});
chooser.addEventListener("submit", (event) => event.preventDefault());

document.getElementById("explorer").hidden = false;
restore();
state.follow(restore);
