// Any number of things to tick.

import { announce } from "../dom.js";
import { digit } from "../keys.js";
import { row } from "./choices.js";

export function make({ question, response, changed, t }) {
  const boxes = row("checkbox", question.options.map((option, i) => ({
    value: option.id, label: option.label, key: i < 10 ? String((i + 1) % 10) : null,
  })), { label: `${question.text || t("ask_flags")}, ${response.letter}`, onchange: changed, className: "flags" });
  return {
    element: boxes.element,
    focus: boxes.focus,
    answered: () => true,
    value: () => boxes.chosen(),
    set: (value) => { boxes.choose(value); changed(); },
    key(event) {
      const n = digit(event);
      const option = n === null ? null : question.options[n - 1];
      if (option) {
        announce(t(boxes.toggle(option.id) ? "ticked" : "unticked", { what: option.label }));
        changed();
        return true;
      }
      const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      const all = [...boxes.inputs.values()];
      const at = all.indexOf(document.activeElement);
      if (!by || at < 0) return false;
      all[(at + by + all.length) % all.length].focus();
      return true;
    },
  };
}

export function describe(question, value) {
  const labels = new Map(question.options.map((option) => [option.id, option.label]));
  return value.length ? value.map((id) => labels.get(id) || id).join(", ") : "—";
}
