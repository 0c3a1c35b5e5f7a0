// Free text about the item as a whole.

import { h } from "../dom.js";

export function make({ question, changed, t }) {
  const box = h("textarea", { rows: 2, "aria-label": question.text || t("ask_text"), oninput: changed, maxlength: 100000 });
  return {
    element: box,
    field: box,
    focus: (options) => box.focus(options),
    answered: () => Boolean(box.value.trim()),
    value: () => (box.value.trim() ? box.value : undefined),
    set: (value) => { box.value = value; changed(); },
    key: () => false,
  };
}

export const describe = (question, value) => value;
