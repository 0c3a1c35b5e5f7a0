// Marked stretches of a response: choose words (mouse, or arrow keys), then a kind, then how bad it is.

import { announce, fill, h, kbd } from "../dom.js";
import { digit } from "../keys.js";
import { pieces } from "../words.js";

export function make({ question, response, card, changed, t }) {
  const parts = pieces(response.text);
  const words = parts.map((part, i) => (part.word ? i : -1)).filter((i) => i >= 0);
  const points = Array.from(response.text);
  let spans = []; // {start, end, kind, severity, comment}
  let cursor = null; // index into `words`
  let anchor = null; // the other end, when more than one word is chosen
  let picked = null; // {start, end} chosen with the mouse
  let kind = null; // chosen, while the severity is missing
  let at = -1; // the span at work

  const view = h("div", { class: "plain spans", dir: "auto", tabindex: 0, role: "application", "aria-label": t("spans_text", { letter: response.letter }) });
  const bar = h("div", { class: "spanbar" });
  const list = h("ol", { class: "spanlist", "aria-label": t("marks") });
  const own = !card.take(view);
  const element = h("div", {}, own ? view : null, bar, list);

  const tone = (name) => `k${question.kinds.indexOf(name) % 6}`;
  const said = (span) => points.slice(span.start, span.end).join("");
  function chosen() {
    if (picked) return picked;
    if (cursor === null || !words.length) return null;
    const [first, last] = [cursor, anchor ?? cursor].sort((a, b) => a - b);
    return { start: parts[words[first]].start, end: parts[words[last]].end };
  }

  function draw() {
    const choice = chosen();
    const edges = new Set([0, points.length]);
    for (const span of choice ? [...spans, choice] : spans) edges.add(span.start).add(span.end);
    const cuts = [...edges].sort((a, b) => a - b);
    fill(view, cuts.slice(0, -1).map((start, i) => {
      const end = cuts[i + 1];
      const text = points.slice(start, end).join("");
      const over = spans.filter((span) => span.start <= start && span.end >= end);
      const inChoice = choice && choice.start <= start && choice.end >= end;
      if (!over.length && !inChoice) return text;
      const top = over.at(-1);
      const classes = [top ? `mark ${tone(top.kind)}` : "", inChoice ? "chosen" : "", top && spans.indexOf(top) === at ? "at" : ""];
      return h("mark", { class: classes.join(" ").trim(), title: over.map((span) => label(span)).join("; ") || null }, text);
    }));
    drawBar(choice);
    fill(list, spans.map((span, i) => h("li", { class: i === at ? "at" : "" },
      h("span", { class: `swatch ${tone(span.kind)}`, "aria-hidden": "true" }),
      h("button", { type: "button", class: "link", "aria-current": i === at ? "true" : null, onclick: () => { at = i; draw(); } }, `“${short(said(span))}”`),
      h("span", { class: "quiet" }, label(span)),
      h("input", { type: "text", class: "comment", placeholder: t("comment"), "aria-label": t("comment_on", { what: short(said(span)) }), value: span.comment || "", maxlength: 2000,
        onfocus: () => { at = i; }, oninput: (event) => { span.comment = event.target.value; changed(); } }),
      h("button", { type: "button", class: "link", "aria-label": t("remove_mark", { what: short(said(span)) }), onclick: () => remove(i) }, "✕"))));
  }
  const label = (span) => [span.kind, span.severity].filter(Boolean).join(", ");

  function drawBar(choice) {
    if (!choice) {
      fill(bar, h("p", { class: "quiet" }, t("spans_how")));
      return;
    }
    const options = kind === null ? question.kinds : question.severities;
    fill(bar,
      h("p", { class: "quiet" }, `“${short(said(choice))}” `, kind === null ? t("which_kind") : t("how_bad", { kind })),
      h("div", { class: "choices" }, options.map((option, i) => h("button", {
        type: "button", class: `choice face ${kind === null ? tone(option) : ""}`, onclick: () => choose(option),
      }, i < 9 ? kbd(String(i + 1)) : null, option))));
  }

  function choose(option) {
    if (kind === null) {
      kind = option;
      if (question.severities.length) { announce(t("how_bad", { kind })); draw(); return; }
    }
    const severity = question.severities.length ? { severity: option } : {};
    const span = { ...chosen(), kind, ...severity };
    spans.push(span);
    spans.sort((one, two) => one.start - two.start || one.end - two.end);
    at = spans.indexOf(span);
    announce(`${said(span)}: ${label(span)}`);
    clear();
    changed();
  }
  function clear() {
    const found = picked ? words.findIndex((i) => parts[i].end >= picked.end) : cursor;
    picked = kind = anchor = null;
    cursor = null;
    last = found;
    getSelection()?.removeAllRanges();
    draw();
  }
  let last = null; // where the word cursor was

  function remove(i) {
    announce(t("removed", { what: said(spans[i]) }));
    spans.splice(i, 1);
    at = Math.min(at, spans.length - 1);
    draw();
    changed();
  }

  function move(by, extend, unit) {
    if (!words.length) return true;
    picked = null;
    if (extend && cursor !== null) anchor = anchor ?? cursor;
    else anchor = null;
    const from = cursor ?? last;
    if (from === null || from < 0) cursor = by > 0 ? 0 : words.length - 1;
    else if (cursor === null) cursor = Math.min(words.length - 1, Math.max(0, from + Math.sign(by)));
    else cursor = Math.min(words.length - 1, Math.max(0, unit ? (by > 0 ? words.length - 1 : 0) : cursor + by));
    kind = null;
    draw();
    announce(said(chosen()));
    view.querySelector(".chosen")?.scrollIntoView({ block: "nearest" });
    return true;
  }

  function fromMouse() {
    const selection = getSelection();
    if (!selection || selection.isCollapsed || !view.contains(selection.anchorNode) || !view.contains(selection.focusNode)) return;
    const range = selection.getRangeAt(0);
    const before = document.createRange();
    before.selectNodeContents(view);
    before.setEnd(range.startContainer, range.startOffset);
    let start = Array.from(before.toString()).length;
    let end = start + Array.from(range.toString()).length;
    while (start < end && /\s/u.test(points[start])) start += 1;
    while (end > start && /\s/u.test(points[end - 1])) end -= 1;
    if (start === end) return;
    picked = { start, end };
    cursor = anchor = kind = null;
    draw();
  }
  view.addEventListener("pointerup", () => setTimeout(fromMouse));
  draw();

  return {
    element,
    focus: (options) => view.focus(options),
    answered: () => true,
    value: () => spans.map((span) => {
      const { comment, ...rest } = span;
      return comment && comment.trim() ? { ...rest, comment } : rest;
    }),
    set(value) {
      spans = value.map((span) => ({ ...span }));
      draw();
      changed();
    },
    key(event) {
      const n = digit(event);
      const options = kind === null ? question.kinds : question.severities;
      if (n !== null && chosen() && options[n - 1]) { choose(options[n - 1]); return true; }
      switch (event.key) {
        case "ArrowRight": return move(1, event.shiftKey);
        case "ArrowLeft": return move(-1, event.shiftKey);
        case "Home": return move(-1, event.shiftKey, true);
        case "End": return move(1, event.shiftKey, true);
        case "ArrowDown": case "ArrowUp":
          if (!spans.length) return false;
          at = Math.min(spans.length - 1, Math.max(0, at + (event.key === "ArrowDown" ? 1 : -1)));
          announce(`${said(spans[at])}: ${label(spans[at])}`);
          draw();
          return true;
        case "Delete": case "Backspace":
          if (spans[at]) remove(at);
          return true;
        case "c":
          if (!spans[at]) return false;
          list.querySelectorAll("input")[at].focus();
          return true;
        case "Escape":
          if (!chosen()) return false;
          clear();
          return true;
        default: return false;
      }
    },
  };
}

const short = (text) => {
  const points = Array.from(text);
  return points.length > 40 ? `${points.slice(0, 38).join("")} …` : text;
};

export const describe = (question, value, letters, t) =>
  value.length ? value.map((span) => `${span.start}–${span.end} ${[span.kind, span.severity].filter(Boolean).join(", ")}${span.comment ? ` (${span.comment})` : ""}`).join("; ") : t("no_marks");
