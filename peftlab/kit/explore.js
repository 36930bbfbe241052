"use strict";

// Draws what the table below it says, for the scaling, rank and rate that are chosen.

{
  const LEFT = 30, RIGHT = 350, TOP = 10, BOTTOM = 150;

  function draw(svg, name, attributes, text = "") {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) {
      made.setAttribute(key, value);
    }
    made.textContent = text;
    svg.append(made);
  }

  // {rates: [...], groups: [{name, rows: [{rank, cells: [td, ...]}]}]}
  function read(table) {
    const rates = [], groups = [];
    for (const row of table.rows) {
      const [head, ...rest] = row.cells;
      if (head.matches(".scaling")) {
        groups.push({ name: head.textContent, rows: [] });
      } else if (groups.length) {
        groups.at(-1).rows.push({ rank: head.textContent, cells: rest });
      } else {
        rates.push(...rest.map((cell) => cell.textContent));
      }
    }
    return { rates, groups };
  }

  function start(box) {
    const { rates, groups } = read(box.querySelector("table"));
    const [scaling, rank, rate] = box.querySelectorAll("select, input");
    const [rankSaid, rateSaid] = box.querySelectorAll("label span");
    const svg = box.querySelector("svg"), said = box.querySelector("[role=status]");
    const x = (i) => LEFT + 20 + (i * (RIGHT - LEFT - 40)) / (rates.length - 1);
    const y = (share) => BOTTOM - share * (BOTTOM - TOP);

    function show() {
      const rows = groups[scaling.selectedIndex].rows, row = rows[rank.value];
      const cell = row.cells[rate.value], { alpha, low, high, change } = cell.dataset;
      rankSaid.textContent = row.rank;
      rateSaid.textContent = rates[rate.value];
      rank.setAttribute("aria-valuetext", row.rank);
      rate.setAttribute("aria-valuetext", rates[rate.value]);
      said.textContent =
        `Rank ${row.rank}, alpha ${alpha}, learning rate ${rates[rate.value]}: ` +
        `${cell.textContent} of the dates right, ${low} to ${high} over the seeds. ` +
        `Size of the change: ${change}.`;

      svg.replaceChildren();
      const list = row.cells.map((c, i) => `${c.textContent} at ${rates[i]}`).join(", ");
      svg.setAttribute("aria-label", `Share right, rank ${row.rank}: ${list}.`);
      for (const share of [0, 0.5, 1]) {
        draw(svg, "line", { x1: LEFT, x2: RIGHT, y1: y(share), y2: y(share) });
        const at = { x: LEFT - 5, y: y(share) + 4, "text-anchor": "end" };
        draw(svg, "text", at, share);
      }
      rates.forEach((each, i) => {
        draw(svg, "text", { x: x(i), y: BOTTOM + 15, "text-anchor": "middle" }, each);
      });
      const middle = { x: (LEFT + RIGHT) / 2, y: BOTTOM + 33, "text-anchor": "middle" };
      draw(svg, "text", middle, "learning rate");
      for (const other of [...rows.filter((r) => r !== row), row]) {
        const points = other.cells.map((c, i) => `${x(i)},${y(c.textContent)}`);
        const kind = other === row ? "chosen" : "other";
        draw(svg, "polyline", { points: points.join(" "), class: kind });
      }
      const at = x(rate.value);
      draw(svg, "line", { x1: at, x2: at, y1: y(low), y2: y(high), class: "chosen" });
      draw(svg, "circle", { cx: at, cy: y(cell.textContent), r: 6 });
    }

    [scaling.selectedIndex, rank.value, rate.value] = JSON.parse(box.dataset.start);
    for (const control of [scaling, rank, rate]) {
      control.addEventListener("input", show);
    }
    show();
    box.querySelector(".explore-live").hidden = false;
    box.querySelector("details").open = false;
    box.dataset.ready = "yes";
  }

  document.querySelectorAll(".explore:not([data-ready])").forEach(start);
}
