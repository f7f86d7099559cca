"use strict";
// Findings and answers that a reader pinned, with notes; saved to and loaded from a file.

const SCHEMA = 1; // of the file
const LARGEST = 1e6; // bytes of a file that is read
const tray = document.getElementById("pinned");
const pinnable = new Map();
const pins = new Map(); // key -> note

for (const row of document.querySelectorAll("#findings [data-cell]")) offer(row, "value");
for (const entry of document.querySelectorAll("#answers dl [data-cell]")) offer(entry, "answer");
// The page opens with some of these answers: a button there pins the same.
for (const entry of document.querySelectorAll("#glance [data-cell]")) {
  const { cell } = entry.dataset;
  const name = entry.querySelector(".question").textContent;
  entry.querySelector(".place").before(pinButton(`answer ${cell} ${name}`, `Pin ${name}, ${cell}`), " ");
}

function offer(element, kind) {
  const { cell } = element.dataset;
  const place = element.querySelector(kind === "value" ? "th" : "dd");
  const name = element.querySelector(kind === "value" ? "th a" : "dt").textContent;
  const key = `${kind} ${cell} ${name}`;
  pinnable.set(key, { element, kind, cell, name, buttons: [], said: kind === "answer" ? place.textContent : "" });
  place.append(" ", pinButton(key, `Pin ${name}, ${cell}`));
}

function pinButton(key, label) {
  const button = make("button", { type: "button", class: "pin", "aria-label": label }, "Pin");
  button.addEventListener("click", () => toggle(key));
  pinnable.get(key).buttons.push(button);
  return button;
}

function toggle(key) {
  if (!pins.delete(key)) pins.set(key, "");
  tray.open = pins.size > 0;
  showPins();
  keep();
}

function showPins() {
  for (const [key, { buttons }] of pinnable) {
    for (const button of buttons) {
      button.setAttribute("aria-pressed", pins.has(key));
      button.textContent = pins.has(key) ? "Unpin" : "Pin";
    }
  }
  tray.querySelector("summary").textContent = `Pinned (${pins.size})`;
  tray.querySelector("ul").replaceChildren(...[...pins].map(([key, note]) => entry(key, note)));
}

function entry(key, note) {
  const { element, kind, cell, name, said } = pinnable.get(key);
  const words = kind === "answer" ? said : [...element.cells].slice(1).map((own, i) =>
    own.textContent.trim() && ["", "", "control ", "noise floor ", "n = ", "p = ", ""][i] + own.textContent.trim(),
  ).filter(Boolean).join(", ");
  const field = make("input", { value: note, maxlength: "500" });
  field.addEventListener("input", () => {
    pins.set(key, field.value);
    keep();
  });
  const remove = make("button", { type: "button", "aria-label": `Unpin ${name}, ${cell}` }, "Unpin");
  remove.addEventListener("click", () => {
    toggle(key);
    (tray.querySelector("li button") ?? tray.querySelector("summary")).focus();
  });
  const link = (element.querySelector("th a") ?? element.closest("section").querySelector(".place a"));
  return make("li", {}, make("a", { href: link.getAttribute("href") }, name), ` ${words} `,
    make("span", { class: "place" }, cell), make("div", { class: "fields" }, make("label", {}, "Note ", field), remove));
}

const pinsForURL = () => [...pins].flatMap(([key, note]) => [["pin", key], ["note", note]]);

function restorePins(given) {
  const notes = given.getAll("note");
  const missing = [];
  given.getAll("pin").forEach((key, i) => {
    if (pinnable.has(key)) pins.set(key, notes[i] ?? "");
    else missing.push(`pin “${key}”`);
  });
  tray.open ||= pins.size > 0;
  showPins();
  return missing;
}

// ------------------------------------------------------------------------------------ the file
const numeric = (text) => (text ? Number(text) : null);

function asFile() {
  const saved = [...pins].map(([key, note]) => {
    const { element, kind, cell, name, said } = pinnable.get(key);
    if (kind === "answer") return { kind, cell, name, answer: said, note };
    const [, value, interval, control] = [...element.cells].map((own) => own.dataset);
    const ends = [interval.sort, interval.high].map(numeric);
    return { kind, cell, name, value: numeric(value.sort), interval: ends.includes(null) ? null : ends,
      control: numeric(control.sort), note };
  });
  return { schema: SCHEMA, run: tray.dataset.run, pins: saved };
}

// The pins of a file, or an error that says what is wrong with it.
function fromFile(text) {
  let content;
  try {
    content = JSON.parse(text);
  } catch (error) {
    throw new Error(`expected JSON as "Save pins" writes it; ${error.message}`);
  }
  if (content?.schema !== SCHEMA) {
    throw new Error(`expected pins of schema ${SCHEMA}, got schema ${JSON.stringify(content?.schema) ?? "none"}`);
  }
  if (!Array.isArray(content.pins)) throw new Error("expected a list of pins");
  content.pins.forEach((pin, i) => {
    for (const field of ["kind", "cell", "name", "note"]) {
      if (typeof pin?.[field] !== "string") throw new Error(`pin ${i + 1}: expected a text as ${field}`);
    }
  });
  return content;
}

// Adds the pins of a file to those that there are; both notes are kept. Returns what to say of it.
function merge({ run, pins: given }) {
  const absent = [];
  const changed = [];
  for (const { kind, cell, name, note, value } of given) {
    const key = `${kind} ${cell} ${name}`;
    const found = pinnable.get(key);
    if (!found) {
      absent.push(`${name} of ${cell}`);
      continue;
    }
    const notes = new Set([pins.get(key), note].filter(Boolean));
    pins.set(key, [...notes].join(" / ").slice(0, 500));
    const here = kind === "value" ? numeric(found.element.cells[1].dataset.sort) : value;
    if (here !== value) changed.push(`${name} of ${cell} was ${value}`);
  }
  return [`${given.length - absent.length} of ${given.length} pins loaded`,
    ...(run === tray.dataset.run ? [] : [`the file is of the run “${run}”`]),
    ...(absent.length ? [`not in this report: ${absent.join("; ")}`] : []),
    ...(changed.length ? [`other values in the file: ${changed.join("; ")}`] : [])].join(". ") + ".";
}

tray.querySelector(":scope > .fields button").addEventListener("click", () => {
  const content = new Blob([JSON.stringify(asFile(), null, 1)], { type: "application/json" });
  const url = URL.createObjectURL(content);
  make("a", { href: url, download: "pins.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
});
tray.querySelector("input[type=file]").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  if (!file) return;
  const line = tray.querySelector(":scope > [role=status]");
  try {
    if (file.size > LARGEST) throw new Error(`expected at most ${LARGEST} bytes, got ${file.size}`);
    line.textContent = merge(fromFile(await file.text()));
    showPins();
    keep();
  } catch (error) {
    line.textContent = `${file.name} is not used: ${error.message}.`;
  }
  event.target.value = "";
});

for (const { element } of folds) element.addEventListener("toggle", keep);
tray.hidden = false;
state.missing(restore(state.read()));
state.follow(() => location.reload());
