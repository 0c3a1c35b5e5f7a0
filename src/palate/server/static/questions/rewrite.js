// A better text in place of a response: what is taken out and put in is marked in the response while one writes.

import { h, fill } from "../dom.js";
import { difference, readable } from "../words.js";

const unify = (text) => text.replace(/\r\n?/g, "\n"); // as a text field does

export function make({ question, response, card, changed, t }) {
  const before = unify(response.text);
  const box = h("textarea", {
    class: "rewrite", dir: "auto", rows: 5, "aria-label": `${question.text || t("ask_rewrite")}, ${response.letter}`,
    oninput: () => { later(); changed(); }, maxlength: 100000,
  });
  const said = h("span", { class: "quiet" });
  const again = h("button", { type: "button", class: "link", onclick: () => { set(before); box.focus(); } }, t("restore"));
  const shown = h("div", { class: "plain difference", dir: "auto", "aria-label": t("difference"), role: "group" });
  const own = !card.take(shown);
  let timer = null;

  function later() {
    clearTimeout(timer);
    timer = setTimeout(draw, before.length > 4000 ? 300 : 60);
  }
  function draw() {
    clearTimeout(timer);
    box.rows = Math.min(18, Math.max(4, Math.ceil(box.value.length / 70) + (box.value.match(/\n/g) || []).length));
    const parts = readable(difference(before, box.value));
    const same = box.value === before;
    fill(shown, parts.map(({ kind, text }) => (kind === "same" ? text : h(kind === "out" ? "del" : "ins", {}, text))));
    const count = (kind) => parts.filter((part) => part.kind === kind).length;
    said.textContent = same ? t("unchanged") : t("changes", { out: count("out"), in: count("in") });
    again.hidden = same;
  }
  function set(text) {
    box.value = text;
    draw();
    changed();
  }
  box.value = before;
  draw();
  return {
    element: h("div", {}, box, own ? shown : null, h("p", { class: "under" }, said, again)),
    field: box,
    focus: (options) => box.focus(options),
    answered: () => true,
    value: () => (box.value === before ? undefined : box.value),
    set,
    key: () => false,
  };
}

export const describe = (question, value) => value;
