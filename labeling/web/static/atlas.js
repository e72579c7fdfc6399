// The concept list, filtered and sorted in place. Without this script the same links and form work
// through the server.
"use strict";

document.documentElement.classList.add("js");

const form = document.querySelector("[data-filters]");
const table = document.querySelector("[data-sortable]");

if (form && table) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const filtered = ["verdict", "family", "q"].some((name) => form.elements[name].value);

  // The server has already left rows out: let it answer until the filters are empty again.
  if (filtered) {
    form.addEventListener("change", () => form.submit());
  } else {
    form.addEventListener("input", show);
    form.addEventListener("submit", (event) => event.preventDefault());
    for (const link of table.tHead.querySelectorAll("a")) link.addEventListener("click", sort);
    show();
  }

  function show() {
    const verdict = form.elements.verdict.value;
    const family = form.elements.family.value;
    const words = form.elements.q.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits =
        (!verdict || row.dataset.verdict === verdict) &&
        (!family || row.dataset.family === family) &&
        row.dataset.words.toLowerCase().includes(words);
      row.hidden = !fits;
      shown += fits;
    }
    form.querySelector("[data-count]").textContent = `${shown} of ${rows.length}`;
    document.querySelector("[data-empty]").hidden = shown > 0;
  }

  function sort(event) {
    event.preventDefault();
    const head = event.currentTarget.closest("th");
    const reverse = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", reverse ? "descending" : "ascending");
    const value = (row) => row.cells[head.cellIndex].dataset.v;
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)];
      return isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    };
    rows.sort((a, b) => (reverse ? order(b, a) : order(a, b)));
    body.append(...rows);
  }
}
