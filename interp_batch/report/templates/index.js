"use strict";
// Filters and sorting of the report's tables; without it, everything is shown.

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

function sort(header) {
  const ascending = header.getAttribute("aria-sort") !== "ascending";
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

form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(filter));
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sort(button.closest("th")));
}
form.hidden = false;
filter();
