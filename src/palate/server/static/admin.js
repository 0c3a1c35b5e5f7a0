// How the project stands, for admins; deciding about contested items, for adjudicators too.

import { Refused, call } from "./api.js";
import { curve, interval } from "./charts.js";
import { announce, fill, h, kbd } from "./dom.js";
import { describeAnswer, makeForm } from "./form.js";
import { showHelp } from "./help.js";
import { t } from "./i18n.js";
import { listen } from "./keys.js";
import { enter, topBar } from "./shell.js";

const LEAST = 5; // cases below which a share says too little for a hint
const main = document.getElementById("main");
const actions = document.getElementById("actions");
let me;
let outbox;
let form = null; // of the item that is being decided
let presentation = null;
let last = null; // decided last, to undo
let busy = false;
let state;
let line;
let names = {};

start();

async function start() {
  let language;
  ({ me, language, state, line, outbox } = await enter((pseudonym) => `${pseudonym}:decide`));
  document.title = `${t("overview")}: ${me.task.title}`;
  document.getElementById("top").replaceWith(topBar({ me, title: me.task.title, language, links: [h("a", { href: "/" }, t("annotate"))] }));
  listen({
    first: (event) => Boolean(form && !busy && (event.key === "Enter" ? (form.forward() || decide(), true) : form.key(event))),
    page: { "?": () => form && showHelp(me.task), j: () => form?.step(1), k: () => form?.step(-1), u: undo },
    submit: decide,
    leave: () => (form ? form.leave() : document.activeElement.blur()),
  });
  if (me.role === "annotator") {
    fill(main, h("p", { class: "card" }, t("not_allowed")));
    return;
  }
  await outbox.resume();
  if (me.role === "admin" && location.hash !== "#decide") await overview();
  else await contestedNext();
}

// --- overview ----------------------------------------------------------------------------------------------------------

async function overview() {
  form = presentation = null;
  history.replaceState(null, "", "/admin");
  const [found, persons] = await Promise.all([line.until(() => call("admin/summary")), line.until(() => call("admin/people"))]);
  state.show("", "");
  names = found.names;
  fill(main, figures(found.progress), agreement(found), annotators(found), drift(found.weeks), contested(found), people(persons), hash(found.last_hash));
  fill(actions,
    h("button", { type: "button", onclick: overview }, t("refresh")),
    h("button", { type: "button", class: "primary", id: "decide", onclick: contestedNext, disabled: !found.progress.contested }, t("decide_next")));
  main.focus({ preventScroll: true });
  announce(t("overview"));
}

const nameOf = (pseudonym) => h("span", { class: "name", dir: "auto", title: pseudonym }, names[pseudonym] || pseudonym);
const percent = (share) => `${Math.round(100 * share)} %`;
const card = (title, ...rest) => h("section", { class: "card" }, h("div", { class: "head" }, h("h2", {}, title)), rest);

function figures(found) {
  const figure = (label, value, share = null) => h("div", { class: "card figure" }, h("span", { class: "quiet" }, label), h("b", {}, value), share === null ? null : track(share, label));
  return h("section", { class: "figures", "aria-label": t("overview") },
    figure(t("answers"), `${found.done} / ${found.wanted}`, found.wanted ? found.done / found.wanted : 0),
    figure(t("items_done"), `${found.complete} / ${found.items}`, found.items ? found.complete / found.items : 0),
    figure(t("contested"), found.contested), figure(t("reports"), found.flags), figure(t("skipped_by_all"), found.skipped_by_all), figure(t("late_answers"), found.late), figure(t("people"), found.annotators));
}

function track(share, label) {
  const bar = h("div", { class: "bar" });
  bar.style.inlineSize = `${100 * share}%`;
  return h("div", { class: "track", role: "progressbar", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(100 * share) }, bar);
}

function table(heads, rows, label) {
  return h("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": label },
    h("table", { class: "data" }, h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))), h("tbody", {}, rows)));
}

function agreement(found) {
  const number = (value) => value.toFixed(2);
  const rows = found.agreement.map((row) => h("tr", {},
    h("td", {}, row.question, " ", h("span", { class: "of" }, row.type)),
    row.alpha === null ? h("td", { colspan: 2, class: "quiet" }, row.ratings ? t("not_defined", { why: row.why }) : t("no_answers")) : [
      h("td", { class: "n" }, h("b", {}, number(row.alpha))),
      h("td", {}, h("div", { class: "interval" }, interval(row.alpha, row.low, row.high, `${number(row.alpha)}, ${row.low === null ? "–" : `${number(row.low)}–${number(row.high)}`}`)),
        h("span", { class: "of" }, row.low === null ? "" : `${number(row.low)} – ${number(row.high)}`))],
    h("td", { class: "n" }, row.items), h("td", { class: "n" }, row.ratings)));
  return card(t("agreement"), h("p", { class: "quiet" }, t("agreement_help")),
    rows.length ? table([t("question"), t("alpha"), t("interval"), t("items"), t("ratings")], rows, t("agreement")) : h("p", {}, t("no_answers")));
}

// Hints from the shares themselves; each says its evidence.
function hints(row) {
  const found = [];
  const say = (key, share, strong) => found.push(h("span", { class: `tag${strong ? " strong" : ""}` }, t(key, { share: percent(share.share), of: share.of })));
  const enough = (share) => share.share !== null && share.of >= LEAST;
  if (enough(row.gold) && row.gold.share < 0.6) say("flag_gold", row.gold, row.gold.share < 0.4);
  if (enough(row.attention) && row.attention.share < 0.8) say("flag_attention", row.attention, true);
  if (enough(row.repeat) && row.repeat.share < 0.5) say("flag_repeat", row.repeat);
  if (enough(row.unchanged) && row.unchanged.share > 0.5) say("flag_unchanged", row.unchanged);
  if (row.first.share !== null && row.first.of >= 20 && Math.abs(row.first.share - 0.5) > 2 / Math.sqrt(row.first.of)) say("flag_first", row.first); // 4 standard errors of a fair coin
  return found;
}

function annotators(found) {
  const model = new Map(found.model.map((row) => [row.annotator, row]));
  const plain = (key, cell) => ({ key, cell });
  const share = (key, name) => ({ key, cell: (row) => (row[name].share === null ? "–" : [percent(row[name].share), " ", h("span", { class: "of" }, row[name].of)]), shown: found.annotators.some((row) => row[name].of) });
  const fitted = (key, cell) => ({ key, cell: (row) => (model.has(row.annotator) ? cell(model.get(row.annotator)) : "–"), shown: model.size > 0 });
  const columns = [
    plain("annotator", (row) => nameOf(row.annotator)), plain("answers", (row) => row.answers),
    plain("median_seconds", (row) => (row.median_seconds === null ? "–" : row.median_seconds.toFixed(1))),
    share("gold", "gold"), share("attention", "attention"), share("repeat", "repeat"), share("same_order", "unchanged"), share("first_side", "first"),
    fitted("reliability", (own) => `${own.reliability.toFixed(2)} ± ${own.reliability_sd.toFixed(2)}`), fitted("left_bias", (own) => own.left_bias.toFixed(2)),
    plain("last_answer", (row) => row.last.slice(0, 10)),
  ].filter((column) => column.shown !== false);
  const rows = found.annotators.map((row) => {
    const own = model.get(row.annotator);
    const tags = [...hints(row), ...(own ? own.flags.map((flag) => h("span", { class: "tag strong" }, `${flag.name}: ${flag.evidence}`)) : [])];
    return [h("tr", { class: tags.length ? "flagged" : null }, columns.map((column) => h("td", { class: column.key === "annotator" ? null : "n" }, column.cell(row)))),
      tags.length ? h("tr", {}, h("td", { colspan: columns.length }, h("span", { class: "quiet" }, `${t("flags")}: `), tags)) : null];
  });
  const heads = columns.map((column) => column.key);
  const section = h("section", { class: "card" }, h("div", { class: "head" }, h("h2", {}, t("annotators")),
    h("button", { type: "button", class: "small", onclick: async (event) => {
      event.target.disabled = true;
      event.target.textContent = t("fitting");
      const again = await line.until(() => call("admin/summary?model=true"));
      section.replaceWith(annotators(again));
      if (!again.model.length) state.show("warn", t("model_few"));
    } }, t("fit_model"))),
  h("p", { class: "quiet" }, t("annotators_help")), rows.length ? table(heads.map((head) => t(head)), rows, t("annotators")) : h("p", {}, t("no_answers")));
  return section;
}

function drift(weeks) {
  if (!weeks.length) return null;
  const chart = (label, points, options) => {
    const known = points.filter((point) => point !== null);
    if (!known.length) return null;
    return h("figure", { class: "chart" }, h("figcaption", {}, h("span", {}, label), h("b", {}, options.format(known.at(-1)))), curve(points, { label, ...options }));
  };
  const seconds = (value) => `${value.toFixed(1)} s`;
  const between = { low: 0, high: 1, format: percent };
  return card(t("drift"), h("p", { class: "quiet" }, weeks.length > 1 ? `${weeks[0].week} – ${weeks.at(-1).week}` : `${weeks[0].week}. ${t("drift_one")}`),
    h("div", { class: "charts" },
      chart(t("answers"), weeks.map((week) => week.answers), { format: String }),
      chart(t("median_seconds"), weeks.map((week) => week.median_seconds), { format: seconds }),
      chart(t("gold"), weeks.map((week) => week.gold.share), between),
      chart(t("no_preference"), weeks.map((week) => week.no_preference.share), between),
      chart(t("first_side"), weeks.map((week) => week.first.share), between)));
}

const textOf = (prompt) => (typeof prompt === "string" ? prompt : prompt.map((turn) => `${turn.role}: ${turn.content}`).join("\n"));
const letterOf = (number) => "ABCDEFGHI"[number] ?? "?";

function contested(found) {
  const rows = found.contested.map((row) => h("li", {},
    h("div", { class: "head" }, h("span", {}, h("span", { class: `tag ${row.decided ? "calm" : ""}` }, t(row.decided ? "decided" : "open")), h("span", { class: "quiet" }, `${t("disagreement")} ${percent(row.disagreement)}`))),
    h("div", { class: "plain", dir: "auto", tabindex: 0 }, textOf(row.prompt)),
    h("div", { class: "pair" }, row.responses.map((text, i) => [h("span", { class: "letter" }, letterOf(i)), h("div", { class: "plain", dir: "auto", tabindex: 0 }, text)])),
    others(row.answers, letterOf)));
  return card(t("contested_items"), rows.length ? h("ul", { class: "contested" }, rows) : h("p", { class: "quiet" }, t("contested_none")));
}

const others = (answers, letters) => h("div", { class: "others" },
  answers.map(({ annotator, values }) => h("div", {}, h("b", {}, nameOf(annotator)), describeAnswer(values, me.task, letters, t))));

function people(persons) {
  const said = h("div", { role: "status" });
  const name = h("input", { type: "text", maxlength: 100, required: true, autocomplete: "off" });
  const role = h("select", {}, ["annotator", "adjudicator", "admin"].map((each) => h("option", { value: each }, t(`role_${each}`))));
  const add = async (event) => {
    event.preventDefault();
    try {
      const found = await call("admin/people", { name: name.value, role: role.value });
      const link = h("input", { type: "text", readonly: true, value: `${location.origin}${found.link}`, "aria-label": t("login_field") });
      fill(said, h("p", {}, t("link_once", { name: found.name })), h("div", { class: "row" },
        h("button", { type: "button", onclick: async (click) => { link.select(); await navigator.clipboard?.writeText(link.value); click.target.textContent = t("copied"); } }, t("copy")), link));
      body.append(person({ ...found, role: role.value, active: true }));
      name.value = "";
    } catch (error) {
      fill(said, h("p", { class: "state bad" }, error instanceof Refused ? `${error.message} ${error.todo}` : t("login_net")));
    }
  };
  const person = (each) => h("tr", {}, h("td", {}, h("span", { class: "name", dir: "auto" }, each.name)), h("td", { class: "n" }, each.pseudonym), h("td", {}, t(`role_${each.role}`), each.active ? null : h("span", { class: "quiet" }, ` (${t("inactive")})`)));
  const list = table([t("name"), "", t("role")], persons.map(person), t("people"));
  const body = list.querySelector("tbody");
  return h("section", { class: "card people" }, h("div", { class: "head" }, h("h2", {}, t("people"))), list,
    h("form", { onsubmit: add }, h("label", {}, t("name"), name), h("label", {}, t("role"), role), h("button", { type: "submit" }, t("add_person"))), said);
}

const hash = (value) => card(t("last_hash"), h("p", { class: "hash" }, value), h("p", { class: "quiet" }, t("last_hash_help")));

// --- deciding ------------------------------------------------------------------------------------------------------------

async function contestedNext() {
  history.replaceState(null, "", "/admin#decide");
  setBusy(true);
  const found = await line.until(() => call("adjudicate/next", {}));
  setBusy(false);
  const back = me.role === "admin" ? h("button", { type: "button", onclick: overview }, t("overview")) : null;
  const again = h("button", { type: "button", id: "undo", onclick: undo, disabled: !last }, t("undo"), kbd("U"));
  if (found.done) {
    form = presentation = null;
    fill(main, h("section", { class: "card nothing" }, h("h2", {}, t("nothing_contested")), h("p", {}, found.why), h("p", { class: "buttons" }, h("button", { type: "button", onclick: contestedNext }, t("look_again")))));
    fill(actions, back, again);
    announce(t("nothing_contested"));
    return;
  }
  presentation = found.presentation;
  form = makeForm(found, me.task, t, () => { if (state.element.classList.contains("warn")) state.show("", ""); });
  fill(main, card(t("others"), others(found.answers, form.letters)), form.element);
  fill(actions, back, again, h("button", { type: "button", class: "quietly", onclick: () => showHelp(me.task) }, t("keys"), kbd("?")),
    h("button", { type: "button", id: "submit", class: "primary", onclick: decide }, t("adjudicate"), kbd("Enter")));
  scrollTo(0, 0);
  main.focus({ preventScroll: true });
  announce(t("state_new", { n: form.cells.length }));
}

function setBusy(now) {
  busy = now;
  main.inert = now;
  main.classList.toggle("busy", now);
  for (const button of actions.querySelectorAll("button")) button.disabled = now;
}

async function decide() {
  if (!form || busy) return;
  if (form.missing().length) {
    const first = form.showMissing();
    state.show("warn", t("missing", { what: first.question.text || first.question.id }));
    return;
  }
  setBusy(true);
  const { refused } = await outbox.send("adjudicate", { presentation, values: form.values() });
  if (refused && ![404, 409].includes(refused.status)) {
    state.show("bad", t("refused", { error: refused.message }));
    setBusy(false);
    return;
  }
  if (refused) state.show("bad", t("refused", { error: refused.message }));
  else last = presentation;
  await contestedNext();
}

async function undo() {
  if (busy || !last) return;
  setBusy(true);
  const { refused } = await outbox.send("undo", { presentation: last });
  last = null;
  state.show(refused ? "bad" : "good", refused ? t("refused", { error: refused.message }) : t("saved_undo"));
  await contestedNext();
}
