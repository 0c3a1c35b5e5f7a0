// What this browser keeps between visits. Without storage (private windows) it is kept until the page is closed.

const memory = new Map();

export function load(name, otherwise = null) {
  try {
    const text = localStorage.getItem(`palate:${name}`);
    if (text !== null) return JSON.parse(text);
  } catch { /* off, or not ours */ }
  return memory.has(name) ? memory.get(name) : otherwise;
}

export function save(name, value) {
  memory.set(name, value);
  try {
    localStorage.setItem(`palate:${name}`, JSON.stringify(value));
  } catch { /* full or off: memory has it */ }
}

export function forget(name) {
  memory.delete(name);
  try {
    localStorage.removeItem(`palate:${name}`);
  } catch { /* off */ }
}
