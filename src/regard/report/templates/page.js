"use strict";
document.documentElement.classList.add("js");

// Tables: a heading's button sorts by the cells' data-value; empty values stay at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  for (const button of table.querySelectorAll("thead button")) {
    button.addEventListener("click", () => {
      const heading = button.closest("th");
      const previous = heading.getAttribute("aria-sort");
      const order = previous ? (previous === "ascending" ? "descending" : "ascending") : button.dataset.first;
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => row.cells[heading.cellIndex].dataset.value;
      const numeric = heading.classList.contains("number");
      const compare = (a, b) => {
        const x = value(a), y = value(b);
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (numeric ? x - y : x.localeCompare(y));
      };
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", order);
      body.append(...[...body.rows].sort(compare));
    });
  }
}

// Pointing at a row, mark, label or curve, or moving into it by keyboard, lights up all of them.
const light = (target) => {
  const key = target?.closest?.("[data-row]")?.dataset.row;
  for (const lit of document.querySelectorAll(".lit")) lit.classList.remove("lit");
  document.body.classList.toggle("has-lit", key !== undefined);
  if (key === undefined) return;
  for (const same of document.querySelectorAll(`[data-row="${key}"]`)) same.classList.add("lit");
};
for (const event of ["mouseover", "focusin"]) document.addEventListener(event, (e) => light(e.target));
for (const event of ["mouseleave", "focusout"]) document.addEventListener(event, () => light(null));
