// The keys, in a window of their own: "?".

import { ask, h, kbd } from "./dom.js";
import { t } from "./i18n.js";

const ALL = [
  [["Enter"], "help_enter"], [["Ctrl", "Enter"], "help_submit"], [["J", "K"], "help_steps"], [["U"], "help_undo"], [["S"], "help_skip"],
  [["P"], "help_flag"], [["V"], "help_view"], [["?"], "help_help"], [["Esc"], "help_esc"],
];
const OF = {
  compare: (q) => [[["A", "B", ...(q.tie ? ["T"] : []), ...(q.both_bad ? ["X"] : [])], "help_compare"], ...(q.strengths > 1 ? [[["1", "–", String(q.strengths)], "help_strength"]] : []), [["←", "→"], "help_scale"]],
  rating: (q) => [[["1", "–", String(q.scale % 10)], "help_rating"], [["←", "→"], "help_scale"]],
  flags: (q) => [[["1", "–", String(Math.min(10, q.options.length) % 10)], "help_flags"]],
  accept: () => [[["Y", "N"], "help_accept"]],
  rank: (q) => [[["A", "B", "…"], "help_rank_choose"], [["1", "2", "…"], "help_rank_put"], [["Shift", "↑ ↓"], "help_rank_move"], ...(q.ties ? [[["="], "help_rank_tie"]] : [])],
  spans: () => [[["←", "→"], "help_words"], [["Shift", "← →"], "help_extend"], [["1", "2", "…"], "help_kind"], [["↑", "↓"], "help_marks"], [["C"], "help_comment"], [["Del"], "help_remove"]],
  rewrite: () => [[["Ctrl", "Enter"], "help_write"]],
  text: () => [[["Ctrl", "Enter"], "help_write"]],
};

export function showHelp(task) {
  const table = (rows) => h("dl", { class: "keys" }, rows.map(([keys, word]) => [h("dt", {}, keys.map((key) => (key === "–" || key === "…" ? h("span", {}, key) : h("kbd", {}, key)))), h("dd", {}, t(word))]));
  const types = new Map(task.questions.map((question) => [question.type, question]));
  return ask(t("help_title"), (answer) => [
    h("div", { class: "helps" },
      h("section", {}, h("h3", {}, t("help_all")), table(ALL)),
      [...types].map(([type, question]) => h("section", {}, h("h3", {}, question.text || t(`ask_${type}`)), table(OF[type](question))))),
    h("p", { class: "buttons" }, h("button", { type: "button", autofocus: true, onclick: () => answer(null) }, t("close"))),
  ], { wide: true });
}
