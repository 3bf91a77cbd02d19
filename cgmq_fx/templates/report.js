"use strict";
for (const head of document.querySelectorAll("th button")) {
  head.addEventListener("click", () => {
    const cell = head.parentElement, table = cell.closest("table"), body = table.tBodies[0];
    const down = cell.getAttribute("aria-sort") !== "descending";
    const value = (row) => {
      const own = row.cells[cell.cellIndex].dataset.value;
      return Number.isNaN(Number(own)) ? own : Number(own);
    };
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
    });
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    cell.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  });
}
for (const svg of document.querySelectorAll(".graph svg")) {
  const whole = svg.viewBox.baseVal, home = [whole.x, whole.y, whole.width, whole.height];
  let view = [...home], held = null;
  const show = () => svg.setAttribute("viewBox", view.join(" "));
  const at = (event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return [point.x, point.y];
  };
  const zoom = (factor, x, y) => {
    const next = Math.min(Math.max(view[2] * factor, home[2] / 40), home[2] * 2) / view[2];
    view = [x - (x - view[0]) * next, y - (y - view[1]) * next, view[2] * next, view[3] * next];
    show();
  };
  svg.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.2 : 1 / 1.2, ...at(event));
  }, { passive: false });
  svg.addEventListener("pointerdown", (event) => { held = at(event); svg.setPointerCapture(event.pointerId); });
  svg.addEventListener("pointerup", () => { held = null; });
  svg.addEventListener("pointermove", (event) => {
    if (!held) return;
    const [x, y] = at(event);
    view[0] += held[0] - x;
    view[1] += held[1] - y;
    show();
  });
  const middle = () => [view[0] + view[2] / 2, view[1] + view[3] / 2];
  for (const button of svg.parentElement.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      if (button.value === "0") { view = [...home]; show(); } else zoom(Number(button.value), ...middle());
    });
  }
}
