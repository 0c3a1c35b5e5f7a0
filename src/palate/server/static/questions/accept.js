// Good or not good.

import { announce } from "../dom.js";
import { row } from "./choices.js";

export function make({ question, response, changed, next, t }) {
  const pair = row("radio", [
    { value: true, label: t("good"), key: "Y", tone: "yes" },
    { value: false, label: t("not_good"), key: "N", tone: "no" },
  ], { label: `${question.text || t("ask_accept")}, ${response.letter}`, onchange: changed, className: "accept" });
  return {
    element: pair.element,
    focus: pair.focus,
    answered: () => pair.chosen().length === 1,
    value: () => pair.chosen()[0],
    set: (value) => { pair.choose([value]); changed(); },
    key(event) {
      const given = { y: true, 1: true, n: false, 0: false, 2: false }[event.key.toLowerCase()];
      const moved = { ArrowLeft: true, ArrowRight: false }[event.key];
      const value = given ?? moved;
      if (value === undefined) return false;
      pair.choose([value]);
      announce(t(value ? "good" : "not_good"));
      changed();
      if (given !== undefined) next();
      return true;
    },
  };
}

export const describe = (question, value, letters, t) => t(value ? "good" : "not_good");
