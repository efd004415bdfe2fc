// Sorts tables by a column's header, and switches between light and dark. Without it the page is complete.
"use strict";

const collator = new Intl.Collator("en", { numeric: true });

// The cell of a row at a column: cells may take several.
function cellAt(row, column) {
  let end = 0;
  return [...row.cells].find((cell) => column < (end += cell.colSpan));
}

// A number, a text, or null where nothing is known.
function keyOf(cell) {
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  const text = cell.textContent.trim();
  return text === "–" ? null : text;
}

function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null); // the unknown comes last, whatever the order
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return sign * (typeof a === "number" ? a - b : collator.compare(a, b));
}

function sort(table, heads, column) {
  const ascending = heads[column].getAttribute("aria-sort") !== "ascending";
  for (const head of heads) head.removeAttribute("aria-sort");
  heads[column].setAttribute("aria-sort", ascending ? "ascending" : "descending");
  for (const body of table.tBodies) {
    const rows = [...body.rows].map((row) => ({ row, key: keyOf(cellAt(row, column)) }));
    rows.sort((a, b) => compare(a.key, b.key, ascending ? 1 : -1));
    body.append(...rows.map((one) => one.row));
  }
}

for (const table of document.querySelectorAll("table")) {
  if (![...table.tBodies].some((body) => body.rows.length > 1)) continue;
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, heads, column));
    head.append(button);
  });
}

const toggle = document.querySelector(".scheme");
toggle.hidden = false;
toggle.addEventListener("click", () => {
  const next = { auto: "light", light: "dark", dark: "auto" }[toggle.textContent];
  toggle.textContent = next;
  if (next === "auto") delete document.documentElement.dataset.scheme;
  else document.documentElement.dataset.scheme = next;
});
