"use strict";
// A crosshair in every chart of the same axis at once, with the values under it in the captions, and buttons that copy a command.
// All texts were formatted when the page was written: point i of a curve's path belongs to entry i of its values.

const figures = [...document.querySelectorAll("figure.chart")].filter((f) => f.querySelector(".plot")).map(setUp);

function setUp(figure) {
  const frame = figure.querySelector(".frame");
  const hit = document.createElement("div");
  hit.className = "hit";
  hit.tabIndex = 0;
  hit.setAttribute("role", "group");
  hit.setAttribute("aria-label", figure.querySelector("h3").textContent + ": move along the curve with the arrow keys");
  frame.append(hit);
  const outputs = new Map([...figure.querySelectorAll("output")].map((o) => [Number(o.dataset.curve), o]));
  const self = { figure, hit, outputs, last: new Map([...outputs].map(([i, o]) => [i, o.textContent])), at: null,
    texts: JSON.parse(figure.querySelector("script").textContent) };
  hit.addEventListener("pointermove", (event) => {
    const box = hit.getBoundingClientRect();
    showAll((event.clientX - box.left) / box.width, self);
  });
  hit.addEventListener("pointerleave", clearAll);
  hit.addEventListener("blur", clearAll);
  hit.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") clearAll();
    if (step === undefined) return;
    event.preventDefault();
    const points = pointsOf(shownPlot(self).querySelector(".curve"));
    const from = self.at === null ? points.length - 1 : nearest(points, self.at);
    showAll(points[Math.min(Math.max(from + step, 0), points.length - 1)][0], self);
  });
  return self;
}

function shownPlot(self) {
  return [...self.figure.querySelectorAll(".plot")].find((plot) => getComputedStyle(plot).display !== "none");
}

function pointsOf(path) {
  if (!path.points) {
    const box = path.ownerSVGElement.viewBox.baseVal; // with a rim above and below
    const width = box.width, height = box.height + 2 * box.y;
    path.points = path.getAttribute("d").split(/[ML]/).slice(1).map((pair) => {
      const [x, y] = pair.split(",");
      return [x / width, y / height];
    });
  }
  return path.points;
}

function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle; else high = middle;
  }
  return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? low : high;
}

function element(kind, parent, left, top) {
  const node = document.createElement("div");
  node.className = kind;
  node.style.left = 100 * left + "%";
  if (top !== undefined) node.style.top = 100 * top + "%";
  parent.append(node);
  return node;
}

function axisOf(plot) {
  return plot.classList[1].slice(2);
}

function show(self, x) {
  const plot = shownPlot(self);
  const axis = axisOf(plot);
  self.hit.replaceChildren();
  plot.querySelectorAll(".curve").forEach((path, i) => {
    const points = pointsOf(path);
    if (!points.length) return;
    const k = nearest(points, x);
    const [left, top] = points[k];
    if (i === 0) {
      self.at = left;
      const label = document.createElement("b");
      label.textContent = self.texts.at[axis][k];
      element("cross", self.hit, left).append(label);
    }
    if (!self.outputs.has(i)) return;
    self.outputs.get(i).textContent = self.texts.values[i][k];
    if (top >= 0 && top <= 1) element("spot", self.hit, left, top).style.background = getComputedStyle(path).stroke;
  });
}

function showAll(x, from) {
  const axis = axisOf(shownPlot(from));
  for (const self of figures) {
    const plot = shownPlot(self);
    if (plot && axisOf(plot) === axis) show(self, x);
  }
}

function clearAll() {
  for (const self of figures) {
    self.hit.replaceChildren();
    self.at = null;
    self.outputs.forEach((output, i) => { output.textContent = self.last.get(i); });
  }
}

for (const command of document.querySelectorAll(".command")) {
  const code = command.querySelector("code");
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.setAttribute("aria-label", "Copy: " + command.querySelector("h3").textContent);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    } catch {
      getSelection().selectAllChildren(code);
    }
  });
  command.append(button);
}
