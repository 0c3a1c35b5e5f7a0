// Two small drawings as SVG: a curve by week, and an estimate with its interval.

const SPACE = "http://www.w3.org/2000/svg";

function s(tag, given = {}, ...children) {
  const element = document.createElementNS(SPACE, tag);
  for (const [name, value] of Object.entries(given)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// points: [number or null], one for each week; from..to is the range of the axis, or null = that of the points.
export function curve(points, { label, low = null, high = null, format = String }) {
  const [width, height, left, top] = [240, 70, 4, 8];
  const known = points.filter((point) => point !== null);
  const floor = low ?? Math.min(0, ...known);
  const ceiling = high ?? Math.max(...known, floor + 1e-9);
  const x = (i) => left + (points.length === 1 ? (width - 2 * left) / 2 : (i * (width - 2 * left)) / (points.length - 1));
  const y = (point) => top + (height - 2 * top) * (1 - (point - floor) / (ceiling - floor || 1));
  const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${label}: ${points.map((point) => (point === null ? "–" : format(point))).join(", ")}` });
  svg.append(s("line", { class: "axis", x1: left, x2: width - left, y1: height - top, y2: height - top }), s("line", { class: "axis", x1: left, x2: width - left, y1: top, y2: top }));
  const runs = []; // without a line over weeks that say nothing
  points.forEach((point, i) => {
    if (point === null) return;
    if (i > 0 && points[i - 1] !== null) runs.at(-1).push([x(i), y(point)]);
    else runs.push([[x(i), y(point)]]);
  });
  for (const run of runs) if (run.length > 1) svg.append(s("polyline", { class: "curve", points: run.map((each) => each.join(",")).join(" ") }));
  points.forEach((point, i) => {
    if (point !== null) svg.append(s("circle", { class: "point", cx: x(i), cy: y(point), r: 3 }, s("title", {}, format(point))));
  });
  return svg;
}

// An estimate with its interval on the axis from -0.2 to 1, marked at 0 and 1.
export function interval(value, low, high, label) {
  const [width, height] = [200, 26];
  const x = (number) => 8 + ((Math.max(-0.2, Math.min(1, number)) + 0.2) / 1.2) * (width - 16);
  const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  svg.append(s("line", { class: "axis", x1: x(-0.2), x2: x(1), y1: 10, y2: 10 }));
  for (const mark of [0, 0.5, 1]) svg.append(s("line", { class: "axis", x1: x(mark), x2: x(mark), y1: 5, y2: 15 }), s("text", { x: x(mark), y: 25, "text-anchor": "middle" }, String(mark)));
  if (low !== null && high !== null) svg.append(s("line", { class: "range", x1: x(low), x2: x(high), y1: 10, y2: 10 }));
  svg.append(s("circle", { class: "point", cx: x(value), cy: 10, r: 4 }));
  return svg;
}
