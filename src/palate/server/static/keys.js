// Where a key press goes: dialogs and text fields keep theirs; then the question at work; then the page.

const FIELDS = new Set(["TEXTAREA", "SELECT"]);
const PRESSED = new Set(["BUTTON", "A", "SUMMARY"]);

export const isField = (element) =>
  FIELDS.has(element?.tagName) || (element?.tagName === "INPUT" && !["radio", "checkbox", "button"].includes(element.type));

// The number that a digit key means (0 = 10), or null.
export function digit(event) {
  if (event.shiftKey && event.key.length !== 1) return null;
  return /^[0-9]$/.test(event.key) ? Number(event.key) || 10 : null;
}

// `first(event)` and then `page[key]` are asked; true = handled.
export function listen({ first, page, submit, leave }) {
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing || event.key === "Process" || event.key === "Dead") return;
    if (document.querySelector("dialog[open]")) return;
    const done = () => { event.preventDefault(); event.stopPropagation(); };
    if ((event.ctrlKey || event.metaKey) && event.key === "Enter") {
      done();
      submit();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (isField(event.target)) {
      if (event.key === "Escape") { done(); leave(event.target); }
      return;
    }
    if (PRESSED.has(event.target.tagName) && (event.key === "Enter" || event.key === " ")) return;
    if (first(event)) { done(); return; }
    const action = page[event.key] || page[event.key.toLowerCase()];
    if (action) { done(); action(); }
  });
}
