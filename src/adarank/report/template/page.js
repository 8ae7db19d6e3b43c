"use strict";
// Tables are sorted by the column whose heading is pressed; numbers by their value, all else as text.
for (const table of document.querySelectorAll("table.sort")) {
  const headings = [...table.querySelectorAll("thead th")];
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const down = heading.getAttribute("aria-sort") !== "descending" && heading.hasAttribute("aria-sort");
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const order = (a, b) => (isNaN(a) || isNaN(b) ? String(a).localeCompare(String(b), undefined, { numeric: true }) : a - b);
    const rows = [...body.rows].sort((a, b) => (down ? -1 : 1) * order(key(a), key(b)));
    body.append(...rows);
  }));
}
// Masks: one canvas, a pixel for each component; the picker, the arrows beside it and the pointer tell what is shown.
const ramp = [[-1, 179, 88, 6], [0, 244, 244, 244], [1, 66, 146, 198], [2, 8, 48, 107]];
function colour(value) {
  const right = ramp.find((stop) => value <= stop[0]) ?? ramp[3];
  const left = ramp[Math.max(0, ramp.indexOf(right) - 1)];
  const share = right === left ? 0 : (value - left[0]) / (right[0] - left[0]);
  return `rgb(${[1, 2, 3].map((i) => Math.round(left[i] + share * (right[i] - left[i]))).join()})`;
}
const fixed = (value, digits) => value.toFixed(digits).replace(/^-(?=[0.]+$)/, ""); // no minus before zero
const decoded = (cells) => [...cells].map((cell) => (cell.charCodeAt(0) - 33) / 31 - 1);
for (const section of document.querySelectorAll(".maps")) {
  const data = section.querySelector(".data");
  if (!data) continue;
  const matrices = JSON.parse(data.textContent);
  const pick = section.querySelector(".pick");
  const canvas = section.querySelector("canvas");
  const said = section.querySelector(".cell");
  let at = [0, 0];
  const rows = () => matrices[pick.value].rows;
  function say() {
    const row = rows()[at[1]];
    const values = decoded(row.cells);
    if (!values.length) { said.textContent = `${row.task}: no components`; return; }
    at[0] = Math.min(at[0], values.length - 1);
    const first = Math.floor((at[0] * row.of) / values.length) + 1;
    const of = row.of > values.length ? `components around ${first}` : `component ${first}`;
    said.textContent = `${row.task}, ${of} of ${row.of}: ${fixed(values[at[0]], 2)}`;
  }
  function draw() {
    const width = Math.max(1, ...rows().map((row) => row.cells.length));
    canvas.width = width;
    canvas.height = rows().length;
    canvas.style.height = `${20 * rows().length}px`;
    const context = canvas.getContext("2d");
    rows().forEach((row, y) => decoded(row.cells).forEach((value, x) => {
      context.fillStyle = colour(value);
      context.fillRect(x, y, 1, 1);
    }));
    section.querySelector(".map ol").replaceChildren(...rows().map((row) => Object.assign(document.createElement("li"), { textContent: row.task })));
    const kept = rows().map((row) => `${row.task} ${row.kept} of ${row.of}`).join(", ");
    canvas.setAttribute("aria-label", `Masks of ${matrices[pick.value].name}, a row for each task. Kept: ${kept}. Arrow keys read single components.`);
    section.querySelector(".numbers tbody").replaceChildren(...rows().map((row) => {
      const line = document.createElement("tr");
      const task = document.createElement("th");
      task.scope = "row";
      task.textContent = row.task;
      const cells = [fixed(row.lam, 3), `${row.kept} of ${row.of}`, ...[row.low, row.mean, row.high].map((value) => fixed(value, 2))];
      line.append(task, ...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
      return line;
    }));
    at = [0, 0];
    say();
  }
  function move(step) {
    pick.selectedIndex = (pick.selectedIndex + step + matrices.length) % matrices.length;
    draw();
  }
  pick.addEventListener("change", draw);
  section.querySelector(".previous").addEventListener("click", () => move(-1));
  section.querySelector(".next").addEventListener("click", () => move(1));
  canvas.addEventListener("pointermove", (event) => {
    const place = canvas.getBoundingClientRect();
    const inside = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    at = [inside((event.clientX - place.left) / place.width, canvas.width), inside((event.clientY - place.top) / place.height, canvas.height)];
    say();
  });
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!steps) return;
    event.preventDefault();
    at = [Math.min(canvas.width - 1, Math.max(0, at[0] + steps[0])), Math.min(canvas.height - 1, Math.max(0, at[1] + steps[1]))];
    say();
  });
  draw();
}
// What is folded away is printed too.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
