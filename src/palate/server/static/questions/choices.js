// A row of native radio buttons or checkboxes that look like keys to press.

import { h, kbd } from "../dom.js";

let groups = 0;

// choices: [{value, label, key, title, tone}]
export function row(type, choices, { label, onchange, className = "" }) {
  const name = `group-${(groups += 1)}`;
  const inputs = new Map();
  const element = h("div", { class: `choices ${className}`, role: type === "radio" ? "radiogroup" : "group", "aria-label": label });
  for (const choice of choices) {
    const input = h("input", { type, name, class: "hidden-input", onchange: () => onchange(choice.value), "aria-label": choice.title });
    inputs.set(choice.value, input);
    element.append(h("label", { class: `choice ${choice.tone || ""}` }, input,
      h("span", { class: "face", title: choice.title }, choice.key ? kbd(choice.key) : null, h("span", {}, choice.label))));
  }
  return {
    element,
    inputs,
    chosen: () => [...inputs].filter(([, input]) => input.checked).map(([value]) => value),
    choose(values) { for (const [value, input] of inputs) input.checked = values.includes(value); },
    toggle(value) {
      const input = inputs.get(value);
      input.checked = !input.checked;
      return input.checked;
    },
    focus(options) { ([...inputs.values()].find((input) => input.checked) || [...inputs.values()][0])?.focus(options); },
  };
}
