// Elements made of text nodes. What people and models wrote never becomes markup here.

const DIRECTION = /[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/u;
const NOTHING = /[\p{Cc}\p{Cf}\u115f\u1160\u3164\uffa0\u2800]/u;
const SUSPECT = /[\p{Cc}\p{Cf}\u115f\u1160\u3164\uffa0\u2800]/u;

// The text with each hidden character replaced by a visible one, as feedback/hidden.py does it on the server.
export function visible(text) {
  text = String(text);
  if (!SUSPECT.test(text)) return text;
  const points = Array.from(text);
  const ascii = (point) => point === undefined || point.codePointAt(0) < 128;
  return points.map((point, i) => {
    if (DIRECTION.test(point)) return "\u21c4";
    if (point === "\u200c" || point === "\u200d") return ascii(points[i - 1]) || ascii(points[i + 1]) ? "\u2423" : point;
    if (point === "\n" || point === "\t" || point === "\r") return point;
    return NOTHING.test(point) ? "\u2423" : point;
  }).join("");
}

// h("button", { class: "quiet", onclick: f, "aria-label": "x" }, "text", child, ...)
export function h(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "hidden") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  put(element, ...children);
  return element;
}

export function put(element, ...children) {
  for (const child of children.flat(Infinity)) {
    if (child === undefined || child === null || child === false) continue;
    element.append(child instanceof Node ? child : visible(child));
  }
  return element;
}

export function fill(element, ...children) {
  element.replaceChildren();
  return put(element, ...children);
}

// The one place where markup is taken as markup: html that the server has sanitised.
export function sanitised(html) {
  const element = h("div", { class: "sanitised" });
  element.innerHTML = html;
  return element;
}

export const kbd = (...names) => names.map((name) => h("kbd", { "aria-hidden": "true" }, name));

// Something for a screen reader to say.
export function announce(text) {
  const region = document.getElementById("live");
  if (!region) return;
  region.textContent = "";
  setTimeout(() => { region.textContent = visible(text); }, 30);
}

// A modal dialog; resolves to what `answer(value)` is given, or null after Escape.
export function ask(title, make, { wide = false } = {}) {
  return new Promise((resolve) => {
    const before = document.activeElement;
    const heading = h("h2", { id: "dialog-title" }, title);
    const dialog = h("dialog", { class: wide ? "wide" : "", "aria-labelledby": "dialog-title" });
    // Gone at once: the browser tells of a closed dialog later, and the next key may already open another.
    const answer = (value) => {
      if (!dialog.isConnected) return;
      dialog.close();
      dialog.remove();
      if (before && before.isConnected) before.focus({ preventScroll: true });
      resolve(value);
    };
    put(dialog, heading, make(answer, dialog));
    dialog.addEventListener("click", (event) => { if (event.target === dialog) answer(null); });
    dialog.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || event.isComposing) return;
      event.preventDefault();
      answer(null);
    });
    dialog.addEventListener("close", () => answer(null)); // what closes it besides, such as a phone's gesture
    document.body.append(dialog);
    dialog.showModal();
    (dialog.querySelector("[autofocus]") || dialog.querySelector("button, input, textarea"))?.focus();
  });
}
