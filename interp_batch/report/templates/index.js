"use strict";
// Filters, sorting and folds of the report, kept in the URL; without it, everything is shown.

const form = document.getElementById("filters");
const items = [...document.querySelectorAll("[data-analysis]")].map((element) => ({
  element,
  analysis: element.dataset.analysis,
  models: JSON.parse(element.dataset.models),
  scenarios: JSON.parse(element.dataset.scenarios),
  text: "text" in element.dataset ? element.textContent.toLowerCase() : null,
}));
const rows = document.querySelectorAll("#findings tbody tr");

function filter() {
  const { model, scenario, analysis, text } = form.elements;
  const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const item of items) {
    item.element.hidden = !(
      (!model.value || item.models.includes(model.value)) &&
      (!scenario.value || item.scenarios.includes(scenario.value)) &&
      (!analysis.value || item.analysis === analysis.value) &&
      (item.text === null || words.every((word) => item.text.includes(word)))
    );
  }
  for (const group of document.querySelectorAll("[data-group]")) {
    group.hidden = !group.querySelector("[data-analysis]:not([hidden])");
  }
  const any = [...form.elements].some((field) => field.value);
  for (const fold of document.querySelectorAll("#findings details")) fold.open ||= any;
  const shown = [...rows].filter((row) => !row.hidden).length;
  form.querySelector("output").value = `${shown} of ${rows.length} findings shown`;
}

function sort(header, ascending) {
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const numeric = header.dataset.kind === "number";
  const body = header.closest("table").tBodies[0];
  const keyed = [...body.rows].map((row) => {
    const cell = row.cells[header.cellIndex];
    return { row, key: numeric ? cell.dataset.sort : cell.textContent.trim() };
  });
  keyed.sort((a, b) => {
    if (!a.key || !b.key) return !a.key - !b.key; // what is missing comes last either way
    const order = numeric ? a.key - b.key : a.key.localeCompare(b.key);
    return ascending ? order : -order;
  });
  body.append(...keyed.map(({ row }) => row));
}

// --------------------------------------------------------------------------------- in the URL
const folds = [...document.querySelectorAll("[data-fold]")].map((element) => ({
  element,
  name: element.dataset.fold,
  open: element.open,
}));
const sortable = [...document.querySelectorAll("[data-table] thead th")].map((header) => ({
  header,
  name: `${header.closest("table").dataset.table}: ${header.textContent}`,
}));
let waiting; // a reader types faster than a URL may change

function keep() {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    const direction = ({ header }) => header.getAttribute("aria-sort");
    const toggled = folds.filter(({ element, open }) => element.open !== open);
    state.write([
      ...[...form.elements].filter((field) => field.name).map((field) => [field.name, field.value || null]),
      ...sortable.filter(direction).map((one) => ["sort", `${one.name}: ${direction(one)}`]),
      ...toggled.map(({ element, name }) => [element.open ? "open" : "shut", name]),
      ...pinsForURL(),
    ]);
  }, 200);
}

// Shows what the URL says; returns what it names that is not there.
function restore(given) {
  const missing = [];
  for (const field of form.elements) {
    if (!field.name) continue;
    field.value = given.get(field.name) ?? "";
    if (field.value !== (given.get(field.name) ?? "")) {
      missing.push(`${field.name} “${given.get(field.name)}”`);
      field.value = "";
    }
  }
  filter();
  for (const wanted of given.getAll("sort")) {
    const [, name, direction] = /^(.*): (ascending|descending)$/.exec(wanted) ?? [];
    const found = sortable.find((one) => one.name === name);
    if (found) sort(found.header, direction === "ascending");
    else missing.push(`sorting “${wanted}”`);
  }
  for (const kind of ["open", "shut"]) {
    for (const name of given.getAll(kind)) {
      const found = folds.find((fold) => fold.name === name);
      if (found) found.element.open = kind === "open";
      else missing.push(`fold “${name}”`);
    }
  }
  return [...missing, ...restorePins(given)];
}

form.addEventListener("input", () => {
  filter();
  keep();
});
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(() => {
  filter();
  keep();
}));
for (const button of document.querySelectorAll("thead button")) {
  const header = button.closest("th");
  button.addEventListener("click", () => {
    sort(header, header.getAttribute("aria-sort") !== "ascending");
    keep();
  });
}
form.hidden = false;

// A long text that the page opens with is folded, when the script of views has set its sliders.
addEventListener("load", () => {
  for (const box of document.querySelectorAll(".pictures .scroll:has(.ik-view)")) {
    box.classList.add("folded");
    if (box.scrollHeight <= box.clientHeight) {
      box.classList.remove("folded");
      continue;
    }
    const button = make("button", { type: "button", class: "pin", "aria-expanded": "false" }, "Show the whole text");
    button.addEventListener("click", () => {
      const folded = box.classList.toggle("folded");
      button.setAttribute("aria-expanded", !folded);
      button.textContent = folded ? "Show the whole text" : "Show less";
    });
    box.after(button);
  }
});
