// The token stands after the #, so that it is in no log; it is sent once, by POST.

import { fill, h } from "./dom.js";
import { t, useLanguage } from "./i18n.js";
import { forget, load } from "./store.js";

const said = document.getElementById("said");
const form = document.getElementById("form");
const field = h("input", { type: "password", autocomplete: "off", spellcheck: "false", required: true });

useLanguage(navigator.language.startsWith("zh") ? "zh" : "en");
document.getElementById("title").textContent = t("login_title");
fill(form, h("label", {}, h("span", {}, t("login_field")), field), h("button", { type: "submit", class: "primary" }, t("login_go")));
form.addEventListener("submit", (event) => {
  event.preventDefault();
  logIn(field.value.trim().split("#").at(-1));
});
addEventListener("hashchange", fromLink);
fromLink();

function fromLink() {
  const token = location.hash.slice(1);
  if (!token) {
    const left = load("left");
    forget("left");
    wait(left ? `${t("login_again")} ${t("login_open")}` : t("login_open"));
    return;
  }
  history.replaceState(null, "", "/login");
  logIn(token);
}

async function logIn(token) {
  said.textContent = t("login_doing");
  try {
    const response = await fetch("/api/login", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ token }) });
    const found = await response.json();
    if (response.ok) location.replace("/");
    else wait(`${found.error} ${t("login_open")}`);
  } catch {
    field.value = token; // to try again: the token may not be used up
    wait(t("login_net"));
  }
}

function wait(text) {
  said.textContent = text;
  form.hidden = false;
  field.focus();
}
