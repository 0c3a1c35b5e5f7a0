// A whole number from 1 to the scale's end, with words at both ends.

import { announce, h } from "../dom.js";
import { digit } from "../keys.js";
import { row } from "./choices.js";

export function make({ question, response, changed, next, t }) {
  const numbers = Array.from({ length: question.scale }, (_, i) => i + 1);
  const [low, high] = question.labels;
  const titleOf = (n) => (n === 1 && low ? `1, ${low}` : n === question.scale && high ? `${n}, ${high}` : String(n));
  const scale = row("radio", numbers.map((n) => ({ value: n, label: String(n), title: titleOf(n) })),
    { label: `${question.text || t("ask_rating")}, ${response.letter}`, onchange: changed, className: "likert" });
  return {
    element: h("div", {}, scale.element, low || high ? h("div", { class: "ends", "aria-hidden": "true" }, h("span", {}, low), h("span", {}, high)) : null),
    focus: scale.focus,
    answered: () => scale.chosen().length === 1,
    value: () => scale.chosen()[0],
    set: (value) => { scale.choose([value]); changed(); },
    key(event) {
      const n = digit(event);
      if (n !== null && n <= question.scale) {
        scale.choose([n]);
        announce(titleOf(n));
        changed();
        next();
        return true;
      }
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by) return false;
      const at = scale.chosen()[0];
      scale.choose([at === undefined ? Math.ceil(question.scale / 2) : Math.min(question.scale, Math.max(1, at + by))]);
      announce(titleOf(scale.chosen()[0]));
      changed();
      return true;
    },
  };
}

export const describe = (question, value) => `${value}/${question.scale}`;
